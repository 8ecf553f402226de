"""Memory that the supervisor shares with its workers: counters of limited tokens, script aliases.

The counters are a memory-mapped file in the state directory. The file *is* the
memory, so what was counted outlives a kill -9 of any process; `flush` is for
power loss alone.

There are no locks on the counters. Each live worker has slots of its own, and
every slot is one aligned 64-bit word that carries its time and its count
together, so a reader meets the old value or the new one, never a mixture:

    header   magic, version, slots, records, checksum of the first three
    record   digest, check of the digest,
             slots x (day << 40 | count on that day),
             slots x (second << 32 | count in that second), even seconds,
             slots x the same, odd seconds,
             day << 40 | count leased for that day

The seconds before and after a tick lie in different columns; so the window
that slides over both needs no "previous" that somebody would have to move.

Tokens that are known at the start have their records from the start. Workers
add records for those that a control plane brings later: appended under a file
lock, never moved or removed while a gateway runs, so that nobody who counts
has to know.

What several gateways may use together on a day is leased to each in parts
(control/daily.py); what this one has leased stands beside what it has used.

A worker that drains and the one that takes its place run side by side. There
are therefore two slots per worker, and `enter` says which of them is ours.
"""

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

ALIAS_CAPACITY = 4096
"""Script aliases kept at a time; the oldest give way. An alias that was lost costs its client one NOSCRIPT."""
INCARNATIONS = 2
"""Processes that may count for one worker at a time: the one that drains and the one that replaces it."""
LOCK_PATIENCE = 2.0
"""Seconds to wait for the workers of a gateway that was killed to go; they hold its lock until then."""
MAX_RECORDS = 100_000
"""Tokens and organizations whose limits are counted between two starts."""

_MAGIC = b"RGCOUNT\x00"
_VERSION = 2
_HEADER = struct.Struct("@8sIIQI")
_RECORDS = struct.Struct("@Q")
_RECORDS_AT = 16
_HEADER_BYTES = 64
_RESERVED_RECORDS = 256  # room taken at a time for records that are added later
_DIGEST_BYTES = 32
_CHECK = struct.Struct("@Q")
_DAY_SECONDS = 86_400
_DAY_SHIFT = 40  # 24 bits of days, 40 bits of count: 12 million requests per second, all day, per worker
_DAY_COUNT = (1 << _DAY_SHIFT) - 1
_DAYS = (1 << 24) - 1
_SECOND_SHIFT = 32
_SECOND_COUNT = (1 << _SECOND_SHIFT) - 1
_SECONDS = (1 << 32) - 1

_INSTANCE_BYTES = 16
_ALIAS = struct.Struct("@I16s20s20s")
_ALIAS_BYTES = 64
_ALIASES_AT = 64

log = logging.getLogger(__name__)


class SharedStateError(Exception):
    """The counters cannot be kept where they should be; one line for the operator."""


def instance_digest(instance: bytes) -> bytes:
    """How an instance is named in the shared table of aliases: 16 bytes."""
    return hashlib.blake2b(instance, digest_size=_INSTANCE_BYTES).digest()


def subject_digest(subject: bytes) -> bytes:
    """What names an organization or an API key among the counters: 32 bytes."""
    return hashlib.blake2b(subject, digest_size=_DIGEST_BYTES, person=b"subject").digest()


class Counter:
    """What one token used, counted by one worker and summed over all."""

    __slots__ = (
        "_days_at",
        "_fd",
        "_lease",
        "_memory",
        "_own_day",
        "_own_seconds",
        "_seconds_at",
        "_unpack",
        "_words",
    )

    def __init__(
        self, memory: mmap.mmap, words: "memoryview[int]", record_at: int, slots: int, slot: int, fd: int
    ) -> None:
        days_at = record_at + _DIGEST_BYTES + _CHECK.size
        even_at, odd_at = days_at + 8 * slots, days_at + 16 * slots
        self._memory = memory
        self._words = words
        self._unpack = struct.Struct(f"@{slots}Q").unpack_from
        self._days_at = days_at
        self._seconds_at = (even_at, odd_at)
        self._own_day = days_at // 8 + slot
        self._own_seconds = (even_at // 8 + slot, odd_at // 8 + slot)
        self._lease = (odd_at + 8 * slots) // 8
        self._fd = fd

    def rate_usage(self, now: float) -> float:
        """Requests in the second before `now` (unix seconds), of all workers.

        The second that `now` is in counts whole, the one before by the part of it that is not yet a second ago.
        """
        second = int(now) & _SECONDS
        parity = second & 1
        # Comparing is cheaper than shifting, and drops zero words and those of other seconds at once.
        floor = second << _SECOND_SHIFT
        ceiling = floor + _SECOND_COUNT
        current = 0
        for word in self._unpack(self._memory, self._seconds_at[parity]):
            if floor < word <= ceiling:
                current += word - floor
        floor -= 1 << _SECOND_SHIFT
        ceiling = floor + _SECOND_COUNT
        previous = 0
        for word in self._unpack(self._memory, self._seconds_at[parity ^ 1]):
            if floor < word <= ceiling:
                previous += word - floor
        return current + previous * (1.0 - now % 1.0) if previous else float(current)

    def leased(self, now: float) -> int:
        """What this gateway has leased for the day of `now`, all workers together."""
        word = self._words[self._lease]
        day = int(now // _DAY_SECONDS) & _DAYS
        return word & _DAY_COUNT if day <= word >> _DAY_SHIFT <= day + 1 else 0

    def day_usage(self, now: float) -> int:
        """Requests since UTC midnight before `now` (unix seconds), of all workers."""
        floor = (int(now // _DAY_SECONDS) & _DAYS) << _DAY_SHIFT
        tomorrow = floor + _DAY_COUNT + 1
        end = tomorrow + _DAY_COUNT
        total = 0
        for word in self._unpack(self._memory, self._days_at):
            if floor < word <= end:
                # Tomorrow's words are there when the clock was set back over midnight. They count: the limit
                # would start again from nothing otherwise, twice in one night.
                total += word - floor if word < tomorrow else word - tomorrow
        return total

    def add(self, n: int, now: float) -> None:
        """Count `n` requests (not negative) at `now` (unix seconds)."""
        words = self._words
        second = int(now) & _SECONDS
        index = self._own_seconds[second & 1]
        word = words[index]
        words[index] = word + n if word >> _SECOND_SHIFT == second else (second << _SECOND_SHIFT) + n
        self._day_add(self._own_day, n, now)

    def lease(self, n: int, now: float) -> None:
        """Add to what is leased for the day of `now`, or give back: then `n` is negative. Needs `try_lock`."""
        self._day_add(self._lease, n, now)

    def _day_add(self, index: int, n: int, now: float) -> None:
        words = self._words
        day = int(now // _DAY_SECONDS) & _DAYS
        word = words[index]
        # A word of any other day is stale, also one far ahead that a wrong clock left: it must not stop the count.
        if day <= word >> _DAY_SHIFT <= day + 1:
            words[index] = max(word + n, word & ~_DAY_COUNT)
        else:
            words[index] = (day << _DAY_SHIFT) + max(n, 0)

    def try_lock(self) -> bool:
        """Be the only process that leases for this token, until `unlock`; False: another is."""
        try:
            # Record locks belong to the process: the kernel frees the lock of one that is killed while it holds it.
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 8 * self._lease)
        except OSError:
            return False
        return True

    def unlock(self) -> None:
        """Undo `try_lock`."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, 8 * self._lease)


class _Aliases:
    """A ring of the latest script aliases, in memory that forked processes share.

    A record is written before the position that announces it; and carries a checksum of its place and content, so
    that neither a processor that reorders writes nor a writer that overtakes us can make us read half of one.
    """

    __slots__ = ("_fd", "_memory", "_words")

    def __init__(self) -> None:
        self._fd = _memory_file("redisgate-aliases", _ALIASES_AT + ALIAS_CAPACITY * _ALIAS_BYTES)
        self._memory = mmap.mmap(self._fd, 0)
        self._words = memoryview(self._memory).cast("Q")

    @property
    def position(self) -> int:
        return self._words[0]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def publish(self, instance: bytes, original: bytes, rewritten: bytes) -> None:
        if len(instance) != _INSTANCE_BYTES:
            raise ValueError(f"an instance digest has {_INSTANCE_BYTES} bytes")
        digests = bytes.fromhex(original.decode("ascii")), bytes.fromhex(rewritten.decode("ascii"))
        if len(digests[0]) != 20 or len(digests[1]) != 20:
            raise ValueError("a SHA1 has 40 hexadecimal digits")
        # Record locks belong to the process: forked workers exclude each other, and the kernel frees the lock of one
        # that is killed while it holds it.
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        try:
            position = self._words[0]
            record = bytearray(_ALIAS.pack(0, instance, *digests))
            _stamp(record, position)
            at = _alias_at(position)
            self._memory[at : at + _ALIAS.size] = bytes(record)
            self._words[0] = position + 1
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def since(self, position: int) -> tuple[int, list[tuple[bytes, bytes, bytes]]]:
        end = self._words[0]
        # The oldest record is where the next one is written: it may be overwritten under our eyes.
        position = max(position, end - ALIAS_CAPACITY + 1)
        found = []
        while position < end:
            at = _alias_at(position)
            record = bytearray(self._memory[at : at + _ALIAS.size])
            stamped = bytes(record[:4])
            _stamp(record, position)
            if record[:4] == stamped:
                _, instance, original, rewritten = _ALIAS.unpack(record)
                found.append((instance, original.hex().encode(), rewritten.hex().encode()))
            elif self._words[0] - position < ALIAS_CAPACITY:
                break  # not overtaken, so not quite visible yet: the next call gets it
            position += 1
        return position, found


def _alias_at(position: int) -> int:
    return _ALIASES_AT + position % ALIAS_CAPACITY * _ALIAS_BYTES


def _stamp(record: bytearray, position: int) -> None:
    """Write the checksum of a record at `position` into its first four bytes."""
    struct.pack_into("@I", record, 0, zlib.crc32(memoryview(record)[4:], position & 0xFFFFFFFF))


class SharedState:
    """Counters and script aliases, mapped by the supervisor before it forks and by every worker."""

    __slots__ = (
        "_aliases",
        "_fd",
        "_flushed",
        "_incarnation",
        "_lock_fd",
        "_maps",
        "_memory",
        "_records",
        "_slots",
        "_words",
        "path",
        "workers",
    )

    def __init__(self, path: Path | None, fd: int, lock_fd: int, workers: int) -> None:
        """Maps what `fd` holds; `create` and `anonymous` make one."""
        self.path = path
        self.workers = workers
        self._slots = workers * INCARNATIONS
        self._incarnation = 0
        self._fd = fd
        self._lock_fd = lock_fd
        self._records: dict[bytes, int] = {}
        self._flushed = -1
        self._aliases = _Aliases()
        self._memory: mmap.mmap
        self._words: memoryview[int]
        self._maps: list[mmap.mmap] = []
        self._map()

    @classmethod
    def create(cls, path: Path, workers: int, token_digests: Iterable[bytes]) -> "SharedState":
        """Map the counters in the file `path`, with today's counts of the gateway that wrote it last.

        `token_digests`: the tokens that have a limit, 32 bytes each. The folder is made if it is missing. A file that
        makes no sense is kept beside it under the name `<path>.corrupt`.

        Raises:
            SharedStateError: the folder cannot be written, or another gateway uses it.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_fd = _lock(path.with_name(path.name + ".lock"))
        except OSError as error:
            raise SharedStateError(f"cannot keep counters in {path.parent}: {error.strerror}") from error
        try:
            counts = _counts_to_keep(path, int(time.time() // _DAY_SECONDS) & _DAYS)
            fd = _write_new(path, workers * INCARNATIONS, {**dict.fromkeys(token_digests, (0, 0)), **counts})
        except OSError as error:
            os.close(lock_fd)
            raise SharedStateError(f"cannot keep counters in {path}: {error.strerror}") from error
        return cls(path, fd, lock_fd, workers)

    @classmethod
    def anonymous(cls, workers: int, token_digests: Iterable[bytes] = ()) -> "SharedState":
        """The same without a file: counts are gone when the gateway stops."""
        fd = _memory_file("redisgate-counters", 0)
        slots = workers * INCARNATIONS
        os.pwrite(fd, _image(slots, dict.fromkeys(token_digests, (0, 0))), 0)
        return cls(None, fd, -1, workers)

    def _map(self) -> None:
        """Know the records that there are by now."""
        size = _record_bytes(self._slots)
        (count,) = _RECORDS.unpack(os.pread(self._fd, _RECORDS.size, _RECORDS_AT))
        if not self._maps or _HEADER_BYTES + count * size > len(self._memory):
            self._memory = mmap.mmap(self._fd, 0)
            self._words = memoryview(self._memory).cast("Q")
            # Counters hold on to the map they were made with; and to close any would end our locks on the file.
            self._maps.append(self._memory)
        for at in range(_HEADER_BYTES + len(self._records) * size, _HEADER_BYTES + count * size, size):
            self._records[self._memory[at : at + _DIGEST_BYTES]] = at

    def extend(self, token_digests: Iterable[bytes]) -> None:
        """Give tokens that have none yet a record; other processes find it when they ask for it.

        Records are appended, so workers that mapped the shorter file go on counting in the same places.

        Raises:
            SharedStateError: there is no room left.
        """
        wanted = [digest for digest in dict.fromkeys(token_digests) if digest not in self._records]
        if not wanted:
            return
        size = _record_bytes(self._slots)
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, 0)
            try:
                self._map()
                new = [digest for digest in wanted if digest not in self._records]
                count = len(self._records)
                end = _HEADER_BYTES + count * size
                if count + len(new) > MAX_RECORDS:
                    raise SharedStateError(f"limits of {MAX_RECORDS} tokens and organizations are counted already")
                missing = end + len(new) * size - os.fstat(self._fd).st_size
                if missing > 0:
                    _reserve(self._fd, end + len(new) * size - missing, max(missing, _RESERVED_RECORDS * size))
                os.pwrite(self._fd, b"".join(_record(digest, (0, 0), self._slots) for digest in new), end)
                os.pwrite(self._fd, _RECORDS.pack(count + len(new)), _RECORDS_AT)
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, 0)
        except OSError as error:
            raise SharedStateError(f"no room for the counters of {len(wanted)} more: {error.strerror}") from error
        self._map()

    def claim(self, digest: bytes, worker: int) -> Counter:
        """The counter of a token that may have become known only now.

        Raises:
            SharedStateError: there is no room left.
        """
        if digest not in self._records:
            self._map()
            self.extend([digest])
        return self.counter(digest, worker)

    def enter(self, incarnation: int) -> None:
        """Say in a worker that was just forked which slots it counts in: below `INCARNATIONS`.

        Of the live processes of one worker index no two may use the same.
        """
        if not 0 <= incarnation < INCARNATIONS:
            raise ValueError(f"incarnation {incarnation} is not below {INCARNATIONS}")
        self._incarnation = incarnation

    def counter(self, digest: bytes, worker: int) -> Counter:
        """The counter of a token (32 bytes) for one worker index.

        Raises:
            KeyError: neither `create` nor `extend` was told of the token.
        """
        if not 0 <= worker < self.workers:
            raise ValueError(f"worker {worker} is not below {self.workers}")
        slot = self._incarnation * self.workers + worker
        return Counter(self._memory, self._words, self._records[digest], self._slots, slot, self._fd)

    def flush(self) -> None:
        """Have the counts on disk; does nothing when nothing was counted since the last call."""
        if self.path is None:
            return
        self._map()
        checksum = zlib.crc32(self._memory)
        if checksum != self._flushed:
            self._memory.flush()
            self._flushed = checksum

    def close(self) -> None:
        """Flush, and let another gateway use the file. Counters that were handed out stay readable."""
        if self._fd >= 0:
            self.flush()
            os.close(self._fd)
            self._fd = -1
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        self._aliases.close()

    @property
    def alias_position(self) -> int:
        """How many aliases were ever published; compare with what `aliases_since` returned last."""
        return self._aliases.position

    def publish_alias(self, instance: bytes, original: bytes, rewritten: bytes) -> None:
        """Let all workers know `original` as `rewritten` (40 hexadecimal digits each) on an instance.

        `instance` is an `instance_digest`. Every worker that looks after this returned finds the alias.

        Raises:
            ValueError: one of the digests is none.
        """
        self._aliases.publish(instance, original, rewritten)

    def aliases_since(self, position: int) -> tuple[int, list[tuple[bytes, bytes, bytes]]]:
        """The position to ask from next time, and what was published since `position`, oldest first.

        A reader that fell `ALIAS_CAPACITY` or more behind gets what is left. SHA1s are lower-case.
        """
        return self._aliases.since(position)


def _record_bytes(slots: int) -> int:
    return _DIGEST_BYTES + _CHECK.size + 3 * 8 * slots + 8


def _record(digest: bytes, day_words: tuple[int, int], slots: int) -> bytes:
    """A record with the counts of one day, of what was used and of what was leased."""
    if len(digest) != _DIGEST_BYTES:
        raise ValueError(f"a token digest has {_DIGEST_BYTES} bytes, not {len(digest)}")
    used, leased = day_words
    head = digest + _CHECK.pack(zlib.crc32(digest, _VERSION)) + _CHECK.pack(used)
    head = head.ljust(_DIGEST_BYTES + _CHECK.size + 3 * 8 * slots, b"\0") + _CHECK.pack(leased)
    return head.ljust(_record_bytes(slots), b"\0")


def _image(slots: int, day_words: Mapping[bytes, tuple[int, int]]) -> bytes:
    """A whole file: the counts of each digest go into the slot of the first worker."""
    static = _HEADER.pack(_MAGIC, _VERSION, slots, len(day_words), zlib.crc32(_MAGIC, _VERSION + (slots << 8)))
    records = b"".join(_record(digest, words, slots) for digest, words in day_words.items())
    return static.ljust(_HEADER_BYTES, b"\0") + records


class _CorruptError(Exception):
    pass


def _counts_to_keep(path: Path, today: int) -> dict[bytes, tuple[int, int]]:
    """Day words by digest that a new file begins with; a corrupt file is set aside, loudly."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        return _day_words(data, today)
    except _CorruptError as error:
        aside = path.with_name(path.name + ".corrupt")
        os.replace(path, aside)
        log.error("the counters in %s are lost: %s; daily limits start again from 0; kept as %s", path, error, aside)
        return {}


def _day_words(data: bytes, today: int) -> dict[bytes, tuple[int, int]]:
    if len(data) < _HEADER_BYTES:
        raise _CorruptError(f"the file has only {len(data)} bytes")
    magic, version, slots, count, check = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise _CorruptError("it is no file of counters, or one of a machine with another byte order")
    if version != _VERSION:
        raise _CorruptError(f"it has format {version}, and this gateway knows {_VERSION}")
    if check != zlib.crc32(_MAGIC, _VERSION + (slots << 8)) or slots == 0:
        raise _CorruptError("its header is damaged")
    size = _record_bytes(slots)
    if len(data) < _HEADER_BYTES + count * size:
        raise _CorruptError(f"it ends before its {count} records do")
    kept = {}
    unpack = struct.Struct(f"@{slots}Q").unpack_from
    for at in range(_HEADER_BYTES, _HEADER_BYTES + count * size, size):
        digest = data[at : at + _DIGEST_BYTES]
        if _CHECK.unpack_from(data, at + _DIGEST_BYTES)[0] != zlib.crc32(digest, _VERSION):
            raise _CorruptError(f"the record at byte {at} is damaged")
        days_at = at + _DIGEST_BYTES + _CHECK.size
        used = _summed(unpack(data, days_at), today)
        # Later days are kept for the machine whose clock is only set after the gateway has started.
        day = today if today in used else max(used, default=-1)
        leased = _summed(_CHECK.unpack_from(data, days_at + 3 * 8 * slots), today)
        if day < today:
            day = today if leased.get(today) else -1
        if day >= today:
            kept[digest] = _day_word(day, used), _day_word(day, leased)
    return kept


def _summed(words: Iterable[int], today: int) -> dict[int, int]:
    """The counts in day words, by day."""
    counts: dict[int, int] = {}
    for word in filter(None, words):
        day = word >> _DAY_SHIFT
        # As in Counter.day_usage: tomorrow is today's, seen before the clock was set back.
        day = today if day == today + 1 else day
        counts[day] = counts.get(day, 0) + (word & _DAY_COUNT)
    return counts


def _day_word(day: int, counts: Mapping[int, int]) -> int:
    return (day << _DAY_SHIFT) + min(counts.get(day, 0), _DAY_COUNT)


def _write_new(path: Path, slots: int, day_words: Mapping[bytes, tuple[int, int]]) -> int:
    """Write a file and put it in the place of `path` in one step; its descriptor."""
    fresh = path.with_name(path.name + ".new")
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        image = _image(slots, day_words)
        _reserve(fd, 0, len(image))
        view = memoryview(image)
        written = 0
        while written < len(image):
            written += os.pwrite(fd, view[written:], written)
        os.fsync(fd)
        os.replace(fresh, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _reserve(fd: int, at: int, size: int) -> None:
    """Take room on the disk now: a store into a mapped hole of a full disk kills the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, at, size)
    else:
        os.ftruncate(fd, at + size)


def _memory_file(name: str, size: int) -> int:
    """A descriptor of memory that lives as long as a process holds it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def _lock(path: Path) -> int:
    """Lock the counters for this process and its workers, by a file beside them (they are replaced, it is not)."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = os.pread(fd, 20, 0).strip().decode("ascii", "replace")
            if time.monotonic() > deadline:
                os.close(fd)
                raise SharedStateError(
                    f"another gateway (process {owner or 'unknown'}) keeps its counters in {path.parent}: "
                    "give this one a state directory of its own"
                ) from None
            time.sleep(0.02)
        except BaseException:
            os.close(fd)
            raise
    with contextlib.suppress(OSError):  # the number is for the message above only
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd
