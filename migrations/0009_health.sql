-- How the deployment is: whether the chain of the audit log held, and which workers there are.

CREATE TABLE audit_checks (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at            timestamptz NOT NULL DEFAULT now(),
    seconds       real        NOT NULL,  -- that it took
    events        bigint      NOT NULL,
    head_sequence bigint,                -- the last event that was read
    compared      integer     NOT NULL,  -- heads noted elsewhere
    problem_count integer     NOT NULL,
    problems      text[]      NOT NULL   -- the first of them, for people
);

-- Unlogged: workers write it every few seconds, and after a crash of PostgreSQL they have written it again at once.
CREATE UNLOGGED TABLE workers (
    id         uuid        PRIMARY KEY,  -- of one process, new at each start
    host_id    uuid        NOT NULL,
    host_name  text        NOT NULL,
    number     integer     NOT NULL,     -- of the seat among the host's workers
    pid        integer     NOT NULL,
    version    text        NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at    timestamptz NOT NULL DEFAULT now(),
    state      jsonb       NOT NULL      -- as control/workers.py tells
);
CREATE INDEX workers_seen ON workers (seen_at);
