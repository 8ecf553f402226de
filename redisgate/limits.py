"""Rate and daily limits, counted over all workers.

A `Limit` is one subject's (a token, an organization); a `Meter` is what one
grant is counted by: its limits and its usage.

Asking all workers' counters costs a microsecond or two. So a worker that has
asked takes an allowance, a small part of what was left, and for a moment
spends that without asking. The parts are so small that all workers together
cannot spend more than was there.
"""

import math
import time
from collections.abc import Sequence
from typing import Protocol

from redisgate.access import LimitRefusal
from redisgate.metering import UsageCell
from redisgate.shared import Counter

ALLOWANCE_SECONDS = 0.01
"""How long an allowance lasts."""
ALLOWANCE_PART = 8
"""All workers' allowances together are this part of what was left."""
_DAY_SECONDS = 86_400


class Lease(Protocol):
    """How much of a daily limit that several gateways share is this one's to spend."""

    def ceiling(self, now: float, used: int) -> int:
        """Up to how many commands this gateway may have counted today; `used` is how many it has."""
        ...

    def others(self) -> int:
        """How much of today's limit other gateways hold, as far as is known."""
        ...

    def may_grow(self, need: int) -> bool:
        """Whether it is worth waiting until there is room for `need` commands more; asks for it."""
        ...

    async def answer(self) -> None:
        """Wait until more is known of what was asked for."""
        ...


class Limit:
    """At most `rate` commands per second and `daily` commands per UTC day; None: no limit."""

    __slots__ = (
        "_allowance",
        "_counter",
        "_daily",
        "_fresh_until",
        "_lease",
        "_part",
        "_rate",
        "pending",
        "remaining",
        "standing",
    )

    def __init__(
        self, counter: Counter, rate: int | None, daily: int | None, *, workers: int, lease: Lease | None = None
    ) -> None:
        """Without a `lease` the whole of `daily` is this gateway's."""
        self._counter = counter
        self._rate = rate
        self._daily = daily
        self._lease = lease
        self._part = ALLOWANCE_PART * workers
        self._allowance = 0
        self._fresh_until = 0.0
        self.pending = 0
        """What was spent of the allowance and is not yet in the counter."""
        self.remaining = 0
        """What is left of the limit that is nearest, before what is pending."""
        self.standing = b""
        """Header lines of the limit that is nearest, up to what is left of it."""

    def check(self, count: int, now: float) -> LimitRefusal | None:
        """Why `count` commands may not run at `now` (unix seconds); None: they may, and `spend` follows."""
        if count <= self._allowance and now < self._fresh_until:
            return None
        return self._ask(count, now)

    def spend(self, count: int, now: float) -> None:
        """Count commands that `check` let pass."""
        self._allowance -= count
        self.pending += count
        if self._allowance <= 0:
            self.flush(now)

    def flush(self, now: float) -> None:
        """Let the other workers see what was spent."""
        if self.pending:
            self._counter.add(self.pending, now)
            self.remaining = max(self.remaining - self.pending, 0)
            self.pending = 0

    def _ask(self, count: int, now: float) -> LimitRefusal | None:
        self.flush(now)
        counter = self._counter
        self._allowance = 0
        left = math.inf
        if self._daily is not None:
            used = counter.day_usage(now)
            midnight = now - now % _DAY_SECONDS + _DAY_SECONDS
            others = 0
            left = float(self._daily - used)
            if self._lease is not None:
                left = float(self._lease.ceiling(now, used) - used)
                others = self._lease.others()
            self._stand(self._daily, math.ceil(midnight - now))
            self.remaining = max(self._daily - others - used, 0)
            if count > left:
                usage = min(used + others, self._daily)
                line = b"ERR max daily request limit exceeded. Limit: %d, Usage: %d" % (self._daily, usage)
                if self._lease is not None and used + count <= self._daily:
                    if self._lease.may_grow(count):
                        return LimitRefusal(line, 1, kind="daily", wait=self._lease.answer)
                    # Other gateways hold the rest, and give back what they do not use.
                    retry_after = math.ceil(midnight - now) if usage >= self._daily and not others else 1
                    return LimitRefusal(line, retry_after, kind="daily")
                return LimitRefusal(line, math.ceil(midnight - now), kind="daily")
        if self._rate is not None:
            recent = counter.rate_usage(now)
            if self._rate - recent < left:
                left = self._rate - recent
                self._stand(self._rate, 1)
                self.remaining = max(int(left), 0)
            if recent + count > self._rate:
                self._stand(self._rate, 1)
                self.remaining = max(int(self._rate - recent), 0)
                line = b"ERR max requests limit exceeded. Limit: %d, Usage: %d"
                return LimitRefusal(line % (self._rate, math.ceil(recent)), 1)
        self._allowance = max(count, int(left) // self._part)
        self._fresh_until = now + ALLOWANCE_SECONDS
        return None

    def _stand(self, limit: int, reset: int) -> None:
        self.standing = b"RateLimit-Limit: %d\r\nRateLimit-Reset: %d\r\nRateLimit-Remaining: " % (limit, reset)


class Meter:
    """What one grant is counted by; see `redisgate.access.Limiter`."""

    __slots__ = ("_limits", "_max_bytes", "cell", "limited")

    def __init__(
        self, limits: Sequence[Limit] = (), *, cell: UsageCell | None = None, max_bytes: int | None = None
    ) -> None:
        """`max_bytes`: of the arguments of one request; needs a cell."""
        self._limits = tuple(limits)
        self._max_bytes = max_bytes
        self.cell = cell
        self.limited = bool(limits)

    def admit(self, argv: Sequence[bytes]) -> LimitRefusal | None:
        """Count one command, or say why not; a refusal counts nothing."""
        cell = self.cell
        if cell is None:
            return self._spend(1)
        size = 0
        for argument in argv:
            size += len(argument)
        if self._max_bytes is not None and size > self._max_bytes:
            return self._too_large(size, self._max_bytes)
        if self._limits:
            refusal = self._spend(1)
            if refusal is not None:
                return refusal
        cell.bytes_in += size
        kind = cell.kinds.get(argv[0])
        cell.commands[cell.kind(argv[0]) if kind is None else kind] += 1
        return None

    def admit_all(self, commands: Sequence[Sequence[bytes]]) -> LimitRefusal | None:
        """Count all of the commands, or say why none of them."""
        cell = self.cell
        if cell is None:
            return self._spend(len(commands))
        size = sum([sum(map(len, argv)) for argv in commands])
        if self._max_bytes is not None and size > self._max_bytes:
            return self._too_large(size, self._max_bytes)
        refusal = self._spend(len(commands))
        if refusal is not None:
            return refusal
        cell.bytes_in += size
        kinds, counts = cell.kinds, cell.commands
        for argv in commands:
            kind = kinds.get(argv[0])
            counts[cell.kind(argv[0]) if kind is None else kind] += 1
        return None

    @staticmethod
    def _too_large(size: int, limit: int) -> LimitRefusal:
        line = b"ERR max request size exceeded. Limit: %d bytes, Actual: %d bytes" % (limit, size)
        return LimitRefusal(line, 0, 413, "size")

    def _spend(self, count: int) -> LimitRefusal | None:
        now = time.time()
        limits = self._limits
        for limit in limits:
            refusal = limit.check(count, now)
            if refusal is not None:
                return refusal
        for limit in limits:
            limit.spend(count, now)
        return None

    def headers(self) -> bytes:
        """Where the client stands with the limit that is nearest."""
        standing, least = b"", -1
        for limit in self._limits:
            remaining = limit.remaining - limit.pending
            if least < 0 or remaining < least:
                standing, least = limit.standing, remaining if remaining > 0 else 0
        return b"%b%d\r\n" % (standing, least)
