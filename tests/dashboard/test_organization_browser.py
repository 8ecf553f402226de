"""Pages of organizations, accounts and the platform in a real browser: live, with and without scripts, narrow, dark."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.control.conftest import Service, Urls
from tests.control.service import PASSWORD, Api, execute, register
from tests.dashboard.conftest import Visitor, check_accessibility
from tests.http import Client
from tests.servers import wait_for

HOSTILE = "<script>alert(1)</script>\"'& \u202eright to left " + "n" * 50
ORGANIZATION = ("", "/keys", "/keys/new", "/members", "/quota", "/audit", "/settings")
OTHERS = (
    "/dashboard/account",
    "/dashboard/account/security",
    "/admin",
    "/admin/organizations",
    "/admin/instances",
    "/admin/users",
    "/admin/audit",
)
WINDOWS: dict[str, dict[str, Any]] = {
    "narrow": {"viewport": {"width": 360, "height": 700}},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "very-wide": {"viewport": {"width": 2560, "height": 1200}},
}


@pytest.fixture(scope="module")
def instance(member: Api) -> dict[str, Any]:
    """A running instance of the member's."""
    made: dict[str, Any] = member.call(
        "POST", "redis-instances", {"name": HOSTILE, "slug": "hostile", "max_memory": 8 << 20}, status=201
    )
    assert made["status"] == "running", made
    return made


def signed_in(visit: Any, member: Api, **options: Any) -> Visitor:
    visitor: Visitor = visit(**options)
    visitor.sign_in(member.email, PASSWORD)
    return visitor


def fits(page: Page) -> bool:
    """Whether nobody has to scroll sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


@pytest.mark.parametrize("window", WINDOWS)
def test_pages_fit_and_are_accessible(
    visit: Any, member: Api, instance: dict[str, Any], database_urls: Urls, window: str
) -> None:
    statement = "UPDATE users SET is_admin = true WHERE email = $1"
    with ThreadPoolExecutor(1) as thread:  # Playwright's event loop has this one
        thread.submit(execute, database_urls.owner, statement, member.email).result()
    member.key(name=HOSTILE, key_prefixes=["x" * 200])
    visitor = signed_in(visit, member, **WINDOWS[window])
    home = f"/dashboard/{member.organization_id}"
    for path in [home + area for area in ORGANIZATION] + list(OTHERS):
        visitor.page.goto(path)
        visitor.page.evaluate("for (const one of document.querySelectorAll('main details')) one.open = true")
        assert fits(visitor.page), path
        if window != "very-wide":
            check_accessibility(visitor.page)


def test_a_key_is_made_used_and_revoked(visit: Any, member: Api, instance: dict[str, Any], service: Service) -> None:
    visitor = signed_in(visit, member, permissions=["clipboard-read", "clipboard-write"])
    page = visitor.page
    page.goto(f"/dashboard/{member.organization_id}/keys")
    page.get_by_role("link", name="New API key").first.click()
    page.get_by_role("textbox", name="Name").fill("check  out")  # which a page shows, and people type, with one blank
    page.get_by_label("Only read").check()
    page.get_by_label(HOSTILE, exact=False).check()
    page.get_by_role("button", name="Create the key").click()
    expect(page.get_by_role("heading", name="Copy the key now")).to_be_visible()
    check_accessibility(page)
    page.locator(".secret [data-copy]").click()
    expect(page.locator(".toast")).to_have_text("Copied")
    key = str(page.evaluate("navigator.clipboard.readText()"))
    with Client(service.port, key) as client:
        assert client.request("GET", f"/redis/{instance['id']}/ping").json() == {"result": "PONG"}
        assert client.request("GET", f"/redis/{instance['id']}/set/a/b").status == 400
        page.get_by_role("link", name="I have copied it").click()
        expect(page.locator("body")).not_to_contain_text(key)
        page.get_by_text("Revoke this key").first.click()
        revoke = page.get_by_role("button", name="Revoke this key")
        expect(revoke).to_be_disabled()
        page.get_by_label("To confirm, type").fill("check")
        expect(revoke).to_be_disabled()
        page.get_by_label("To confirm, type").fill("check out")
        check_accessibility(page)
        revoke.click()
        expect(page.locator(".flash")).to_have_text("check out is revoked.")
        wait_for(lambda: client.request("GET", f"/redis/{instance['id']}/ping").status == 401, 5, "the key ends")


def test_the_overview_follows_what_happens(visit: Any, member: Api, instance: dict[str, Any], service: Service) -> None:
    visitor = signed_in(visit, member)
    page = visitor.page
    page.goto(f"/dashboard/{member.organization_id}")
    page.evaluate("window.stays = true")
    expect(page.locator(".instance .badge")).to_have_text("Running")
    # Somebody else does something; nobody reloads.
    member.key(name="made meanwhile")
    expect(page.locator("#events")).to_contain_text("made meanwhile", timeout=15_000)
    assert page.evaluate("window.stays")
    assert not page.evaluate("document.querySelector('main script')")


def test_everything_works_without_scripts(visit: Any, service: Service) -> None:
    member = register(service.port)
    visitor = signed_in(visit, member, java_script_enabled=False)
    page = visitor.page
    home = f"/dashboard/{member.organization_id}"
    page.goto(f"{home}/keys/new")
    page.get_by_role("textbox", name="Name").fill("plain")
    page.get_by_role("button", name="Create the key").click()
    assert re.fullmatch(r"\S{60,}", page.locator("#new-key").inner_text())
    page.get_by_role("link", name="I have copied it").click()
    page.get_by_text("Revoke this key").first.click()
    page.get_by_label("To confirm, type").fill("plain")
    page.get_by_role("button", name="Revoke this key").click()
    expect(page.locator(".flash")).to_have_text("plain is revoked.")
    page.goto(f"{home}/members")
    page.get_by_label("E-mail address").fill("guest@example.com")
    page.get_by_role("button", name="Send the invitation").click()
    expect(page.locator("#invitation-link")).to_contain_text("/invitations?token=")
    page.goto(f"{home}/audit")
    page.get_by_label("What").select_option("invitations.*")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator(".log > li")).to_have_count(1)
    page.locator(".log summary").click()
    expect(page.locator(".log ins").first).to_be_visible()
    page.goto(f"{home}/settings")
    page.get_by_role("textbox", name="Name").fill("Without scripts")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".flash")).to_have_text("Saved.")
    page.goto("/dashboard/account")
    page.get_by_role("button", name="Tiếng Việt").first.click()
    expect(page.get_by_role("heading", name="Tài khoản của bạn")).to_be_visible()


def test_the_keyboard_is_enough(visit: Any, service: Service) -> None:
    member = register(service.port)
    visitor = signed_in(visit, member)
    page = visitor.page
    page.goto(f"/dashboard/{member.organization_id}/settings")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    delete = page.locator("summary", has_text="Delete the organization")
    for _ in range(12):
        page.keyboard.press("Tab")
        if delete.evaluate("element => element === document.activeElement"):
            break
    outline = delete.evaluate("element => getComputedStyle(element).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type(str(page.locator("details[open] .name").inner_text()))
    page.keyboard.press("Enter")
    page.wait_for_url("**/dashboard/account")
    expect(page.locator(".flash")).to_have_text("The organization is deleted.")
