-- API keys, and what tells the gateways that something about access has changed.

-- The secret is a signed token that is shown once; its digest finds the row, and the row decides what it grants.
CREATE TABLE api_keys (
    id                  uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    organization_id     uuid        NOT NULL REFERENCES organizations,
    user_id             uuid        NOT NULL REFERENCES users,  -- whose role bounds it
    name                text        NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    digest              bytea       NOT NULL UNIQUE CHECK (octet_length(digest) = 32),
    prefix              text        NOT NULL,  -- rg_ and a few characters, for people to tell keys apart

    -- What it may do: read, write, +command, +@category, -command, -@category; and for managing, control/roles.py.
    scopes              text[]      NOT NULL,
    instance_ids        uuid[],  -- null: every instance of the organization
    key_prefixes        text[]      NOT NULL DEFAULT '{}',  -- of Redis keys; empty: every key
    networks            cidr[]      NOT NULL DEFAULT '{}',  -- empty: from everywhere
    -- beside the organization's own limits; null: none
    requests_per_second integer     CHECK (requests_per_second > 0),
    commands_per_day    bigint      CHECK (commands_per_day > 0),

    expires_at          timestamptz NOT NULL,
    revoked_at          timestamptz,
    valid_until         timestamptz,  -- of a key that was rotated
    rotated_from        uuid        REFERENCES api_keys,
    last_used_at        timestamptz,  -- right to a minute
    last_used_from      inet,
    created_at          timestamptz NOT NULL DEFAULT now(),
    updated_at          timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX api_keys_organization ON api_keys (organization_id, created_at DESC);
CREATE INDEX api_keys_user ON api_keys (user_id);
CREATE INDEX api_keys_rotated_from ON api_keys (rotated_from);

-- Every change that access depends on has a revision. Whoever commits it holds the one row of access_revision, so
-- revisions are in the order of commits and have no gaps: who has seen one has seen all before it. The triggers are
-- deferred to the commit, so that the row is held for no longer than that takes, and is the last that is locked.
CREATE TABLE access_revision (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    revision bigint  NOT NULL
);
INSERT INTO access_revision (revision) VALUES (0);

-- What changed. A gateway that fell behind further than this is kept forgets all it knows.
CREATE TABLE access_changes (
    revision bigint      PRIMARY KEY,
    subject  text        NOT NULL,  -- <table>:<id>; inventory:<organization id> when its set of instances changes
    at       timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- note_access_change(kind, column): the change concerns <kind>:<value of the column>.
CREATE FUNCTION note_access_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    changed jsonb := CASE TG_OP WHEN 'DELETE' THEN to_jsonb(OLD) ELSE to_jsonb(NEW) END;
    subject text := TG_ARGV[0] || ':' || (changed ->> TG_ARGV[1]);
    new_revision bigint;
BEGIN
    UPDATE access_revision SET revision = revision + 1 RETURNING revision INTO new_revision;
    INSERT INTO access_changes (revision, subject) VALUES (new_revision, subject);
    PERFORM pg_notify('redisgate_access', subject);
    RETURN NULL;
END
$$;

-- A new key or session is known to nobody before it is committed, so nobody has to be told.
CREATE CONSTRAINT TRIGGER access_changed AFTER DELETE OR UPDATE OF
        scopes, instance_ids, key_prefixes, networks, requests_per_second, commands_per_day,
        expires_at, revoked_at, valid_until, user_id, digest
    ON api_keys DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note_access_change('api_keys', 'id');
CREATE CONSTRAINT TRIGGER access_changed AFTER DELETE OR UPDATE OF user_id, ends_at, revoked_at
    ON sessions DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note_access_change('sessions', 'id');
CREATE CONSTRAINT TRIGGER access_changed AFTER DELETE OR UPDATE OF disabled_at, is_admin
    ON users DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note_access_change('users', 'id');
CREATE CONSTRAINT TRIGGER access_changed AFTER INSERT OR DELETE OR UPDATE
    ON memberships DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note_access_change('users', 'user_id');
CREATE CONSTRAINT TRIGGER access_changed AFTER DELETE OR UPDATE OF deleted_at
    ON organizations DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note_access_change('organizations', 'id');
CREATE CONSTRAINT TRIGGER access_changed AFTER INSERT OR DELETE OR UPDATE
    ON quotas DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note_access_change('organizations', 'organization_id');
CREATE CONSTRAINT TRIGGER access_ended AFTER DELETE
    ON instances DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note_access_change('instances', 'id');
-- Not on what the reconciler reports of its progress.
CREATE CONSTRAINT TRIGGER access_changed AFTER UPDATE
    ON instances DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (
        (OLD.organization_id, OLD.slug, OLD.label, OLD.desired_state, OLD.endpoint, OLD.redis_user,
         OLD.password_encrypted, OLD.token_digest, OLD.readonly_token_digest, OLD.deleted_at)
        IS DISTINCT FROM
        (NEW.organization_id, NEW.slug, NEW.label, NEW.desired_state, NEW.endpoint, NEW.redis_user,
         NEW.password_encrypted, NEW.token_digest, NEW.readonly_token_digest, NEW.deleted_at))
    EXECUTE FUNCTION note_access_change('instances', 'id');
CREATE CONSTRAINT TRIGGER inventory_changed AFTER INSERT OR DELETE OR UPDATE OF
        organization_id, slug, label, desired_state, deleted_at
    ON instances DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION note_access_change('inventory', 'organization_id');
