"""The access log: a line for a request that failed, was slow, or, where all are wanted, for each.

Fast successful requests cost nothing unless all are wanted: failures pass here
on their way out, and the ticks of the connection pools find what has waited
for long. A line shows the command's name where the path has it, never an
argument or a token.
"""

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from redisgate.http_protocol import Handler, HttpConnection
from redisgate.logs import safe_target

if TYPE_CHECKING:
    from redisgate.exchange import Exchange
    from redisgate.http_head import Head

CHECK_SECONDS = 0.1
"""How often it is looked whether slow requests are answered by now."""

log = logging.getLogger(__name__)


class AccessLog:
    """Writes the lines of one worker; `slow_request` in seconds."""

    def __init__(self, slow_request: float) -> None:
        self._slow_request = slow_request
        self._started: dict[Exchange, float] = {}  # requests under way that were found slow; monotonic
        self._timer: asyncio.TimerHandle | None = None

    def slow(self, exchange: "Exchange", seconds: float) -> None:
        """It has waited for so long for Redis, and waits on."""
        if seconds < self._slow_request or exchange in self._started:
            return
        self._started[exchange] = time.monotonic() - seconds
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(CHECK_SECONDS, self._check)

    def _check(self) -> None:
        """Write of those slow ones that were answered with status 200, which pass by no other way."""
        self._timer = None
        for exchange in [exchange for exchange in self._started if exchange.gone]:
            self._write(exchange, 200, time.monotonic() - self._started.pop(exchange))
        if self._started:
            self._timer = asyncio.get_running_loop().call_later(CHECK_SECONDS, self._check)

    def answered(self, exchange: "Exchange", status: int) -> None:
        """It is being answered; called for every status but 200, and for some of those. 499: its client has left."""
        started = self._started.pop(exchange, None)
        if started is not None:
            self._write(exchange, status, time.monotonic() - started)
        elif status >= 500:
            self._write(exchange, status, None)

    def _write(self, exchange: "Exchange", status: int, seconds: float | None) -> None:
        log.log(
            logging.WARNING if status >= 500 else logging.INFO,
            "%s %s %d %s %s",
            exchange.method.decode("latin-1"),
            safe_target(exchange.target),
            status,
            "-" if seconds is None else f"{seconds:.3f}s",
            exchange.instance_id or "-",
        )


class FullAccessLog(AccessLog):
    """A line for every request. Stands before the gateway to see when each begins."""

    def __init__(self, gateway: Handler) -> None:
        super().__init__(float("inf"))
        self._gateway = gateway
        self._now = 0.0

    def prepare(self, head: "Head") -> None:
        self._gateway.prepare(head)

    def handle(self, connection: HttpConnection, method: bytes, target: bytes, head: "Head", body: bytes) -> None:
        self._now = now = time.monotonic()
        self._gateway.handle(connection, method, target, head, body)
        if connection.exchanges and not connection.exchanges[-1].gone:
            self._started[connection.exchanges[-1]] = now

    def answered(self, exchange: "Exchange", status: int) -> None:
        started = self._started.pop(exchange, self._now)
        self._write(exchange, status, time.monotonic() - started)
