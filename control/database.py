"""PostgreSQL: a pool for work, direct connections for LISTEN and locks.

When PostgreSQL is away, everything here raises `DatabaseAway`, which HTTP
answers with 503 and Retry-After; the pool connects again by itself. What is
wrong with a statement stays asyncpg's exception: it is a bug of ours.

A pooler may stand between us and PostgreSQL: no statement stays prepared on a
connection, and whatever belongs to a session goes over `direct`.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from redisgate import tracing

CONNECT_TIMEOUT = 3.0
"""Seconds to connect, and to wait for a free connection of the pool."""
COMMAND_TIMEOUT = 15.0
"""Seconds for one statement."""
IDLE_SECONDS = 60.0
"""Before an unused connection of the pool is closed."""

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
else:
    Connection = asyncpg.Connection | PoolConnectionProxy  # generic for type checkers only
Record: TypeAlias = asyncpg.Record

log = logging.getLogger(__name__)


class DatabaseAway(Exception):
    """PostgreSQL cannot be reached, or did not answer in time; nothing can be said about what was asked."""


# What tells that PostgreSQL is away, as opposed to that it refuses a statement.
_AWAY: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.QueryCanceledError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby that was promoted elsewhere
)
_GONE = ("connection is closed", "connection was closed", "underlying connection is closed", "pool is closing")


def is_away(error: BaseException) -> bool:
    """Whether an exception of asyncpg says that PostgreSQL is away."""
    if isinstance(error, _AWAY):
        return True
    return isinstance(error, asyncpg.InterfaceError) and any(text in str(error) for text in _GONE)


@contextlib.contextmanager
def _away_as_such() -> Any:
    try:
        yield
    except DatabaseAway:
        raise
    except Exception as error:
        if is_away(error):
            raise DatabaseAway(f"PostgreSQL is not available: {error or type(error).__name__}") from error
        raise


async def prepare_connection(connection: "asyncpg.Connection[Any]") -> None:
    """What every connection of ours understands: json and jsonb are Python values."""
    if tracing.enabled():
        connection.add_query_logger(tracing.on_query)
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")


class Database:
    """The database of one process and one event loop."""

    def __init__(self, url: str, direct_url: str = "", *, pool_size: int = 8, name: str = "redisgate") -> None:
        """URLs as `postgresql://…`; `name` is what PostgreSQL's own views call the process."""
        self._url = url
        self._direct_url = direct_url or url
        self._pool_size = pool_size
        self._name = name
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def _open(self) -> "asyncpg.Pool[asyncpg.Record]":
        """The pool; made on first use, so that a process starts while PostgreSQL is away."""
        if self._pool is not None:
            return self._pool
        async with self._opening:
            if self._closed:
                raise DatabaseAway("PostgreSQL is not available: this process is stopping")
            if self._pool is None:
                self._pool = await asyncpg.create_pool(
                    self._url,
                    min_size=0,
                    max_size=self._pool_size,
                    timeout=CONNECT_TIMEOUT,
                    command_timeout=COMMAND_TIMEOUT,
                    max_inactive_connection_lifetime=IDLE_SECONDS,
                    statement_cache_size=0,
                    init=prepare_connection,
                    server_settings={"application_name": self._name, "timezone": "UTC"},
                )
            return self._pool

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection of the pool, outside a transaction. Raises DatabaseAway."""
        with _away_as_such():
            pool = await self._open()
            async with pool.acquire(timeout=CONNECT_TIMEOUT) as connection:
                yield connection

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection in a transaction, which is committed unless the block raises. Raises DatabaseAway."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    async def fetch(self, query: str, *args: object) -> list[Record]:
        """All rows. Raises DatabaseAway."""
        async with self.connection() as connection:
            return await connection.fetch(query, *args)

    async def fetchrow(self, query: str, *args: object) -> Record | None:
        """The first row. Raises DatabaseAway."""
        async with self.connection() as connection:
            return await connection.fetchrow(query, *args)

    async def fetchval(self, query: str, *args: object) -> Any:
        """The first column of the first row. Raises DatabaseAway."""
        async with self.connection() as connection:
            return await connection.fetchval(query, *args)

    async def execute(self, query: str, *args: object) -> str:
        """The status line of a statement. Raises DatabaseAway."""
        async with self.connection() as connection:
            return await connection.execute(query, *args)

    async def connect_direct(self) -> "asyncpg.Connection[asyncpg.Record]":
        """A connection past any pooler, which the caller closes: for LISTEN and advisory locks. Raises DatabaseAway."""
        with _away_as_such():
            return await connect(self._direct_url, self._name)

    @contextlib.asynccontextmanager
    async def direct(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """A connection past any pooler, closed at the end. Raises DatabaseAway."""
        connection = await self.connect_direct()
        try:
            with _away_as_such():
                yield connection
        finally:
            await close(connection)

    async def close(self) -> None:
        """Close every connection; what is under way has a second to finish."""
        self._closed = True
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            await asyncio.wait_for(pool.close(), 1.0)
        except Exception:
            pool.terminate()


async def connect(url: str, name: str = "redisgate") -> "asyncpg.Connection[asyncpg.Record]":
    """One connection of its own. Raises what asyncpg raises."""
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
        url,
        timeout=CONNECT_TIMEOUT,
        command_timeout=COMMAND_TIMEOUT,
        statement_cache_size=0,
        server_settings={"application_name": name, "timezone": "UTC"},
    )
    try:
        await prepare_connection(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def close(connection: "asyncpg.Connection[Any]") -> None:
    """Close a connection of one's own, whatever state it is in."""
    try:
        await connection.close(timeout=1.0)
    except Exception:
        connection.terminate()
