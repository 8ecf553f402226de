"""The control plane in one worker: the HTTP API, and the access table kept right.

`redisgate.worker` makes it where a database is configured; the data plane
works without it, and goes on working while PostgreSQL is away.
"""

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING

from control.app import make_app, make_context
from control.daily import DailyLeases
from control.database import Database
from control.feed import AccessFeed
from control.hosts import host_id
from control.http import Unavailable, failure
from control.migrate import MigrationError, migrate, unreachable
from control.usage import UsageCollector
from control.workers import WorkerReport
from redisgate import board, tracing
from redisgate.access import AccessTable
from redisgate.asgi import AsgiServer
from redisgate.config import Settings
from redisgate.metrics import Document, Publisher
from redisgate.shared import SharedState

if TYPE_CHECKING:
    from control.kubernetes.routes import RouteFollower

__all__ = ["MigrationError", "Plane", "migrate_at_start", "run_steward"]

FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 2.0
"""Between two tries to reach a PostgreSQL that is away: doubles from the first to the second."""

ACCESS_POOL_SIZE = 4
"""Database connections of one worker for what the data plane has to know, beside `database_pool_size`."""

log = logging.getLogger(__name__)


class Plane:
    """Of one worker and its event loop."""

    def __init__(self, settings: Settings, access: AccessTable, shared: SharedState, index: int) -> None:
        self.context = make_context(settings, name=f"redisgate worker {index}")
        self.context.extra["access"] = access
        # Of its own, so that the credentials of one tenant do not wait behind the API requests of another.
        control = settings.control
        self._access_database = Database(
            control.database_url,
            control.database_direct_url,
            pool_size=ACCESS_POOL_SIZE,
            name=f"redisgate access {index}",
        )
        access_context = dataclasses.replace(self.context, database=self._access_database)
        self.leases = DailyLeases(self._access_database, host_id(settings.state_dir))
        self.usage = UsageCollector(self.context.database, access)
        self.feed = AccessFeed(access_context, access, shared, index, usage=self.usage, leases=self.leases)
        self.context.extra["usage"] = self.usage
        self.report = WorkerReport(self.context, access, host_id(settings.state_dir), index)
        self.context.extra["feed"] = self.feed
        busy = failure(Unavailable("too many requests are under way; try again", 1))
        self.http = AsgiServer(make_app(self.context), bytes(busy.body))

    def follow(self, follower: "RouteFollower") -> None:
        """Reach instances in the cluster by the routes that the operator publishes."""
        self.feed.routes = follower.routes
        follower.on_change = self.feed.forget_instance
        self.context.extra |= {"kubernetes": follower, "kubernetes.routes": follower.routes}

    async def start(self) -> None:
        """Begin to follow what changes; does not wait for PostgreSQL."""
        self.leases.start()
        self.usage.start()
        self.feed.start()
        self.report.start()

    def collect(self, document: Document) -> None:
        """For `redisgate.metrics`: how right the access table is."""
        document.gauge("redisgate_access_table_age_seconds", self.feed.age)
        document.gauge("redisgate_access_listening", self.feed.listening)

    async def stop(self, seconds: float) -> None:
        """End what is under way, within `seconds`."""
        await self.http.finish(seconds)
        await self.feed.stop()
        await self.usage.stop()
        await self.leases.stop()
        await self.report.stop()
        await self._access_database.close()
        await self.context.close()


def migrate_at_start(settings: Settings) -> None:
    """Bring the database up to date before the workers start; nothing while it is away. Raises MigrationError."""
    if not settings.control.migrate_on_start:
        return
    with asyncio.Runner() as runner:
        try:
            runner.run(migrate(settings.control))
        except Exception as error:
            if not unreachable(error):
                raise
            log.warning("starting without PostgreSQL, which cannot be reached: %s", error or type(error).__name__)


async def run_steward(settings: Settings, stop: asyncio.Event) -> None:
    """Look after this host until `stop`: see `control.steward`. First the database must be there, and up to date."""
    from control import steward
    from control.provisioning import PROVISIONING

    context = make_context(settings, name="redisgate steward")
    shown = board.current()
    publisher = Publisher(shown, "steward", [PROVISIONING.collect]) if shown is not None else None
    if publisher is not None:
        publisher.start()
    try:
        async with tracing.process(settings, "steward"):
            if await _migrated(settings, stop):
                await steward.run(context, stop)
    finally:
        await context.close()
        if publisher is not None:
            publisher.stop()


async def _migrated(settings: Settings, stop: asyncio.Event) -> bool:
    """Wait for the database and migrate it; False when told to stop before."""
    pause = FIRST_RETRY_SECONDS
    while settings.control.migrate_on_start and not stop.is_set():
        try:
            await migrate(settings.control)
            return True
        except MigrationError as error:
            log.error("%s", error)
        except Exception as error:
            if not unreachable(error):
                raise
        try:
            await asyncio.wait_for(stop.wait(), pause)
        except TimeoutError:
            pause = min(2 * pause, MAX_RETRY_SECONDS)
    return not stop.is_set()
