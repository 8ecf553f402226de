"""The life of an instance under traffic, through the whole service: workers, steward, PostgreSQL, redis-server."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.control.conftest import Service, Urls
from tests.http import Client
from tests.servers import wait_for

MIB = 1024 * 1024


class Owner:
    """Somebody with an organization, over HTTP."""

    def __init__(self, service: Service) -> None:
        self.client = Client(service.port, token=None)
        name = f"o{uuid4().hex[:12]}"
        person = {"email": f"{name}@example.com", "username": name, "password": "A-long-password-1"}
        assert self.client.post("/auth/register", person).status == 201
        data = self.client.post("/auth/login", person).json()["data"]
        self.client.token = data["token"]
        self.path = f"/api/organizations/{data['organization_id']}/redis-instances"

    def call(self, method: str, path: str, body: object = None) -> Any:
        response = self.client.request(method, self.path + path, b"" if body is None else json.dumps(body).encode())
        assert response.status in (200, 201), response
        return response.json()["data"]


@pytest.fixture
def owner(service: Service) -> Iterator[Owner]:
    owner = Owner(service)
    yield owner
    owner.client.close()


@pytest.fixture
def instance(owner: Owner) -> Iterator[Any]:
    made = owner.call("POST", "", {"name": "n", "slug": f"s{uuid4().hex[:8]}", "max_memory": 8 * MIB})
    assert made["status"] == "running"
    yield made
    with contextlib.suppress(AssertionError):
        owner.call("DELETE", f"/{made['id']}")


class Traffic:
    """Requests one after another, from a thread of its own, for as long as the block runs."""

    def __init__(self, service: Service, token: str) -> None:
        self._port, self._token = service.port, token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers: list[tuple[int, bytes]] = []

    def __enter__(self) -> "Traffic":
        self._thread.start()
        wait_for(lambda: self.answers, what="the first answer")
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def more(self, count: int = 50) -> None:
        """Wait for so many more answers."""
        target = len(self.answers) + count
        wait_for(lambda: len(self.answers) >= target, what="more answers")

    def failures(self) -> list[tuple[int, bytes]]:
        return [answer for answer in self.answers if answer[0] != 200]

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            # A connection each, so that both workers are asked.
            with Client(self._port, token=self._token) as client:
                for _ in range(5):
                    number += 1
                    response = client.request("GET", f"/set/key/{number}")
                    self.answers.append((response.status, response.body))


def steward_of(service: Service) -> int | None:
    """The process that holds the steward's lock; None at this moment."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    for pid in children:
        with contextlib.suppress(OSError):
            if any(link.resolve().name == "steward.lock" for link in Path(f"/proc/{pid}/fd").iterdir()):
                return int(pid)
    return None


def another_steward(service: Service, than: int | None) -> bool:
    return steward_of(service) not in (None, than)


def test_no_request_fails_while_the_password_rotates_and_the_memory_changes(
    service: Service, owner: Owner, instance: Any
) -> None:
    with Traffic(service, instance["rest_token"]) as traffic:
        for size in (16, 32):
            only_password = {"token": False, "readonly_token": False}
            owner.call("POST", f"/{instance['id']}/rotate-credentials", only_password)
            changed = owner.call("PATCH", f"/{instance['id']}", {"max_memory": size * MIB})
            assert changed["status"] == "running"
            traffic.more()
        assert traffic.failures() == []


def test_no_request_fails_while_the_steward_is_killed_and_replaced(
    service: Service, owner: Owner, instance: Any
) -> None:
    wait_for(lambda: steward_of(service), what="the steward")
    steward = steward_of(service)
    assert steward is not None
    with Traffic(service, instance["rest_token"]) as traffic:
        os.kill(steward, signal.SIGKILL)
        wait_for(lambda: another_steward(service, steward), what="the next steward")
        traffic.more()
        assert traffic.failures() == []
        # The next one has taken over: it does what is asked for.
        assert owner.call("PUT", f"/{instance['id']}/status", {"action": "restart"})["status"] == "running"
        assert {status for status, _ in traffic.answers} <= {200, 502, 503}, traffic.failures()
        wait_for(lambda: {status for status, _ in traffic.answers[-20:]} == {200}, 5, "answers")


def test_a_server_that_is_killed_is_back_before_anybody_gives_up(service: Service, owner: Owner, instance: Any) -> None:
    with Traffic(service, instance["rest_token"]) as traffic:
        pid = int((service.state_dir / "instances" / instance["id"] / "redis.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: traffic.failures(), what="a failure")
        # In every worker: each waits a little before it tries to connect again.
        wait_for(lambda: {status for status, _ in traffic.answers[-20:]} == {200}, 5, "answers")
    assert {status for status, _ in traffic.answers} <= {200, 502, 503}
    with Client(service.port, token=instance["rest_token"]) as client:
        assert client.request("GET", "/get/key").result is not None


def test_tokens_end_when_they_are_rotated_and_with_the_instance(service: Service, owner: Owner, instance: Any) -> None:
    def status(token: str) -> int:
        with Client(service.port, token=token) as client:
            return client.request("GET", "/ping").status

    old = instance["rest_token"]
    assert status(old) == 200
    new = owner.call("POST", f"/{instance['id']}/rotate-credentials")["token"]
    assert status(new) == 200
    # Of every worker: connections are spread over them.
    wait_for(lambda: [status(old) for _ in range(8)] == [401] * 8, 2, "the old token to end")
    owner.call("PUT", f"/{instance['id']}/status", {"action": "stop"})
    wait_for(lambda: [status(new) for _ in range(8)] == [503] * 8, 2, "the instance to be stopped everywhere")
    owner.call("PUT", f"/{instance['id']}/status", {"action": "start"})
    wait_for(lambda: [status(new) for _ in range(8)] == [200] * 8, 2, "the instance to be started everywhere")
    owner.call("DELETE", f"/{instance['id']}")
    wait_for(lambda: [status(new) for _ in range(8)] == [401] * 8, 2, "the instance to be gone everywhere")
    owner.call("POST", f"/{instance['id']}/restore")
    wait_for(lambda: [status(new) for _ in range(8)] == [200] * 8, 2, "the instance to be back everywhere")


def test_a_script_cannot_leave_its_instance(service: Service, owner: Owner, instance: Any) -> None:
    with Client(service.port, token=instance["rest_token"]) as client:
        assert client.post("/", ["SET", "key", "value"]).result == "OK"
        for call in (
            "'MIGRATE', '127.0.0.1', '6379', 'key', '0', '10'",
            "'SELECT', '1'",
            "'CONFIG', 'SET', 'dir', '/tmp'",
            "'ACL', 'LIST'",
        ):
            response = client.post("/", ["EVAL", f"return redis.call({call})", "0"])
            assert response.status == 400, (call, response)
        assert client.post("/", ["EVAL", "return redis.call('GET', KEYS[1])", "1", "key"]).result == "value"


def test_servers_run_on_through_a_reload_and_a_restart_of_the_service(database_urls: Urls, tmp_path: Path) -> None:
    first = Service(database_urls, tmp_path, "--workers", "1")
    try:
        owner = Owner(first)
        body = {"name": "n", "slug": "kept", "max_memory": 8 * MIB, "persistence_enabled": False}
        made = owner.call("POST", "", body)
        with Client(first.port, token=made["rest_token"]) as client:
            assert client.request("GET", "/set/key/value").result == "OK"
        owner.client.close()
        steward = steward_of(first)
        first.process.send_signal(signal.SIGHUP)
        wait_for(lambda: another_steward(first, steward), 30, "the next steward")
        with Client(first.port, token=made["rest_token"]) as client:
            assert client.request("GET", "/get/key").result == "value"
        first.process.terminate()
        assert first.process.wait(30) == 0
        second = Service(database_urls, tmp_path, "--workers", "1")
        try:
            with Client(second.port, token=made["rest_token"]) as client:
                assert client.request("GET", "/get/key").result == "value", "nothing but memory held it"
        finally:
            second.stop()
    finally:
        first.kill()
