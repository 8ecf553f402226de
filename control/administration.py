"""What administrators of the platform see and do beyond single organizations: all of them, all people and instances."""

from typing import Any, Final
from uuid import UUID

from control.accounts import USER_COLUMNS, get_user, set_admin
from control.audit import Acting, record
from control.database import Connection, Record
from control.http import Conflict

_LIVE_KEY: Final = "revoked_at IS NULL AND valid_until IS NULL AND expires_at > now()"


async def list_organizations(
    connection: Connection, *, search: str | None, page: int, limit: int
) -> tuple[list[Record], int]:
    """Organizations whose name, short name or id contains `search`, the newest first, with what they use and may."""
    condition = (
        "o.deleted_at IS NULL AND ($1::text IS NULL OR strpos(lower(o.name), lower($1)) > 0"
        " OR strpos(o.slug, lower($1)) > 0 OR o.id::text = lower($1))"
    )
    total = await connection.fetchval(f"SELECT count(*) FROM organizations o WHERE {condition}", search)
    rows = await connection.fetch(
        "SELECT o.id, o.name, o.slug, o.plan, o.created_at, q.max_instances, q.max_memory, q.max_api_keys,"
        " (SELECT count(*) FROM memberships m WHERE m.organization_id = o.id) AS members,"
        " (SELECT count(*) FROM instances i WHERE i.organization_id = o.id AND i.counts_against_quota) AS instances,"
        " (SELECT coalesce(sum(i.max_memory), 0)::bigint FROM instances i"
        " WHERE i.organization_id = o.id AND i.counts_against_quota) AS memory,"
        f" (SELECT count(*) FROM api_keys k WHERE k.organization_id = o.id AND {_LIVE_KEY}) AS api_keys"
        f" FROM organizations o JOIN quotas q ON q.organization_id = o.id WHERE {condition}"
        " ORDER BY o.created_at DESC, o.id LIMIT $2 OFFSET $3",
        search,
        limit,
        (page - 1) * limit,
    )
    return rows, total


async def list_users(connection: Connection, *, search: str | None, page: int, limit: int) -> tuple[list[Record], int]:
    """People whose e-mail address, name or id contains `search`, the newest first."""
    condition = (
        "$1::text IS NULL OR strpos(lower(email), lower($1)) > 0 OR strpos(lower(username), lower($1)) > 0"
        " OR strpos(lower(first_name || ' ' || last_name), lower($1)) > 0 OR id::text = lower($1)"
    )
    total = await connection.fetchval(f"SELECT count(*) FROM users WHERE {condition}", search)
    rows = await connection.fetch(
        f"SELECT {USER_COLUMNS}, disabled_at, (SELECT count(*) FROM memberships m JOIN organizations o"
        " ON o.id = m.organization_id WHERE m.user_id = users.id AND o.deleted_at IS NULL) AS organizations"
        f" FROM users WHERE {condition} ORDER BY created_at DESC, id LIMIT $2 OFFSET $3",
        search,
        limit,
        (page - 1) * limit,
    )
    return rows, total


async def list_instances(
    connection: Connection, *, search: str | None, status: str | None, page: int, limit: int
) -> tuple[list[Record], int]:
    """Instances of all organizations, those in error first, then the newest; `search` is in their name, their
    organization's, or is their id."""
    source = (
        " FROM instances i JOIN organizations o ON o.id = i.organization_id LEFT JOIN hosts h ON h.id = i.host_id"
        " WHERE i.deleted_at IS NULL AND ($2::text IS NULL OR i.status = $2) AND ($1::text IS NULL"
        " OR strpos(lower(i.name), lower($1)) > 0 OR strpos(lower(o.name), lower($1)) > 0 OR i.id::text = lower($1))"
    )
    total = await connection.fetchval(f"SELECT count(*){source}", search, status)
    rows = await connection.fetch(
        "SELECT i.id, i.name, i.slug, i.status, i.status_reason, i.status_at, i.provisioner, i.max_memory,"
        " i.redis_version, i.created_at, i.organization_id, o.name AS organization, h.name AS host"
        f"{source} ORDER BY (i.status = 'error') DESC, i.created_at DESC, i.id LIMIT $3 OFFSET $4",
        search,
        status,
        limit,
        (page - 1) * limit,
    )
    return rows, total


async def find_user(connection: Connection, user_id: UUID) -> dict[str, Any]:
    """Somebody, and since when they are shut out.

    Raises:
        NotFound: there is no such person.
    """
    user = await get_user(connection, user_id)
    disabled_at = await connection.fetchval("SELECT disabled_at FROM users WHERE id = $1", user_id)
    return dict(user) | {"disabled_at": disabled_at}


async def update_user(
    connection: Connection, acting: Acting, by: UUID, user_id: UUID, *, is_admin: bool | None, disabled: bool | None
) -> dict[str, Any]:
    """Make somebody an administrator of the platform, or no longer one; shut them out, or let them in again.

    Who is shut out cannot sign in; their sessions and API keys are refused as long as it lasts.

    Raises:
        NotFound: there is no such person.
        Conflict: it is oneself: the platform must not lose its last administrator by one click.
    """
    if user_id == by:
        raise Conflict("this is yourself; another administrator of the platform can do it")
    await connection.execute("SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE", user_id)
    user = await find_user(connection, user_id)
    if is_admin is not None and is_admin != user["is_admin"]:
        await set_admin(connection, acting, user["email"], is_admin)
    if disabled is not None and disabled != (user["disabled_at"] is not None):
        await connection.execute(
            "UPDATE users SET disabled_at = CASE WHEN $2 THEN now() END, updated_at = now() WHERE id = $1",
            user_id,
            disabled,
        )
        await record(
            connection,
            acting,
            "users.disable" if disabled else "users.enable",
            ("user", user_id),
            {"disabled": not disabled},
            {"disabled": disabled},
        )
    return await find_user(connection, user_id)
