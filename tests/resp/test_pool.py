"""The pool against a real Redis, on the loop of the standard library and on uvloop."""

import asyncio
from collections.abc import Callable

import pytest

from resp.address import Address, parse_url
from resp.connection import FutureWaiter
from resp.encoder import encode_command, encode_commands
from resp.errors import ReplyLost, ReplyTimeout, Unavailable
from resp.monitor import MonitorHub
from resp.parser import Parser
from resp.pool import Pool
from resp.subscriptions import Message, SubscriptionHub
from tests.servers import RedisServer, free_port


def address(redis: RedisServer) -> Address:
    return parse_url(redis.unix_url)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - looks at state that has no event
            await asyncio.sleep(0.001)


async def test_many_commands_share_one_connection(redis_server: RedisServer) -> None:
    pool = Pool(address(redis_server))
    try:
        results = await asyncio.gather(*(pool.call(b"ECHO", b"%d" % number, slow=False) for number in range(500)))
        assert results == [b"%d" % number for number in range(500)]
        assert pool.connection_count == 1
        assert await pool.transactions_permitted()
    finally:
        pool.abort()


async def test_slow_commands_get_connections_of_their_own(redis_server: RedisServer) -> None:
    pool = Pool(address(redis_server), size=4)
    try:
        loop = asyncio.get_running_loop()
        waiters = [FutureWaiter(1, loop) for _ in range(10)]
        for waiter in waiters:
            pool.submit(encode_command([b"PING"]), waiter, slow=True)
        await asyncio.gather(*(waiter.future for waiter in waiters))
        assert 1 <= pool.connection_count <= 4
        assert await pool.call(b"PING", slow=False) == b"PONG"
        assert pool.connection_count <= 4
    finally:
        pool.abort()


async def test_several_commands_by_one_waiter(redis_server: RedisServer) -> None:
    pool = Pool(address(redis_server))
    try:
        waiter = FutureWaiter(3, asyncio.get_running_loop())
        pool.submit(encode_commands([[b"ECHO", b"a"], [b"NOSUCH"], [b"ECHO", b"b"]]), waiter)
        replies = Parser(text=True).parse(await waiter.future, 3)
        assert replies[0] == "a"
        assert str(replies[1]).startswith("ERR unknown command")
        assert replies[2] == "b"
    finally:
        pool.abort()


async def test_nobody_there_is_unavailable(redis_server: RedisServer) -> None:
    pool = Pool(Address(port=free_port()))
    try:
        with pytest.raises(Unavailable, match=r"^the instance cannot be reached$"):
            await pool.call(b"PING")
        with pytest.raises(Unavailable):  # refused at once while it backs off
            pool.submit(b"", FutureWaiter(1, asyncio.get_running_loop()))
    finally:
        pool.abort()


async def test_a_killed_redis_loses_what_was_sent_and_is_used_again() -> None:
    server = RedisServer()
    pool = Pool(address(server))
    try:
        assert await pool.call(b"PING", slow=False) == b"PONG"
        server.pause()
        call = asyncio.ensure_future(pool.call(b"INCR", b"k", slow=False))
        await until(lambda: pool.shared is not None and pool.shared.pending)
        await asyncio.sleep(0)
        server.kill()
        with pytest.raises(ReplyLost):
            await call
        server.start()

        async def answers() -> bool:
            await asyncio.sleep(0.01)
            try:
                return await pool.call(b"PING", slow=False) == b"PONG"
            except Unavailable:
                return False

        async with asyncio.timeout(5):
            while not await answers():
                pass
    finally:
        pool.abort()
        server.kill()


async def test_a_timeout_costs_only_its_own_command() -> None:
    server = RedisServer()
    pool = Pool(address(server), command_timeout=0.3, stall_timeout=10)
    try:
        assert await pool.call(b"PING", slow=False) == b"PONG"
        server.pause()
        with pytest.raises(ReplyTimeout):
            await pool.call(b"INCR", b"late", slow=False)
        # The next command does not wait behind the silent connection, and what that one was sent runs once.
        next_command = asyncio.ensure_future(pool.call(b"PING", slow=False))
        await asyncio.sleep(0)
        server.resume()
        assert await next_command == b"PONG"
        await until(lambda: pool.connection_count == 1)
        assert await pool.call(b"GET", b"late", slow=False) == b"1"
    finally:
        pool.abort()
        server.kill()


async def test_idle_connections_are_closed(redis_server: RedisServer) -> None:
    pool = Pool(address(redis_server), idle_timeout=0.05)
    try:
        assert await pool.call(b"PING", slow=False) == b"PONG"
        await until(lambda: pool.connection_count == 0)
        assert await pool.call(b"PING", slow=False) == b"PONG"
    finally:
        pool.abort()


class Listener:
    """A subscriber that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []

    def subscribed(self, channel: bytes, pattern: bool) -> None:
        self.heard.append(("subscribed", channel))

    def deliver(self, message: Message) -> None:
        self.heard.append(("message", message.payload))

    def lost(self, error: Exception) -> None:
        self.heard.append(("lost", str(error).encode()))


async def test_listeners_share_one_connection(redis_server: RedisServer) -> None:
    pool = Pool(address(redis_server))
    hub = SubscriptionHub(address(redis_server), connect_timeout=2)
    listeners = [Listener() for _ in range(20)]
    try:
        for listener in listeners:
            hub.subscribe(listener, [b"news"], pattern=False)
        await until(lambda: all(listener.heard for listener in listeners))
        assert await pool.call(b"PUBLISH", b"news", b"hello", slow=False) == 1
        await until(lambda: all(("message", b"hello") in listener.heard for listener in listeners))
        for listener in listeners:
            hub.unsubscribe(listener, [b"news"], pattern=False)
        await until(lambda: not hub.connected)
    finally:
        hub.close()
        pool.abort()


async def test_monitor_shows_commands(redis_server: RedisServer) -> None:
    pool = Pool(address(redis_server))
    hub = MonitorHub(address(redis_server), connect_timeout=2)
    viewer = Listener()
    try:
        hub.watch(viewer)
        await until(lambda: viewer.heard)
        await pool.call(b"ECHO", b"seen-by-monitor", slow=False)
        await until(lambda: any(b"seen-by-monitor" in text for _, text in viewer.heard))
        hub.leave(viewer)
        assert not hub.connected
    finally:
        hub.close()
        pool.abort()
