"""HTTP connections: one object each, which frames requests and keeps answers in order.

A request whose header block equals its predecessor's on the connection is
framed without interpreting the block again. Requests may be pipelined; up to
a bound they are under way together, and their answers leave in order.

Whatever is ambiguous about where a request ends closes the connection: the
next bytes could be anybody's.
"""

import asyncio
import contextlib
import re
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from redisgate.config import Limits
from redisgate.counters import WORKER
from redisgate.http_head import ChunkedBody, Head, HttpError, parse_head, split_block
from redisgate.http_response import ResponseHeads
from redisgate.replies import JSON

if TYPE_CHECKING:
    from redisgate.exchange import Exchange
    from redisgate.streams import StreamExchange

ALLOW: Final = b"Allow: GET, HEAD, POST, PUT\r\n"
REQUEST_LINE_OVERHEAD: Final = 64
"""Bytes that method, version and spaces may add to a request target."""
MAX_UNPARSED_BYTES: Final = 64 * 1024
"""What is read ahead of the requests under way before reading pauses."""
MIN_BODY_BYTES_PER_SECOND: Final = 16 * 1024
"""A body has `body_timeout` seconds, and as many more as this rate gives what has come."""
DRAIN_GRACE_SECONDS: Final = 0.5
"""How long idle connections stay open when draining, for the request that may be on its way; answered, and closed."""
LINGER_SECONDS: Final = 2.0
"""How long the rest of a refused request is read and thrown away, so that the refusal is not lost to a reset."""
MAX_KNOWN_HEADS: Final = 1024
"""Header blocks whose meaning a worker remembers; new ones then push out all of them."""
MAX_KNOWN_HEAD_BYTES: Final = 2048
"""Larger header blocks are not remembered."""
WRITE_BUFFER_BYTES: Final = 256 * 1024
"""Answers that a client has not taken, beyond which its next request waits."""

_NEVER: Final = float("inf")
_REQUEST_LINE: Final = re.compile(rb"(GET|POST|PUT|HEAD) (/[^\x00-\x20\x7f]*) (HTTP/1\.[01])\r\n").match
_ABSOLUTE_FORM: Final = re.compile(
    rb"([A-Za-z]+) (?i:https?)://([^/?#\x00-\x20\x7f]+)([^\x00-\x20\x7f]*) (HTTP/1\.[01])\r\n"
).match
_HOST_LINE: Final = re.compile(rb"\r\nhost:[^\r\n]*", re.IGNORECASE)
_BARE_LF: Final = re.compile(rb"(?<!\r)\n")
_CONTROLS: Final = re.compile(rb"[\x00-\x20\x7f]")


def _origin_form(data: bytes, absolute: re.Match[bytes]) -> bytes:
    """The same request with the target's host in its Host header, where it is read (RFC 9112 section 3.2.2)."""
    method, host, target, version = absolute.groups()
    if not target.startswith(b"/"):
        target = b"/" + target
    line_end = absolute.end() - 2
    block_end = data.index(b"\r\n\r\n", line_end)
    # A missing Host, or a second one, is refused as in any request.
    block = _HOST_LINE.sub(lambda match: b"\r\nHost: " + host, data[line_end:block_end], count=1)
    return b"%b %b %b%b%b" % (method, target, version, block, data[block_end:])


class Handler(Protocol):
    """Who answers requests: the gateway."""

    def prepare(self, head: Head) -> None:
        """Derive from a header block what every request with it needs; called before `handle`."""

    def handle(self, connection: "HttpConnection", method: bytes, target: bytes, head: Head, body: bytes) -> None:
        """Dispatch one whole request; it is answered through the exchange that is made for it."""


class AccessLog(Protocol):
    """Who hears of requests that are slow or fail: `redisgate.access_log`."""

    def slow(self, exchange: "Exchange", seconds: float) -> None:
        """It has waited for so long for Redis, and waits on."""

    def answered(self, exchange: "Exchange", status: int, answer: bytes) -> None:
        """It is being answered; called for every status but 200, and for some of those. 499: its client has left.

        `answer` is the answer's sync token, if it has one.
        """


class HttpServer:
    """What the HTTP connections of one worker share."""

    def __init__(self, gateway: Handler, limits: Limits, heads: ResponseHeads) -> None:
        self.gateway = gateway
        self.limits = limits
        self.heads = heads
        self.access_log: AccessLog | None = None
        self.counters = WORKER
        self.connections: set[HttpConnection] = set()
        self.streams: set[StreamExchange] = set()
        self.draining = False
        self.grace_over = False  # draining, and what has not come by now will not be taken
        self.now = time.monotonic()  # of the last sweep; good enough for time-outs
        self.idle_deadline = self.now + limits.idle_timeout
        self._heads: dict[tuple[bytes, bytes], Head] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._no_connections: asyncio.Event | None = None

    def protocol(self) -> Any:
        """For `loop.create_server`."""
        return HttpConnection(self)

    def head(self, block: bytes, version: bytes) -> Head:
        """The meaning of a header block, from memory where it is known. Raises HttpError."""
        key = split_block(block)
        head = self._heads.get(key)
        if head is None or head.version != version or head.size != len(block):
            head = parse_head(block, version)
            self.gateway.prepare(head)
            if len(block) <= MAX_KNOWN_HEAD_BYTES:
                if len(self._heads) >= MAX_KNOWN_HEADS:
                    self._heads.clear()
                self._heads[key] = head
        return head

    def start(self) -> None:
        """Begin to look for overdue connections, once a second."""
        self._timer = asyncio.get_running_loop().call_later(1.0, self._sweep)

    def closed(self, connection: "HttpConnection") -> None:
        """`connection` is gone."""
        self.connections.discard(connection)
        if self._no_connections is not None and not self.connections:
            self._no_connections.set()

    async def _drained(self, seconds: float) -> bool:
        self._no_connections = asyncio.Event()
        if not self.connections:
            return True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._no_connections.wait(), seconds)
        return not self.connections

    def _sweep(self) -> None:
        self.now = now = time.monotonic()
        self.idle_deadline = now + self.limits.idle_timeout
        self.heads.renew()
        for connection in [connection for connection in self.connections if connection.deadline < now]:
            connection.overdue()
        self.start()

    async def drain(self, seconds: float) -> int:
        """Answer what is under way or on its way, then close; returns how many were cut off after `seconds`."""
        self.draining = True
        for connection in list(self.connections):
            connection.drain()
        # A request may be on its way on a connection that looks idle, or was accepted a moment ago.
        if not await self._drained(min(DRAIN_GRACE_SECONDS, seconds)):
            self.grace_over = True
            for connection in list(self.connections):
                connection.close_if_idle()
            await self._drained(seconds - DRAIN_GRACE_SECONDS)
        left = len(self.connections)
        for connection in list(self.connections):
            connection.abort()
        if self._timer is not None:
            self._timer.cancel()
        return left


class HttpConnection:
    """One client connection: an `asyncio.Protocol` in all but name, since a class that is compiled has no such base."""

    __slots__ = (
        "_body",
        "_chunked",
        "_eof",
        "_head",
        "_held",
        "_held_behind",
        "_line",
        "_missing",
        "_paused",
        "_refusing",
        "_tail",
        "closing",
        "deadline",
        "exchanges",
        "on_writable",
        "route",
        "server",
        "target",
        "trace",
        "transport",
        "write_paused",
    )

    def __init__(self, server: HttpServer) -> None:
        self.server = server
        self.transport: asyncio.Transport  # from connection_made on
        self.exchanges: deque[Exchange] = deque()
        self.deadline = _NEVER
        self.target = b""  # of the last request
        self.trace: Any = None  # of the request that is being dispatched, where that is traced
        self.route: object = None  # the Redis connection that the requests under way went to
        # Per request
        self._head: Head | None = None  # of the last request
        self._line: tuple[bytes, bytes] | None = None  # method and target of a request whose body is awaited
        self._body: list[bytes] = []
        self._missing = 0
        self._chunked: ChunkedBody | None = None
        self._held: Callable[[], None] | None = None  # to be called once enough answers have left
        self._held_behind = 0  # exchanges that may still be under way then
        # Flow
        self._tail = b""  # received, not yet framed
        self._paused = False
        self._eof = False  # the client has closed its sending side
        self._refusing = False  # reads and throws away
        self.closing = False  # no further request is taken
        self.write_paused = False
        self.on_writable: Callable[[], None] | None = None

    # Events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's are not its subclasses
        self.transport = transport
        server = self.server
        if len(server.connections) >= server.limits.max_connections:
            server.counters.refused_connections += 1
            transport.abort()
            return
        server.counters.connections += 1
        server.connections.add(self)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.deadline = server.idle_deadline

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.closed(self)
        self.closing = True
        self.deadline = _NEVER
        self._tail = b""
        self._body = []
        self._held = None
        exchanges = list(self.exchanges)
        self.exchanges.clear()
        for exchange in exchanges:
            exchange.client_gone()

    def eof_received(self) -> bool:
        # A client may close its sending side and still wait for its answers, but not listen to a stream.
        self._eof = True
        if self.exchanges and self.exchanges[-1].endless:
            return False
        self._take_the_last()
        if self.transport.get_extra_info("sslcontext") is not None:
            return False  # under TLS there is no half of a connection to keep open
        return bool(self.exchanges or self._tail)

    def data_received(self, data: bytes) -> None:
        self.server.counters.bytes_in += len(data)
        if self._refusing:
            return
        if self._tail:
            data = self._tail + data
            self._tail = b""
        try:
            self._frame(data)
        except HttpError as error:
            self.refuse(error)

    def pause_writing(self) -> None:
        self.write_paused = True
        self.deadline = self.server.now + self.server.limits.write_timeout
        for exchange in self.exchanges:
            exchange.client_slow()
            break

    def resume_writing(self) -> None:
        self.write_paused = False
        self.deadline = _NEVER if self._line is None else self.server.now + self.server.limits.body_timeout
        for exchange in self.exchanges:
            exchange.client_ready()
            break
        self._settle()

    # Framing

    def _frame(self, data: bytes) -> None:
        """Dispatch the requests that are whole in `data`; keep the rest. Raises HttpError."""
        server = self.server
        limits = server.limits
        while data:
            if self._line is not None:
                rest = self._read_body(data)
                if rest is None:
                    return
                data = rest
                continue
            if self.closing:
                return
            if self._held is not None or self.write_paused or len(self.exchanges) >= limits.max_pipelined_requests:
                self._keep(data)
                return
            match = _REQUEST_LINE(data)
            if match is not None:
                method, target, version = match.groups()
                after_line = match.end() - 2
            elif data.startswith(b"\r\n"):
                data = data[2:]  # RFC 9112 section 2.2: an empty line before the request line
                continue
            elif b"\r\n\r\n" in data:
                absolute = _ABSOLUTE_FORM(data)
                if absolute is not None:
                    data = _origin_form(data, absolute)
                    continue
                method, target, version, after_line = self._unusual_line(data)
            else:
                self._await_head(data)
                return
            if len(target) > limits.max_target_bytes:
                raise HttpError(414, f"request target of more than {limits.max_target_bytes} bytes")
            # The headers are nearly always the last request's.
            rest = data[after_line:]
            head = self._head
            if (
                head is not None
                and rest.startswith(head.start)
                and head.version == version
                and (not head.tail or head.ends(rest))
            ):
                end = head.size
            else:
                end = rest.find(b"\r\n\r\n") + 4
                if end < 4:
                    self._await_head(data)
                    return
                head = self._interpret(rest[:end], version)
            # The body.
            length = head.content_length
            if length or head.chunked:
                if length > limits.max_body_bytes:
                    raise HttpError(
                        413, f"max request size exceeded. Limit: {limits.max_body_bytes} bytes, Actual: {length} bytes"
                    )
                if head.chunked or len(rest) - end < length:
                    self._begin_body(method, target, head)
                    data = rest[end:]
                    continue
                body = rest[end : end + length]
                end += length
            else:
                body = b""
            data = rest[end:]
            self.deadline = _NEVER
            if not head.keep_alive or server.draining:
                self.closing = True
            server.gateway.handle(self, method, target, head, body)
        if not self.exchanges and not self.write_paused:
            self.deadline = server.idle_deadline

    def _unusual_line(self, data: bytes) -> tuple[bytes, bytes, bytes, int]:
        """Method, target, version, and where the line ends, of a request line that `_REQUEST_LINE` does not match.

        Raises HttpError if it is malformed or nothing we answer.
        """
        limits = self.server.limits
        end = data.index(b"\r\n")
        if end > limits.max_target_bytes + REQUEST_LINE_OVERHEAD:
            raise HttpError(414, f"request target of more than {limits.max_target_bytes} bytes")
        parts = data[:end].split(b" ")
        if len(parts) != 3:
            raise HttpError(400, "malformed request line")
        method, target, version = parts
        if _CONTROLS.search(method + target + version):
            raise HttpError(400, "control characters in the request line")
        if version != b"HTTP/1.1" and version != b"HTTP/1.0":
            raise HttpError(400, "only HTTP/1.1 and HTTP/1.0 are understood")
        if not method.isalpha():
            raise HttpError(400, "malformed method")
        if method == b"CONNECT":
            raise HttpError(405, "CONNECT is not supported", ALLOW)
        if not target.startswith(b"/") and (method != b"OPTIONS" or target != b"*"):
            raise HttpError(400, "malformed request target")
        return method, target, version, end

    def _interpret(self, block: bytes, version: bytes) -> Head:
        """The head for a header block that is not the last request's. Raises HttpError."""
        limits = self.server.limits
        if len(block) > limits.max_header_bytes:
            raise HttpError(431, f"header block of more than {limits.max_header_bytes} bytes")
        self._head = None
        head = self._head = self.server.head(block, version)
        return head

    def _await_head(self, data: bytes) -> None:
        limits = self.server.limits
        line_end = data.find(b"\r\n")
        if line_end < 0:
            if len(data) > limits.max_target_bytes + REQUEST_LINE_OVERHEAD:
                raise HttpError(414, f"request target of more than {limits.max_target_bytes} bytes")
        elif len(data) - line_end > limits.max_header_bytes:
            raise HttpError(431, f"header block of more than {limits.max_header_bytes} bytes")
        if _BARE_LF.search(data):
            raise HttpError(400, "a line that ends without carriage return")
        if not self._tail and not self.exchanges and self.deadline > self.server.now + limits.header_timeout:
            self.deadline = self.server.now + limits.header_timeout
        self._tail = data

    def _begin_body(self, method: bytes, target: bytes, head: Head) -> None:
        self._line = method, target
        self._body = []
        self._missing = head.content_length
        self._chunked = ChunkedBody() if head.chunked else None
        if self.exchanges:
            # Answers leave in order, an interim one too; and the body's time begins when the client has them all.
            self.hold(self._await_body, 0)
        else:
            self._await_body()

    def _await_body(self) -> None:
        assert self._head is not None
        self.deadline = self.server.now + self.server.limits.body_timeout
        if self._head.expect_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_body(self, data: bytes) -> bytes | None:
        """Take what belongs to the body; returns what follows it once it is whole."""
        assert self._line is not None
        assert self._head is not None
        if self._chunked is not None:
            rest = self._chunked.feed(data, self.server.limits.max_body_bytes)
            self.deadline += len(data) / MIN_BODY_BYTES_PER_SECOND
            if rest is None:
                return None
            body = b"".join(self._chunked.parts)
        else:
            piece = data[: self._missing]
            self._body.append(piece)
            self._missing -= len(piece)
            self.deadline += len(piece) / MIN_BODY_BYTES_PER_SECOND
            if self._missing:
                return None
            rest = data[len(piece) :]
            body = b"".join(self._body)
        method, target = self._line
        self._forget_body()
        self.deadline = _NEVER
        if not self._head.keep_alive or self.server.draining:
            self.closing = True
        self.server.gateway.handle(self, method, target, self._head, body)
        return rest

    def _forget_body(self) -> None:
        """No body is awaited any more."""
        self._line = None
        self._body = []
        self._chunked = None
        if self._held is not None and self._held_behind == 0:
            self._held = None  # `_await_body`

    def _take_the_last(self) -> None:
        """After the client's end of file: frame what can be framed now; if that was all, its answers are the last."""
        self.data_received(b"")
        if self._tail and (
            self._held is not None
            or self.write_paused
            or len(self.exchanges) >= self.server.limits.max_pipelined_requests
        ):
            return  # whole requests may be left; their turn comes in `_go_on`
        self._forget_body()
        self._tail = b""
        self.closing = True

    def _keep(self, data: bytes) -> None:
        self._tail = data
        if len(data) > MAX_UNPARSED_BYTES and not self._paused and not self._eof:
            self._paused = True
            self.transport.pause_reading()

    # Order

    def hold(self, resume: Callable[[], None], behind: int = 1) -> None:
        """Call `resume` when at most `behind` exchanges are under way; dispatch no further request until then."""
        self._held = resume
        self._held_behind = behind

    def release(self) -> None:
        """Go on after a `hold` that nobody will resume."""
        self._held = None
        if self._tail:
            asyncio.get_running_loop().call_soon(self._go_on)

    def send(self, data: bytes) -> None:
        """Write a part of the answer whose turn it is."""
        self.server.counters.bytes_out += len(data)
        self.transport.write(data)

    def answered(self, exchange: "Exchange", payload: bytes, body: bytes = b"") -> None:
        """`payload` and then `body` are the whole response of `exchange`, or the last of it."""
        exchanges = self.exchanges
        if exchanges[0] is not exchange:
            exchange.waiting_payload = payload + body
            return
        exchanges.popleft()
        self.server.counters.bytes_out += len(payload) + len(body)
        if body:
            self.transport.writelines((payload, body))
        else:
            self.transport.write(payload)
        if exchanges or self._tail or self._held is not None or self.closing or self.write_paused:
            self._settle()
        else:
            self.deadline = self.server.idle_deadline

    def _settle(self) -> None:
        """After an answer: close, or go on with what waits."""
        exchanges = self.exchanges
        while exchanges and exchanges[0].waiting_payload is not None:
            self.send(exchanges.popleft().waiting_payload or b"")
        if exchanges:
            exchanges[0].at_front()
        if self._held is not None:
            if len(exchanges) <= self._held_behind and not self.write_paused:
                held, self._held = self._held, None
                held()
        elif not exchanges:
            if self.closing or self.server.grace_over:
                self.closing = True
                if self._refusing:
                    self._linger()
                elif self._line is None:
                    self.transport.close()
                    if not self.write_paused:  # which has a deadline of its own
                        self.deadline = self.server.now + self.server.limits.write_timeout
                return
            if not self.write_paused and self._line is None:
                self.deadline = self.server.idle_deadline
        if self._tail and self._held is None and not self.write_paused:
            # Not from here: a long run of pipelined requests would nest as deep as it is long.
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()
        if not self._eof:
            self.data_received(b"")
            return
        self._take_the_last()
        if not self.exchanges and not self._tail:
            self._settle()

    # Ends

    def refuse(self, error: HttpError) -> None:
        """Answer what cannot be framed, and take nothing more."""
        from redisgate.exchange import Exchange

        self.target = b""
        self.closing = True
        self._forget_body()
        self._tail = b""
        if not self.write_paused:
            self.deadline = _NEVER  # those before it are answered first
        head = Head(b"", b"HTTP/1.1")
        known = self._head
        head.rendering, head.extra = (known.rendering, known.extra) if known is not None else (JSON, b"")
        exchange = Exchange(self, head, b"GET")
        self._refusing = True
        exchange.error(error.status, b"ERR " + str(error).encode(), error.headers)

    def _linger(self) -> None:
        """After a refusal: close our side, and read on for a while."""
        if not self.transport.is_closing():
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.deadline = self.server.now + LINGER_SECONDS

    def overdue(self) -> None:
        """The deadline has passed."""
        if self.write_paused or self._refusing or not (self._tail or self._line):
            self.abort()
        elif not self.exchanges:
            self.refuse(HttpError(408, "the request did not arrive in time"))

    def drain(self) -> None:
        """The next request is the last; streams end now."""
        for exchange in list(self.exchanges):
            exchange.drain()

    def close_if_idle(self) -> None:
        """Close unless a request has at least begun."""
        if not self.exchanges and self._line is None and not self._tail:
            self.closing = True
            self.transport.close()

    def reset(self) -> None:
        """Close at once by RST, which no reader takes for the end of a body."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        self.closing = True
        self.transport.abort()
