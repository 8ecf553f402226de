"""The access log: a line for a request that failed, was slow, or, where all are wanted, for each or for a sample.

Fast successful requests cost nothing unless all are wanted: failures pass here
on their way out, and the ticks of the connection pools find what has waited
for long. A line shows the command's name where the path has it, never a value
or a token; a key only where that is allowed.

A line carries what the client called its request (X-Request-Id) and its trace;
without such a name the Upstash-Sync-Token of the answer, which is another for
each, so that an answer can always be found in the log.
"""

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING

from redisgate.logs import FIELDS, safe_target

if TYPE_CHECKING:
    from redisgate.exchange import Exchange

CHECK_SECONDS = 0.1
"""How often it is looked whether slow requests are answered by now."""

log = logging.getLogger(__name__)


class AccessLog:
    """Writes the lines of one worker; `slow_request` in seconds, `keys`: they may be shown."""

    def __init__(self, slow_request: float, *, keys: bool = False) -> None:
        self._slow_request = slow_request
        self._keys = keys
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
            self._write(exchange, 200, time.monotonic() - self._started.pop(exchange), b"")
        if self._started:
            self._timer = asyncio.get_running_loop().call_later(CHECK_SECONDS, self._check)

    def answered(self, exchange: "Exchange", status: int, answer: bytes) -> None:
        """It is being answered; called for every status but 200, and for some of those. 499: its client has left.

        `answer` is the answer's sync token, if it has one.
        """
        started = self._started.pop(exchange, None)
        if started is not None:
            self._write(exchange, status, time.monotonic() - started, answer)
        elif status >= 500:
            self._write(exchange, status, None, answer)

    def _write(self, exchange: "Exchange", status: int, seconds: float | None, answer: bytes) -> None:
        head = exchange.head
        method = exchange.method.decode("latin-1")
        target = safe_target(exchange.target, keys=self._keys)
        instance = exchange.instance_id or "-"
        request = (head.request_id or answer.strip() or b"-").decode("ascii", "replace")
        trace = head.trace_id.decode("ascii")
        fields: dict[str, object] = {
            "method": method,
            "target": target,
            "status": status,
            "seconds": None if seconds is None else round(seconds, 6),
            "instance": None if instance == "-" else instance,
            "request_id": None if request == "-" else request,
        }
        if trace:
            fields["trace_id"] = trace
        log.log(
            logging.WARNING if status >= 500 else logging.INFO,
            "%s %s %d %s %s %s%s",
            method,
            target,
            status,
            "-" if seconds is None else f"{seconds:.3f}s",
            instance,
            request,
            f" {trace}" if trace else "",
            extra={FIELDS: fields},
        )


class FullAccessLog(AccessLog):
    """A line for every request, or for a `sample` of them (a part of 1) and every one that failed or was slow."""

    def __init__(self, slow_request: float, *, sample: float = 1.0, keys: bool = False) -> None:
        super().__init__(float("inf"), keys=keys)
        self._sample = sample
        self._long = slow_request

    def answered(self, exchange: "Exchange", status: int, answer: bytes) -> None:
        # What could not be read has no target, and nobody saw it begin.
        seconds = (time.perf_counter_ns() - exchange.began) / 1e9 if exchange.target else None
        slow = seconds is not None and seconds >= self._long
        if self._sample >= 1.0 or status >= 500 or slow or random.random() < self._sample:
            self._write(exchange, status, seconds, answer)
