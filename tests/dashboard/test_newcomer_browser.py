"""Somebody who has never seen the project, from `redisgate dev` to a revoked key: a real browser and a real shell."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.dashboard.conftest import CHROMIUM_ARGUMENTS
from tests.redisgate.test_dev import Dev
from tests.servers import wait_for


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Dev]:
    dev = Dev(tmp_path, "--port", "0", "--data", str(tmp_path / "data")).ready()
    yield dev
    assert dev.end(signal.SIGTERM) == 0, dev.text()
    dev.output.close()


@contextlib.contextmanager
def browser_at(url: str) -> Iterator[Page]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    assert executable is not None, "the dashboard's tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGUMENTS)
        context = browser.new_context(
            base_url=url, locale="en-GB", permissions=["clipboard-read", "clipboard-write"], accept_downloads=True
        )
        context.set_default_timeout(15_000)
        yield context.new_page()
        browser.close()


def paste(page: Page, folder: Path) -> str:
    """What a shell says to what was copied."""
    text = str(page.evaluate("navigator.clipboard.readText()"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("REDISGATE_")}
    done = subprocess.run(["sh", "-c", text], cwd=folder, env=environ, capture_output=True, text=True, timeout=30)
    return done.stdout


@pytest.mark.timeout(120)
def test_the_first_five_minutes(started: Dev, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{started.port}"
    assert f"Dashboard        {url}" in started.text()
    with browser_at(url) as page:
        # signs in with what the terminal and the page say
        page.goto("/")
        expect(page.get_by_text("Demo123456!")).to_be_visible()
        page.get_by_label("Password").fill("Demo123456!")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Demo", level=1)).to_be_visible()
        overview = page.url
        # creates an instance
        page.get_by_role("link", name="New instance").click()
        page.get_by_label("Name").fill("My cache")
        page.get_by_role("button", name="Create the instance").click()
        expect(page.get_by_role("heading", name="It is running")).to_be_visible(timeout=30_000)
        page.goto(page.url.partition("?")[0])
        instance = page.url
        # pastes a snippet that works
        page.get_by_role("button", name="Copy the code for curl").click()
        expect(page.locator("#toasts")).to_contain_text("Copied")
        snippet = str(page.evaluate("navigator.clipboard.readText()"))
        assert '{"result":"OK"}' in paste(page, tmp_path)
        # sees the command arrive
        page.get_by_role("link", name="Monitor", exact=True).click()
        page.get_by_role("button", name="Start").click()
        main = page.get_by_role("main")
        shown = []
        for _ in range(20):  # commands that came before the stream was open are not shown
            assert '{"result":"OK"}' in paste(page, tmp_path)
            with contextlib.suppress(AssertionError):
                expect(main).to_contain_text('"set" "hello" "world"', ignore_case=True, timeout=500)
                shown.append(True)
                break
        assert shown, main.inner_text()
        # finds and edits the key
        page.get_by_role("link", name="Data", exact=True).click()
        page.get_by_role("link", name="hello").click()
        value = page.get_by_label("Value", exact=True)
        expect(page.get_by_role("heading", name="hello", exact=True)).to_be_visible()
        expect(value).to_have_value("world")
        value.fill("universe")
        page.get_by_role("button", name="Save").first.click()
        expect(page.get_by_role("status").first).to_have_text("Saved.")
        get = next(line for line in snippet.splitlines() if "/get/hello" in line)
        page.evaluate("text => navigator.clipboard.writeText(text)", get)
        assert '{"result":"universe"}' in paste(page, tmp_path)
        # looks at the usage
        page.get_by_role("link", name="Usage", exact=True).click()

        def counted() -> bool:
            page.reload()
            return page.locator(".figure").first.inner_text() not in ("0", "\N{EN DASH}")

        wait_for(counted, 30, "commands on the page of usage")
        expect(page.get_by_role("figure").first.locator("svg")).to_be_visible()
        # makes a key, uses it, revokes it, and is refused
        page.goto(f"{overview}/keys")
        page.get_by_role("link", name="New API key").first.click()
        page.get_by_role("textbox", name="Name").fill("checkout")
        page.get_by_role("button", name="Create the key").click()
        expect(page.get_by_role("heading", name="Copy the key now")).to_be_visible()
        page.get_by_role("button", name="Copy", exact=True).first.click()
        key = str(page.evaluate("navigator.clipboard.readText()"))
        identity = instance.rstrip("/").rpartition("/")[2]
        command = f"curl -s {url}/redis/{identity}/get/hello -H 'Authorization: Bearer {key}'"
        page.evaluate("text => navigator.clipboard.writeText(text)", command)
        assert '{"result":"universe"}' in paste(page, tmp_path)
        page.get_by_role("link", name="I have copied it").click()
        page.get_by_text("Revoke this key").first.click()
        page.get_by_label("To confirm, type").fill("checkout")
        page.get_by_role("button", name="Revoke this key").click()
        expect(page.get_by_text("Revoked", exact=False).first).to_be_visible()
        wait_for(lambda: "WRONGPASS" in paste(page, tmp_path), 5, "the revoked key to be refused")
