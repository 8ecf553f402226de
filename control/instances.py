"""Instances as their organization sees them: create, look at, change, start and stop, rotate, delete, restore.

Everything here writes down what is wanted; `control.reconciler`, in the steward, brings it about. So an answer tells
the state at that moment, which may be `pending` or `updating`; `wait_until_settled` gives it a few seconds.

The domain of an instance is its label under `base_domain`: the slug and a short random suffix, so that nobody learns
of another organization's slugs by a conflict.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any, Final, Literal, Protocol
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import msgspec

from control import audit, hosts, quotas
from control.addresses import AddressPolicy
from control.database import Connection, Database, Record
from control.duties import duty
from control.encryption import DecryptionError, Encryption
from control.http import NAME_PATTERN, BadRequest, Conflict, Context, NotFound, Unavailable
from control.instance_tokens import token_digest
from control.provisioners import GATEWAY_USER, ProvisionError, Spec, version_matches
from control.provisioners.external import ExternalProvisioner, displayed, endpoint_address
from control.settings import public_url
from redisgate.config import Settings
from resp.address import Address

MIN_MEMORY: Final = 1024 * 1024
MAX_MEMORY: Final = 16 * 1024 * 1024 * 1024
SETTLE_SECONDS: Final = 10.0
"""How long an answer waits for what was asked for to be done; then it tells how far it is."""
MAX_STEPS_SHOWN: Final = 20
LABEL_SUFFIX: Final = 6
"""Random characters after the slug in a label."""

_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # nothing that looks like something else
_TRANSITIONAL = ("pending", "creating", "updating", "stopping", "deleting")

log = logging.getLogger(__name__)

# "$" alone also matches before a newline at the end; patterns are shown in the OpenAPI document, so no "\\Z".
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=NAME_PATTERN)]
Slug = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,48}[a-z0-9])?$(?!\n)", max_length=50)]
Memory = Annotated[int, msgspec.Meta(ge=MIN_MEMORY, le=MAX_MEMORY)]
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,2}(?:\.[0-9]{1,3}){0,2}$(?!\n)")]
Quantity = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,9}(?:\.[0-9]{1,3})?(?:m|k|M|G|T|Ki|Mi|Gi|Ti)?$(?!\n)")]
Eviction = Literal[
    "noeviction",
    "allkeys-lru",
    "allkeys-lfu",
    "allkeys-random",
    "volatile-lru",
    "volatile-lfu",
    "volatile-random",
    "volatile-ttl",
]


class CreateInstance(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new instance; `max_memory` in bytes. With `external_url` it is a Redis that exists already."""

    name: Name
    slug: Slug | None = None
    organization_id: UUID | None = None
    max_memory: Memory | None = None
    redis_version: Version | None = None
    cpu_request: Quantity | None = None
    memory_request: Quantity | None = None
    persistence_enabled: bool = True
    backup_enabled: bool = False
    eviction: Eviction = "noeviction"
    external_url: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)] | None = None


class UpdateInstance(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What changes; what is left out stays. `external_url` is for instances that have one."""

    name: Name | None = None
    max_memory: Memory | None = None
    eviction: Eviction | None = None
    external_url: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)] | None = None


class ChangeStatus(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What to do; nothing: look at it, and mend what is not as it should be."""

    action: Literal["start", "stop", "restart", "reconcile"] = "reconcile"


class RotateCredentials(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which to replace. `password` is what the gateway itself logs in with; an external Redis keeps its own."""

    token: bool = True
    readonly_token: bool = True
    password: bool = True


# For the data plane and the reconciler


def secret_context(instance_id: UUID, column: str) -> bytes:
    """The encryption context of a secret: the column it is kept in, without `_encrypted`, and its instance."""
    return f"instances.{column}:{instance_id}".encode()


def decrypt(row: Record, column: str, encryption: Encryption) -> str | None:
    """A secret of an instance, by its column's name without `_encrypted`; None where there is none.

    Raises:
        DecryptionError: its key is missing.
    """
    ciphertext = row[f"{column}_encrypted"]
    if ciphertext is None:
        return None
    return encryption.decrypt(ciphertext, secret_context(row["id"], column)).decode()


class Routes(Protocol):
    """Where instances in a cluster are: see `control.kubernetes.routes`."""

    def address(self, uid: str) -> Address | None:
        """None: there is no way to it now."""
        ...


def address_of(row: Record, encryption: Encryption, routes: Routes | None = None) -> Address:
    """How a gateway reaches an instance and logs in; needs `id`, `endpoint`, `redis_user` and `password_encrypted`.

    Raises:
        ValueError: it has no endpoint yet, or the cluster has no route to it.
        DecryptionError: its key is missing.
    """
    if row["endpoint"] is None:
        raise ValueError("this instance has no endpoint yet")
    if "kubernetes" in row["endpoint"]:
        route = routes.address(row["endpoint"]["kubernetes"]) if routes is not None else None
        if route is None:
            raise ValueError("the cluster has no route to this instance")
        return route
    return endpoint_address(row["endpoint"], row["redis_user"], decrypt(row, "password", encryption))


def spec_of(row: Record, encryption: Encryption | None, *, only_these_passwords: bool = True) -> Spec:
    """What a whole row asks of its provisioner; without `encryption`, all but the passwords.

    Raises:
        DecryptionError: its key is missing.
    """

    def secret(column: str) -> str | None:
        return decrypt(row, column, encryption) if encryption is not None else None

    return Spec(
        id=row["id"],
        max_memory=row["max_memory"],
        redis_version=row["redis_version_wanted"],
        persistence=row["persistence_enabled"],
        backup=row["backup_enabled"],
        eviction=row["eviction"],
        user=row["redis_user"],
        password=secret("password"),
        next_password=secret("next_password"),
        admin_password=secret("admin_password"),
        only_these_passwords=only_these_passwords,
        endpoint=row["endpoint"],
        process=row["process"],
        organization_id=row["organization_id"],
        slug=row["slug"],
        label=row["label"],
        cpu_request=row["cpu_request"],
        memory_request=row["memory_request"],
    )


def external_provisioner(context: Context) -> ExternalProvisioner:
    """The one of this process."""
    found = context.extra.get("instances.external")
    if found is None:
        settings = context.settings
        policy = AddressPolicy(
            allow_private=settings.allow_private_addresses,
            allowed=settings.allowed_networks,
            own=own_services(context.gateway_settings),
        )
        found = context.extra["instances.external"] = ExternalProvisioner(policy)
    assert isinstance(found, ExternalProvisioner)
    return found


def own_services(settings: Settings) -> list[tuple[str, int]]:
    """Hosts and ports of the gateway and its database, which no external instance may have."""
    found = [(settings.host, settings.port)]
    control = settings.control
    for url in (control.database_url, control.database_direct_url, control.database_migration_url):
        for place in urlsplit(url).netloc.rpartition("@")[2].split(",") if url else ():
            match = re.fullmatch(r"\[?([^\]]*?)\]?(?::(\d+))?", place)
            if match is not None and match[1]:
                found.append((match[1], int(match[2] or 5432)))
    return found


# Looking


def view(row: Record, settings: Settings) -> dict[str, Any]:
    """An instance as the API shows it: no secrets, and nothing of where it runs."""
    base = settings.base_domain.strip(".")
    domain = f"{row['label']}.{base}" if base else None
    return {
        "id": row["id"],
        "organization_id": row["organization_id"],
        "name": row["name"],
        "slug": row["slug"],
        "domain": domain,
        "rest_url": _rest_url(row["id"], domain, settings),
        "status": row["status"],
        "status_reason": row["status_reason"],
        "desired_state": row["desired_state"],
        "provisioner": row["provisioner"],
        "redis_version": row["redis_version"],
        "redis_version_wanted": row["redis_version_wanted"],
        "max_memory": row["max_memory"],
        "eviction": row["eviction"],
        "persistence_enabled": row["persistence_enabled"],
        "backup_enabled": row["backup_enabled"],
        "cpu_request": row["cpu_request"],
        "memory_request": row["memory_request"],
        "external_url": row["external_url"],
        "created_by": row["created_by"],
        "created_at": row["created_at"],
        "updated_at": row["updated_at"],
        "status_at": row["status_at"],
        "deleted_at": row["deleted_at"],
        "purge_at": row["purge_at"],
    }


def _rest_url(instance_id: UUID, domain: str | None, settings: Settings) -> str:
    public = public_url(settings)
    # Not every resolver knows names under localhost.
    if domain is None or domain.endswith(".localhost"):
        return f"{public}/redis/{instance_id}"
    parts = urlsplit(public)
    return f"{parts.scheme}://{domain}{f':{parts.port}' if parts.port else ''}"


async def find(
    connection: "Connection | Database", organization_id: UUID, instance_id: UUID, *, deleted: bool | None = False
) -> Record:
    """A row; `deleted` says whether it must be deleted, None: either.

    Raises:
        NotFound: there is none, or it is another organization's.
    """
    row = await connection.fetchrow(
        "SELECT * FROM instances WHERE id = $1 AND organization_id = $2"
        " AND ($3::boolean IS NULL OR (deleted_at IS NOT NULL) = $3)",
        instance_id,
        organization_id,
        deleted,
    )
    if row is None:
        raise NotFound("there is no such instance")
    return row


async def lock(
    connection: Connection, organization_id: UUID, instance_id: UUID, *, deleted: bool | None = False
) -> Record:
    """As `find`, and nobody else changes it until the transaction ends."""
    await connection.execute("SELECT 1 FROM instances WHERE id = $1 FOR UPDATE", instance_id)
    return await find(connection, organization_id, instance_id, deleted=deleted)


async def list_instances(
    database: Database,
    organization_id: UUID,
    *,
    deleted: bool,
    status: str | None,
    only: Sequence[UUID] | None,
    page: int,
    limit: int,
) -> tuple[list[Record], int]:
    """One page, the newest first, and how many there are; `only` among these."""
    rows = await database.fetch(
        "SELECT *, count(*) OVER () AS total FROM instances WHERE organization_id = $1"
        " AND (deleted_at IS NOT NULL) = $2 AND ($3::text IS NULL OR status = $3)"
        " AND ($4::uuid[] IS NULL OR id = ANY ($4)) ORDER BY created_at DESC, id LIMIT $5 OFFSET $6",
        organization_id,
        deleted,
        status,
        only,
        limit,
        (page - 1) * limit,
    )
    if rows:
        return rows, rows[0]["total"]
    total = await database.fetchval(
        "SELECT count(*) FROM instances WHERE organization_id = $1 AND (deleted_at IS NOT NULL) = $2"
        " AND ($3::text IS NULL OR status = $3) AND ($4::uuid[] IS NULL OR id = ANY ($4))",
        organization_id,
        deleted,
        status,
        only,
    )
    return [], int(total)


async def steps(database: Database, instance_id: UUID) -> list[dict[str, Any]]:
    """What was done to bring it about, the newest first."""
    rows = await database.fetch(
        "SELECT at, step, outcome, detail FROM instance_steps WHERE instance_id = $1 ORDER BY id DESC LIMIT $2",
        instance_id,
        MAX_STEPS_SHOWN,
    )
    return [dict(row) for row in rows]


async def wait_until_settled(database: Database, instance_id: UUID, seconds: float = SETTLE_SECONDS) -> Record | None:
    """The row once nothing is under way any more, or as it is after `seconds`; None: it is gone."""
    deadline, pause = time.monotonic() + seconds, 0.02
    while True:
        row = await database.fetchrow("SELECT * FROM instances WHERE id = $1", instance_id)
        if row is None or is_settled(row) or time.monotonic() + pause > deadline:
            return row
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 0.25)


def is_settled(row: Record) -> bool:
    """Whether nothing is under way."""
    if row["status"] in _TRANSITIONAL:
        return False
    if row["status"] == "error":
        return True
    wanted = "running" if row["desired_state"] == "running" else "stopped"
    if row["status"] != wanted or row["observed_generation"] < row["generation"]:
        return False
    return wanted == "stopped" or bool(row["restarts_done"] >= row["restarts_wanted"])


# Creating


async def create(
    context: Context, acting: audit.Acting, organization_id: UUID, created_by: UUID | None, body: CreateInstance
) -> tuple[UUID, dict[str, str]]:
    """Write down a new instance, counted against the quota; its id and its tokens. The steward makes it.

    Raises:
        BadRequest, Conflict, QuotaExceeded: it cannot be.
    """
    provisioner = await _check_new(context, organization_id, body)
    if provisioner == "kubernetes":
        await _check_cluster(context)
    instance_id, encryption, tokens = (
        UUID(bytes=secrets.token_bytes(16), version=4),
        context.encryption,
        _tokens(context),
    )
    values: dict[str, Any] = {
        "id": instance_id,
        "organization_id": organization_id,
        "name": body.name,
        "slug": body.slug or _slug_of(body.name),
        "provisioner": provisioner,
        "max_memory": 0 if provisioner == "external" else body.max_memory,
        "redis_version_wanted": body.redis_version,
        "persistence_enabled": body.persistence_enabled,
        "backup_enabled": body.backup_enabled,
        "eviction": body.eviction,
        "cpu_request": body.cpu_request,
        "memory_request": body.memory_request,
        "created_by": created_by,
        **_token_columns(instance_id, encryption, tokens),
    }
    if provisioner == "external":
        assert body.external_url is not None
        values |= await _register(context, instance_id, body.external_url, body.redis_version)
        values |= {"status": "running", "observed_generation": 1, "provisioned_at": context.now()}
    else:
        values |= {
            "redis_user": GATEWAY_USER,
            "password_encrypted": _encrypt(encryption, instance_id, "password", secrets.token_urlsafe(32)),
            "admin_password_encrypted": _encrypt(encryption, instance_id, "admin_password", secrets.token_urlsafe(32)),
        }
    here = await asyncio.to_thread(hosts.host_id, context.gateway_settings.state_dir)
    async with context.database.transaction() as connection:
        await quotas.reserve_instance(connection, organization_id, values["max_memory"])
        if provisioner == "local" and await hosts.is_here(connection, here):
            values["host_id"] = here  # where this gateway can reach it
        await _insert(connection, values)
        after = {name: values[name] for name in ("name", "slug", "provisioner", "max_memory", "redis_version_wanted")}
        await audit.record(
            connection,
            acting,
            "instances.create",
            ("instance", instance_id),
            after=after,
            organization_id=organization_id,
        )
    return instance_id, tokens


async def _check_new(context: Context, organization_id: UUID, body: CreateInstance) -> str:
    """Which provisioner makes it. Raises BadRequest."""
    fields: dict[str, str] = {}
    if body.organization_id is not None and body.organization_id != organization_id:
        fields["organization_id"] = "is another organization than the one in the path"
    if not body.name.strip():
        fields["name"] = "must not be blank"
    provisioner = "external" if body.external_url is not None else context.settings.provisioner
    if provisioner == "external":
        if body.external_url is None:
            fields["external_url"] = "is required: this service makes no instances, it serves those that exist"
    else:
        if body.max_memory is None:
            fields["max_memory"] = f"is required: bytes, from {MIN_MEMORY} to {MAX_MEMORY}"
        problem = await _version_problem(context, body.redis_version)
        if problem is not None:
            fields["redis_version"] = problem
        if provisioner == "kubernetes" and body.backup_enabled:
            fields["backup_enabled"] = "is for whoever runs the cluster to set, by spec.backup of the resource"
    if fields:
        raise BadRequest(fields=fields)
    return provisioner


async def _check_cluster(context: Context) -> None:
    """See that the cluster answers before anything is written down. Raises Unavailable."""
    follower = context.extra.get("kubernetes")
    problem = "this gateway does not follow a cluster (kubernetes is off)"
    if follower is not None:
        problem = await follower.problem()
    if problem is not None:
        raise Unavailable(f"no instance can be made now, and none was: {problem}")


async def _version_problem(context: Context, wanted: str | None) -> str | None:
    """Why no host can run a version of Redis; None where one can, or where nobody knows yet."""
    if wanted is None or context.settings.mode == "dev" or context.settings.provisioner != "local":
        return None
    versions = await hosts.redis_versions(context.database)
    if not versions or any(version_matches(wanted, version) for version in versions):
        return None
    return f"there is no Redis {wanted} here; there is {', '.join(versions)}"


async def _register(context: Context, instance_id: UUID, url: str, redis_version: str | None) -> dict[str, Any]:
    """The columns of a Redis that exists, after a look at it. Raises BadRequest."""
    try:
        found, login = await external_provisioner(context).register(url, redis_version)
        shown = displayed(url)
    except ProvisionError as error:
        raise BadRequest("this Redis cannot be used", {"external_url": str(error)}) from error
    password = login.password
    return {
        "external_url": shown,
        "endpoint": found.endpoint,
        "redis_version": found.redis_version,
        "status_reason": found.warning,
        "redis_user": login.user,
        "password_encrypted": (
            None if password is None else _encrypt(context.encryption, instance_id, "password", password)
        ),
    }


async def _insert(connection: Connection, values: dict[str, Any]) -> None:
    columns = [*values, "label"]
    query = (
        f"INSERT INTO instances ({', '.join(columns)}) VALUES ({', '.join(f'${n + 1}' for n in range(len(columns)))})"
    )
    while True:
        label = f"{values['slug']}-{''.join(secrets.choice(_ALPHABET) for _ in range(LABEL_SUFFIX))}"
        try:
            async with connection.transaction():
                await connection.execute(query, *values.values(), label)
            return
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name == "instances_slug":
                raise Conflict(
                    f"this organization has an instance with the slug {values['slug']} already; choose another slug",
                    {"fields": {"slug": "is taken"}},
                ) from error
            if error.constraint_name != "instances_label_key":
                raise


def _slug_of(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:43].strip("-")
    return slug or f"redis-{''.join(secrets.choice(_ALPHABET) for _ in range(6))}"


def _tokens(context: Context) -> dict[str, str]:
    make = context.instance_tokens.make
    return {"token": make().decode(), "readonly_token": make(readonly=True).decode()}


def _token_columns(instance_id: UUID, encryption: Encryption, tokens: dict[str, str]) -> dict[str, bytes]:
    columns = {}
    for name, token in tokens.items():
        columns[f"{name}_digest"] = token_digest(token.encode())
        columns[f"{name}_encrypted"] = _encrypt(encryption, instance_id, name, token)
    return columns


def _encrypt(encryption: Encryption, instance_id: UUID, column: str, secret: str) -> bytes:
    return encryption.encrypt(secret.encode(), secret_context(instance_id, column))


# Changing


async def update(
    context: Context, acting: audit.Acting, organization_id: UUID, instance_id: UUID, body: UpdateInstance
) -> None:
    """Rename it, or change its memory, eviction or URL.

    Raises:
        NotFound, BadRequest, QuotaExceeded: it cannot be.
    """
    row = await find(context.database, organization_id, instance_id)
    fields: dict[str, str] = {}
    if body.name is not None and not body.name.strip():
        fields["name"] = "must not be blank"
    if row["provisioner"] == "external":
        for name in ("max_memory", "eviction"):
            if getattr(body, name) is not None:
                fields[name] = "is set where this Redis runs, not here"
    elif body.external_url is not None:
        fields["external_url"] = "is for instances that were registered by their URL"
    if fields:
        raise BadRequest(fields=fields)
    changes: dict[str, Any] = {
        name: getattr(body, name) for name in ("name", "max_memory", "eviction") if getattr(body, name) is not None
    }
    registered: dict[str, Any] = {}
    if body.external_url is not None:
        registered = await _register(context, instance_id, body.external_url, row["redis_version_wanted"])
    async with context.database.transaction() as connection:
        row = await lock(connection, organization_id, instance_id)
        changes = {name: value for name, value in changes.items() if row[name] != value}
        if not changes and not registered:
            return
        if "max_memory" in changes and row["counts_against_quota"]:
            await quotas.reserve_instance(connection, organization_id, changes["max_memory"], instance_id=instance_id)
        await set_columns(
            connection, instance_id, {**changes, **registered}, wanted=set(changes) != {"name"} or bool(registered)
        )
        shown = [*changes, *(["external_url"] if registered else [])]
        await audit.record(
            connection,
            acting,
            "instances.update",
            ("instance", instance_id),
            {name: row[name] for name in shown},
            {name: {**changes, **registered}[name] for name in shown},
            organization_id=organization_id,
        )


async def change_status(
    context: Context, acting: audit.Acting, organization_id: UUID, instance_id: UUID, action: str
) -> None:
    """Start, stop or restart it, or have it looked at.

    Raises:
        NotFound: there is no such instance.
        Conflict: it is stopped, and cannot be restarted.
        QuotaExceeded: its creation had failed, and now there is no room for it.
    """
    async with context.database.transaction() as connection:
        row = await lock(connection, organization_id, instance_id)
        changes: dict[str, Any] = {"retry_at": None, "attempts": 0}
        if action == "restart":
            if row["desired_state"] != "running":
                raise Conflict("it is stopped; start it instead")
            changes["restarts_wanted"] = row["restarts_wanted"] + 1
        elif action in ("start", "stop"):
            changes["desired_state"] = "running" if action == "start" else "stopped"
        if row["status"] == "error" and action != "stop":
            changes["status"] = "updating"  # it is tried again now: the answer waits for how that goes
        if not row["counts_against_quota"]:
            # Its creation failed and was rolled back: once more from the beginning.
            if action == "stop":
                raise Conflict("its creation failed: there is nothing to stop; delete it, or try again by reconcile")
            await quotas.reserve_instance(connection, organization_id, row["max_memory"], instance_id=None)
            changes |= {"counts_against_quota": True, "status": "pending", "status_reason": None}
        await set_columns(connection, instance_id, changes)
        await audit.record(
            connection,
            acting,
            f"instances.{action}",
            ("instance", instance_id),
            {"status": row["status"], "desired_state": row["desired_state"]},
            {"desired_state": changes.get("desired_state", row["desired_state"])},
            organization_id=organization_id,
        )


async def rotate(
    context: Context, acting: audit.Acting, organization_id: UUID, instance_id: UUID, body: RotateCredentials
) -> dict[str, str]:
    """Replace tokens, which end at once, and the password that the gateway logs in with; returns the tokens.

    Raises:
        NotFound: there is no such instance.
        BadRequest: nothing was chosen.
    """
    chosen = [name for name in ("token", "readonly_token", "password") if getattr(body, name)]
    if not chosen:
        raise BadRequest("choose at least one of token, readonly_token, password")
    encryption = context.encryption
    tokens = {name: token for name, token in _tokens(context).items() if name in chosen}
    async with context.database.transaction() as connection:
        row = await lock(connection, organization_id, instance_id)
        changes: dict[str, Any] = _token_columns(instance_id, encryption, tokens)
        if tokens:
            changes["tokens_rotated_at"] = context.now()
        password = "password" in chosen and row["provisioner"] != "external"
        if password:
            changes["next_password_encrypted"] = _encrypt(
                encryption, instance_id, "next_password", secrets.token_urlsafe(32)
            )
        await set_columns(connection, instance_id, changes, wanted=password)
        replaced = [*tokens, *(["password"] if password else [])]
        await audit.record(
            connection,
            acting,
            "instances.rotate",
            ("instance", instance_id),
            after={"replaced": replaced},
            organization_id=organization_id,
        )
    return tokens


async def reveal(context: Context, acting: audit.Acting, organization_id: UUID, instance_id: UUID) -> dict[str, str]:
    """Its tokens, which is put on record. Raises NotFound."""
    async with context.database.transaction() as connection:
        row = await find(connection, organization_id, instance_id)
        tokens = {name: decrypt(row, name, context.encryption) or "" for name in ("token", "readonly_token")}
        await audit.record(
            connection,
            acting,
            "instances.credentials",
            ("instance", instance_id),
            organization_id=organization_id,
        )
    return tokens


async def delete(context: Context, acting: audit.Acting, organization_id: UUID, instance_id: UUID) -> None:
    """End it. Its data is kept until `purge_at`, and until then it can be restored. Raises NotFound."""
    async with context.database.transaction() as connection:
        row = await lock(connection, organization_id, instance_id)
        await _delete(connection, context, row)
        await audit.record(
            connection,
            acting,
            "instances.delete",
            ("instance", instance_id),
            {"name": row["name"], "slug": row["slug"], "status": row["status"]},
            organization_id=organization_id,
        )


async def _delete(connection: Connection, context: Context, row: Record) -> None:
    now = context.now()
    await set_columns(
        connection,
        row["id"],
        {
            "desired_state": "deleted",
            "status": "deleting",
            "status_reason": None,
            "deleted_at": now,
            "purge_at": now + timedelta(seconds=context.settings.purge_after),
            "counts_against_quota": False,
            "attempts": 0,
            "retry_at": None,
        },
    )


async def restore(context: Context, acting: audit.Acting, organization_id: UUID, instance_id: UUID) -> None:
    """Bring back what was deleted and not purged yet, with its data.

    Raises:
        NotFound: there is no such deleted instance.
        Conflict: its slug has been taken meanwhile.
        QuotaExceeded: there is no room for it any more.
    """
    async with context.database.transaction() as connection:
        row = await lock(connection, organization_id, instance_id, deleted=True)
        if row["purge_at"] is not None and row["purge_at"] <= context.now():
            raise NotFound("there is no such instance: its time to be restored is over")
        await quotas.reserve_instance(connection, organization_id, row["max_memory"])
        changes = {
            "desired_state": "running",
            "status": "pending",
            "status_reason": None,
            "deleted_at": None,
            "purge_at": None,
            "counts_against_quota": True,
            "attempts": 0,
            "retry_at": None,
        }
        try:
            async with connection.transaction():
                await set_columns(connection, instance_id, changes)
        except asyncpg.UniqueViolationError as error:
            raise Conflict(
                f"another instance has the slug {row['slug']} now; delete that one first",
                {"fields": {"slug": "is taken"}},
            ) from error
        await audit.record(
            connection,
            acting,
            "instances.restore",
            ("instance", instance_id),
            {"deleted_at": row["deleted_at"]},
            organization_id=organization_id,
        )


async def set_columns(
    connection: Connection, instance_id: UUID, changes: dict[str, Any], *, wanted: bool = True
) -> None:
    """Change columns; `wanted`: the steward has something to do."""
    assignments = [f"{name} = ${index + 2}" for index, name in enumerate(changes)]
    assignments.append("updated_at = now()")
    if wanted:
        assignments.append("generation = generation + 1")
        if "status" not in changes:
            # From now on, not only from when the steward begins.
            assignments.append(
                "status = CASE WHEN status = 'running' AND provisioner <> 'external' THEN 'updating' ELSE status END"
            )
        else:
            assignments.append("status_at = now()")
    await connection.execute(
        f"UPDATE instances SET {', '.join(assignments)} WHERE id = $1", instance_id, *changes.values()
    )


# For the whole deployment


@duty("re-encryption of instances' secrets", every=300)
async def renew_encryption(context: Context) -> None:
    """Bring secrets that an older key encrypted under the newest one, so that the older can be dropped."""
    columns = ("password", "admin_password", "next_password", "token", "readonly_token")
    current = context.encryption.current_header
    old = " OR ".join(f"substring({name}_encrypted from 1 for {len(current)}) <> $1" for name in columns)
    for found in await context.database.fetch(f"SELECT id FROM instances WHERE {old}", current):
        async with context.database.transaction() as connection:
            row = await connection.fetchrow("SELECT * FROM instances WHERE id = $1 FOR UPDATE", found["id"])
            if row is None:
                continue
            changes: dict[str, bytes] = {}
            for name in columns:
                ciphertext = row[f"{name}_encrypted"]
                if ciphertext is None or context.encryption.is_current(ciphertext):
                    continue
                try:
                    secret = decrypt(row, name, context.encryption)
                except DecryptionError as error:
                    log.error("instance %s: %s cannot be decrypted: %s", row["id"], name, error)
                    continue
                assert secret is not None
                changes[f"{name}_encrypted"] = _encrypt(context.encryption, row["id"], name, secret)
            if changes:
                await set_columns(connection, row["id"], changes, wanted=False)
