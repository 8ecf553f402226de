"""Server-Sent Events: subscriptions and MONITOR as endless responses.

https://html.spec.whatwg.org/multipage/server-sent-events.html. A reader too
slow for what it listens to is cut off with a last event that says so.
"""

import asyncio
import re
from typing import TYPE_CHECKING

from redisgate.counters import STREAM
from redisgate.exchange import RETRY_AFTER, UNAUTHORIZED_LINE, Exchange, Pieces
from redisgate.http_head import Head
from redisgate.replies import JSON
from resp.errors import LoginRefused, RespError, Unavailable
from resp.monitor import MonitorHub
from resp.subscriptions import Message, SubscriptionHub

if TYPE_CHECKING:
    from redisgate.access import Grant
    from redisgate.http_protocol import HttpConnection

_LINE_END = re.compile(r"\r\n|\r|\n")
_HEARTBEAT = b": \n\n"
_HEADERS = b"Cache-Control: no-cache, no-transform\r\nX-Accel-Buffering: no\r\n"


def render_event(text: bytes) -> bytes:
    """One event whose data is `text`; each of its lines becomes a `data:` line."""
    decoded = text.decode("utf-8", "replace")
    return b"".join(b"data: %b\n" % line.encode() for line in _LINE_END.split(decoded)) + b"\n"


class StreamExchange(Exchange):
    """A request whose answer goes on until either side has had enough."""

    endless = True

    __slots__ = ("_ended", "_limit", "_progress", "grant")

    def __init__(self, connection: "HttpConnection", head: Head, method: bytes, limit: int) -> None:
        """`limit`: bytes the client may leave unread."""
        super().__init__(connection, head, method)
        self.route = STREAM
        self.rendering = JSON  # of an error before the stream begins; a stream is never encoded
        self._pieces = self._progress = Pieces()
        self._limit = limit
        self._ended = False
        self.grant: Grant | None = None  # what gives the right to it

    def may_go_on(self, grant: "Grant") -> bool:
        """Whether another grant gives the same right."""
        return self.grant is not None and grant.backend is self.grant.backend

    def revoke(self) -> None:
        """The right to it has ended."""
        self.grant = None
        if self._progress.started:
            self._cut_off("this token's access has ended")
        else:
            self.lost(Unavailable("this token's access has ended"))

    def emit(self, event: bytes) -> None:
        """Send one event; begin the response with the first."""
        connection = self._connection
        if connection is None or self._ended:
            return
        transport = connection.transport
        if transport.is_closing():
            return
        if connection.exchanges[0] is not self:
            self._progress.waiting += self._framed(event)
            if len(self._progress.waiting) > self._limit:
                self._cut_off("the reader is too slow")
            return
        connection.send(self._framed(event))
        if transport.get_write_buffer_size() > self._limit:
            self._cut_off("the reader is too slow")

    def _framed(self, event: bytes) -> bytes:
        head = b""
        if not self._progress.started:
            self._progress.started = True
            head = self._event_head()
        return head + (b"%x\r\n%b\r\n" % (len(event), event) if self._head.version == b"HTTP/1.1" else event)

    def _event_head(self) -> bytes:
        connection = self._connection
        assert connection is not None
        if self._method != b"HEAD" or not self._head.keep_alive:
            connection.closing = True
        self._count(connection.server.counters, 200, 0)  # its latency is the time until it began
        if connection.server.access_log is not None:
            connection.server.access_log.answered(self, 200, b"")
        return b"%b%b%b%b%b\r\n" % (
            connection.server.heads.start(200, b"text/event-stream"),
            self._head.extra,
            _HEADERS,
            b"Transfer-Encoding: chunked\r\n" if self._head.version == b"HTTP/1.1" else b"",
            b"Connection: close\r\n" if connection.closing else b"",
        )

    def _cut_off(self, reason: str) -> None:
        self.end(b"event: error\n" + render_event(b"ERR " + reason.encode()))

    def end(self, event: bytes) -> None:
        """Finish the response with a last event."""
        connection = self._connection
        if connection is None or self._ended:
            return
        payload = self._framed(event)
        self._ended = True
        if self._head.version == b"HTTP/1.1":
            payload += b"0\r\n\r\n"
        self._leave()
        self._connection = None
        connection.server.streams.discard(self)
        connection.release()  # so that it is closed after this answer
        connection.answered(self, self._progress.waiting + payload)

    def lost(self, error: RespError) -> None:
        """See `resp.subscriptions.Subscriber`."""
        if self._connection is None:
            return
        if self._progress.started:
            self._cut_off(str(error))
        else:
            connection = self._connection
            connection.server.streams.discard(self)
            connection.release()  # an error is an ordinary answer; requests may follow it
            if isinstance(error, LoginRefused):
                self.error(401, UNAUTHORIZED_LINE)
            elif isinstance(error, Unavailable) and str(error).startswith("NOPERM"):
                self.error(400, str(error).encode())
            else:
                self.error(503, b"ERR " + str(error).encode(), RETRY_AFTER)

    def client_gone(self) -> None:
        connection = self._connection
        if connection is not None:
            connection.server.streams.discard(self)
        super().client_gone()
        self._leave()

    def client_slow(self) -> None:
        """The bound of unread bytes decides, not the first full buffer."""

    def drain(self) -> None:
        if self._progress.started:
            self._cut_off("the gateway is restarting; connect again")
        else:
            self.lost(Unavailable("the gateway is restarting"))

    def heartbeat(self) -> None:
        """Keep proxies from closing a quiet stream."""
        if self._progress.started:
            self.emit(_HEARTBEAT)

    def _begin(self) -> bool:
        """Take the connection for the stream; False for HEAD, which is answered already."""
        connection = self._connection
        assert connection is not None
        if self._method == b"HEAD":
            head = self._event_head()
            self._connection = None
            connection.answered(self, head)
            return False
        connection.server.streams.add(self)
        connection.hold(lambda: None, -1)  # a stream is the last answer on its connection
        return True

    def _leave(self) -> None:
        raise NotImplementedError


class SubscriptionStream(StreamExchange):
    """`/subscribe` and `/psubscribe`."""

    __slots__ = ("_channels", "_confirmed", "_hub", "_pattern")

    def may_go_on(self, grant: "Grant") -> bool:
        refusal = grant.policy.stream_refusal(b"psubscribe" if self._pattern else b"subscribe")
        return super().may_go_on(grant) and refusal is None

    def begin(self, hub: SubscriptionHub, channels: list[bytes], *, pattern: bool) -> None:
        """Subscribe; the response begins when Redis has confirmed."""
        self._hub = hub
        self._channels = list(dict.fromkeys(channels))
        self._pattern = pattern
        self._confirmed = 0
        if self._begin():
            hub.subscribe(self, self._channels, pattern=pattern)

    def subscribed(self, channel: bytes, pattern: bool) -> None:
        """See `resp.subscriptions.Subscriber`."""
        self._confirmed += 1
        kind = b"psubscribe" if pattern else b"subscribe"
        self.emit(render_event(b"%b,%b,%d" % (kind, channel, self._confirmed)))

    def deliver(self, message: Message) -> None:
        """See `resp.subscriptions.Subscriber`."""
        if message.rendered is None:
            if message.pattern is None:
                text = b"message,%b,%b" % (message.channel, message.payload)
            else:
                text = b"pmessage,%b,%b,%b" % (message.pattern, message.channel, message.payload)
            message.rendered = render_event(text)
        self.emit(message.rendered)

    def _leave(self) -> None:
        self._hub.unsubscribe(self, self._channels, pattern=self._pattern)


class MonitorStream(StreamExchange):
    """`/monitor`."""

    __slots__ = ("_hub",)

    def may_go_on(self, grant: "Grant") -> bool:
        return super().may_go_on(grant) and grant.policy.stream_refusal(b"monitor") is None

    def begin(self, hub: MonitorHub) -> None:
        """Watch; the response begins when Redis has confirmed."""
        self._hub = hub
        if self._begin():
            hub.watch(self)

    def subscribed(self, channel: bytes, pattern: bool) -> None:
        """See `resp.subscriptions.Subscriber`."""
        self.emit(b'data: "OK"\n\n')

    def deliver(self, message: Message) -> None:
        """See `resp.subscriptions.Subscriber`."""
        if message.rendered is None:
            message.rendered = render_event(message.payload)
        self.emit(message.rendered)

    def _leave(self) -> None:
        self._hub.leave(self)


class Heartbeat:
    """Writes a comment line to every stream of a worker, each `interval` seconds."""

    def __init__(self, streams: set[StreamExchange], interval: float) -> None:
        self._streams = streams
        self._interval = interval
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Arm the timer on the running loop."""
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._beat)

    def _beat(self) -> None:
        for stream in list(self._streams):
            stream.heartbeat()
        self.start()

    def stop(self) -> None:
        """Disarm the timer."""
        if self._timer is not None:
            self._timer.cancel()
