"""The steward: one process per host that owns its local redis-servers and brings about what is wanted.

It hears of changes by NOTIFY and acts at once; a sweep every few seconds finds what was missed, and what has died.
The steward that holds the deployment's advisory lock also looks after external instances and does the work of
`control.duties`. Its end changes nothing for the instances: the next one adopts them.

With PostgreSQL away nothing new begins. A redis-server that dies meanwhile is started again as it was last wanted.
"""

import asyncio
import contextlib
import fcntl
import functools
import importlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import datetime
from pathlib import Path
from typing import Final
from uuid import UUID

from control import hosts
from control.audit import Actor
from control.database import Database, DatabaseAway
from control.duties import DUTIES, Duty
from control.http import Context
from control.instances import external_provisioner, spec_of
from control.provisioners import OnStep, Provisioner, ProvisionError
from control.provisioners.local import LocalProvisioner, find_servers
from control.provisioning import PROVISIONING
from control.reconciler import Reconciler, Step, next_step
from control.settings import instances_dir
from redisgate.config import ConfigError, Settings

LOCK_FILE: Final = "steward.lock"
CHANNEL: Final = "redisgate_instances"
HEARTBEAT_SECONDS: Final = 10.0
SWEEP_SECONDS: Final = 5.0
"""Between two looks at every instance of this host."""
EXTERNAL_SWEEP_SECONDS: Final = 30.0
"""Between two looks at every external instance."""
LEADER_SECONDS: Final = 2.0
"""Between two attempts to get the deployment's lock, and between two looks whether we still have it."""
RETRY_SECONDS: Final = 1.0
"""After PostgreSQL was away."""
MAX_AT_ONCE: Final = 32
"""Instances that are worked on side by side; most of that is waiting, for a server that loads its data for example."""
LEADER_LOCK: Final = 0x52474C44
"""The advisory lock of the steward that works for the whole deployment."""
MODULES_WITH_DUTIES: Final = (
    "control.accounts",
    "control.audit",
    "control.usage",
    "control.instances",
    "control.provisioning",
    "control.workers",
)

log = logging.getLogger(__name__)


def check(settings: Settings) -> None:
    """Refuse what the steward could not do, before anything is started.

    Raises:
        ConfigError: there is no such provisioner, or nothing to run instances with.
    """
    provisioner = settings.control.provisioner
    if provisioner not in ("local", "external", "kubernetes"):
        raise ConfigError(f"provisioner: there is none called {provisioner!r}; use local, external or kubernetes")
    if provisioner == "kubernetes" and not settings.cluster.enabled:
        raise ConfigError(
            "provisioner: kubernetes needs a cluster that the gateway follows: set REDISGATE_KUBERNETES=on"
        )
    if provisioner == "local" and not find_servers(settings.control.redis_server):
        raise ConfigError(
            "provisioner: local instances need a redis-server, and there is none on PATH: install one (Debian, Ubuntu:"
            " apt-get install redis-server), name one by redis_server, or set provisioner to external"
        )


class _Queue:
    """Instances to look at: each once at a time, and once more if it is asked for meanwhile."""

    def __init__(self, work: Callable[[UUID], Coroutine[None, None, None]]) -> None:
        self._work = work
        self._waiting: dict[UUID, None] = {}
        self._running: dict[UUID, asyncio.Task[None]] = {}
        self._timers: dict[UUID, tuple[float, asyncio.TimerHandle]] = {}
        self._closed = False

    def add(self, instance_id: UUID) -> None:
        """Look at it, now or as soon as there is room."""
        if not self._closed:
            self._waiting[instance_id] = None
            self._fill()

    def add_later(self, instance_id: UUID, seconds: float) -> None:
        """Look at it then, or earlier if that was asked for."""
        due = time.monotonic() + seconds
        timer = self._timers.get(instance_id)
        if timer is not None:
            if timer[0] <= due:
                return
            timer[1].cancel()
        handle = asyncio.get_running_loop().call_later(seconds, self._due, instance_id)
        self._timers[instance_id] = (due, handle)

    def _due(self, instance_id: UUID) -> None:
        self._timers.pop(instance_id, None)
        self.add(instance_id)

    def _fill(self) -> None:
        for instance_id in list(self._waiting):
            if len(self._running) >= MAX_AT_ONCE:
                return
            if instance_id not in self._running:
                del self._waiting[instance_id]
                task = self._running[instance_id] = asyncio.create_task(self._work(instance_id))
                task.add_done_callback(functools.partial(self._done, instance_id))

    def _done(self, instance_id: UUID, task: asyncio.Task[None]) -> None:
        del self._running[instance_id]
        self._fill()

    async def close(self) -> None:
        """Begin nothing any more, and wait for what is under way."""
        self._closed = True
        self._waiting.clear()
        for _, handle in self._timers.values():
            handle.cancel()
        self._timers.clear()
        if self._running:
            await asyncio.wait(list(self._running.values()))


class Steward:
    """What one host does beside serving."""

    def __init__(self, context: Context, *, on_step: OnStep = lambda step: None) -> None:
        """Raises ConfigError if something that is needed is missing."""
        settings = context.gateway_settings
        self.host_id = hosts.host_id(settings.state_dir)
        self._context = context
        self._on_step = on_step
        self._database: Database = context.database
        control = settings.control
        self._local = LocalProvisioner(
            instances_dir(settings),
            find_servers(control.redis_server),
            any_version=control.mode == "dev",
            on_step=on_step,
            on_death=self._on_death,
        )
        # External instances are looked after by one host at a time: see `_lead`.
        self._provisioners: dict[str, Provisioner] = {"local": self._local}
        self._reconciler = Reconciler(
            context.database,
            context.encryption,
            self._provisioners,
            self.host_id,
            Actor(context.audit, "system", name="steward"),
            clock=context.now,
            on_step=on_step,
        )
        self._queue = _Queue(self._look_at)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`, and finish what is under way."""
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._forever("the heartbeat", self._heartbeat),
                self._forever("the listener", self._listen),
                self._forever("the sweep", self._sweep),
                self._forever("the leader's work", self._lead),
            )
        ]
        try:
            await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._queue.close()
            self._local.close()

    async def _forever(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        away = False
        while True:
            try:
                await work()
                away = False
            except DatabaseAway as error:
                if not away:
                    log.warning("%s waits: %s", name, error)
                away = True
            except Exception:
                log.exception("%s failed; it begins again", name)
            await asyncio.sleep(RETRY_SECONDS)

    # This host

    async def _heartbeat(self) -> None:
        while True:
            await self._register()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _register(self) -> None:
        """Say that this host is there."""
        await hosts.register(self._database, self.host_id, socket.gethostname(), self._local.versions())

    async def _listen(self) -> None:
        """Act at once on what is written down."""
        lost = asyncio.Event()
        async with self._database.direct() as connection:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(CHANNEL, lambda _c, _p, _ch, payload: self._on_notify(str(payload)))
            await self._register()
            await self._look_at_all()  # what was written before we listened
            while not lost.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(lost.wait(), HEARTBEAT_SECONDS)
                if not lost.is_set():
                    await connection.execute("SELECT 1")  # a connection that is cut without a word shows when used
        raise DatabaseAway("PostgreSQL is not available: the listening connection was lost")

    def _on_notify(self, payload: str) -> None:
        with contextlib.suppress(ValueError):
            self._queue.add(UUID(payload))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self._look_at_all()

    async def _look_at_all(self) -> None:
        """Find those of this host's instances, and of those that no host has, that need something."""
        rows = await self._database.fetch(
            "SELECT * FROM instances WHERE provisioner = 'local' AND (host_id = $1 OR host_id IS NULL)", self.host_id
        )
        for row in rows:
            found = next_step(row, self._now())
            if found.step is Step.CHECK and not row["attempts"]:
                if await self._local.alive(spec_of(row, None)) is None:
                    continue
            elif found.step is Step.NOTHING:
                continue
            self._queue.add(row["id"])

    async def _look_at(self, instance_id: UUID) -> None:
        """One instance's turn; never raises."""
        try:
            again = await self._reconciler.reconcile(instance_id)
        except DatabaseAway:
            await self._keep_alive(instance_id)
            self._queue.add_later(instance_id, RETRY_SECONDS)
        except Exception:
            log.exception("instance %s: the steward failed", instance_id)
            self._queue.add_later(instance_id, SWEEP_SECONDS)
        else:
            if again is not None:
                self._queue.add_later(instance_id, max(0.0, min((again - self._now()).total_seconds(), SWEEP_SECONDS)))

    async def _keep_alive(self, instance_id: UUID) -> None:
        """Without a database, start again what has died."""
        try:
            await self._local.start_again(instance_id)
        except ProvisionError as error:
            log.warning("instance %s: %s", instance_id, error)

    def _on_death(self, instance_id: UUID) -> None:
        self._queue.add(instance_id)

    def _now(self) -> datetime:
        return self._context.now()

    # The whole deployment

    async def _lead(self) -> None:
        """While we hold the lock: external instances, and the duties."""
        async with self._database.direct() as connection:
            while True:
                if await connection.fetchval("SELECT pg_try_advisory_lock($1)", LEADER_LOCK):
                    break
                await asyncio.sleep(LEADER_SECONDS)
            log.info("this host works for the whole deployment")
            PROVISIONING.leads = True
            self._provisioners["external"] = external_provisioner(self._context)
            tasks = [asyncio.create_task(self._forever("the sweep of external instances", self._sweep_external))]
            tasks.append(asyncio.create_task(self._forever("the watch over hosts", self._watch_hosts)))
            tasks += [asyncio.create_task(self._do(duty)) for duty in load_duties()]
            if self._context.gateway_settings.cluster.enabled:
                tasks.append(asyncio.create_task(self._forever("the watch over the cluster", self._follow_cluster)))
            try:
                while True:
                    await connection.execute("SELECT 1")
                    await asyncio.sleep(LEADER_SECONDS)
            finally:
                PROVISIONING.leads = False
                del self._provisioners["external"]
                self._provisioners.pop("kubernetes", None)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _sweep_external(self) -> None:
        while True:
            for row in await self._database.fetch("SELECT id FROM instances WHERE provisioner = 'external'"):
                self._queue.add(row["id"])
            await asyncio.sleep(EXTERNAL_SWEEP_SECONDS)

    async def _follow_cluster(self) -> None:
        # Not imported where there is no cluster.
        from control.kubernetes.fleet import Fleet

        fleet = Fleet(self._context, self._queue.add, on_step=self._on_step)
        await fleet.run(lambda provisioner: self._provisioners.update(kubernetes=provisioner))

    async def _watch_hosts(self) -> None:
        """Say so when a host is away. Not at once: after PostgreSQL was away, every host has yet to be heard of."""
        while True:
            await asyncio.sleep(hosts.AWAY_SECONDS)
            for instance_id in await hosts.note_those_away(self._database):
                log.warning("instance %s: its host is away", instance_id)

    async def _do(self, duty: Duty) -> None:
        while True:
            try:
                await duty.work(self._context)
            except DatabaseAway as error:
                log.warning("%s waits: %s", duty.name, error)
            except Exception:
                log.exception("%s failed; it is tried again in %g s", duty.name, duty.every)
            await asyncio.sleep(duty.every)


def load_duties() -> list[Duty]:
    """All that the modules with duties have registered."""
    for name in MODULES_WITH_DUTIES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    return list(DUTIES.values())


@contextlib.asynccontextmanager
async def only_one(state_dir: Path) -> AsyncIterator[None]:
    """Hold the state directory's lock; waits for the steward before us to end."""
    descriptor = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


async def run(context: Context, stop: asyncio.Event, *, on_step: OnStep = lambda step: None) -> None:
    """Be this host's steward until `stop`; `on_step` hears of everything that was done to the world or recorded.

    The database must be up to date. Raises ConfigError if something that is needed is missing.
    """
    check(context.gateway_settings)
    steward = Steward(context, on_step=on_step)
    async with only_one(context.gateway_settings.state_dir):
        await steward.run(stop)
