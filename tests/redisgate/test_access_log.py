"""The access log: what is written of which requests, and that it tells no secret."""

import re

import pytest

from tests.http import Client
from tests.servers import Gateway, RedisServer, single_instance, wait_for

SPIN = (
    "local function now() local t = redis.call('TIME') return t[1] + t[2] / 1000000 end local start = now() "
    "while now() - start < 0.5 do end return 'spun-secret'"
)


def lines(gateway: Gateway) -> list[str]:
    return [line.partition("] ")[2] for line in gateway.log().splitlines() if re.search(r" (GET|POST) /", line)]


def test_slow_requests_and_failures_are_written_others_are_not() -> None:
    server = RedisServer()
    environ = single_instance(server, REDISGATE_SLOW_REQUEST="300ms")
    gateway = Gateway(environ, ["--workers", "1"])
    try:
        with Client(gateway.port) as client:
            assert client.get("/set/key-secret/value-secret").result == "OK"
            assert client.get("/nosuch/key-secret").status == 400
            assert client.request("POST", "/eval?_token=token", SPIN.encode()).status == 400
            assert client.command("EVAL", SPIN, 0).result == "spun-secret"
            wait_for(lambda: len(lines(gateway)) == 1, what="the slow request to be written")
            assert re.fullmatch(r"POST / 200 0\.[4-9]\d\ds default", lines(gateway)[0])
            server.kill()
            wait_for(lambda: client.get("/get/key-secret").status == 503, what="the server to be gone")
            wait_for(lambda: "GET /get/… 503 - default" in lines(gateway), what="the failure to be written")
        assert "secret" not in gateway.log()
        assert "token" not in "".join(lines(gateway))
    finally:
        gateway.stop()
        server.stop()


@pytest.mark.parametrize("wanted", ["all", "off"])
def test_all_or_none(redis_server: RedisServer, wanted: str) -> None:
    gateway = Gateway(single_instance(redis_server), ["--workers", "1", "--access-log", wanted])
    try:
        with Client(gateway.port) as client:
            assert client.get("/set/key-secret/value-secret?_token=token").result == "OK"
            assert client.get("/nosuch/key-secret").status == 400
            assert client.post("/pipeline", [["PING"], ["SET", "large", "x" * 2_000_000]]).status == 200
            assert len(client.get("/get/large").result) == 2_000_000
        if wanted == "all":
            expected = [
                r"GET /set/…\?… 200 0\.\d{3}s default",
                r"GET /nosuch/… 400 0\.\d{3}s default",
                r"POST /pipeline 200 0\.\d{3}s default",
                r"GET /get/… 200 0\.\d{3}s default",
            ]
            wait_for(lambda: "/get/" in "".join(lines(gateway)), what="the lines")
            written = [line for line in lines(gateway) if "/health" not in line]
            assert len(written) == len(expected)
            for line, pattern in zip(written, expected, strict=True):
                assert re.fullmatch(pattern, line), line
        else:
            assert not lines(gateway)
    finally:
        gateway.stop()
