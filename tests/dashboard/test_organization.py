"""Pages of an organization without a browser: overview, keys, members, quota, audit log, settings; each role, hostile
names, the account's own pages."""

import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from control.audit import check_chain
from control.dashboard.account import agent_name
from control.dashboard.events import changes, grouped
from control.http import Context
from control.pages import texts
from tests.control.people import PASSWORD, Person, join, register, sign_in
from tests.dashboard.conftest import Pages

HOSTILE = "<script>alert(1)</script>\"'&"
RTL = "\u202e\u0642\u0627\u0639\u062f\u0629 " * 10
AREAS = ("", "/keys", "/members", "/quota", "/settings")


async def signed_in(pages: Pages, client: httpx.AsyncClient, person: Person) -> str:
    """Sign in; the address of the person's organization."""
    client.cookies.clear()
    await pages.sign_in(person.email, PASSWORD)
    return f"/dashboard/{person.organization_id}"


async def make_key(pages: Pages, home: str, **fields: object) -> tuple[str, str]:
    """A key by the form; the key, and the address of its page."""
    await pages.get(f"{home}/keys/new")
    made = await pages.post(f"{home}/keys", 201, **({"name": "key", "access": "write", "expires_in_days": 30} | fields))
    key = re.search(r'<code id="new-key">([^<]+)</code>', made.text)
    page = re.search(rf"{home}/keys/[0-9a-f-]{{36}}", made.text)
    assert key is not None
    assert page is not None
    return key[1], page[0]


# Each role


@pytest.mark.parametrize("role", ["owner", "admin", "member", "viewer"])
async def test_each_role_sees_what_it_may_do_and_no_more(pages: Pages, client: httpx.AsyncClient, role: str) -> None:
    owner = await register(client)
    person = owner if role == "owner" else await join(client, owner, role)
    client.cookies.clear()
    await pages.sign_in(person.email, PASSWORD)
    home = f"/dashboard/{owner.organization_id}"
    for area in AREAS:
        await pages.get(home + area)
    await pages.get(f"{home}/audit", 200 if role in ("owner", "admin") else 403)
    settings = (await pages.get(f"{home}/settings")).text
    assert (f"{home}/delete" in settings) is (role == "owner")
    assert (f'action="{home}/settings"' in settings) is (role in ("owner", "admin"))
    members = (await pages.get(f"{home}/members")).text
    assert (f"{home}/invitations" in members) is (role in ("owner", "admin"))
    assert ("/role" in members) is (role in ("owner", "admin"))
    keys = (await pages.get(f"{home}/keys")).text
    assert (f"{home}/keys/new" in keys) is (role != "viewer")
    quota = (await pages.get(f"{home}/quota")).text
    assert ("max_redis_instances" in quota) is (role in ("owner", "admin"))
    overview = (await pages.get(home)).text
    assert (f"{home}/instances/new" in overview) is (role != "viewer")


@pytest.mark.parametrize("area", ["keys", "settings", "quota", "invitations", "delete"])
async def test_what_a_viewer_posts_is_refused(pages: Pages, client: httpx.AsyncClient, area: str) -> None:
    owner = await register(client)
    viewer = await join(client, owner, "viewer")
    await signed_in(pages, client, viewer)
    await pages.post(f"/dashboard/{owner.organization_id}/{area}", 403, name="x", access="read", email="a@b.c")


async def test_administrators_of_the_platform_look_in_and_find_no_buttons(
    pages: Pages, client: httpx.AsyncClient, owner: object
) -> None:
    somebody, administrator = await register(client), await register(client)
    await owner.execute("UPDATE users SET is_admin = true WHERE id = $1", administrator.id)  # type: ignore[attr-defined]
    await signed_in(pages, client, administrator)
    home = f"/dashboard/{somebody.organization_id}"
    assert f"{home}/instances/new" not in (await pages.get(home)).text
    assert f"{home}/keys/new" not in (await pages.get(f"{home}/keys")).text
    assert f"{home}/leave" not in (await pages.get(f"{home}/settings")).text
    await pages.get(f"{home}/audit")
    assert "max_redis_instances" in (await pages.get(f"{home}/quota")).text
    await pages.get(f"{home}/keys/new", 403)


@pytest.mark.parametrize("path", ["/keys", "/settings", "/quota", "/invitations", "/delete", "/leave"])
async def test_forms_without_their_token_do_nothing(pages: Pages, client: httpx.AsyncClient, path: str) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    pages.csrf = ""
    response = await pages.post(home + path, 403, name="changed", confirm="Ada&#39;s organization")
    assert "Nothing was changed" in response.text


# Overview


async def test_an_empty_organization_says_what_to_do_next(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    shown = await pages.get(home)
    assert "No instance yet" in shown.text
    assert "Organization created" in shown.text
    assert "0 of 5" in shown.text


async def test_hostile_names_are_text_everywhere(pages: Pages, client: httpx.AsyncClient, owner: object) -> None:
    for name in (HOSTILE, RTL, "n" * 100):
        person = await register(client)
        home = await signed_in(pages, client, person)
        await pages.get(f"{home}/settings")
        await pages.post(f"{home}/settings", name=name)
        await owner.execute(  # type: ignore[attr-defined]
            "INSERT INTO instances (organization_id, name, slug, label, provisioner, max_memory, status, status_reason,"
            " token_digest, token_encrypted, readonly_token_digest, readonly_token_encrypted)"
            " VALUES ($1, $2, 's', gen_random_uuid()::text, 'local', 1048576, 'error', $2,"
            " decode(md5($2) || md5($2), 'hex'), 't', decode(md5('r' || $2) || md5($2), 'hex'), 't')",
            person.organization_id,
            name,
        )
        _, key = await make_key(pages, home, name=name, key_prefixes=name)
        for path in (*AREAS, "/audit", "/keys/new", "/keys?all=1"):
            shown = (await pages.get(home + path)).text
            assert "<script>alert" not in shown, path
        assert "<script>alert" not in (await pages.get(key)).text


async def test_pages_answer_fast_and_stay_light(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    for path in (*AREAS, "/audit", "/keys/new"):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            shown = await pages.get(home + path)
            times.append(time.perf_counter() - began)
        # The machine of a test is slower than one that serves, and busy: twice what is promised, for the best of them.
        assert min(times) < 0.1, (path, times)
        assert len(shown.content) < 60 * 1024, path


# API keys


async def test_a_key_is_shown_once_and_works(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    key, page = await make_key(
        pages,
        home,
        name="checkout",
        access="read",
        only="get @hash",
        never="keys",
        key_prefixes="user:\nsession:,x",
        allowed_networks="203.0.113.0/24, 2001:db8::/32",
        requests_per_second="50",
        managing="some",
        permissions=["instances.read", "api_keys.read"],
    )
    for path in (page, f"{home}/keys", f"{home}/audit"):
        assert key not in (await pages.get(path)).text
    shown = (await pages.get(page)).text
    for text in ("checkout", "+get", "+@hash", "-keys", "user:", "session:,x", "203.0.113.0/24", "instances.read"):
        assert text in shown
    client.cookies.clear()
    answer = await client.get(
        f"/api/organizations/{person.organization_id}/api-keys", headers={"Authorization": f"Bearer {key}"}
    )
    assert answer.status_code == 200
    item = answer.json()["data"]["items"][0]
    assert item["key_prefixes"] == ["user:", "session:,x"]
    assert item["requests_per_second"] == 50


async def test_a_wrong_key_form_keeps_what_was_typed_and_says_what_is_wrong(
    pages: Pages, client: httpx.AsyncClient
) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    await pages.get(f"{home}/keys/new")
    shown = await pages.post(
        f"{home}/keys",
        400,
        name="mine",
        access="read",
        allowed_networks="not a network",
        expires_in_days=30,
    )
    assert 'value="mine"' in shown.text
    assert 'value="read" checked' in shown.text
    assert "is no network such as" in shown.text
    for field, value in (("requests_per_second", "-1"), ("commands_per_day", "many"), ("name", "")):
        fields = {"name": "mine", "access": "read", "expires_in_days": 30} | {field: value}
        assert f'id="h-{field}"' in (await pages.post(f"{home}/keys", 400, **fields)).text
    shown = await pages.post(f"{home}/keys", 400, name="mine", access="read", only="nosuchcommand")
    assert "nosuchcommand" in shown.text.partition('class="wrong-text"')[2][:200]
    assert "No API key yet" in (await pages.get(f"{home}/keys")).text


async def test_a_key_is_replaced_and_the_old_one_works_for_a_while(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    old, page = await make_key(pages, home, managing="manage:read")
    await pages.get(page)
    made = await pages.post(f"{page}/rotate", 201, overlap_seconds=3600)
    found = re.search(r'<code id="new-key">([^<]+)</code>', made.text)
    assert found is not None
    assert found[1] != old
    shown = (await pages.get(page)).text
    assert "Replaced by" in shown
    assert f"{page}/rotate" not in shown
    client.cookies.clear()
    for key in (old, found[1]):
        answer = await client.get(
            f"/api/organizations/{person.organization_id}/quota", headers={"Authorization": f"Bearer {key}"}
        )
        assert answer.status_code == 200


async def test_a_key_is_revoked_by_typing_its_name(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    key, page = await make_key(pages, home, name=HOSTILE, managing="manage:read")
    await pages.get(page)
    refused = await pages.post(f"{page}/revoke", 400, confirm="something else")
    assert "type the name exactly" in refused.text
    done = await pages.post(f"{page}/revoke", confirm=HOSTILE)
    shown = await pages.follow(done)
    assert "is revoked." in shown.text
    assert "No API key yet" in shown.text
    assert "Revoked" in (await pages.get(f"{home}/keys?all=1")).text
    client.cookies.clear()
    answer = await client.get(
        f"/api/organizations/{person.organization_id}/quota", headers={"Authorization": f"Bearer {key}"}
    )
    assert answer.status_code == 401


async def test_a_member_changes_only_their_own_keys(pages: Pages, client: httpx.AsyncClient) -> None:
    owner = await register(client)
    member = await join(client, owner, "member")
    home = await signed_in(pages, client, owner)
    _, page = await make_key(pages, home, name="the owner's")
    await signed_in(pages, client, member)
    shown = (await pages.get(page)).text
    assert f"{page}/revoke" not in shown
    await pages.post(f"{page}/revoke", 403, confirm="the owner's")


# Members and settings


async def test_somebody_is_invited_gets_another_role_and_is_removed(pages: Pages, client: httpx.AsyncClient) -> None:
    owner, guest = await register(client), await register(client)
    home = await signed_in(pages, client, owner)
    await pages.get(f"{home}/members")
    shown = await pages.post(f"{home}/invitations", 201, email=guest.email, role="viewer")
    link = re.search(r"/invitations\?token=([\w-]+)", shown.text)
    assert link is not None
    again = await pages.post(f"{home}/invitations", 409, email=guest.email, role="viewer")
    assert "is invited already" in again.text
    assert link[1] not in (await pages.get(f"{home}/members")).text
    await client.post("/api/invitations/accept", json={"token": link[1]}, headers=guest.headers)
    await pages.get(f"{home}/members")
    response = await pages.post(f"{home}/members/{guest.id}/role", role="admin")
    assert f"{guest.email} has another role." in (await pages.follow(response)).text
    response = await pages.post(f"{home}/members/{guest.id}/remove")
    assert guest.email not in (await pages.follow(response)).text.replace(f"{guest.email} has", "")


async def test_an_invitation_is_taken_back(pages: Pages, client: httpx.AsyncClient) -> None:
    owner = await register(client)
    home = await signed_in(pages, client, owner)
    await pages.get(f"{home}/members")
    await pages.post(f"{home}/invitations", 201, email="guest@example.com", role="member")
    shown = await pages.get(f"{home}/members")
    found = re.search(rf"{home}/invitations/[0-9a-f-]{{36}}/revoke", shown.text)
    assert found is not None
    response = await pages.post(found[0])
    assert "guest@example.com" not in (await pages.follow(response)).text


async def test_the_last_owner_stays_and_is_told_why(pages: Pages, client: httpx.AsyncClient) -> None:
    owner = await register(client)
    home = await signed_in(pages, client, owner)
    await pages.get(f"{home}/members")
    assert "last owner" in (await pages.post(f"{home}/members/{owner.id}/role", 409, role="viewer")).text
    assert "last owner" in (await pages.post(f"{home}/leave", 409, confirm="Ada's organization")).text


async def test_an_organization_is_deleted_by_typing_its_name(pages: Pages, client: httpx.AsyncClient) -> None:
    owner = await register(client)
    home = await signed_in(pages, client, owner)
    await pages.get(f"{home}/settings")
    await pages.post(f"{home}/settings", name="  two   words ")
    assert "two words" in (await pages.get(home)).text
    await pages.post(f"{home}/delete", 400, confirm="two")
    response = await pages.post(f"{home}/delete", confirm="two words")
    response = await pages.get(response.headers["location"], 303)
    assert "The organization is deleted." in (await pages.follow(response)).text
    await pages.get(home, 404)


# Quota


async def test_limits_are_set_up_to_the_plan(pages: Pages, client: httpx.AsyncClient) -> None:
    owner = await register(client)
    home = await signed_in(pages, client, owner)
    await pages.get(f"{home}/quota")
    limits = {"max_redis_instances": 3, "max_memory_gb": "1.5", "max_api_keys": 1, "max_commands_per_day": ""}
    await pages.post(f"{home}/quota", **limits, max_requests_per_second="100", max_request_size="0.5")
    shown = (await pages.get(f"{home}/quota")).text
    assert "0 of 3" in shown
    assert "1.5 GiB" in shown
    assert "512 KiB" in shown
    refused = await pages.post(f"{home}/quota", 403, **(limits | {"max_redis_instances": 500}))
    assert "the free plan does not allow that much" in refused.text
    assert 'value="500"' in refused.text
    wrong = await pages.post(f"{home}/quota", 400, **(limits | {"max_api_keys": "x"}), max_request_size="y")
    assert "expected a number" in wrong.text
    await pages.post(f"{home}/quota", **limits, max_requests_per_second="", max_request_size="")
    assert "512 KiB" not in (await pages.get(f"{home}/quota")).text


async def test_what_is_nearly_used_up_is_said_on_the_overview(pages: Pages, client: httpx.AsyncClient) -> None:
    owner = await register(client)
    home = await signed_in(pages, client, owner)
    await pages.get(f"{home}/quota")
    await pages.post(f"{home}/quota", max_redis_instances=5, max_memory_gb=10, max_api_keys=1)
    await make_key(pages, home)
    assert "1 of 1 API keys are used" in (await pages.get(home)).text
    await pages.get(f"{home}/keys/new")
    refused = await pages.post(f"{home}/keys", 403, name="another", access="read", expires_in_days=7)
    assert "revoke one, or ask for a larger quota" in refused.text


async def test_usage_is_drawn_listed_and_exported(pages: Pages, client: httpx.AsyncClient, owner: object) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    await owner.execute(  # type: ignore[attr-defined]
        "INSERT INTO usage SELECT step, date_trunc(step, now(), 'UTC'), $1, gen_random_uuid(), 'token',"
        " '00000000-0000-0000-0000-000000000000', 1234, 1000, 234, 1234, 3, 5000, 6000, 99, '{}'"
        " FROM unnest(ARRAY['minute', 'hour', 'day']) AS step",
        person.organization_id,
    )
    for span in ("24h", "7d", "30d", "365d"):
        shown = (await pages.get(f"{home}/quota?span={span}")).text
        assert "1,234" in shown
        assert '<svg class="chart"' in shown
        table = await client.get(f"{home}/quota/usage.csv?span={span}")
        assert table.headers["content-type"].startswith("text/csv")
        lines = table.text.splitlines()
        assert lines[0].startswith("at,commands,reads,writes")
        assert lines[-1].split(",")[1:4] == ["1234", "1000", "234"]
    await pages.get(f"{home}/quota?span=nonsense")


# Audit log


async def test_the_audit_log_is_filtered_and_shows_what_changed(pages: Pages, client: httpx.AsyncClient) -> None:
    owner = await register(client)
    home = await signed_in(pages, client, owner)
    await make_key(pages, home, name="audited")
    await pages.get(f"{home}/settings")
    await pages.post(f"{home}/settings", name=HOSTILE)
    everything = (await pages.get(f"{home}/audit")).text
    assert "Organization renamed" in everything
    assert "API key created" in everything
    assert "&lt;script&gt;" in everything
    assert "<del><bdi>Ada&#39;s organization</bdi></del>" in everything
    log = re.search(r'<ol class="log">.*?</ol>', (await pages.get(f"{home}/audit?action=api_keys.*")).text, re.DOTALL)
    assert log is not None
    assert "audited" in log[0]
    assert "Organization renamed" not in log[0]
    assert "No events" in (await pages.get(f"{home}/audit?outcome=denied")).text
    assert "No events" in (await pages.get(f"{home}/audit?until=2001-01-01")).text
    assert "API key created" in (await pages.get(f"{home}/audit?actor_id={owner.id}&since=2001-01-01")).text


@pytest.mark.parametrize(
    "query", ["since=yesterday", "until=9999-12-31", "actor_id=x", "since=%00", "page=-1", "page=x"]
)
async def test_a_wrong_filter_is_no_error_of_ours(pages: Pages, client: httpx.AsyncClient, query: str) -> None:
    owner = await register(client)
    home = await signed_in(pages, client, owner)
    response = await client.get(f"{home}/audit?{query}")
    assert response.status_code in (200, 400)
    assert "Organization created" in response.text


async def test_the_log_is_exported_with_the_same_filter(pages: Pages, client: httpx.AsyncClient) -> None:
    owner = await register(client)
    home = await signed_in(pages, client, owner)
    shown = await pages.get(f"{home}/audit?action=organization.create&since=2001-01-01")
    link = re.search(r'href="(/api/organizations/[^"]+/export\?[^"]+)"', shown.text)
    assert link is not None
    exported = await client.get(link[1].replace("&amp;", "&"))
    assert exported.status_code == 200
    assert [line for line in exported.text.splitlines() if "organization.create" in line]
    assert "users.register" not in exported.text


async def test_whether_the_chain_holds_is_shown(
    pages: Pages, client: httpx.AsyncClient, context: Context, owner: object
) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    await owner.execute("DELETE FROM audit_checks")  # type: ignore[attr-defined]
    assert "Not checked yet" in (await pages.get(f"{home}/audit")).text
    await check_chain(context)
    assert "The chain holds" in (await pages.get(f"{home}/audit")).text
    await check_chain(context)
    rows = await owner.fetch("SELECT * FROM audit_checks")  # type: ignore[attr-defined]
    assert len(rows) == 1, "a chain that held and has not grown is not read again"
    await owner.execute(  # type: ignore[attr-defined]
        "INSERT INTO audit_checks (seconds, events, head_sequence, compared, problem_count, problems)"
        " VALUES (1, 5, 5, 0, 12, ARRAY['event 3 is missing'])"
    )
    shown = (await pages.get(f"{home}/audit")).text
    assert "The chain is broken" in shown
    assert "event 3 is missing" in shown
    await check_chain(context)
    assert "The chain holds" in (await pages.get(f"{home}/audit")).text


def test_everything_that_is_recorded_has_a_name_for_people() -> None:
    sources = "".join(path.read_text() for path in (Path(__file__).parents[2] / "control").rglob("*.py"))
    recorded = set(re.findall(r'record\(\s*connection,\s*[\w.]+,\s*"([a-z_.]+)"', sources))
    assert len(recorded) > 20
    recorded |= {"instances.start", "instances.stop", "instances.restart", "console.dangerous", "console.delete_keys"}
    known = texts("en").keys()
    assert {action for action in recorded if f"organization.action.{action}" not in known} == set()


def test_equal_neighbours_are_one_line() -> None:
    def event(action: str, who: str = "a", outcome: str = "success") -> dict[str, Any]:
        actor = {"kind": "user", "name": who}
        return {"action": action, "target": {"kind": "instance", "id": "1"}, "outcome": outcome, "actor": actor}

    found = grouped([event("backup")] * 3 + [event("backup", "b"), event("stop"), event("backup"), event("stop")])
    assert [(one["action"], one["actor"]["name"], one["times"]) for one in found] == [
        *(("backup", "a", 3), ("backup", "b", 1), ("stop", "a", 1), ("backup", "a", 1), ("stop", "a", 1)),
    ]


async def test_what_happened_often_takes_one_line_of_the_overview(
    pages: Pages, client: httpx.AsyncClient, context: Context
) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    for number in range(9):
        body = {"name": f"Name {number}"}
        path = f"/api/organizations/{person.organization_id}"
        answer = await client.patch(path, json=body, headers={"Authorization": f"Bearer {person.token}"})
        assert answer.status_code == 200, answer.text
    shown = (await pages.get(home)).text
    assert "× 9" in shown
    assert "Organization created" in shown


def test_changes_are_told_name_by_name() -> None:
    assert changes({"a": 1, "b": "x", "same": 2}, {"a": 2, "c": ["u", "v"], "same": 2}) == [
        ("a", "1", "2"),
        ("b", "x", None),
        ("c", None, "u, v"),
    ]
    assert changes(None, None) == []
    assert changes(None, {"long": "x" * 1000})[0][2] == "x" * 300 + "…"


# The account


async def test_a_profile_is_changed_and_an_address_only_with_the_password(
    pages: Pages, client: httpx.AsyncClient
) -> None:
    person = await register(client)
    await signed_in(pages, client, person)
    profile = {"first_name": HOSTILE, "last_name": "", "username": person.email.partition("@")[0]}
    response = await pages.post("/dashboard/account", **profile, email=person.email)
    shown = (await pages.follow(response)).text
    assert "Saved." in shown
    assert HOSTILE not in shown
    assert "Lovelace" not in shown
    refused = await pages.post("/dashboard/account", 400, **profile, email="new" + person.email)
    assert 'id="h-current_password"' in refused.text
    await pages.post("/dashboard/account", **profile, email="new" + person.email, current_password=PASSWORD)
    assert f"new{person.email}" in (await pages.get("/dashboard/account")).text


async def test_a_password_is_changed_and_other_sessions_end(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    await signed_in(pages, client, person)
    await pages.get("/dashboard/account/security")
    wrong = await pages.post("/dashboard/account/security", 400, current_password="x", new_password="long enough 7!")
    assert 'id="h-current_password"' in wrong.text
    await pages.post("/dashboard/account/security", current_password=PASSWORD, new_password="long enough 7!")
    answer = await client.get("/auth/me", headers=person.headers)
    assert answer.status_code == 401
    await pages.get("/dashboard/account")


async def test_sessions_are_listed_and_ended(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    other = await sign_in(client, person.email)
    await signed_in(pages, client, person)
    shown = (await pages.get("/dashboard/account/security")).text
    ends = re.findall(r"/dashboard/account/sessions/[0-9a-f-]{36}/end", shown)
    assert len(ends) == 3
    await pages.post(ends[1])
    response = await pages.post("/dashboard/account/sessions/end")
    assert "One other session was ended." in (await pages.follow(response)).text
    assert (await client.get("/auth/me", headers={"Authorization": f"Bearer {other}"})).status_code == 401
    response = await pages.post(ends[0])
    assert response.headers["location"] == "/login"


async def test_another_organization_is_made(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    await signed_in(pages, client, person)
    refused = await pages.post("/dashboard/account/organizations", 400, name="")
    assert 'id="h-name"' in refused.text
    response = await pages.post("/dashboard/account/organizations", name="Second")
    assert "Second is there, and yours." in (await pages.follow(response)).text
    assert "Second" in (await pages.get("/dashboard/account")).text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Mozilla/5.0 (X11; Linux x86_64; rv:130.0) Gecko/20100101 Firefox/130.0", "Firefox · Linux"),
        ("Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 Chrome/120.0 Safari/537.36 Edg/120.0", "Edge · Windows"),
        ("Mozilla/5.0 (iPhone) AppleWebKit/605 Version/17.0 Mobile Safari/604.1", "Safari · iPhone"),
        ("curl/8.5.0", "curl/8.5.0"),
        (None, ""),
    ],
)
def test_browsers_are_called_by_their_names(text: str | None, name: str) -> None:
    assert agent_name(text) == name


async def test_every_page_speaks_vietnamese(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    home = await signed_in(pages, client, person)
    await pages.post("/dashboard/language", language="vi", back="/dashboard/account")
    for path in (*AREAS, "/audit", "/keys/new"):
        assert 'lang="vi"' in (await pages.get(home + path)).text
    for path in ("/dashboard/account", "/dashboard/account/security"):
        assert 'lang="vi"' in (await pages.get(path)).text
