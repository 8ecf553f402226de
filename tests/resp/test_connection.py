"""One connection, byte by byte: replies find their waiters, however they are cut."""

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resp.connection import MAX_CALL_BYTES, STREAM_THRESHOLD_BYTES, Connection, FutureWaiter
from resp.errors import ReplyLost, ReplyTooLarge


class FakeTransport:
    """Takes what is written and remembers whether it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None:
        pass

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def abort(self) -> None:
        self.closed = True


def bulk(body: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(body), body)


async def connect(counts: list[int]) -> tuple[Connection, FakeTransport, list["asyncio.Future[bytes]"]]:
    """A connection on which commands were sent, with so many replies each, and the futures of these."""
    loop = asyncio.get_running_loop()
    connection = Connection(loop, lambda connection: None)
    transport: Any = FakeTransport()
    connection.connection_made(transport)
    waiters = [FutureWaiter(count, loop) for count in counts]
    for waiter in waiters:
        connection.send(b"x", waiter)
    await asyncio.sleep(0)  # what was sent in one turn of the loop is written in the next
    return connection, transport, [waiter.future for waiter in waiters]


scalars = st.one_of(
    st.binary(max_size=3000).map(bulk),
    st.sampled_from([b"$-1\r\n", b"*-1\r\n", b"*0\r\n", b"+OK\r\n", b"-ERR no\r\n", b":0\r\n", b":123456\r\n"]),
)
replies = st.one_of(
    scalars,
    st.integers(1000, 5000).map(lambda size: bulk(b"x" * size)),
    st.lists(scalars, min_size=1, max_size=3).map(lambda items: b"*%d\r\n%b" % (len(items), b"".join(items))),
)


@settings(deadline=None)
@given(runs=st.lists(st.lists(replies, min_size=1, max_size=3), min_size=1, max_size=6), data=st.data())
def test_every_waiter_gets_its_own_replies_however_they_are_cut(runs: list[list[bytes]], data: st.DataObject) -> None:
    expected = [b"".join(run) for run in runs]
    stream = b"".join(expected)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))

    async def scenario() -> None:
        connection, transport, futures = await connect([len(run) for run in runs])
        for start, end in pairwise([0, *cuts, len(stream)]):
            if end > start:
                connection.data_received(stream[start:end])
        assert [future.result() for future in futures] == expected
        assert connection.pending == 0
        assert not transport.closed

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [1023, 1024, 100_000, STREAM_THRESHOLD_BYTES - 10])
@pytest.mark.parametrize("cut", [1, 3, 8, 500, -3, -2, -1])
async def test_a_long_string_in_two_pieces_with_the_next_reply_behind_it(size: int, cut: int) -> None:
    first, second = bulk(b"x" * size), bulk(b"y" * 10)
    cut %= len(first)
    connection, _, futures = await connect([1, 1])
    connection.data_received(first[:cut])
    assert not futures[0].done()
    connection.data_received(first[cut:] + second)
    assert [future.result() for future in futures] == [first, second]


async def test_a_long_string_byte_by_byte() -> None:
    frame = bulk(b"x" * 2000)
    connection, _, (future,) = await connect([1])
    for index in range(len(frame)):
        connection.data_received(frame[index : index + 1])
        assert future.done() == (index == len(frame) - 1)
    assert future.result() == frame


@pytest.mark.parametrize("cut", [0, 100, 1500])
async def test_a_long_string_longer_than_it_said_closes_the_connection(cut: int) -> None:
    frame = b"$1500\r\n%b" % (b"x" * 1502)
    connection, transport, futures = await connect([1, 1])
    for piece in (frame[:cut], frame[cut:]):
        if piece:
            connection.data_received(piece)
    assert transport.closed
    for future in futures:
        assert isinstance(future.exception(), ReplyLost)


async def test_what_was_begun_is_gone_with_the_connection() -> None:
    connection, _, (future,) = await connect([1])
    connection.data_received(bulk(b"x" * 5000)[:2000])
    connection.connection_lost(None)
    assert isinstance(future.exception(), ReplyLost)
    assert connection.pending == 0


async def test_a_reply_without_end_to_a_question_of_ours_closes_the_connection() -> None:
    connection, transport, (future,) = await connect([1])
    connection.data_received(b"$500000000\r\n")
    piece = b"x" * (1 << 20)
    for _ in range(MAX_CALL_BYTES // len(piece) + 1):
        connection.data_received(piece)
    assert transport.closed
    assert isinstance(future.exception(), ReplyLost)


async def test_what_is_too_large_for_one_is_read_past_for_those_behind() -> None:
    connection, transport, (first, second) = await connect([1, 1])
    size = MAX_CALL_BYTES + 5 * (1 << 20)
    data = bulk(b"x" * size) + b"+OK\r\n"
    for at in range(0, len(data), 1 << 20):
        connection.data_received(data[at : at + (1 << 20)])
    assert isinstance(first.exception(), ReplyTooLarge)
    assert second.result() == b"+OK\r\n"
    assert not transport.closed


async def test_of_what_is_kept_in_part_the_rest_is_thrown_away() -> None:
    connection, _, _ = await connect([])
    kept, behind = FutureWaiter(2, asyncio.get_running_loop(), 1000), FutureWaiter(1, asyncio.get_running_loop())
    connection.send(b"x", kept)
    connection.send(b"x", behind)
    data = bulk(b"x" * MAX_CALL_BYTES) + bulk(b"y" * MAX_CALL_BYTES) + b"+OK\r\n"
    for at in range(0, len(data), 1 << 20):
        connection.data_received(data[at : at + (1 << 20)])
    assert 1000 <= len(kept.future.result()) <= 2 << 20
    assert data.startswith(kept.future.result())
    assert behind.future.result() == b"+OK\r\n"


async def test_a_large_reply_that_nobody_waits_for_any_more_is_not_collected() -> None:
    connection, transport, (future,) = await connect([1])
    connection.data_received(b"$500000000\r\n" + b"x" * 1000)
    future.cancel()
    connection.data_received(b"x" * 1000)
    assert transport.closed
