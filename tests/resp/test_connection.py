"""A connection by itself: bytes through a fake transport."""

import asyncio

import pytest

from resp.connection import Connection, State, Waiter
from resp.encoder import encode_command
from resp.errors import RespError


class FakeTransport:
    """Takes everything."""

    def write(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def set_write_buffer_limits(self, high: int) -> None:
        pass


class Leaver(Waiter):
    """Wants nothing any more as soon as it hears of its reply: at its start, or with its last piece."""

    def __init__(self, leaves_at: str) -> None:
        self.count = 1
        self.deadline = float("inf")
        self._leaves_at = leaves_at
        self._connection: Connection

    def stream_started(self, connection: Connection) -> None:
        self._connection = connection
        if self._leaves_at == "start":
            connection.abandon(self)

    def stream_data(self, data: bytes) -> None:
        if self._leaves_at == "end" and data.endswith(b"\r\n"):
            self._connection.abandon(self)

    def stream_ended(self) -> None:
        raise AssertionError("it has left")

    def failed(self, error: RespError) -> None:
        raise AssertionError("it has left")


@pytest.mark.parametrize("leaves_at", ["start", "end"])
async def test_a_waiter_may_leave_while_it_hears_of_a_large_reply(leaves_at: str) -> None:
    connection = Connection(asyncio.get_running_loop(), lambda connection: None)
    connection.connection_made(FakeTransport())  # type: ignore[arg-type]
    connection.state = State.READY
    connection.send(encode_command([b"GET", b"large"]), Leaver(leaves_at))
    connection.data_received(b"$300000\r\n" + b"x" * 290_000)
    connection.data_received(b"x" * 10_000 + b"\r\n")
    assert connection.state is State.CLOSED
