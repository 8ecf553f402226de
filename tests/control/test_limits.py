"""Rate and daily limits of organizations and keys: over four workers, through kills, and over two gateways."""

import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.control.conftest import Service, Urls
from tests.control.service import Api, execute, register, seconds_until
from tests.http import Client
from tests.servers import RedisServer, wait_for

LOOPBACK = {"REDISGATE_ALLOWED_NETWORKS": "127.0.0.0/8"}


@pytest.fixture(scope="module")
def service(database_urls: Urls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Four workers."""
    service = Service(database_urls, tmp_path_factory.mktemp("service"), "--workers", "4", **LOOPBACK)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def second_service(
    service: Service, database_urls: Urls, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Another gateway, as on another machine, over the same database."""
    service = Service(database_urls, tmp_path_factory.mktemp("second"), "--workers", "2", **LOOPBACK)
    yield service
    service.stop()


_databases = iter(range(1, 16))


def organization(service: Service, redis: RedisServer, urls: Urls, **quota: Any) -> tuple[Api, str]:
    """Somebody with an instance and these limits; the instance's token."""
    person = register(service.port, "limited")
    columns = ", ".join(f"{name} = {value}" for name, value in quota.items())
    if columns:
        execute(urls.owner, f"UPDATE quotas SET {columns} WHERE organization_id = '{person.organization_id}'")
    made = person.instance("limited", f"{redis.url}/{next(_databases)}")
    return person, made["rest_token"]


def hammer(
    ports: list[int], token: str, seconds: float, *, clients: int = 12, pause: float = 0.0
) -> tuple[Counter[int], list[float]]:
    """Many connections that ask as fast as they can: how often each status, and when each 200 came."""
    statuses: Counter[int] = Counter()
    moments: list[float] = []
    end = time.monotonic() + seconds

    def work(port: int) -> None:
        mine: Counter[int] = Counter()
        with Client(port, token) as client:
            while time.monotonic() < end:
                status = client.get("/ping").status
                mine[status] += 1
                if status == 200:
                    moments.append(time.monotonic())
                if pause:
                    time.sleep(pause)
        statuses.update(mine)

    threads = [threading.Thread(target=work, args=(ports[number % len(ports)],)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses, moments


def test_a_rate_is_right_over_four_workers_wherever_connections_land(
    service: Service, redis_server: RedisServer, database_urls: Urls
) -> None:
    _, token = organization(service, redis_server, database_urls, requests_per_second=300)
    statuses, _ = hammer([service.port], token, 10)
    assert set(statuses) == {200, 429}, statuses
    assert 0.9 * 3000 <= statuses[200] <= 1.1 * 3000, statuses


def test_one_connection_alone_gets_the_whole_rate(
    service: Service, redis_server: RedisServer, database_urls: Urls
) -> None:
    _, token = organization(service, redis_server, database_urls, requests_per_second=200)
    statuses, _ = hammer([service.port], token, 4, clients=1)
    assert 0.9 * 800 <= statuses[200] <= 1.1 * 800 + 200, statuses


def test_clients_are_told_where_they_stand(service: Service, redis_server: RedisServer, database_urls: Urls) -> None:
    _, token = organization(service, redis_server, database_urls, commands_per_day=1000, requests_per_second=50)
    with Client(service.port, token) as client:
        headers = client.get("/ping").headers
        assert headers["ratelimit-limit"] == "50"
        assert 0 <= int(headers["ratelimit-remaining"]) < 50
        assert headers["ratelimit-reset"] == "1"
        response = client.post("/pipeline", [["PING"]] * 51)
        assert response.status == 429
        assert response.error.startswith("ERR max requests limit exceeded. Limit: 50, Usage: ")
        assert response.headers["retry-after"] == "1"
        assert response.headers["ratelimit-limit"] == "50"


def test_a_small_daily_limit_is_exact_and_counts_down(
    service: Service, redis_server: RedisServer, database_urls: Urls
) -> None:
    _, token = organization(service, redis_server, database_urls, commands_per_day=20)
    left = []
    with Client(service.port, token) as one, Client(service.port, token) as other:
        for number in range(20):
            response = (one, other)[number % 2].get("/ping")
            assert response.status == 200, (number, response)
            left.append(int(response.headers["ratelimit-remaining"]))
        assert left == list(range(19, -1, -1))
        response = one.get("/ping")
        assert response.status == 429
        assert response.error == "ERR max daily request limit exceeded. Limit: 20, Usage: 20"
        until_midnight = 86400 - time.time() % 86400
        assert abs(int(response.headers["retry-after"]) - until_midnight) <= 2
        assert abs(int(response.headers["ratelimit-reset"]) - until_midnight) <= 2
        assert response.headers["ratelimit-remaining"] == "0"


def test_a_keys_own_limits_hold_beside_the_organizations(
    service: Service, redis_server: RedisServer, database_urls: Urls
) -> None:
    person, _ = organization(service, redis_server, database_urls, commands_per_day=15)
    key, _ = person.key(commands_per_day=10)
    other, _ = person.key()
    with Client(service.port, key) as client:
        assert [client.get("/ping").status for _ in range(12)] == [200] * 10 + [429] * 2
        assert client.get("/ping").headers["ratelimit-limit"] == "10"
    with Client(service.port, other) as client:
        assert [client.get("/ping").status for _ in range(7)] == [200] * 5 + [429] * 2
        assert client.get("/ping").headers["ratelimit-limit"] == "15"


def test_a_new_limit_holds_without_a_restart(service: Service, redis_server: RedisServer, database_urls: Urls) -> None:
    person, token = organization(service, redis_server, database_urls)
    with Client(service.port, token) as client:
        assert "ratelimit-limit" not in client.get("/ping").headers
        person.call("PUT", "quota", {"max_requests_per_second": 7})
        seconds_until(lambda: client.get("/ping").headers.get("ratelimit-limit") == "7", 2, "the new limit")


def test_a_daily_count_survives_kill_9(redis_server: RedisServer, database_urls: Urls, tmp_path: Path) -> None:
    limit, before_a_kill = 9_000, 3_000
    gateway = Service(database_urls, tmp_path / "state", "--workers", "2", **LOOPBACK)
    _, token = organization(gateway, redis_server, database_urls, commands_per_day=limit)
    answered = 0
    for _ in range(2):
        answered += spend(gateway.port, token, before_a_kill)
        kill_everything(gateway)
        gateway = Service(database_urls, tmp_path / "state", "--workers", "2", **LOOPBACK)
    answered += spend(gateway.port, token, limit)
    with Client(gateway.port, token) as client:
        response = client.get("/ping")
    assert response.status == 429
    assert response.error == f"ERR max daily request limit exceeded. Limit: {limit}, Usage: {limit}"
    # Counts reach the shared memory after ten milliseconds at most; what was counted but not answered is in flight.
    assert limit - 2 * 8 <= answered <= limit + 2 * 300
    gateway.stop()


def spend(port: int, token: str, count: int) -> int:
    """Make so many requests on four connections, or until the first is refused: how many were answered well."""
    passed = [0] * 4
    refused = threading.Event()

    def work(index: int) -> None:
        with Client(port, token) as client:
            while not refused.is_set() and sum(passed) < count:
                if client.get("/ping").status == 200:
                    passed[index] += 1
                else:
                    refused.set()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(passed)


def kill_everything(gateway: Service) -> None:
    """Supervisor and workers at once, as by a kernel that has no memory left."""
    pids = subprocess.run(["pgrep", "-P", str(gateway.process.pid)], capture_output=True, text=True, check=True)
    gateway.process.send_signal(signal.SIGSTOP)  # so that it starts no new ones
    for pid in pids.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    gateway.kill()


def test_two_gateways_share_a_daily_limit(
    service: Service, second_service: Service, redis_server: RedisServer, database_urls: Urls
) -> None:
    _, token = organization(service, redis_server, database_urls, commands_per_day=5000)
    # Both know the token before it is serious; then they ask for as much as they can get.
    statuses: Counter[int] = Counter()
    began = time.monotonic()
    while time.monotonic() - began < 20:
        found, _ = hammer([service.port, second_service.port], token, 1.0, clients=8)
        statuses.update(found)
        if not found[200]:
            break
    assert set(statuses) == {200, 429}
    assert 0.98 * 5000 <= statuses[200] <= 1.02 * 5000, statuses


def test_what_an_idle_gateway_holds_is_given_to_the_busy_one(
    service: Service, second_service: Service, redis_server: RedisServer, database_urls: Urls
) -> None:
    _, token = organization(service, redis_server, database_urls, commands_per_day=400)
    for port in (service.port, second_service.port):
        with Client(port, token) as client:
            assert client.get("/ping").status == 200
    used = 2
    with Client(service.port, token) as client:

        def spend() -> bool:
            nonlocal used
            used += client.get("/ping").status == 200
            return used >= 0.98 * 400

        wait_for(spend, 15, "the rest of the limit")
        statuses, _ = hammer([service.port, second_service.port], token, 2.0, clients=4, pause=0.01)
    assert used + statuses[200] <= 1.02 * 400
