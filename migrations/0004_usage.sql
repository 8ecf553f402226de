-- What was used: per credential and instance for people and bills, per subject and day for daily limits.

-- A row is what one kind of credential (or one API key) did on one instance in one minute, hour or day.
-- Minutes are written by the workers; hours are made from them, and days from hours, by control/usage.py.
CREATE TABLE usage (
    step            text        NOT NULL CHECK (step IN ('minute', 'hour', 'day')),
    at              timestamptz NOT NULL,  -- the beginning
    organization_id uuid        NOT NULL,
    instance_id     uuid        NOT NULL,  -- refers to nothing on purpose: bills outlive what they are for
    credential      text        NOT NULL CHECK (credential IN ('key', 'token', 'readonly_token', 'session')),
    api_key_id      uuid        NOT NULL,  -- zeros where it is no API key
    commands        bigint      NOT NULL,
    reads           bigint      NOT NULL,
    writes          bigint      NOT NULL,
    requests        bigint      NOT NULL,
    errors          bigint      NOT NULL,  -- requests answered with 400 or above
    bytes_in        bigint      NOT NULL,
    bytes_out       bigint      NOT NULL,
    micros          bigint      NOT NULL,  -- of all requests together
    latency         bigint[]    NOT NULL,  -- how many requests in each bucket of redisgate/metering.py
    PRIMARY KEY (organization_id, instance_id, step, at, credential, api_key_id)
);
CREATE INDEX usage_age ON usage (step, at);
CREATE INDEX usage_organization ON usage (organization_id, step, at);
CREATE INDEX usage_api_key ON usage (api_key_id, step, at) WHERE credential = 'key';

-- The last batch of each worker, so that a batch whose acknowledgement was lost is not added twice.
CREATE TABLE usage_writers (
    writer   uuid        PRIMARY KEY,
    batch    bigint      NOT NULL,
    seen_at  timestamptz NOT NULL DEFAULT now()
);

-- Keys, memory and connections of an instance, as INFO told them.
CREATE TABLE instance_samples (
    instance_id uuid        NOT NULL REFERENCES instances ON DELETE CASCADE,
    at          timestamptz NOT NULL,  -- the minute
    keys        bigint      NOT NULL,
    memory      bigint      NOT NULL,  -- bytes
    connections integer     NOT NULL,
    PRIMARY KEY (instance_id, at)
);
CREATE INDEX instance_samples_age ON instance_samples (at);

CREATE FUNCTION add_histograms(a bigint[], b bigint[]) RETURNS bigint[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(array_agg(coalesce(x, 0) + coalesce(y, 0) ORDER BY place), '{}')
    FROM unnest(a, b) WITH ORDINALITY AS both_of (x, y, place)
$$;
CREATE AGGREGATE sum_histograms(bigint[]) (SFUNC = add_histograms, STYPE = bigint[], INITCOND = '{}');

-- Daily limits that several gateways share; control/daily.py tells how.
CREATE TABLE daily_leases (
    subject uuid        NOT NULL,  -- an organization or an API key
    day     date        NOT NULL,
    gateway uuid        NOT NULL,
    leased  bigint      NOT NULL,
    used    bigint      NOT NULL,  -- as it last said
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (subject, day, gateway)
);
CREATE INDEX daily_leases_age ON daily_leases (day);

-- A gateway holds `held` of a subject's limit on a day, and has used `spent` of the limit. It needs `need` more soon;
-- 0: nothing for now; -1: nothing ever, it is stopping. What it is given, or gives back where that is negative; what
-- others hold; and how many gateways there are with it.
CREATE FUNCTION renew_daily_lease(
    whom uuid, which_day date, who uuid, daily_limit bigint, held bigint, spent bigint, need bigint,
    OUT granted bigint, OUT others bigint, OUT gateways integer
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    moment timestamptz;
    spare bigint := held - spent;
    remaining bigint;
    part bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(whom::text, which_day - date '2000-01-01'));
    moment := clock_timestamp();
    -- Who has not been heard of for so long is gone, and what it did not use is free again.
    UPDATE daily_leases SET leased = used
        WHERE subject = whom AND day = which_day AND gateway <> who
        AND seen_at < moment - interval '10 seconds' AND leased > used;
    SELECT coalesce(sum(greatest(leased, used)), 0), 1 + count(*) FILTER (WHERE seen_at > moment - interval '6 seconds')
        INTO others, gateways
        FROM daily_leases WHERE subject = whom AND day = which_day AND gateway <> who;
    remaining := greatest(daily_limit - others - greatest(held, spent), 0);
    -- Not all of it, even when alone: others have to find something when they come.
    part := greatest(remaining / (2 * gateways), need - spare, 1);
    granted := greatest(-spare, 0);  -- what was used ahead of any lease
    IF spare > 0 AND others + held > daily_limit THEN
        -- It was silent for so long that what it held went to others.
        granted := -least(spare, others + held - daily_limit);
    ELSIF need > 0 AND remaining > 0 AND (spare < need OR spare < part / 2) THEN
        granted := granted + least(remaining, part);
    ELSIF need < 0 AND spare > 0 THEN
        granted := -spare;
    ELSIF gateways > 1 AND remaining < spare THEN
        -- Others will need it; it keeps what it needs itself, and a little for whoever comes.
        granted := granted - greatest(spare - greatest(need, daily_limit / 100), 0);
    END IF;
    INSERT INTO daily_leases AS mine (subject, day, gateway, leased, used, seen_at)
        VALUES (whom, which_day, who, held + granted, spent, moment)
        ON CONFLICT (subject, day, gateway)
        DO UPDATE SET leased = excluded.leased, used = excluded.used, seen_at = excluded.seen_at;
END
$$;
