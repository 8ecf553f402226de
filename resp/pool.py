"""The connections to one instance as one Redis user.

Two lanes keep short commands from waiting behind long ones: the fast lane is
one shared connection, since sharing is what makes one write of many commands;
the slow lane grows up to what the pool's size leaves. A connection that is no
longer fit for sharing is replaced and answers those who still wait on it.

Nothing here sends a command twice.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Any

from resp.address import Address
from resp.connection import Connection, FutureWaiter, State, Waiter, connect
from resp.encoder import encode_command
from resp.errors import ConnectFailed, ReplyLost, RespError, Unavailable
from resp.parser import Parser
from resp.scanner import frame_depth

log = logging.getLogger(__name__)

TICK_SECONDS = 0.1
"""How often overdue waiters and idle connections are looked for, while there are any."""
FIRST_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 0.5
"""After a failed connect, commands are refused for this long at the most before the next attempt."""
SLOW_SECONDS = 0.2
"""Waiters are told of it once they wait for longer."""
MAX_SLOW_WAITERS = 100
"""As many per connection and tick."""
MAX_QUEUED_BYTES = 64 * 1024 * 1024
"""Encoded commands that wait for a lane's connection."""


class _Lane:
    """Connections of one kind, and the commands that wait for one."""

    __slots__ = ("connecting", "connections", "current", "limit", "queue", "queued_bytes")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.connections: list[Connection] = []  # ready ones
        self.current: Connection | None = None  # the only ready one, where the limit is one
        self.connecting: asyncio.Task[None] | None = None
        self.queue: deque[tuple[bytes, Waiter]] = deque()
        self.queued_bytes = 0

    def choose(self) -> Connection | None:
        """The ready connection with the fewest waiting."""
        return min(self.connections, key=lambda connection: connection.pending, default=None)


class Pool:
    """At most `size` connections to `address`, made when needed and closed after `idle_timeout` seconds unused.

    Args:
        size: connections at most, those that only answer their last waiters included; 2 or more, since the slow lane
            never takes the last place.
        max_waiting: waiters per connection, and in a lane's queue, beyond which commands are refused with
            `Unavailable`. How many commands each has sent does not count: memory is bounded in bytes.
        connect_timeout, command_timeout, stall_timeout, idle_timeout: seconds.
    """

    def __init__(
        self,
        address: Address,
        *,
        size: int = 8,
        max_waiting: int = 10_000,
        connect_timeout: float = 2.0,
        command_timeout: float = 10.0,
        stall_timeout: float = 10.0,
        idle_timeout: float = 60.0,
    ) -> None:
        self.address = address
        self.command_timeout = command_timeout
        self._size = size
        self._max_waiting = max_waiting
        self._connect_timeout = connect_timeout
        self._stall_timeout = stall_timeout
        self._idle_timeout = idle_timeout
        self._fast = _Lane(1)
        self._slow = _Lane(max(1, size // 2))
        self._draining: set[Connection] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.TimerHandle | None = None
        # The clock is read by the tick, not by each command: what is sent until the next one has this deadline.
        self._deadline = 0.0
        self._used = False
        self._last_used = 0.0
        self._backoff = 0.0
        self._retry_at = 0.0
        self._last_error = ConnectFailed("")
        self.closed = False

    # The straight line

    def submit(self, payload: bytes, waiter: Waiter, slow: bool = False) -> Connection | None:
        """Send `waiter.count` encoded commands; the waiter hears of the outcome, later and once.

        Returns the fast lane's connection if they went there. What is submitted next with the same connection still
        in `shared` runs after them.

        Raises:
            Unavailable: nothing was sent and the waiter hears nothing.
        """
        lane = self._slow if slow else self._fast
        connection = self._choose_slow(lane) if slow else lane.current
        if connection is None:
            self._enqueue(lane, payload, waiter)
            return None
        if connection.pending >= self._max_waiting:
            raise Unavailable(f"{connection.pending} requests are waiting for this instance already")
        if connection.choked and not connection.accepts(len(payload)):
            raise Unavailable("the instance does not read its commands fast enough")
        self._used = True
        waiter.deadline = self._deadline
        connection.send(payload, waiter)
        return None if slow else connection

    def _choose_slow(self, lane: _Lane) -> Connection | None:
        connection = lane.choose()
        if connection is not None and connection.pending and not lane.connecting:
            # Busy: the next slow command finds a connection of its own, this one need not wait for it.
            if self._has_place(lane):
                return None
        return connection

    def _enqueue(self, lane: _Lane, payload: bytes, waiter: Waiter) -> None:
        self._last_used = now = time.monotonic()
        waiter.deadline = self._deadline = now + self.command_timeout
        if self.closed:
            raise Unavailable("the instance is being closed")
        if now < self._retry_at:
            raise self._last_error.with_traceback(None)
        if len(lane.queue) >= self._max_waiting or lane.queued_bytes + len(payload) > MAX_QUEUED_BYTES:
            raise Unavailable("too many commands are waiting for a connection to this instance")
        lane.queue.append((payload, waiter))
        lane.queued_bytes += len(payload)
        self._grow(lane)

    # Connecting

    def _count(self) -> int:
        lanes = (self._fast, self._slow)
        return len(self._draining) + sum(len(lane.connections) + (lane.connecting is not None) for lane in lanes)

    def _has_place(self, lane: _Lane) -> bool:
        """Whether one more connection for `lane` stays within the bounds; the fast lane's place is kept for it."""
        if len(lane.connections) >= lane.limit:
            return False
        slow = self._slow
        others = len(self._draining) + len(slow.connections) + (slow.connecting is not None)
        return others < self._size - (lane is slow)

    def _evict_stalled(self) -> None:
        """Free a place that a reply occupies whose reader does not take it; of several, the one longest stalled."""
        now = time.monotonic()
        stalled = [connection for connection in self._draining if connection.stalled(now)]
        if stalled:
            min(stalled, key=lambda connection: connection.paused_since).evict_reader()

    def _grow(self, lane: _Lane) -> None:
        """Connect once more for `lane`, if its queue needs it; never two attempts at a time per lane."""
        if lane.connecting is not None or not lane.queue or self.closed:
            return
        if not self._has_place(lane):
            self._flush_queue(lane)
            if lane.queue:
                self._evict_stalled()
            return
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        lane.connecting = self._loop.create_task(self._connect(lane))
        self._arm()

    async def _connect(self, lane: _Lane) -> None:
        try:
            connection = await connect(self.address, timeout=self._connect_timeout, on_change=self._connection_changed)
        except ConnectFailed as error:
            if not self._backoff:
                log.warning("%s", error.detail)
            self._backoff = min(self._backoff * 2 or FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS)
            self._retry_at = time.monotonic() + self._backoff
            self._last_error = error
            lane.connecting = None
            if lane.connections:
                self._flush_queue(lane)
            else:
                self._fail_queue(lane, error)
            return
        except BaseException:
            lane.connecting = None
            self._fail_queue(lane, Unavailable("connecting to the instance was given up"))
            raise
        lane.connecting = None
        if self._backoff:
            log.warning("%s is reachable again", self.address)
        self._backoff = 0.0
        self._retry_at = 0.0
        if self.closed:
            connection.retire()
            self._fail_queue(lane, Unavailable("the instance is being closed"))
            return
        lane.connections.append(connection)
        lane.current = connection if lane.limit == 1 else None
        self._flush_queue(lane)

    def _flush_queue(self, lane: _Lane) -> None:
        connection = lane.choose()
        if connection is None:
            return
        while lane.queue:
            payload, waiter = lane.queue.popleft()
            connection.send(payload, waiter)
        lane.queued_bytes = 0

    def _fail_queue(self, lane: _Lane, error: RespError) -> None:
        queue, lane.queue = lane.queue, deque()
        lane.queued_bytes = 0
        for _, waiter in queue:
            waiter.failed(error)

    def _connection_changed(self, connection: Connection) -> None:
        for lane in (self._fast, self._slow):
            if connection in lane.connections:
                lane.connections.remove(connection)
                if lane.current is connection:
                    lane.current = None
        if connection.state is State.DRAINING:
            self._draining.add(connection)
            return
        self._draining.discard(connection)
        # A place has become free: those who found the pool full need not wait for the next command.
        for lane in (self._fast, self._slow):
            if lane.queue:
                self._grow(lane)

    # Time

    def _arm(self) -> None:
        if self._ticker is None and self._loop is not None:
            self._ticker = self._loop.call_later(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._ticker = None
        now = time.monotonic()
        self._deadline = now + self.command_timeout + TICK_SECONDS
        if self._used:
            self._used = False
            self._last_used = now
        for connection in [*self._fast.connections, *self._slow.connections, *self._draining]:
            connection.tick(now, self._stall_timeout)
            self._tell_slow(connection.waiters(), now)
        for lane in (self._fast, self._slow):
            self._tell_slow((waiter for _, waiter in lane.queue), now)
            if not lane.connecting:
                self._grow(lane)
                while lane.queue and lane.queue[0][1].deadline <= now:
                    payload, waiter = lane.queue.popleft()
                    lane.queued_bytes -= len(payload)
                    waiter.failed(Unavailable("no connection to the instance became free in time"))
        if now - self._last_used > self._idle_timeout:
            for connection in [*self._fast.connections, *self._slow.connections]:
                if not connection.pending:
                    connection.retire()
        if self._count():
            self._arm()

    def _tell_slow(self, waiters: Iterable[Waiter], now: float) -> None:
        sent = now + self.command_timeout  # a deadline is so much later than what it began with
        for waiter in [*islice(waiters, MAX_SLOW_WAITERS)]:
            seconds = sent - waiter.deadline
            if seconds < SLOW_SECONDS:
                break
            waiter.slow(seconds)

    # Off the straight line

    async def call(self, *argv: bytes, slow: bool = True, counts_as_use: bool = True) -> Any:
        """Send one command and return its reply as `Parser(text=False)` gives it; errors are `ErrorReply` values.

        What does not count as use keeps no idle connection open.

        Raises:
            RespError: no reply.
        """
        waiter = FutureWaiter(1, asyncio.get_running_loop())
        used, last_used = self._used, self._last_used
        self.submit(encode_command(argv), waiter, slow)
        if not counts_as_use:
            self._used, self._last_used = used, last_used
        frame = await waiter.future
        if frame_depth(frame) > 64:
            raise RespError("a reply nested too deep for this command")
        return Parser(text=False).parse(frame)[0]

    async def transactions_permitted(self) -> bool:
        """Whether this user may run MULTI and EXEC, as seen when the fast lane connected."""
        if self._fast.current is None:
            await self.call(b"PING", slow=False)
        connection = self._fast.current
        return connection is not None and connection.transactions

    @property
    def transactions(self) -> bool | None:
        """As `transactions_permitted`, if it is known at this moment; else None."""
        connection = self._fast.current
        return connection.transactions if connection is not None else None

    @property
    def shared(self) -> Connection | None:
        """The fast lane's connection, if there is one at this moment."""
        return self._fast.current

    @property
    def last_used(self) -> float:
        """When something was submitted last, to `TICK_SECONDS`; monotonic, 0 for never."""
        return self._last_used

    @property
    def waiting(self) -> int:
        """Who waits for replies or for a connection."""
        connections = [*self._fast.connections, *self._slow.connections, *self._draining]
        queued = len(self._fast.queue) + len(self._slow.queue)
        return queued + sum([connection.pending for connection in connections])

    @property
    def away(self) -> bool:
        """Whether the last attempt to connect failed."""
        return self._backoff > 0.0

    @property
    def connection_count(self) -> int:
        """Connections open or being made."""
        return self._count()

    def renew(self) -> None:
        """Log in anew for what is submitted from now on; what was submitted is answered first."""
        for connection in [*self._fast.connections, *self._slow.connections]:
            connection.retire()

    def close(self) -> None:
        """Admit nothing new and close every connection after its last reply."""
        self.closed = True
        for lane in (self._fast, self._slow):
            self._fail_queue(lane, Unavailable("the instance is being closed"))
            for connection in list(lane.connections):
                connection.retire()

    def abort(self) -> None:
        """Close every connection now; waiters fail with `ReplyLost`."""
        self.close()
        for lane in (self._fast, self._slow):
            if lane.connecting is not None:
                lane.connecting.cancel()
        for connection in list(self._draining):
            connection.close(ReplyLost("the gateway is stopping"))
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
