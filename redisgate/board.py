"""Where every process of one gateway puts what it has counted, for whoever wants to read it.

Memory that the supervisor maps before it forks. Each process writes its own
slot once a second, if anybody can read it, and never waits; a reader finds
the last words of a process that was killed, or that is stuck, and needs
nobody's answer:

    header   wanted log level
    slot     sequence, state, two halves
    half     size and size, checksum, a document and the one of some seconds before

A writer fills the half that nobody reads, then moves the sequence on, whose
last bit names the half: whoever is killed in between leaves the last document
whole.

A process that takes the place of another goes on from the numbers it left in
its slot, so that no sum over all slots ever falls.
"""

import mmap
import struct
import zlib
from dataclasses import dataclass
from typing import Final

from redisgate.shared import INCARNATIONS

SLOT_BYTES: Final = 2 * 1024 * 1024
"""For what one process publishes, twice; more is refused, and the last that fitted stays."""
HELPERS: Final = 2
"""Processes beside the workers: the steward, and the one that answers scrapes."""
SILENT_SECONDS: Final = 10.0
"""After so long without a word a process counts as stuck."""

_HEADER_BYTES: Final = 64
_SLOT_HEADER_BYTES: Final = 64  # sequence, state
_HALF_HEADER: Final = struct.Struct("@QQI")
_HALF_BYTES: Final = (SLOT_BYTES - _SLOT_HEADER_BYTES) // 2
MAX_DOCUMENT_BYTES: Final = (_HALF_BYTES - _HALF_HEADER.size) // 2
"""Of one document, so that two of them fit."""
_ATTEMPTS: Final = 10  # of a reader that is overtaken by a writer, who writes once a second
_DEAD, _LIVE = 0, 1

LEVELS: Final = ("", "debug", "info", "warning", "error")
"""Log levels by their number in the header; 0: as configured."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one process has published: a document, and the one of some seconds before."""

    slot: int
    live: bool
    document: bytes
    earlier: bytes


class Board:
    """Mapped by the supervisor; `enter` says in a forked process which slot is its own."""

    def __init__(self, workers: int, *, read: bool = True) -> None:
        """`read`: whether anybody can; otherwise only the log level is of use."""
        self.read = read
        self.seats = workers + HELPERS
        self._slots = self.seats * INCARNATIONS + 1
        self._memory = mmap.mmap(-1, _HEADER_BYTES + self._slots * SLOT_BYTES)
        self._words = memoryview(self._memory).cast("Q")
        self._slot = self._slots - 1  # the supervisor's
        self._words[self._at(self._slot) // 8 + 1] = _LIVE

    @staticmethod
    def _at(slot: int) -> int:
        return _HEADER_BYTES + slot * SLOT_BYTES

    def slot(self, seat: int, incarnation: int) -> int:
        """The slot of a seat's process."""
        return seat * INCARNATIONS + incarnation

    def enter(self, seat: int, incarnation: int) -> None:
        """Say in a process that was just forked which slot it writes."""
        global _current
        self._slot = self.slot(seat, incarnation)
        self._words[self._at(self._slot) // 8 + 1] = _LIVE
        _current = self

    def gone(self, seat: int, incarnation: int) -> None:
        """The process of this slot has ended; what it has counted stays."""
        self._words[self._at(self.slot(seat, incarnation)) // 8 + 1] = _DEAD

    def publish(self, document: bytes, earlier: bytes) -> bool:
        """Put two documents into our slot; False: they do not fit."""
        body = document + earlier
        if len(body) > _HALF_BYTES - _HALF_HEADER.size:
            return False
        at = self._at(self._slot)
        sequence = self._words[at // 8] + 1
        half = self._half(at, sequence)
        start = half + _HALF_HEADER.size
        _HALF_HEADER.pack_into(self._memory, half, len(document), len(earlier), zlib.crc32(body))
        self._memory[start : start + len(body)] = body
        self._words[at // 8] = sequence
        return True

    def own(self) -> Entry | None:
        """What stands in our slot: of the process that had it before, at first."""
        return self._read(self._slot)

    def entries(self) -> list[Entry]:
        """What every process has published last, those that have ended included."""
        found = [self._read(slot) for slot in range(self._slots)]
        return [entry for entry in found if entry is not None]

    def is_supervisor(self, entry: Entry) -> bool:
        """Whether an entry is the supervisor's."""
        return entry.slot == self._slots - 1

    @staticmethod
    def _half(at: int, sequence: int) -> int:
        return at + _SLOT_HEADER_BYTES + (sequence & 1) * _HALF_BYTES

    def _read(self, slot: int) -> Entry | None:
        at = self._at(slot)
        for _ in range(_ATTEMPTS):
            sequence = self._words[at // 8]
            if not sequence:
                return None
            half = self._half(at, sequence)
            first, second, checksum = _HALF_HEADER.unpack_from(self._memory, half)
            start = half + _HALF_HEADER.size
            body = self._memory[start : start + first + second] if first + second < _HALF_BYTES else b""
            if zlib.crc32(body) == checksum and len(body) == first + second:
                return Entry(slot, self._words[at // 8 + 1] == _LIVE, body[:first], body[first:])
        return None

    @property
    def level(self) -> str:
        """The log level that somebody asked for while the gateway runs; empty: as configured."""
        number = self._words[0]
        return LEVELS[number] if number < len(LEVELS) else ""

    @level.setter
    def level(self, name: str) -> None:
        self._words[0] = LEVELS.index(name)


_current: Board | None = None


def current() -> Board | None:
    """The board of this process; None in a process that no supervisor started."""
    return _current
