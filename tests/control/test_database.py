"""The pool: away is away, back is back, and mistakes are mistakes."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from control.database import Database, DatabaseAway
from control.embedded import EmbeddedPostgres


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One of its own, because it is killed."""
    server = EmbeddedPostgres(tmp_path_factory.mktemp("own"), durable=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def own(server: EmbeddedPostgres) -> AsyncIterator[Database]:
    database = Database(server.url(), pool_size=2)
    yield database
    await database.close()


async def test_a_transaction_is_whole_or_nothing(own: Database) -> None:
    await own.execute("CREATE TABLE IF NOT EXISTS t (x int)")

    async def fails() -> None:
        async with own.transaction() as connection:
            await connection.execute("INSERT INTO t VALUES (1)")
            raise LookupError

    with pytest.raises(LookupError):
        await fails()
    assert await own.fetchval("SELECT count(*) FROM t") == 0
    async with own.transaction() as connection:
        await connection.execute("INSERT INTO t VALUES (1)")
    assert await own.fetchval("SELECT count(*) FROM t") == 1
    await own.execute("DROP TABLE t")


async def test_json_is_values(own: Database) -> None:
    assert await own.fetchval("SELECT $1::jsonb", {"a": [1, None]}) == {"a": [1, None]}


async def test_a_wrong_statement_is_no_absence(own: Database) -> None:
    with pytest.raises(asyncpg.UndefinedTableError):
        await own.fetch("SELECT * FROM nothing_of_the_kind")


async def test_a_full_pool_is_absence_after_a_while(own: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control.database.CONNECT_TIMEOUT", 0.1)
    async with own.connection(), own.connection():
        with pytest.raises(DatabaseAway):
            await own.fetchval("SELECT 1")
    assert await own.fetchval("SELECT 1") == 1


async def test_away_and_back(own: Database, server: EmbeddedPostgres) -> None:
    assert await own.fetchval("SELECT 1") == 1
    async with own.direct() as direct:
        server.kill()
        with pytest.raises(DatabaseAway):
            await own.fetchval("SELECT 1")
        with pytest.raises(DatabaseAway):
            async with own.transaction() as connection:
                await connection.execute("SELECT 1")
        with pytest.raises((DatabaseAway, asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await direct.fetchval("SELECT 1")
    with pytest.raises(DatabaseAway):
        await own.connect_direct()
    server.restart()
    assert await own.fetchval("SELECT 1") == 1


async def test_many_at_once_share_the_pool(own: Database) -> None:
    found = await asyncio.gather(*(own.fetchval("SELECT $1::int", number) for number in range(50)))
    assert found == list(range(50))


async def test_nobody_there(tmp_path: Path) -> None:
    database = Database(f"postgresql://u:p@/d?host={tmp_path}")
    with pytest.raises(DatabaseAway):
        await database.fetchval("SELECT 1")
    await database.close()
    with pytest.raises(DatabaseAway, match="stopping"):
        await database.fetchval("SELECT 1")
