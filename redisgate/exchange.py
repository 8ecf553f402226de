"""One request and its answer.

An exchange is what waits for Redis on one side and has its place in the
connection's order on the other: one object for both.
"""

import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from redisgate.http_head import Head
from redisgate.replies import JSON, JsonRendering, Rendering, ReplyStream
from resp.connection import Connection, Waiter
from resp.errors import ProtocolError, ReplyTimeout, RespError, Unavailable

if TYPE_CHECKING:
    from redisgate.http_protocol import HttpConnection

RETRY_AFTER = b"Retry-After: 1\r\n"

log = logging.getLogger(__name__)


class Exchange(Waiter):
    """A single command, or a request that is none."""

    endless = False
    """The answer goes on until the client leaves."""

    __slots__ = (
        "_close",
        "_connection",
        "_head",
        "_method",
        "_redis",
        "_started",
        "_stream",
        "_waiting_body",
        "rendering",
        "waiting_payload",
    )

    def __init__(self, connection: "HttpConnection", head: Head, method: bytes) -> None:
        self.count = 1
        self._connection: HttpConnection | None = connection  # None: answered, or the client has gone
        self._close = connection.closing  # the last answer on its connection
        self._head = head
        self._method = method
        self.rendering: Rendering = head.rendering
        self.waiting_payload: bytes | None = None  # a response whose turn has not come
        self._redis: Connection | None = None  # streams to us
        self._stream: ReplyStream | None = None
        self._started = False  # a streamed response has begun
        self._waiting_body = b""  # of a streamed response whose turn has not come
        connection.exchanges.append(self)

    # Answers from here

    def respond(self, status: int, body: bytes, content_type: bytes, headers: bytes = b"") -> None:
        """Answer with a whole response; `headers` are further header lines with their CRLF."""
        connection = self._connection
        if connection is None:
            return
        self._connection = None
        head = self._head
        server = connection.server
        if server.draining and connection.exchanges[-1] is self:
            self._close = connection.closing = True
        connection.answered(
            self,
            b"%b%b%bContent-Length: %d\r\n\r\n%b"
            % (
                server.heads.start(status, content_type),
                head.extra + b"Connection: close\r\n" if self._close else head.extra,
                headers,
                len(body),
                b"" if self._method == b"HEAD" else body,
            ),
        )

    def error(self, status: int, line: bytes, headers: bytes = b"") -> None:
        """Answer with an error line."""
        self.respond(status, self.rendering.error(line), self.rendering.content_type, headers)

    def bug(self, error: Exception) -> None:
        """Answer for a mistake of ours: an opaque id for the client, the traceback in the log."""
        reference = secrets.token_hex(6)
        log.error("internal error %s", reference, exc_info=error)
        if self._started:
            self._break_off()
        else:
            self.error(500, b"ERR internal error, reference %b; it is in the log" % reference.encode())

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
        if self._started:
            self._break_off()
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
        self._redis = connection
        self._stream = self._make_stream()
        if self._connection.exchanges[0] is not self:
            connection.pause_reading()  # until the answers before this one have left

    def stream_data(self, data: bytes) -> None:
        if self._connection is None or self._stream is None:
            return
        try:
            body = self._stream.feed(data)
        except ProtocolError:
            self._break_off()
        except Exception as error:
            self.bug(error)
        else:
            if self._stream.status:
                self._send(body)

    def stream_ended(self) -> None:
        self._redis = None
        connection = self._connection
        if connection is None:
            return
        payload = self._waiting_body
        if self._head.version == b"HTTP/1.1" and self._method != b"HEAD":
            payload += b"0\r\n\r\n"
        self._connection = None
        connection.answered(self, payload)

    def _send(self, body: bytes) -> None:
        connection = self._connection
        assert connection is not None
        assert connection.transport is not None
        assert self._stream is not None
        head = b""
        if not self._started:
            self._started = True
            head = self._stream_head(self._stream.status)
        if self._method == b"HEAD" or not body:
            body = b""
        elif self._head.version == b"HTTP/1.1":
            body = b"%x\r\n%b\r\n" % (len(body), body)
        if connection.exchanges[0] is self:
            connection.transport.write(head + body)
        else:
            self._waiting_body += head + body

    def at_front(self) -> None:
        """All answers before this one have left."""
        if self._waiting_body and self._connection is not None and self._connection.transport is not None:
            body, self._waiting_body = self._waiting_body, b""
            self._connection.transport.write(body)
        if self._redis is not None and not (self._connection and self._connection.write_paused):
            self._redis.resume_reading()

    def _stream_head(self, status: int) -> bytes:
        connection = self._connection
        assert connection is not None
        if self._head.version == b"HTTP/1.1":
            framing = b"Transfer-Encoding: chunked\r\n"
            if self._close:
                framing += b"Connection: close\r\n"
        else:
            framing = b"Connection: close\r\n"  # HTTP/1.0: the end of the connection is the end of the body
            connection.closing = True
        return b"%b%b%b\r\n" % (
            connection.server.heads.start(status, self.rendering.content_type),
            self._head.extra,
            framing,
        )

    def _break_off(self) -> None:
        """End a response that cannot be finished, so that nobody takes it for whole."""
        connection, redis = self._connection, self._redis
        self._connection = self._redis = None
        if redis is not None:
            redis.abandon(self)
        if connection is not None:
            connection.reset()

    # The client

    def client_slow(self) -> None:
        """The client does not take what it was sent."""
        if self._redis is not None:
            self._redis.pause_reading()

    def client_ready(self) -> None:
        """It does again."""
        if self._redis is not None:
            self._redis.resume_reading()

    def client_gone(self) -> None:
        """The connection is closed; what Redis still answers is thrown away."""
        self._connection = None
        redis, self._redis = self._redis, None
        if redis is not None:
            redis.abandon(self)

    def drain(self) -> None:
        """The worker is stopping; what ends by itself may finish."""


class PipelineExchange(Exchange):
    """A `/pipeline`: replies to `count` commands, with frames between them that did not come from Redis."""

    __slots__ = ("inserts",)

    def __init__(self, connection: "HttpConnection", head: Head, method: bytes) -> None:
        super().__init__(connection, head, method)
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
        if not isinstance(self.rendering, JsonRendering):
            self.rendering = JSON

    def _render(self, frames: bytes, depth: int) -> tuple[int, bytes]:
        assert isinstance(self.rendering, JsonRendering)
        return self.rendering.transaction(frames, self.count, depth)

    def _make_stream(self) -> ReplyStream:
        assert isinstance(self.rendering, JsonRendering)
        return self.rendering.transaction_stream(self.count)
