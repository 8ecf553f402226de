"""What the head of an HTTP/1.1 request says, strictly.

RFC 9112. httptools (llhttp) reads the header fields; what it lets pass and
two servers might read differently is refused here. The header block of a
connection's next request is nearly always the same bytes as the last one's,
so a `Head` is made per distinct block, not per request.
"""

import re
from typing import Any, Final

import httptools


class HttpError(Exception):
    """The request cannot be answered as asked: `status`, and a text for the client. Its connection is closed."""

    def __init__(self, status: int, message: str, headers: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers


class Head:
    """A header block, with the empty line that ends it, and its meaning.

    The next request of a client nearly always has the same block, except that the official clients send back the sync
    token of the last response; it means nothing here, so any other of the same length will do in its place.
    """

    __slots__ = (
        "authorization",
        "chunked",
        "content_length",
        "encoding",
        "expect_continue",
        "extra",
        "grant",
        "host",
        "keep_alive",
        "origin",
        "preflight",
        "problem",
        "rendering",
        "request_id",
        "response_format",
        "revision",
        "size",
        "start",
        "tail",
        "trace_id",
        "traceparent",
        "version",
    )

    def __init__(self, block: bytes, version: bytes) -> None:
        self.start, self.tail = split_block(block)
        self.size = len(block)
        self.version = version
        self.host = b""
        self.authorization: bytes | None = None
        self.content_length = 0
        self.chunked = False
        self.expect_continue = False
        self.keep_alive = version == b"HTTP/1.1"
        self.encoding: bytes | None = None
        self.response_format: bytes | None = None
        self.origin: bytes | None = None
        self.preflight = False
        self.request_id = b""  # the client's, fit to be repeated; or nothing
        self.traceparent = b""  # the same
        self.trace_id = b""  # of `traceparent`: 32 hexadecimal digits
        # What the gateway derives from the above, once:
        self.extra = b""  # header lines for every response to such a request
        self.grant: Any = None
        self.revision = -1  # of the access table that `grant` is from
        self.rendering: Any = None
        self.problem: bytes | None = None  # an error line: what is wrong with the headers that say how to answer

    def ends(self, data: bytes) -> bool:
        """Whether `data`, which begins with `start`, goes on with a sync token and `tail`."""
        tail_at = self.size - len(self.tail)
        return data.startswith(self.tail, tail_at) and data[len(self.start) : tail_at].isalnum()


def split_block(block: bytes) -> tuple[bytes, bytes]:
    """What is before the value of a sync token, and what is behind it; the whole block and nothing if it has none."""
    match = _SYNC_TOKEN.search(block)
    return (block, b"") if match is None else (block[: match.start(1)], block[match.end(1) :])


_SYNC_TOKEN: Final = re.compile(rb"\r\nupstash-sync-token: ?([0-9A-Za-z]+)\r\n", re.IGNORECASE)
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
# Version 00 of https://www.w3.org/TR/trace-context/#traceparent-header.
_TRACEPARENT: Final = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_NO_TRACE: Final = b"0" * 32
_HOST: Final = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
_DIGITS: Final = re.compile(rb"[0-9]{1,18}")


class _Fields:
    """Collects what httptools finds."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value))


def parse_head(block: bytes, version: bytes) -> Head:
    """Interpret a header block: everything from the CRLF behind the request line to the empty line's CRLF.

    Raises:
        HttpError: 400 for what is malformed or ambiguous, 417 for an unknown expectation.
    """
    collector = _Fields()
    parser = httptools.HttpRequestParser(collector)
    try:
        parser.feed_data(b"POST / HTTP/1.1" + block)
    except httptools.HttpParserUpgrade:
        pass  # RFC 9110 section 7.8: a server may ignore Upgrade
    except httptools.HttpParserError as error:
        raise HttpError(400, f"malformed header: {error}") from error
    head = Head(block, version)
    hosts = 0
    lengths = 0
    for name, value in collector.fields:
        if name == b"host":
            hosts += 1
            head.host = value.strip()
        elif name == b"authorization":
            if head.authorization is not None:
                raise HttpError(400, "more than one Authorization header")
            head.authorization = value
        elif name == b"content-length":
            lengths += 1
            if _DIGITS.fullmatch(value) is None:
                raise HttpError(400, "malformed Content-Length")
            head.content_length = int(value)
        elif name == b"transfer-encoding":
            if head.chunked or value.strip().lower() != b"chunked":
                raise HttpError(400, "unsupported Transfer-Encoding; only chunked is understood")
            head.chunked = True
        elif name == b"connection":
            options = {option.strip() for option in value.lower().split(b",")}
            if b"close" in options:
                head.keep_alive = False
            elif b"keep-alive" in options and version == b"HTTP/1.0":
                head.keep_alive = True
        elif name == b"expect":
            if value.strip().lower() != b"100-continue":
                raise HttpError(417, "unknown expectation")
            head.expect_continue = version == b"HTTP/1.1"
        elif name == b"upstash-encoding":
            head.encoding = value.strip()
        elif name == b"upstash-response-format":
            head.response_format = value.strip()
        elif name == b"origin":
            head.origin = value.strip()
        elif name == b"access-control-request-method":
            head.preflight = True
        elif name == b"x-request-id":
            if _REQUEST_ID.fullmatch(value.strip()) is not None:
                head.request_id = value.strip()
        elif name == b"traceparent":
            trace = _TRACEPARENT.fullmatch(value.strip())
            if trace is not None and trace[1] != _NO_TRACE and trace[2] != _NO_TRACE[:16]:
                head.traceparent, head.trace_id = value.strip(), trace[1]
    if hosts != 1 and (hosts or version == b"HTTP/1.1"):
        raise HttpError(400, "a request needs exactly one Host header")
    if _HOST.fullmatch(head.host) is None:
        raise HttpError(400, "malformed Host header")
    if lengths > 1 or (lengths and head.chunked):
        raise HttpError(400, "ambiguous body length")
    if head.chunked and version != b"HTTP/1.1":
        raise HttpError(400, "Transfer-Encoding needs HTTP/1.1")
    return head


def header_fields(head: Head) -> list[tuple[bytes, bytes]]:
    """All fields of a header block that was understood: names in lower case, in their order.

    The value of a sync token, which a `Head` does not keep, is empty.
    """
    collector = _Fields()
    try:
        httptools.HttpRequestParser(collector).feed_data(b"POST / HTTP/1.1" + head.start + head.tail)
    except httptools.HttpParserUpgrade:
        pass
    return collector.fields


class ChunkedBody:
    """Decodes a chunked body that comes in pieces (RFC 9112 section 7.1), strictly."""

    __slots__ = ("_buffer", "_left", "_state", "_trailer_bytes", "parts", "received")

    MAX_LINE_BYTES = 4096
    """A chunk's size line with its extensions, and all trailer fields together."""

    _SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?")

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.received = 0
        self._buffer = b""
        self._left = 0
        self._state = "size"
        self._trailer_bytes = 0

    def feed(self, data: bytes, limit: int) -> bytes | None:
        """Take the next piece. Returns the bytes behind the body once it has ended, else None.

        Raises:
            HttpError: 400 when malformed, 413 when the body exceeds `limit` bytes.
        """
        data = self._buffer + data if self._buffer else data
        self._buffer = b""
        position = 0
        while True:
            if self._state == "data":
                piece = data[position : position + self._left]
                if piece:
                    self.parts.append(piece)
                    self._left -= len(piece)
                    position += len(piece)
                if self._left:
                    return None
                if len(data) - position < 2:
                    self._buffer = data[position:]
                    return None
                if data[position : position + 2] != b"\r\n":
                    raise HttpError(400, "malformed chunk")
                position += 2
                self._state = "size"
            end = data.find(b"\r\n", position)
            if end < 0:
                self._buffer = data[position:]
                if len(self._buffer) > self.MAX_LINE_BYTES or b"\n" in self._buffer:
                    raise HttpError(400, "malformed chunk size")
                return None
            line = data[position:end]
            position = end + 2
            if self._state == "trailer":
                if not line:
                    return data[position:]
                self._trailer_bytes += len(line)
                if self._trailer_bytes > self.MAX_LINE_BYTES or b"\n" in line or b":" not in line:
                    raise HttpError(400, "malformed trailer")
                continue
            match = self._SIZE.fullmatch(line) if len(line) <= self.MAX_LINE_BYTES else None
            if match is None:
                raise HttpError(400, "malformed chunk size")
            self._left = int(match[1], 16)
            self.received += self._left
            if self.received > limit:
                raise HttpError(413, f"max request size exceeded. Limit: {limit} bytes, Actual: {self.received} bytes")
            self._state = "data" if self._left else "trailer"
