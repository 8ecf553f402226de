"""`redisgate loadtest` against real gateways: what it measures, what it leaves behind, when it stops."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

from redisgate.config import ConfigError
from redisgate.loadtest import Plan, Result, make_plan, percentile, run, run_loadtest
from tests.redisgate.test_tls import TlsGateway, write_pair
from tests.servers import Gateway, RedisServer, free_port, single_instance, wait_for

OPTIONS: dict[str, Any] = {
    "url": "https://redis.example.com",
    "rate": "100",
    "duration": "10s",
    "connections": "8",
    "mix": "mixed",
    "value_size": "64",
    "token_file": None,
    "ca_file": None,
    "json": True,
}


def keys(redis: RedisServer) -> bytes:
    return redis.raw(b"KEYS redisgate:loadtest:*\r\n", 4)


def test_every_request_is_sent_and_nothing_is_left(
    gateway: Gateway, redis_server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    options = OPTIONS | {"url": gateway.url, "rate": "400", "duration": "1s", "connections": "4"}
    assert run_loadtest(options, {"REDISGATE_TOKEN": "token"}, Path()) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["requests"], found["failed"], found["stopped"], found["left_behind"]) == (400, 0, "", 0)
    assert 0.95 <= found["seconds"] < 5
    latency = found["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
    assert "400 requests/s for 1 s over 4 connections" in shown.err
    assert keys(redis_server) == b"*0\r\n"


def test_the_report_for_people(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    options = OPTIONS | {"url": gateway.url + "/", "duration": "200ms", "mix": "ping", "json": False}
    assert run_loadtest(options, {"UPSTASH_REDIS_REST_TOKEN": "token"}, Path()) == 0
    shown = capsys.readouterr().out
    assert "requests  20 in 0.2 s" in shown
    assert "latency   p50 " in shown
    assert "failed    0" in shown


async def test_a_token_that_only_reads(gateway: Gateway) -> None:
    plan = Plan(gateway.url, gateway.readonly_token, rate=200, seconds=0.2, mix="read")
    result = await run(plan)
    assert (result.requests, result.failed) == (40, 0)
    with pytest.raises(ConfigError, match="status 40"):
        await run(Plan(gateway.url, gateway.readonly_token, seconds=0.2))


@pytest.mark.parametrize("case", ["token", "nobody", "path"])
async def test_what_is_wrong_from_the_beginning_is_said_before_there_is_a_load(gateway: Gateway, case: str) -> None:
    url, token, said = {
        "token": (gateway.url, "wrong", "status 401"),
        "nobody": (f"http://127.0.0.1:{free_port()}", "token", "refused"),
        "path": (f"{gateway.url}/redis/nowhere", "token", "status 4"),
    }[case]
    with pytest.raises(ConfigError, match=said):
        await run(Plan(url, token))


async def test_it_stops_when_the_deployment_has_had_enough() -> None:
    redis = RedisServer()
    gateway = Gateway(single_instance(redis))
    try:
        test = asyncio.create_task(run(Plan(gateway.url, "token", rate=200, seconds=60)))
        await asyncio.to_thread(wait_for, lambda: keys(redis) != b"*0\r\n", 10, "the load")
        redis.kill()
        began = time.monotonic()
        result = await asyncio.wait_for(test, 10)
        assert time.monotonic() - began < 5
        assert "requests failed within a second: it has had enough" in result.stopped
        assert any(reason.startswith("status 50") for reason in result.failures)
        assert result.left_behind > 0
        assert result.requests < 60 * 200
    finally:
        gateway.stop()
        redis.kill()


async def test_a_stall_shows_in_the_latencies(redis_server: RedisServer) -> None:
    redis = RedisServer()
    gateway = Gateway(single_instance(redis))
    try:
        test = asyncio.create_task(run(Plan(gateway.url, "token", rate=200, seconds=1.0, connections=2)))
        await asyncio.to_thread(wait_for, lambda: keys(redis) != b"*0\r\n", 10, "the load")
        redis.pause()
        threading.Timer(0.5, redis.resume).start()
        result = await test
        # 100 requests were due in that half second, though only two connections waited.
        slow = [latency for latency in result.latencies if latency > 0.1]
        assert len(slow) >= 50
        assert (result.requests, result.failed) == (200, 0)
    finally:
        gateway.stop()
        redis.stop()


async def test_by_tls(redis_server: RedisServer, tmp_path: Path) -> None:
    authority = trustme.CA()
    pair = write_pair(authority, tmp_path, "c", "127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    environ = {"REDISGATE_TLS_CERT_FILE": str(pair.cert), "REDISGATE_TLS_KEY_FILE": str(pair.key)}
    gateway = TlsGateway(single_instance(redis_server, **environ))
    try:
        url = f"https://127.0.0.1:{gateway.port}"
        result = await run(Plan(url, "token", seconds=0.2, ca_file=str(tmp_path / "ca.pem")))
        assert (result.requests, result.failed) == (20, 0)
        with pytest.raises(ConfigError, match=r"its certificate cannot be verified.*--ca-file"):
            await run(Plan(url, "token", seconds=0.2))
    finally:
        gateway.stop()


def test_ctrl_c_ends_it_with_its_report(gateway: Gateway, redis_server: RedisServer) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "redisgate", "loadtest", gateway.url, "--duration", "60s", "--rate", "200"],
        env={**os.environ, "REDISGATE_TOKEN": "token"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: keys(redis_server) != b"*0\r\n", 10, "the load")
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "stopped   it was interrupted" in shown
    assert "latency   p50" in shown
    assert keys(redis_server) == b"*0\r\n"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"url": "redis.example.com"}, "expected an address such as"),
        ({"url": "https://token@redis.example.com"}, "does not belong into the address"),
        ({"rate": "100000"}, "--rate: expected a whole number from 1 to 5000"),
        ({"duration": "1h"}, "--duration: at most 10 minutes"),
        ({"duration": "soon"}, "--duration: expected a time"),
        ({"connections": "0"}, "--connections: expected a whole number from 1 to 256"),
        ({"value_size": "2MiB"}, "--value-size: at most 1 MiB"),
        ({"token_file": "none"}, "cannot read none"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_refuses(wrong: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan(OPTIONS | wrong, {"REDISGATE_TOKEN": "token"}, tmp_path)


def test_without_a_token_it_says_where_one_belongs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set REDISGATE_TOKEN"):
        make_plan(OPTIONS, {}, tmp_path)
    (tmp_path / "token").write_text("from-a-file\n")
    plan = make_plan(OPTIONS | {"token_file": "token"}, {}, tmp_path)
    assert plan.token == "from-a-file"
    assert "from-a-file" not in repr(plan)


def test_percentiles() -> None:
    hundred = [float(number) for number in range(1, 101)]
    assert [percentile(hundred, part) for part in (50, 90, 99, 99.9)] == [50, 90, 99, 100]
    assert percentile([7.0], 50) == percentile([7.0], 99.9) == 7.0
    assert percentile([], 50) == 0
    assert Result().summary()["latency_ms"]["max"] == 0
