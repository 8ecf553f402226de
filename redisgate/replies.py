"""Frames to response bodies: JSON, base64 or RESP2.

A rendering takes the exact bytes of whole replies and gives status and body.
Replies too large to hold are rendered piece by piece by the `…Stream` classes,
whose output is the same, byte for byte.

Short common replies are looked up, scalars are rendered by hand, arrays go
through hiredis and msgspec; arrays nested deeper than C encoders take go
through the iterative renderer that streams use.
"""

import binascii
import codecs
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from resp.parser import MAX_PARSED_DEPTH, ErrorReply, Parser
from resp.scanner import COLON, DOLLAR, LF, MINUS, PLUS, STAR, FrameScanner, frame_depth, split_frames

MAX_REPLY_DEPTH: Final = MAX_PARSED_DEPTH
"""Levels of nesting above which a reply is an error for its command alone; not as RESP2, nor where it is streamed."""
MAX_ENCODER_DEPTH: Final = 200
"""Levels that C JSON encoders take on any stack they may be called on."""
MAX_COMMON_FRAME_BYTES: Final = 16
"""Frames above this are not looked up: hashing a long value costs more than rendering it."""

_TOO_DEEP: Final = b"ERR the reply nests deeper than %d levels" % MAX_REPLY_DEPTH
_RESULT: Final = b'{"result":'
_ERROR: Final = b'{"error":'

_encode_text: Final = msgspec.json.encode
_encode: Final = msgspec.json.Encoder(enc_hook=str).encode  # an ErrorReply inside an array is its text
_encode_base64: Final = msgspec.json.Encoder(enc_hook=lambda error: str(error).encode()).encode  # bytes become base64

_parse_text: Final = Parser(text=True).parse
_parse_bytes: Final = Parser(text=False).parse


class Rendering:
    """One response format."""

    def __init__(self, content_type: bytes) -> None:
        self.content_type = content_type

    def single(self, frame: bytes, depth: int) -> tuple[int, bytes]:
        """HTTP status and body for one reply."""
        raise NotImplementedError

    def pipeline(self, frames: bytes, count: int, depth: int, inserts: Mapping[int, bytes]) -> tuple[int, bytes]:
        """HTTP status and body for `count` replies from Redis and the frames that belong between them.

        `inserts` maps positions in the client's pipeline to frames that did not come from Redis.
        """
        raise NotImplementedError

    def error(self, line: bytes) -> bytes:
        """The body for an error line."""
        raise NotImplementedError

    def stream(self, count: int, inserts: Mapping[int, bytes] | None) -> "ReplyStream":
        """For replies that come in pieces; `inserts` is None for a single command."""
        raise NotImplementedError


class ReplyStream:
    """Renders a run of replies that comes in pieces."""

    __slots__ = ("status",)

    status: int
    """HTTP status; 0 until it is known."""

    def feed(self, data: bytes) -> bytes:
        """The next part of the body, for the next piece as `Waiter.stream_data` gets it."""
        raise NotImplementedError


def quote(value: bytes) -> bytes:
    """Bytes as a JSON string; invalid UTF-8 becomes U+FFFD."""
    return _encode_text(value.decode("utf-8", "replace"))


def _quote_base64(value: bytes) -> bytes:
    return b'"' + binascii.b2a_base64(value, newline=False) + b'"'


def _integer(digits: bytes) -> bytes:
    """RESP integers are JSON numbers but for a plus sign and leading zeros, which a script host might send."""
    return digits if digits.isdigit() and digits[0] != 48 else b"%d" % int(digits)


def _splice(frames: bytes, count: int, inserts: Mapping[int, bytes]) -> list[bytes]:
    """The frames of all items of a pipeline, in order."""
    replies = iter(split_frames(frames, count))
    return [inserts[index] if index in inserts else next(replies) for index in range(count + len(inserts))]


class JsonRendering(Rendering):
    """`{"result": …}`, strings as UTF-8; or, with `base64`, as base64, except a top-level `OK` and errors."""

    def __init__(self, *, base64: bool = False) -> None:
        super().__init__(b"application/json")
        self._base64 = base64
        # Attributes of the object: calling a static method that was given another name costs three times as much.
        self._quote = _quote_base64 if base64 else quote
        self._encode = _encode_base64 if base64 else _encode
        self._parse = _parse_bytes if base64 else _parse_text
        self._common = {
            b"+OK\r\n": b'{"result":"OK"}',
            b"$-1\r\n": b'{"result":null}',
            b"*-1\r\n": b'{"result":null}',
            b"*0\r\n": b'{"result":[]}',
            b"$0\r\n\r\n": b'{"result":""}',
            **{b":%d\r\n" % number: b'{"result":%d}' % number for number in range(-2, 1000)},
        }
        if base64:
            self._common[b"$2\r\nOK\r\n"] = b'{"result":"OK"}'

    def single(self, frame: bytes, depth: int) -> tuple[int, bytes]:
        if len(frame) <= MAX_COMMON_FRAME_BYTES:
            body = self._common.get(frame)
            if body is not None:
                return 200, body
        kind = frame[0]
        if kind == DOLLAR:
            return 200, b'{"result":' + self._quote(frame[frame.index(LF) + 1 : -2]) + b"}"
        if kind == COLON:
            return 200, b'{"result":' + _integer(frame[1:-2]) + b"}"
        if kind == PLUS:
            return 200, b'{"result":' + self._quote(frame[1:-2]) + b"}"
        if kind == MINUS:
            return 400, b'{"error":%b}' % quote(frame[1:-2])
        if depth > MAX_ENCODER_DEPTH:
            if depth > MAX_REPLY_DEPTH:
                return 400, self.error(_TOO_DEEP)
            return 200, self.stream(1, None).feed(frame)
        return 200, self._encode({"result": self._parse(frame)[0]})

    def pipeline(self, frames: bytes, count: int, depth: int, inserts: Mapping[int, bytes]) -> tuple[int, bytes]:
        if depth > MAX_ENCODER_DEPTH or inserts:
            items = [self.single(frame, frame_depth(frame))[1] for frame in _splice(frames, count, inserts)]
            return 200, b"[%b]" % b",".join(items)
        return 200, self._items(self._parse(frames, count))

    def transaction(self, frames: bytes, count: int, depth: int) -> tuple[int, bytes]:
        """HTTP status and body for the replies to MULTI, `count` - 2 commands, EXEC."""
        *queued, executed = split_frames(frames, count)
        if executed[0] == MINUS:
            errors = [frame for frame in queued if frame[0] == MINUS]
            return 400, self.error((errors[0] if errors else executed)[1:-2])
        if executed[0] != STAR or executed == b"*-1\r\n":
            return 400, self.error(b"ERR the transaction was discarded")
        if depth > MAX_ENCODER_DEPTH:
            length, items = executed[1:].split(b"\r\n", 1)
            return self.pipeline(items, int(length), depth, {})
        return 200, self._items(self._parse(executed)[0])

    def error(self, line: bytes) -> bytes:
        return b'{"error":%b}' % quote(line)

    def stream(self, count: int, inserts: Mapping[int, bytes] | None) -> "JsonStream":
        return JsonStream(count, inserts, base64=self._base64)

    def transaction_stream(self, count: int) -> "JsonStream":
        """As `stream`, for the replies to MULTI, `count` - 2 commands, EXEC."""
        return JsonStream(count, None, base64=self._base64, transaction=True)

    def _items(self, replies: list[Any]) -> bytes:
        """The body for parsed replies."""
        if self._base64:
            replies = ["OK" if reply == b"OK" else reply for reply in replies]
        return self._encode(
            [{"error": str(reply)} if type(reply) is ErrorReply else {"result": reply} for reply in replies]
        )


class Resp2Rendering(Rendering):
    """The bytes as they came."""

    def __init__(self) -> None:
        super().__init__(b"application/octet-stream")

    def single(self, frame: bytes, depth: int) -> tuple[int, bytes]:
        return 400 if frame[0] == MINUS else 200, frame

    def pipeline(self, frames: bytes, count: int, depth: int, inserts: Mapping[int, bytes]) -> tuple[int, bytes]:
        return 200, b"".join(_splice(frames, count, inserts)) if inserts else frames

    def error(self, line: bytes) -> bytes:
        return b"-%b\r\n" % line

    def stream(self, count: int, inserts: Mapping[int, bytes] | None) -> "Resp2Stream":
        return Resp2Stream(inserts or {})


class Resp2Stream(ReplyStream):
    """Passes pieces on, with the inserts of a pipeline between them."""

    __slots__ = ("_at_boundary", "_index", "_inserts", "_scanner")

    def __init__(self, inserts: Mapping[int, bytes]) -> None:
        self.status = 200  # an error line is never long enough to be streamed
        self._inserts = inserts
        self._index = 0
        self._at_boundary = True
        self._scanner = FrameScanner()

    def feed(self, data: bytes) -> bytes:
        if not self._inserts:
            return data
        out = []
        position = 0
        while True:
            while self._at_boundary and self._index in self._inserts:
                out.append(self._inserts[self._index])
                self._index += 1
            if position >= len(data):
                return b"".join(out)
            end = self._scanner.scan(data, position, partial_bulks=True)
            out.append(data[position:end])
            position = end
            self._at_boundary = self._scanner.done
            if self._at_boundary:
                self._scanner.restart(1)
                self._index += 1


class JsonStream(ReplyStream):
    """The JSON of a run of replies that comes in pieces, at any depth, without recursion."""

    __slots__ = (
        "_base64",
        "_body_left",
        "_carry",
        "_count",
        "_decoder",
        "_fresh",
        "_index",
        "_inserts",
        "_item_depth",
        "_ok",
        "_queue_error",
        "_stack",
        "_transaction",
    )

    def __init__(
        self, count: int, inserts: Mapping[int, bytes] | None, *, base64: bool, transaction: bool = False
    ) -> None:
        self.status = 0 if transaction else 200
        self._base64 = base64
        self._inserts = inserts  # None: not a pipeline
        self._count = count + len(inserts or ())  # top-level values
        self._index = 0  # top-level values begun or inserted
        self._transaction = transaction
        self._queue_error: bytes | None = None
        self._item_depth = 1 if transaction else 0  # values at this depth are wrapped in {"result": …}
        self._stack: list[int] = []  # values left in each open array
        self._fresh = True  # nothing written yet in the innermost array
        self._body_left = 0  # of a bulk string, its CRLF included
        self._carry = b""  # base64: up to two bytes that wait for their group of three
        self._ok = False
        self._decoder: codecs.IncrementalDecoder | None = None

    def feed(self, data: bytes) -> bytes:
        """The next part of the body."""
        out: list[bytes] = []
        position = 0
        size = len(data)
        while position < size:
            if self._body_left:
                position = self._body(out, data, position, size)
                continue
            kind = data[position]
            end_of_line = data.index(b"\r\n", position)
            line = data[position + 1 : end_of_line]
            position = end_of_line + 2
            if self._transaction and not self._stack and self._index < self._count - 1:
                # MULTI's OK, and QUEUED for each command.
                self._index += 1
                if kind == MINUS and self._queue_error is None:
                    self._queue_error = line
                continue
            if self._transaction and not self._stack and kind != STAR:
                self.status = 400
                out.append(_ERROR + quote(self._queue_error or line) + b"}")
                continue
            self.status = self.status or 200
            self._open(out, kind)
            if kind == DOLLAR:
                length = int(line)
                if length >= 0:
                    self._body_left = length + 2
                    self._ok = self._base64 and length == 2 and len(self._stack) == self._item_depth
                    if not self._base64:
                        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
                    out.append(b'"')
                    continue
                out.append(b"null")
            elif kind == STAR:
                length = int(line)
                if length > 0:
                    out.append(b"[")
                    self._stack.append(length)
                    self._fresh = True
                    continue
                out.append(b"[]" if length == 0 else b"null")
            elif kind == COLON:
                out.append(_integer(line))
            elif kind == MINUS:
                top = len(self._stack) == self._item_depth
                out.append(_quote_base64(line) if self._base64 and not top else quote(line))
            else:
                top = len(self._stack) == self._item_depth
                raw = not self._base64 or (top and line == b"OK")
                out.append(quote(line) if raw else _quote_base64(line))
            self._close(out)
        return b"".join(out)

    def _open(self, out: list[bytes], kind: int) -> None:
        """What stands before a value: commas, the wrapping of an item, the inserts before it."""
        depth = len(self._stack)
        if depth == 0 and self._inserts is not None:
            if self._index == 0:
                out.append(b"[")
            self._insert(out)
            if self._index:
                out.append(b",")
        if depth:
            if not self._fresh:
                out.append(b",")
            self._fresh = False
        if depth == 0:
            self._index += 1
        if depth == self._item_depth:
            out.append(_ERROR if kind == MINUS else _RESULT)

    def _insert(self, out: list[bytes]) -> None:
        assert self._inserts is not None
        rendering = BASE64 if self._base64 else JSON
        while self._index in self._inserts:
            if self._index:
                out.append(b",")
            frame = self._inserts[self._index]
            out.append(rendering.single(frame, frame_depth(frame))[1])
            self._index += 1

    def _close(self, out: list[bytes]) -> None:
        """What stands behind a value, and behind every array that it ends."""
        stack = self._stack
        while True:
            depth = len(stack)
            if depth == self._item_depth:
                out.append(b"}")
            if not depth:
                break
            stack[-1] -= 1
            if stack[-1]:
                return
            stack.pop()
            self._fresh = False
            out.append(b"]")
        if self._inserts is not None:
            self._insert(out)
            if self._index == self._count:
                out.append(b"]")

    def _body(self, out: list[bytes], data: bytes, position: int, size: int) -> int:
        take = min(size - position, self._body_left - 2)
        if take:
            out.append(self._text(data[position : position + take], final=False))
            self._body_left -= take
            position += take
        if self._body_left == 2 and size - position >= 2:
            out.append(self._text(b"", final=True))
            out.append(b'"')
            self._body_left = 0
            position += 2
            self._close(out)
        return position

    def _text(self, piece: bytes, *, final: bool) -> bytes:
        if self._base64:
            piece = self._carry + piece
            if self._ok:
                # A two-byte value is held back whole: a top-level OK is not encoded.
                self._carry = b"" if final else piece
                return b"" if not final else b"OK" if piece == b"OK" else binascii.b2a_base64(piece, newline=False)
            cut = len(piece) if final else len(piece) - len(piece) % 3
            self._carry = piece[cut:]
            return binascii.b2a_base64(piece[:cut], newline=False)
        assert self._decoder is not None
        return _encode_text(self._decoder.decode(piece, final))[1:-1]


JSON: Final = JsonRendering()
BASE64: Final = JsonRendering(base64=True)
RESP2: Final = Resp2Rendering()
