"""What `redisgate dev` has from the start: an account, its organization, an instance, an API key.

Made once; what somebody does with them afterwards stays as it is, except that
an instance that is gone is made again. The secrets that are shown at each
start are kept in a file beside the data, because the database has no more
than their digests.
"""

import asyncio
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from control import accounts, api_keys, instances
from control.app import make_context
from control.audit import Actor
from control.database import Record
from control.hosts import host_id
from control.http import Context
from control.migrate import migrate
from redisgate.config import ConfigError, Settings
from resp.connection import connect
from resp.errors import ReplyLost, RespError

EMAIL = "demo@redisgate.dev"
PASSWORD = "Demo123456!"
ORGANIZATION = "Demo"
INSTANCE = "demo"
MEMORY = 256 * 1024 * 1024
"""Bytes of the demo instance."""
WAIT_SECONDS = 15.0
"""For the instance to run before the addresses are printed."""


@dataclass(frozen=True)
class Demo:
    """What a newcomer is shown."""

    organization_id: str
    instance_id: str
    token: str
    readonly_token: str
    api_key: str
    status: str = "pending"
    email: str = EMAIL
    password: str = PASSWORD


def prepare(settings: Settings, file: Path, *, administrator: bool) -> Demo:
    """Migrate the database, and make what is not there yet; `administrator`: of the platform.

    Raises:
        ConfigError: the database cannot be reached.
        MigrationError: it cannot be brought up to date.
    """
    with asyncio.Runner() as runner:
        return runner.run(_prepare(settings, file, administrator))


def wait(settings: Settings, demo: Demo) -> Demo:
    """The same, once its instance runs or cannot; after `WAIT_SECONDS` as it is."""
    with asyncio.Runner() as runner:
        return runner.run(_wait(settings, demo))


async def _prepare(settings: Settings, file: Path, administrator: bool) -> Demo:
    try:
        await migrate(settings.control)
    except OSError as error:
        raise ConfigError(f"PostgreSQL cannot be reached: {error}") from error
    context = make_context(settings, name="redisgate dev")
    try:
        # They were stopped with us the last time; otherwise the steward would take them for dead, and say so.
        await context.database.execute(
            "UPDATE instances SET status = 'updating', status_at = now() WHERE provisioner = 'local' AND host_id = $1"
            " AND status = 'running' AND desired_state = 'running'",
            host_id(settings.state_dir),
        )
        user_id, organization_id = await _account(context, administrator)
        known = _read(file)
        demo = await _instance(context, user_id, organization_id, known)
        if not await _key_works(context, demo.api_key):
            demo = dataclasses.replace(demo, api_key=await _api_key(context, user_id, organization_id))
        if demo != known:
            _write(file, demo)
        return demo
    finally:
        await context.close()


def _actor(context: Context, user_id: UUID | None = None) -> Actor:
    if user_id is None:
        return Actor(context.audit, "system", name="redisgate dev")
    return Actor(context.audit, "user", user_id, EMAIL)


async def _account(context: Context, administrator: bool) -> tuple[UUID, UUID]:
    row = await context.database.fetchrow(
        "SELECT u.id, o.id AS organization_id FROM users u JOIN memberships m ON m.user_id = u.id"
        " JOIN organizations o ON o.id = m.organization_id AND o.deleted_at IS NULL"
        " WHERE lower(u.email) = $1 ORDER BY m.created_at LIMIT 1",
        EMAIL,
    )
    if row is not None:
        return row["id"], row["organization_id"]
    person = accounts.Registration(EMAIL, "demo", "Demo", "Account")
    password_hash = await context.passwords.hash(PASSWORD)
    async with context.database.transaction() as connection:
        user, organization = await accounts.register(
            connection, _actor(context), person, password_hash, organization_name=ORGANIZATION
        )
        if administrator:
            await accounts.set_admin(connection, _actor(context), EMAIL, True)
    return user["id"], organization["id"]


async def _instance(context: Context, user_id: UUID, organization_id: UUID, known: Demo | None) -> Demo:
    rows = await context.database.fetch(
        "SELECT id FROM instances WHERE organization_id = $1 AND deleted_at IS NULL ORDER BY created_at",
        organization_id,
    )
    ids = [str(row["id"]) for row in rows]
    api_key = known.api_key if known is not None else ""
    if known is not None and known.instance_id in ids:
        return dataclasses.replace(known, status="pending")
    if ids:
        tokens = await instances.reveal(context, _actor(context, user_id), organization_id, UUID(ids[0]))
        return Demo(str(organization_id), ids[0], tokens["token"], tokens["readonly_token"], api_key)
    body = instances.CreateInstance(name="Demo", slug=INSTANCE, max_memory=MEMORY)
    made, tokens = await instances.create(context, _actor(context, user_id), organization_id, user_id, body)
    return Demo(str(organization_id), str(made), tokens["token"], tokens["readonly_token"], api_key)


async def _key_works(context: Context, key: str) -> bool:
    found = await context.database.fetchval(
        "SELECT true FROM api_keys WHERE digest = $1 AND revoked_at IS NULL AND expires_at > now()"
        " AND (valid_until IS NULL OR valid_until > now())",
        api_keys.digest(key),
    )
    return found is True


async def _api_key(context: Context, user_id: UUID, organization_id: UUID) -> str:
    wanted = api_keys.CreateApiKey(name="Demo", scopes=["read", "write", "manage"])
    async with context.database.transaction() as connection:
        key, _ = await api_keys.create(
            context, connection, _actor(context, user_id), organization_id, user_id, "owner", wanted
        )
    return key


async def _wait(settings: Settings, demo: Demo) -> Demo:
    context = make_context(settings, name="redisgate dev")
    status = "not there yet"
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                row = await instances.wait_until_settled(context.database, UUID(demo.instance_id), WAIT_SECONDS)
                if row is None:
                    return dataclasses.replace(demo, status="gone")
                status = f"{row['status']}: {row['status_reason']}" if row["status_reason"] else row["status"]
                # That it runs may be said of the time before it was stopped with us; an error may be that it had
                # stopped, and be mended in a moment. One that was rolled back stays.
                if row["status"] == "running" and await _answers(context, row):
                    break
                if row["status"] == "stopped" or not row["counts_against_quota"]:
                    break
                await asyncio.sleep(0.05)
    except TimeoutError:
        pass
    finally:
        await context.close()
    return dataclasses.replace(demo, status=status)


async def _answers(context: Context, row: Record) -> bool:
    try:
        connection = await connect(instances.address_of(row, context.encryption), timeout=1)
    except RespError:
        return False
    connection.close(ReplyLost("done"))
    return True


def _read(file: Path) -> Demo | None:
    try:
        return Demo(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} does not hold the demo's tokens; remove it to have new ones made") from error


def _write(file: Path, demo: Demo) -> None:
    new = file.with_suffix(".new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        json.dump(dataclasses.asdict(demo), opened, indent=2)
    new.replace(file)
