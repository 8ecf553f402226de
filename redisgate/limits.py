"""Rate and daily limits of a token, counted over all workers."""

import math
import time

from redisgate.access import LimitRefusal
from redisgate.shared import Counter

_DAY_SECONDS = 86_400


class TokenLimiter:
    """At most `rate` commands per second and `daily` commands per UTC day; None: no limit."""

    __slots__ = ("_counter", "_daily", "_rate")

    def __init__(self, counter: Counter, rate: int | None, daily: int | None) -> None:
        self._counter = counter
        self._rate = rate
        self._daily = daily

    def admit(self, count: int) -> LimitRefusal | None:
        """Count `count` commands, or say why not; a refusal counts nothing."""
        now = time.time()
        counter = self._counter
        if self._daily is not None:
            usage = counter.day_usage(now)
            if usage + count > self._daily:
                line = b"ERR max daily request limit exceeded. Limit: %d, Usage: %d" % (self._daily, usage)
                return LimitRefusal(line, math.ceil(_DAY_SECONDS - now % _DAY_SECONDS))
        if self._rate is not None:
            recent = counter.rate_usage(now)
            if recent + count > self._rate:
                return LimitRefusal(
                    b"ERR max requests limit exceeded. Limit: %d, Usage: %d" % (self._rate, math.ceil(recent)), 1
                )
        counter.add(count, now)
        return None
