"""ASGI 3 applications on the gateway's HTTP server: the standard interface, where speed does not matter.

https://asgi.readthedocs.io/en/stable/specs/www.html. The body has arrived when
the application begins; an answer in one piece leaves with its length, one in
several pieces is chunked and waits for a reader that is slow. Requests that a
client pipelines to an application are answered one after the other, because
the second may depend on what the first does.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from redisgate.counters import CONTROL
from redisgate.exchange import RETRY_AFTER, Exchange, Pieces
from redisgate.http_head import Head, header_fields
from redisgate.replies import JSON

if TYPE_CHECKING:
    from redisgate.http_protocol import HttpConnection

MAX_REQUESTS = 512
"""Requests to the application under way in one worker; more are answered 503."""

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# What the server says itself.
_OWN_HEADERS = frozenset(
    (b"connection", b"content-length", b"content-type", b"date", b"keep-alive", b"server", b"transfer-encoding")
)

log = logging.getLogger(__name__)


class AsgiServer:
    """Runs one application for one worker."""

    def __init__(self, app: Application, busy: bytes) -> None:
        """`busy` is the JSON body of the answer when too many requests are under way."""
        self._app = app
        self._busy = busy
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(
        self, connection: "HttpConnection", method: bytes, path: bytes, query: bytes, head: Head, body: bytes
    ) -> None:
        """Answer one whole request; `path` as it came, percent signs and all."""
        if len(self._tasks) >= MAX_REQUESTS:
            Exchange(connection, head, method).respond(503, self._busy, b"application/json", RETRY_AFTER)
            return
        exchange = AsgiExchange(connection, head, method, body)
        connection.hold(lambda: None, -1)
        task = asyncio.get_running_loop().create_task(
            exchange.run(self._app, _scope(connection, method, path, query, head))
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self, seconds: float) -> None:
        """Wait for what is under way, `seconds` at most; then end it."""
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=seconds)
            for task in left:
                task.cancel()


def _scope(connection: "HttpConnection", method: bytes, path: bytes, query: bytes, head: Head) -> Scope:
    transport = connection.transport
    peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": head.version[5:].decode(),
        "method": method.decode().upper(),
        "scheme": "http" if transport.get_extra_info("sslcontext") is None else "https",
        "path": unquote_to_bytes(path).decode("utf-8", "replace"),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": header_fields(head),
        "client": (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None,
        "server": (str(own[0]), int(own[1])) if isinstance(own, tuple) else None,
    }


class AsgiExchange(Exchange):
    """A request that an application answers."""

    __slots__ = ("_body", "_chunks", "_content_type", "_endless", "_gone", "_headers", "_ready", "_status")

    def __init__(self, connection: "HttpConnection", head: Head, method: bytes, body: bytes) -> None:
        super().__init__(connection, head, method)
        self.route = CONTROL
        self.rendering = JSON  # of an error of ours
        self._body: bytes | None = body  # until the application took it
        self._gone = asyncio.Event()  # the client has left, or the answer is complete
        # The answer
        self._status = 0
        self._content_type = b"text/plain"
        self._headers = b""
        self._chunks: Pieces | None = None  # an answer in several pieces has begun
        self._ready: asyncio.Future[None] | None = None  # the client takes what was sent
        self._endless = False

    @property
    def endless(self) -> bool:  # type: ignore[override]
        """The answer goes on until the client leaves."""
        return self._endless

    async def run(self, app: Application, scope: Scope) -> None:
        """Have the application answer; never raises."""
        try:
            await app(scope, self._to_app, self._from_app)
            if not self.gone:
                raise RuntimeError("the application ended without a complete answer")
        except asyncio.CancelledError:
            self._give_up(None)
            raise
        except Exception as error:
            self._give_up(error)
        finally:
            self._gone.set()

    def _give_up(self, error: Exception | None) -> None:
        connection = self.connection
        if connection is None:
            if error is not None and not isinstance(error, OSError):
                log.error("an application failed after its answer was complete or its client had left", exc_info=error)
            return
        connection.release()
        if self._chunks is not None:
            if error is not None:
                log.error("an application failed in the middle of its answer", exc_info=error)
            self._break_off()
        elif error is None:
            self.error(503, b"ERR the gateway is restarting; try again", RETRY_AFTER)
        else:
            self.bug(error)

    # The application's two ends

    async def _to_app(self) -> Message:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _from_app(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            if self._status:
                raise RuntimeError("a second http.response.start")
            self._status = message["status"]
            self._take_headers(message.get("headers", ()))
        elif kind == "http.response.body":
            if not self._status:
                raise RuntimeError("http.response.body before http.response.start")
            await self._send_body(bytes(message.get("body", b"")), bool(message.get("more_body", False)))
        else:
            raise RuntimeError(f"unexpected message {kind}")

    def _take_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        lines: list[bytes] = []
        for name, value in headers:
            lowered = bytes(name).lower()
            if b"\r" in value or b"\n" in value or b"\0" in value:
                raise ValueError(f"a line end in the header {lowered.decode()}")
            if lowered == b"content-type":
                self._content_type = bytes(value)
                self._endless = self._content_type.startswith(b"text/event-stream")
            elif lowered == b"x-request-id" and self._head.request_id:
                pass  # every answer repeats what the client brought
            elif lowered not in _OWN_HEADERS:
                lines.append(b"%b: %b\r\n" % (name, value))
        self._headers = b"".join(lines)

    async def _send_body(self, body: bytes, more: bool) -> None:
        connection = self.connection
        if connection is None:
            raise OSError("the client has left")
        if self._chunks is None and not more:
            connection.release()
            self._gone.set()
            self.respond(self._status, body, self._content_type, self._headers)
            return
        head = b""
        if self._chunks is None:
            self._chunks = self._pieces = Pieces()
            self._chunks.started = True
            head = self._chunked_head(connection)
        chunked = self._head.version == b"HTTP/1.1"
        if self._method == b"HEAD":
            body = b""
        elif chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        if not more:
            connection.release()
            self._gone.set()
            self._connection = None
            if not self._endless:
                self._count(connection.server.counters, self._status, 0)
            connection.answered(self, self._chunks.waiting + head + body)
            return
        if connection.exchanges[0] is not self:
            self._chunks.waiting += head + body
            await self._until_ready()
        else:
            connection.send(head + body)
            if connection.write_paused:
                await self._until_ready()

    def _chunked_head(self, connection: "HttpConnection") -> bytes:
        if self._head.version == b"HTTP/1.1":
            framing = b"Transfer-Encoding: chunked\r\n"
            if connection.closing or connection.server.draining:
                framing += self._close_line(connection)
        else:
            framing = b"Connection: close\r\n"
            connection.closing = True
        if self._endless:
            self._count(connection.server.counters, self._status, 0)  # its latency is the time until it began
        if connection.server.access_log is not None:
            connection.server.access_log.answered(self, self._status, b"")
        start = connection.server.heads.start(self._status, self._content_type)
        return b"".join((start, self._head.extra, self._headers, framing, b"\r\n"))

    # The client's end

    async def _until_ready(self) -> None:
        """Until the client takes more. Raises OSError when it has left."""
        self._ready = asyncio.get_running_loop().create_future()
        try:
            await self._ready
        finally:
            self._ready = None
        if self.connection is None:
            raise OSError("the client has left")

    def _wake(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def at_front(self) -> None:
        connection, chunks = self.connection, self._chunks
        if connection is None or chunks is None:
            return
        if chunks.waiting:
            body, chunks.waiting = chunks.waiting, b""
            connection.send(body)
        if not connection.write_paused:
            self._wake()

    def client_slow(self) -> None:
        """`_send_body` sees it."""

    def client_ready(self) -> None:
        self._wake()

    def client_gone(self) -> None:
        super().client_gone()
        self._gone.set()
        self._wake()

    def drain(self) -> None:
        if self._endless:
            self._gone.set()
