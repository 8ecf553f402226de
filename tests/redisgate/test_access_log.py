"""The access log: what is written of which requests, and that it tells no secret."""

import json
import re
import signal

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
            assert re.fullmatch(r"POST / 200 0\.[4-9]\d\ds default -", lines(gateway)[0])
            server.kill()
            wait_for(lambda: client.get("/get/key-secret").status == 503, what="the server to be gone")
            wait_for(lambda: "GET /get/… 503 - default" in "".join(lines(gateway)), what="the failure to be written")
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
                r"GET /set/…\?… 200 0\.\d{3}s default \S+",
                r"GET /nosuch/… 400 0\.\d{3}s default \S+",
                r"POST /pipeline 200 0\.\d{3}s default \S+",
                r"GET /get/… 200 0\.\d{3}s default \S+",
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


def test_what_could_not_be_read_has_no_time(redis_server: RedisServer) -> None:
    gateway = Gateway(single_instance(redis_server), ["--workers", "1", "--access-log", "all"])
    try:
        with Client(gateway.port) as client:
            assert client.get("/ping").status == 200
        with Client(gateway.port) as client:
            client.send("GET", "/two words")
            assert client.read().status == 400
        wait_for(lambda: "400" in gateway.log(), what="the line")
        assert re.search(r" GET … 400 - - \S+$", gateway.log(), re.MULTILINE), gateway.log()
        assert re.search(r" GET /ping 200 0\.\d{3}s default ", gateway.log())
    finally:
        gateway.stop()


def test_a_sample_names_the_answer_the_trace_and_the_key_where_that_is_allowed(redis_server: RedisServer) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    arguments = ["--workers", "1", "--access-log", "all", "--access-log-sample", "0.2", "--log-keys", "true"]
    gateway = Gateway(single_instance(redis_server), [*arguments, "--log-format", "json"])

    def written(target: str) -> list[dict[str, object]]:
        return [line for line in map(json.loads, gateway.log().splitlines()[1:]) if line.get("target") == target]

    try:
        with Client(gateway.port) as client:
            tokens = {client.get("/get/the-key").headers["upstash-sync-token"] for _ in range(200)}
            assert client.get("/set/named/value", X_Request_Id="mine:1", traceparent=traceparent).result == "OK"
            for _ in range(100):
                client.get("/set/named/value", X_Request_Id="mine:1", traceparent=traceparent)
        wait_for(lambda: written("/set/named/…"), what="one of a hundred")
        (line, *_) = written("/set/named/…")
        expected = {"method": "GET", "status": 200, "instance": "default", "request_id": "mine:1"}
        assert {name: line[name] for name in expected} == expected
        assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
        sampled = written("/get/the-key")
        assert 5 < len(sampled) < 120
        assert {line["request_id"] for line in sampled} <= tokens
        assert "value" not in gateway.log()
    finally:
        gateway.stop()


def test_what_the_client_calls_its_request_is_repeated_if_it_is_fit_to_be(gateway: Gateway) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with Client(gateway.port) as client:
        answer = client.get("/ping", X_Request_Id="a.b-c_d:1", traceparent=traceparent)
        assert answer.headers["x-request-id"] == "a.b-c_d:1"
        assert answer.headers["traceparent"] == traceparent
        for unfit in ("x" * 65, "a b", "<script>"):
            assert "x-request-id" not in client.get("/ping", X_Request_Id=unfit).headers
        for unfit in ("00-" + "0" * 32 + "-b7ad6b7169203331-01", traceparent.upper(), "ff" + traceparent[2:]):
            assert "traceparent" not in client.get("/ping", traceparent=unfit).headers


def test_the_level_changes_while_the_gateway_runs(redis_server: RedisServer) -> None:
    gateway = Gateway(single_instance(redis_server), ["--workers", "1", "--access-log", "all", "--log-level", "error"])
    try:
        with Client(gateway.port) as client:
            client.get("/get/quiet")
            gateway.process.send_signal(signal.SIGUSR1)
            wait_for(lambda: "the log level is debug" in gateway.log(), what="the supervisor to say so")

            def shows() -> bool:
                client.get("/get/loud")
                return bool(lines(gateway))

            wait_for(shows, what="the worker to log")
            gateway.process.send_signal(signal.SIGUSR1)
            wait_for(lambda: "the log level is as configured" in gateway.log(), what="the supervisor to say so")
            wait_for(lambda: _quiet(gateway, client), what="silence again")
    finally:
        gateway.stop()


def _quiet(gateway: Gateway, client: Client) -> bool:
    before = len(lines(gateway))
    for _ in range(20):
        client.get("/get/quiet-again")
    return len(lines(gateway)) == before
