"""What a grant's usage costs to count: plain integers, and a list of them for the latency.

A `UsageCell` belongs to one credential and one instance in one worker; who
empties it (the control plane) takes what it holds and leaves zeros.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from resp.commands import CommandTable

if TYPE_CHECKING:
    from redisgate.access import IpAddress

BUCKETS = 88
"""Of a latency histogram: four to the octave, from 16 microseconds to a minute."""
MAX_REMEMBERED_NAMES = 4096
"""Spellings of commands of which a cell knows whether they read or write; then it forgets them all."""
OTHER, READ, WRITE = 0, 1, 2
"""What a command does."""

_UNIT_SHIFT = 14  # the least latency that is told apart is 2^14 nanoseconds
clock = time.perf_counter_ns
"""What latency is measured by."""


def bucket_of(nanos: int) -> int:
    """The bucket that a latency in nanoseconds belongs to."""
    n = nanos >> _UNIT_SHIFT
    if n < 4:
        return n
    octave = n.bit_length() - 3
    bucket = (octave << 2) + (n >> octave)
    return bucket if bucket < BUCKETS else BUCKETS - 1


def bucket_start(bucket: int) -> float:
    """The least latency in a bucket, in microseconds."""
    octave = max((bucket >> 2) - 1, 0)
    units = bucket if bucket < 8 else (bucket & 3) + 4 << octave
    return (units << _UNIT_SHIFT) / 1000


def percentile(buckets: Sequence[int], fraction: float) -> float | None:
    """The latency in microseconds that `fraction` of all stay below, within an eighth of it; None: there are none."""
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
    return bucket_start(len(buckets))


class UsageCell:
    """What one credential did on one instance since the cell was emptied; sizes in bytes, latency in nanoseconds."""

    __slots__ = (
        "_table",
        "address",
        "buckets",
        "bytes_in",
        "bytes_out",
        "commands",
        "errors",
        "kinds",
        "nanos",
    )

    def __init__(self, table: CommandTable) -> None:
        """`table` says which commands read and which write."""
        self._table = table
        self.kinds: dict[bytes, int] = {}
        """What the commands do that were met, by spelling."""
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.address: IpAddress | None = None  # of the first client
        self.commands = [0, 0, 0]  # by what they do
        self.errors = 0  # answers with status 400 or above
        self.bytes_in = 0  # of arguments
        self.bytes_out = 0  # of answers' bodies
        self.nanos = 0  # of all requests together
        self.buckets = [0] * BUCKETS  # requests by latency

    @property
    def used(self) -> bool:
        """Whether there is anything in it."""
        return any(self.commands) or any(self.buckets)

    def kind(self, name: bytes) -> int:
        """What a command does, for one that is not in `kinds`."""
        command = self._table.find([name.upper()])
        if command is None:
            return OTHER  # not remembered: the table may learn it
        kind = WRITE if "write" in command.flags else READ if "readonly" in command.flags else OTHER
        if len(self.kinds) >= MAX_REMEMBERED_NAMES:
            self.kinds.clear()
        self.kinds[name] = kind
        return kind

    def answered(self, nanos: int, status: int, size: int) -> None:
        """A request was answered with `size` bytes after so many nanoseconds."""
        self.nanos += nanos
        self.bytes_out += size
        # bucket_of, without the call
        n = nanos >> _UNIT_SHIFT
        if n >= 4:
            octave = n.bit_length() - 3
            n = (octave << 2) + (n >> octave)
            if n >= BUCKETS:
                n = BUCKETS - 1
        self.buckets[n] += 1
        if status >= 400:
            self.errors += 1
