"""The console in a real browser, on an instance of our own: keys by the million, two people, the command line, live."""

import re
import secrets
import time
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.control.service import PASSWORD, Api
from tests.dashboard.conftest import Visitor, check_accessibility
from tests.http import Client

HOSTILE = "<script>alert(1)</script>\"'& \u202eright to left"
MIB = 1024 * 1024


class Place:
    """An instance of the member's, its pages and its REST address."""

    def __init__(self, api: Api) -> None:
        name = f"s{secrets.token_hex(4)}"
        made = api.call("POST", "redis-instances", {"name": HOSTILE, "slug": name, "max_memory": 512 * MIB})
        assert made["status"] == "running", made
        self._api = api
        self._id = made["id"]
        self._token = api.call("GET", f"redis-instances/{self._id}/credentials")["token"]
        self.home = f"/dashboard/{api.organization_id}/instances/{self._id}"

    def run(self, *argv: Any) -> Any:
        with Client(self._api.port, self._token) as client:
            return client.command(*argv).result


@pytest.fixture(scope="module")
def instance(member: Api) -> Place:
    return Place(member)


@pytest.fixture
def place(instance: Place) -> Place:
    instance.run("FLUSHALL")
    return instance


@pytest.fixture
def someone(visit: Any, member: Api) -> Visitor:
    visitor: Visitor = visit()
    visitor.sign_in(member.email, PASSWORD)
    return visitor


def test_a_key_is_found_opened_and_edited_without_losing_the_list(someone: Visitor, place: Place) -> None:
    page = someone.page
    place.run("SET", "doc", '{"a":1}')
    place.run("HSET", HOSTILE, HOSTILE, HOSTILE)
    page.goto(f"{place.home}/data")
    page.evaluate("window.stayed = true")
    page.get_by_role("link", name="doc").click()
    expect(page.get_by_role("heading", name="doc")).to_be_visible()
    assert "key=doc" in page.url
    area = page.get_by_label("Value", exact=True)
    expect(area).to_have_value('{\n  "a": 1\n}')
    area.fill('{"a": ')
    expect(page.locator("[data-json-state]")).to_contain_text("Not JSON yet")
    area.fill('{"a": 2}')
    expect(page.locator("[data-json-state]")).to_have_text("Valid JSON")
    assert page.evaluate("window.stayed") is True
    page.get_by_role("button", name="Save").first.click()
    expect(page.get_by_role("status").first).to_have_text("Saved.")
    assert place.run("GET", "doc") == '{"a": 2}'
    page.get_by_role("link", name="<script>").click()
    expect(page.locator("#value td").first).to_contain_text("<script>alert(1)</script>")
    page.go_back()
    expect(page.get_by_role("heading", name="doc")).to_be_visible()


def test_the_second_of_two_people_sees_what_the_first_saved(
    visit: Any, member: Api, someone: Visitor, place: Place
) -> None:
    place.run("SET", "shared", "before")
    other: Visitor = visit()
    other.sign_in(member.email, PASSWORD)
    for visitor in (someone, other):
        visitor.page.goto(f"{place.home}/data?key=shared")
    for visitor, text in ((someone, "first"), (other, "second")):
        visitor.page.get_by_label("Value", exact=True).fill(text)
        visitor.page.get_by_role("button", name="Save").first.click()
    page = other.page
    expect(page.get_by_role("alert")).to_contain_text("somebody changed this after you opened it")
    expect(page.get_by_label("Value", exact=True)).to_have_value("second")
    expect(page.get_by_label("What is there now")).to_have_text("first")
    assert place.run("GET", "shared") == "first"
    check_accessibility(page)
    page.get_by_role("button", name="Save").first.click()
    expect(page.get_by_role("status").first).to_have_text("Saved.")
    assert place.run("GET", "shared") == "second"


def test_a_million_keys_stay_usable(someone: Visitor, place: Place) -> None:
    fill = "for i = tonumber(ARGV[1]), tonumber(ARGV[1]) + 99999 do redis.call('SET', 'user:' .. i, i) end"
    for first in range(0, 1_000_000, 100_000):
        place.run("EVAL", fill, 0, first)
    page = someone.page
    for query in ("", "?pattern=user:777777", "?pattern=user:1*", "?pattern=nothing*"):
        times = []
        while min(times, default=2.0) >= 2 and len(times) < 3:
            began = time.monotonic()
            page.goto(f"{place.home}/data{query}")
            times.append(time.monotonic() - began)
        # Bounded by the time for one page of keys; the rest is the browser's, which on a busy machine may be late.
        assert min(times) < 2, (query, times)
        assert page.evaluate("document.documentElement.outerHTML.length") < 100_000
    expect(page.locator(".empty-line").first).to_contain_text("None among those looked at so far")
    page.goto(f"{place.home}/data")
    before = page.locator("#keys li").count()
    assert before >= 50
    page.get_by_role("link", name="More keys").click()
    expect(page.locator(f"#keys li:nth-child({before + 50})")).to_be_attached()
    page.goto(f"{place.home}/data?pattern=user:?????")
    page.get_by_role("link", name="Delete all that match").click()
    expect(page.locator("#counted")).to_have_text("90000 keys match", timeout=20_000)
    expect(page.locator("#unfinished")).to_have_count(0, timeout=20_000)
    check_accessibility(page)
    button = page.get_by_role("button", name="Delete them")
    expect(button).to_be_disabled()
    page.get_by_label("To confirm").fill("user:?????")
    button.click()
    expect(page.locator("#progress-text")).to_have_text("90000 keys deleted.", timeout=30_000)
    assert place.run("DBSIZE") == 910_000


def test_the_command_line_completes_remembers_and_asks(someone: Visitor, place: Place) -> None:
    page = someone.page
    page.goto(f"{place.home}/cli")
    prompt = page.get_by_label("Commands", exact=True)
    screen = page.get_by_role("log")
    prompt.press_sequentially("zadd")
    expect(page.locator("#hint")).to_contain_text("score member")
    prompt.fill("")
    prompt.press_sequentially("hgeta")
    expect(page.get_by_role("option").first).to_contain_text("HGETALL key")
    prompt.press("Tab")
    expect(prompt).to_have_value("HGETALL ")
    prompt.press_sequentially("nothing")
    prompt.press("Enter")
    expect(screen).to_contain_text("(empty array)")
    prompt.fill("MULTI\nSET a 1\nINCR a\nEXEC")
    prompt.press("Enter")
    expect(screen).to_contain_text("2) (integer) 2")
    prompt.fill(f"SET k '{HOSTILE.replace(chr(39), '')}'")
    prompt.press("Enter")
    expect(screen.locator(".exchange").last).to_contain_text("OK")  # one at a time is run
    prompt.fill("GET k")
    prompt.press("Enter")
    expect(screen.locator(".exchange").last).to_contain_text("> GET k")
    expect(screen.locator(".exchange").last).to_contain_text("<script>alert(1)</script>")
    prompt.press("ArrowUp")
    expect(prompt).to_have_value("GET k")
    prompt.fill("FLUSHALL")
    prompt.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("FLUSHALL deletes every key")
    check_accessibility(page)
    dialog.get_by_role("button", name="Cancel").click()
    assert place.run("DBSIZE") == 2
    prompt.press("Enter")
    dialog.get_by_role("button", name="Run anyway").click()
    expect(screen.locator(".exchange").last).to_contain_text("OK")
    assert place.run("DBSIZE") == 0
    prompt.fill('GET "open')
    prompt.press("Enter")
    expect(screen).to_contain_text('a closing " is missing; nothing was run')
    expect(prompt).to_have_value('GET "open')
    page.reload()
    page.get_by_label("Commands", exact=True).press("ArrowUp")
    expect(page.get_by_label("Commands", exact=True)).to_have_value('GET "open')
    # Nobody finds it after a sign-out.
    page.locator('form[action="/logout"]').evaluate("form => form.requestSubmit()")
    page.wait_for_url("**/login")
    assert page.evaluate("sessionStorage.length + localStorage.length") == 0


def test_keys_that_look_the_same_are_all_listed(someone: Visitor, place: Place) -> None:
    fill = "for i = 1, 60 do redis.call('SET', '\\255' .. i, 1) redis.call('SET', '\"\\\\xff' .. i .. '\"', 1) end"
    place.run("EVAL", fill, 0)
    assert place.run("DBSIZE") == 120
    page = someone.page
    page.goto(f"{place.home}/data")
    shown = page.locator("#keys li").count()
    while page.locator("#more").count():
        page.locator("#more").click()
        page.wait_for_function("shown => document.querySelectorAll('#keys li').length > shown", arg=shown)
        shown = page.locator("#keys li").count()
        page.wait_for_function("() => !document.querySelector('#more')?.dataset.busy")
    assert shown == 120
    assert page.locator("#keys li").filter(has_text=re.compile(r'"\\xff7"')).count() == 2


def test_commands_are_seen_live_filtered_and_paused(someone: Visitor, place: Place) -> None:
    page = someone.page
    page.goto(f"{place.home}/monitor")
    page.get_by_label("Only with this text").fill("wanted")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#live-state")).to_have_text("Live")
    place.run("SET", "other", "1")
    place.run("SET", "wanted", HOSTILE)
    lines = page.locator("#lines li")
    expect(lines).to_have_count(1)
    expect(lines.first).to_contain_text('"SET" "wanted" "<script>')
    check_accessibility(page)
    page.get_by_role("button", name="Pause").click()
    place.run("GET", "wanted")
    expect(page.locator("#live-state")).to_have_text("Paused, 1 waiting")
    expect(lines).to_have_count(1)
    page.get_by_role("button", name="Go on").click()
    expect(lines).to_have_count(2)
    for _ in range(6):
        place.run("EVAL", "for i = 1, 100 do redis.call('GET', 'wanted') end", 0)
    expect(page.locator("#dropped")).to_contain_text(re.compile("older lines were removed"))
    expect(lines).to_have_count(500)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#live-state")).to_have_text("Stopped")
    page.get_by_role("button", name="Clear").click()
    expect(lines).to_have_count(0)


def test_messages_are_heard_and_published(someone: Visitor, place: Place) -> None:
    page = someone.page
    page.goto(f"{place.home}/pubsub")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#live-state")).to_contain_text("name 1 to 20 channels")
    page.get_by_label("Channels").fill("news")
    page.get_by_label("Patterns").fill("ch*")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#live-state")).to_have_text("Live")
    page.get_by_label("Channel", exact=True).fill("chat")
    page.get_by_label("Message", exact=True).fill('Xin chào "bạn"\n' + HOSTILE)
    page.get_by_role("button", name="Publish").click()
    expect(page.locator(".toast")).to_contain_text("received by 1 subscriber")
    expect(page.locator("#lines li")).to_contain_text('Xin chào "bạn"')
    place.run("PUBLISH", "news", "again")
    expect(page.locator("#lines li").last).to_contain_text("again")
    check_accessibility(page)


@pytest.mark.parametrize("tab", ["/data", "/data?key=h", "/data?key=z", "/data?key=s", "/cli", "/monitor", "/pubsub"])
def test_pages_are_accessible_narrow_and_dark(visit: Any, member: Api, place: Place, tab: str) -> None:
    place.run("SET", "s", "v", "EX", 1000)
    place.run("HSET", "h", "f", "v" * 300, "g", "w")
    place.run("ZADD", "z", 1, "m")
    visitor: Visitor = visit(viewport={"width": 360, "height": 700}, color_scheme="dark")
    visitor.sign_in(member.email, PASSWORD)
    page = visitor.page
    page.goto(place.home + tab)
    check_accessibility(page)
    assert fits(page), "the page is wider than a small phone"
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 2560, "height": 1300})
    check_accessibility(page)
    assert fits(page)


def fits(page: Page) -> bool:
    """Whether nothing has to be scrolled sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


def test_without_scripts_keys_are_made_edited_and_deleted(visit: Any, member: Api, place: Place) -> None:
    visitor: Visitor = visit(java_script_enabled=False)
    visitor.sign_in(member.email, PASSWORD)
    page = visitor.page
    page.goto(f"{place.home}/data")
    page.get_by_text("New key").click()
    page.get_by_label("Name", exact=True).fill("made")
    page.get_by_label("Value, or first element").fill("one\ntwo")
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_label("Value", exact=True)).to_have_value("one\ntwo")
    page.get_by_label("Value", exact=True).fill("three")
    page.get_by_role("button", name="Save").first.click()
    assert place.run("GET", "made") == "three"
    page.get_by_text("Delete the key").first.click()
    page.get_by_role("button", name="Delete the key").click()
    expect(page.get_by_role("status").first).to_have_text("The key was deleted.")
    assert place.run("EXISTS", "made") == 0
    page.goto(f"{place.home}/cli")
    page.get_by_label("Commands", exact=True).fill("PING")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("log")).to_contain_text("PONG")
    page.goto(f"{place.home}/monitor")
    expect(page.get_by_text("Live views need JavaScript")).to_be_visible()
    assert re.search(r"curl -N -X POST http", page.content())
