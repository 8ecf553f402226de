"""`redisgate healthcheck`, which images and whoever else watches a gateway run beside it."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import trustme

from tests.redisgate.test_tls import TlsGateway, write_pair
from tests.servers import Gateway, RedisServer, single_instance


def healthcheck(folder: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("REDISGATE_", "SRH_"))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "redisgate", "healthcheck"],
        env=clean | environ,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_a_gateway_that_is_ready_is_well_and_one_that_is_not_there_is_not(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    gateway = Gateway(single_instance(redis_server))
    try:
        for host in ("127.0.0.1", "0.0.0.0", "::ffff:127.0.0.1"):
            done = healthcheck(tmp_path, REDISGATE_PORT=str(gateway.port), REDISGATE_HOST=host)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    finally:
        gateway.stop()
    done = healthcheck(tmp_path, REDISGATE_PORT=str(gateway.port))
    assert done.returncode == 1
    assert done.stderr.startswith("redisgate: not ready: 127.0.0.1 port")
    assert len(done.stderr.splitlines()) == 1


def test_something_else_at_the_port_is_no_gateway(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.01,))
        thread.start()
        try:
            done = healthcheck(tmp_path, REDISGATE_PORT=str(other.server_port))
        finally:
            other.shutdown()
            thread.join()
    assert done.returncode == 1
    assert "redisgate: not ready: 404" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_with_tls_it_is_asked_by_tls_whatever_names_the_certificate_has(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    pair = write_pair(trustme.CA(), tmp_path, "gate", "redis.example.com")
    settings = {"REDISGATE_TLS_CERT_FILE": str(pair.cert), "REDISGATE_TLS_KEY_FILE": str(pair.key)}
    gateway = TlsGateway(single_instance(redis_server, **settings))
    try:
        done = healthcheck(tmp_path, REDISGATE_PORT=str(gateway.port), **settings)
    finally:
        gateway.stop()
    assert (done.returncode, done.stderr) == (0, "")


def test_settings_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    done = healthcheck(tmp_path, REDISGATE_PORT="many")
    assert done.returncode == 2
    assert "REDISGATE_PORT" in done.stderr
