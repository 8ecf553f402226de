"""Memory that all workers of a gateway map: counters of limited tokens, script aliases.

The counters are a file in the state directory, mapped by every process, so the
file *is* the memory: whoever is killed, what was counted is in it (the
supervisor also writes it to disk each second, for the day the power fails).

Every worker incarnation has a slot of its own in each token's record, so
nobody ever writes where another writes, and no lock is needed: a reader sums
the slots. Two generations of workers overlap while one drains, hence twice as
many slots as workers.
"""

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import struct
from pathlib import Path
from typing import BinaryIO

ALIAS_CAPACITY = 4096
"""Script aliases remembered for all instances; the oldest is forgotten first."""

_MAGIC = b"RGCOUNT2"
_HEADER = struct.Struct("<8sII")  # magic, slots, records
_HEADER_BYTES = 64
_DIGEST_BYTES = 32
_SLOT_FIELDS = 5  # day, day count, second, count in it, count in the second before
_SLOT_BYTES = _SLOT_FIELDS * 8
_ALIAS = struct.Struct("<16s20s20s")
_DAY_SECONDS = 86_400

log = logging.getLogger(__name__)


class SharedStateError(Exception):
    """The state directory cannot be used; one line, with what to do."""


class Counter:
    """One token's counts, as one worker incarnation writes and reads them."""

    __slots__ = ("_base", "_cells", "_own")

    def __init__(self, cells: "memoryview[int]", base: int, slots: int, slot: int) -> None:
        self._cells = cells
        self._base = range(base, base + slots * _SLOT_FIELDS, _SLOT_FIELDS)
        self._own = base + slot * _SLOT_FIELDS

    def rate_usage(self, now: float) -> float:
        """Requests in the sliding second before `now` (unix seconds), over all workers."""
        second = int(now)
        weight = 1.0 - (now - second)
        cells = self._cells
        total = 0.0
        for slot in self._base:
            at = cells[slot + 2]
            if at == second:
                total += cells[slot + 3] + weight * cells[slot + 4]
            elif at == second - 1:
                total += weight * cells[slot + 3]
        return total

    def day_usage(self, now: float) -> int:
        """Requests since midnight UTC, over all workers."""
        day = int(now) // _DAY_SECONDS
        cells = self._cells
        return sum(cells[slot + 1] for slot in self._base if cells[slot] == day)

    def add(self, count: int, now: float) -> None:
        """Count `count` requests."""
        cells, own = self._cells, self._own
        second = int(now)
        day = second // _DAY_SECONDS
        if cells[own] != day:
            # Count first: a reader in between sees a day too few, never yesterday's count as today's.
            cells[own + 1] = 0
            cells[own] = day
        cells[own + 1] += count
        at = cells[own + 2]
        if at != second:
            cells[own + 4] = cells[own + 3] if at == second - 1 else 0
            cells[own + 3] = 0
            cells[own + 2] = second
        cells[own + 3] += count


class SharedState:
    """The shared memory, as one process sees it; made by the supervisor, inherited by fork."""

    def __init__(self, file: BinaryIO | None, counts: mmap.mmap, slots: int, records: dict[bytes, int]) -> None:
        self._file = file
        self._counts = counts
        self._cells = memoryview(counts)[_HEADER_BYTES:].cast("q")
        self._slots = slots
        self._records = records  # digest to index of its first cell
        self._aliases = mmap.mmap(-1, 8 + ALIAS_CAPACITY * _ALIAS.size)
        self._alias_count = memoryview(self._aliases)[:8].cast("Q")
        self._alias_lock = os.memfd_create("aliases")

    @classmethod
    def create(cls, path: Path | None, workers: int, token_digests: list[bytes]) -> "SharedState":
        """Open the counts kept at `path` (None: in memory only) for `workers` workers and these tokens.

        Counts of today are carried over, also from a file of another shape. Afterwards no other gateway can open it.

        Raises:
            SharedStateError: it cannot be used, or another gateway uses it.
        """
        slots = 2 * workers
        digests = list(dict.fromkeys(token_digests))
        if path is None:
            return cls._lay_out(None, slots, digests, {})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(path.with_suffix(".lock"), "a+b")
        except OSError as error:
            raise SharedStateError(
                f"cannot write to the state directory {path.parent}: {error.strerror}; set REDISGATE_STATE_DIR to one"
                " that can be written, or start without rate and daily limits"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise SharedStateError(
                f"another gateway uses the state directory {path.parent}; give each its own REDISGATE_STATE_DIR"
            ) from error
        kept = _read_day_counts(path)
        # Tokens that the configuration lacks today may be back before midnight.
        digests += [digest for digest in kept if digest not in digests]
        temporary = path.with_suffix(".new")
        with open(temporary, "w+b") as file:
            state = cls._lay_out(file, slots, digests, kept)
        os.replace(temporary, path)
        state._file = lock
        return state

    @classmethod
    def _lay_out(
        cls, file: BinaryIO | None, slots: int, digests: list[bytes], kept: dict[bytes, tuple[int, int]]
    ) -> "SharedState":
        record_bytes = _DIGEST_BYTES + slots * _SLOT_BYTES
        size = _HEADER_BYTES + max(1, len(digests)) * record_bytes
        if file is None:
            counts = mmap.mmap(-1, size)
        else:
            file.truncate(size)
            counts = mmap.mmap(file.fileno(), size)
        _HEADER.pack_into(counts, 0, _MAGIC, slots, len(digests))
        records = {}
        for index, digest in enumerate(digests):
            if len(digest) != _DIGEST_BYTES:
                raise ValueError("a token digest has 32 bytes")
            start = _HEADER_BYTES + index * record_bytes
            counts[start : start + _DIGEST_BYTES] = digest
            records[digest] = (start + _DIGEST_BYTES - _HEADER_BYTES) // 8
        state = cls(None, counts, slots, records)
        for digest, (day, count) in kept.items():
            cell = records[digest]
            state._cells[cell], state._cells[cell + 1] = day, count
        return state

    def counter(self, digest: bytes, worker: int) -> Counter:
        """The counter of a token for the incarnation in slot `worker`. Raises KeyError for an unknown token."""
        return Counter(self._cells, self._records[digest], self._slots, worker)

    def knows(self, digests: list[bytes]) -> bool:
        """Whether all these tokens have records."""
        return all(digest in self._records for digest in digests)

    def flush(self) -> None:
        """Write the counts to disk."""
        self._counts.flush()

    # Script aliases

    @property
    def alias_position(self) -> int:
        """Grows by one with every alias published."""
        return self._alias_count[0]

    def publish_alias(self, instance: bytes, original: bytes, rewritten: bytes) -> None:
        """Make an alias visible to every worker; `instance` is an `instance_digest`, the SHA1s are 40 hexadecimal digits."""
        # flock ties a lock to the open file, which forked processes share; a lock of fcntl belongs to the process.
        fcntl.lockf(self._alias_lock, fcntl.LOCK_EX)
        try:
            position = self._alias_count[0]
            offset = 8 + position % ALIAS_CAPACITY * _ALIAS.size
            _ALIAS.pack_into(
                self._aliases, offset, instance, bytes.fromhex(original.decode()), bytes.fromhex(rewritten.decode())
            )
            self._alias_count[0] = position + 1  # last: readers look at it first
        finally:
            fcntl.lockf(self._alias_lock, fcntl.LOCK_UN)

    def aliases_since(self, position: int) -> tuple[int, list[tuple[bytes, bytes, bytes]]]:
        """The position now, and the aliases published since; instances by `instance_digest`."""
        fcntl.lockf(self._alias_lock, fcntl.LOCK_EX)
        try:
            now = self._alias_count[0]
            first = max(position, now - ALIAS_CAPACITY)
            news = []
            for index in range(first, now):
                instance, original, rewritten = _ALIAS.unpack_from(
                    self._aliases, 8 + index % ALIAS_CAPACITY * _ALIAS.size
                )
                news.append((instance, original.hex().encode(), rewritten.hex().encode()))
        finally:
            fcntl.lockf(self._alias_lock, fcntl.LOCK_UN)
        return now, news


def instance_digest(instance: bytes) -> bytes:
    """How an instance is named in the shared table of aliases: 16 bytes."""
    return hashlib.blake2b(instance, digest_size=16).digest()


def _read_day_counts(path: Path) -> dict[bytes, tuple[int, int]]:
    """The latest day and its count for every token in a file of any shape."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        magic, slots, records = _HEADER.unpack_from(data)
        record_bytes = _DIGEST_BYTES + slots * _SLOT_BYTES
        if magic != _MAGIC or len(data) < _HEADER_BYTES + records * record_bytes:
            raise ValueError("not a file of counts")
    except (struct.error, ValueError):
        aside = path.with_suffix(".corrupt")
        os.replace(path, aside)
        log.error("%s is damaged; kept as %s, and today's counts begin again at zero", path, aside)
        return {}
    result = {}
    for index in range(records):
        start = _HEADER_BYTES + index * record_bytes
        digest = data[start : start + _DIGEST_BYTES]
        cells = struct.unpack_from(f"<{slots * _SLOT_FIELDS}q", data, start + _DIGEST_BYTES)
        day = max(cells[::_SLOT_FIELDS])
        if day:
            count = sum(cells[i + 1] for i in range(0, len(cells), _SLOT_FIELDS) if cells[i] == day)
            result[digest] = (day, count)
    return result
