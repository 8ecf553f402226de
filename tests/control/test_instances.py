"""Instances over HTTP, with a steward and real redis-servers behind them."""

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from control import hosts, instances, steward
from control.app import make_context
from control.database import Database
from control.http import Context
from control.instance_tokens import token_digest
from control.provisioners.local import stop_everything
from control.settings import instances_dir
from redisgate.config import Settings
from resp.address import Address
from resp.connection import FutureWaiter, connect
from resp.encoder import encode_command
from resp.errors import ConnectFailed, ReplyLost
from resp.parser import Parser
from tests.control.people import Person, join, register

MIB = 1024 * 1024
DEADLINE = 20.0

Owner = asyncpg.Connection


@pytest.fixture(scope="module", autouse=True)
def nothing_left_running(settings: Settings) -> Iterator[None]:
    yield
    stop_everything(instances_dir(settings))


@pytest.fixture
async def stewarded(settings: Settings) -> AsyncIterator[steward.Steward]:
    """A steward at work."""
    context = make_context(settings, name="steward")
    stop = asyncio.Event()
    one = steward.Steward(context)
    task = asyncio.create_task(one.run(stop))
    yield one
    stop.set()
    await task
    await context.close()


@pytest.fixture
async def person(client: httpx.AsyncClient) -> Person:
    return await register(client)


def path(person: Person, instance: object = None, *rest: str) -> str:
    parts = [f"/api/organizations/{person.organization_id}/redis-instances"]
    if instance is not None:
        parts.append(str(instance))
    return "/".join([*parts, *rest])


async def create(client: httpx.AsyncClient, person: Person, **changes: Any) -> dict[str, Any]:
    body = {"name": "My Redis", "slug": f"s{uuid4().hex[:12]}", "max_memory": 8 * MIB} | changes
    response = await client.post(path(person), json=body, headers=person.headers)
    assert response.status_code == 201, response.text
    data: dict[str, Any] = response.json()["data"]
    return data


async def call(context: Context, instance_id: object, *argv: str) -> Any:
    """A command as the gateway would send it."""
    row = await context.database.fetchrow("SELECT * FROM instances WHERE id = $1", UUID(str(instance_id)))
    assert row is not None
    return await call_at(instances.address_of(row, context.encryption), *argv)


async def call_at(address: Address, *argv: str) -> Any:
    connection = await connect(address, timeout=5)
    waiter = FutureWaiter(1, asyncio.get_running_loop())
    connection.send(encode_command([word.encode() for word in argv]), waiter)
    try:
        return Parser(text=True).parse(await waiter.future, 1)[0]
    finally:
        connection.close(ReplyLost("done"))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)


async def eventually(database: Database, instance_id: object, **wanted: object) -> asyncpg.Record:
    """The row once it has these values."""
    async with asyncio.timeout(DEADLINE):
        while True:
            row = await database.fetchrow("SELECT * FROM instances WHERE id = $1", UUID(str(instance_id)))
            if row is not None and all(row[name] == value for name, value in wanted.items()):
                return row
            await asyncio.sleep(0.02)


async def used(client: httpx.AsyncClient, person: Person) -> tuple[int, int]:
    response = await client.get(f"/api/organizations/{person.organization_id}/quota", headers=person.headers)
    quota = response.json()["data"]["quota"]
    return quota["current_instances"], quota["current_memory_mb"]


# Creating


async def test_the_seeds_bodies_work_as_written(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward, context: Context
) -> None:
    body = {
        "name": "My Redis",
        "slug": "my-redis-001",
        "organization_id": str(person.organization_id),
        "max_memory": 536870912,
        "redis_version": "7.0",
    }
    response = await client.post(path(person), json=body, headers=person.headers)
    assert response.status_code == 201, response.text
    data = response.json()["data"]
    assert data["status"] == "running"
    assert data["slug"] == "my-redis-001"
    assert data["redis_version"] in stewarded._local.versions()
    assert await call(context, data["id"], "SET", "mykey", "myvalue") == "OK"
    other = body | {"name": "my-redis", "slug": "my-redis", "max_memory": 104857600, "redis_version": "7.2"}
    response = await client.post(path(person), json=other, headers=person.headers)
    assert response.status_code == 201, response.text
    assert response.json()["data"]["status"] == "running"
    if not response.json()["data"]["redis_version"].startswith("7.2"):
        assert "instead of 7.2" in response.json()["message"]
    empty = await client.put(path(person, data["id"], "status"), headers=person.headers)
    assert empty.status_code == 200
    assert empty.json()["data"]["status"] == "running"
    gone = await client.delete(path(person, data["id"]), headers=person.headers)
    assert gone.status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("organization_id", str(uuid4())),
        ("organization_id", "mine"),
        ("name", ""),
        ("name", " "),
        ("name", "x" * 101),
        ("slug", "-a"),
        ("slug", "a-"),
        ("slug", "UPPER"),
        ("slug", "a.b"),
        ("slug", "x" * 51),
        ("slug", "a\n"),
        ("max_memory", 1024),
        ("max_memory", 16 * 1024 * MIB + 1),
        ("max_memory", "512mb"),
        ("max_memory", None),
        ("redis_version", "latest"),
        ("redis_version", "7.0\n"),
        ("cpu_request", "much"),
        ("memory_request", "1 GB"),
        ("eviction", "sometimes"),
        ("persistence_enabled", "yes"),
        ("external_url", "http://example.com"),
        ("external_url", "redis://"),
        ("external_url", "unix:///run/redis.sock"),
        ("external_url", "redis://user@example.com"),
        ("external_url", "redis://127.0.0.1:6379"),
        ("external_url", "redis://169.254.169.254:80"),
        ("external_url", "redis://[::ffff:10.0.0.1]:6379"),
        ("unknown", 1),
    ],
    ids=str,
)
async def test_what_is_wrong_with_a_field_is_said(
    client: httpx.AsyncClient, person: Person, field: str, value: object
) -> None:
    body = {"name": "n", "slug": "s", "max_memory": 8 * MIB, field: value}
    response = await client.post(path(person), json=body, headers=person.headers)
    assert response.status_code == 400, response.text
    assert list(response.json()["data"]["fields"]) == [field]
    assert (await client.get(path(person), headers=person.headers)).json()["data"]["total_count"] == 0


async def test_a_slug_is_unique_within_the_organization_only(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward
) -> None:
    first = await create(client, person, slug="cache")
    again = await client.post(
        path(person), json={"name": "n", "slug": "cache", "max_memory": 8 * MIB}, headers=person.headers
    )
    assert again.status_code == 409
    assert again.json()["data"] == {"fields": {"slug": "is taken"}}
    other = await create(client, await register(client), slug="cache")
    assert other["slug"] == "cache"
    assert other["rest_url"] != first["rest_url"]
    unnamed = await create(client, person, slug=None, name="Čache of the Übung!")
    assert unnamed["slug"] == "ache-of-the-bung"


async def test_secrets_are_kept_encrypted_and_shown_to_who_may_see_them(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward, context: Context, owner: Owner
) -> None:
    data = await create(client, person)
    row = await context.database.fetchrow("SELECT * FROM instances WHERE id = $1", UUID(data["id"]))
    assert row is not None
    password = instances.decrypt(row, "password", context.encryption)
    assert password
    dump = repr(tuple(row.values()))
    for secret in (password, data["rest_token"], data["readonly_rest_token"]):
        assert secret not in dump
    assert row["token_digest"] == token_digest(data["rest_token"].encode())
    assert context.instance_tokens.verify(data["rest_token"].encode())
    for answer in (path(person), path(person, data["id"])):
        assert data["rest_token"] not in (await client.get(answer, headers=person.headers)).text
    viewer = await join(client, person, "viewer")
    assert (await client.get(path(person, data["id"], "credentials"), headers=viewer.headers)).status_code == 403
    shown = await client.get(path(person, data["id"], "credentials"), headers=person.headers)
    assert shown.json()["data"] == {"token": data["rest_token"], "readonly_token": data["readonly_rest_token"]}
    assert shown.headers["cache-control"] == "no-store"
    event = await owner.fetchrow(
        "SELECT * FROM audit_events WHERE action = 'instances.credentials' AND target_id = $1", data["id"]
    )
    assert event is not None
    assert event["actor_id"] == person.id


async def test_another_organizations_instance_does_not_exist(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward
) -> None:
    data = await create(client, person)
    stranger = await register(client)
    for url in (path(person, data["id"]), path(stranger, data["id"])):
        for method, rest in (
            ("GET", ()),
            ("PATCH", ()),
            ("DELETE", ()),
            ("PUT", ("status",)),
            ("GET", ("credentials",)),
        ):
            response = await client.request(method, "/".join([url, *rest]), headers=stranger.headers)
            assert response.status_code == 404, (method, url, response.text)


async def test_fifty_creations_at_once_count_exactly_once(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward, context: Context
) -> None:
    bodies = [{"name": "n", "slug": f"s-{n}", "max_memory": 2 * MIB} for n in range(50)]
    answers = await asyncio.gather(*(client.post(path(person), json=body, headers=person.headers) for body in bodies))
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [201] * 5 + [403] * 45
    refused = next(answer for answer in answers if answer.status_code == 403).json()
    assert refused["data"]["limit"] == refused["data"]["used"] == 5
    made = [answer.json()["data"] for answer in answers if answer.status_code == 201]
    assert await used(client, person) == (5, 10)
    for each in made:
        await eventually(context.database, each["id"], status="running")
        assert await call(context, each["id"], "PING") == "PONG"
    await asyncio.gather(*(client.delete(path(person, each["id"]), headers=person.headers) for each in made))
    assert await used(client, person) == (0, 0)


async def test_the_same_slug_fifty_times_at_once_is_one_instance(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward
) -> None:
    body = {"name": "n", "slug": "same", "max_memory": 2 * MIB}
    answers = await asyncio.gather(*(client.post(path(person), json=body, headers=person.headers) for _ in range(50)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 49
    assert await used(client, person) == (1, 2)


async def test_a_creation_that_fails_is_rolled_back_and_counts_no_more(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward, context: Context
) -> None:
    await create(client, person)
    local, servers = stewarded._local, stewarded._local._servers
    local._any_version, local._servers = False, servers
    data = await create(client, person, redis_version="5.9")
    try:
        row = await eventually(context.database, data["id"], status="error", counts_against_quota=False)
    finally:
        local._any_version = True
    assert "not 5.9" in row["status_reason"]
    assert (row["host_id"], row["endpoint"], row["process"]) == (None, None, None)
    assert str(data["id"]) not in os.listdir(instances_dir(context.gateway_settings))
    assert await used(client, person) == (1, 8)
    seen = (await client.get(path(person, data["id"]), headers=person.headers)).json()["data"]
    assert [(step["step"], step["outcome"]) for step in seen["steps"]] == [("roll back", "done"), ("create", "failed")]
    # Asked to try again, and now it can be.
    again = await client.put(path(person, data["id"], "status"), json={"action": "reconcile"}, headers=person.headers)
    assert again.json()["data"]["status"] == "running", again.text
    assert await used(client, person) == (2, 16)


# Changing


async def test_memory_and_eviction_change_while_it_runs(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward, context: Context
) -> None:
    data = await create(client, person)
    await call(context, data["id"], "SET", "key", "value")
    response = await client.patch(
        path(person, data["id"]),
        json={"name": "Renamed", "max_memory": 64 * MIB, "eviction": "allkeys-lru"},
        headers=person.headers,
    )
    changed = response.json()["data"]
    assert (changed["name"], changed["max_memory"], changed["status"]) == ("Renamed", 64 * MIB, "running")
    assert await call(context, data["id"], "CONFIG", "GET", "maxmemory-policy") == ["maxmemory-policy", "allkeys-lru"]
    assert await call(context, data["id"], "GET", "key") == "value"
    assert await used(client, person) == (1, 64)
    over = await client.patch(path(person, data["id"]), json={"max_memory": 16384 * MIB}, headers=person.headers)
    assert over.status_code == 403
    assert await used(client, person) == (1, 64)


async def test_it_stops_starts_and_restarts(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward, context: Context
) -> None:
    data = await create(client, person)
    await call(context, data["id"], "SET", "key", "value")
    before = await call(context, data["id"], "INFO", "server")

    async def act(action: str, code: int = 200) -> Any:
        response = await client.put(path(person, data["id"], "status"), json={"action": action}, headers=person.headers)
        assert response.status_code == code, response.text
        return response.json()["data"]

    assert (await act("restart"))["status"] == "running"
    assert await call(context, data["id"], "INFO", "server") != before
    assert (await act("stop"))["status"] == "stopped"
    with pytest.raises(ConnectFailed):
        await call(context, data["id"], "PING")
    await act("restart", 409)
    await act("no such thing", 400)
    resized = await client.patch(path(person, data["id"]), json={"max_memory": 16 * MIB}, headers=person.headers)
    assert resized.json()["data"]["status"] == "stopped"
    assert (await act("start"))["status"] == "running"
    assert await call(context, data["id"], "GET", "key") == "value"


async def test_rotation_ends_tokens_and_changes_the_password_under_the_gateways(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward, context: Context
) -> None:
    data = await create(client, person)
    row = await eventually(context.database, data["id"])
    old = instances.address_of(row, context.encryption)
    response = await client.post(path(person, data["id"], "rotate-credentials"), json={}, headers=person.headers)
    tokens = response.json()["data"]
    assert set(tokens.values()).isdisjoint({data["rest_token"], data["readonly_rest_token"]})
    row = await eventually(context.database, data["id"], next_password_encrypted=None, status="running")
    assert row["token_digest"] == token_digest(tokens["token"].encode())
    new = instances.address_of(row, context.encryption)
    assert new.password != old.password
    # Gateways that do not know yet are let in, for a while.
    assert await call_at(old, "PING") == await call_at(new, "PING") == "PONG"
    await context.database.execute("UPDATE instances SET old_password_until = now() WHERE id = $1", row["id"])
    stewarded._queue.add(row["id"])
    await eventually(context.database, data["id"], old_password_until=None)
    assert await call_at(new, "PING") == "PONG"
    with pytest.raises(ConnectFailed):
        await call_at(old, "PING")
    only = await client.post(
        path(person, data["id"], "rotate-credentials"),
        json={"readonly_token": False, "password": False},
        headers=person.headers,
    )
    assert only.json()["data"]["readonly_token"] is None
    nothing = {"token": False, "readonly_token": False, "password": False}
    assert (
        await client.post(path(person, data["id"], "rotate-credentials"), json=nothing, headers=person.headers)
    ).status_code == 400


async def test_a_server_that_dies_is_started_again(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward, context: Context
) -> None:
    data = await create(client, person)
    await call(context, data["id"], "SET", "key", "value")
    row = await eventually(context.database, data["id"])
    os.kill(row["process"]["pid"], signal.SIGKILL)

    async def is_another() -> bool:
        now = await eventually(context.database, data["id"])
        return now["process"] is not None and now["process"] != row["process"]

    await until(is_another)
    await eventually(context.database, data["id"], status="running")
    assert await call(context, data["id"], "GET", "key") == "value"
    seen = (await client.get(path(person, data["id"]), headers=person.headers)).json()["data"]["steps"]
    assert "ended by SIGKILL" in next(step["detail"] for step in seen if step["outcome"] == "failed")


# Deleting


async def test_a_deleted_instance_can_be_restored_with_its_data_until_it_is_purged(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward, context: Context, owner: Owner
) -> None:
    data = await create(client, person, slug="keep")
    await call(context, data["id"], "SET", "key", "value")
    deleted = (await client.delete(path(person, data["id"]), headers=person.headers)).json()["data"]
    assert (deleted["desired_state"], deleted["status"]) == ("deleted", "stopped")
    left = datetime.fromisoformat(deleted["purge_at"]) - datetime.now(UTC)
    assert timedelta(days=6, hours=23) < left <= timedelta(days=7)
    assert await used(client, person) == (0, 0)
    assert (await client.delete(path(person, data["id"]), headers=person.headers)).status_code == 404
    assert (await client.get(path(person), headers=person.headers)).json()["data"]["items"] == []
    listed = await client.get(path(person), params={"deleted": "true"}, headers=person.headers)
    assert [item["id"] for item in listed.json()["data"]["items"]] == [data["id"]]
    with pytest.raises(ConnectFailed):
        await call(context, data["id"], "PING")
    # Its slug is free meanwhile; whoever took it is in the way.
    other = await create(client, person, slug="keep")
    conflict = await client.post(path(person, data["id"], "restore"), headers=person.headers)
    assert conflict.status_code == 409
    await client.delete(path(person, other["id"]), headers=person.headers)
    restored = await client.post(path(person, data["id"], "restore"), headers=person.headers)
    assert restored.json()["data"]["status"] == "running", restored.text
    assert await call(context, data["id"], "GET", "key") == "value"
    assert await used(client, person) == (1, 8)
    await client.delete(path(person, data["id"]), headers=person.headers)
    await owner.execute("UPDATE instances SET purge_at = now() WHERE id = $1", UUID(data["id"]))
    assert (await client.post(path(person, data["id"], "restore"), headers=person.headers)).status_code == 404
    stewarded._queue.add(UUID(data["id"]))

    async def is_gone() -> bool:
        return await owner.fetchval("SELECT true FROM instances WHERE id = $1", UUID(data["id"])) is None

    await until(is_gone)
    assert data["id"] not in os.listdir(instances_dir(context.gateway_settings))
    assert (await client.get(path(person, data["id"]), headers=person.headers)).status_code == 404
    purged = await owner.fetchrow(
        "SELECT * FROM audit_events WHERE action = 'instances.purge' AND target_id = $1", data["id"]
    )
    assert purged is not None
    assert (purged["actor_kind"], purged["actor_name"]) == ("system", "steward")


# Keys


async def test_secrets_move_to_a_new_key_and_the_old_one_can_go(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward, context: Context
) -> None:
    data = await create(client, person)
    from control.encryption import DecryptionError, Encryption

    secret = context.gateway_settings.secret_key
    context.encryption = Encryption([b"n" * 32, secret])
    await instances.renew_encryption(context)
    row = await eventually(context.database, data["id"])
    new = Encryption([b"n" * 32])
    assert instances.decrypt(row, "token", new) == data["rest_token"]
    assert instances.decrypt(row, "admin_password", new)
    with pytest.raises(DecryptionError):
        instances.decrypt(row, "token", Encryption([secret]))
    context.encryption = Encryption([secret, b"n" * 32])
    await instances.renew_encryption(context)


def test_a_provisioner_that_is_not_built_is_a_clear_error_at_start(settings: Settings, tmp_path: Path) -> None:

    from redisgate.config import ConfigError

    def with_(**control: object) -> Settings:
        return dataclasses.replace(settings, control=dataclasses.replace(settings.control, **control))  # type: ignore[arg-type]

    for name, text in (("kubernetes", "REDISGATE_KUBERNETES=on"), ("cloud", "there is none called")):
        with pytest.raises(ConfigError, match=text):
            steward.check(with_(provisioner=name))
    with pytest.raises(ConfigError, match="cannot be run"):
        steward.check(with_(redis_server="/no/such/redis-server"))
    steward.check(settings)
    assert hosts.host_id(tmp_path) == hosts.host_id(tmp_path)
    (tmp_path / "host-id").write_text("mine")
    with pytest.raises(ConfigError, match="remove it"):
        hosts.host_id(tmp_path)


async def test_the_gateways_own_services_are_known(settings: Settings) -> None:

    control = dataclasses.replace(
        settings.control,
        database_url="postgresql://user:p%40ss@db.example.com/x",
        database_direct_url="postgresql://[::1]:5433,other:5434/x?host=/run",
    )
    found = instances.own_services(dataclasses.replace(settings, host="::", port=3000, control=control))
    assert found[:4] == [("::", 3000), ("db.example.com", 5432), ("::1", 5433), ("other", 5434)]
    with contextlib.suppress(ValueError):
        assert all(port for _, port in found)


@pytest.mark.parametrize(
    ("base_domain", "public", "domain", "url"),
    [
        ("", "http://gate.test:3000", None, "http://gate.test:3000/redis/{id}"),
        ("gate.test", "https://gate.test", "{label}.gate.test", "https://{label}.gate.test"),
        ("gate.test.", "http://gate.test:3000", "{label}.gate.test", "http://{label}.gate.test:3000"),
        ("localhost", "http://127.0.0.1:3000", "{label}.localhost", "http://127.0.0.1:3000/redis/{id}"),
    ],
)
async def test_every_instance_has_a_domain_of_its_own_where_there_is_one_to_be_under(
    client: httpx.AsyncClient,
    person: Person,
    stewarded: steward.Steward,
    context: Context,
    base_domain: str,
    public: str,
    domain: str | None,
    url: str,
) -> None:
    data = await create(client, person, slug="cache")
    row = await eventually(context.database, data["id"])
    assert row["label"].startswith("cache-")
    control = dataclasses.replace(context.settings, public_url=public)
    settings = dataclasses.replace(context.gateway_settings, base_domain=base_domain, control=control)
    seen = instances.view(row, settings)
    assert seen["domain"] == (domain and domain.format(label=row["label"]))
    assert seen["rest_url"] == url.format(label=row["label"], id=row["id"])


async def test_a_key_for_some_instances_manages_no_others(
    client: httpx.AsyncClient, person: Person, stewarded: steward.Steward
) -> None:
    mine, other = await create(client, person), await create(client, person)
    made = await client.post(
        f"/api/organizations/{person.organization_id}/api-keys",
        json={"name": "narrow", "scopes": ["manage"], "instance_ids": [mine["id"]]},
        headers=person.headers,
    )
    assert made.status_code == 201, made.text
    headers = {"Authorization": f"Bearer {made.json()['data']['key']}"}
    listed = (await client.get(path(person), headers=headers)).json()["data"]
    assert ([item["id"] for item in listed["items"]], listed["total_count"]) == ([mine["id"]], 1)
    assert (await client.get(path(person, mine["id"]), headers=headers)).status_code == 200
    for method, rest in (("GET", ""), ("DELETE", ""), ("GET", "/credentials"), ("PUT", "/status"), ("GET", "/usage")):
        response = await client.request(method, path(person, other["id"]) + rest, headers=headers)
        assert response.status_code == 404, (method, rest, response.text)
    body = {"name": "n", "slug": "n", "max_memory": 8 * MIB}
    assert (await client.post(path(person), json=body, headers=headers)).status_code == 403
