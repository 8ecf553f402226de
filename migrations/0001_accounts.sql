-- People, organizations and who belongs to which; what an organization may use; sign-in.
--
-- E-mail addresses and usernames are kept as they were written and are unique without regard to case.

CREATE TABLE users (
    id                  uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    email               text        NOT NULL CHECK (length(email) BETWEEN 3 AND 254),
    username            text        NOT NULL CHECK (length(username) BETWEEN 1 AND 64),
    password_hash       text        NOT NULL,
    first_name          text        NOT NULL DEFAULT '',
    last_name           text        NOT NULL DEFAULT '',
    is_admin            boolean     NOT NULL DEFAULT false,  -- of the platform, not of an organization
    disabled_at         timestamptz,
    last_login_at       timestamptz,
    password_changed_at timestamptz NOT NULL DEFAULT now(),
    created_at          timestamptz NOT NULL DEFAULT now(),
    updated_at          timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX users_email_key ON users (lower(email));
CREATE UNIQUE INDEX users_username_key ON users (lower(username));

CREATE TABLE organizations (
    id         uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    name       text        NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    slug       text        NOT NULL UNIQUE,  -- made by the service with a random end, so that no conflict tells of others
    plan       text        NOT NULL DEFAULT 'free' CHECK (plan IN ('free', 'pro', 'enterprise')),
    created_by uuid        REFERENCES users,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);

CREATE TABLE memberships (
    organization_id uuid        NOT NULL REFERENCES organizations,
    user_id         uuid        NOT NULL REFERENCES users,
    role            text        NOT NULL CHECK (role IN ('owner', 'admin', 'member', 'viewer')),
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (organization_id, user_id)
);
CREATE INDEX memberships_user ON memberships (user_id);

CREATE TABLE invitations (
    id              uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    organization_id uuid        NOT NULL REFERENCES organizations,
    email           text        NOT NULL CHECK (length(email) BETWEEN 3 AND 254),
    role            text        NOT NULL CHECK (role IN ('owner', 'admin', 'member', 'viewer')),
    token_digest    bytea       NOT NULL UNIQUE CHECK (length(token_digest) = 32),
    invited_by      uuid        NOT NULL REFERENCES users,
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz NOT NULL,
    accepted_at     timestamptz,
    accepted_by     uuid        REFERENCES users,
    revoked_at      timestamptz
);
CREATE UNIQUE INDEX invitations_open ON invitations (organization_id, lower(email))
    WHERE accepted_at IS NULL AND revoked_at IS NULL;

-- One row per organization from its first moment: the row that reservations lock, and what the data plane enforces.
-- Null is unlimited. Which values a plan allows stands in control/quotas.py.
CREATE TABLE quotas (
    organization_id     uuid        PRIMARY KEY REFERENCES organizations,
    max_instances       integer     NOT NULL CHECK (max_instances >= 0),
    max_memory          bigint      NOT NULL CHECK (max_memory >= 0),  -- bytes, all instances together
    max_api_keys        integer     NOT NULL CHECK (max_api_keys >= 0),
    commands_per_day    bigint      CHECK (commands_per_day > 0),
    requests_per_second integer     CHECK (requests_per_second > 0),
    max_request_bytes   bigint      CHECK (max_request_bytes > 0),
    updated_at          timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE sessions (
    id           uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id      uuid        NOT NULL REFERENCES users,
    created_at   timestamptz NOT NULL DEFAULT now(),
    refreshed_at timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,  -- of the newest token
    ends_at      timestamptz NOT NULL,  -- no refresh goes beyond it
    revoked_at   timestamptz,
    address      inet,
    user_agent   text
);
CREATE INDEX sessions_user ON sessions (user_id, created_at DESC);

CREATE TABLE password_resets (
    id           uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id      uuid        REFERENCES users,  -- null for an address that nobody has: known and unknown cost the same
    token_digest bytea       NOT NULL UNIQUE CHECK (length(token_digest) = 32),
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    used_at      timestamptz,
    address      inet
);
CREATE INDEX password_resets_user ON password_resets (user_id);
CREATE INDEX password_resets_expiry ON password_resets (expires_at);

-- Failed sign-ins. Unlogged: it is written on every failure, and to forget it in a crash of PostgreSQL harms little.
CREATE UNLOGGED TABLE throttle (
    subject    bytea       PRIMARY KEY,  -- keyed digest of what is throttled: an account, a network
    failures   integer     NOT NULL,
    failed_at  timestamptz NOT NULL,
    open_again timestamptz NOT NULL
);
CREATE INDEX throttle_age ON throttle (failed_at);
