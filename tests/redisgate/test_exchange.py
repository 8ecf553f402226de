"""An exchange between a client that leaves and a connection to Redis: bytes through fake transports on both sides."""

import asyncio

import pytest

from resp.connection import Connection, State
from resp.encoder import encode_command
from tests.redisgate.test_http_protocol import Echo, FakeTransport, connect


@pytest.mark.parametrize("pieces", [0, 1, 2])
async def test_a_client_may_leave_at_any_piece_of_a_large_reply(pieces: int) -> None:
    gateway = Echo(at_once=False)
    client, transport = connect(gateway)
    written = []

    def write(data: bytes) -> None:
        written.append(data)
        if len(written) == pieces:
            client.connection_lost(None)

    transport.write = write  # type: ignore[method-assign]
    client.data_received(b"GET /get/large HTTP/1.1\r\nHost: a\r\n\r\n")
    redis = Connection(asyncio.get_running_loop(), lambda connection: None)
    redis.connection_made(FakeTransport())  # type: ignore[arg-type]
    redis.state = State.READY
    redis.send(encode_command([b"GET", b"large"]), gateway.exchanges[0])
    if not pieces:
        client.connection_lost(None)
    redis.data_received(b"$300000\r\n" + b"x" * 290_000)
    redis.data_received(b"x" * 10_000 + b"\r\n")
    assert len(written) == pieces
    assert redis.state is State.CLOSED
