"""The control plane's part of `redisgate doctor`: its database, its secrets, its hosts, and every instance it knows."""

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

import asyncpg

from control import commands
from control import settings as control_settings
from control.database import CONNECT_TIMEOUT, Connection, close, connect
from control.encryption import DecryptionError, Encryption
from control.hosts import AWAY_SECONDS, HOST_FILE
from control.instances import address_of, decrypt
from control.mailer import make_mailer
from control.migrate import unreachable
from control.plane import ACCESS_POOL_SIZE
from redisgate.check import MAX_AT_ONCE, MAX_CLOCK_SKEW, Facts, cure_of, describe, look_at
from redisgate.config import ConfigError, Settings, ensure_secret_key
from redisgate.findings import FAIL, Finding, Report
from resp.address import Address
from resp.errors import ConnectFailed

OLDEST_POSTGRES: Final = 14
"""What still gets fixes, and what the tests run on."""
SLOW_SECONDS: Final = 0.01
"""A database that answers later is in another place."""
NOTIFY_SECONDS: Final = 2.0
"""For a notification to arrive."""
LATENCY_SAMPLES: Final = 5
STEWARD_CONNECTIONS: Final = 12
"""Of one host, beside its workers': pool, locks, notifications."""
SECRETS: Final = ("password", "admin_password", "token", "readonly_token")
"""Columns of an instance that are encrypted, without `_encrypted`."""

Clock = Callable[[], float]


def examine(settings: Settings, clock: Clock = time.time) -> list[Finding]:
    """All that is to be known; `clock` gives unix seconds."""
    report = Report()
    report.add(commands.check(settings))
    _look_at_mailer(settings, report)
    try:
        asyncio.run(_examine(settings, report, clock))
    except Exception as error:
        # Said by `check` already, where it is about reaching PostgreSQL at all.
        if not unreachable(error) and not isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError):
            raise
        if not any(finding.level == FAIL for finding in report.findings):
            report.about("database")
            report.wrong(f"it could not be looked at: {error or type(error).__name__}", "try again in a moment")
    return report.findings


def _look_at_mailer(settings: Settings, report: Report) -> None:
    report.about("mail")
    try:
        make_mailer(settings)
    except ConfigError as error:
        report.wrong(str(error), "name an async function of an installed module, or log")
        return
    if settings.control.mailer == "log" and settings.control.mode == "production":
        report.note(
            "no mailer is configured: nobody can reset a password, and invitations must be handed on by hand",
            "set REDISGATE_MAILER to module:function",
        )


async def _examine(settings: Settings, report: Report, clock: Clock) -> None:
    connection = await connect(settings.control.database_url, "redisgate doctor")
    try:
        report.about("database")
        await _look_at_server(connection, settings, report, clock)
        await _look_at_direct(connection, settings, report)
        if await connection.fetchval("SELECT to_regclass('instances')") is None:
            return  # `check` says that there are migrations to be applied
        if not await _look_at_rights(connection, settings, report):
            return
        report.about("hosts")
        await _look_at_hosts(connection, settings, report)
        rows = await connection.fetch(
            "SELECT instances.*, hosts.name AS host_name FROM instances LEFT JOIN hosts ON hosts.id = host_id"
            " WHERE desired_state <> 'deleted' ORDER BY label"
        )
    finally:
        await close(connection)
    encryption = _encryption(settings)
    _look_at_secrets(rows, encryption, report)
    await _look_at_instances(rows, encryption, settings, report)


# PostgreSQL


async def _look_at_server(connection: Connection, settings: Settings, report: Report, clock: Clock) -> None:
    number = int(await connection.fetchval("SHOW server_version_num"))
    if number // 10000 < OLDEST_POSTGRES:
        report.wrong(
            f"PostgreSQL {number // 10000} gets no fixes any more", f"upgrade it to {OLDEST_POSTGRES} or newer"
        )
    times = []
    for _ in range(LATENCY_SAMPLES):
        began = time.perf_counter()
        await connection.fetchval("SELECT 1")
        times.append(time.perf_counter() - began)
    latency = statistics.median(times)
    if latency > SLOW_SECONDS:
        report.note(
            f"it takes {latency * 1000:.0f} ms to answer, and a request to the API asks it several times",
            "put the gateway and PostgreSQL beside each other",
        )
    else:
        report.ok(f"answers in {latency * 1000:.1f} ms")
    ahead = float(await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())")) - clock()
    if abs(ahead) > MAX_CLOCK_SKEW:
        report.wrong(
            f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's: sessions,"
            " expiries and leases come out wrong",
            "have both clocks set by NTP (chrony, systemd-timesyncd)",
        )
    if await connection.fetchval("SELECT pg_is_in_recovery()"):
        report.wrong("it is a standby, which takes no writes", "name the primary in database_url")
    elif await connection.fetchval("SHOW default_transaction_read_only") == "on":
        report.wrong(
            "it takes no writes from this role: default_transaction_read_only is on",
            "ALTER ROLE or ALTER DATABASE … RESET default_transaction_read_only, as its superuser",
        )
    await _look_at_connections(connection, settings, report)


async def _look_at_connections(connection: Connection, settings: Settings, report: Report) -> None:
    most = int(await connection.fetchval("SHOW max_connections"))
    most -= int(await connection.fetchval("SHOW superuser_reserved_connections"))
    of_role = int(await connection.fetchval("SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user"))
    if of_role >= 0:
        most = min(most, of_role)
    # Per worker: the pool, the access table's own, and one that listens.
    per_worker = settings.control.database_pool_size + ACCESS_POOL_SIZE + 1
    wanted = settings.workers * per_worker + STEWARD_CONNECTIONS
    if wanted > most:
        report.wrong(
            f"this gateway may ask for {wanted} connections ({settings.workers} workers with {per_worker} each), and"
            f" there are {most}",
            "lower database_pool_size or workers, put a pooler in between (and past it database_direct_url), or raise"
            " max_connections",
        )
    else:
        report.ok(f"{wanted} of {most} connections are enough for this gateway")


_IDENTITY: Final = (
    "SELECT (SELECT system_identifier::text FROM pg_control_system()) || '/' || oid FROM pg_database"
    " WHERE datname = current_database()"
)


async def _look_at_direct(connection: Connection, settings: Settings, report: Report) -> None:
    """Whether the other URLs lead to the same database, and notifications arrive."""
    control = settings.control
    identity = await connection.fetchval(_IDENTITY)
    for name, url in (
        ("database_direct_url", control.database_direct_url),
        ("database_migration_url", control.database_migration_url),
    ):
        if not url:
            continue
        with contextlib.suppress(OSError, asyncpg.PostgresError):  # `check` has said that it cannot be reached
            other = await connect(url, "redisgate doctor")
            try:
                same = await other.fetchval(_IDENTITY) == identity
            finally:
                await close(other)
            if not same:
                report.wrong(f"{name} leads to another database than database_url", "let both name the same database")
                return
    await _look_at_notifications(connection, settings, report)


async def _look_at_notifications(connection: Connection, settings: Settings, report: Report) -> None:
    channel = f"redisgate_doctor_{os.getpid()}"
    arrived = asyncio.Event()
    url = settings.control.database_direct_url or settings.control.database_url
    try:
        listening = await connect(url, "redisgate doctor")
    except Exception as error:
        if not unreachable(error):
            raise
        return
    try:
        await listening.add_listener(channel, lambda *_: arrived.set())
        await connection.execute("SELECT pg_notify($1, '')", channel)
        try:
            async with asyncio.timeout(NOTIFY_SECONDS):
                await arrived.wait()
        except TimeoutError:
            report.wrong(
                "notifications do not arrive, so revoked keys work on for up to two seconds: a pooler swallows LISTEN",
                "set database_direct_url to PostgreSQL itself, past the pooler",
            )
        else:
            report.ok("notifications arrive")
    finally:
        listening.terminate()


async def _look_at_rights(connection: Connection, settings: Settings, report: Report) -> bool:
    """Whether the application's role may do its work; and no more."""
    lacking = await connection.fetch(
        "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
        " AND NOT has_table_privilege(quote_ident(schemaname) || '.' || quote_ident(tablename), 'SELECT')"
        " ORDER BY tablename"
    )
    if lacking:
        report.wrong(
            f"the role of database_url may not read {', '.join(row['tablename'] for row in lacking)}",
            "run `redisgate migrate` with database_migration_url: it grants the rights",
        )
        return False
    if await connection.fetchval(
        "SELECT pg_has_role(tableowner, 'USAGE') FROM pg_tables"
        " WHERE schemaname = current_schema() AND tablename = 'audit_events'"
    ):
        report.note(
            "the role of database_url owns the audit log, and could so change it",
            "give the tables to a role of their own: docs/security.md, Database roles",
        )
    return True


# Hosts, secrets, instances


def _own_host(settings: Settings) -> UUID | None:
    """Which host this is; None: it has not been one yet."""
    try:
        return UUID((settings.state_dir / HOST_FILE).read_text().strip())
    except (OSError, ValueError):
        return None


async def _look_at_hosts(connection: Connection, settings: Settings, report: Report) -> None:
    rows = await connection.fetch(
        "SELECT hosts.id, hosts.name, extract(epoch FROM now() - seen_at)::float AS silent,"
        " (SELECT count(*) FROM instances WHERE host_id = hosts.id AND desired_state = 'running') AS instances"
        " FROM hosts ORDER BY hosts.name"
    )
    for row in rows:
        if row["silent"] <= AWAY_SECONDS:
            report.ok(f"{row['name']} has been heard of {row['silent']:.0f} s ago")
        elif row["instances"]:
            report.wrong(
                f"{row['name']} has not been heard of for {row['silent']:.0f} s, and {row['instances']} instances are"
                " there",
                "start `redisgate serve` on that host, or restore those instances elsewhere",
            )
        else:
            report.note(f"{row['name']} has not been heard of for {row['silent']:.0f} s; no instance is there")
    if not rows:
        report.note(
            "no host has ever been at work, so no instance is brought about", "start `redisgate serve`, which is one"
        )


def _encryption(settings: Settings) -> Encryption | None:
    """What opens the secrets; None: there is no key yet, and a doctor makes none."""
    if not settings.secret_key and not (settings.state_dir / "secret.key").exists():
        return None
    with contextlib.suppress(ConfigError):
        return Encryption(control_settings.encryption_keys(ensure_secret_key(settings)))
    return None


def _look_at_secrets(rows: list[Any], encryption: Encryption | None, report: Report) -> None:
    report.about("secrets")
    if encryption is None:
        if rows:
            report.wrong(
                "there are instances, and no secret key that opens their passwords",
                "set REDISGATE_SECRET_KEY to the one they were made under",
            )
        return
    closed, old = [], 0
    for row in rows:
        try:
            for column in SECRETS:
                decrypt(row, column, encryption)
                ciphertext = row[f"{column}_encrypted"]
                old += ciphertext is not None and not encryption.is_current(ciphertext)
        except DecryptionError:
            closed.append(row["label"])
    if closed:
        report.wrong(
            f"the secrets of {len(closed)} instances cannot be opened with the keys that are set: {_some(closed)}",
            "put the key they were encrypted under behind the new one: previous_secret_keys, or encryption_keys",
        )
    elif rows:
        report.ok(f"the secrets of {len(rows)} instances can be opened")
    if old:
        report.note(f"{old} secrets are under an older key", "keep it until the steward has encrypted them anew")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


async def _look_at_instances(
    rows: list[Any], encryption: Encryption | None, settings: Settings, report: Report
) -> None:
    own = _own_host(settings)
    turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def look(row: Any) -> tuple[Address | None, Facts | ConnectFailed | str]:
        if row["provisioner"] == "local" and row["host_id"] != own:
            return None, f"it is on {row['host_name'] or 'no host yet'}: run the doctor there"
        if row["provisioner"] == "kubernetes":
            return None, "it is in the cluster: `kubectl describe redishttpinstance` says how it is"
        if row["endpoint"] is None or encryption is None:
            return None, "nothing is known of where it is yet" if encryption else "its password cannot be opened"
        try:
            address = address_of(row, encryption)
        except (DecryptionError, ValueError):
            return None, "its password cannot be opened"
        async with turns:
            return address, await look_at(address, CONNECT_TIMEOUT, CONNECT_TIMEOUT)

    found = await asyncio.gather(*(look(row) for row in rows if row["desired_state"] == "running"))
    running = [row for row in rows if row["desired_state"] == "running"]
    for row, (address, facts) in zip(running, found, strict=True):
        report.about(f"instance {row['label']} ({row['provisioner']}, {row['id']})")
        if row["status"] == "error":
            report.wrong(
                f"its status is error: {row['status_reason'] or 'no reason was given'}",
                f"mend that, then PUT /api/organizations/{row['organization_id']}/redis-instances/{row['id']}/status",
            )
        if isinstance(facts, str):
            report.note(facts)
        elif isinstance(facts, ConnectFailed):
            assert address is not None
            report.wrong(facts.detail, _cure(row, address, facts))
        else:
            assert address is not None
            describe(report, address, facts)


def _cure(row: Any, address: Address, failure: ConnectFailed) -> str:
    if row["provisioner"] == "local":
        return "start `redisgate serve` on this host: its steward starts the server again; its log says why it cannot"
    if row["provisioner"] == "external":
        return cure_of(address, failure).replace("in the URL", "by PATCH with external_url")
    return "look at its pods: kubectl get redishttpinstances, kubectl describe pod"
