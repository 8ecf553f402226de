"""The control plane in running gateways: what is composed, what a lost PostgreSQL stops and what it does not."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from control.embedded import EmbeddedPostgres
from tests.control.conftest import SECRET_KEY, Server, Service, Urls
from tests.http import Client
from tests.servers import Gateway, RedisServer, single_instance, wait_for

PERSON = {"email": "p@example.com", "username": "person", "password": "A-long-password-1"}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def loads(pid: int, library: str) -> bool:
    return library in Path(f"/proc/{pid}/maps").read_text()


def test_without_a_database_nothing_of_it_is_loaded(gateway: Gateway) -> None:
    for pid in [gateway.process.pid, *children(gateway.process.pid)]:
        assert loads(pid, "uvloop")
        assert not loads(pid, "asyncpg")
        assert not loads(pid, "_argon2")
    assert len(children(gateway.process.pid)) == 2


def test_without_a_database_its_paths_are_404(gateway: Gateway) -> None:
    with Client(gateway.port) as client:
        for path in ("/api/organizations", "/auth/me", "/docs", "/openapi.json", "/invitations/x"):
            response = client.get(path)
            assert response.status == 404
            assert "which this gateway does not have" in response.error
        assert client.request("PATCH", "/api/organizations").status == 405
        assert client.get("/health").json() == {"status": "ok"}


def test_with_one_there_are_workers_and_a_steward(service: Service) -> None:
    pids = children(service.process.pid)
    assert len(pids) == 3
    assert all(loads(pid, "asyncpg") for pid in pids)


def test_methods_and_paths_of_the_control_plane(service: Service) -> None:
    with Client(service.port, token=None) as client:
        response = client.request("PATCH", "/auth/me", b"{}")
        assert (response.status, response.json()["success"]) == (401, False)
        assert client.request("DELETE", "/auth/login").headers["allow"] == "POST"
        response = client.get("/nothing")
        assert response.status == 401  # a command without a token
        response = client.get("/api/nothing")
        assert (response.status, response.json()["success"]) == (404, False)
        assert client.get("/%61uth/me").status == 401
        assert client.get("/AUTH/me").json() == {"error": "WRONGPASS invalid or missing auth token"}
        response = client.request("HEAD", "/openapi.json")
        assert response.status == 200
        assert int(response.headers["content-length"]) > 10_000
        assert client.get("/health/live").json()["data"] == {"status": "ok"}
        assert client.get("/health").json()["data"] == {"status": "ok", "database": "ok"}
        assert client.get("/version").json()["data"]["name"] == "RedisGate"


def test_requests_of_both_planes_on_one_connection_keep_their_order(service: Service) -> None:
    with Client(service.port, token=None) as client:
        for _ in range(3):
            client.send("GET", "/get/x")
            client.send("GET", "/version")
            client.send("POST", "/auth/login", b"{}")
            client.send("GET", "/health/live")
        assert [client.read().status for _ in range(12)] == [401, 200, 400, 200] * 3


def test_a_steward_that_dies_is_replaced(service: Service) -> None:
    before = children(service.process.pid)

    def steward() -> list[int]:
        return [pid for pid in children(service.process.pid) if not _listens(pid)]

    (pid,) = steward()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: steward() and steward() != [pid], what="another steward")
    assert set(before) - set(children(service.process.pid)) == {pid}
    assert "the steward" in service.log()


def _listens(pid: int) -> bool:
    # A worker holds a listening socket of the gateway; the steward none.
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            inodes.add(f"socket:[{fields[9]}]")
    try:
        return any(os.readlink(link) in inodes for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def test_a_reload_replaces_workers_and_steward(service: Service) -> None:
    before = set(children(service.process.pid))
    service.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "reloaded" in service.log(), seconds=30, what="the reload")
    wait_for(lambda: not before & set(children(service.process.pid)), what="the old ones to go")
    assert len(children(service.process.pid)) == 3
    with Client(service.port, token=None) as client:
        assert client.get("/health").status == 200


# Without PostgreSQL


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL of its own, because it is killed."""
    server = EmbeddedPostgres(tmp_path_factory.mktemp("mortal"))
    server.start()
    yield server
    server.stop()


@pytest.mark.timeout(120)
def test_postgresql_goes_and_comes_back(mortal: EmbeddedPostgres, redis_server: RedisServer, tmp_path: Path) -> None:
    url = mortal.url()
    mortal.kill()
    # It is away when the gateway starts; the configured instance is served all the same.
    environ = single_instance(redis_server) | {"REDISGATE_DATABASE_MIGRATION_URL": url}
    service = Service(Urls(url, url, url), tmp_path, "--workers", "1", **environ)
    try:
        with Client(service.port) as client:
            assert client.get("/set/without/postgresql").result == "OK"
            response = client.post("/auth/register", PERSON)
            assert response.status == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["success"] is False
            assert client.get("/health").json()["data"] == {"status": "degraded", "database": "away"}
            assert client.get("/health/ready").status == 200

        mortal.restart()
        with Client(service.port) as client:
            wait_for(lambda: client.post("/auth/register", PERSON).status in (201, 409), what="the control plane")
            token = client.post("/auth/login", PERSON).json()["data"]["token"]

        mortal.kill()
        with Client(service.port) as client:
            assert client.get("/get/without").result == "postgresql"
        with Client(service.port, token=token) as client:
            assert client.get("/auth/me").status == 503
        mortal.restart()
        with Client(service.port, token=token) as client:
            wait_for(lambda: client.get("/auth/me").status == 200, what="the control plane")
        service.stop()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{service.log()[-4000:]}") from error
    finally:
        service.kill()


# Starting


def start_failure(urls: Urls, state_dir: Path, **environ: str) -> str:
    with pytest.raises(AssertionError, match="the gateway ended with 1") as caught:
        Service(urls, state_dir, "--workers", "1", **environ)
    return str(caught.value)


def test_a_weak_secret_stops_the_start_in_production(database_urls: Urls, tmp_path: Path) -> None:
    text = start_failure(database_urls, tmp_path, REDISGATE_MODE="production", REDISGATE_SECRET_KEY="changeme-changeme")
    assert "REDISGATE_SECRET_KEY is weak" in text
    assert "changeme" not in text
    assert "Traceback" not in text


def test_a_database_from_another_time_stops_the_start(postgres_server: Server, migrated: str, tmp_path: Path) -> None:
    name = postgres_server.create(template=migrated)
    postgres_server.run("INSERT INTO schema_migrations VALUES (9999, 'future', 'x')", database=name)
    try:
        text = start_failure(postgres_server.urls(name), tmp_path)
    finally:
        postgres_server.drop(name)
    assert "9999_future, which this release does not know" in text
    assert "Traceback" not in text


def test_the_secret_key_is_in_no_log(service: Service) -> None:
    assert SECRET_KEY.decode() not in service.log()
