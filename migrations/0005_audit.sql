-- Who did what: a chain of authentication codes (control/audit.py), to which rows are only ever added.
--
-- The application's role may SELECT and INSERT and nothing else (control/migrate.py grants it no more). The trigger
-- stops everybody, the owner of the table included, until somebody with that right removes the trigger; what is then
-- changed breaks the chain, whose key is not in the database.

CREATE TABLE audit_events (
    sequence        bigint      PRIMARY KEY CHECK (sequence > 0),
    at              timestamptz NOT NULL,
    organization_id uuid,  -- refers to nothing on purpose: the record outlives what it speaks of
    actor_kind      text        NOT NULL CHECK (actor_kind IN ('user', 'api_key', 'system', 'anonymous')),
    actor_id        uuid,
    actor_name      text,
    action          text        NOT NULL,
    target_kind     text        NOT NULL,
    target_id       text,
    outcome         text        NOT NULL CHECK (outcome IN ('success', 'failure', 'denied')),
    before          jsonb,
    after           jsonb,
    address         inet,
    request_id      text,
    key_id          text        NOT NULL,  -- which key made the code
    mac             bytea       NOT NULL CHECK (length(mac) = 32)
);
CREATE INDEX audit_events_organization ON audit_events (organization_id, sequence DESC);
CREATE INDEX audit_events_actor ON audit_events (actor_id, sequence DESC);

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on % is refused: rows are only ever added to it', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Make the caller's transaction the only one that adds to the chain until it ends, and tell the chain's end.
-- Each statement of a volatile function sees what was committed before it began, so the second one sees what the
-- transaction that held the lock has added. `before` and `after` come back as jsonb will show them ever after: that
-- text is what the code is made of.
CREATE FUNCTION audit_head(
    before jsonb, after jsonb,
    OUT sequence bigint, OUT mac bytea, OUT at timestamptz, OUT before_text text, OUT after_text text
) LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(x'7265646175646974'::bigint);  -- "redaudit"
    SELECT event.sequence, event.mac INTO sequence, mac FROM audit_events AS event
        ORDER BY event.sequence DESC LIMIT 1;
    at := clock_timestamp();
    before_text := before::text;
    after_text := after::text;
END
$$;
