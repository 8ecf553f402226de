"""RESP connections: one socket, one deque of waiters.

Replies carry no ids; order alone ties a reply to its command. When the stream
position is in doubt, close, and fail every waiter.

All commands sent within one turn of the event loop leave in one write, so that
Redis too makes one read and one write for many. A command counts as written
once it was passed to the transport; one that was not can still go elsewhere.
"""

import asyncio
import enum
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

from resp.address import Address
from resp.encoder import encode_commands
from resp.errors import (
    ConnectFailed,
    LoginRefused,
    ProtocolError,
    ReplyLost,
    ReplyTimeout,
    ReplyTooLarge,
    RespError,
    Unavailable,
)
from resp.parser import ErrorReply, Parser
from resp.scanner import COLON, DOLLAR, MINUS, PLUS, FrameScanner, parse_length

STREAM_THRESHOLD_BYTES: Final = 256 * 1024
"""A run of replies larger than this is streamed to its waiter, and ends the connection's part in sharing."""
MAX_UNSENT_BYTES: Final = 64 * 1024 * 1024
"""Commands that Redis does not read yet, per connection; beyond it nothing more is admitted."""
MAX_CALL_BYTES: Final = 16 * 1024 * 1024
"""Of a reply that the gateway itself has asked for."""
STALLED_READER_SECONDS: Final = 1.0
"""How long a waiter may hold up the others behind it by not taking its streamed reply."""

_CRLF: Final = b"\r\n"
_SMALL_NUMBERS: Final = {b"%d" % number: number for number in range(1024)}


class Totals:
    """What all connections of this process did, those that are closed included; sizes in bytes."""

    __slots__ = ("connects", "failures", "lost", "received", "sent")

    def __init__(self) -> None:
        self.connects = 0  # that succeeded
        self.failures = 0  # that did not
        self.lost = 0  # connections that ended while somebody waited on them
        self.received = 0
        self.sent = 0


TOTALS: Final = Totals()


class Waiter:
    """Whoever sent `count` commands and waits for their replies.

    Exactly one of these sequences of calls is made:
    `reply` · `failed` · `stream_started`, `stream_data`…, `stream_ended` · `stream_started`, `stream_data`…, `failed`.
    """

    __slots__ = ("count", "deadline")

    count: int
    """Number of replies."""
    deadline: float
    """`time.monotonic()` seconds; set by the connection or pool."""

    def reply(self, frames: bytes, depth: int) -> None:
        """All replies, as they came; `depth` is the deepest nesting (0: no array)."""
        raise NotImplementedError

    def stream_started(self, connection: "Connection") -> None:
        """The replies are large and will come in pieces; `connection` can be paused and resumed."""
        raise NotImplementedError

    def stream_data(self, data: bytes) -> None:
        """The next piece: whole values, or a part of a long bulk string's body."""
        raise NotImplementedError

    def stream_ended(self) -> None:
        """All replies have been passed on."""
        raise NotImplementedError

    def failed(self, error: RespError) -> None:
        """No (further) reply will come; `error` says whether the command may have run."""
        raise NotImplementedError

    def slow(self, seconds: float) -> None:
        """It has waited for so long already; called now and then for those that wait longest."""


class Tombstone(Waiter):
    """Keeps the place of a waiter that gave up, so that the replies behind it find theirs."""

    __slots__ = ()

    def __init__(self, count: int) -> None:
        self.count = count
        self.deadline = float("inf")

    def reply(self, frames: bytes, depth: int) -> None:
        pass

    def stream_started(self, connection: "Connection") -> None:
        pass

    def stream_data(self, data: bytes) -> None:
        pass

    def stream_ended(self) -> None:
        pass

    def failed(self, error: RespError) -> None:
        pass


class FutureWaiter(Waiter):
    """Lets a coroutine wait for replies; for the few places off the straight line of a request.

    The future's result is the frames, whole; it fails where they are more than `MAX_CALL_BYTES`. With `keep` it is the
    first `keep` bytes or so, once all of them have come. What is not kept is read and thrown away, for the sake of
    those who wait behind.
    """

    __slots__ = ("_connection", "_keep", "_parts", "_size", "future")

    def __init__(self, count: int, loop: asyncio.AbstractEventLoop, keep: int | None = None) -> None:
        self.count = count
        self._keep = keep
        self.deadline = float("inf")
        self.future: asyncio.Future[bytes] = loop.create_future()
        self._parts: list[bytes] = []
        self._size = 0
        self._connection: Connection | None = None

    def reply(self, frames: bytes, depth: int) -> None:
        if not self.future.done():
            self.future.set_result(frames)

    def stream_started(self, connection: "Connection") -> None:
        self._connection = connection

    def stream_data(self, data: bytes) -> None:
        self._size += len(data)
        if self.future.done() or (self._keep is None and self._size > MAX_CALL_BYTES):
            # Nobody waits any more, or it would fill the memory.
            self._parts.clear()
            self.failed(ReplyTooLarge("a reply too large for this command"))
            if self._connection is not None:
                self._connection.abandon(self)
        elif self._keep is None or self._size - len(data) < self._keep:
            self._parts.append(data)

    def stream_ended(self) -> None:
        self.reply(b"".join(self._parts), 0)

    def failed(self, error: RespError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class State(enum.Enum):
    """Where a connection is in its life."""

    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    """Answers those who wait, admits nothing new."""
    CLOSED = "closed"


class Connection:
    """One authenticated connection to one Redis database; an `asyncio.Protocol` in all but name."""

    __slots__ = (
        "_begun",
        "_flush_scheduled",
        "_loop",
        "_missing",
        "_on_change",
        "_out",
        "_scanner",
        "_scanning",
        "_streaming",
        "_tail",
        "_transport",
        "_waiters",
        "choked",
        "last_received",
        "overdue_since",
        "paused_since",
        "pending",
        "state",
        "transactions",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_change: Callable[["Connection"], None]) -> None:
        """`on_change` is called when the connection stops admitting, and again when it is closed."""
        self._loop = loop
        self._on_change = on_change
        self._transport: asyncio.Transport | None = None
        self._waiters: deque[Waiter] = deque()
        self.state = State.CONNECTING
        self.pending = 0  # waiters, tombstones included
        self.transactions = False  # whether MULTI and EXEC are permitted
        self.last_received = 0.0
        # Sending.
        self._out: list[bytes] = []
        self._flush_scheduled = False
        self.choked = False  # Redis does not read as fast as we write
        # Receiving. `_tail` begins with the first byte of the head waiter's replies, or, while
        # streaming, with the first byte not yet passed on.
        self._tail = b""
        self._scanner = FrameScanner()
        self._scanning = 0  # position in `_tail` up to which the scanner has consumed; 0: not begun
        self._streaming = False
        # Or a single bulk string has begun, and so many bytes of it have not come.
        self._begun: list[bytes] = []
        self._missing = 0
        self.paused_since = 0.0
        self.overdue_since = 0.0

    @property
    def peer_certificate(self) -> Any:
        """What a server that was verified showed, as `ssl.SSLSocket.getpeercert` has it; nothing: it did not."""
        return self._transport.get_extra_info("peercert") if self._transport is not None else None

    # Sending

    def send(self, payload: bytes, waiter: Waiter) -> None:
        """Send `waiter.count` encoded commands with the others of this turn of the loop."""
        self._waiters.append(waiter)
        self.pending += 1
        self._out.append(payload)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        out = self._out
        if not out or self._transport is None:
            return
        self._out = []
        data = out[0] if len(out) == 1 else b"".join(out)
        TOTALS.sent += len(data)
        self._transport.write(data)

    def accepts(self, size: int) -> bool:
        """Whether `size` more bytes stay within the bound of what Redis has not read yet."""
        if not self.choked or self._transport is None:
            return True
        return self._transport.get_write_buffer_size() + size <= MAX_UNSENT_BYTES

    def pause_writing(self) -> None:
        self.choked = True

    def resume_writing(self) -> None:
        self.choked = False

    # Receiving

    def data_received(self, data: bytes) -> None:
        TOTALS.received += len(data)
        try:
            self._consume(data)
        except ProtocolError as error:
            self.close(ReplyLost(f"the instance broke the protocol: {error}"))

    def _consume(self, data: bytes) -> None:
        position = 0
        if self._missing:
            position = self._continue_bulk(data)
            if not position:
                return
        elif self._tail:
            data = self._tail + data
            self._tail = b""
        size = len(data)
        waiters = self._waiters
        numbers = _SMALL_NUMBERS
        while position < size:
            if not waiters:
                raise ProtocolError("a reply nobody waits for")
            waiter = waiters[0]
            # A single scalar is most of the traffic: find its end right here.
            if waiter.count == 1 and not self._scanning and not self._streaming:
                kind = data[position]
                end_of_line = data.find(_CRLF, position)
                if end_of_line > 0:
                    end = 0
                    if kind == DOLLAR:
                        digits = data[position + 1 : end_of_line]
                        length = numbers.get(digits)
                        if length is None:
                            length = parse_length(digits)
                        end = end_of_line + length + 4 if length >= 0 else end_of_line + 2
                        if end <= size:
                            if data[end - 2 : end] != _CRLF:
                                raise ProtocolError("a bulk string longer than it said")
                        elif end - position <= STREAM_THRESHOLD_BYTES:
                            self._begun = [data[position:]]
                            self._missing = end - size
                            break
                    elif kind == COLON:
                        if data[position + 1 : end_of_line] in numbers:
                            end = end_of_line + 2
                    elif (kind == PLUS or kind == MINUS) and data.find(b"\n", position, end_of_line) < 0:
                        end = end_of_line + 2
                    if 0 < end <= size:
                        waiters.popleft()
                        self.pending -= 1
                        waiter.reply(data[position:end], 0)
                        position = end
                        continue
            position = self._scan(waiter, data, position)
            if not self._scanner.done or self._scanning or self._streaming:
                break
        if position < size and not self._missing:
            self._tail = data[position:]
        if not waiters and self.state is State.DRAINING:
            self.close(ReplyLost("drained"))
        else:
            self.last_received = time.monotonic()

    def _continue_bulk(self, data: bytes) -> int:
        """Add to the bulk string that was begun. Returns where it ends in `data`; 0: not yet."""
        missing = self._missing
        if len(data) < missing:
            self._begun.append(data)
            self._missing = missing - len(data)
            self.last_received = time.monotonic()
            return 0
        # Whatever follows stays where it is: a hundred kilobytes are copied once here, not with their neighbours.
        self._begun.append(data[:missing])
        frame = b"".join(self._begun)
        self._begun = []
        self._missing = 0
        if frame[-2:] != _CRLF:
            raise ProtocolError("a bulk string longer than it said")
        self.pending -= 1
        self._waiters.popleft().reply(frame, 0)
        return missing

    def _scan(self, waiter: Waiter, data: bytes, position: int) -> int:
        """The general case: arrays, runs of replies, pieces. Returns the first byte to keep."""
        scanner = self._scanner
        if self._streaming:
            end = scanner.scan(data, position, partial_bulks=True)
            if end > position:
                waiter.stream_data(data[position:end])
            if self.state is State.CLOSED:  # nobody wants the rest
                return len(data)
            if scanner.done:
                self._end_stream()
            return end
        if not self._scanning:
            scanner.restart(waiter.count)
        end = scanner.scan(data, position + self._scanning)
        if scanner.done:
            self._scanning = 0
            self._waiters.popleft()
            self.pending -= 1
            waiter.reply(data[position:end], scanner.depth)
            return end
        if len(data) - position > STREAM_THRESHOLD_BYTES or end - position + scanner.announced > STREAM_THRESHOLD_BYTES:
            return self._begin_stream(waiter, data, position)
        self._scanning = end - position
        return position

    def _begin_stream(self, waiter: Waiter, data: bytes, position: int) -> int:
        self._scanning = 0
        self._streaming = True
        self._retire()
        self._scanner.restart(waiter.count)
        waiter.stream_started(self)
        if self.state is State.CLOSED:  # the client has gone already, and nobody else waits
            return len(data)
        # A new scan from the start: what was consumed so far was not passed on, and bodies may now be cut.
        return self._scan(self._waiters[0], data, position)

    def _end_stream(self) -> None:
        self._streaming = False
        waiter = self._waiters.popleft()
        self.pending -= 1
        self.resume_reading()
        waiter.stream_ended()

    def pause_reading(self) -> None:
        """Take no more from Redis until `resume_reading`; for a streamed reply whose reader is slow."""
        if self._transport is not None and not self.paused_since:
            self.paused_since = time.monotonic()
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Undo `pause_reading`."""
        if self._transport is not None and self.paused_since:
            self.paused_since = 0.0
            self.last_received = time.monotonic()
            self._transport.resume_reading()

    def abandon(self, waiter: Waiter) -> None:
        """`waiter` wants nothing any more; its replies are read and thrown away."""
        waiters = self._waiters
        for index, other in enumerate(waiters):
            if other is waiter:
                waiters[index] = Tombstone(waiter.count)
                break
        self.resume_reading()
        if len(waiters) == 1 and self._streaming:
            self.close(ReplyLost("nobody waits for this reply"))

    # Time

    def tick(self, now: float, stall_timeout: float) -> None:
        """Fail what is overdue at `now` (monotonic seconds); called a few times a second by the pool."""
        waiters = self._waiters
        if not waiters:
            return
        if self.paused_since:
            if len(waiters) > 1 and self.stalled(now):
                self.evict_reader()
            return
        overdue = 0
        for waiter in waiters:
            if waiter.deadline > now and not isinstance(waiter, Tombstone):
                break
            overdue += 1
        for index in range(overdue):
            waiter = waiters[index]
            if not isinstance(waiter, Tombstone) and not (index == 0 and self._streaming):
                waiters[index] = Tombstone(waiter.count)
                self.overdue_since = self.overdue_since or now
                self._retire()
                waiter.failed(ReplyTimeout("no reply in time"))
        if self._streaming and overdue == len(waiters) and isinstance(waiters[0], Tombstone):
            self.close(ReplyLost("nobody waits for this reply"))
            return
        if overdue and now - max(self.last_received, self.overdue_since) > stall_timeout:
            self.close(ReplyLost("the instance has gone silent"))

    def stalled(self, now: float) -> bool:
        """Whether the reader of a streamed reply has taken nothing for `STALLED_READER_SECONDS`."""
        return bool(self.paused_since) and now - self.paused_since > STALLED_READER_SECONDS

    def evict_reader(self) -> None:
        """Give up the reply that is being streamed, for the sake of those who wait."""
        reader = self._waiters[0]
        self.abandon(reader)
        reader.failed(ReplyLost("the reader is too slow for those who wait behind it"))

    # State

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's are not its subclasses
        self._transport = transport
        self.last_received = time.monotonic()
        transport.set_write_buffer_limits(high=1024 * 1024)

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(ReplyLost(f"the connection to the instance was lost{f': {exc}' if exc else ''}"))

    def eof_received(self) -> None:
        return None

    def _retire(self) -> None:
        """Admit nothing new; close when the last waiter has been answered."""
        if self.state is State.READY:
            self.state = State.DRAINING
            self._on_change(self)

    def retire(self) -> None:
        """Admit nothing new; closed at once if nobody waits, else after the last reply."""
        self._retire()
        if not self._waiters:
            self.close(ReplyLost("retired"))

    def close(self, error: ReplyLost) -> None:
        """Close now. Waiters whose command was written fail with `error`, the others with `Unavailable`."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        if self._transport is not None:
            self._transport.abort()
        waiters = list(self._waiters)
        if waiters:
            TOTALS.lost += 1
        written = len(waiters) - len(self._out)
        self._waiters.clear()
        self._out.clear()
        self.pending = 0
        self._tail = b""
        self._begun = []
        self._missing = 0
        self._on_change(self)
        for waiter in waiters[:written]:
            waiter.failed(error)
        for waiter in waiters[written:]:
            waiter.failed(Unavailable("the connection to the instance was lost before the command was sent"))

    def waiters(self) -> Iterator[Waiter]:
        """Who waits, in order."""
        return iter(self._waiters)


async def connect(
    address: Address,
    *,
    timeout: float,
    on_change: Callable[[Connection], None] = lambda connection: None,
) -> Connection:
    """Connect, authenticate, select the database, and see whether transactions are permitted.

    Args:
        timeout: seconds for all of it together.

    Raises:
        ConnectFailed: with the reason in words. Nothing of a client's was sent.
    """
    loop = asyncio.get_running_loop()
    connection = Connection(loop, on_change)
    try:
        async with asyncio.timeout(timeout):
            await open_transport(loop, lambda: connection, address)
            await _shake_hands(connection, address, loop)
    except TimeoutError:
        TOTALS.failures += 1
        connection.close(ReplyLost("connect timed out"))
        raise ConnectFailed(f"no answer from {address.display} within {timeout:g} s") from None
    except (OSError, RespError) as error:
        TOTALS.failures += 1
        connection.close(ReplyLost("connect failed"))
        raise connect_failed(address, error) from error
    except BaseException:
        connection.close(ReplyLost("connect was given up"))
        raise
    TOTALS.connects += 1
    connection.state = State.READY
    return connection


def connect_failed(address: Address, error: Exception) -> ConnectFailed:
    """What to raise where connecting and logging in ended in `error`."""
    detail = f"cannot use {address.display}: {error}"
    if address.delegated and str(error).startswith("AUTH was refused: WRONGPASS"):
        return LoginRefused(detail, error)
    return ConnectFailed(detail, error)


async def open_transport(loop: asyncio.AbstractEventLoop, factory: Callable[[], Any], address: Address) -> None:
    """Connect a protocol by Unix socket, TCP or TLS, as `address` says. Raises OSError (TLS errors are)."""
    if address.path is not None:
        await loop.create_unix_connection(factory, address.path)
    elif address.tls:
        await loop.create_connection(
            factory,
            address.host,
            address.port,
            ssl=address.ssl_context(),
            server_hostname=address.server_name or address.host,
        )
    else:
        await loop.create_connection(factory, address.host, address.port)


def login_commands(address: Address) -> list[list[bytes]]:
    """What has to be said first on any connection to `address`."""
    commands = []
    if address.password is not None:
        user = [address.username.encode()] if address.username else []
        commands.append([b"AUTH", *user, address.password.encode()])
    if address.database:
        commands.append([b"SELECT", b"%d" % address.database])
    return commands


async def _shake_hands(connection: Connection, address: Address, loop: asyncio.AbstractEventLoop) -> None:
    commands = login_commands(address)
    needed = len(commands)
    commands += [[b"PING"], [b"MULTI"], [b"EXEC"]]
    waiter = FutureWaiter(len(commands), loop)
    connection.send(encode_commands(commands), waiter)
    replies: list[Any] = Parser(text=True).parse(await waiter.future, len(commands))
    for command, reply in zip(commands[:needed], replies, strict=False):
        if isinstance(reply, ErrorReply):
            raise Unavailable(f"{command[0].decode()} was refused: {reply}")
    ping, multi, execute = replies[needed:]
    if isinstance(ping, ErrorReply) and ping.startswith(("NOAUTH", "LOADING", "MASTERDOWN")):
        raise Unavailable(str(ping))
    # A user without the right to MULTI would have the commands of a transaction run one by one.
    connection.transactions = multi == "OK" and execute == []
