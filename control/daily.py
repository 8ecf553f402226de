"""Daily limits that several gateways share: each leases parts of what is left, and spends those without asking.

PostgreSQL keeps, per subject (an organization, an API key) and day, what each gateway has leased and used; a lease is
given under a lock, and never beyond the limit, so that the limit cannot be passed. A gateway asks for the next part
while it still has half of the last; should the answer be late all the same, requests wait for it. Who has leased more
than it needs gives back while others want more.

Within a gateway the workers spend one lease together: it lies in the memory they share, beside the count, and
outlives a kill with it. A gateway that is gone for good loses its lease, less what it last said it had used.

With PostgreSQL away each gateway goes on up to the limit less what others had leased when it last heard.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
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
"""Renewals of a lease that nobody used, after which others may have what they need of it."""
FORGET_RENEWALS: Final = 60
"""Subjects that were not used at so many are given back whole, and no longer looked at."""
STALE_SECONDS: Final = 6.0
"""After which a lease that was not renewed may be given to others; less than the 10 s of `renew_daily_lease`."""
BUSY_SECONDS: Final = 0.002
"""To wait while another worker of this gateway renews the same lease."""

_DAY_SECONDS = 86_400

log = logging.getLogger(__name__)


class DailyLease:
    """What this gateway may use today of one subject's limit. See `redisgate.limits.Lease`."""

    __slots__ = (
        "_answered",
        "_owner",
        "ask_at",
        "away",
        "counter",
        "day",
        "held_by_others",
        "idle",
        "limit",
        "low",
        "need",
        "on_report",
        "renewed_at",
        "subject",
        "used",
    )

    def __init__(self, owner: "DailyLeases", subject: UUID, limit: int, counter: Counter) -> None:
        self._owner = owner
        self._answered = asyncio.Event()
        self.subject = subject
        self.limit = limit
        self.counter = counter
        self.day = 0  # that all of this is about
        self.held_by_others = 0
        self.low = 0  # with less than this left the next part is asked for
        self.need = 0  # commands that wait for room
        self.away = False  # PostgreSQL did not answer
        self.ask_at = 0.0  # monotonic; to ask before would not help
        self.renewed_at = 0.0  # monotonic
        self.idle = 0  # renewals without use
        self.on_report: Callable[[float], None] | None = None  # to count what was spent and is not counted yet
        self.used = -1  # at the last renewal

    def ceiling(self, now: float, used: int) -> int:
        """Up to how many commands this gateway may have counted today."""
        day = int(now // _DAY_SECONDS)
        if day != self.day:
            # Nobody has leased of the new day.
            self.day, self.held_by_others, self.low, self.ask_at = day, 0, 0, 0.0
        leased = self.counter.leased(now)
        if self.away:
            self._owner.want(self)
            return max(self.limit - self.held_by_others, leased)
        moment = time.monotonic()
        if moment - self.renewed_at > STALE_SECONDS:
            # Others may have taken what we held: it is ours again when PostgreSQL says so.
            self._owner.want(self)
            return used
        if leased - used <= self.low and moment >= self.ask_at:
            self._owner.want(self)
        return leased

    def others(self) -> int:
        """How much of today's limit other gateways hold, as far as is known."""
        return self.held_by_others

    def may_grow(self, need: int) -> bool:
        """Whether it is worth waiting for room; asks for it."""
        if self.away or time.monotonic() < self.ask_at:
            return False
        self.need = max(self.need, need)
        self._owner.want(self)
        return True

    async def answer(self) -> None:
        """Wait until more is known."""
        try:
            await asyncio.wait_for(self._answered.wait(), 2 * QUERY_SECONDS)
        except TimeoutError:
            self.away = True

    def answered(self) -> None:
        """More is known: let those who wait look."""
        self._answered.set()
        self._answered = asyncio.Event()


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
        await self._renew(list(self._leases.values()), last=True)

    async def open(self, subject: UUID, limit: int, counter: Counter) -> DailyLease:
        """The lease for a subject; a new one has its first part, unless PostgreSQL is away."""
        lease = self._leases.get(subject)
        if lease is None or lease.limit != limit:
            lease = DailyLease(self, subject, limit, counter)
            lease.day = int(time.time() // _DAY_SECONDS)
            self._leases[subject] = lease
            await self._renew([lease])
        return lease

    def want(self, lease: DailyLease) -> None:
        """Renew a lease soon."""
        lease.idle = 0
        self._leases[lease.subject] = lease
        self._wanted.add(lease.subject)
        self._wake.set()

    async def _run(self) -> None:
        next_round = time.monotonic() + RENEW_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.0, next_round - time.monotonic()))
            self._wake.clear()
            now = time.monotonic()
            wanted, self._wanted = self._wanted, set()
            chosen = [self._leases[subject] for subject in wanted if subject in self._leases]
            if now >= next_round:
                next_round = now + RENEW_SECONDS
                chosen = self._due()
            # One that did not get an answer is not asked at once again.
            chosen = [lease for lease in chosen if not lease.away or now >= lease.ask_at]
            try:
                busy = await self._renew(chosen)
            except Exception:
                log.exception("daily limits cannot be renewed")
                await asyncio.sleep(RENEW_SECONDS)
                continue
            if busy:
                await asyncio.sleep(BUSY_SECONDS)
                for lease in busy:
                    if lease.need:
                        self.want(lease)
                    lease.answered()

    def _due(self) -> list[DailyLease]:
        """Those that are in use, or hold what others may need."""
        due = []
        now = time.time()
        for subject, lease in list(self._leases.items()):
            used = lease.counter.day_usage(now)
            lease.idle = 0 if used != lease.used or lease.need else lease.idle + 1
            if lease.idle > FORGET_RENEWALS or (lease.idle > IDLE_RENEWALS and lease.counter.leased(now) <= used):
                del self._leases[subject]
            else:
                due.append(lease)
        return due

    async def _renew(self, leases: list[DailyLease], *, last: bool = False) -> list[DailyLease]:
        """Report, lease, give back. Returns those that another worker of this gateway renews at this moment."""
        # One process at a time renews a lease, so that what it says of it holds until the answer is here.
        locked = sorted((lease for lease in leases if lease.counter.try_lock()), key=lambda lease: lease.subject)
        busy = [lease for lease in leases if lease not in locked]
        if not locked:
            return busy
        now = time.time()
        today = datetime.fromtimestamp(now, UTC).date()
        try:
            asked = [(lease, *_report(lease, now, last)) for lease in locked]
            async with asyncio.timeout(QUERY_SECONDS):
                rows = await self._database.fetch(
                    "SELECT r.* FROM unnest($3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[])"
                    " WITH ORDINALITY AS a (subject, daily_limit, leased, used, need, place),"
                    " LATERAL renew_daily_lease(a.subject, $1, $2, a.daily_limit, a.leased, a.used, a.need) AS r"
                    " ORDER BY a.place",
                    today,
                    self._gateway,
                    [lease.subject for lease, *_ in asked],
                    [lease.limit for lease, *_ in asked],
                    [leased for _, leased, _, _ in asked],
                    [used for _, _, used, _ in asked],
                    [need for _, _, _, need in asked],
                )
            for (lease, leased, used, _), row in zip(asked, rows, strict=True):
                _take(lease, leased, used, row, today)
        except (DatabaseAway, TimeoutError):
            for lease in locked:
                lease.away = True
                lease.ask_at = time.monotonic() + RENEW_SECONDS
        finally:
            for lease in locked:
                lease.counter.unlock()
                lease.answered()
        return busy


def _report(lease: DailyLease, now: float, last: bool) -> tuple[int, int, int]:
    """What we hold, what we have used, and how much more we need; 0: nothing now, -1: nothing more."""
    if lease.on_report is not None:
        lease.on_report(now)
    used = lease.counter.day_usage(now)
    lease.used = used
    if last or lease.idle >= FORGET_RENEWALS:
        need = -1
    elif lease.idle >= IDLE_RENEWALS:
        need = 0
    else:
        need = max(2 * int(lease.counter.rate_usage(now)), lease.need, 1)
    return lease.counter.leased(now), used, need


def _take(lease: DailyLease, leased: int, used: int, row: Any, today: date) -> None:
    """What PostgreSQL says of a lease."""
    now = time.time()
    moment = time.monotonic()
    lease.away = False
    wanted, lease.need = lease.need, 0
    if datetime.fromtimestamp(now, UTC).date() != today:
        lease.ask_at = 0.0
        return  # midnight has passed meanwhile: it was about yesterday
    granted = row["granted"]
    lease.counter.lease(granted, now)
    lease.renewed_at = moment
    lease.held_by_others = row["others"]
    spare = leased + granted - used
    lease.low = spare // 2
    lease.ask_at = moment + PATIENCE_SECONDS if spare < max(wanted, 1) else 0.0
