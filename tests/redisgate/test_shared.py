"""Counters and script aliases that processes share: real processes, real files, real kills."""

import logging
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from redisgate import shared
from redisgate.access import token_digest
from redisgate.shared import ALIAS_CAPACITY, Counter, SharedState, SharedStateError, instance_digest

DAY = 86_400.0
NOON = 20_000 * DAY + DAY / 2
TOKEN = token_digest("token")
OTHER = token_digest("other")


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a process of its own; its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def wait_all(pids: list[int]) -> None:
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * len(pids)


@pytest.fixture
def noon(monkeypatch: pytest.MonkeyPatch) -> float:
    """The start of a gateway happens at noon."""
    monkeypatch.setattr(shared.time, "time", lambda: NOON)
    return NOON


def reopened(path: Path, workers: int, digests: list[bytes]) -> Counter:
    return SharedState.create(path, workers, digests).counter(TOKEN, 0)


def test_four_processes_count_at_once_and_the_sum_is_exact(tmp_path: Path) -> None:
    state = SharedState.create(tmp_path / "counts", 4, [TOKEN, OTHER])

    def count(worker: int) -> None:
        counter = state.counter(TOKEN, worker)
        for step in range(20_000):
            counter.add(1 + step % 3, NOON)

    wait_all([fork(lambda worker=worker: count(worker)) for worker in range(4)])
    expected = 4 * sum(1 + step % 3 for step in range(20_000))
    assert state.counter(TOKEN, 0).day_usage(NOON) == expected
    assert state.counter(TOKEN, 3).rate_usage(NOON) == expected
    assert state.counter(OTHER, 0).day_usage(NOON) == 0
    state.close()


def test_what_a_killed_worker_counted_is_there_and_its_replacement_goes_on(tmp_path: Path, noon: float) -> None:
    state = SharedState.create(tmp_path / "counts", 2, [TOKEN])
    receive, send = os.pipe()

    def count_for_ever() -> None:
        counter = state.counter(TOKEN, 1)
        while True:
            counter.add(1, NOON)
            os.write(send, b".")

    pid = fork(count_for_ever)
    os.close(send)
    seen = sum(len(os.read(receive, 1)) for _ in range(1000))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while chunk := os.read(receive, 65536):
        seen += len(chunk)
    os.close(receive)
    counted = state.counter(TOKEN, 0).day_usage(NOON)
    assert counted in (seen, seen + 1)
    state.counter(TOKEN, 1).add(5, NOON)
    assert state.counter(TOKEN, 0).day_usage(NOON) == counted + 5
    os.close(state._lock_fd)  # as if the supervisor had been killed, too: nothing is flushed or closed in order
    assert reopened(tmp_path / "counts", 2, [TOKEN]).day_usage(NOON) == counted + 5


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_counts_of_today_move_to_a_file_for_another_number_of_workers(
    tmp_path: Path, noon: float, workers: int
) -> None:
    state = SharedState.create(tmp_path / "counts", 2, [TOKEN])
    for worker in range(2):
        for incarnation in range(2):
            state.enter(incarnation)
            state.counter(TOKEN, worker).add(10 ** (worker * 2 + incarnation), NOON)
    state.close()
    assert reopened(tmp_path / "counts", workers, [TOKEN]).day_usage(NOON) == 1111


def test_counts_of_yesterday_are_not_carried_over(tmp_path: Path, noon: float) -> None:
    state = SharedState.create(tmp_path / "counts", 2, [TOKEN])
    state.counter(TOKEN, 0).add(7, NOON - DAY)
    state.close()
    assert reopened(tmp_path / "counts", 2, [TOKEN]).day_usage(NOON) == 0


def test_a_token_that_is_gone_for_a_while_keeps_its_count_until_midnight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "counts"
    monkeypatch.setattr(shared.time, "time", lambda: NOON)
    state = SharedState.create(path, 2, [TOKEN])
    state.counter(TOKEN, 1).add(7, NOON)
    state.close()
    SharedState.create(path, 2, [OTHER]).close()
    state = SharedState.create(path, 2, [TOKEN])
    assert state.counter(TOKEN, 0).day_usage(NOON) == 7
    state.close()
    monkeypatch.setattr(shared.time, "time", lambda: NOON + DAY)
    state = SharedState.create(path, 2, [OTHER])
    with pytest.raises(KeyError):
        state.counter(TOKEN, 0)
    state.close()


def test_counts_survive_a_start_with_a_clock_that_is_not_yet_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.time, "time", lambda: NOON)
    state = SharedState.create(tmp_path / "counts", 1, [TOKEN])
    state.counter(TOKEN, 0).add(7, NOON)
    state.close()
    monkeypatch.setattr(shared.time, "time", lambda: 5.0)
    assert reopened(tmp_path / "counts", 1, [TOKEN]).day_usage(NOON) == 7


def _garbage(data: bytearray) -> bytes:
    return b"not counts at all" * 40


def _cut_short(data: bytearray) -> bytes:
    return data[:-8]


def _emptied(data: bytearray) -> bytes:
    return b""


def _digest_flipped(data: bytearray) -> bytes:
    data[70] ^= 1
    return data


def _zeroed_record(data: bytearray) -> bytes:
    return data[:64] + bytes(len(data) - 64)


def _newer_format(data: bytearray) -> bytes:
    struct.pack_into("@I", data, 8, 99)
    return data


def _slots_changed(data: bytearray) -> bytes:
    struct.pack_into("@I", data, 12, 1)
    return data


@pytest.mark.parametrize(
    "damage", [_garbage, _cut_short, _emptied, _digest_flipped, _zeroed_record, _newer_format, _slots_changed]
)
def test_a_corrupt_file_is_set_aside_with_an_error_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytearray], bytes]
) -> None:
    path = tmp_path / "counts"
    state = SharedState.create(path, 2, [TOKEN])
    state.counter(TOKEN, 0).add(7, time.time())
    state.close()
    damaged = bytes(damage(bytearray(path.read_bytes())))
    path.write_bytes(damaged)
    state = SharedState.create(path, 2, [TOKEN])
    assert state.counter(TOKEN, 0).day_usage(time.time()) == 0
    assert (tmp_path / "counts.corrupt").read_bytes() == damaged
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(path) in record.getMessage()
    state.close()


def test_a_second_gateway_on_the_same_directory_is_told_who_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "LOCK_PATIENCE", 0.05)
    state = SharedState.create(tmp_path / "counts", 1, [TOKEN])
    with pytest.raises(SharedStateError, match=rf"another gateway \(process {os.getpid()}\)"):
        SharedState.create(tmp_path / "counts", 1, [TOKEN])
    state.close()
    SharedState.create(tmp_path / "counts", 1, [TOKEN]).close()


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SharedStateError, match=r"cannot keep counters in .*file"):
        SharedState.create(tmp_path / "file" / "state" / "counts", 1, [TOKEN])


@pytest.mark.parametrize("kind", ["file", "anonymous"])
def test_workers_of_before_and_after_new_tokens_count_together(tmp_path: Path, kind: str, noon: float) -> None:
    path = tmp_path / "counts"
    state = SharedState.create(path, 2, [TOKEN]) if kind == "file" else SharedState.anonymous(2, [TOKEN])
    old = state.counter(TOKEN, 0)
    many = [token_digest(f"token {number}") for number in range(500)]
    state.extend([*many, TOKEN, many[0]])
    state.enter(1)
    new = state.counter(TOKEN, 0)
    last = state.counter(many[-1], 1)
    old.add(1, NOON)
    new.add(10, NOON)
    old.add(100, NOON)
    last.add(3, NOON)
    assert old.day_usage(NOON) == new.day_usage(NOON) == 111
    assert old.rate_usage(NOON) == new.rate_usage(NOON) == 111
    state.close()
    if kind == "file":
        state = SharedState.create(path, 1, [])
        assert state.counter(TOKEN, 0).day_usage(NOON) == 111
        assert state.counter(many[-1], 0).day_usage(NOON) == 3
        with pytest.raises(KeyError):
            state.counter(many[0], 0)
        state.close()


def test_both_incarnations_of_one_worker_count_at_once_and_the_sum_is_exact() -> None:
    state = SharedState.anonymous(1, [TOKEN])

    def count(incarnation: int) -> None:
        state.enter(incarnation)
        counter = state.counter(TOKEN, 0)
        for _ in range(20_000):
            counter.add(1, NOON)

    wait_all([fork(lambda incarnation=incarnation: count(incarnation)) for incarnation in range(2)])
    assert state.counter(TOKEN, 0).day_usage(NOON) == 40_000


def test_the_window_slides_from_second_to_second() -> None:
    state = SharedState.anonymous(2, [TOKEN])
    one, two = state.counter(TOKEN, 0), state.counter(TOKEN, 1)
    one.add(30, NOON + 0.9)
    two.add(10, NOON + 0.9)
    assert one.rate_usage(NOON + 0.95) == 40
    two.add(2, NOON + 1.0)
    assert one.rate_usage(NOON + 1.25) == pytest.approx(2 + 40 * 0.75)
    assert one.rate_usage(NOON + 2.5) == pytest.approx(2 * 0.5)
    assert one.rate_usage(NOON + 3.0) == 0
    assert two.day_usage(NOON + 3.0) == 42


def test_a_day_begins_at_utc_midnight() -> None:
    counter = SharedState.anonymous(1, [TOKEN]).counter(TOKEN, 0)
    midnight = 20_001 * DAY
    counter.add(5, midnight - 0.001)
    assert counter.day_usage(midnight - 0.001) == 5
    assert counter.day_usage(midnight) == 0
    counter.add(1, midnight)
    assert counter.day_usage(midnight + DAY - 0.001) == 1


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0, 3600.0], ids=lambda step: f"back {step:g} s")
def test_a_clock_set_back_within_the_day_loses_no_day_count(step: float) -> None:
    state = SharedState.anonymous(2, [TOKEN])
    one, two = state.counter(TOKEN, 0), state.counter(TOKEN, 1)
    one.add(5, NOON)
    one.add(5, NOON - step)
    two.add(1, NOON - step)
    assert two.day_usage(NOON - step) == 11
    assert 0 <= two.rate_usage(NOON - step) <= 11
    assert two.rate_usage(NOON + 10) == 0


def test_a_clock_set_back_over_midnight_does_not_give_the_daily_limit_away_again() -> None:
    counter = SharedState.anonymous(1, [TOKEN]).counter(TOKEN, 0)
    midnight = 20_001 * DAY
    counter.add(5, midnight + 1)
    assert counter.day_usage(midnight - 1) == 5
    counter.add(2, midnight - 1)
    assert counter.day_usage(midnight - 1) == 7
    assert counter.day_usage(midnight + 1) == 7
    assert counter.day_usage(midnight + DAY) == 0


def test_a_clock_that_was_far_ahead_does_not_stop_the_counting() -> None:
    counter = SharedState.anonymous(1, [TOKEN]).counter(TOKEN, 0)
    counter.add(1_000_000, NOON + 400 * DAY)
    assert counter.day_usage(NOON) == 0
    counter.add(3, NOON)
    assert counter.day_usage(NOON) == 3
    assert counter.rate_usage(NOON) == 3


def test_flush_writes_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory(bytearray):
        flushes = 0

        def flush(self) -> None:
            self.flushes += 1

    state = SharedState.create(tmp_path / "counts", 1, [TOKEN])
    memory = Memory(state._memory)
    monkeypatch.setattr(state, "_memory", memory)
    state.flush()
    state.flush()
    assert memory.flushes == 1
    memory[-1] ^= 1
    state.flush()
    assert memory.flushes == 2


# Script aliases

INSTANCE = instance_digest(b"main")


def sha(number: int) -> bytes:
    return b"%040x" % number


def test_an_alias_is_seen_by_other_processes_when_publish_returns() -> None:
    state = SharedState.anonymous(2)
    assert state.alias_position == 0
    wait_all([fork(lambda: state.publish_alias(INSTANCE, sha(1).upper(), sha(2)))])
    assert state.alias_position == 1
    assert state.aliases_since(0) == (1, [(INSTANCE, sha(1), sha(2))])
    assert state.aliases_since(1) == (1, [])


def test_processes_that_publish_at_once_lose_nothing_and_readers_see_whole_records() -> None:
    state = SharedState.anonymous(4)
    writers, each = 4, 2_000  # together twice what the ring holds

    def publish(writer: int) -> None:
        for number in range(each):
            value = writer * each + number
            state.publish_alias(INSTANCE, sha(value), sha(value + (1 << 150)))

    pids = [fork(lambda writer=writer: publish(writer)) for writer in range(writers)]
    position, count = 0, 0
    latest = [-1] * writers
    while position < writers * each:
        position, found = state.aliases_since(position)
        for instance, original, rewritten in found:
            value = int(original, 16)
            assert instance == INSTANCE
            assert int(rewritten, 16) == value + (1 << 150)
            assert value % each > latest[value // each]
            latest[value // each] = value % each
            count += 1
    wait_all(pids)
    assert count <= writers * each
    # A reader that fell behind has missed what was overwritten meanwhile, and nothing of what is there.
    _, held = state.aliases_since(0)
    assert len(held) == ALIAS_CAPACITY - 1
    for _, original, _ in held:
        value = int(original, 16)
        assert value % each <= latest[value // each]


def test_a_reader_that_fell_behind_gets_the_latest_that_the_ring_holds() -> None:
    state = SharedState.anonymous(1)
    total = ALIAS_CAPACITY + 100
    for number in range(total):
        state.publish_alias(INSTANCE, sha(number), sha(number))
    position, found = state.aliases_since(50)
    assert position == total
    assert [int(original, 16) for _, original, _ in found] == list(range(101, total))


def test_a_writer_killed_with_the_lock_in_hand_does_not_stop_the_others() -> None:
    state = SharedState.anonymous(2)
    receive, send = os.pipe()

    def die_inside() -> None:
        shared.fcntl.lockf(state._aliases._fd, shared.fcntl.LOCK_EX)
        os.write(send, b"!")
        signal.pause()

    pid = fork(die_inside)
    assert os.read(receive, 1) == b"!"
    os.close(receive)
    os.close(send)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    state.publish_alias(INSTANCE, sha(1), sha(2))
    assert state.alias_position == 1


@pytest.mark.parametrize(
    ("instance", "original"),
    [(b"short", sha(1)), (INSTANCE, b"12"), (INSTANCE, b"x" * 40)],
    ids=["id", "length", "hex"],
)
def test_what_is_no_digest_is_refused(instance: bytes, original: bytes) -> None:
    state = SharedState.anonymous(1)
    with pytest.raises(ValueError, match=r"digest|digits|hex"):
        state.publish_alias(instance, original, sha(1))
    assert state.alias_position == 0
