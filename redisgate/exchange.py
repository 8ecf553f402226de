"""One request and its answer.

An exchange is what waits for Redis on one side and has its place in the
connection's order on the other: one object for both.
"""

import logging
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from redisgate.counters import OTHER, PIPELINE, TRANSACTION, Counters, InstanceCounters, Series
from redisgate.http_head import Head
from redisgate.http_response import length_line
from redisgate.replies import JSON, JsonRendering, Rendering, ReplyStream
from resp.connection import Connection, Waiter
from resp.errors import LoginRefused, ReplyTimeout, RespError, Unavailable

if TYPE_CHECKING:
    from redisgate.access import Limiter
    from redisgate.http_protocol import HttpConnection

MAX_JOINED_BYTES: Final = 16 * 1024
"""Bodies up to this are copied behind their heads; larger ones are handed to the transport as they are."""
RETRY_AFTER: Final = b"Retry-After: 1\r\n"
UNAUTHORIZED_LINE: Final = b"WRONGPASS invalid or missing auth token"

log = logging.getLogger(__name__)


class Pieces:
    """What a response that leaves in pieces needs beside what every exchange has."""

    __slots__ = ("redis", "started", "status", "stream", "waiting")

    def __init__(self) -> None:
        self.redis: Connection | None = None  # that the pieces come from
        self.stream: ReplyStream | None = None  # that renders them
        self.started = False  # the response has begun
        self.status = 0  # of it
        self.waiting = b""  # what was rendered before its turn


class Exchange(Waiter):
    """A single command, or a request that is none."""

    endless = False
    """The answer goes on until the client leaves."""

    __slots__ = (
        "_connection",
        "_head",
        "_limiter",
        "_method",
        "_pieces",
        "began",
        "instance",
        "rendering",
        "route",
        "series",
        "target",
        "trace",
        "waiting_payload",
    )

    def __init__(self, connection: "HttpConnection", head: Head, method: bytes) -> None:
        self.count = 1
        self._connection: HttpConnection | None = connection  # None: answered, or the client has gone
        self._head = head
        self._method = method
        self.target = connection.target
        """Of the request, as it came; not for any log without `redisgate.logs.safe_target`."""
        self.rendering: Rendering = head.rendering
        self.waiting_payload: bytes | None = None  # a response whose turn has not come
        self._pieces: Pieces | None = None  # of a response that leaves in pieces
        self._limiter: Limiter | None = None  # that hears of the answer
        self.began = time.perf_counter_ns()
        # What counts the answer: `redisgate.counters`
        self.route = OTHER
        self.series: Series | None = None  # None: its route's
        self.instance: InstanceCounters | None = None
        self.trace: Any = connection.trace  # of `redisgate.tracing`, where the request is traced
        connection.exchanges.append(self)

    def meter(self, limiter: "Limiter") -> None:
        """Let `limiter` hear of the answer, and the answer say how much is left."""
        self._limiter = limiter

    def _count(self, counters: Counters, status: int, size: int) -> None:
        """It was answered with a body of so many bytes."""
        nanos = time.perf_counter_ns() - self.began
        limiter = self._limiter
        if limiter is not None and limiter.cell is not None:
            limiter.cell.answered(nanos, status, size)
        trace_id: bytes = b"" if self.trace is None else self.trace.trace_id
        counters.answered(self.route, self._method, status, nanos, size, self.series, self.instance, trace_id)

    # Answers from here

    def respond(self, status: int, body: bytes, content_type: bytes, headers: bytes = b"") -> None:
        """Answer with a whole response; `headers` are further header lines with their CRLF."""
        connection = self._connection
        if connection is None:
            return
        self._connection = None
        server = connection.server
        self._count(server.counters, status, len(body))
        limiter = self._limiter
        if limiter is not None and limiter.limited:
            headers = limiter.headers() + headers
        if self.trace is not None:
            headers = self.trace.header + headers
        extra = self._head.extra + headers if headers else self._head.extra
        if connection.closing or server.draining:
            extra += self._close_line(connection)
        length = len(body)
        if self._method == b"HEAD":
            body = b""
        heads = server.heads
        token = heads.next_token()
        lines = heads.ok_lines.get(content_type) if status == 200 else None
        if lines is None:
            lines = heads.lines(status, content_type)
            if server.access_log is not None:
                server.access_log.answered(self, status, heads.whole_token(token))
        if length > MAX_JOINED_BYTES:
            connection.answered(self, b"".join((lines, token, extra, length_line(length))), body)
        else:
            connection.answered(self, b"".join((lines, token, extra, length_line(length), body)))

    def respond_without_content(self, headers: bytes) -> None:
        """Answer with 204, which has no Content-Length (RFC 9110 section 8.6); `headers` with their CRLF."""
        connection = self._connection
        if connection is None:
            return
        self._connection = None
        self._count(connection.server.counters, 204, 0)
        heads = connection.server.heads
        token = heads.next_token()
        if connection.server.access_log is not None:
            connection.server.access_log.answered(self, 204, heads.whole_token(token))
        extra = self._head.extra + headers
        if connection.closing or connection.server.draining:
            extra += self._close_line(connection)
        connection.answered(self, b"%b%b%b\r\n" % (heads.lines(204, b"text/plain"), token, extra))

    def _close_line(self, connection: "HttpConnection") -> bytes:
        """The header line of the last answer on a connection; nothing for those before it."""
        if connection.exchanges[-1] is not self:
            return b""
        connection.closing = True
        return b"Connection: close\r\n"

    def error(self, status: int, line: bytes, headers: bytes = b"") -> None:
        """Answer with an error line."""
        self.respond(status, self.rendering.error(line), self.rendering.content_type, headers)

    def bug(self, error: Exception) -> None:
        """Answer for a mistake of ours: an opaque id for the client, the traceback in the log."""
        reference = secrets.token_hex(6)
        log.error("internal error %s", reference, exc_info=error)
        if self._pieces is not None and self._pieces.started:
            self._break_off()
        else:
            self.error(500, b"ERR internal error, reference %b; it is in the log" % reference.encode())

    def slow(self, seconds: float) -> None:
        connection = self._connection
        if connection is not None and connection.server.access_log is not None:
            connection.server.access_log.slow(self, seconds)

    @property
    def method(self) -> bytes:
        """The request's."""
        return self._method

    @property
    def head(self) -> Head:
        """The request's."""
        return self._head

    @property
    def instance_id(self) -> str | None:
        """Of the instance that it is for, if there is one."""
        grant = self._head.grant
        found: str | None = grant.instance_id if grant is not None else None
        return self.instance.id if found is None and self.instance is not None else found

    @property
    def gone(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._connection is None

    @property
    def connection(self) -> "HttpConnection | None":
        """The client's connection, until the answer was given."""
        return self._connection

    # Answers from Redis

    def reply(self, frames: bytes, depth: int) -> None:
        if self._connection is None:
            return
        try:
            status, body = self._render(frames, depth)
        except Exception as error:
            self.bug(error)
            return
        self.respond(status, body, self.rendering.content_type)

    def _render(self, frames: bytes, depth: int) -> tuple[int, bytes]:
        return self.rendering.single(frames, depth)

    def failed(self, error: RespError) -> None:
        if self._connection is None:
            return
        if self._pieces is not None and self._pieces.started:
            self._break_off()
        elif isinstance(error, LoginRefused):
            self.error(401, UNAUTHORIZED_LINE)
        elif isinstance(error, Unavailable):
            self.error(503, b"ERR %b" % str(error).encode(), RETRY_AFTER)
        elif isinstance(error, ReplyTimeout):
            self.error(504, b"ERR %b; the command may have run" % str(error).encode())
        else:
            self.error(502, b"ERR %b; the command may have run" % str(error).encode())

    # Replies in pieces

    def _make_stream(self) -> ReplyStream:
        return self.rendering.stream(1, None)

    def stream_started(self, connection: Connection) -> None:
        if self._connection is None:
            connection.abandon(self)
            return
        self._pieces = Pieces()
        self._pieces.redis = connection
        self._pieces.stream = self._make_stream()
        if self._connection.exchanges[0] is not self:
            connection.pause_reading()  # until the answers before this one have left

    def stream_data(self, data: bytes) -> None:
        if self._connection is None or self._pieces is None or self._pieces.stream is None:
            return
        stream = self._pieces.stream
        try:
            body = stream.feed(data)
        except Exception as error:
            self.bug(error)
            self._abandon()
        else:
            if stream.status:
                self._send(stream.status, body)

    def stream_ended(self) -> None:
        connection, pieces = self._connection, self._pieces
        if connection is None or pieces is None:
            return
        pieces.redis = None
        payload = pieces.waiting
        if self._head.version == b"HTTP/1.1" and self._method != b"HEAD":
            payload += b"0\r\n\r\n"
        self._connection = None
        self._count(connection.server.counters, pieces.status, 0)
        connection.answered(self, payload)

    def _send(self, status: int, body: bytes) -> None:
        connection, pieces = self._connection, self._pieces
        assert connection is not None
        assert pieces is not None
        head = b""
        if not pieces.started:
            pieces.started = True
            pieces.status = status
            head = self._stream_head(connection, status)
        if self._limiter is not None and self._limiter.cell is not None:
            self._limiter.cell.bytes_out += len(body)
        if self.instance is not None:
            self.instance.bytes_out += len(body)
        if self._method == b"HEAD" or not body:
            body = b""
        elif self._head.version == b"HTTP/1.1":
            body = b"%x\r\n%b\r\n" % (len(body), body)
        if connection.exchanges[0] is self:
            connection.send(head + body)
        else:
            pieces.waiting += head + body

    def at_front(self) -> None:
        """All answers before this one have left."""
        connection, pieces = self._connection, self._pieces
        if connection is None or pieces is None:
            return
        if pieces.waiting:
            body, pieces.waiting = pieces.waiting, b""
            connection.send(body)
        if pieces.redis is not None and not connection.write_paused:
            pieces.redis.resume_reading()

    def _stream_head(self, connection: "HttpConnection", status: int) -> bytes:
        if connection.server.access_log is not None:
            connection.server.access_log.answered(self, status, b"")
        if self._head.version == b"HTTP/1.1":
            framing = b"Transfer-Encoding: chunked\r\n"
            if connection.closing or connection.server.draining:
                framing += self._close_line(connection)
        else:
            framing = b"Connection: close\r\n"  # HTTP/1.0: the end of the connection is the end of the body
            connection.closing = True
        extra = self._head.extra
        if self._limiter is not None and self._limiter.limited:
            extra += self._limiter.headers()
        return b"%b%b%b\r\n" % (
            connection.server.heads.start(status, self.rendering.content_type),
            extra,
            framing,
        )

    def _break_off(self) -> None:
        """End a response that cannot be finished, so that nobody takes it for whole."""
        connection = self._connection
        self._abandon()
        if connection is not None:
            connection.server.counters.uncounted(self.route, self._method, 502)
            connection.reset()

    def _abandon(self) -> None:
        """Nobody waits any more; what Redis still sends is thrown away."""
        self._connection = None
        pieces = self._pieces
        if pieces is not None and pieces.redis is not None:
            redis, pieces.redis = pieces.redis, None
            redis.abandon(self)

    # The client

    def client_slow(self) -> None:
        """The client does not take what it was sent."""
        if self._pieces is not None and self._pieces.redis is not None:
            self._pieces.redis.pause_reading()

    def client_ready(self) -> None:
        """It does again."""
        if self._pieces is not None and self._pieces.redis is not None:
            self._pieces.redis.resume_reading()

    def client_gone(self) -> None:
        """The connection is closed."""
        connection = self._connection
        if connection is not None and (self._pieces is None or not self._pieces.started):
            connection.server.counters.uncounted(self.route, self._method, 499)
            if connection.server.access_log is not None:
                connection.server.access_log.answered(self, 499, b"")
        self._abandon()

    def drain(self) -> None:
        """The worker is stopping; what ends by itself may finish."""


class PipelineExchange(Exchange):
    """A `/pipeline`: replies to `count` commands, with frames between them that did not come from Redis."""

    __slots__ = ("inserts",)

    def __init__(self, connection: "HttpConnection", head: Head, method: bytes) -> None:
        super().__init__(connection, head, method)
        self.route = PIPELINE
        self.inserts: Mapping[int, bytes] = {}

    def _render(self, frames: bytes, depth: int) -> tuple[int, bytes]:
        return self.rendering.pipeline(frames, self.count, depth, self.inserts)

    def _make_stream(self) -> ReplyStream:
        return self.rendering.stream(self.count, self.inserts)


class TransactionExchange(Exchange):
    """A `/multi-exec`: replies to MULTI, the commands, EXEC. Always JSON."""

    __slots__ = ()

    def __init__(self, connection: "HttpConnection", head: Head, method: bytes) -> None:
        super().__init__(connection, head, method)
        self.route = TRANSACTION
        if not isinstance(self.rendering, JsonRendering):
            self.rendering = JSON

    def _render(self, frames: bytes, depth: int) -> tuple[int, bytes]:
        assert isinstance(self.rendering, JsonRendering)
        return self.rendering.transaction(frames, self.count, depth)

    def _make_stream(self) -> ReplyStream:
        assert isinstance(self.rendering, JsonRendering)
        return self.rendering.transaction_stream(self.count)
