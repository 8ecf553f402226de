"""Tokens that act as a Redis user of their own: what Redis lets it hear, and when its login ends."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from redisgate.access import Backend, Instance
from redisgate.config import InstanceConfig
from redisgate.scripts import ScriptCache
from redisgate.shared import SharedState
from resp.address import parse_url
from resp.subscriptions import Message
from tests.http import Client
from tests.servers import Gateway, RedisServer, needs_redis_7, single_instance

pytestmark = needs_redis_7


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def users_gateway(server: RedisServer) -> Iterator[Gateway]:
    gateway = Gateway(single_instance(server), ["--workers", "1"])
    yield gateway
    gateway.stop()


def user_token(server: RedisServer, gateway: Gateway, name: str, *rules: str) -> str:
    assert server.raw(f"ACL SETUSER {name} reset on >pw {' '.join(rules)}\r\n".encode(), 1) == b"+OK\r\n"
    with Client(gateway.port) as client:
        return str(client.command("ACL", "RESTTOKEN", name, "pw").result)


def test_a_refused_channel_ends_no_other_stream(server: RedisServer, users_gateway: Gateway) -> None:
    token = user_token(server, users_gateway, "listener", "resetchannels", "&ok:*", "+@all", "~*")
    with Client(users_gateway.port, token) as one, Client(users_gateway.port, token) as both:
        one.send("GET", "/subscribe/ok:1")
        assert one.read_head()[0] == 200
        assert one.read_chunk() == b"data: subscribe,ok:1,1\n\n"
        for target in ("/subscribe/forbidden", "/psubscribe/*", "/subscribe/forbidden"):
            refused = both.get(target)
            assert refused.status == 400
            assert refused.error.startswith("NOPERM ")
        # What was permitted of a stream that is refused ends with it.
        both.send("GET", "/subscribe/ok:2/forbidden")
        assert both.read_head()[0] == 200
        assert both.read_chunk() == b"data: subscribe,ok:2,1\n\n"
        assert both.read_chunk().startswith(b"event: error\ndata: ERR NOPERM ")
        assert both.file.read() == b"0\r\n\r\n"
        with Client(users_gateway.port) as client:
            assert client.get("/publish/ok:2/x").result == 0
            assert client.get("/publish/ok:1/heard").result == 1
        assert one.read_chunk() == b"data: message,ok:1,heard\n\n"


def test_a_login_that_redis_no_longer_takes_is_401(server: RedisServer, users_gateway: Gateway) -> None:
    token = user_token(server, users_gateway, "leaver", "~*", "&*", "+@all")
    with Client(users_gateway.port, token) as client:
        assert client.get("/ping").result == "PONG"
        server.raw(b"ACL DELUSER leaver\r\n", 1)
        for target in ("/ping", "/ping", "/eval/return%201/0", "/nosuchcommand", "/subscribe/x", "/monitor"):
            response = client.get(target)
            # Redis has closed the connections of the user, as this request found out after or before it was written.
            while response.status in (502, 503):
                response = client.get(target)
            assert response.status == 401, target
            assert response.error == "WRONGPASS invalid or missing auth token"


class Listener:
    """A subscriber that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[object] = asyncio.Queue()

    def subscribed(self, channel: bytes, pattern: bool) -> None:
        self.heard.put_nowait(channel)

    def deliver(self, message: Message) -> None:
        self.heard.put_nowait(message.payload)

    def lost(self, error: Exception) -> None:
        self.heard.put_nowait(error)

    async def next(self) -> object:
        async with asyncio.timeout(10):
            return await self.heard.get()


@pytest.mark.parametrize("command", ["ACL SETUSER renewed resetpass >other", "ACL SETUSER renewed off"])
async def test_streams_outlive_a_renewal_as_long_as_the_login_is_right(
    server: RedisServer, tmp_path: Path, command: str
) -> None:
    assert server.raw(b"ACL SETUSER renewed reset on >pw ~* &* +@all\r\n", 1) == b"+OK\r\n"
    state = SharedState.create(tmp_path / "counts", 1, [])
    instance = Instance(InstanceConfig(id="one", address=parse_url(server.unix_url)), ScriptCache(state))
    listener = Listener()
    backend: Backend = instance.user_backend("renewed", "pw")
    try:
        before = await backend.pool.call(b"CLIENT", b"ID", slow=False)
        backend.subscriptions.subscribe(listener, [b"news"], pattern=False)
        assert await listener.next() == b"news"
        instance.renew_users()
        assert instance.user_backend("renewed", "pw") is backend
        assert await backend.pool.call(b"CLIENT", b"ID", slow=False) != before
        await backend.pool.call(b"PUBLISH", b"news", b"after", slow=False)
        assert await listener.next() == b"after"
        assert server.raw(command.encode() + b"\r\n", 1) == b"+OK\r\n"
        instance.renew_users()
        assert isinstance(await listener.next(), Exception)
        async with asyncio.timeout(10):
            while backend.streaming:  # noqa: ASYNC110 - looks at state that has no event
                await asyncio.sleep(0.001)
        instance.renew_users()  # the pool's connections end as they would without streams
    finally:
        instance.abort()
