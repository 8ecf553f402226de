"""`redisgate top`: the picture of a real gateway, and what it says when there is none."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from redisgate import top
from redisgate.config import ConfigError
from tests.http import Client
from tests.observing import Scraped
from tests.servers import Gateway, RedisServer, free_port, single_instance, wait_for


@pytest.fixture(scope="module")
def watched(redis_server: RedisServer) -> Iterator[tuple[Gateway, str]]:
    port = free_port()
    gateway = Gateway(single_instance(redis_server, REDISGATE_METRICS_PORT=str(port)), ["--workers", "2"])
    yield gateway, f"http://127.0.0.1:{port}"
    gateway.stop()


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "redisgate", "top", *arguments],
        env={**os.environ, "COLUMNS": "140", **environ},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_once_prints_workers_families_and_instances(watched: tuple[Gateway, str]) -> None:
    gateway, url = watched
    scraped = Scraped(int(url.rpartition(":")[2]))
    with Client(gateway.port) as client:
        for _ in range(40):
            client.get("/get/a")
        client.get("/hget/a")
    wait_for(lambda: scraped.value("redisgate_commands_total", family="string") >= 40, what="the counts")
    shown = run("--once", "--url", url)
    assert (shown.returncode, shown.stderr) == (0, "")
    for pattern in (
        r"RedisGate \S+ at http://127\.0\.0\.1:\d+, up ",
        r"requests/s \d",
        r"worker 0 .*MiB",
        r"worker 1 ",
        r"metrics ",
        r"string +\d+ +0\.0 .* 40",
        r"hash ",
        r"default +\d",
    ):
        assert re.search(pattern, shown.stdout), (pattern, shown.stdout)


def test_in_a_terminal_it_goes_on_until_it_is_interrupted(watched: tuple[Gateway, str]) -> None:
    _, url = watched
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "redisgate", "top", "--url", url, "--interval", "0.5"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    )
    os.close(follower)
    seen = b""
    try:
        deadline = time.monotonic() + 20
        while seen.count(b"requests/s") < 4 and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.2)[0]:
                seen += os.read(leader, 65536)
        process.send_signal(2)
        while process.poll() is None and time.monotonic() < deadline:
            # What it restores must be taken, or it would wait for that; EIO: it has closed its terminal.
            with contextlib.suppress(OSError):
                if select.select([leader], [], [], 0.05)[0]:
                    seen += os.read(leader, 65536)
    finally:
        process.kill()
        status = process.wait()
        os.close(leader)
    assert seen.count(b"requests/s") >= 4, seen
    assert status == 0
    assert b"Traceback" not in seen


def test_what_is_no_metrics_port_is_named(watched: tuple[Gateway, str]) -> None:
    gateway, _ = watched
    closed = run("--once", REDISGATE_METRICS_PORT=str(free_port()))
    assert closed.returncode == 1
    assert "is the gateway running, with REDISGATE_METRICS_PORT set?" in closed.stderr
    wrong = run("--once", "--url", gateway.url)
    assert wrong.returncode == 1
    assert "that is no metrics port" in wrong.stderr
    nonsense = run("--once", "--url", "nonsense")
    assert nonsense.returncode == 2
    assert "expected the metrics port's address" in nonsense.stderr


def test_the_address_follows_the_settings() -> None:
    assert top.address(None, {}) == "http://127.0.0.1:9400"
    environ = {"REDISGATE_METRICS_PORT": "1", "REDISGATE_METRICS_HOST": "::"}
    assert top.address(None, environ) == "http://[::1]:1"
    assert top.address("https://a.example:9400/metrics", environ) == "https://a.example:9400"
    with pytest.raises(ConfigError):
        top.address("ftp://a", {})
