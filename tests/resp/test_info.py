"""Asking a Redis about itself, on a real one."""

from collections.abc import Iterator

import pytest

from resp.address import Address
from resp.connection import connect
from resp.errors import ReplyLost
from resp.info import ask, parse_info, server_version
from resp.parser import ErrorReply
from tests.servers import RedisServer


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.stop()


async def test_a_server_tells_its_version_and_errors_stand_among_the_replies(server: RedisServer) -> None:
    connection = await connect(Address(path=server.path), timeout=5.0)
    try:
        info, error, time = await ask(connection, ["INFO", "server"], ["GET"], ["TIME"])
        assert isinstance(error, ErrorReply)
        assert len(time) == 2
        version = server_version(parse_info(info))
        assert version is not None
        assert version[0].isdigit()
        assert parse_info(info)["tcp_port"] == str(server.port)
        assert parse_info(info.encode()) == parse_info(info)
    finally:
        connection.close(ReplyLost("done"))


async def test_a_user_who_may_not_run_info_learns_nothing(server: RedisServer) -> None:
    connection = await connect(Address(path=server.path), timeout=5.0)
    try:
        made, who, refused = await ask(
            connection, ["ACL", "SETUSER", "mute", "on", "nopass", "+@all", "-info"], ["AUTH", "mute", "x"], ["INFO"]
        )
        assert (made, who) == ("OK", "OK")
        assert isinstance(refused, ErrorReply)
        assert parse_info(refused) == {}
        assert server_version({}) is None
    finally:
        connection.close(ReplyLost("done"))


def test_valkey_gives_its_own_version() -> None:
    info = parse_info("# Server\r\nserver_name:valkey\r\nredis_version:7.2.4\r\nvalkey_version:8.0.1\r\n")
    assert server_version(info) == "8.0.1"
