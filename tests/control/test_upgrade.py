"""Upgrades: from an older schema, under load, with the release of before and the next one side by side.

The next release is this one with further migrations: they expand first, and contract later.
"""

import asyncio
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from control import migrate as migrations
from control.app import make_app, make_context
from control.database import close, connect
from control.migrate import MigrationError, applied, folder, known, migrate, pending
from redisgate.config import ControlSettings
from tests.control.conftest import Server, Service, Urls, make_settings
from tests.control.service import PASSWORD, Api, register
from tests.http import Client
from tests.servers import RedisServer, wait_for

FIRST_RELEASE = 6
"""Migrations up to this one were there before anybody could upgrade."""
TAKES_AWAY = re.compile(
    r"\bDROP\s+(TABLE|COLUMN|VIEW|FUNCTION|TYPE)\b|\bRENAME\b|\bSET\s+NOT\s+NULL\b|\bALTER\s+COLUMN\s+\w+\s+TYPE\b"
    r"|\bADD\s+COLUMN\b(?![^,;]*\bDEFAULT\b)[^,;]*\bNOT\s+NULL\b",
    re.IGNORECASE,
)
NEXT = {
    # What the next release may do while this one serves: columns, tables, indexes, triggers, wider checks.
    "9001_labels": """
        ALTER TABLE instances ADD COLUMN labels jsonb NOT NULL DEFAULT '{}';
        ALTER TABLE users ADD COLUMN locale text;
        CREATE INDEX instances_labels ON instances USING gin (labels);
    """,
    "9002_teams": """
        CREATE TABLE teams (
            id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
            organization_id uuid NOT NULL REFERENCES organizations,
            name text NOT NULL
        );
        ALTER TABLE api_keys ADD COLUMN team_id uuid REFERENCES teams;
    """,
    "9003_backfill": "UPDATE users SET locale = 'en' WHERE locale IS NULL;",
}
CONTRACT = {"9004_no_more_names": "-- contract: nobody reads it any more\nALTER TABLE users DROP COLUMN first_name;"}


def settings_of(urls: Urls) -> ControlSettings:
    return ControlSettings(database_url=urls.application, database_migration_url=urls.owner)


def takes_away(sql: str) -> bool:
    """Whether it removes or narrows what the release of before may use."""
    return TAKES_AWAY.search(re.sub(r"--[^\n]*", "", sql)) is not None


def with_further(directory: Path, *further: dict[str, str]) -> Path:
    """This release's migrations and others."""
    directory.mkdir(exist_ok=True)
    for path in folder().glob("*.sql"):
        shutil.copy(path, directory)
    for files in further:
        for name, sql in files.items():
            (directory / f"{name}.sql").write_text(sql)
    return directory


@pytest.fixture
def urls(postgres_server: Server, migrated: str) -> Iterator[Urls]:
    """A migrated database for one test."""
    name = postgres_server.create(template=migrated)
    yield postgres_server.urls(name)
    postgres_server.drop(name)


def test_what_takes_away_says_so() -> None:
    """Such a change belongs into a later release than the code that stops using it, with `-- contract` on top."""
    later = known()[FIRST_RELEASE:]
    assert [str(each) for each in later if takes_away(each.sql) and not each.contracts] == []


@pytest.mark.parametrize(
    ("sql", "takes"),
    [
        *[(sql, False) for sql in NEXT.values()],
        *[(sql, True) for sql in CONTRACT.values()],
        ("ALTER TABLE users RENAME COLUMN email TO mail;", True),
        ("ALTER TABLE users ALTER COLUMN locale SET NOT NULL;", True),
        ("ALTER TABLE users ALTER COLUMN id TYPE text;", True),
        ("ALTER TABLE users ADD COLUMN a text, ADD COLUMN b int NOT NULL;", True),
        ("ALTER TABLE users ADD COLUMN a int NOT NULL DEFAULT 0, ADD COLUMN b int;", False),
    ],
)
def test_the_rule_itself(sql: str, takes: bool) -> None:
    assert takes_away(sql) == takes


async def test_an_older_schema_keeps_its_rows(empty_database: Urls, tmp_path: Path) -> None:
    """From each schema that was ever released or merged on, with somebody in it: the person signs in afterwards."""
    older = tmp_path / "older"
    older.mkdir()
    for migration in known()[:1]:
        shutil.copy(folder() / f"{migration}.sql", older)
    settings = settings_of(empty_database)
    await migrate(settings, older)
    context = make_context(make_settings(empty_database, tmp_path), name="tests")
    try:
        connection = await connect(empty_database.application)
        person = await connection.fetchval(
            "INSERT INTO users (email, username, password_hash) VALUES ('ada@example.com', 'ada', $1) RETURNING id",
            await context.passwords.hash(PASSWORD),
        )
        await close(connection)
        assert [str(each) for each in await migrate(settings)] == [str(each) for each in known()[1:]]
        transport = httpx.ASGITransport(make_app(context), client=("203.0.113.9", 40000))
        async with httpx.AsyncClient(transport=transport, base_url="http://redisgate.test") as client:
            answer = await client.post("/auth/login", json={"email": "ada@example.com", "password": PASSWORD})
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"]["user"]["id"] == str(person)
    finally:
        await context.close()


class Load:
    """Commands, and calls of the API that read and write most tables, from threads, on every service."""

    def __init__(self, api: Api, token: str, ports: list[int]) -> None:
        self.failures: list[str] = []
        self.phase = "before"
        self.done = [0, 0]
        self._api, self._token = api, token
        self.ports = ports
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=work) for work in ((0, self._command), (1, self._call))
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        self.more(5)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no more."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def more(self, count: int) -> None:
        """Wait for so many more of each kind."""
        target = [done + count for done in self.done]
        wait_for(lambda: all(map(int.__ge__, self.done, target)) or not self._alive(), 60, "the load")
        assert self._alive(), self.failures

    def _alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def _run(self, kind: int, work: Callable[[int], None]) -> None:
        while not self._stop.is_set():
            for port in list(self.ports):
                try:
                    work(port)
                except Exception as error:
                    self.failures.append(f"{work.__name__} at port {port}, {self.phase}: {error!r}")
            self.done[kind] += 1

    def _command(self, port: int) -> None:
        with Client(port, self._token) as client:
            for number in range(10):
                response = client.command("SET", "upgrade", number)
                assert response.status == 200, response
                if response.headers.get("connection") == "close":
                    break  # the worker that answers drains

    def _call(self, port: int) -> None:
        api = Api(port, self._api.token, self._api.organization_id, self._api.email)
        key, key_id = api.key(scopes=["read", "write"])
        with Client(port, key) as client:
            response = client.get("/get/upgrade")
            assert response.status == 200, response
        api.call("GET", "redis-instances")
        api.call("GET", "members")
        api.call("DELETE", f"api-keys/{key_id}")


@pytest.mark.timeout(180)
def test_the_database_is_migrated_under_load_while_both_releases_serve(
    urls: Urls, redis_server: RedisServer, tmp_path: Path
) -> None:
    before = Service(urls, tmp_path / "before", "--workers", "2", REDISGATE_ALLOWED_NETWORKS="127.0.0.0/8")
    try:
        api = register(before.port)
        token = api.instance("i", redis_server.url)["rest_token"]
        with Load(api, token, [before.port]) as load:
            folder = with_further(tmp_path / "next", NEXT)
            done = asyncio.run(migrate(settings_of(urls), folder))
            assert [str(each) for each in done] == list(NEXT)
            load.more(5)
            load.phase = "while workers are replaced"
            # Workers of this release that start anew find the newer database good enough, and so does a whole service.
            before.process.send_signal(signal.SIGHUP)
            wait_for(lambda: " reloaded" in before.log(), 30, "the reload")
            after = Service(urls, tmp_path / "after", "--workers", "1", REDISGATE_ALLOWED_NETWORKS="127.0.0.0/8")
            try:
                load.phase = "with both"
                load.ports.append(after.port)
                load.more(5)
                load.ports.remove(before.port)
                load.more(2)
                load.phase = "while the old one ends"
                # Taken out of rotation, the old one drains and ends; nobody notices.
                before.process.terminate()
                assert before.process.wait(60) == 0  # drain_timeout, and what else has to end
                load.more(5)
            finally:
                load.stop()
                after.stop()
        assert load.failures == []
        assert "Traceback" not in before.log()
    finally:
        before.kill()


def test_a_release_that_cannot_work_with_what_is_left_does_not_start(urls: Urls, tmp_path: Path) -> None:
    settings = settings_of(urls)
    asyncio.run(migrate(settings, with_further(tmp_path / "next", NEXT, CONTRACT)))
    with pytest.raises(AssertionError, match=r"9004_no_more_names, which this release does not know.*upgrade"):
        Service(urls, tmp_path / "state")


async def test_this_release_goes_on_with_a_database_that_was_only_expanded(urls: Urls, tmp_path: Path) -> None:
    await migrate(settings_of(urls), with_further(tmp_path / "next", NEXT))
    assert await migrate(settings_of(urls)) == []
    connection = await connect(urls.owner)
    try:
        done = await applied(connection)
        assert pending(known(), done) == []
        # What was applied before this was recorded counts as one that takes away: nobody knows.
        await connection.execute("ALTER TABLE schema_migrations DROP COLUMN contracts")
        with pytest.raises(MigrationError, match="9001_labels"):
            pending(known(), await applied(connection))
    finally:
        await close(connection)


async def test_a_table_in_use_is_waited_for_without_holding_up_others(
    urls: Urls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "TABLE_LOCK_SECONDS", 0.2)
    monkeypatch.setattr(migrations, "TABLE_LOCK_PAUSE_SECONDS", 0.2)
    directory = with_further(tmp_path / "next", {"9001_labels": NEXT["9001_labels"]})
    busy, other = await connect(urls.application), await connect(urls.application)
    try:
        transaction = busy.transaction()
        await transaction.start()
        await busy.execute("SELECT count(*) FROM instances")  # its lock lasts as long as the transaction
        migrating = asyncio.create_task(migrate(settings_of(urls), directory))
        async with asyncio.timeout(20):
            for _ in range(2):
                while not await other.fetchval(  # noqa: ASYNC110  there is nothing to be told by
                    "SELECT count(*) FROM pg_locks WHERE relation = 'instances'::regclass AND NOT granted"
                ):
                    await asyncio.sleep(0.005)
                # Behind the migration's lock request this would wait for as long as the transaction lasts.
                await other.fetchval("SELECT count(*) FROM instances")
                assert not migrating.done()
        await transaction.rollback()
        assert [str(each) for each in await migrating] == ["9001_labels"]
    finally:
        await close(busy)
        await close(other)


async def test_a_table_that_stays_in_use_is_said(urls: Urls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TABLE_LOCK_SECONDS", 0.05), ("TABLE_LOCK_PAUSE_SECONDS", 0.01), ("TABLE_LOCK_ATTEMPTS", 3)):
        monkeypatch.setattr(migrations, name, value)
    directory = with_further(tmp_path / "next", {"9001_labels": NEXT["9001_labels"]})
    busy = await connect(urls.application)
    try:
        async with busy.transaction():
            await busy.execute("SELECT count(*) FROM instances")
            with pytest.raises(MigrationError, match=r"9001_labels waits in vain for a table.*end that transaction"):
                await migrate(settings_of(urls), directory)
    finally:
        await close(busy)
