"""Daily limits that several gateways share: each leases parts of what is left, and spends those without asking.

PostgreSQL keeps, per subject (an organization, an API key) and day, what each gateway has leased and used; a lease is
given under a lock, and never beyond the limit. A gateway asks for the next part while it still has half of the last,
so that requests do not wait; and should the answer be late all the same, it may run ahead by its share of one percent
of the limit, which the next lease pays back. Who has leased more than it needs gives back while others want more.

Within a gateway the workers spend one lease together: it lies in the memory they share, beside the count, and
outlives a kill with it. A gateway that is gone for good loses its lease, less what it last said it had used.

With PostgreSQL away each gateway goes on up to the limit less what others had leased when it last heard.
"""

import asyncio
import contextlib
import logging
import time
from datetime import UTC, date, datetime
from typing import Any, Final
from uuid import UUID

from control.database import Database, DatabaseAway
from redisgate.shared import Counter

RENEW_SECONDS: Final = 1.0
"""Between two reports of what was used, and two looks for what may be given back."""
QUERY_SECONDS: Final = 2.0
"""For PostgreSQL to answer; then it counts as away."""
PATIENCE_SECONDS: Final = 0.25
"""Between two requests of a gateway that got nothing."""
IDLE_RENEWALS: Final = 3
"""Looks at a subject that nobody used before what it holds is given back."""
FORGET_SECONDS: Final = 120.0
"""Subjects that were not used for so long are no longer looked at."""

log = logging.getLogger(__name__)


class DailyLease:
    """What this gateway may use today of one subject's limit. See `redisgate.limits.Lease`."""

    __slots__ = (
        "_owner",
        "ahead",
        "answered_day",
        "ask_at",
        "away",
        "counter",
        "exhausted",
        "idle",
        "limit",
        "low",
        "others",
        "subject",
        "touched",
        "used",
    )

    def __init__(self, owner: "DailyLeases", subject: UUID, limit: int, counter: Counter) -> None:
        self._owner = owner
        self.subject = subject
        self.limit = limit
        self.counter = counter
        self.ahead = max(limit // 100, 1)
        self.low = 0  # below this much left the next part is asked for
        self.others = 0  # leased by other gateways, as far as we know
        self.exhausted = False  # the last answer: there is nothing left to lease
        self.away = False  # there was no answer
        self.answered_day = 0
        self.ask_at = 0.0  # monotonic; not before
        self.idle = 0
        self.used = -1  # when we looked last
        self.touched = time.monotonic()

    def ceiling(self, now: float, used: int) -> int:
        """Up to how many commands this gateway may have counted today."""
        day = int(now // 86_400)
        if day != self.answered_day:
            # Nobody has leased of the new day.
            self.answered_day = day
            self.others, self.exhausted, self.low = 0, False, 0
        leased = self.counter.leased(now)
        if leased - used <= self.low:
            self._owner.want(self)
        if self.away:
            return max(self.limit - self.others, leased)
        return leased if self.exhausted else min(leased + self.ahead, self.limit)


class DailyLeases:
    """The leases of one worker."""

    def __init__(self, database: Database, gateway: UUID) -> None:
        """`gateway` is the same for all workers of this gateway, and after a restart."""
        self._database = database
        self._gateway = gateway
        self._leases: dict[UUID, DailyLease] = {}
        self._wanted: set[UUID] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to renew leases."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Give back what is not used, if PostgreSQL is there."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(DatabaseAway, TimeoutError):
            await self._renew(list(self._leases.values()), last=True)

    async def open(self, subject: UUID, limit: int, counter: Counter) -> DailyLease:
        """The lease for a subject; a new one has its first part, unless PostgreSQL is away."""
        lease = self._leases.get(subject)
        if lease is not None and lease.limit == limit:
            lease.touched = time.monotonic()
            return lease
        lease = self._leases[subject] = DailyLease(self, subject, limit, counter)
        now = time.time()
        lease.answered_day = int(now // 86_400)
        if counter.leased(now) - counter.day_usage(now) <= 0:
            await self._try_renew([lease])
        else:
            self.want(lease)
        return lease

    def want(self, lease: DailyLease) -> None:
        """Ask for the next part soon."""
        lease.touched = now = time.monotonic()
        self._leases[lease.subject] = lease
        if now >= lease.ask_at:
            self._wanted.add(lease.subject)
            self._wake.set()

    async def _run(self) -> None:
        next_round = time.monotonic() + RENEW_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.0, next_round - time.monotonic()))
            self._wake.clear()
            now = time.monotonic()
            if now >= next_round:
                next_round = now + RENEW_SECONDS
                chosen = self._due(now)
            else:
                chosen = [lease for subject in self._wanted if (lease := self._leases.get(subject)) is not None]
            self._wanted.clear()
            try:
                await self._try_renew(chosen)
            except Exception:
                log.exception("daily limits cannot be renewed")
                await asyncio.sleep(RENEW_SECONDS)

    def _due(self, now: float) -> list[DailyLease]:
        """Those that something has happened to, or that have something to give back."""
        due = []
        wall = time.time()
        for subject, lease in list(self._leases.items()):
            used = lease.counter.day_usage(wall)
            if used != lease.used:
                lease.idle = 0
                due.append(lease)
                continue
            lease.idle += 1
            if subject in self._wanted or lease.idle == IDLE_RENEWALS:
                due.append(lease)
            elif now - lease.touched > FORGET_SECONDS:
                del self._leases[subject]
        return due

    async def _try_renew(self, leases: list[DailyLease]) -> None:
        try:
            await self._renew(leases)
        except (DatabaseAway, TimeoutError):
            for lease in leases:
                lease.away = True
                lease.ask_at = time.monotonic() + RENEW_SECONDS

    async def _renew(self, leases: list[DailyLease], *, last: bool = False) -> None:
        """Report, lease, give back. Raises DatabaseAway."""
        # One process at a time leases for a subject, so that what it says of our lease holds until the answer is here.
        locked = sorted((lease for lease in leases if lease.counter.try_lock()), key=lambda lease: lease.subject)
        if not locked:
            return
        now = time.time()
        today = datetime.fromtimestamp(now, UTC).date()
        try:
            asked = [(lease, *self._report(lease, now, last)) for lease in locked]
            async with asyncio.timeout(QUERY_SECONDS):
                rows = await self._database.fetch(
                    "SELECT r.* FROM unnest($3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[])"
                    " WITH ORDINALITY AS a (subject, daily_limit, leased, used, keep, place),"
                    " LATERAL renew_daily_lease(a.subject, $1, $2, a.daily_limit, a.leased, a.used, a.keep) AS r"
                    " ORDER BY a.place",
                    today,
                    self._gateway,
                    [lease.subject for lease, *_ in asked],
                    [lease.limit for lease, *_ in asked],
                    [leased for _, leased, _, _ in asked],
                    [used for _, _, used, _ in asked],
                    [keep for _, _, _, keep in asked],
                )
            for (lease, leased, used, _), row in zip(asked, rows, strict=True):
                self._answered(lease, leased, used, row, today)
        finally:
            for lease in locked:
                lease.counter.unlock()

    @staticmethod
    def _report(lease: DailyLease, now: float, last: bool) -> tuple[int, int, int]:
        """What we hold, what we have used, and how much more we need; 0: nothing now, -1: nothing more."""
        used = lease.counter.day_usage(now)
        recent = int(lease.counter.rate_usage(now))
        lease.used = used
        keep = -1 if last else 0 if lease.idle >= IDLE_RENEWALS else max(2 * recent, 1)
        return lease.counter.leased(now), used, keep

    @staticmethod
    def _answered(lease: DailyLease, leased: int, used: int, row: Any, today: date) -> None:
        now = time.time()
        lease.away = False
        if datetime.fromtimestamp(now, UTC).date() != today:
            return  # midnight has passed meanwhile: it was about yesterday
        granted = row["granted"]
        lease.counter.lease(granted, now)
        spare = leased + granted - used
        lease.others = row["others"]
        lease.exhausted = spare <= 0
        lease.ahead = max(lease.limit // (100 * row["gateways"]), 1)
        lease.low = spare // 2
        lease.ask_at = time.monotonic() + PATIENCE_SECONDS if lease.exhausted else 0.0
