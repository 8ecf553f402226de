"""Keys to work on: each at most once at a time and once in the queue, again after a failure, with growing pauses.

What is queued is a name, never a state: the work reads the newest state when it starts. A key that is added while its
work runs is worked on once more afterwards, so no change is lost and none is worked on twice at the same time.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, Generic, TypeVar

from control.kubernetes.client import KubernetesError

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

# keys worked on at the same time: the API server answers a handful of calls per key
WORKERS: Final = 8
# the pause after a failure, doubled from the first to the second; capped low, because a repaired cluster should be
# met within seconds, and a key that fails costs a call or two
BACKOFF_SECONDS: Final = 0.05
BACKOFF_SECONDS_MOST: Final = 3.0


class WorkQueue(Generic[K]):
    """`run()` it in a task and `add()` keys. `work(key)` answers None, or the seconds after which to come again. It is
    bounded by what it is fed with: a key waits once, so there are never more than there are objects."""

    def __init__(self, work: Callable[[K], Awaitable[float | None]], *, workers: int = WORKERS) -> None:
        self._work = work
        self._workers = workers
        # an ordered set: the oldest key first
        self._ready: dict[K, None] = {}
        self._running: set[K] = set()
        self._again: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._signal = asyncio.Event()

    def __len__(self) -> int:
        """Keys that wait for a worker or have one; not those that wait for a time."""
        return len(self._ready) + len(self._running)

    def failures(self, key: K) -> int:
        """How often the work on `key` has failed since it last went well."""
        return self._failures.get(key, 0)

    def add(self, key: K, after: float = 0.0) -> None:
        """Work on `key` in `after` seconds; an earlier time that is already set stays."""
        timer = self._timers.get(key)
        if after > 0:
            when = asyncio.get_running_loop().time() + after
            if key in self._ready or (timer is not None and timer.when() <= when):
                return
            if timer is not None:
                timer.cancel()
            self._timers[key] = asyncio.get_running_loop().call_at(when, self._due, key)
            return
        if timer is not None:
            timer.cancel()
            del self._timers[key]
        if key in self._running:
            self._again.add(key)
        elif key not in self._ready:
            self._ready[key] = None
            self._signal.set()

    def _due(self, key: K) -> None:
        del self._timers[key]
        self.add(key)

    async def run(self) -> None:
        """Work until cancelled. Work that has begun is cancelled with it."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            while not self._ready:
                self._signal.clear()
                await self._signal.wait()
            key = next(iter(self._ready))
            del self._ready[key]
            self._running.add(key)
            try:
                after = await self._work(key)
            except Exception as error:
                self._failed(key, error)
            else:
                self._failures.pop(key, None)
                if key in self._again:
                    self._again.discard(key)
                    self._running.discard(key)
                    self.add(key)
                elif after is not None:
                    self.add(key, max(after, BACKOFF_SECONDS))
            finally:
                self._running.discard(key)

    def _failed(self, key: K, error: Exception) -> None:
        """Come again later; a change that came meanwhile is met then too. Only the first failure in a row is told, and
        the one with which the pauses stop growing."""
        count = self._failures[key] = self._failures.get(key, 0) + 1
        self._again.discard(key)
        pause = min(BACKOFF_SECONDS * 2 ** min(count - 1, 16), BACKOFF_SECONDS_MOST)
        if not isinstance(error, KubernetesError):
            log.error("the work on %s failed, which is a bug of ours", key, exc_info=error)
        elif count == 1 or count == 8:
            log.warning("%s: %s; again in %.2g s, failure %d in a row", key, error, pause, count)
        self._running.discard(key)
        self.add(key, pause * random.uniform(0.75, 1.0))
