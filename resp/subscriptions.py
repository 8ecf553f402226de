"""One connection that carries the subscriptions of many subscribers.

The connection is made for the first subscriber and closed after the last. A
subscriber hears that it is subscribed only after Redis has said so. When the
connection is lost, messages may have been missed: every subscriber is told
and forgotten, since resuming would hide the gap.
"""

import asyncio
import time
from collections import deque
from typing import Any, Protocol, cast

import hiredis

from resp.address import Address
from resp.connection import connect_failed, login_commands, open_transport
from resp.encoder import encode_command, encode_commands
from resp.errors import ConnectFailed, ReplyLost, RespError, Unavailable
from resp.parser import ErrorReply, as_value

PING_SECONDS = 15.0
"""How often a silent connection is asked whether it lives; twice without an answer, and it does not."""
MAX_MESSAGE_BUFFER_BYTES = 512 * 1024 * 1024 + 64 * 1024
"""A message that is not whole yet: Redis's bound for one string, and its frame."""


class Message:
    """One published message, or one line of MONITOR; `rendered` is for the subscribers to share their work."""

    __slots__ = ("channel", "pattern", "payload", "rendered")

    def __init__(self, channel: bytes, payload: bytes, pattern: bytes | None = None) -> None:
        self.channel = channel
        self.payload = payload
        self.pattern = pattern
        self.rendered: bytes | None = None


class Subscriber(Protocol):
    """Whoever listens."""

    def subscribed(self, channel: bytes, pattern: bool) -> None:
        """Redis has confirmed this channel or pattern."""

    def deliver(self, message: Message) -> None:
        """A message; called once per subscription that matches."""

    def lost(self, error: RespError) -> None:
        """Nothing more will come, of anything it listened to. `Unavailable` if Redis refused or was not there."""


class PushConnection(asyncio.Protocol):
    """A connection on which Redis speaks unasked: its replies go to `on_reply`, in order."""

    def __init__(self, on_reply: Any, on_lost: Any) -> None:
        self.transport: asyncio.Transport | None = None
        self.last_received = time.monotonic()
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._reader = hiredis.Reader(replyError=as_value, notEnoughData=self)
        self._unparsed = 0
        self._closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's are not its subclasses
        self.transport = transport
        if self._closed:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self.last_received = time.monotonic()
        self._unparsed += len(data)
        try:
            self._reader.feed(data)
            reply = self._reader.gets()
            while reply is not self and not self._closed:
                self._unparsed = 0
                self._on_reply(reply)
                reply = self._reader.gets()
        except hiredis.ProtocolError as error:
            self.close(ReplyLost(f"the instance broke the protocol: {error}"))
            return
        if self._unparsed > MAX_MESSAGE_BUFFER_BYTES:
            self.close(ReplyLost("the instance sent a message without end"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(ReplyLost("the connection to the instance was lost"))

    def write(self, payload: bytes) -> None:
        """Send encoded commands."""
        if self.transport is not None:
            self.transport.write(payload)

    def close(self, error: RespError) -> None:
        """Close now and say why, once."""
        if self._closed:
            return
        self._closed = True
        if self.transport is not None:
            self.transport.abort()
        self._on_lost(error)


async def connect_push(address: Address, timeout: float, on_reply: Any, on_lost: Any) -> PushConnection:
    """Connect and log in; afterwards every reply goes to `on_reply`.

    Raises:
        ConnectFailed: with the reason; `on_lost` is not called then.
    """
    loop = asyncio.get_running_loop()
    commands = login_commands(address)
    commands.append([b"PING"])
    replies: list[Any] = []
    done: asyncio.Future[None] = loop.create_future()
    ready = False

    def reply_received(reply: Any) -> None:
        if ready:
            on_reply(reply)
            return
        replies.append(reply)
        if len(replies) == len(commands) and not done.done():
            done.set_result(None)

    def lost(error: RespError) -> None:
        if ready:
            on_lost(error)
        elif not done.done():
            done.set_exception(error)

    connection = PushConnection(reply_received, lost)
    try:
        async with asyncio.timeout(timeout):
            await open_transport(loop, lambda: connection, address)
            connection.write(encode_commands(commands))
            await done
        for command, reply in zip(commands, replies, strict=True):
            if isinstance(reply, ErrorReply) and (
                command != [b"PING"] or reply.startswith(("NOAUTH", "LOADING", "MASTERDOWN"))
            ):
                raise Unavailable(f"{command[0].decode()} was refused: {reply}")
    except TimeoutError:
        connection.close(ReplyLost("timed out"))
        raise ConnectFailed(f"no answer from {address.display} within {timeout:g} s") from None
    except (OSError, RespError) as error:
        connection.close(ReplyLost("failed"))
        raise connect_failed(address, error) from error
    except BaseException:
        connection.close(ReplyLost("given up"))
        raise
    ready = True
    return connection


class PushHub:
    """A push connection that lives as long as somebody listens."""

    def __init__(self, address: Address, *, connect_timeout: float) -> None:
        self._address = address
        self._connect_timeout = connect_timeout
        self._connection: PushConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def connected(self) -> bool:
        """Whether a connection is open."""
        return self._connection is not None

    @property
    def active(self) -> bool:
        """Whether a connection is open or being made."""
        return self._connection is not None or self._connecting is not None

    def _open(self) -> None:
        if self._connection is None and self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            connection = await connect_push(self._address, self._connect_timeout, self._received, self._lost)
        except Unavailable as error:
            self._connecting = None
            self._lost(error)
            return
        self._connecting = None
        self._connection = connection
        if not self._wanted():
            self.close()
            return
        self._connected(connection)
        self._arm()

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(PING_SECONDS, self._tick)

    def _tick(self) -> None:
        connection = self._connection
        if connection is None:
            return
        silent = time.monotonic() - connection.last_received
        if silent > 2 * PING_SECONDS:
            connection.close(ReplyLost("the instance has gone silent"))
            return
        if silent > PING_SECONDS / 2:
            self._ping(connection)
        self._arm()

    def _lost(self, error: RespError) -> None:
        self._connection = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._all_lost(error)

    def close(self) -> None:
        """Close the connection; whoever still listens is told."""
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
            self._lost(Unavailable("closed"))
        if self._connection is not None:
            self._connection.close(ReplyLost("the stream was closed by the gateway"))

    def _ping(self, connection: PushConnection) -> None:
        connection.write(encode_command([b"PING"]))

    def _wanted(self) -> bool:
        raise NotImplementedError

    def _connected(self, connection: PushConnection) -> None:
        raise NotImplementedError

    def _received(self, reply: Any) -> None:
        raise NotImplementedError

    def _all_lost(self, error: RespError) -> None:
        raise NotImplementedError


class _Topic:
    """A channel or pattern that somebody wants."""

    __slots__ = ("expected", "subscribers", "waiting")

    def __init__(self) -> None:
        self.subscribers: dict[Subscriber, None] = {}
        self.waiting: list[Subscriber] = []  # not told yet that they are subscribed
        self.expected = 0  # confirmations that Redis owes; only the last one counts


class SubscriptionHub(PushHub):
    """SUBSCRIBE and PSUBSCRIBE for any number of subscribers over one connection."""

    def __init__(self, address: Address, *, connect_timeout: float) -> None:
        super().__init__(address, connect_timeout=connect_timeout)
        self._topics: dict[tuple[bool, bytes], _Topic] = {}
        self._asked: deque[tuple[bool, bytes] | None] = deque()  # what Redis has yet to answer; None: no subscription

    def subscribe(self, subscriber: Subscriber, channels: list[bytes], *, pattern: bool) -> None:
        """Listen to channels, or to patterns; outcomes come by the subscriber's methods, never from this call."""
        for channel in channels:
            topic = self._topics.get((pattern, channel))
            if topic is None:
                topic = self._topics[pattern, channel] = _Topic()
            first = not topic.subscribers
            topic.subscribers[subscriber] = None
            if self._connection is not None and first:
                self._ask(channel, pattern, topic)
            if not first and not topic.expected and self._connection is not None:
                asyncio.get_running_loop().call_soon(self._confirm_one, topic, subscriber, channel, pattern)
            else:
                topic.waiting.append(subscriber)
        self._open()

    def unsubscribe(self, subscriber: Subscriber, channels: list[bytes], *, pattern: bool) -> None:
        """Stop listening; the connection is closed with the last subscription."""
        for channel in dict.fromkeys(channels):
            topic = self._topics.get((pattern, channel))
            if topic is None or topic.subscribers.pop(subscriber, self) is self:
                continue
            topic.waiting = [other for other in topic.waiting if other is not subscriber]
            if not topic.subscribers:
                if not topic.expected:
                    del self._topics[pattern, channel]
                if self._connection is not None:
                    self._asked.append(None)
                    self._connection.write(encode_command([b"PUNSUBSCRIBE" if pattern else b"UNSUBSCRIBE", channel]))
        if not self._wanted():
            self._topics.clear()
            self.close()

    def _confirm_one(self, topic: _Topic, subscriber: Subscriber, channel: bytes, pattern: bool) -> None:
        if subscriber in topic.subscribers:
            subscriber.subscribed(channel, pattern)

    def _ask(self, channel: bytes, pattern: bool, topic: _Topic) -> None:
        assert self._connection is not None
        topic.expected += 1
        self._asked.append((pattern, channel))
        self._connection.write(encode_command([b"PSUBSCRIBE" if pattern else b"SUBSCRIBE", channel]))

    def _ping(self, connection: PushConnection) -> None:
        self._asked.append(None)
        super()._ping(connection)

    def _wanted(self) -> bool:
        return any(topic.subscribers for topic in self._topics.values())

    def _connected(self, connection: PushConnection) -> None:
        self._asked.clear()
        for (pattern, channel), topic in self._topics.items():
            if topic.subscribers:
                self._ask(channel, pattern, topic)

    def _received(self, reply: Any) -> None:
        assert self._connection is not None
        if isinstance(reply, ErrorReply):
            self._refused(Unavailable(str(reply)))
            return
        if not isinstance(reply, list) or len(reply) < 2 or not isinstance(reply[0], bytes):
            self._connection.close(ReplyLost("the instance broke the protocol: not a message"))
            return
        kind = reply[0]
        if kind == b"message" and len(reply) == 3:
            self._deliver((False, reply[1]), Message(reply[1], reply[2]))
        elif kind == b"pmessage" and len(reply) == 4:
            self._deliver((True, reply[1]), Message(reply[2], reply[3], reply[1]))
        elif self._asked:
            self._asked.popleft()
            if kind in (b"subscribe", b"psubscribe"):
                self._confirmed(kind == b"psubscribe", reply[1])
        # Confirmed unsubscriptions and PONG need nothing.

    def _refused(self, error: Unavailable) -> None:
        """Tell those who wait for what Redis has just refused; it has said nothing about the others."""
        asked = self._asked.popleft() if self._asked else None
        topic = self._topics.get(asked) if asked is not None else None
        if topic is None:
            return
        topic.expected -= 1
        if topic.expected:
            return
        if asked is not None and not topic.subscribers:
            del self._topics[asked]
        for subscriber in list(topic.subscribers):
            for pattern, channel in [key for key, other in self._topics.items() if subscriber in other.subscribers]:
                self.unsubscribe(subscriber, [channel], pattern=pattern)
            subscriber.lost(error)

    def _confirmed(self, pattern: bool, channel: bytes) -> None:
        topic = self._topics.get((pattern, channel))
        if topic is None or not topic.expected:
            return
        topic.expected -= 1
        if topic.expected:
            return
        if not topic.subscribers:
            del self._topics[pattern, channel]
            return
        waiting, topic.waiting = topic.waiting, []
        for subscriber in waiting:
            subscriber.subscribed(channel, pattern)

    def _deliver(self, key: tuple[bool, bytes], message: Message) -> None:
        topic = self._topics.get(key)
        if topic is not None:
            for subscriber in list(topic.subscribers):
                subscriber.deliver(message)

    def _all_lost(self, error: RespError) -> None:
        topics, self._topics = self._topics, {}
        subscribers = dict.fromkeys(subscriber for topic in topics.values() for subscriber in topic.subscribers)
        for subscriber in subscribers:
            subscriber.lost(error)
