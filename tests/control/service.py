"""What the tests of the data plane do with a running service: people, instances, keys, many connections at once."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg

from tests.http import Client, Response
from tests.servers import wait_for

PASSWORD = "correct horse 1!"

_numbers = itertools.count(1)


class Api:
    """One person at a service's HTTP API."""

    def __init__(self, port: int, token: str, organization_id: str, email: str) -> None:
        self.port = port
        self.token = token
        self.organization_id = organization_id
        self.email = email

    def call(self, method: str, path: str, body: Any = None, *, status: int | None = None) -> Any:
        """`data` of the answer; `path` below the organization where it does not begin with a slash."""
        target = path if path.startswith("/") else f"/api/organizations/{self.organization_id}/{path}"
        with Client(self.port, self.token) as client:
            if body is None and method in ("GET", "DELETE"):
                response = client.request(method, target)
            else:
                response = client.post(target, body or {}) if method == "POST" else _send(client, method, target, body)
        assert response.status == status if status is not None else response.status < 400, response
        return response.json()["data"]

    def instance(self, name: str, url: str) -> dict[str, Any]:
        """A new external instance."""
        created: dict[str, Any] = self.call(
            "POST", "redis-instances", {"name": name, "slug": name, "max_memory": 1 << 20, "external_url": url}
        )
        assert created["status"] == "running", created
        return created

    def key(self, **wanted: Any) -> tuple[str, str]:
        """A new API key and its id."""
        created = self.call("POST", "api-keys", {"name": "test", **wanted})
        return created["key"], created["api_key"]["id"]


def _send(client: Client, method: str, target: str, body: Any) -> Response:
    return client.request(method, target, json.dumps(body).encode())


def register(port: int, name: str = "person") -> Api:
    """Somebody new, signed in, with an organization."""
    unique = f"{name}{next(_numbers)}x{time.monotonic_ns() % 10**9}"
    body = {"email": f"{unique}@example.com", "username": unique, "password": PASSWORD}
    with Client(port, None) as client:
        response = client.post("/auth/register", body | {"first_name": "Ada", "last_name": "Lovelace"})
        assert response.status == 201, response
        data = client.post("/auth/login", {"email": body["email"], "password": PASSWORD}).json()["data"]
    return Api(port, data["token"], data["organization_id"], body["email"])


@contextlib.contextmanager
def connections(port: int, token: str, count: int = 24) -> Iterator[list[Client]]:
    """So many connections that every worker has some; each has made a request."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Client(port, token)) for _ in range(count)]


def execute(url: str, statement: str, *args: object) -> None:
    """One statement, past the service."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(statement, *args)
        finally:
            await connection.close()

    with asyncio.Runner() as runner:
        runner.run(run())


async def eventually(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait until `condition()` is true; for `seconds` at most."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"waited {seconds:g} s in vain")


def seconds_until(condition: Any, seconds: float, what: str) -> float:
    """How long it takes until `condition()` is true."""
    began = time.monotonic()
    wait_for(condition, seconds, what)
    return time.monotonic() - began
