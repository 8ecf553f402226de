"""Registering, signing in, sessions, profiles and passwords, over HTTP."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from control import accounts, mailer
from control.app import make_app, make_context
from control.audit import Audit
from control.database import Database
from control.http import Context
from control.mailer import Mailer, Message, make_mailer
from redisgate.config import ConfigError, Settings
from tests.control.conftest import SECRET_KEY, Urls, make_settings
from tests.control.people import PASSWORD, Person, join, register, registration, sign_in

Owner = asyncpg.Connection


@pytest.fixture
async def person(client: httpx.AsyncClient) -> Person:
    return await register(client)


@pytest.fixture
def mails(context: Context) -> list[Message]:
    """What was sent."""
    sent: list[Message] = []

    async def deliver(message: Message) -> None:
        sent.append(message)

    context.mailer = Mailer(deliver)
    return sent


@pytest.fixture(autouse=True)
async def nothing_failed_yet(owner: Owner) -> None:
    await owner.execute("DELETE FROM throttle")


def fields(response: httpx.Response) -> dict[str, str]:
    assert response.status_code == 400, response.text
    found: dict[str, str] = response.json()["data"]["fields"]
    return found


# Registering


async def test_registering_makes_a_person_with_an_organization(client: httpx.AsyncClient) -> None:
    body = registration()
    response = await client.post("/auth/register", json=body)
    assert response.status_code == 201
    envelope = response.json()
    assert envelope.keys() == {"success", "data", "message", "timestamp"}
    assert envelope["success"] is True
    user = envelope["data"]["user"]
    assert {name: user[name] for name in ("email", "username", "first_name", "last_name")} == {
        name: body[name] for name in ("email", "username", "first_name", "last_name")
    }
    assert user["is_admin"] is False
    assert envelope["data"]["organization"]["id"] == envelope["data"]["organization_id"]
    assert envelope["data"]["organization"]["role"] == "owner"
    assert "password" not in response.text


@pytest.mark.parametrize("taken", ["email", "username"])
async def test_what_is_taken_is_a_conflict_whatever_its_case(client: httpx.AsyncClient, taken: str) -> None:
    first = registration()
    await client.post("/auth/register", json=first)
    response = await client.post("/auth/register", json=registration() | {taken: first[taken].upper()})
    assert response.status_code == 409
    assert response.json()["data"]["fields"] == {taken: "is taken"}


async def test_of_twenty_registrations_of_one_address_one_succeeds(client: httpx.AsyncClient, owner: Owner) -> None:
    email = registration()["email"]
    responses = await asyncio.gather(
        *(client.post("/auth/register", json=registration(email=email)) for _ in range(20))
    )
    assert sorted(response.status_code for response in responses) == [201] + [409] * 19
    assert await owner.fetchval("SELECT count(*) FROM users WHERE email = $1", email) == 1


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"email": "no address"}, "email"),
        ({"email": "a@b\nBcc: c@d"}, "email"),
        ({"email": "a@b.example\n"}, "email"),
        ({"username": "newline\n"}, "username"),
        ({"email": "a" * 250 + "@example.com"}, "email"),
        ({"email": 7}, "email"),
        ({"email": None}, "email"),
        ({"username": ""}, "username"),
        ({"username": "with space"}, "username"),
        ({"username": "x" * 65}, "username"),
        ({"password": "1234567"}, "password"),
        ({"password": "x" * 2000}, "password"),
        ({"password": "12345678\0"}, "password"),
        ({"first_name": "x" * 101}, "first_name"),
        ({"last_name": ["x"]}, "last_name"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_is_wrong_is_named(client: httpx.AsyncClient, changes: dict[str, Any], wrong: str) -> None:
    response = await client.post("/auth/register", json=registration() | changes)
    assert fields(response).keys() == {wrong}


async def test_everything_that_is_wrong_is_named_at_once(client: httpx.AsyncClient) -> None:
    response = await client.post("/auth/register", json={"email": "x", "password": "short"})
    assert fields(response).keys() == {"email", "password", "username"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff"], ids=repr)
async def test_a_body_that_is_no_object_is_a_bad_request(client: httpx.AsyncClient, body: bytes) -> None:
    assert (await client.post("/auth/register", content=body)).status_code == 400


async def test_an_invited_person_registers_and_joins(client: httpx.AsyncClient, person: Person) -> None:
    body = registration()
    invited = await client.post(
        f"/api/organizations/{person.organization_id}/invitations",
        json={"email": body["email"], "role": "viewer"},
        headers=person.headers,
    )
    token = invited.json()["data"]["token"]
    response = await client.post("/auth/register", json=registration(invitation=token))
    assert response.status_code == 403, "another address"
    response = await client.post("/auth/register", json=body | {"invitation": token})
    assert response.status_code == 201
    assert response.json()["data"]["joined_organization_id"] == str(person.organization_id)


async def test_the_invited_register_while_their_organization_changes(client: httpx.AsyncClient, person: Person) -> None:
    """Both take the organization and the audit log, in the same order."""
    bodies = [registration() for _ in range(10)]
    for body in bodies:
        invited = await client.post(
            f"/api/organizations/{person.organization_id}/invitations",
            json={"email": body["email"]},
            headers=person.headers,
        )
        body["invitation"] = invited.json()["data"]["token"]
    path = f"/api/organizations/{person.organization_id}"
    responses = await asyncio.gather(
        *(client.post("/auth/register", json=body) for body in bodies),
        *(client.patch(path, json={"name": f"Name {n}"}, headers=person.headers) for n in range(10)),
    )
    assert [response.status_code for response in responses] == [201] * 10 + [200] * 10


async def test_a_closed_registration_lets_in_the_invited_only(
    client: httpx.AsyncClient, person: Person, database_urls: Urls, tmp_path: Path
) -> None:
    context = make_context(make_settings(database_urls, tmp_path, registration=False))
    body = registration()
    invited = await client.post(
        f"/api/organizations/{person.organization_id}/invitations",
        json={"email": body["email"]},
        headers=person.headers,
    )
    transport = httpx.ASGITransport(make_app(context), client=("203.0.113.9", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://redisgate.test") as closed:
        assert (await closed.post("/auth/register", json=body)).status_code == 403
        assert (await closed.post("/auth/register", json=body | {"invitation": "made up"})).status_code == 404
        token = invited.json()["data"]["token"]
        assert (await closed.post("/auth/register", json=body | {"invitation": token})).status_code == 201
    await context.close()


# Signing in


async def test_signing_in_tells_what_a_client_needs(client: httpx.AsyncClient) -> None:
    body = registration()
    registered = (await client.post("/auth/register", json=body)).json()["data"]
    response = await client.post("/auth/login", json={"email": body["email"], "password": body["password"]})
    assert response.status_code == 200
    data = response.json()["data"]
    assert data["organization_id"] == registered["organization_id"]
    assert data["user"]["id"] == registered["user"]["id"]
    assert data["api_key"] is None
    me = await client.get("/auth/me", headers={"Authorization": f"Bearer {data['token']}"})
    assert me.status_code == 200
    assert me.json()["data"]["user"]["email"] == body["email"]


async def test_signing_in_shows_the_newest_key_and_makes_none(
    client: httpx.AsyncClient, person: Person, owner: Owner
) -> None:
    for name in ("older", "newest"):
        await owner.execute(
            "INSERT INTO api_keys (organization_id, user_id, name, digest, prefix, scopes, expires_at, created_at)"
            " VALUES ($1, $2, $3, sha256(gen_random_uuid()::text::bytea), 'rg_12345678', '{read}',"
            " now() + interval '1 day', clock_timestamp())",
            person.organization_id,
            person.id,
            name,
        )
    body = {"email": person.email, "password": PASSWORD}
    shown = [(await client.post("/auth/login", json=body)).json()["data"]["api_key"] for _ in range(3)]
    assert {key["name"] for key in shown} == {"newest"}
    assert shown[0]["key_prefix"] == "rg_12345678"
    assert not {"digest", "key"} & shown[0].keys()
    assert await owner.fetchval("SELECT count(*) FROM api_keys WHERE user_id = $1", person.id) == 2


async def test_the_address_is_taken_in_any_case(client: httpx.AsyncClient, person: Person) -> None:
    await sign_in(client, person.email.upper())


@pytest.mark.parametrize(
    "body", [{"email": "x@example.com"}, {"password": "x"}, {"email": 1, "password": "x"}], ids=str
)
async def test_incomplete_sign_ins_are_bad_requests(client: httpx.AsyncClient, body: dict[str, object]) -> None:
    assert fields(await client.post("/auth/login", json=body))


async def test_known_and_unknown_addresses_get_the_same_answer(client: httpx.AsyncClient, person: Person) -> None:
    answers = []
    for email in (person.email, "nobody@example.com"):
        response = await client.post("/auth/login", json={"email": email, "password": "wrong wrong"})
        answer = response.json()
        del answer["timestamp"]
        headers = {name: value for name, value in response.headers.items() if name != "x-request-id"}
        answers.append((response.status_code, answer, headers))
    assert answers[0] == answers[1]
    assert answers[0][0] == 401


async def test_known_and_unknown_addresses_take_the_same_time(
    database_urls: Urls, tmp_path: Path, owner: Owner
) -> None:
    context = make_context(make_settings(database_urls, tmp_path, argon2_memory=8 << 20, argon2_threads=1))
    transport = httpx.ASGITransport(make_app(context), client=("203.0.113.10", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://redisgate.test") as client:
        person = await register(client)
        fastest = {}
        for email in (person.email, "nobody@example.com"):
            times = []
            for _ in range(12):
                await owner.execute("DELETE FROM throttle")
                began = time.perf_counter()
                await client.post("/auth/login", json={"email": email, "password": "wrong wrong"})
                times.append(time.perf_counter() - began)
            fastest[email] = min(times)
    await context.close()
    known, unknown = fastest.values()
    assert unknown == pytest.approx(known, rel=0.3)


async def test_a_disabled_person_is_told_nothing_and_let_nowhere(
    client: httpx.AsyncClient, person: Person, owner: Owner
) -> None:
    await owner.execute("UPDATE users SET disabled_at = now() WHERE id = $1", person.id)
    assert (await client.get("/auth/me", headers=person.headers)).status_code == 401
    response = await client.post("/auth/login", json={"email": person.email, "password": PASSWORD})
    assert response.status_code == 401
    assert response.json()["message"] == "the e-mail address or the password is wrong"


async def test_raised_parameters_are_applied_at_the_next_sign_in(
    client: httpx.AsyncClient, person: Person, database_urls: Urls, tmp_path: Path, owner: Owner
) -> None:
    context = make_context(make_settings(database_urls, tmp_path, argon2_time_cost=2))
    transport = httpx.ASGITransport(make_app(context), client=("203.0.113.11", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://redisgate.test") as raised:
        await raised.post("/auth/login", json={"email": person.email, "password": "wrong wrong"})
        old = await owner.fetchval("SELECT password_hash FROM users WHERE id = $1", person.id)
        assert "t=1," in old
        await sign_in(raised, person.email)
        new = await owner.fetchval("SELECT password_hash FROM users WHERE id = $1", person.id)
        assert "t=2," in new
        await sign_in(raised, person.email)
        assert await owner.fetchval("SELECT password_hash FROM users WHERE id = $1", person.id) == new
    await context.close()


# The cookie


def cookie_attributes(response: httpx.Response) -> set[str]:
    (header,) = response.headers.get_list("set-cookie")
    return {part.strip().partition("=")[0] if "Max-Age" in part else part.strip() for part in header.split(";")[1:]}


async def test_a_browser_gets_a_cookie_that_scripts_cannot_read(client: httpx.AsyncClient, person: Person) -> None:
    response = await client.post("/auth/login", json={"email": person.email, "password": PASSWORD})
    assert cookie_attributes(response) == {"HttpOnly", "SameSite=Lax", "Path=/", "Max-Age"}
    assert (await client.get("/auth/me")).status_code == 200
    out = await client.post("/auth/logout")
    assert out.status_code == 200
    assert "Max-Age=0" in out.headers["set-cookie"]
    assert (await client.get("/auth/me")).status_code == 401


async def test_the_cookie_is_secure_where_there_is_tls(person: Person, database_urls: Urls, tmp_path: Path) -> None:
    context = make_context(make_settings(database_urls, tmp_path, public_url="https://redisgate.test"))
    transport = httpx.ASGITransport(make_app(context), client=("203.0.113.12", 1))
    async with httpx.AsyncClient(transport=transport, base_url="https://redisgate.test") as client:
        response = await client.post("/auth/login", json={"email": person.email, "password": PASSWORD})
        assert "Secure" in cookie_attributes(response)
    await context.close()


async def test_other_sites_cannot_use_or_set_the_cookie(client: httpx.AsyncClient, person: Person) -> None:
    body = {"email": person.email, "password": PASSWORD}
    foreign = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert "set-cookie" not in (await client.post("/auth/login", json=body, headers=foreign)).headers
    await client.post("/auth/login", json=body)
    assert (await client.patch("/auth/me", json={"first_name": "Eve"}, headers=foreign)).status_code == 403
    own = {"Origin": "http://redisgate.test", "Sec-Fetch-Site": "same-origin"}
    assert (await client.patch("/auth/me", json={"first_name": "Eve"}, headers=own)).status_code == 200


# Sessions


async def test_refreshing_extends_the_session_and_no_more(
    client: httpx.AsyncClient, person: Person, owner: Owner
) -> None:
    await owner.execute("UPDATE sessions SET ends_at = now() + interval '1 minute' WHERE user_id = $1", person.id)
    response = await client.post("/auth/refresh", headers=person.headers)
    assert response.status_code == 200
    data = response.json()["data"]
    row = await owner.fetchrow("SELECT id, expires_at, ends_at FROM sessions WHERE user_id = $1", person.id)
    assert row is not None
    assert data["session_id"] == str(row["id"])
    assert row["expires_at"] == row["ends_at"]
    client.cookies.clear()
    fresh = {"Authorization": f"Bearer {data['token']}"}
    assert (await client.get("/auth/me", headers=fresh)).status_code == 200
    await owner.execute("UPDATE sessions SET ends_at = now() WHERE user_id = $1", person.id)
    for method, path in (("GET", "/auth/me"), ("POST", "/auth/refresh")):
        assert (await client.request(method, path, headers=fresh)).status_code == 401


async def test_a_session_is_ended_by_signing_out_and_no_other(client: httpx.AsyncClient, person: Person) -> None:
    other = {"Authorization": f"Bearer {await sign_in(client, person.email)}"}
    assert (await client.post("/auth/logout", headers=person.headers)).status_code == 200
    assert (await client.get("/auth/me", headers=person.headers)).status_code == 401
    assert (await client.get("/auth/me", headers=other)).status_code == 200


async def test_sessions_are_listed_and_ended_one_by_one(client: httpx.AsyncClient, person: Person) -> None:
    token = await sign_in(client, person.email)
    listed = (await client.get("/auth/sessions", headers=person.headers)).json()["data"]
    assert listed["total_count"] == 2
    assert [item["current"] for item in listed["items"]] == [False, True]
    assert listed["items"][0]["address"] == "203.0.113.7"
    newest = listed["items"][0]["id"]
    assert (await client.delete(f"/auth/sessions/{newest}", headers=person.headers)).status_code == 200
    assert (await client.get("/auth/me", headers={"Authorization": f"Bearer {token}"})).status_code == 401
    assert (await client.delete(f"/auth/sessions/{newest}", headers=person.headers)).status_code == 404


async def test_all_other_sessions_are_ended_at_once(client: httpx.AsyncClient, person: Person) -> None:
    tokens = [await sign_in(client, person.email) for _ in range(3)]
    response = await client.delete("/auth/sessions", headers=person.headers)
    assert response.json()["data"] == {"ended_sessions": 3}
    for token in tokens:
        assert (await client.get("/auth/me", headers={"Authorization": f"Bearer {token}"})).status_code == 401
    assert (await client.get("/auth/me", headers=person.headers)).status_code == 200


async def test_another_persons_session_does_not_exist(client: httpx.AsyncClient, person: Person) -> None:
    other = await register(client)
    (theirs,) = (await client.get("/auth/sessions", headers=other.headers)).json()["data"]["items"]
    assert (await client.delete(f"/auth/sessions/{theirs['id']}", headers=person.headers)).status_code == 404
    assert (await client.delete("/auth/sessions/not-a-uuid", headers=person.headers)).status_code == 404
    assert (await client.get("/auth/me", headers=other.headers)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/auth/me"),
        ("PATCH", "/auth/me"),
        ("POST", "/auth/logout"),
        ("POST", "/auth/refresh"),
        ("POST", "/auth/password"),
        ("GET", "/auth/sessions"),
        ("DELETE", "/auth/sessions"),
        ("DELETE", "/auth/sessions/5b2f8d9e-7b0c-4f4c-9a70-5c1f6f0a1b2c"),
    ],
)
@pytest.mark.parametrize("credential", [None, "Bearer ", "Bearer x", "Bearer a.b.c", "Basic eDp5"])
async def test_nobody_is_let_in_without_a_session(
    client: httpx.AsyncClient, method: str, path: str, credential: str | None
) -> None:
    headers = {} if credential is None else {"Authorization": credential}
    response = await client.request(method, path, headers=headers)
    assert response.status_code == 401
    assert response.json()["success"] is False
    assert response.headers["www-authenticate"] == "Bearer"


# The profile


async def test_a_profile_is_changed_in_parts(client: httpx.AsyncClient, person: Person) -> None:
    response = await client.patch("/auth/me", json={"first_name": "Grace"}, headers=person.headers)
    assert response.json()["data"]["first_name"] == "Grace"
    assert response.json()["data"]["last_name"] == "Lovelace"
    assert (await client.patch("/auth/me", json={}, headers=person.headers)).status_code == 200
    assert fields(await client.patch("/auth/me", json={"username": "a b"}, headers=person.headers))


async def test_another_persons_name_is_a_conflict(client: httpx.AsyncClient, person: Person) -> None:
    other = await register(client)
    taken = (await client.get("/auth/me", headers=other.headers)).json()["data"]["user"]["username"]
    assert (await client.patch("/auth/me", json={"username": taken}, headers=person.headers)).status_code == 409


async def test_another_address_needs_the_password_and_the_old_one_is_told(
    client: httpx.AsyncClient, person: Person, context: Context, mails: list[Message]
) -> None:
    email = f"new-{person.email}"
    response = await client.patch("/auth/me", json={"email": email}, headers=person.headers)
    assert fields(response).keys() == {"current_password"}
    wrong = {"email": email, "current_password": "wrong wrong"}
    assert fields(await client.patch("/auth/me", json=wrong, headers=person.headers)).keys() == {"current_password"}
    right = {"email": email, "current_password": PASSWORD}
    assert (await client.patch("/auth/me", json=right, headers=person.headers)).status_code == 200
    await sign_in(client, email)
    await context.mailer.flush()
    (mail,) = mails
    assert mail.to == person.email
    assert email in mail.text


async def test_nobody_makes_themselves_an_administrator(client: httpx.AsyncClient, person: Person) -> None:
    await client.patch("/auth/me", json={"is_admin": True}, headers=person.headers)
    assert (await client.get("/auth/me", headers=person.headers)).json()["data"]["user"]["is_admin"] is False
    body = registration(is_admin=True)
    assert (await client.post("/auth/register", json=body)).json()["data"]["user"]["is_admin"] is False


# Passwords


async def test_changing_the_password_ends_the_other_sessions(client: httpx.AsyncClient, person: Person) -> None:
    other = await sign_in(client, person.email)
    wrong = {"current_password": "wrong wrong", "new_password": "a new password"}
    assert fields(await client.post("/auth/password", json=wrong, headers=person.headers)).keys() == {
        "current_password"
    }
    right = {"current_password": PASSWORD, "new_password": "a new password"}
    response = await client.post("/auth/password", json=right, headers=person.headers)
    assert response.json()["data"] == {"ended_sessions": 1}
    assert (await client.get("/auth/me", headers=person.headers)).status_code == 200
    assert (await client.get("/auth/me", headers={"Authorization": f"Bearer {other}"})).status_code == 401
    assert (await client.post("/auth/login", json={"email": person.email, "password": PASSWORD})).status_code == 401
    await sign_in(client, person.email, "a new password")


async def ask_for_reset(client: httpx.AsyncClient, context: Context, email: str) -> httpx.Response:
    response = await client.post("/auth/password/forgot", json={"email": email})
    await context.mailer.flush()
    return response


def token_of(mail: Message) -> str:
    match = re.search(r"http://redisgate\.test/reset\?token=(\S+)", mail.text)
    assert match is not None
    return match[1]


async def test_a_forgotten_password_is_set_by_the_link_once(
    client: httpx.AsyncClient, context: Context, person: Person, mails: list[Message], owner: Owner
) -> None:
    assert (await ask_for_reset(client, context, person.email.upper())).status_code == 202
    (mail,) = mails
    assert mail.to == person.email
    token = token_of(mail)
    assert token not in str(await owner.fetch("SELECT * FROM password_resets")), "only a digest is stored"
    body = {"token": token, "password": "a new password"}
    assert fields(await client.post("/auth/password/reset", json=body | {"password": "short"}))
    assert (await client.post("/auth/password/reset", json=body)).status_code == 200
    assert (await client.get("/auth/me", headers=person.headers)).status_code == 401, "all sessions end"
    await sign_in(client, person.email, "a new password")
    assert fields(await client.post("/auth/password/reset", json=body)).keys() == {"token"}


async def test_known_and_unknown_addresses_are_answered_alike(
    client: httpx.AsyncClient, context: Context, person: Person, mails: list[Message], owner: Owner
) -> None:
    answers = []
    for email in (person.email, "nobody@example.com"):
        response = await ask_for_reset(client, context, email)
        answers.append((response.status_code, response.json()["data"], response.json()["message"]))
    assert answers[0] == answers[1]
    assert len(mails) == 1
    rows = await owner.fetch("SELECT user_id FROM password_resets ORDER BY created_at DESC LIMIT 2")
    assert [row["user_id"] for row in rows] == [None, person.id], "the same work"


async def test_a_link_expires(
    client: httpx.AsyncClient, context: Context, person: Person, mails: list[Message], owner: Owner
) -> None:
    await ask_for_reset(client, context, person.email)
    await owner.execute("UPDATE password_resets SET expires_at = now() WHERE user_id = $1", person.id)
    body = {"token": token_of(mails[0]), "password": "a new password"}
    assert fields(await client.post("/auth/password/reset", json=body)).keys() == {"token"}


async def test_a_changed_password_ends_open_links(
    client: httpx.AsyncClient, context: Context, person: Person, mails: list[Message]
) -> None:
    await ask_for_reset(client, context, person.email)
    change = {"current_password": PASSWORD, "new_password": "a new password"}
    await client.post("/auth/password", json=change, headers=person.headers)
    body = {"token": token_of(mails[0]), "password": "another password"}
    assert fields(await client.post("/auth/password/reset", json=body)).keys() == {"token"}


async def test_nobody_is_flooded_with_mail(
    client: httpx.AsyncClient, context: Context, person: Person, mails: list[Message]
) -> None:
    for _ in range(accounts.RESETS_PER_HOUR + 3):
        assert (await ask_for_reset(client, context, person.email)).status_code == 202
    assert len(mails) == accounts.RESETS_PER_HOUR


async def test_of_ten_resets_with_one_link_one_succeeds(
    client: httpx.AsyncClient, context: Context, person: Person, mails: list[Message]
) -> None:
    await ask_for_reset(client, context, person.email)
    token = token_of(mails[0])
    responses = await asyncio.gather(
        *(
            client.post("/auth/password/reset", json={"token": token, "password": f"a new password {n}"})
            for n in range(10)
        )
    )
    assert sorted(response.status_code for response in responses) == [200] + [400] * 9


# Mail


def mailer_settings(settings: Settings, tmp_path: Path, **control: object) -> Settings:
    urls = Urls(settings.control.database_url, settings.control.database_migration_url, "")
    return make_settings(urls, tmp_path, **control)


async def test_in_dev_the_link_is_logged_and_in_production_it_is_not(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for mode in ("dev", "production"):
        post = make_mailer(mailer_settings(settings, tmp_path, mode=mode))
        post.post(Message("ada@example.com", "Subject", f"the link of {mode}"))
        await post.flush()
    assert "the link of dev" in caplog.text
    assert "the link of production" not in caplog.text
    assert "no mailer is configured" in caplog.text


async def deliver_to_nobody(message: Message) -> None:
    raise OSError("no route to host")


async def test_a_mail_that_cannot_be_delivered_is_logged_without_its_text(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    post = make_mailer(mailer_settings(settings, tmp_path, mailer=f"{__name__}:deliver_to_nobody"))
    post.post(Message("ada@example.com", "Subject", "the link"))
    await post.flush()
    assert "no route to host" in caplog.text
    assert "the link" not in caplog.text


@pytest.mark.parametrize("name", ["smtp", "no.such.module:send", f"{__name__}:nothing", f"{__name__}:mailer_settings"])
def test_a_mailer_that_is_none_is_refused_at_the_start(settings: Settings, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="REDISGATE_MAILER"):
        make_mailer(mailer_settings(settings, tmp_path, mailer=name))


async def test_too_much_mail_is_dropped(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mailer, "MAX_WAITING", 2)
    sent = []

    async def deliver(message: Message) -> None:
        sent.append(message)

    post = Mailer(deliver)
    for _ in range(5):
        post.post(Message("ada@example.com", "Subject", "text"))
    await post.flush()
    assert len(sent) == 2
    assert "dropped" in caplog.text


# Duties and administration


async def test_what_has_expired_is_purged(
    context: Context, person: Person, mails: list[Message], owner: Owner, client: httpx.AsyncClient
) -> None:
    await ask_for_reset(client, context, person.email)
    await owner.execute("UPDATE password_resets SET expires_at = now() - interval '2 days'")
    await owner.execute(
        "INSERT INTO sessions (user_id, created_at, expires_at, ends_at) VALUES ($1, now() - interval '100 days',"
        " now() - interval '70 days', now() - interval '70 days')",
        person.id,
    )
    await accounts.purge_expired(context)
    assert await owner.fetchval("SELECT count(*) FROM password_resets") == 0
    assert await owner.fetchval("SELECT count(*) FROM sessions WHERE user_id = $1", person.id) == 1
    assert (await client.get("/auth/me", headers=person.headers)).status_code == 200


async def test_an_administrator_is_made_and_unmade_by_name(
    client: httpx.AsyncClient, person: Person, database: Database
) -> None:
    operator = Audit([SECRET_KEY]).system("command line")
    for wanted in (True, False):
        async with database.transaction() as connection:
            user = await accounts.set_admin(connection, operator, person.email.upper(), wanted)
        assert user["is_admin"] is wanted


async def test_the_organization_to_start_in_is_ones_own(client: httpx.AsyncClient, person: Person) -> None:
    member = await register(client)
    await join(client, person, "admin", member)
    me = (await client.get("/auth/me", headers=member.headers)).json()["data"]
    assert me["organization_id"] == str(member.organization_id)
    await client.delete(f"/api/organizations/{member.organization_id}", headers=member.headers)
    me = (await client.get("/auth/me", headers=member.headers)).json()["data"]
    assert me["organization_id"] == str(person.organization_id)


@pytest.fixture
async def away(settings: Settings, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A control plane whose PostgreSQL is not there."""
    urls = Urls(f"postgresql://nobody@/nothing?host={tmp_path}", "", "")
    context = make_context(make_settings(urls, tmp_path))
    transport = httpx.ASGITransport(make_app(context), client=("203.0.113.13", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://redisgate.test") as client:
        yield client
    await context.close()


async def test_without_postgresql_the_answer_is_503(
    away: httpx.AsyncClient, client: httpx.AsyncClient, person: Person
) -> None:
    for method, path, body in (
        ("POST", "/auth/login", {"email": person.email, "password": PASSWORD}),
        ("POST", "/auth/register", registration()),
        ("GET", "/auth/me", None),
        ("POST", "/auth/password/forgot", {"email": person.email}),
    ):
        response = await away.request(method, path, json=body, headers=person.headers)
        assert response.status_code == 503, path
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["success"] is False


async def test_strangers_cannot_use_up_somebodys_resets(
    client: httpx.AsyncClient, context: Context, person: Person, mails: list[Message], owner: Owner
) -> None:
    for _ in range(5):
        await ask_for_reset(client, context, person.email)
    assert len(mails) == 3, "three an hour"
    counted = "SELECT count(*) FROM password_resets WHERE user_id = $1"
    assert await owner.fetchval(counted, person.id) == 3, "what was not mailed does not count towards the next hour"


async def test_a_link_does_not_outlive_a_change_of_address(
    client: httpx.AsyncClient, context: Context, person: Person, mails: list[Message]
) -> None:
    await ask_for_reset(client, context, person.email)
    token = token_of(mails[0])
    changed = await client.patch(
        "/auth/me",
        json={"email": f"new-{person.email}", "current_password": person.password},
        headers=person.headers,
    )
    assert changed.status_code == 200, changed.text
    response = await client.post("/auth/password/reset", json={"token": token, "password": "a new password"})
    assert response.status_code == 400
