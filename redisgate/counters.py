"""What one worker counts: plain integers, added to on the straight line and read by `redisgate.metrics`.

A request costs two looks at the clock and a handful of additions here: counters of a metrics library cost one to two
microseconds each, which is a fifth of what a whole request costs.

A *series* is requests of one kind: of one family of commands, or of one class of routes that are no commands.
"""

import time
from typing import Final

from redisgate.metering import BUCKETS
from resp.commands import Command

COMMAND: Final = 0
PIPELINE: Final = 1
TRANSACTION: Final = 2
STREAM: Final = 3
CONTROL: Final = 4
OTHER: Final = 5
"""Health, version, the page for people, and what is refused before it is known what it is."""
ROUTES: Final = ("command", "pipeline", "transaction", "stream", "control", "other")
"""The classes of routes, by the numbers above."""
METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))
"""Methods that are counted by name; any other is "other"."""
MAX_COUNTED_INSTANCES: Final = 1000
"""Instances that one worker counts by name; what comes later is counted together."""
EVERY_OTHER: Final = "other"
"""What instances beyond the bound are called together."""
OCTAVES: Final = BUCKETS // 4
"""Buckets of an instance's histogram: each is four of `redisgate.metering`."""

# The first of these categories that a command has is its family.
_CATEGORIES: Final = (
    "scripting",
    "string",
    "hash",
    "list",
    "set",
    "sortedset",
    "stream",
    "geo",
    "hyperloglog",
    "bitmap",
    "pubsub",
    "transaction",
    "keyspace",
    "connection",
    "admin",
)
_NARROWER: Final = ("geo", "hyperloglog", "bitmap")  # which stand beside sortedset or string


def family_of(command: Command | None) -> str:
    """The family of a command; of those that no table knows: unknown."""
    if command is None:
        return "unknown"
    if b"." in command.name:
        return "module"
    for family in (*_NARROWER, *_CATEGORIES):
        if family in command.categories:
            return family
    return "server"


class Series:
    """Requests of one kind; latency in nanoseconds."""

    __slots__ = ("buckets", "commands", "errors", "exemplars", "nanos")

    def __init__(self) -> None:
        self.commands = 0  # those of pipelines and transactions too
        self.errors = 0  # requests answered with status 400 or above, and refused commands of a pipeline
        self.nanos = 0  # of all requests together
        self.buckets = [0] * BUCKETS  # requests by latency
        self.exemplars: dict[int, tuple[str, float, float]] = {}
        """By octave, the last request that had a trace: its id, seconds, unix time."""


class InstanceCounters:
    """What one instance was asked and answered; sizes in bytes, latency in nanoseconds."""

    __slots__ = ("buckets", "bytes_in", "bytes_out", "errors", "id", "name", "nanos", "requests")

    def __init__(self, instance_id: str, name: str) -> None:
        self.id = instance_id
        self.name = name
        self.requests = 0
        self.errors = 0  # answers with status 400 or above
        self.bytes_in = 0  # commands as they went to Redis
        self.bytes_out = 0  # bodies of answers
        self.nanos = 0
        self.buckets = [0] * OCTAVES


class Counters:
    """Everything that one worker counts."""

    __slots__ = (
        "_instances",
        "_retired",
        "bytes_in",
        "bytes_out",
        "connections",
        "control",
        "database_errors",
        "families",
        "hits",
        "loads",
        "ok_get",
        "ok_post",
        "others",
        "refusals",
        "refused_connections",
        "routes",
    )

    def __init__(self) -> None:
        self.bytes_in = 0  # from clients
        self.bytes_out = 0  # to clients
        self.connections = 0  # accepted
        self.refused_connections = 0
        self.database_errors = 0  # requests that found the database away
        self.hits = 0  # requests whose credential was known
        self.loads = 0  # credentials that the access table had to ask for
        # Requests by route, method, status: the two that are most of them have lists of their own.
        self.ok_get = [0] * len(ROUTES)
        self.ok_post = [0] * len(ROUTES)
        self.others: dict[tuple[int, bytes, int], int] = {}
        self.routes = [Series() for _ in ROUTES]
        self.families: dict[str, Series] = {}
        self.refusals: dict[str, int] = {}
        """Requests that a limit refused, by which."""
        self.control: dict[tuple[str, str, int], list[int]] = {}
        """Requests to the control plane by path template, method, status: how many, nanoseconds."""
        self._instances: dict[str, InstanceCounters] = {}
        self._retired: dict[str, None] = {}  # those of them that there are no more, as far as this worker knows

    def family(self, command: Command | None) -> Series:
        """The series of a command's family."""
        name = family_of(command)
        series = self.families.get(name)
        if series is None:
            series = self.families[name] = Series()
        return series

    def instance(self, instance_id: str, name: str) -> InstanceCounters:
        """The counters of an instance; an instance that comes back has those it had."""
        counters = self._instances.get(instance_id)
        self._retired.pop(instance_id, None)
        if counters is None:
            full = len(self._instances) - (EVERY_OTHER in self._instances) >= MAX_COUNTED_INSTANCES
            if full and self._retired:
                gone = next(iter(self._retired))
                del self._retired[gone], self._instances[gone]
            elif full:
                instance_id = name = EVERY_OTHER
                counters = self._instances.get(instance_id)
            if counters is None:
                counters = self._instances[instance_id] = InstanceCounters(instance_id, name)
        counters.name = name
        return counters

    def retire(self, instance_id: str) -> None:
        """An instance is gone: what it had is kept until another one needs the room."""
        if instance_id in self._instances:
            self._retired[instance_id] = None

    def instances(self) -> list[tuple[str, InstanceCounters]]:
        """All instances that were used, with their ids."""
        return [(key, counters) for key, counters in self._instances.items() if counters.requests]

    def refused(self, kind: str) -> None:
        """A limit has refused a request."""
        self.refusals[kind] = self.refusals.get(kind, 0) + 1

    def control_answered(self, path: str, method: str, status: int, nanos: int) -> None:
        """The control plane has answered a request."""
        entry = self.control.get((path, method, status))
        if entry is None:
            entry = self.control[path, method, status] = [0, 0]
        entry[0] += 1
        entry[1] += nanos

    def answered(
        self,
        route: int,
        method: bytes,
        status: int,
        nanos: int,
        size: int,
        series: Series | None,
        instance: InstanceCounters | None,
        trace: bytes,
    ) -> None:
        """A request was answered with `size` bytes; `trace` is the id of its trace, or nothing."""
        if status == 200 and method == b"GET":
            self.ok_get[route] += 1
        elif status == 200 and method == b"POST":
            self.ok_post[route] += 1
        else:
            key = (route, method if method in METHODS else b"other", status)
            self.others[key] = self.others.get(key, 0) + 1
        if series is None:
            series = self.routes[route]
        # redisgate.metering.bucket_of, without the call
        n = nanos >> 14
        if n >= 4:
            octave = n.bit_length() - 3
            n = (octave << 2) + (n >> octave)
            if n >= BUCKETS:
                n = BUCKETS - 1
        series.buckets[n] += 1
        series.nanos += nanos
        if status >= 400:
            series.errors += 1
        if instance is not None:
            instance.requests += 1
            instance.bytes_out += size
            instance.nanos += nanos
            instance.buckets[n >> 2] += 1
            if status >= 400:
                instance.errors += 1
        if trace:
            series.exemplars[n >> 2] = (trace.decode("ascii"), nanos / 1e9, time.time())

    def uncounted(self, route: int, method: bytes, status: int) -> None:
        """A request ended whose latency says nothing: its client has left, or its answer was broken off."""
        key = (route, method if method in METHODS else b"other", status)
        self.others[key] = self.others.get(key, 0) + 1


WORKER: Final = Counters()
"""Of this process, which is one worker."""

__all__ = ["WORKER", "Counters", "InstanceCounters", "Series", "family_of"]
