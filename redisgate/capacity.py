"""Capacity of instances: how much memory their servers use, looked at now and then.

A command is refused by what was seen last, so an instance may exceed its
capacity by what is written in between; Redis's own maxmemory is the hard bound.
"""

import asyncio
import logging
from collections.abc import Iterable

from redisgate.access import Instance
from resp.errors import RespError
from resp.info import parse_info

SAMPLE_SECONDS = 2.0
"""How often a worker asks a server with a capacity for its used_memory, while the instance is used."""

log = logging.getLogger(__name__)


class CapacityWatch:
    """Keeps `Instance.over_capacity` of instances that have a capacity."""

    def __init__(self, instances: Iterable[Instance]) -> None:
        self._instances = [instance for instance in instances if instance.config.capacity is not None]
        self._seen: dict[str, float] = {}  # `last_used` at the last sample
        self._unwatched: set[str] = set()  # whose users may not ask; said once
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, if there is anything to watch."""
        if self._instances:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            used = [instance for instance in self._instances if instance.last_used != self._seen.get(instance.id, 0.0)]
            await asyncio.gather(*(self._sample(instance) for instance in used))

    async def _sample(self, instance: Instance) -> None:
        last_used = instance.last_used
        try:
            info = await instance.backend.pool.call(b"INFO", b"memory", counts_as_use=False)
        except RespError:
            return  # whoever sends a command hears of it
        self._seen[instance.id] = last_used
        used = parse_info(info).get("used_memory")
        if used is None:
            if instance.id not in self._unwatched:
                self._unwatched.add(instance.id)
                log.warning("the capacity of %s cannot be watched: its user may not run INFO", instance.id)
            return
        assert instance.config.capacity is not None
        over = int(used) > instance.config.capacity
        if over != instance.over_capacity:
            log.warning("%s is %s its capacity", instance.id, "over" if over else "within")
            instance.over_capacity = over
