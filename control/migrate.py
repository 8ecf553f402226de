"""Migrations: numbered SQL, applied once, in order, each in a transaction of its own.

`migrations/0001_accounts.sql` is migration 1. What was applied is kept in the
table `schema_migrations` with its checksum: a file that changed afterwards is
refused, because nobody knows which of the two the database has. An advisory
lock lets one process migrate at a time; the others wait, and find it done.

Migrations run while the previous release serves. They *expand*: add what the
next release needs, and take nothing away, so that both work with what there
is. What is not needed any more goes in a later release, by a migration that
says so in its first line, `-- contract`: a release that does not know such a
one refuses to serve. No migration waits for a table for long, because
everybody else would wait behind it: it gives up and tries again.

With `database_migration_url` the tables belong to a role that the application
does not have; the application's role is granted what it needs, and no more.
"""

import asyncio
import hashlib
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import asyncpg

from control.database import DatabaseAway, close, connect, is_away
from redisgate.config import ConfigError, ControlSettings

LOCK = 0x7265646973676174
"""Advisory lock of whoever migrates ("redisgat")."""
LOCK_SECONDS = 60.0
"""To wait for another process that migrates."""
MIGRATION_SECONDS = 3600.0
"""For one migration."""
TABLE_LOCK_SECONDS = 2.0
"""For a table that others use; meanwhile whoever comes later waits too."""
TABLE_LOCK_ATTEMPTS = 20
TABLE_LOCK_PAUSE_SECONDS = 1.0
"""Between two of them, for those who waited."""
APPEND_ONLY = ("audit_events",)
"""Tables that the application may add to and read, but not change."""
READ_ONLY = ("schema_migrations",)

_CONTRACT = re.compile(r"--\s*contract\b", re.IGNORECASE)
_FILE = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")

log = logging.getLogger(__name__)


class MigrationError(Exception):
    """The database cannot be brought up to date; one line for the operator."""


@dataclass(frozen=True)
class Migration:
    """One file."""

    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, in hex."""
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def contracts(self) -> bool:
        """Whether it takes away what releases before it use."""
        return _CONTRACT.match(self.sql) is not None

    def __str__(self) -> str:
        return f"{self.number:04}_{self.name}"


@dataclass(frozen=True)
class Applied:
    """What the database knows of one migration."""

    number: int
    name: str
    checksum: str
    at: Any
    contracts: bool

    def __str__(self) -> str:
        return f"{self.number:04}_{self.name}"


def folder() -> Path:
    """Where the files are: inside the installed package, or at the top of the tree."""
    installed = Path(__file__).parent / "migrations"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "migrations"


def known(directory: Path | None = None) -> list[Migration]:
    """All migrations in the order of their numbers.

    Raises:
        MigrationError: two have the same number, or a file's name does not fit.
    """
    found: dict[int, Migration] = {}
    for path in sorted((directory or folder()).glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise MigrationError(f"{path.name} is no name of a migration; expected something like 0007_teams.sql")
        migration = Migration(int(match[1]), match[2], path.read_text("utf-8"))
        if migration.number in found:
            raise MigrationError(f"{found[migration.number]} and {migration} have the same number")
        found[migration.number] = migration
    return [found[number] for number in sorted(found)]


def create(name: str, directory: Path | None = None) -> Path:
    """A new empty migration with the next number.

    Raises:
        MigrationError: the name does not fit.
    """
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not slug:
        raise MigrationError("the name of a migration is made of letters, digits and underscores")
    directory = directory or folder()
    number = max((migration.number for migration in known(directory)), default=0) + 1
    path = directory / f"{number:04}_{slug}.sql"
    path.write_text(f"-- {name}\n\n", "utf-8")
    return path


async def applied(connection: "asyncpg.Connection[Any]") -> dict[int, Applied]:
    """What the database has, by number; empty for a new database."""
    if await connection.fetchval("SELECT to_regclass('schema_migrations')") is None:
        return {}
    # The column came later than the table: of migrations that have none, nothing is known.
    rows = await connection.fetch(
        "SELECT number, name, checksum, applied_at, coalesce((to_jsonb(done)->>'contracts')::boolean, true)"
        " FROM schema_migrations AS done ORDER BY number"
    )
    return {row["number"]: Applied(*row.values()) for row in rows}


def pending(migrations: list[Migration], done: dict[int, Applied]) -> list[Migration]:
    """What is to be applied.

    Raises:
        MigrationError: the database lacks what we need since a newer release, or a file is not what was applied.
    """
    ours = {migration.number: migration for migration in migrations}
    for number, entry in done.items():
        if number not in ours:
            if not entry.contracts:
                continue  # of the next release, and made so that we can go on
            raise MigrationError(
                f"the database has migration {entry}, which this release does not know: it was"
                " migrated by a newer one; upgrade, or restore the database of before"
            )
        if ours[number].checksum != entry.checksum:
            raise MigrationError(
                f"migration {ours[number]} is not what was applied at {entry.at:%Y-%m-%d %H:%M} UTC: its file was"
                " changed afterwards; undo that, and put the change into a new migration"
            )
    return [migration for migration in migrations if migration.number not in done]


async def migrate(settings: ControlSettings, directory: Path | None = None) -> list[Migration]:
    """Apply what is pending; returns what was applied. A migration that fails leaves the database as it was.

    Raises:
        MigrationError: it cannot be done.
        Exception: PostgreSQL cannot be reached, as `unreachable` tells.
    """
    migrations = known(directory)
    url = migration_url(settings)
    connection = await connect(url, "redisgate migrate")
    try:
        await _lock(connection)
        new = await applied(connection)
        todo = pending(migrations, new)
        if todo:
            await _prepare(connection)
        for migration in todo:
            await _apply_in_turn(connection, migration)
        await _grant(connection, role_of(settings.database_url), role_of(url))
        return todo
    finally:
        # Ends the lock, too.
        await close(connection)


async def _lock(connection: "asyncpg.Connection[Any]") -> None:
    try:
        await connection.execute(f"SELECT pg_advisory_lock({LOCK})", timeout=LOCK_SECONDS)
    except TimeoutError:
        raise MigrationError(f"another process has been migrating for {LOCK_SECONDS:g} s; try again later") from None


async def _prepare(connection: "asyncpg.Connection[Any]") -> None:
    """Make the table of what was applied, with its newest column."""
    found = await connection.fetchval(
        "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass('schema_migrations')"
        " AND attname IN ('number', 'contracts') AND NOT attisdropped"
    )
    if found == 0:
        await connection.execute(
            "CREATE TABLE schema_migrations (number int PRIMARY KEY, name text NOT NULL, checksum text NOT NULL,"
            " applied_at timestamptz NOT NULL DEFAULT now(), contracts boolean)"
        )
    elif found == 1:
        await connection.execute("ALTER TABLE schema_migrations ADD COLUMN contracts boolean")


async def _apply_in_turn(connection: "asyncpg.Connection[Any]", migration: Migration) -> None:
    """Apply a migration between the transactions of those who use its tables."""
    for attempt in range(1, TABLE_LOCK_ATTEMPTS + 1):
        try:
            return await _apply(connection, migration)
        except asyncpg.LockNotAvailableError as error:
            if attempt == TABLE_LOCK_ATTEMPTS:
                raise MigrationError(
                    f"migration {migration} waits in vain for a table that a long transaction uses ({error}); the"
                    " database is as it was before; end that transaction (pg_stat_activity shows it), and try again"
                ) from error
            log.warning("migration %s waits for a table that is in use: attempt %d", migration, attempt)
            await asyncio.sleep(TABLE_LOCK_PAUSE_SECONDS)


async def _apply(connection: "asyncpg.Connection[Any]", migration: Migration) -> None:
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = {int(TABLE_LOCK_SECONDS * 1000)}")
            await connection.execute(migration.sql, timeout=MIGRATION_SECONDS)
            await connection.execute(
                "INSERT INTO schema_migrations (number, name, checksum, contracts) VALUES ($1, $2, $3, $4)",
                migration.number,
                migration.name,
                migration.checksum,
                migration.contracts,
            )
    except asyncpg.PostgresError as error:
        if is_away(error) or isinstance(error, asyncpg.LockNotAvailableError):
            raise
        where = _line(migration.sql, error)
        raise MigrationError(
            f"migration {migration} failed{where}: {error}; the database is as it was before"
        ) from error
    log.info("applied migration %s", migration)


def _line(sql: str, error: asyncpg.PostgresError) -> str:
    position = getattr(error, "position", None)
    return f" in line {sql[: int(position)].count(chr(10)) + 1}" if position and str(position).isdigit() else ""


async def _grant(connection: "asyncpg.Connection[Any]", application: str, owner: str) -> None:
    """Let the application's role use the tables of another role's migrations."""
    if application == owner or not application:
        return
    role = _quoted(application)
    async with connection.transaction():
        tables = await connection.fetch(
            "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() AND tableowner = current_user"
        )
        await connection.execute(f"GRANT USAGE ON SCHEMA {_quoted(await _schema(connection))} TO {role}")
        for (table,) in tables:
            rights = "SELECT, INSERT, UPDATE, DELETE"
            if table in APPEND_ONLY:
                rights = "SELECT, INSERT"
            elif table in READ_ONLY:
                rights = "SELECT"
            await connection.execute(f"REVOKE ALL ON {_quoted(table)} FROM {role}")
            await connection.execute(f"GRANT {rights} ON {_quoted(table)} TO {role}")
        schema = _quoted(await _schema(connection))
        await connection.execute(f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA {schema} TO {role}")
        await connection.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {role}")


async def _schema(connection: "asyncpg.Connection[Any]") -> str:
    return str(await connection.fetchval("SELECT current_schema()"))


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def migration_url(settings: ControlSettings) -> str:
    """The database as the role that owns its tables."""
    return settings.database_migration_url or settings.database_direct_url or settings.database_url


def unreachable(error: BaseException) -> bool:
    """Whether an exception of `migrate` says that PostgreSQL cannot be reached, or does not let us in."""
    return isinstance(error, DatabaseAway | asyncpg.InvalidAuthorizationSpecificationError) or is_away(error)


def role_of(url: str) -> str:
    """The user that a database URL names."""
    return unquote(urlsplit(url).username or "")


def run(settings: ControlSettings, *, status: bool, new: str | None) -> int:
    """`redisgate migrate`: bring the database up to date, say where it is, or begin a new migration."""
    try:
        if new is not None:
            print(create(new))
            return 0
        if not settings.database_url:
            raise ConfigError("no database is configured; set DATABASE_URL or --database-url")
        return asyncio.run(_show_status(settings) if status else _migrate_and_tell(settings))
    except MigrationError as error:
        print(f"redisgate: {error}", file=sys.stderr)
    except asyncpg.ClientConfigurationError as error:
        raise ConfigError(f"the URL of the database: {error}") from error
    except Exception as error:
        if not unreachable(error):
            raise
        print(f"redisgate: PostgreSQL cannot be reached: {error or type(error).__name__}", file=sys.stderr)
    return 1


async def _migrate_and_tell(settings: ControlSettings) -> int:
    done = await migrate(settings)
    for migration in done:
        print(f"applied {migration}")
    if not done:
        print("nothing to do: the database is up to date")
    return 0


async def _show_status(settings: ControlSettings) -> int:
    """Status 0: up to date; 1: something is pending."""
    connection = await connect(migration_url(settings), "redisgate migrate")
    try:
        done = await applied(connection)
    finally:
        await close(connection)
    migrations = known()
    todo = pending(migrations, done)
    for migration in migrations:
        entry = done.get(migration.number)
        print(f"{migration}  " + (f"applied {entry.at:%Y-%m-%d %H:%M:%S} UTC" if entry else "pending"))
    for number in sorted(done.keys() - {migration.number for migration in migrations}):
        print(f"{done[number]}  applied {done[number].at:%Y-%m-%d %H:%M:%S} UTC by a newer release")
    return 1 if todo else 0
