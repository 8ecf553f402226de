"""The dashboard's frame: sessions, forms, messages, languages, static files, the catalogue."""

import ast
import base64
import logging
import re
import tomllib
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from control import pages as frame
from control.app import load_endpoints, load_pages
from control.console import DELETES_KEYS, RUNS_DANGEROUS
from control.dashboard.audit_log import AREAS
from control.database import Database
from control.http import SESSION_COOKIE, SPECIAL_PERMISSIONS, Context
from control.pages import LANGUAGES, texts
from redisgate.config import Settings
from redisgate.counters import WORKER
from redisgate.supervisor import _prepare_control_plane
from tests.control.people import PASSWORD, join, register, registration
from tests.dashboard.conftest import Pages

TEMPLATES = Path(__file__).parents[2] / "templates"
HOSTILE = "<script>alert(1)</script>\"'&"


async def test_who_has_not_signed_in_signs_in_and_comes_back(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    response = await pages.get("/dashboard/account", 303)
    assert response.headers["location"] == "/login?next=%2Fdashboard%2Faccount"
    await pages.follow(response)
    response = await pages.post("/login", email=person.email, password=PASSWORD, next="/dashboard/account")
    assert response.headers["location"] == "/dashboard/account"
    assert "HttpOnly" in response.headers["set-cookie"]


@pytest.mark.parametrize(
    "target", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)", "/\tevil"]
)
async def test_nobody_is_sent_to_another_site(pages: Pages, client: httpx.AsyncClient, target: str) -> None:
    person = await register(client)
    await pages.get("/login")
    response = await pages.post("/login", email=person.email, password=PASSWORD, next=target)
    assert response.headers["location"] == "/dashboard"


async def test_a_wrong_password_says_so_and_keeps_the_address(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    await pages.get("/login")
    response = await pages.post("/login", 401, email=person.email, password="wrong password")
    assert "the e-mail address or the password is wrong" in response.text
    assert f'value="{person.email}"' in response.text
    assert "wrong password" not in response.text


async def test_a_newcomer_registers_and_is_signed_in(pages: Pages) -> None:
    await pages.get("/register")
    body = registration(first_name=HOSTILE)
    response = await pages.post("/register", **body)
    assert re.fullmatch(r"/dashboard/[0-9a-f-]{36}", response.headers["location"])
    shown = await pages.get("/dashboard/nowhere", 404)
    assert HOSTILE not in shown.text
    assert "&lt;script&gt;" in shown.text


async def test_registration_says_what_is_wrong_with_which_field(pages: Pages) -> None:
    await pages.get("/register")
    response = await pages.post("/register", 400, **registration(username="no blanks", password="short"))
    assert 'id="h-username"' in response.text
    assert 'aria-invalid="true"' in response.text
    assert "short" not in re.findall(r'value="([^"]*)"', response.text)


@pytest.mark.parametrize("token", ["", "0" * 64, "é"])
async def test_a_form_without_its_token_does_nothing(pages: Pages, client: httpx.AsyncClient, token: str) -> None:
    person = await register(client)
    await pages.sign_in(person.email, PASSWORD)
    pages.csrf = token
    response = await pages.post("/logout", 403)
    assert "Nothing was changed" in response.text
    await pages.get("/login", 303)  # still signed in


async def test_a_token_of_another_session_is_refused(pages: Pages, client: httpx.AsyncClient) -> None:
    person, other = await register(client), await register(client)
    await pages.sign_in(other.email, PASSWORD)
    stolen = pages.csrf
    client.cookies.clear()
    await pages.sign_in(person.email, PASSWORD)
    pages.csrf = stolen
    await pages.post("/logout", 403)


async def test_another_sites_form_is_refused(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    await pages.sign_in(person.email, PASSWORD)
    response = await client.post(
        "/logout", data={"csrf_token": pages.csrf}, headers={"Sec-Fetch-Site": "cross-site", "Origin": "https://a.test"}
    )
    assert response.status_code == 403


async def test_an_api_key_or_a_session_of_a_program_opens_no_page(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    made = await client.post(
        f"/api/organizations/{person.organization_id}/api-keys", json={"name": "key"}, headers=person.headers
    )
    assert made.status_code == 201, made.text
    response = await client.get(
        "/dashboard/account", headers={"Authorization": f"Bearer {made.json()['data']['key']}", "Accept": "text/html"}
    )
    assert response.status_code == 303
    assert response.headers["location"].startswith("/login")


async def test_sign_out_ends_the_session(pages: Pages, client: httpx.AsyncClient) -> None:
    person = await register(client)
    await pages.sign_in(person.email, PASSWORD)
    response = await pages.post("/logout")
    assert response.headers["clear-site-data"] == '"storage"'
    assert "You are signed out." in (await pages.follow(response)).text
    assert "You are signed out." not in (await pages.get("/login")).text
    await pages.get("/dashboard/account", 303)


async def test_a_forgotten_password_is_set_by_the_link(
    pages: Pages, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    person = await register(client)
    await pages.get("/reset")
    response = await pages.post("/reset", 200, email=person.email)
    assert "a mail with a link is on its way" in response.text
    await client._transport.app.state.context.mailer.flush()  # type: ignore[attr-defined]
    link = re.search(r"/reset\?token=\S+", caplog.text)
    assert link is not None
    await pages.get(link[0])
    token = link[0].partition("=")[2]
    response = await pages.post("/reset", 400, token=token, password="short")
    assert 'id="h-password"' in response.text
    response = await pages.post("/reset", token=token, password="another long one 2!")
    await pages.follow(response)
    await pages.post("/login", email=person.email, password="another long one 2!")


async def test_an_invitation_is_accepted_by_whom_it_was_sent_to(pages: Pages, client: httpx.AsyncClient) -> None:
    owner, guest, stranger = await register(client), await register(client), await register(client)
    await client.patch(f"/api/organizations/{owner.organization_id}", json={"name": HOSTILE}, headers=owner.headers)
    made = await client.post(
        f"/api/organizations/{owner.organization_id}/invitations",
        json={"email": guest.email, "role": "viewer"},
        headers=owner.headers,
    )
    token = made.json()["data"]["token"]
    shown = await pages.get(f"/invitations?token={token}")
    assert guest.email in shown.text
    assert HOSTILE not in shown.text
    await pages.sign_in(stranger.email, PASSWORD)
    await pages.get(f"/invitations?token={token}")
    response = await pages.post("/invitations", 403, token=token)
    assert "another e-mail address" in response.text
    client.cookies.clear()
    await pages.sign_in(guest.email, PASSWORD)
    await pages.get(f"/invitations?token={token}")
    response = await pages.post("/invitations", token=token)
    assert response.headers["location"] == f"/dashboard/{owner.organization_id}"
    response = await pages.get(f"/invitations?token={token}", 404)
    assert "was used" in response.text


async def test_others_organizations_are_not_there(pages: Pages, client: httpx.AsyncClient) -> None:
    person, other = await register(client), await register(client)
    await pages.sign_in(person.email, PASSWORD)
    await pages.get(f"/dashboard/{other.organization_id}", 404)
    await pages.get("/dashboard/not-an-id", 404)


async def test_what_needs_a_role_says_which(pages: Pages, client: httpx.AsyncClient) -> None:
    owner = await register(client)
    viewer = await join(client, owner, "viewer")
    await pages.sign_in(viewer.email, PASSWORD)
    response = await pages.get(f"/dashboard/{owner.organization_id}/audit", 403)
    assert "your role here is Viewer" in response.text


async def test_errors_are_told_in_the_readers_language(pages: Pages, client: httpx.AsyncClient) -> None:
    owner = await register(client)
    viewer = await join(client, owner, "viewer")
    await pages.sign_in(viewer.email, PASSWORD)
    client.cookies.set(frame.LANGUAGE_COOKIE, "vi")
    home = f"/dashboard/{owner.organization_id}"
    refused = await pages.get(f"{home}/keys/new", 403)
    assert "vai trò của bạn ở đây là Người xem; việc này cần vai trò Thành viên" in refused.text
    assert "không có tổ chức này" in (await pages.get(f"/dashboard/{uuid4()}", 404)).text
    client.cookies.delete(SESSION_COOKIE)
    await pages.get("/register")
    wrong = (await pages.post("/register", 400, **registration(username="x", password="short"))).text
    assert "phải có ít nhất 2 ký tự" in wrong
    assert "expected" not in wrong


def test_what_errors_say_is_in_the_catalogue() -> None:
    sources = "".join(path.read_text() for path in (TEMPLATES.parent / "control").rglob("*.py"))
    said = set(re.findall(r'\bSaid\(\s*"(\w+)"', sources)) | {"too_short", "too_long", "too_small", "too_large"}
    known = {key.removeprefix("common.said_") for key in texts("en").keys() if key.startswith("common.said_")}
    assert said == known


async def test_an_unknown_address_is_a_page_for_people_and_json_for_programs(
    pages: Pages, client: httpx.AsyncClient
) -> None:
    response = await pages.get("/dashboard/a/b/c/d", 404)
    assert "There is no page at this address." in response.text
    response = await client.get("/dashboard/a/b/c/d", headers={"Accept": "application/json"})
    assert response.json()["success"] is False


async def test_pages_take_no_script_and_no_style_but_their_own(pages: Pages) -> None:
    response = await pages.get("/login")
    policy = response.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe-inline" not in policy
    assert response.headers["cache-control"] == "no-store"


async def test_the_language_follows_the_browser_and_can_be_chosen(pages: Pages, client: httpx.AsyncClient) -> None:
    response = await client.get("/login", headers={"Accept-Language": "vi-VN,vi;q=0.9,en;q=0.8"})
    assert 'lang="vi"' in response.text
    assert "Đăng nhập" in response.text
    await pages.get("/login")
    response = await pages.post("/dashboard/language", language="vi", back="/login?next=%2Fx")
    assert response.headers["location"] == "/login?next=%2Fx"
    assert "Đăng nhập" in (await pages.get("/login")).text


@pytest.mark.parametrize(
    "value",
    [
        base64.urlsafe_b64encode(b"[" * 3000).decode(),
        base64.urlsafe_b64encode(b'["common.saved", {}]').decode(),
        "0" * 64 + "." + base64.urlsafe_b64encode(b'["common.saved", {}]').decode(),
        "é.",
    ],
    ids=["nested", "not signed", "signed by somebody else", "no text"],
)
async def test_a_message_that_is_none_of_ours_is_not_shown_and_not_kept(
    pages: Pages, client: httpx.AsyncClient, value: str
) -> None:
    person = await register(client)
    await pages.sign_in(person.email, PASSWORD)
    cookies = f"{SESSION_COOKIE}={client.cookies[SESSION_COOKIE]}; {frame.FLASH_COOKIE}={value}"
    response = await client.get("/dashboard/account", headers={b"Cookie": cookies.encode()})
    assert response.status_code == 200
    assert 'class="flash' not in response.text
    assert f"{frame.FLASH_COOKIE}=; Path=/; HttpOnly; SameSite=Lax; Max-Age=0" in response.headers["set-cookie"]


async def test_static_files_are_kept_by_browsers_and_sent_compressed(client: httpx.AsyncClient) -> None:
    address = frame.static_url("app.css")
    response = await client.get(address, headers={"Accept-Encoding": "gzip"})
    assert response.headers["content-encoding"] == "gzip"
    assert "immutable" in response.headers["cache-control"]
    assert response.headers["content-type"].startswith("text/css")
    assert response.text.startswith("/*")
    old = await client.get("/static/000000000000/app.css")
    assert old.headers["cache-control"] == "no-cache"
    for path in ("nothing.css", "../login.html", "..%2Fbase.html", "../__init__.py"):
        assert (await client.get(f"/static/{frame.static_files().version}/{path}")).status_code == 404


async def test_a_page_that_finds_the_database_away_says_so_and_is_counted(
    pages: Pages, context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    await pages.get("/login")
    database, before = context.database, WORKER.database_errors
    context.database = Database("postgresql://u:p@/d?host=/nonexistent")
    shown = await pages.post("/login", 503, email="a@example.com", password=PASSWORD)
    context.database = database
    assert shown.headers["retry-after"]
    assert texts("en")("common.database_away") in shown.text.replace("&#39;", "'")
    assert WORKER.database_errors == before + 1
    assert WORKER.control["/login", "POST", 503][0] >= 1


def test_all_templates_are_compiled_before_workers_are_forked(settings: Settings) -> None:
    frame.environment.cache_clear()
    _prepare_control_plane(settings)
    made = frame.environment()
    assert made.cache is not None
    compiled = {name for _, name in made.cache.keys()}
    assert compiled == set(made.list_templates(extensions=["html"]))


# The catalogue


def test_every_text_is_there_in_every_language_with_the_same_values() -> None:
    english = texts("en")
    for language in LANGUAGES:
        other = texts(language)
        assert other.keys() == english.keys(), language
        for key in english.keys():
            names = set(re.findall(r"\{(\w+)\}", english.get(key, "")))
            assert set(re.findall(r"\{(\w+)\}", other.get(key, ""))) == names, (language, key)


def test_texts_that_templates_use_exist_and_none_is_left_over() -> None:
    known = texts("en").keys()
    areas = "|".join(frame._TEXT_AREAS)
    templates = "".join(path.read_text() for path in TEMPLATES.rglob("*.html"))
    code = "".join(path.read_text() for path in (TEMPLATES.parent / "control" / "dashboard").glob("*.py"))
    code += (TEMPLATES.parent / "control" / "pages.py").read_text()
    code = re.sub(r'permission="[^"]*"', "", code)
    used = set(re.findall(rf"""\bt(?:\.rich|\.get)?\(\s*["']((?:{areas})\.[a-z0-9_.]+)["']""", templates))
    used |= {key for key in re.findall(rf"""["']((?:{areas})\.[a-z0-9_.]+)["']""", templates) if key in known}
    used |= set(re.findall(rf'"((?:{areas})\.[a-z0-9_.]+)"', code))
    prefixes = {name for name in used if name.endswith(("_", "."))}
    prefixes |= set(re.findall(rf'"((?:{areas})\.[a-z0-9_.]+)\{{', code))  # f"area.name_{{value}}"
    used -= prefixes
    missing = {key for key in used if key not in known and key + "_one" not in known}
    assert not missing
    left = {key for key in known - used if key.removesuffix("_one") not in used and not key.startswith(tuple(prefixes))}
    assert not left


def test_every_action_of_the_audit_log_has_a_text_and_an_area() -> None:
    actions, prefixes = {RUNS_DANGEROUS, DELETES_KEYS}, set()
    for file in (TEMPLATES.parent / "control").rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name not in ("record", "note"):
                continue
            for part in (part for argument in call.args[1:3] for part in ast.walk(argument)):
                text = part.value if isinstance(part, ast.Constant) else None
                if isinstance(text, str) and re.fullmatch(r"[a-z_]+\.[a-z_]*", text):
                    (prefixes if text.endswith(".") else actions).add(text)  # f"instances.{action}" begins so
    assert {"instances.create", "users.enable", "log_level.set"} <= actions
    assert prefixes == {"instances."}
    # Who is refused is on record under the permission.
    for endpoints in (*load_endpoints().values(), *load_pages().values()):
        actions |= {one.permission for one in endpoints.values() if one.method != "GET"}
    actions = actions - set(SPECIAL_PERMISSIONS) | {"platform.administer"}
    for language in LANGUAGES:
        found = texts(language)
        missing = {action for action in actions if f"organization.action.{action}" not in found.keys()}
        assert not missing, language
    areas = {action.partition(".")[0] for action in actions}
    assert areas == set(AREAS)


def test_catalogues_are_read_whole() -> None:
    for path in TEMPLATES.rglob("*.toml"):
        assert list(tomllib.loads(path.read_text())) == [path.stem], path


def test_templates_have_no_script_or_style_of_their_own() -> None:
    for path in TEMPLATES.rglob("*.html"):
        text = path.read_text()
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", text), path
        assert not re.search(r'(?<!")\|safe', text.replace(" ", "")), path  # of a literal it is no danger


def test_every_form_that_changes_something_carries_the_token() -> None:
    for path in TEMPLATES.rglob("*.html"):
        for form in re.findall(r'<form[^>]*method="post".*?</form>', path.read_text(), re.DOTALL):
            assert "csrf()" in form, (path, form[:200])


def test_every_page_says_who_may_see_it() -> None:
    for path, methods in load_pages().items():
        for method, entry in methods.items():
            assert method in ("GET", "POST"), path
            assert entry.permission != "public" or not path.startswith(("/admin", "/dashboard/{")), path
