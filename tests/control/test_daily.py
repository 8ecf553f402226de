"""Leases of a daily limit among gateways, step by step on a real PostgreSQL."""

import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from control import daily
from control.daily import DailyLease, DailyLeases
from control.database import Database
from redisgate import limits
from redisgate.limits import Limit, Meter
from redisgate.shared import SharedState, subject_digest

PING = [b"PING"]
DAY = 86_400


class Clock:
    """The wall clock, which can be set forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def time(self) -> float:
        return time.time() + self.ahead

    def set_before_midnight(self, seconds: float) -> None:
        """So many seconds before the next midnight."""
        self.ahead = DAY - time.time() % DAY - seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (daily, limits):
        replacement = type("Time", (), {"time": staticmethod(clock.time), "monotonic": staticmethod(time.monotonic)})
        monkeypatch.setattr(module, "time", replacement)
    return clock


class Gateway:
    """One gateway of one worker, whose leases are renewed when a test says so."""

    def __init__(self, database: Database, subject: UUID, limit: int, state: SharedState) -> None:
        self.leases = DailyLeases(database, uuid4())
        self.counter = state.claim(subject_digest(subject.bytes), 0)
        self.subject = subject
        self.limit = limit
        self.lease: DailyLease
        self.meter: Meter

    async def open(self) -> None:
        self.lease = await self.leases.open(self.subject, self.limit, self.counter)
        limit = Limit(self.counter, None, self.limit, workers=1, lease=self.lease)
        self.lease.on_report = limit.flush
        self.meter = Meter([limit])

    async def spend(self, count: int) -> int:
        """Try so many commands, waiting for the lease where that helps; how many passed."""
        passed = 0
        for _ in range(count):
            for _ in range(20):
                refusal = self.meter.admit(PING)
                if refusal is None or refusal.wait is None:
                    passed += refusal is None
                    break
                await self.leases._renew([self.lease])
        return passed


@pytest.fixture
def states() -> Iterator[list[SharedState]]:
    states = [SharedState.anonymous(1) for _ in range(3)]
    yield states
    for state in states:
        state.close()


async def gateways(database: Database, states: list[SharedState], limit: int, count: int) -> list[Gateway]:
    subject = uuid4()
    made = [Gateway(database, subject, limit, states[number]) for number in range(count)]
    for one in made:
        await one.open()
    return made


async def row(database: Database, gateway: Gateway) -> Any:
    return await database.fetchrow(
        "SELECT sum(leased)::bigint AS leased, sum(used)::bigint AS used FROM daily_leases WHERE subject = $1",
        gateway.subject,
    )


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 99, 1000])
async def test_one_gateway_alone_spends_exactly_the_limit(
    database: Database, states: list[SharedState], limit: int, clock: Clock
) -> None:
    [alone] = await gateways(database, states, limit, 1)
    assert await alone.spend(limit + 10) == limit
    assert (await row(database, alone))["leased"] == limit


@pytest.mark.parametrize("limit", [10, 100, 1000])
async def test_three_gateways_in_turn_never_pass_the_limit(
    database: Database, states: list[SharedState], limit: int, clock: Clock
) -> None:
    three = await gateways(database, states, limit, 3)
    passed = 0
    for _ in range(limit):
        for one in three:
            passed += await one.spend(1)
    assert 0.9 * limit <= passed <= limit
    assert (await row(database, three[0]))["leased"] <= limit


async def test_a_gateway_that_is_gone_frees_what_it_did_not_use(
    database: Database, states: list[SharedState], clock: Clock
) -> None:
    gone, left = await gateways(database, states, 1000, 2)
    assert await gone.spend(10) == 10
    await gone.leases._renew([gone.lease])  # its last report
    await database.execute(
        "UPDATE daily_leases SET seen_at = seen_at - interval '11 s' WHERE subject = $1 AND gateway = $2",
        gone.subject,
        gone.leases._gateway,
    )
    assert await left.spend(1200) == 990


async def test_who_was_silent_too_long_finds_what_it_held_with_others(
    database: Database, states: list[SharedState], clock: Clock
) -> None:
    silent, busy = await gateways(database, states, 1000, 2)
    assert await silent.spend(10) == 10
    await silent.leases._renew([silent.lease])
    await database.execute(
        "UPDATE daily_leases SET seen_at = seen_at - interval '11 s' WHERE subject = $1 AND gateway = $2",
        silent.subject,
        silent.leases._gateway,
    )
    assert await busy.spend(2000) == 990
    clock.ahead += 1  # its allowance is over
    silent.lease.renewed_at -= 60  # and what it remembers is too old to be trusted
    assert await silent.spend(50) == 0
    assert (await row(database, silent))["leased"] == 1000


async def test_what_is_stopped_gives_back(database: Database, states: list[SharedState], clock: Clock) -> None:
    first, second = await gateways(database, states, 1000, 2)
    assert await first.spend(5) == 5
    await first.leases.stop()
    assert await second.spend(2000) == 995


async def test_a_new_day_is_leased_anew(database: Database, states: list[SharedState], clock: Clock) -> None:
    clock.set_before_midnight(30)
    two = await gateways(database, states, 20, 2)
    assert 18 <= await two[0].spend(10) + await two[1].spend(30) <= 20
    assert await two[1].spend(1) == 0
    clock.ahead += 60
    assert await two[0].spend(5) == 5
    headers = two[0].meter.headers()
    assert b"RateLimit-Limit: 20" in headers
    assert two[0].counter.day_usage(clock.time()) == 5


async def test_without_postgresql_a_gateway_goes_on_to_what_others_left(
    database: Database, states: list[SharedState], clock: Clock
) -> None:
    one, other = await gateways(database, states, 100, 2)
    assert await other.spend(10) == 10
    await one.leases._renew([one.lease])
    held = one.lease.held_by_others
    assert held >= 10
    one.leases._database = Database("postgresql://u:p@/x?host=/nowhere")
    assert await one.spend(200) == 100 - held
    one.leases._database = database
    await one.leases._renew([one.lease])
    assert not one.lease.away
