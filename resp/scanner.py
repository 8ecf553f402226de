"""Finds where replies end, and how deep they nest, without building anything.

A RESP2 reply says its own length piece by piece; order alone ties replies to
commands, so losing count here means answering one client with another's data.
Whatever is not plainly RESP2 is therefore an error, never skipped.
"""

import re
from collections.abc import Sequence
from typing import Final

from resp.errors import ProtocolError

MAX_LINE_BYTES: Final = 64 * 1024
"""A status, error or length line longer than this is not from Redis (its error lines stay far below)."""
MAX_BULK_BYTES: Final = 512 * 1024 * 1024
"""Redis's own bound for one string (proto-max-bulk-len)."""
MAX_ARRAY_ITEMS: Final = 16 * 1024 * 1024
"""An array announced longer than this is taken for a broken server, not waited for."""
MAX_SCAN_DEPTH: Final = 100_000
"""Far above what Redis lets a script nest (about 8,000): bounds the memory of the stack."""

# The first bytes of replies, and line ends, as indexing gives them.
PLUS: Final = 0x2B
MINUS: Final = 0x2D
COLON: Final = 0x3A
DOLLAR: Final = 0x24
STAR: Final = 0x2A
CR: Final = 0x0D
LF: Final = 0x0A

# Lengths are nearly always small; a dictionary hit costs half of int() and cannot be fooled by b"1_0" or b" 1".
_SMALL_NUMBERS: Final = {b"%d" % number: number for number in range(-1, 2048)}
_LENGTH: Final = re.compile(rb"-1|0|[1-9][0-9]{0,9}")
_INTEGER: Final = re.compile(rb"[+-]?[0-9]{1,19}")


def parse_length(digits: bytes) -> int:
    """The number in a `$` or `*` line.

    Raises:
        ProtocolError: not a canonical decimal of -1 or more.
    """
    number = _SMALL_NUMBERS.get(digits)
    if number is not None:
        return number
    if _LENGTH.fullmatch(digits) is None:
        raise ProtocolError(f"bad length {digits[:40]!r}")
    return int(digits)


class FrameScanner:
    """Walks over a run of `count` consecutive replies that may arrive in pieces.

    `scan` consumes whole values from a buffer and remembers where in the
    nesting it stopped; the caller keeps the bytes. After a `scan`:

    - `done`: all replies have ended, at the position that `scan` returned;
    - `depth`: the deepest nesting seen (0: no array);
    - `announced`: bytes that the value at the stop is known to need (0: unknown).
    """

    __slots__ = ("_bulk_left", "_left", "_stack", "announced", "depth", "done")

    def __init__(self, count: int = 1) -> None:
        self.restart(count)

    def restart(self, count: int) -> None:
        """Begin a new run of `count` replies."""
        self._left = count
        self._stack: list[int] = []
        self._bulk_left = 0
        self.depth = 0
        self.announced = 0
        self.done = count == 0

    def scan(self, buffer: bytes, position: int = 0, *, partial_bulks: bool = False) -> int:
        """Consume whole values from `buffer[position:]`; return where the first unconsumed byte is.

        With `partial_bulks`, the body of a long bulk string is consumed as it
        comes, so that a reply of any size passes in bounded memory; without
        it, a value is consumed whole or not at all.

        Raises:
            ProtocolError: the bytes are not RESP2.
        """
        size = len(buffer)
        if self._bulk_left:
            position = self._skip_bulk(buffer, position, size)
            if self._bulk_left:
                return position
        left = self._left
        stack = self._stack
        find = buffer.find
        numbers = _SMALL_NUMBERS
        self.announced = 0
        while left and position < size:
            kind = buffer[position]
            end_of_line = find(b"\r\n", position + 1)
            if end_of_line < 0:
                if kind not in b"+-:$*":
                    raise ProtocolError(f"reply type {bytes((kind,))!r} is not RESP2")
                if size - position > MAX_LINE_BYTES:
                    raise ProtocolError("a line without end")
                break
            if kind == DOLLAR:
                digits = buffer[position + 1 : end_of_line]
                length = numbers.get(digits)
                if length is None:
                    length = parse_length(digits)
                    if length > MAX_BULK_BYTES:
                        raise ProtocolError(f"a bulk string of {length} bytes")
                if length < 0:
                    position = end_of_line + 2
                else:
                    end = end_of_line + length + 4
                    if end > size:
                        if not partial_bulks:
                            self.announced = end - position
                            break
                        self._bulk_left = end - (end_of_line + 2)
                        self._left = left
                        return self._skip_bulk(buffer, end_of_line + 2, size)
                    if buffer[end - 2] != CR or buffer[end - 1] != LF:
                        raise ProtocolError("a bulk string longer than it said")
                    position = end
            elif kind == PLUS or kind == MINUS:
                if find(b"\n", position, end_of_line) >= 0:
                    raise ProtocolError("a bare line feed in a line")
                if end_of_line - position > MAX_LINE_BYTES:
                    raise ProtocolError("a line too long")
                position = end_of_line + 2
            elif kind == COLON:
                digits = buffer[position + 1 : end_of_line]
                if digits not in numbers and _INTEGER.fullmatch(digits) is None:
                    raise ProtocolError(f"bad integer {digits[:40]!r}")
                position = end_of_line + 2
            elif kind == STAR:
                length = parse_length(buffer[position + 1 : end_of_line])
                if length > MAX_ARRAY_ITEMS:
                    raise ProtocolError(f"an array of {length} items")
                position = end_of_line + 2
                if length > 0:
                    stack.append(left - 1)
                    left = length
                    depth = len(stack)
                    if depth > self.depth:
                        if depth > MAX_SCAN_DEPTH:
                            raise ProtocolError(f"a reply nested deeper than {MAX_SCAN_DEPTH} levels")
                        self.depth = depth
                    continue
            else:
                raise ProtocolError(f"reply type {bytes((kind,))!r} is not RESP2")
            left -= 1
            while not left and stack:
                left = stack.pop()
        self._left = left
        self.done = not left
        return position

    def _skip_bulk(self, buffer: bytes, position: int, size: int) -> int:
        """Consume what is there of a bulk string's body and its CRLF; the CRLF is held until it is whole."""
        body_left = self._bulk_left - 2
        available = size - position
        if available < self._bulk_left:
            taken = min(available, body_left)
            self._bulk_left -= taken
            return position + taken
        end = position + self._bulk_left
        if buffer[end - 2] != CR or buffer[end - 1] != LF:
            raise ProtocolError("a bulk string longer than it said")
        self._bulk_left = 0
        self._left -= 1
        while not self._left and self._stack:
            self._left = self._stack.pop()
        self.done = not self._left
        return end


def split_frames(frames: bytes, count: int) -> Sequence[bytes]:
    """The `count` replies in `frames`, each by itself. `frames` must hold exactly those.

    Raises:
        ProtocolError: it does not.
    """
    result = []
    position = 0
    scanner = FrameScanner()
    for _ in range(count):
        scanner.restart(1)
        end = scanner.scan(frames, position)
        if not scanner.done:
            raise ProtocolError("fewer replies than expected")
        result.append(frames[position:end])
        position = end
    if position != len(frames):
        raise ProtocolError("more replies than expected")
    return result


def frame_depth(frame: bytes) -> int:
    """How deep one whole reply nests; 0 for anything but an array with items."""
    scanner = FrameScanner()
    scanner.scan(frame)
    return scanner.depth
