"""Limits over several workers' counters, without processes: what may be spent, and what clients are told."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from redisgate import limits, shared
from redisgate.limits import Limit, Meter
from redisgate.metering import READ, WRITE, UsageCell
from redisgate.shared import SharedState, SharedStateError, subject_digest
from resp.commands import bundled_table

DAY = 86_400.0
NOON = 20_000 * DAY + DAY / 2
SUBJECT = subject_digest(b"organization")
PING = [b"PING"]


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits.time, "time", clock.time)
    return clock


@pytest.fixture
def state() -> Iterator[SharedState]:
    state = SharedState.anonymous(4)
    yield state
    state.close()


def workers(state: SharedState, rate: int | None, daily: int | None) -> list[Meter]:
    return [Meter([Limit(state.claim(SUBJECT, index), rate, daily, workers=4)]) for index in range(4)]


@pytest.mark.parametrize("limit", [1, 7, 100, 10_000])
def test_four_workers_together_spend_exactly_a_daily_limit(state: SharedState, clock: Clock, limit: int) -> None:
    meters = workers(state, None, limit)
    passed = 0
    for number in range(4 * limit + 100):
        clock.now += 0.0001
        passed += meters[number % 4].admit(PING) is None
    assert passed == limit


@pytest.mark.parametrize("order", ["in turn", "one after another"])
def test_allowances_never_add_up_to_more_than_was_left(state: SharedState, clock: Clock, order: str) -> None:
    meters = workers(state, 1000, None)
    passed = 0
    for number in range(8000):  # within a millisecond, so that every allowance is still good
        clock.now += 1e-7
        passed += meters[number % 4 if order == "in turn" else number // 2000].admit(PING) is None
    assert 1000 <= passed <= 1001


def test_a_rate_slides_with_time(state: SharedState, clock: Clock) -> None:
    [meter, *_] = workers(state, 100, None)
    passed = 0
    for _ in range(50_000):
        clock.now += 0.0001  # ten times as often as is allowed, for five seconds
        passed += meter.admit(PING) is None
    assert 450 <= passed <= 600


def test_a_daily_limit_begins_anew_at_midnight(state: SharedState, clock: Clock) -> None:
    [meter, *_] = workers(state, None, 3)
    clock.now = 20_000 * DAY + DAY - 0.5
    assert [meter.admit(PING) is None for _ in range(4)] == [True, True, True, False]
    refusal = meter.admit(PING)
    assert refusal is not None
    assert (refusal.status, refusal.retry_after) == (429, 1)
    assert b"RateLimit-Reset: 1\r\n" in meter.headers()
    clock.now += 1
    assert meter.admit(PING) is None
    assert b"RateLimit-Remaining: 2\r\n" in meter.headers()


def test_of_two_limits_the_nearer_one_is_told(state: SharedState, clock: Clock) -> None:
    own = Limit(state.claim(subject_digest(b"key"), 0), None, 5, workers=4)
    shared_limit = Limit(state.claim(SUBJECT, 0), 50, 1000, workers=4)
    meter = Meter([own, shared_limit])
    assert meter.admit(PING) is None
    assert meter.headers().startswith(b"RateLimit-Limit: 5\r\n")
    assert meter.headers().endswith(b"RateLimit-Remaining: 4\r\n")
    assert meter.admit_all([PING] * 5) is not None  # whole or not at all
    assert meter.admit_all([PING] * 4) is None
    assert meter.admit(PING) is not None
    assert state.claim(SUBJECT, 0).day_usage(clock.now) == 5


class WaitingLease:
    """Grants nothing until it was asked."""

    def __init__(self) -> None:
        self.granted = 0
        self.asked = 0

    def ceiling(self, now: float, used: int) -> int:
        return self.granted

    def others(self) -> int:
        return 3

    def may_grow(self, need: int) -> bool:
        self.asked = need
        return not self.granted

    async def answer(self) -> None:
        self.granted = 7


def test_what_is_not_leased_yet_is_waited_for(state: SharedState, clock: Clock) -> None:
    lease = WaitingLease()
    meter = Meter([Limit(state.claim(SUBJECT, 0), None, 10, workers=4, lease=lease)])
    refusal = meter.admit_all([PING] * 2)
    assert refusal is not None
    assert refusal.wait is not None
    assert lease.asked == 2
    asyncio.run(refusal.wait())
    assert meter.admit_all([PING] * 2) is None
    assert b"RateLimit-Remaining: 5\r\n" in meter.headers()  # of ten, three are others' and two were spent
    assert meter.admit_all([PING] * 5) is None
    refusal = meter.admit(PING)
    assert refusal is not None
    assert refusal.wait is None
    assert refusal.line == b"ERR max daily request limit exceeded. Limit: 10, Usage: 10"


def test_usage_tells_reads_from_writes_and_counts_bytes() -> None:
    cell = UsageCell(bundled_table())
    meter = Meter(cell=cell, max_bytes=100)
    assert meter.admit([b"get", b"key"]) is None
    assert meter.admit([b"SeT", b"key", b"value"]) is None
    assert meter.admit_all([[b"PING"], [b"HGETALL", b"h"], [b"JSON.SET", b"j"]]) is None
    assert cell.commands[READ] == 2
    assert cell.commands[WRITE] == 1
    assert sum(cell.commands) == 5
    assert cell.bytes_in == len(b"getkeySeTkeyvaluePINGHGETALLhJSON.SETj")
    refusal = meter.admit([b"set", b"key", b"x" * 100])
    assert refusal is not None
    assert (refusal.status, refusal.line) == (
        413,
        b"ERR max request size exceeded. Limit: 100 bytes, Actual: 106 bytes",
    )
    assert sum(cell.commands) == 5


# Records that are added while the gateway runs


def test_a_worker_counts_for_a_token_that_another_has_just_brought(tmp_path: Path) -> None:
    state = SharedState.create(tmp_path / "counts", 2, [])
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for number in range(1000):
                state.claim(subject_digest(b"%d" % number), 1).add(number + 1, NOON)
            os.write(send, b"x")
            status = 0
        finally:
            os._exit(status)
    for number in reversed(range(1000)):
        state.claim(subject_digest(b"%d" % number), 0).add(1, NOON)
    assert os.read(receive, 1) == b"x"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for number in range(1000):
        assert state.claim(subject_digest(b"%d" % number), 0).day_usage(NOON) == number + 2
    state.close()
    os.close(receive)
    os.close(send)


def test_counts_and_leases_of_added_records_outlive_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.time, "time", lambda: NOON)
    state = SharedState.create(tmp_path / "counts", 2, [])
    counter = state.claim(SUBJECT, 1)
    counter.add(5, NOON)
    assert counter.try_lock()
    counter.lease(9, NOON)
    counter.lease(-2, NOON)
    counter.unlock()
    state.close()
    again = SharedState.create(tmp_path / "counts", 3, [])
    counter = again.claim(SUBJECT, 0)
    assert (counter.day_usage(NOON), counter.leased(NOON)) == (5, 7)
    assert counter.leased(NOON + DAY) == 0
    again.close()


def test_the_number_of_records_is_bounded(monkeypatch: pytest.MonkeyPatch, state: SharedState) -> None:
    monkeypatch.setattr(shared, "MAX_RECORDS", 3)
    for number in range(3):
        state.claim(subject_digest(b"%d" % number), 0)
    with pytest.raises(SharedStateError):
        state.claim(subject_digest(b"one more"), 0)
    assert state.claim(subject_digest(b"2"), 0).day_usage(NOON) == 0


def test_a_lock_that_its_holder_did_not_live_to_undo_is_free(tmp_path: Path) -> None:
    state = SharedState.create(tmp_path / "counts", 2, [])
    counter = state.claim(SUBJECT, 0)
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        state.claim(SUBJECT, 1).try_lock()
        os.write(send, b"x")
        signal.pause()
        os._exit(1)
    os.close(send)
    assert os.read(receive, 1) == b"x"
    assert not counter.try_lock()
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert counter.try_lock()
    counter.unlock()
    state.close()
    os.close(receive)
