"""The audit log: rows are only ever added, and whatever is done to them otherwise is found."""

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest

from control import audit
from control.audit import Actor, Audit, Filter, Head, head_file, note_head, record, verify, verify_database
from control.database import Database
from tests.control.conftest import SECRET_KEY, Server, Urls
from tests.control.people import Person, join, make_admin, register

KEYS = Audit([SECRET_KEY])
SOMEBODY = Actor(KEYS, "user", uuid4(), "ada@example.com", "2001:db8::1", "request-1")

Owner = asyncpg.Connection


@pytest.fixture
def own_urls(postgres_server: Server, migrated: str) -> Any:
    """A migrated database for one test, to break."""
    name = postgres_server.create(template=migrated)
    yield postgres_server.urls(name)
    postgres_server.drop(name)


@pytest.fixture
async def own(own_urls: Urls) -> AsyncIterator[Database]:
    """The same as the application sees it."""
    database = Database(own_urls.application, pool_size=20)
    yield database
    await database.close()


@pytest.fixture
async def intruder(own_urls: Urls) -> AsyncIterator[Owner]:
    """Somebody with the rights of the tables' owner, who has removed the trigger."""
    connection = await asyncpg.connect(own_urls.owner)
    await connection.execute("GRANT ALL ON audit_events TO CURRENT_USER")
    await connection.execute("ALTER TABLE audit_events DISABLE TRIGGER append_only")
    yield connection
    await connection.close()


async def add(database: Database, count: int = 1, action: str = "test.run") -> None:
    for number in range(count):
        async with database.transaction() as connection:
            await record(connection, SOMEBODY, action, ("thing", str(number)), {"n": number}, {"n": number + 1})


async def report(database: Database, *heads: Head, keys: Audit = KEYS) -> audit.Report:
    async with database.transaction() as connection:
        return await verify(connection, keys, heads)


async def head_of(database: Database) -> Head:
    async with database.connection() as connection:
        head = await audit.current_head(connection)
    assert head is not None
    return head


async def test_an_untouched_chain_holds(own: Database) -> None:
    assert (await report(own)).intact
    await add(own, 5)
    found = await report(own, await head_of(own))
    assert found.intact
    assert found.events == 5
    assert "5 events, the chain holds" in str(found)


@pytest.mark.parametrize(
    ("statement", "event"),
    [
        pytest.param("UPDATE audit_events SET action = 'test.other' WHERE sequence = 3", 3, id="action"),
        pytest.param("UPDATE audit_events SET at = at + interval '1 us' WHERE sequence = 3", 3, id="time"),
        pytest.param("UPDATE audit_events SET actor_id = gen_random_uuid() WHERE sequence = 3", 3, id="actor"),
        pytest.param("UPDATE audit_events SET actor_name = NULL WHERE sequence = 3", 3, id="name"),
        pytest.param("UPDATE audit_events SET address = '192.0.2.1' WHERE sequence = 3", 3, id="address"),
        pytest.param("UPDATE audit_events SET outcome = 'failure' WHERE sequence = 3", 3, id="outcome"),
        pytest.param("""UPDATE audit_events SET after = '{"n": 9}' WHERE sequence = 3""", 3, id="after"),
        pytest.param("UPDATE audit_events SET before = NULL, after = before WHERE sequence = 3", 3, id="swapped"),
        pytest.param("UPDATE audit_events SET organization_id = gen_random_uuid() WHERE sequence = 3", 3, id="whose"),
        pytest.param("UPDATE audit_events SET target_id = request_id, request_id = target_id WHERE sequence = 5", 5,
                     id="last"),
        pytest.param("UPDATE audit_events SET mac = sha256('x') WHERE sequence = 3", 3, id="code"),
    ],
)  # fmt: skip
async def test_an_edit_is_found(own: Database, intruder: Owner, statement: str, event: int) -> None:
    await add(own, 5)
    assert await intruder.execute(statement) == "UPDATE 1"
    found = await report(own)
    assert not found.intact
    assert f"event {event} " in found.problems[0]


async def test_deletions_are_found(own: Database, intruder: Owner) -> None:
    await add(own, 9)
    await intruder.execute("DELETE FROM audit_events WHERE sequence IN (1, 4, 5)")
    found = await report(own)
    assert found.problems == ["event 1 is missing", "events 4 to 5 are missing"]


async def test_a_deletion_that_is_numbered_over_is_found(own: Database, intruder: Owner) -> None:
    await add(own, 5)
    await intruder.execute("DELETE FROM audit_events WHERE sequence = 3")
    await intruder.execute("UPDATE audit_events SET sequence = 3 WHERE sequence = 4")
    await intruder.execute("UPDATE audit_events SET sequence = 4 WHERE sequence = 5")
    assert not (await report(own)).intact


async def test_two_events_that_changed_places_are_found(own: Database, intruder: Owner) -> None:
    await add(own, 4)
    await intruder.execute("UPDATE audit_events SET sequence = 100 WHERE sequence = 2")
    await intruder.execute("UPDATE audit_events SET sequence = 2 WHERE sequence = 3")
    await intruder.execute("UPDATE audit_events SET sequence = 3 WHERE sequence = 100")
    assert not (await report(own)).intact


async def test_a_truncation_is_found_by_the_head_that_was_noted(own: Database, intruder: Owner) -> None:
    await add(own, 5)
    head = await head_of(own)
    await intruder.execute("DELETE FROM audit_events WHERE sequence > 3")
    assert (await report(own)).intact, "what is left is whole"
    assert "no earlier head" in str(await report(own))
    found = await report(own, head)
    assert found.problems == ["the last events are missing: the log noted a head at event 5, the table ends at 3"]


async def test_an_empty_table_is_found_by_the_head_that_was_noted(own: Database, intruder: Owner) -> None:
    await add(own, 2)
    head = await head_of(own)
    await intruder.execute("TRUNCATE audit_events")
    assert not (await report(own, head)).intact


async def test_a_chain_that_grew_again_over_a_truncation_is_found(own: Database, intruder: Owner) -> None:
    await add(own, 5)
    head = await head_of(own)
    await intruder.execute("DELETE FROM audit_events WHERE sequence > 3")
    await add(own, 4)
    found = await report(own, head)
    assert found.problems == ["event 5 is not the one that the log noted as head"]


async def test_an_event_under_a_key_that_is_not_ours_is_found(own: Database) -> None:
    await add(own, 1)
    async with own.transaction() as connection:
        await record(connection, Audit([b"an intruder's key"]).system("intruder"), "test.run", ("thing", None))
    found = await report(own)
    assert not found.intact
    assert "not among the secret keys" in found.problems[0]


async def test_the_chain_goes_on_under_a_new_key(own: Database) -> None:
    await add(own, 2)
    both = Audit([b"the new key", SECRET_KEY])
    async with own.transaction() as connection:
        await record(connection, both.system("tests"), "test.run", ("thing", None))
    assert (await report(own, keys=both)).intact


async def test_the_chain_stays_whole_when_fifty_write_at_once(own: Database) -> None:
    """Some of them fail after they have recorded, and leave no gap."""

    async def act(number: int) -> None:
        async with own.transaction() as connection:
            await record(connection, SOMEBODY, "test.run", ("thing", str(number)))
            if number % 5 == 0:
                raise ZeroDivisionError

    results = await asyncio.gather(*(act(number) for number in range(50)), return_exceptions=True)
    assert sum(isinstance(result, ZeroDivisionError) for result in results) == 10
    found = await report(own)
    assert found.intact
    assert found.events == 40


async def test_a_process_that_stands_still_does_not_hold_up_the_others_for_long(
    own: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "PATIENCE_SECONDS", 0.2)
    stopped = await asyncpg.connect(own._url)
    transaction = stopped.transaction()
    await transaction.start()
    await record(stopped, SOMEBODY, "test.stopped", ("thing", None))
    async with asyncio.timeout(10):
        await add(own, 1)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
        await transaction.commit()
    await stopped.close()
    assert [row["action"] for row in await own.fetch("SELECT action FROM audit_events")] == ["test.run"]
    assert (await report(own)).intact


async def test_the_applications_role_can_only_add(own: Database) -> None:
    await add(own, 1)
    for statement in (
        "UPDATE audit_events SET action = 'x'",
        "DELETE FROM audit_events",
        "TRUNCATE audit_events",
        "ALTER TABLE audit_events DISABLE TRIGGER append_only",
        "DROP TRIGGER append_only ON audit_events",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await own.execute(statement)


async def test_the_tables_owner_can_only_add_and_whoever_else_is_stopped_by_the_trigger(
    own: Database, own_urls: Urls
) -> None:
    await add(own, 1)
    changes = ("UPDATE audit_events SET action = 'x'", "DELETE FROM audit_events", "TRUNCATE audit_events")
    for url, reason in ((own_urls.owner, "permission denied"), (own_urls.superuser, "only ever added")):
        connection = await asyncpg.connect(url)
        for statement in changes:
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match=reason):
                await connection.execute(statement)
        await connection.close()


async def test_values_of_every_kind_survive(own: Database) -> None:
    values = {
        "float": 1e2, "big": 10**30, "text": "ä\0\ud7ff\"\\", "list": [1, 2.50, None], "uuid": uuid4(),
        "time": datetime(2026, 1, 1, tzinfo=UTC), "nested": {"b": 1, "a": {"z": []}},
    }  # fmt: skip
    async with own.transaction() as connection:
        await record(connection, SOMEBODY, "test.run", ("thing\u2028", "\0\ud800"), values, {"é": "é"})
    assert (await report(own)).intact
    (event,) = (await audit.list_events(connection := await asyncpg.connect(own._url), Filter(), page=1, limit=9))[0]
    await connection.close()
    assert event["target"] == {"kind": "thing\u2028", "id": "\ufffd?"}


@pytest.mark.parametrize(
    ("address", "stored"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:DB8::0:1", "2001:db8::1"),
        ("::abcd:1234", "::171.205.18.52"),
        ("64:ff9b::192.0.2.1", "64:ff9b::c000:201"),
        ("fe80::1%eth0", "fe80::1"),
        ("a socket", None),
        ("", None),
        (None, None),
    ],
)
async def test_addresses_of_every_kind_survive(own: Database, address: str | None, stored: str | None) -> None:
    async with own.transaction() as connection:
        await record(connection, dataclasses.replace(SOMEBODY, address=address), "test.run", ("thing", None))
    assert await own.fetchval("SELECT host(address) FROM audit_events") == stored
    assert (await report(own)).intact


async def test_secrets_are_masked(own: Database) -> None:
    async with own.transaction() as connection:
        await record(connection, SOMEBODY, "test.run", ("thing", None), {"password": "hunter2"}, {"rest_token": "x"})
    rows = await own.fetch("SELECT before, after FROM audit_events")
    assert "hunter2" not in str(rows)
    assert rows[0]["after"] == {"rest_token": "•••"}


# The head


async def test_the_head_is_logged_and_kept(own: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = head_file(tmp_path)
    assert await note_head(own, file) is None
    await add(own, 3)
    head = await note_head(own, file)
    assert head is not None
    assert head.sequence == 3
    assert audit.parse_heads(caplog.text) == [head]
    assert audit.parse_heads(file.read_text()) == [head]


async def test_verifying_finds_a_truncation_by_the_file_of_this_host(
    own: Database, intruder: Owner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await add(own, 3)
    head = await note_head(own, head_file(tmp_path))
    assert (await verify_database(own, KEYS, tmp_path)).intact
    await intruder.execute("DELETE FROM audit_events WHERE sequence = 3")
    await note_head(own, head_file(tmp_path))
    assert "tampered" in caplog.text
    assert audit.parse_heads(head_file(tmp_path).read_text()) == [head], "the evidence is kept"
    assert not (await verify_database(own, KEYS, tmp_path)).intact


async def test_verifying_finds_a_truncation_by_a_log(own: Database, intruder: Owner, tmp_path: Path) -> None:
    await add(own, 3)
    log = tmp_path / "redisgate.log"
    log.write_text(f"something else\n2026-01-01T00:00:00Z info [7] audit head {await head_of(own)}\n")
    await intruder.execute("DELETE FROM audit_events WHERE sequence = 3")
    assert (await verify_database(own, KEYS, tmp_path)).intact
    assert not (await verify_database(own, KEYS, tmp_path, [log])).intact


# Over HTTP


@pytest.fixture
async def person(client: httpx.AsyncClient) -> Person:
    return await register(client)


def path(person: Person, end: str = "") -> str:
    return f"/api/organizations/{person.organization_id}/audit-logs{end}"


async def events(client: httpx.AsyncClient, person: Person, **query: object) -> list[dict[str, Any]]:
    response = await client.get(path(person), params=query, headers=person.headers)  # type: ignore[arg-type]
    assert response.status_code == 200, response.text
    items: list[dict[str, Any]] = response.json()["data"]["items"]
    return items


async def test_an_organization_sees_what_was_done_in_it(client: httpx.AsyncClient, person: Person) -> None:
    other = await register(client)
    await client.patch(
        f"/api/organizations/{person.organization_id}",
        json={"name": "New name"},
        headers=person.headers | {"X-Request-Id": "the-request"},
    )
    newest = (await events(client, person))[0]
    assert newest["action"] == "organization.update"
    assert newest["actor"] == {"kind": "user", "id": str(person.id), "name": person.email}
    assert newest["target"] == {"kind": "organization", "id": str(person.organization_id)}
    assert newest["before"] == {"name": "Ada's organization"}
    assert newest["after"] == {"name": "New name"}
    assert newest["address"] == "203.0.113.7"
    assert newest["request_id"] == "the-request"
    assert newest["outcome"] == "success"
    for event in await events(client, person):
        assert event["organization_id"] == str(person.organization_id)
    assert other.email not in str(await events(client, person))


async def test_events_are_filtered(client: httpx.AsyncClient, person: Person) -> None:
    member = await join(client, person, "member")
    actions = {event["action"] for event in await events(client, person, action="invitations.*")}
    assert actions == {"invitations.create", "invitations.accept"}
    (accepted,) = await events(client, person, actor_id=member.id)
    assert accepted["action"] == "invitations.accept"
    assert await events(client, person, outcome="failure") == []
    assert await events(client, person, target_kind="organization", action="organization.create")
    assert await events(client, person, since=accepted["at"]) == [accepted]
    assert accepted not in await events(client, person, until=accepted["at"])
    assert await events(client, person, action="100%*") == []


async def test_events_come_in_pages(client: httpx.AsyncClient, person: Person) -> None:
    whole = await events(client, person)
    response = await client.get(path(person), params={"page": 2, "limit": 1}, headers=person.headers)
    data = response.json()["data"]
    assert data["items"] == [whole[1]]
    assert (data["total_count"], data["page"], data["limit"], data["total_pages"]) == (len(whole), 2, 1, len(whole))


async def test_the_export_is_json_lines_the_oldest_first(client: httpx.AsyncClient, person: Person) -> None:
    response = await client.get(path(person, "/export"), headers=person.headers)
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert lines == list(reversed(await events(client, person)))
    filtered = await client.get(path(person, "/export"), params={"action": "none"}, headers=person.headers)
    assert filtered.text == ""


async def test_a_long_export_comes_whole(
    client: httpx.AsyncClient, person: Person, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "VERIFY_BATCH", 2)
    whole = await events(client, person)
    response = await client.get(path(person, "/export"), headers=person.headers)
    assert len(response.text.splitlines()) == len(whole)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        pytest.param("actor_id=x", "actor_id", id="no uuid"),
        pytest.param("since=yesterday", "since", id="no time"),
        pytest.param("outcome=maybe", "outcome", id="no outcome"),
        pytest.param("limit=0", "limit", id="limit"),
        pytest.param("page=x", "page", id="page"),
        pytest.param("action=%00", "action", id="NUL"),
    ],
)
async def test_a_wrong_filter_is_named(client: httpx.AsyncClient, person: Person, query: str, field: str) -> None:
    response = await client.get(f"{path(person)}?{query}", headers=person.headers)
    assert response.status_code == 400
    assert field in response.json()["data"]["fields"]


async def test_the_platforms_log_is_for_administrators(client: httpx.AsyncClient, person: Person, owner: Owner) -> None:
    for end in ("", "/export"):
        assert (await client.get(f"/api/audit-logs{end}", headers=person.headers)).status_code == 403
        assert (await client.get(f"/api/audit-logs{end}")).status_code == 401
    await make_admin(owner, person)
    response = await client.get("/api/audit-logs", params={"action": "sessions.create"}, headers=person.headers)
    assert response.status_code == 200
    assert response.json()["data"]["items"][0]["organization_id"] is None
    assert (await client.get("/api/audit-logs/export", headers=person.headers)).text


async def test_failed_sign_ins_are_recorded_without_the_password(
    client: httpx.AsyncClient, person: Person, database: Database
) -> None:
    await client.post("/auth/login", json={"email": person.email, "password": "hunter2 hunter2"})
    row = await database.fetchrow("SELECT * FROM audit_events ORDER BY sequence DESC LIMIT 1")
    assert row is not None
    assert (row["action"], row["outcome"], row["actor_kind"]) == ("sessions.create", "failure", "anonymous")
    assert row["target_id"] == str(person.id)
    assert "hunter2" not in str(await database.fetch("SELECT * FROM audit_events"))


async def test_refused_attempts_are_recorded(client: httpx.AsyncClient, person: Person) -> None:
    viewer = await join(client, person, "viewer")
    body = {"role": "owner"}
    member = f"/api/organizations/{person.organization_id}/members/{viewer.id}"
    assert (await client.patch(member, json=body, headers=viewer.headers)).status_code == 403
    assert (await client.get(path(person), headers=viewer.headers)).status_code == 403
    stranger = await register(client)
    assert (await client.patch(member, json=body, headers=stranger.headers)).status_code == 404
    (event,) = await events(client, person, outcome="denied")
    assert event["action"] == "members.update"
    assert event["actor"]["id"] == str(viewer.id)
    assert event["target"] == {"kind": "user", "id": str(viewer.id)}


async def test_the_service_keeps_a_chain_that_holds(
    client: httpx.AsyncClient, person: Person, database: Database
) -> None:
    await join(client, person, "admin")
    found = await report(database)
    assert found.intact
    assert found.events > 5
