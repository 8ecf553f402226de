-- What instances do, as their servers count it: beside the samples, hits and misses and the commands that ran.

ALTER TABLE instance_samples
    ADD COLUMN hits    bigint NOT NULL DEFAULT 0,  -- since the sample before, as the others below
    ADD COLUMN misses  bigint NOT NULL DEFAULT 0,
    ADD COLUMN evicted bigint NOT NULL DEFAULT 0,  -- keys
    ADD COLUMN expired bigint NOT NULL DEFAULT 0;  -- keys

-- What a server had counted at the last sample: servers count from their start, samples are what has come since.
CREATE TABLE instance_counters (
    instance_id uuid        PRIMARY KEY REFERENCES instances ON DELETE CASCADE,
    run_id      text,                             -- of the server; null: it has not been looked at
    sampled_at  timestamptz NOT NULL DEFAULT '-infinity',
    counters    jsonb       NOT NULL DEFAULT '{}',
    commands    jsonb       NOT NULL DEFAULT '{}'  -- name: [calls, microseconds, failed calls]
);

-- How often each command ran in ten minutes.
CREATE TABLE instance_commands (
    instance_id uuid        NOT NULL REFERENCES instances ON DELETE CASCADE,
    at          timestamptz NOT NULL,  -- the beginning
    command     text        NOT NULL,
    calls       bigint      NOT NULL,
    micros      bigint      NOT NULL,
    failed      bigint      NOT NULL,
    PRIMARY KEY (instance_id, at, command)
);
CREATE INDEX instance_commands_age ON instance_commands (at);
