"""What a grant's usage costs to count: plain integers, and a list of them for the latency.

A `UsageCell` belongs to one credential and one instance in one worker; who
empties it (the control plane) takes what it holds and leaves zeros.
"""

import time
from collections.abc import Sequence

from redisgate.access import IpAddress
from resp.commands import CommandTable

BUCKETS = 88
"""Of a latency histogram: four to the octave, from 16 microseconds to a minute."""
MAX_REMEMBERED_NAMES = 4096
"""Spellings of commands of which a cell knows whether they read or write; then it forgets them all."""

_OTHER, _READ, _WRITE = 0, 1, 2
_clock = time.perf_counter


def bucket_of(micros: int) -> int:
    """The bucket that a latency in microseconds belongs to."""
    n = micros >> 4
    if n < 4:
        return n if n > 0 else 0
    octave = n.bit_length() - 3
    bucket = (octave << 2) + (n >> octave)
    return bucket if bucket < BUCKETS else BUCKETS - 1


def bucket_start(bucket: int) -> int:
    """The least latency in a bucket, in microseconds."""
    if bucket < 8:
        return bucket << 4
    octave = (bucket >> 2) - 1
    return ((bucket & 3) + 4 << octave) << 4


def percentile(buckets: Sequence[int], fraction: float) -> float | None:
    """The latency in microseconds that `fraction` of all stay below, within 13 %; None: there are none."""
    total = sum(buckets)
    if not total:
        return None
    wanted = fraction * total
    seen = 0
    for bucket, count in enumerate(buckets):
        seen += count
        if count and seen >= wanted:
            start, end = bucket_start(bucket), bucket_start(bucket + 1)
            return start + (end - start) * (1 - (seen - wanted) / count)
    return float(bucket_start(len(buckets)))


class UsageCell:
    """What one credential did on one instance since the cell was emptied; sizes in bytes, latency in microseconds."""

    __slots__ = (
        "_kinds",
        "_table",
        "address",
        "buckets",
        "bytes_in",
        "bytes_out",
        "commands",
        "errors",
        "micros",
        "reads",
        "requests",
        "writes",
    )

    def __init__(self, table: CommandTable) -> None:
        """`table` says which commands read and which write."""
        self._table = table
        self._kinds: dict[bytes, int] = {}
        self.address: IpAddress | None = None  # of the first client since the cell was emptied
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.address = None
        self.commands = 0
        self.reads = 0
        self.writes = 0
        self.requests = 0
        self.errors = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.micros = 0
        self.buckets = [0] * BUCKETS

    def count(self, commands: Sequence[Sequence[bytes]], size: int) -> None:
        """Commands that are about to run, with `size` bytes of arguments."""
        self.commands += len(commands)
        self.bytes_in += size
        kinds = self._kinds
        for argv in commands:
            kind = kinds.get(argv[0])
            if kind is None:
                kind = self._kind(argv[0])
            if kind == _READ:
                self.reads += 1
            elif kind == _WRITE:
                self.writes += 1

    def _kind(self, name: bytes) -> int:
        command = self._table.find([name.upper()])
        if command is None:
            return _OTHER  # not remembered: the table may learn it
        kind = _WRITE if "write" in command.flags else _READ if "readonly" in command.flags else _OTHER
        if len(self._kinds) >= MAX_REMEMBERED_NAMES:
            self._kinds.clear()
        self._kinds[name] = kind
        return kind

    def answered(self, began: float, status: int, size: int) -> None:
        """A request that began at `began` was answered with `size` bytes."""
        micros = int((_clock() - began) * 1e6)
        self.requests += 1
        self.micros += micros
        self.bytes_out += size
        self.buckets[bucket_of(micros)] += 1
        if status >= 400:
            self.errors += 1
