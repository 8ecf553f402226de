"""Fixtures for all tests: one redis-server and one gateway per session."""

from collections.abc import Iterator

import pytest

import redisgate
from tests.servers import Gateway, RedisServer, single_instance


def pytest_report_header() -> str:
    return f"redisgate {redisgate.__version__}, {redisgate.build_form()}"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def gateway(redis_server: RedisServer) -> Iterator[Gateway]:
    """Two workers over `redis_server`, with a token for everything and one that only reads."""
    gateway = Gateway(single_instance(redis_server), ["--workers", "2"])
    yield gateway
    gateway.stop()
