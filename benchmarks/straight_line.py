"""What does the gateway's own code cost per GET, with kernel, Redis and clients left out?

`PYTHONSAFEPATH=1 PYTHONPATH=.venv/compiled:. .venv/bin/python -m benchmarks.straight_line`

64 connections ask at once, replies arrive together; transports swallow what is written. On a machine that does other
work too this repeats within a few percent, where figures of whole processes differ by ten: it is for comparing trees.
"""

import asyncio
import gc
import statistics
import time

import redisgate
from redisgate.access import AccessTable, Grant, Instance
from redisgate.config import InstanceConfig, Settings
from redisgate.gateway import Gateway
from redisgate.http_protocol import HttpServer
from redisgate.http_response import ResponseHeads
from redisgate.policy import Scope
from redisgate.resttoken import RestTokens
from redisgate.scripts import ScriptCache
from redisgate.shared import SharedState
from resp.address import Address
from resp.connection import Connection, State

CONNECTIONS = 64
TURNS = 100
ROUNDS = 60
REQUEST = b"GET /get/key:1 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer token\r\n\r\n"
REPLY = b"$10\r\n0123456789\r\n"


class Sink:
    """A transport that counts what is written to it."""

    def __init__(self) -> None:
        self.writes = 0

    def write(self, data: bytes) -> None:
        self.writes += 1

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        pass


async def measure() -> list[float]:
    """Microseconds of CPU per request, a figure for each round."""
    settings = Settings(secret_key=b"straight line" * 3)
    tokens = RestTokens(settings.secret_key)
    access = AccessTable(tokens.grant)
    config = InstanceConfig("default", Address(host="127.0.0.1", port=1), slug="default")
    instance = Instance(config, ScriptCache(SharedState.anonymous(1)))
    access.add_instance(instance)
    access.put(b"token", Grant(instance, Scope(), name="all"))
    http = HttpServer(Gateway(settings, access, tokens), settings.limits, ResponseHeads(b"bench"))
    # A connection to Redis that is up, though nobody is at its other end.
    redis = Connection(asyncio.get_running_loop(), lambda connection: None)
    redis.connection_made(Sink())  # type: ignore[arg-type]
    redis.state = State.READY
    pool = instance.backend.pool
    pool._fast.connections.append(redis)
    pool._fast.current = redis
    clients = [http.protocol() for _ in range(CONNECTIONS)]
    sinks = [Sink() for _ in clients]
    for client, sink in zip(clients, sinks, strict=True):
        client.connection_made(sink)
    gc.collect()
    gc.freeze()
    gc.disable()
    figures = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(TURNS):
            for client in clients:
                client.data_received(REQUEST)
            await asyncio.sleep(0)  # the commands leave
            redis.data_received(REPLY * CONNECTIONS)
        figures.append((time.process_time() - began) / (TURNS * CONNECTIONS) * 1e6)
    assert {sink.writes for sink in sinks} == {ROUNDS * TURNS}, "not every request was answered"
    return figures


if __name__ == "__main__":
    found = asyncio.run(measure())
    print(
        f"{redisgate.build_form()}: {min(found):.3f} µs per GET at best, {statistics.median(found):.3f} in the middle"
    )
