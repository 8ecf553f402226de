"""Commands for whoever runs the deployment: `redisgate admin` and `redisgate audit`."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from control import accounts, audit
from control.app import make_context
from control.audit import Actor, Filter
from control.database import DatabaseAway
from control.http import ApiError, Context
from redisgate.config import ConfigError, Settings, ensure_secret_key


def _run(settings: Settings, work: Callable[[Context], Awaitable[int]]) -> int:
    """Do the work with the context of these settings; what goes wrong is one line."""
    if not settings.control.enabled:
        raise ConfigError("no database is configured; set DATABASE_URL or --database-url")
    try:
        return asyncio.run(_with_context(ensure_secret_key(settings), work))
    except (ApiError, DatabaseAway) as error:
        print(f"redisgate: {error}", file=sys.stderr)
        return 1


async def _with_context(settings: Settings, work: Callable[[Context], Awaitable[int]]) -> int:
    context = make_context(settings, name="redisgate command")
    try:
        return await work(context)
    finally:
        await context.close()


def run_admin(settings: Settings, email: str, *, revoke: bool) -> int:
    """Make somebody an administrator of the platform, or no longer one."""

    async def work(context: Context) -> int:
        actor = Actor(context.audit, "system", name="redisgate admin")
        async with context.database.transaction() as connection:
            user = await accounts.set_admin(connection, actor, email, not revoke)
        print(f"{user['email']} is {'no longer ' if revoke else ''}an administrator of the platform")
        return 0

    return _run(settings, work)


def run_audit_verify(settings: Settings, logs: Sequence[str]) -> int:
    """Say whether the audit log is as it was written; 1 if it is not."""

    async def work(context: Context) -> int:
        try:
            report = await audit.verify_database(
                context.database, context.audit, settings.state_dir, [Path(log) for log in logs]
            )
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
        print(report)
        return 0 if report.intact else 1

    return _run(settings, work)


def run_audit_export(settings: Settings) -> int:
    """Write all of the audit log to standard output, as JSON lines."""

    async def work(context: Context) -> int:
        async for lines in audit.export(context.database, Filter()):
            sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()
        return 0

    return _run(settings, work)
