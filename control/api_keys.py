"""API keys: what they may do, and how they come and go.

A key is a signed token that is shown once; we keep its digest. What it may do stands in its row, and is bounded by
what the person who made it may do now: a member who became a viewer has keys that only read, and who left has none.

Scopes for the data plane: `read` or `write` (which reads too), narrowed by `+command`, `+@category` (only these) and
`-command`, `-@category` (all but these), as Redis's ACL writes them. Scopes for managing: `control/roles.py`.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, Final
from uuid import UUID, uuid4

import msgspec
from msgspec import UNSET, UnsetType

from control import audit, quotas, roles
from control.database import Connection, Record
from control.http import NAME_PATTERN, BadRequest, Conflict, Context, Forbidden, NotFound
from redisgate.policy import Scope, validate_names
from resp.commands import bundled_table

READ: Final = "read"
WRITE: Final = "write"
DEFAULT_LIFETIME: Final = timedelta(days=365)
MAX_LIFETIME: Final = timedelta(days=3650)
MAX_OVERLAP: Final = timedelta(days=30)
"""For which a key that was rotated may go on working."""
MAX_SCOPES: Final = 100
MAX_LISTED: Final = 100
"""Instances, prefixes or networks of one key."""
PREFIX_CHARACTERS: Final = 8

# Never digest: what is not listed is not shown.
_COLUMNS: Final = (
    "id, organization_id, user_id, name, prefix, scopes, instance_ids, key_prefixes, networks, requests_per_second,"
    " commands_per_day, expires_at, revoked_at, valid_until, rotated_from, last_used_at, last_used_from, created_at,"
    " updated_at"
)

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=NAME_PATTERN)]


class CreateApiKey(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new key. Without `scopes` it reads and writes on every instance, and manages nothing."""

    name: Name
    scopes: Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_SCOPES)] = msgspec.field(
        default_factory=lambda: [READ, WRITE]
    )
    instance_ids: Annotated[list[UUID], msgspec.Meta(min_length=1, max_length=MAX_LISTED)] | None = None
    key_prefixes: Annotated[list[str], msgspec.Meta(max_length=MAX_LISTED)] = []
    allowed_networks: Annotated[list[str], msgspec.Meta(max_length=MAX_LISTED)] = []
    requests_per_second: Annotated[int, msgspec.Meta(ge=1, le=10_000_000)] | None = None
    commands_per_day: Annotated[int, msgspec.Meta(ge=1, le=10**12)] | None = None
    expires_at: datetime | None = None
    expires_in_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] | None = None
    organization_id: UUID | None = None


class UpdateApiKey(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new name."""

    name: Name


class RotateApiKey(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """For how many seconds the old key goes on working; by default as the setting `rotation_overlap` says."""

    overlap_seconds: Annotated[int, msgspec.Meta(ge=0, le=int(MAX_OVERLAP.total_seconds()))] | UnsetType = UNSET
    expires_at: datetime | None = None


def digest(key: bytes | str) -> bytes:
    """What a key is found by: 32 bytes that do not tell it."""
    key = key.encode() if isinstance(key, str) else key
    return hashlib.blake2b(key, digest_size=32, person=b"api key").digest()


def data_scope(scopes: Sequence[str], key_prefixes: Sequence[str], role: str) -> Scope | None:
    """What a key may run on an instance, its maker having this role now; None: nothing."""
    if READ not in scopes and WRITE not in scopes:
        return None
    return Scope(
        readonly=WRITE not in scopes or role == "viewer",
        allow=frozenset(scope[1:].lower() for scope in scopes if scope.startswith("+")),
        deny=frozenset(scope[1:].lower() for scope in scopes if scope.startswith("-")),
        prefixes=tuple(prefix.encode() for prefix in key_prefixes),
    )


def view(row: Record) -> dict[str, Any]:
    """A key as the API shows it: never the secret."""
    shown = dict(row)
    shown["key_prefix"] = shown.pop("prefix")
    shown["allowed_networks"] = [str(network) for network in shown.pop("networks")]
    shown["last_used_from"] = None if row["last_used_from"] is None else str(row["last_used_from"])
    return shown


# Reading


async def list_keys(
    connection: Connection, organization_id: UUID, *, page: int, limit: int, all_of_them: bool = False
) -> tuple[list[Record], int]:
    """Keys, the newest first, and how many there are; those that grant nothing any more only with `all_of_them`."""
    live = "" if all_of_them else f" AND {_LIVE}"
    total = await connection.fetchval(
        f"SELECT count(*) FROM api_keys WHERE organization_id = $1{live}", organization_id
    )
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM api_keys WHERE organization_id = $1{live}"
        " ORDER BY created_at DESC, id LIMIT $2 OFFSET $3",
        organization_id,
        limit,
        (page - 1) * limit,
    )
    return rows, total


async def find(connection: Connection, organization_id: UUID, key_id: UUID) -> Record:
    """One key, also one that grants nothing any more.

    Raises:
        NotFound: there is none, or it is another organization's.
    """
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM api_keys WHERE id = $1 AND organization_id = $2", key_id, organization_id
    )
    if row is None:
        raise NotFound("there is no such API key")
    return row


_LIVE: Final = "revoked_at IS NULL AND expires_at > now() AND (valid_until IS NULL OR valid_until > now())"


# Making


async def create(
    context: Context,
    connection: Connection,
    acting: audit.Acting,
    organization_id: UUID,
    user_id: UUID,
    role: str,
    wanted: CreateApiKey,
    *,
    maker_id: UUID | None = None,
) -> tuple[str, Record]:
    """A new key of a person with this role; the key itself, and its record. `maker_id`: the key that makes it, if one
    does.

    Raises:
        BadRequest: a field is wrong.
        Forbidden: it would do more than its maker may.
        QuotaExceeded: the organization has as many as it may have.
    """
    fields: dict[str, str] = {}
    scopes = list(dict.fromkeys(scope.strip() for scope in wanted.scopes))
    _check_scopes(scopes, wanted.key_prefixes, fields)
    networks = _networks(wanted.allowed_networks, fields)
    maker = None if maker_id is None else await find(connection, organization_id, maker_id)
    expires_at = _expiry(context.now(), wanted.expires_at, wanted.expires_in_days, fields)
    if maker is not None and wanted.expires_at is None and wanted.expires_in_days is None:
        expires_at = min(expires_at, maker["expires_at"])
    prefixes = list(dict.fromkeys(wanted.key_prefixes))
    if any(not 0 < len(prefix.encode()) <= 512 for prefix in prefixes):
        fields["key_prefixes"] = "a prefix has 1 to 512 bytes"
    if wanted.organization_id not in (None, organization_id):
        fields["organization_id"] = "is not the organization in the address"
    if fields:
        raise BadRequest(fields=fields)
    instance_ids = None if wanted.instance_ids is None else list(dict.fromkeys(wanted.instance_ids))
    values: dict[str, Any] = {
        "organization_id": organization_id,
        "user_id": user_id,
        "name": wanted.name,
        "scopes": scopes,
        "instance_ids": instance_ids,
        "key_prefixes": prefixes,
        "networks": networks,
        "requests_per_second": wanted.requests_per_second,
        "commands_per_day": wanted.commands_per_day,
        "expires_at": expires_at,
    }
    _check_reach(values, role, maker)
    await quotas.reserve_api_key(connection, organization_id)
    if instance_ids is not None:
        known = await connection.fetch(
            "SELECT id FROM instances WHERE organization_id = $1 AND id = ANY ($2::uuid[]) AND deleted_at IS NULL",
            organization_id,
            instance_ids,
        )
        missing = set(instance_ids) - {row["id"] for row in known}
        if missing:
            raise BadRequest(
                fields={"instance_ids": f"there is no instance {', '.join(sorted(map(str, missing)))} here"}
            )
    key, row = await _insert(context, connection, values)
    await audit.record(
        connection,
        acting,
        "api_keys.create",
        ("api_key", row["id"]),
        None,
        _told(row),
        organization_id=organization_id,
    )
    return key, row


async def _insert(context: Context, connection: Connection, values: dict[str, Any]) -> tuple[str, Record]:
    key_id = uuid4()
    prefix = "rg_" + secrets.token_hex(PREFIX_CHARACTERS // 2)
    # Whole seconds, as the token says them.
    expires_at = values["expires_at"].replace(microsecond=0)
    key = context.tokens.issue_api_key(
        api_key_id=key_id,
        user_id=values["user_id"],
        organization_id=values["organization_id"],
        scopes=values["scopes"],
        key_prefix=prefix,
        expires_at=expires_at,
    )
    row = await connection.fetchrow(
        "INSERT INTO api_keys (id, organization_id, user_id, name, digest, prefix, scopes, instance_ids, key_prefixes,"
        " networks, requests_per_second, commands_per_day, expires_at, rotated_from)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)"
        f" RETURNING {_COLUMNS}",
        key_id,
        values["organization_id"],
        values["user_id"],
        values["name"],
        digest(key),
        prefix,
        values["scopes"],
        values["instance_ids"],
        values["key_prefixes"],
        values["networks"],
        values["requests_per_second"],
        values["commands_per_day"],
        expires_at,
        values.get("rotated_from"),
    )
    assert row is not None
    return key, row


def _check_scopes(scopes: Sequence[str], key_prefixes: Sequence[str], fields: dict[str, str]) -> None:
    narrowing = [scope for scope in scopes if scope[:1] in ("+", "-")]
    for scope in scopes:
        if scope not in (READ, WRITE) and scope not in narrowing and not roles.is_managing_scope(scope):
            fields["scopes"] = (
                f"{scope!r} is none: there are read, write, +command, +@category, -command, -@category, manage,"
                " manage:read and permissions such as instances.create or instances.*"
            )
            return
    data = READ in scopes or WRITE in scopes
    if not data and (narrowing or key_prefixes):
        fields["scopes"] = "needs read or write where commands or key prefixes are named"
        return
    problems = validate_names(
        Scope(
            allow=frozenset(scope[1:] for scope in narrowing if scope[0] == "+"),
            deny=frozenset(scope[1:] for scope in narrowing if scope[0] == "-"),
        ),
        bundled_table(),
    )
    if problems:
        fields["scopes"] = problems[0]


def _check_reach(wanted: Mapping[str, Any], role: str, maker: Record | None) -> None:
    """Nobody makes a key that may do what they may not. `maker` is the key that makes it, if one does.

    Raises:
        Forbidden: it would reach further.
    """
    scopes = wanted["scopes"]
    if WRITE in scopes and role == "viewer":
        raise Forbidden("a viewer's key can only read")
    if maker is None:
        return
    held = set(maker["scopes"])
    for permission in roles.PERMISSIONS:
        # Not by today's role alone: the key would wake up with its maker's promotion.
        if roles.allows("owner", permission, scopes) and not roles.allows("owner", permission, held):
            raise Forbidden(f"this API key lacks {permission}, so it cannot give it to another")
    if (READ in scopes and not held & {READ, WRITE}) or (WRITE in scopes and WRITE not in held):
        raise Forbidden("this API key cannot make one that reads or writes what it does not itself")
    narrowed = sorted(scope for scope in held if scope[:1] in ("+", "-"))
    added = {scope for scope in scopes if scope.startswith("+")} - held
    if narrowed and {READ, WRITE} & set(scopes) and (added or not set(narrowed) <= set(scopes)):
        raise Forbidden(f"what this API key makes needs its own narrowing, and no more: {', '.join(narrowed)}")
    if maker["requests_per_second"] is not None or maker["commands_per_day"] is not None:
        raise Forbidden("this API key has limits of its own, which others that it makes would not share")
    if wanted["expires_at"] > maker["expires_at"]:
        raise Forbidden("this API key cannot make one that lives longer than itself")
    own_prefixes, own_networks, own_instances = maker["key_prefixes"], maker["networks"], maker["instance_ids"]
    if own_prefixes and not _all_within(wanted["key_prefixes"], own_prefixes, str.startswith):
        raise Forbidden(f"this API key is for keys with the prefixes {', '.join(own_prefixes)}; name such")
    if own_networks and not _all_within(wanted["networks"], own_networks, _is_subnet):
        raise Forbidden(f"this API key is for {', '.join(map(str, own_networks))}; name networks within")
    if own_instances is not None and not set(wanted["instance_ids"] or [None]) <= set(own_instances):
        raise Forbidden("this API key is for some instances only; name some of those")


def _all_within(wanted: Sequence[Any], own: Sequence[Any], within: Callable[[Any, Any], bool]) -> bool:
    return bool(wanted) and all(any(within(item, mine) for mine in own) for item in wanted)


def _is_subnet(network: IPv4Network | IPv6Network, of: IPv4Network | IPv6Network) -> bool:
    if isinstance(network, IPv4Network):
        return isinstance(of, IPv4Network) and network.subnet_of(of)
    return isinstance(of, IPv6Network) and network.subnet_of(of)


def _networks(texts: Sequence[str], fields: dict[str, str]) -> list[IPv4Network | IPv6Network]:
    found = []
    for text in texts:
        try:
            found.append(ip_network(text.strip()))
        except ValueError:
            fields["allowed_networks"] = f"{text!r} is no network such as 203.0.113.0/24, 2001:db8::/32 or 203.0.113.7"
    return list(dict.fromkeys(found))


def _expiry(now: datetime, expires_at: datetime | None, days: int | None, fields: dict[str, str]) -> datetime:
    if expires_at is not None and days is not None:
        fields["expires_in_days"] = "give either this or expires_at"
        return now
    if days is not None:
        return now + timedelta(days=days)
    if expires_at is None:
        return now + DEFAULT_LIFETIME
    if expires_at.tzinfo is None:
        fields["expires_at"] = "needs a time zone, as in 2030-01-01T00:00:00Z"
    elif expires_at <= now + timedelta(seconds=1):
        fields["expires_at"] = "has passed"
    elif expires_at > now + MAX_LIFETIME:
        fields["expires_at"] = f"is more than {MAX_LIFETIME.days} days away"
    return expires_at


# Changing


async def rename(
    connection: Connection, acting: audit.Acting, organization_id: UUID, key_id: UUID, name: str, *, whose: UUID | None
) -> Record:
    """Give a key another name. `whose`: only that person's key; None: anybody's.

    Raises:
        NotFound: there is none.
        Forbidden: it is somebody else's.
    """
    before = await _lock(connection, organization_id, key_id, whose)
    row = await connection.fetchrow(
        f"UPDATE api_keys SET name = $2, updated_at = now() WHERE id = $1 RETURNING {_COLUMNS}", key_id, name
    )
    assert row is not None
    await audit.record(
        connection,
        acting,
        "api_keys.update",
        ("api_key", key_id),
        {"name": before["name"]},
        {"name": name},
        organization_id=organization_id,
    )
    return row


async def rotate(
    context: Context,
    connection: Connection,
    acting: audit.Acting,
    organization_id: UUID,
    key_id: UUID,
    user_id: UUID,
    role: str,
    wanted: RotateApiKey,
    *,
    whose: UUID | None,
    maker_id: UUID | None = None,
) -> tuple[str, Record]:
    """A new key that may do the same, and belongs to the person who rotates; the old one works for a while yet.

    Raises:
        NotFound: there is none.
        Forbidden: it is somebody else's, or may do more than who rotates it.
        Conflict: it was revoked or rotated, or has expired.
        BadRequest: the expiry is wrong.
    """
    # The organization's row first, as everything that makes a key does.
    await quotas.lock_usage(connection, organization_id)
    old = await _lock(connection, organization_id, key_id, whose)
    now = context.now()
    if old["revoked_at"] is not None or old["valid_until"] is not None or old["expires_at"] <= now:
        raise Conflict("this API key was revoked or rotated, or has expired; create a new one")
    fields: dict[str, str] = {}
    expires_at = old["expires_at"] if wanted.expires_at is None else _expiry(now, wanted.expires_at, None, fields)
    if fields:
        raise BadRequest(fields=fields)
    maker = None if maker_id is None else await find(connection, organization_id, maker_id)
    if maker_id == key_id:
        if old["requests_per_second"] is not None or old["commands_per_day"] is not None:
            raise Forbidden("this API key has limits, which it would share with its successor; let another rotate it")
        if expires_at > old["expires_at"]:
            raise Forbidden("an API key cannot make its own life longer")
    else:
        _check_reach(dict(old) | {"expires_at": expires_at}, role, maker)
    overlap = context.settings.rotation_overlap if wanted.overlap_seconds is UNSET else wanted.overlap_seconds
    valid_until = now + timedelta(seconds=overlap)
    await connection.execute(
        "UPDATE api_keys SET valid_until = $2, updated_at = now() WHERE id = $1", key_id, valid_until
    )
    key, row = await _insert(
        context, connection, dict(old) | {"user_id": user_id, "expires_at": expires_at, "rotated_from": key_id}
    )
    await audit.record(
        connection,
        acting,
        "api_keys.rotate",
        ("api_key", key_id),
        None,
        {"new_api_key_id": row["id"], "valid_until": valid_until},
        organization_id=organization_id,
    )
    return key, row


async def revoke(
    connection: Connection, acting: audit.Acting, organization_id: UUID, key_id: UUID, *, whose: UUID | None
) -> Record:
    """End a key now; a second time changes nothing.

    Raises:
        NotFound: there is none.
        Forbidden: it is somebody else's.
    """
    old = await _lock(connection, organization_id, key_id, whose)
    if old["revoked_at"] is not None:
        return old
    row = await connection.fetchrow(
        f"UPDATE api_keys SET revoked_at = now(), updated_at = now() WHERE id = $1 RETURNING {_COLUMNS}", key_id
    )
    assert row is not None
    await audit.record(
        connection, acting, "api_keys.revoke", ("api_key", key_id), _told(old), None, organization_id=organization_id
    )
    return row


async def _lock(connection: Connection, organization_id: UUID, key_id: UUID, whose: UUID | None) -> Record:
    await connection.execute(
        "SELECT 1 FROM api_keys WHERE id = $1 AND organization_id = $2 FOR UPDATE", key_id, organization_id
    )
    row = await find(connection, organization_id, key_id)
    if whose is not None and row["user_id"] != whose:
        raise Forbidden("this API key is another person's; an admin can do this")
    return row


def _told(row: Record) -> dict[str, Any]:
    """What the audit log keeps of a key."""
    return {
        "name": row["name"],
        "key_prefix": row["prefix"],
        "scopes": row["scopes"],
        "instance_ids": row["instance_ids"],
        "key_prefixes": row["key_prefixes"],
        "allowed_networks": [str(network) for network in row["networks"]],
        "requests_per_second": row["requests_per_second"],
        "commands_per_day": row["commands_per_day"],
        "expires_at": row["expires_at"],
    }
