"""The access feed: misses, changes with and without notifications, PostgreSQL away and back."""

import asyncio
import contextlib
import dataclasses
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from control import api_keys, daily, feed
from control.audit import Actor
from control.daily import DailyLeases
from control.feed import AccessFeed
from control.http import Context
from control.usage import UsageCollector
from redisgate.access import UNAUTHORIZED, AccessTable, Grant, Keyring
from redisgate.config import Settings
from redisgate.shared import SharedState
from resp.errors import Unavailable
from tests.control.conftest import Service, Urls
from tests.control.people import Person, join, register
from tests.control.service import Api, connections, eventually, execute, seconds_until
from tests.control.service import register as register_at
from tests.http import Client
from tests.servers import RedisServer, wait_for

LOOPBACK = {"REDISGATE_ALLOWED_NETWORKS": "127.0.0.0/8"}


class Line:
    """A Unix socket that leads to PostgreSQL until it is cut."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = parse_qs(parts.query)["host"][0] + "/.s.PGSQL.5432"
        self._folder = tempfile.TemporaryDirectory(prefix="rgline")
        self.url = url.replace(parts.query, f"host={self._folder.name}")
        self._path = Path(self._folder.name) / ".s.PGSQL.5432"
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._server: socket.socket | None = None
        self.mend()

    def mend(self) -> None:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self._path))
        self._server.listen(100)
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def cut(self) -> None:
        """Nobody is there any more, for old connections and new ones."""
        assert self._server is not None
        self._path.unlink()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def close(self) -> None:
        if self._path.exists():
            self.cut()
        self._folder.cleanup()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
                upstream = socket.socket(socket.AF_UNIX)
                upstream.connect(self._target)
            except OSError:
                return
            with self._lock:
                self._open += [client, upstream]
            for source, sink in ((client, upstream), (upstream, client)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()


# In one process, to see what it asks


class Counted:
    """Counts a database's queries, and lets a test step in before the answer."""

    def __init__(self, database: Any) -> None:
        self._database = database
        self.queries: list[str] = []
        self.before_answer: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    async def fetchrow(self, query: str, *args: object) -> Any:
        self.queries.append(query)
        row = await self._database.fetchrow(query, *args)
        if self.before_answer is not None:
            hook, self.before_answer = self.before_answer, None
            await hook()
        return row


@dataclasses.dataclass
class Fed:
    """A feed and the table it fills."""

    feed: AccessFeed
    access: AccessTable
    database: Counted


@contextlib.asynccontextmanager
async def feeding(context: Context, *, start: bool = True) -> AsyncIterator[Fed]:
    shared = SharedState.anonymous(1)
    access = AccessTable()
    leases = DailyLeases(context.database, uuid4())
    usage = UsageCollector(context.database, access)
    counted = Counted(context.database)
    one = AccessFeed(dataclasses.replace(context, database=counted), access, shared, 0, usage=usage, leases=leases)
    access.source = one
    if start:
        one.start()
        await eventually(lambda: one.listening)
    yield Fed(one, access, counted)
    await one.stop()
    access.abort()
    shared.close()


async def an_instance(context: Context, organization_id: UUID) -> UUID:
    """A row that says that there is one; nobody connects to it here."""
    instance_id, slug = uuid4(), f"s{secrets.token_hex(4)}"
    await context.database.execute(
        "INSERT INTO instances (id, organization_id, name, slug, label, provisioner, max_memory, status, endpoint,"
        " token_digest, token_encrypted, readonly_token_digest, readonly_token_encrypted)"
        " VALUES ($1, $2, $3, $3, $3, 'external', 0, 'running', $6, $4, '', $5, '')",
        instance_id,
        organization_id,
        slug,
        secrets.token_bytes(32),
        secrets.token_bytes(32),
        {"host": "127.0.0.1", "port": 1},
    )
    return instance_id


async def a_key(context: Context, person: Person, **wanted: Any) -> tuple[bytes, UUID]:
    async with context.database.transaction() as connection:
        key, row = await api_keys.create(
            context,
            connection,
            Actor(context.audit, "user", person.id, person.email),
            person.organization_id,
            person.id,
            "owner",
            api_keys.CreateApiKey(name="test", **wanted),
        )
    return key.encode(), row["id"]


@pytest.fixture
async def person(client: httpx.AsyncClient) -> Person:
    return await register(client)


async def test_misses_of_one_credential_are_joined(context: Context, person: Person) -> None:
    instance_id = await an_instance(context, person.organization_id)
    key, _ = await a_key(context, person, instance_ids=[instance_id])
    async with feeding(context) as fed:
        fed.database.queries.clear()
        assert await asyncio.gather(*(fed.feed.load(key, None) for _ in range(100))) == [None] * 100
        assert len(fed.database.queries) == 1
        assert isinstance(fed.access.lookup(key), Grant)


async def test_forgeries_and_known_failures_cost_no_query(context: Context, person: Person) -> None:
    key, key_id = await a_key(context, person)
    async with feeding(context) as fed:
        for forged in (b"", b"x", key[:-3] + b"abc", b"rgt_" + b"A" * 44, b"a.b.c"):
            assert fed.feed.refusal(forged) is UNAUTHORIZED
        assert fed.feed.refusal(key) is None
        await context.database.execute("DELETE FROM api_keys WHERE id = $1", key_id)
        # The news of the deletion may come after the first look, and make the feed look once more.
        async with asyncio.timeout(5):
            while fed.feed.refusal(key) is None:
                assert await fed.feed.load(key, None) is UNAUTHORIZED
        fed.database.queries.clear()
        assert fed.feed.refusal(key) is UNAUTHORIZED
        assert fed.database.queries == []


async def test_what_is_loaded_while_everything_is_forgotten_is_loaded_again(context: Context, person: Person) -> None:
    instance_id = await an_instance(context, person.organization_id)
    key, key_id = await a_key(context, person, instance_ids=[instance_id])
    async with feeding(context, start=False) as fed:

        async def forget() -> None:
            # What changed meanwhile is not known one by one: revoked, and no notification of it.
            await context.database.execute("UPDATE api_keys SET revoked_at = now() WHERE id = $1", key_id)
            fed.feed._forget_all()

        fed.database.before_answer = forget
        assert await fed.feed.load(key, None) is UNAUTHORIZED
        assert fed.access.lookup(key) is None


@pytest.mark.parametrize("reference", ["x" * 200, "a\0b"], ids=["long", "NUL"])
async def test_names_that_no_instance_has_are_neither_asked_nor_remembered(
    context: Context, person: Person, reference: str
) -> None:
    key, _ = await a_key(context, person)
    async with feeding(context) as fed:
        fed.database.queries.clear()
        assert fed.access.resolve(key, reference, in_header=True, address=lambda: None) is UNAUTHORIZED
        assert fed.database.queries == []


async def test_the_row_grants_and_the_claims_do_not(context: Context, person: Person) -> None:
    instance_id = await an_instance(context, person.organization_id)
    key, key_id = await a_key(context, person, scopes=["read", "write"], instance_ids=[instance_id])
    await context.database.execute("UPDATE api_keys SET scopes = '{read}' WHERE id = $1", key_id)
    async with feeding(context) as fed:
        assert await fed.feed.load(key, None) is None
        grant = fed.access.lookup(key)
        assert grant is not None
        rule = grant.policy.rule(b"SET")
        assert rule is not None
        assert rule.refusal is not None


async def test_a_revocation_during_a_load_is_not_overtaken_by_it(context: Context, person: Person) -> None:
    instance_id = await an_instance(context, person.organization_id)
    key, key_id = await a_key(context, person, instance_ids=[instance_id])
    async with feeding(context) as fed:

        async def revoke() -> None:
            await context.database.execute("UPDATE api_keys SET revoked_at = now() WHERE id = $1", key_id)
            await fed.feed._catch_up()

        fed.database.before_answer = revoke
        assert await fed.feed.load(key, None) is UNAUTHORIZED
        assert fed.access.find(key) is None


async def test_a_feed_that_fell_too_far_behind_forgets_all(
    context: Context, person: Person, owner: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    instance_id = await an_instance(context, person.organization_id)
    key, key_id = await a_key(context, person, instance_ids=[instance_id])
    async with feeding(context, start=False) as fed:
        assert await fed.feed.load(key, None) is None
        await context.database.execute("UPDATE api_keys SET revoked_at = now() WHERE id = $1", key_id)
        await owner.execute("DELETE FROM access_changes")
        await fed.feed._catch_up()
        assert fed.access.find(key) is None
        assert await fed.feed.load(key, None) is UNAUTHORIZED


async def test_a_new_instance_ends_what_was_the_only_one(context: Context, person: Person) -> None:
    first = await an_instance(context, person.organization_id)
    key, _ = await a_key(context, person)
    async with feeding(context, start=False) as fed:
        assert await fed.feed.load(key, None) is None
        ring = fed.access.find(key)
        assert isinstance(ring, Keyring)
        chosen = ring.choose(None)
        assert isinstance(chosen, Grant)
        assert chosen.instance.id == str(first)
        await an_instance(context, person.organization_id)
        await fed.feed._catch_up()
        await fed.feed.load(key, None)
        ring = fed.access.find(key)
        assert isinstance(ring, Keyring)
        refused = ring.choose(None)
        assert not isinstance(refused, Grant)
        assert refused is not None
        assert b"name one" in refused.line


async def test_what_is_remembered_is_bounded(context: Context, person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_CREDENTIALS", 5)
    monkeypatch.setattr(feed, "MAX_UNKNOWN", 5)
    instance_id = await an_instance(context, person.organization_id)
    await context.database.execute("UPDATE quotas SET max_api_keys = 100")
    keys = [await a_key(context, person, instance_ids=[instance_id]) for _ in range(8)]
    async with feeding(context, start=False) as fed:
        for key, _ in keys:
            assert await fed.feed.load(key, None) is None
        assert [fed.access.find(key) is not None for key, _ in keys] == [False] * 3 + [True] * 5
        await context.database.execute("UPDATE api_keys SET revoked_at = now()")
        await fed.feed._catch_up()
        for key, _ in keys:
            assert await fed.feed.load(key, None) is UNAUTHORIZED
        assert len(fed.feed._unknown) == 5
        assert not fed.feed._subjects
        assert not fed.feed._credentials


async def test_a_changed_role_bounds_a_key_at_once(context: Context, client: httpx.AsyncClient, person: Person) -> None:
    member = await join(client, person, "member")
    instance_id = await an_instance(context, person.organization_id)
    async with context.database.transaction() as connection:
        key, _ = await api_keys.create(
            context,
            connection,
            Actor(context.audit, "user", member.id, member.email),
            person.organization_id,
            member.id,
            "member",
            api_keys.CreateApiKey(name="test", instance_ids=[instance_id]),
        )
    async with feeding(context) as fed:
        assert await fed.feed.load(key.encode(), None) is None
        await context.database.execute("DELETE FROM memberships WHERE user_id = $1", member.id)
        await eventually(lambda: fed.access.find(key.encode()) is None)
        assert await fed.feed.load(key.encode(), None) is UNAUTHORIZED


async def test_without_postgresql_an_unknown_key_is_neither_good_nor_bad(
    settings: Settings, context: Context, person: Person
) -> None:
    key, _ = await a_key(context, person)
    nowhere = dataclasses.replace(
        settings, control=dataclasses.replace(settings.control, database_url="postgresql://u:p@/x?host=/nowhere")
    )
    from control.app import make_context

    away = make_context(nowhere)
    async with feeding(away, start=False) as fed:
        assert fed.feed.refusal(key) is None
        with pytest.raises(Unavailable):
            await fed.feed.load(key, None)
    await away.close()


# Whole services


@pytest.fixture
def line(database_urls: Urls) -> Iterator[Line]:
    line = Line(database_urls.application)
    yield line
    line.close()


@pytest.fixture
def cut_off(line: Line, database_urls: Urls, tmp_path: Path) -> Iterator[Service]:
    """Four workers whose way to PostgreSQL can be cut."""
    service = Service(database_urls, tmp_path, "--workers", "4", **LOOPBACK, DATABASE_URL=line.url)
    yield service
    service.stop()


def test_what_is_cached_works_while_postgresql_is_away_and_all_comes_back(
    cut_off: Service, line: Line, redis_server: RedisServer
) -> None:
    person = register_at(cut_off.port, "away")
    made = person.instance("away", redis_server.url + "/8")
    known, known_id = person.key()
    person.call("PUT", "quota", {"max_commands_per_day": 100_000})
    with contextlib.ExitStack() as stack:
        clients = [
            client
            for token in (made["rest_token"], known)
            for client in stack.enter_context(connections(cut_off.port, token))
        ]
        assert {client.get("/ping").status for client in clients} == {200}
        unknown, _ = person.key()
        line.cut()
        seconds_until(lambda: person_away(person), 5, "the control plane to notice")
        assert {client.get("/ping").status for client in clients} == {200}
        with Client(cut_off.port, unknown) as client:
            began = time.monotonic()
            response = client.get("/ping")
            assert (response.status, response.headers["retry-after"]) == (503, "1")
            assert "token" in response.error
            assert time.monotonic() - began < 4
            assert client.get("/ping").status == 503
        with Client(cut_off.port, unknown[:-4] + "AAAA") as client:
            assert client.get("/ping").status == 401  # a forgery is one, whoever is away
        for _ in range(20):
            assert {client.get("/ping").status for client in clients} == {200}
        line.mend()
        with Client(cut_off.port, unknown) as client:
            seconds_until(lambda: client.get("/ping").status == 200, 10, "PostgreSQL to be back")
        seconds_until(lambda: not person_away(person), 10, "the control plane to be back")
        person.call("DELETE", f"api-keys/{known_id}")
        seconds_until(
            lambda: {client.get("/ping").status for client in clients if client.token == known} == {401},
            2.5,
            "the revocation",
        )


def person_away(person: Api) -> bool:
    with Client(person.port, person.token) as client:
        response = client.get(f"/api/organizations/{person.organization_id}/api-keys")
        assert response.status in (200, 503), response
        assert response.status == 200 or int(response.headers["retry-after"]) > 0
        return response.status == 503


def test_a_revocation_during_an_outage_holds_when_it_is_over(
    cut_off: Service, line: Line, redis_server: RedisServer, database_urls: Urls
) -> None:
    person = register_at(cut_off.port, "outage")
    person.instance("outage", redis_server.url + "/9")
    key, key_id = person.key()
    with connections(cut_off.port, key) as clients:
        assert {client.get("/ping").status for client in clients} == {200}
        line.cut()
        execute(database_urls.application, f"UPDATE api_keys SET revoked_at = now() WHERE id = '{key_id}'")
        assert {client.get("/ping").status for client in clients} == {200}
        line.mend()
        seconds_until(lambda: {client.get("/ping").status for client in clients} == {401}, 10, "the revocation")


def test_a_revocation_holds_within_two_seconds_where_notifications_do_not_arrive(
    database_urls: Urls, postgres_server: Any, tmp_path: Path, redis_server: RedisServer
) -> None:
    # Notifications stay within a database: LISTEN succeeds in another, as behind a pooler, and nothing is ever heard.
    elsewhere = database_urls.application.replace("/test_", "/postgres?was=test_").split("?was=")[0]
    elsewhere += "?" + database_urls.application.split("?", 1)[1]
    service = Service(database_urls, tmp_path, "--workers", "4", **LOOPBACK, DATABASE_DIRECT_URL=elsewhere)
    try:
        person = register_at(service.port, "deaf")
        made = person.instance("deaf", redis_server.url + "/10")
        wait_for(lambda: "notifications of PostgreSQL do not arrive" in service.log(), 10, "the complaint")
        taken = []
        for _ in range(4):
            key, key_id = person.key(instance_ids=[made["id"]])
            with connections(service.port, key) as clients:
                assert {client.get("/ping").status for client in clients} == {200}
                person.call("DELETE", f"api-keys/{key_id}")
                taken.append(
                    seconds_until(
                        lambda clients=clients: {client.get("/ping").status for client in clients} == {401},
                        3,
                        "the revocation",
                    )
                )
        assert max(taken) < 2, taken
    finally:
        service.stop()


def test_daily_limits_go_on_while_postgresql_is_away(
    cut_off: Service, line: Line, redis_server: RedisServer, database_urls: Urls
) -> None:
    person = register_at(cut_off.port, "adrift")
    made = person.instance("adrift", redis_server.url + "/11")
    person.call("PUT", "quota", {"max_commands_per_day": 500})
    with Client(cut_off.port, made["rest_token"]) as client:
        seconds_until(lambda: client.get("/ping").headers.get("ratelimit-limit") == "500", 2, "the quota")
        line.cut()
        seconds_until(lambda: person_away(person), 5, "the control plane to notice")
        statuses = [client.get("/ping").status for _ in range(600)]
        passed = statuses.count(200)
        assert statuses == [200] * passed + [429] * (600 - passed)
        assert 480 <= passed < 500
        line.mend()


def test_the_bounds_of_leases_fit_together() -> None:
    assert daily.STALE_SECONDS < 10  # of renew_daily_lease, after which others get what was not renewed
