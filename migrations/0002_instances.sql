-- Instances, the hosts that run local ones, and the record of what was done to bring them about.

-- One row per machine that runs a steward. Its id lies in the state directory there.
CREATE TABLE hosts (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    -- major.minor.patch of each redis-server that this host can start
    redis_versions text[] NOT NULL DEFAULT '{}',
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE instances (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    organization_id uuid NOT NULL REFERENCES organizations (id),
    name text NOT NULL,
    slug text NOT NULL,
    -- the label under base_domain: the slug and a short random suffix
    label text NOT NULL UNIQUE,
    provisioner text NOT NULL CHECK (provisioner IN ('local', 'external', 'kubernetes')),

    -- What is wanted. Every change of it raises the generation.
    desired_state text NOT NULL DEFAULT 'running' CHECK (desired_state IN ('running', 'stopped', 'deleted')),
    generation integer NOT NULL DEFAULT 1,
    restarts_wanted integer NOT NULL DEFAULT 0,
    -- bytes; 0 for an external Redis, whose memory is not ours
    max_memory bigint NOT NULL CHECK (max_memory = 0 OR max_memory BETWEEN 1048576 AND 17179869184),
    -- major.minor[.patch] as asked for; null: whichever there is
    redis_version_wanted text,
    persistence_enabled boolean NOT NULL DEFAULT true,
    backup_enabled boolean NOT NULL DEFAULT false,
    eviction text NOT NULL DEFAULT 'noeviction',
    -- as Kubernetes writes quantities: 500m, 256Mi; null: the provisioner's choice
    cpu_request text,
    memory_request text,
    -- without credentials, for people
    external_url text,

    -- What there is, as the reconciler found or made it.
    status text NOT NULL DEFAULT 'pending' CHECK (
        status IN ('pending', 'creating', 'running', 'updating', 'stopping', 'stopped', 'error', 'deleting')),
    status_reason text,
    status_at timestamptz NOT NULL DEFAULT now(),
    observed_generation integer NOT NULL DEFAULT 0,
    restarts_done integer NOT NULL DEFAULT 0,
    -- attempts at the same thing that failed in a row, and when to try again
    attempts integer NOT NULL DEFAULT 0,
    retry_at timestamptz,
    -- the version that really runs
    redis_version text,
    -- null: nothing of it lies on any host
    host_id uuid REFERENCES hosts (id),
    -- how a gateway reaches it: {"unix": path} or {"host", "port", "tls", "server_name", "db"}
    endpoint jsonb,
    -- of a local redis-server: {"pid", "started", "run_id"}
    process jsonb,
    -- when it first ran; a creation that fails before is rolled back whole
    provisioned_at timestamptz,
    -- false: a creation that failed, or deleted
    counts_against_quota boolean NOT NULL DEFAULT true,

    -- Credentials, under authenticated encryption; the contexts are in control/instances.py.
    redis_user text,
    password_encrypted bytea,
    admin_password_encrypted bytea,
    -- a rotation: first Redis learns the new password, then the gateways, then Redis forgets the old one
    next_password_encrypted bytea,
    old_password_until timestamptz,
    token_digest bytea NOT NULL UNIQUE CHECK (octet_length(token_digest) = 32),
    token_encrypted bytea NOT NULL,
    readonly_token_digest bytea NOT NULL UNIQUE CHECK (octet_length(readonly_token_digest) = 32),
    readonly_token_encrypted bytea NOT NULL,
    tokens_rotated_at timestamptz,

    created_by uuid REFERENCES users (id) ON DELETE SET NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz,
    purge_at timestamptz
);

CREATE UNIQUE INDEX instances_slug ON instances (organization_id, slug) WHERE deleted_at IS NULL;
CREATE INDEX instances_organization ON instances (organization_id, created_at);
CREATE INDEX instances_host ON instances (host_id);
CREATE INDEX instances_purge ON instances (purge_at) WHERE purge_at IS NOT NULL;

-- What the reconciler did and how it went, the newest per instance; for people who ask why.
CREATE TABLE instance_steps (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    instance_id uuid NOT NULL REFERENCES instances (id) ON DELETE CASCADE,
    at timestamptz NOT NULL DEFAULT now(),
    host_id uuid,
    generation integer NOT NULL,
    step text NOT NULL,
    outcome text NOT NULL CHECK (outcome IN ('done', 'failed')),
    detail text
);
CREATE INDEX instance_steps_instance ON instance_steps (instance_id, id DESC);

-- The stewards are told of what is wanted; not of their own reports.
CREATE FUNCTION notify_stewards() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('redisgate_instances', NEW.id::text);
    RETURN NULL;
END
$$;
CREATE TRIGGER instances_wanted_new AFTER INSERT ON instances
    FOR EACH ROW EXECUTE FUNCTION notify_stewards();
CREATE TRIGGER instances_wanted_changed AFTER UPDATE ON instances
    FOR EACH ROW WHEN (
        (OLD.desired_state, OLD.generation, OLD.restarts_wanted)
        IS DISTINCT FROM (NEW.desired_state, NEW.generation, NEW.restarts_wanted))
    EXECUTE FUNCTION notify_stewards();
