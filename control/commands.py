"""Commands for whoever runs the deployment: `redisgate admin`, `redisgate audit`, and part of `redisgate check`."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import asyncpg

from control import accounts, audit, steward
from control.app import make_context
from control.audit import Actor, Filter
from control.database import DatabaseAway, close, connect
from control.http import ApiError, Context
from control.migrate import Migration, MigrationError, applied, known, migration_url, pending, unreachable
from control.settings import check as check_settings
from redisgate.config import ConfigError, ControlSettings, Settings, ensure_secret_key
from redisgate.findings import Finding, Report


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


def check(settings: Settings) -> list[Finding]:
    """What is well with the control plane, and what is wrong with what to do about it; for `redisgate check`."""
    report = Report()
    report.about("control plane")
    for work in (check_settings, steward.check):
        try:
            work(settings)
        except ConfigError as error:
            report.wrong(str(error), "change that setting")
    for name, url in _urls(settings.control).items():
        try:
            version, todo = asyncio.run(_look_at(url, owns=url == migration_url(settings.control)))
        except MigrationError as error:
            report.wrong(f"{name}: {error}", "`redisgate migrate --status` shows what is applied")
        except asyncpg.ClientConfigurationError as error:
            report.wrong(f"{name}: {error}", "mend the URL")
        except Exception as error:
            if not unreachable(error):
                raise
            report.wrong(f"{name}: {error or type(error).__name__}", "start PostgreSQL, or mend the URL")
        else:
            report.ok(f"{name}: PostgreSQL {version}")
            if todo:
                cure = "`redisgate migrate` does, or `redisgate serve` when it starts"
                report.wrong(f"{name}: {len(todo)} migrations are to be applied, from {todo[0]} on", cure)
    return report.findings


def _urls(control: ControlSettings) -> dict[str, str]:
    names = ("database_url", "database_direct_url", "database_migration_url")
    return {name: getattr(control, name) for name in names if getattr(control, name)}


async def _look_at(url: str, *, owns: bool) -> tuple[str, list[Migration]]:
    connection = await connect(url, "redisgate check")
    try:
        version = str(await connection.fetchval("SHOW server_version"))
        return version, pending(known(), await applied(connection)) if owns else []
    finally:
        await close(connection)
