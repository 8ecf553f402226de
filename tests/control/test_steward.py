"""The steward: one per host, one for the whole deployment, through restarts and without PostgreSQL."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit
from uuid import UUID, uuid4

import httpx
import pytest

from control import hosts, instances, steward
from control.app import make_app, make_context
from control.duties import Duty
from control.http import Context
from control.instances import CreateInstance
from control.provisioners.local import stop_everything
from control.reconciler import backoff
from control.settings import instances_dir
from redisgate.config import Settings
from resp.errors import ConnectFailed
from tests.control.conftest import Urls, make_settings
from tests.control.people import register
from tests.control.test_instances import MIB, call_at, eventually, path, until
from tests.servers import RedisServer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWEEP_SECONDS", "EXTERNAL_SWEEP_SECONDS", "LEADER_SECONDS", "RETRY_SECONDS"):
        monkeypatch.setattr(steward, name, 0.05)


@contextlib.asynccontextmanager
async def at_work(settings: Settings) -> AsyncIterator[steward.Steward]:
    context = make_context(settings, name="steward")
    stop = asyncio.Event()
    one = steward.Steward(context)
    task = asyncio.create_task(one.run(stop))
    try:
        yield one
    finally:
        stop.set()
        await task
        await context.close()


@pytest.fixture
def here(database_urls: Urls, tmp_path: Path) -> Iterator[Settings]:
    """Settings of one host, which lets external instances be on this machine."""
    settings = make_settings(database_urls, tmp_path / "here", allowed_networks=("127.0.0.0/8",))
    yield settings
    stop_everything(instances_dir(settings))


@pytest.fixture
async def client(here: Settings) -> AsyncIterator[httpx.AsyncClient]:
    context = make_context(here, name="tests")
    transport = httpx.ASGITransport(make_app(context))
    async with httpx.AsyncClient(transport=transport, base_url="http://redisgate.test") as client:
        client.context = context  # type: ignore[attr-defined]
        yield client
    await context.close()


async def organization(context: Context) -> UUID:
    async with context.database.transaction() as connection:
        found = await connection.fetchval(
            "INSERT INTO organizations (name, slug) VALUES ('n', $1) RETURNING id", uuid4().hex
        )
        await connection.execute(
            "INSERT INTO quotas (organization_id, max_instances, max_memory, max_api_keys) VALUES ($1, 5, $2, 1)",
            found,
            1024 * MIB,
        )
        assert isinstance(found, UUID)
        return found


async def create(context: Context) -> UUID:
    body = CreateInstance(name="n", slug=f"s{uuid4().hex[:12]}", max_memory=8 * MIB)
    created, _ = await instances.create(context, context.audit.system("tests"), await organization(context), None, body)
    return created


# External instances


async def test_an_external_instance_is_registered_watched_and_brought_back(
    client: httpx.AsyncClient, here: Settings
) -> None:
    context: Context = client.context  # type: ignore[attr-defined]
    person = await register(client)
    redis, other = RedisServer(), RedisServer("--requirepass", "secret")
    try:
        body: dict[str, Any] = {"name": "Theirs", "slug": "theirs", "external_url": redis.url, "redis_version": "1.2"}
        refused = await client.post(path(person), json=body, headers=person.headers)
        assert refused.status_code == 400
        assert "not 1.2" in refused.json()["data"]["fields"]["external_url"]
        del body["redis_version"]
        async with at_work(here):
            created = await client.post(path(person), json=body, headers=person.headers)
            assert created.status_code == 201, created.text
            data = created.json()["data"]
            assert (data["status"], data["provisioner"], data["max_memory"]) == ("running", "external", 0)
            assert data["external_url"] == f"{redis.url}/0"
            row = await eventually(context.database, data["id"])
            assert await call_at(instances.address_of(row, context.encryption), "PING") == "PONG"
            # It is not ours to size.
            resized = await client.patch(path(person, data["id"]), json={"max_memory": 8 * MIB}, headers=person.headers)
            assert list(resized.json()["data"]["fields"]) == ["max_memory"]
            redis.kill()
            row = await eventually(context.database, data["id"], status="error")
            assert "cannot be reached" in row["status_reason"]
            redis.start()
            await eventually(context.database, data["id"], status="running")
            # Elsewhere, with a password, which is kept encrypted.
            url = other.url.replace("://", "://:secret@")
            moved = await client.patch(path(person, data["id"]), json={"external_url": url}, headers=person.headers)
            assert moved.status_code == 200, moved.text
            assert "secret" not in moved.text
            row = await eventually(context.database, data["id"], status="running")
            address = instances.address_of(row, context.encryption)
            assert (address.port, address.password) == (other.port, "secret")
            assert await call_at(address, "PING") == "PONG"
            stopped = await client.put(
                path(person, data["id"], "status"), json={"action": "stop"}, headers=person.headers
            )
            assert stopped.json()["data"]["status"] == "stopped"
            deleted = await client.delete(path(person, data["id"]), headers=person.headers)
            assert deleted.json()["data"]["status"] == "stopped"
    finally:
        redis.stop()
        other.stop()


# Several hosts, several stewards


async def test_one_host_works_for_the_whole_deployment_and_another_takes_over(
    here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    running = 0

    async def work(context: Context) -> None:
        nonlocal running
        running += 1
        assert running == 1, "never beside itself"
        done.append(str(context.gateway_settings.state_dir.name))
        await asyncio.sleep(0)
        running -= 1

    monkeypatch.setattr(steward, "DUTIES", {"test": Duty("test", 0.01, work)})
    there = dataclasses.replace(here, state_dir=tmp_path / "there")

    async def done_by(name: str) -> bool:
        return name in done

    async with at_work(there) as second:
        await until(lambda: done_by("there"))
        async with at_work(here) as first:
            assert first.host_id != second.host_id
            await until(lambda: _seen(first, second))
            assert not await done_by("here")
    done.clear()
    async with at_work(here), contextlib.AsyncExitStack() as stack:
        await until(lambda: done_by("here"))
        await stack.enter_async_context(at_work(there))
        assert not await done_by("there")
    async with at_work(there):
        await until(lambda: done_by("there"))


async def _seen(*stewards: steward.Steward) -> bool:
    for each in stewards:
        if not await each._database.fetchval("SELECT true FROM hosts WHERE id = $1", each.host_id):
            return False
    return True


async def test_a_duty_that_fails_is_tried_again(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = asyncio.Queue[int]()

    async def work(context: Context) -> None:
        tries.put_nowait(1)
        raise ValueError("nothing works")

    monkeypatch.setattr(steward, "DUTIES", {"test": Duty("test", 0.01, work)})
    async with at_work(here), asyncio.timeout(20):
        await tries.get()
        await tries.get()


async def test_an_instance_stays_on_the_host_that_made_it(here: Settings, tmp_path: Path) -> None:
    there = dataclasses.replace(here, state_dir=tmp_path / "there")
    context = make_context(here, name="tests")
    async with at_work(here) as first, at_work(there) as second:
        made = [await create(context) for _ in range(4)]
        rows = [await eventually(context.database, one, status="running") for one in made]
        assert {row["host_id"] for row in rows} <= {first.host_id, second.host_id}
    assert stop_everything(instances_dir(here)) + stop_everything(instances_dir(there)) == 4
    await context.close()


async def test_the_next_steward_waits_for_the_one_before_to_end(here: Settings) -> None:
    context = make_context(here, name="tests")
    one, other = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(steward.run(context, one))
    created = await create(context)
    await eventually(context.database, created, status="running")
    second = asyncio.create_task(steward.run(context, other))
    one.set()
    await first
    assert not second.done()
    await context.database.execute("UPDATE instances SET desired_state = 'stopped' WHERE id = $1", created)
    await eventually(context.database, created, status="stopped")
    other.set()
    await second
    await context.close()


async def test_instances_are_made_where_the_gateway_that_was_asked_can_reach_them(
    here: Settings, tmp_path: Path
) -> None:
    there = dataclasses.replace(here, state_dir=tmp_path / "there")
    contexts = [make_context(settings, name="tests") for settings in (here, there)]
    async with at_work(here) as first, at_work(there) as second:
        await until(lambda: _seen(first, second))
        for context, one in zip(contexts, (first, second), strict=True):
            row = await eventually(context.database, await create(context), status="running")
            assert row["host_id"] == one.host_id
    stop_everything(instances_dir(there))
    for context in contexts:
        await context.close()


async def test_instances_of_a_host_that_is_away_are_said_to_be_in_error_until_it_is_back(
    here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = dataclasses.replace(here, state_dir=tmp_path / "there")
    context = make_context(there, name="tests")
    async with at_work(there):
        created = await create(context)
        first = await eventually(context.database, created, status="running")
    pending = await create(context)  # it is that host's, which has not begun with it
    assert (await eventually(context.database, pending))["host_id"] == first["host_id"]
    await context.database.execute("UPDATE hosts SET seen_at = now() - interval '2 minutes'")
    monkeypatch.setattr(hosts, "AWAY_SECONDS", 0.5)
    async with at_work(here) as other:
        await eventually(context.database, pending, status="running", host_id=other.host_id)
        row = await eventually(context.database, created, status="error")
        assert "has not been heard of since" in row["status_reason"]
        assert row["host_id"] == first["host_id"]
        async with at_work(there):
            row = await eventually(context.database, created, status="running")
            assert row["process"] == first["process"], "it ran all the time"
    stop_everything(instances_dir(there))
    await context.close()


# Without PostgreSQL


class Proxy:
    """Stands before PostgreSQL's socket, and can be away."""

    def __init__(self, socket: str, folder: Path) -> None:
        self._socket = socket
        self._path = folder / Path(socket).name
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._connected, self._path)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._socket)
        self._writers |= {writer, back}
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.transport.abort()
        self._writers.discard(writer)


async def test_a_server_that_dies_while_postgresql_is_away_is_started_again(
    here: Settings, database_urls: Urls
) -> None:
    parts = urlsplit(database_urls.application)
    query = dict(parse_qsl(parts.query))
    with tempfile.TemporaryDirectory(prefix="rgp") as folder:
        proxy = Proxy(f"{query['host']}/.s.PGSQL.{query.get('port', parts.port or 5432)}", Path(folder))
        url = parts._replace(query=urlencode(query | {"host": folder})).geturl()
        settings = dataclasses.replace(here, control=dataclasses.replace(here.control, database_url=url))
        await proxy.start()
        context = make_context(here, name="tests")
        async with at_work(settings):
            created = await create(context)
            row = await eventually(context.database, created, status="running")
            address = instances.address_of(row, context.encryption)
            await call_at(address, "SET", "key", "value")
            await proxy.stop()
            os.kill(row["process"]["pid"], signal.SIGKILL)

            async def answers() -> bool:
                with contextlib.suppress(ConnectFailed):
                    return bool(await call_at(address, "GET", "key") == "value")
                return False

            await until(answers)
            assert (await eventually(context.database, created))["process"] == row["process"], "nobody could record it"
            await proxy.start()

            async def is_recorded() -> bool:
                now = await eventually(context.database, created)
                return bool(now["status"] == "running" and now["process"] != row["process"])

            await until(is_recorded)
            await context.database.execute("UPDATE instances SET desired_state = 'stopped' WHERE id = $1", created)
            await eventually(context.database, created, status="stopped")
        await proxy.stop()
        await context.close()


def test_pauses_grow_and_have_an_end() -> None:
    pauses = [backoff(attempts).total_seconds() for attempts in range(12)]
    assert pauses[:4] == [0, 0.5, 1, 2]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 60
