"""Pages of instances in a real browser: made, watched, connected to by what is pasted, charted, saved and restored."""

import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.control.conftest import Service
from tests.control.service import PASSWORD, Api
from tests.dashboard.conftest import Visitor, check_accessibility
from tests.http import Client
from tests.servers import wait_for

CLIENTS = Path(__file__).parents[1] / "clients" / "js"
MIB = 1024 * 1024
HOSTILE = "<script>alert(1)</script>\"'& \u202eright to left"


def make(member: Api, name: str, **values: Any) -> dict[str, Any]:
    """A running instance."""
    made: dict[str, Any] = member.call(
        "POST",
        "redis-instances",
        {"name": name, "slug": f"s{secrets.token_hex(4)}", "max_memory": 8 * MIB, **values},
    )
    assert made["status"] == "running", made
    return made


def home(member: Api, instance: dict[str, Any], tab: str = "") -> str:
    return f"/dashboard/{member.organization_id}/instances/{instance['id']}{tab}"


@pytest.fixture
def someone(visit: Any, member: Api) -> Visitor:
    """The member, signed in."""
    visitor: Visitor = visit(permissions=["clipboard-read", "clipboard-write"])
    visitor.sign_in(member.email, PASSWORD)
    return visitor


def clipboard(page: Page) -> str:
    return str(page.evaluate("navigator.clipboard.readText()"))


def test_an_instance_is_made_and_its_snippets_run_as_pasted(
    someone: Visitor, member: Api, service: Service, tmp_path: Path
) -> None:
    page = someone.page
    page.goto(f"/dashboard/{member.organization_id}/instances/new")
    page.get_by_label("Name").fill("Giỏ hàng Đà Nẵng")
    expect(page.get_by_label("Slug")).to_have_value("gio-hang-da-nang")
    page.get_by_label("Memory", exact=True).select_option(str(512 * MIB))
    expect(page.locator('[data-part="memory"] .meter-text')).to_contain_text("of 10 GiB")
    check_accessibility(page)
    page.get_by_role("button", name="Create the instance").click()
    page.wait_for_url(re.compile("/instances/[0-9a-f-]{36}$"))
    # Nobody reloads: the page follows what the steward does.
    expect(page.get_by_role("heading", name="It is running")).to_be_visible()
    expect(page.locator("#progress .done")).to_have_count(4)
    expect(page.locator("#state")).to_contain_text("Running")
    check_accessibility(page)
    pasted = {}
    for title in ("curl", "JavaScript", "Python", "Cloudflare Workers", "Vercel Edge", "Deno", "fetch"):
        summary = page.locator("#snippets summary", has_text=re.compile(f"^{title}$"))
        if summary.locator("xpath=..").get_attribute("open") is None:
            summary.click()
        page.get_by_role("button", name=f"Copy the code for {title}").click()
        expect(page.locator(".toast").last).to_have_text("Copied")
        pasted[title] = clipboard(page)
        assert "YOUR_TOKEN" not in pasted[title]
    expect(page.locator("#snippets")).to_contain_text("YOUR_TOKEN")  # copied, never shown
    run_snippets(pasted, tmp_path)
    page.get_by_role("button", name="Show tokens").click()
    expect(page.locator("#shown-token")).not_to_contain_text("•")
    token = page.locator("#shown-token").inner_text()
    assert token in pasted["curl"]
    with Client(service.port, token) as client:
        assert client.post("/", ["MGET", "hello", "visits"]).json() == {"result": ["world", "2"]}
    page.get_by_role("button", name="Hide tokens").click()
    expect(page.locator("#shown-token")).to_contain_text("•")
    assert token not in page.content()


def run_snippets(pasted: dict[str, str], folder: Path) -> None:
    """Each as it was copied; the two platforms that are not here by node, whose functions they are."""
    node = shutil.which("node")
    assert node, "Node.js is missing; `make test` installs it"
    (folder / "node_modules").symlink_to(CLIENTS / "node_modules")
    worker = pasted["Cloudflare Workers"] + (
        "\nimport assert from 'node:assert'\nimport worker from './cloudflare.mjs'\n"
        "console.log(await (await worker.fetch(new Request('http://worker/'))).text())\n"
    )
    vercel = pasted["Vercel Edge"] + "\nconsole.log(JSON.stringify(await (await GET()).json()))\n"
    programs: list[tuple[list[str], str, str, str]] = [
        (["/bin/sh"], "snippet.sh", pasted["curl"], '{"result":"world"}'),
        ([node], "javascript.mjs", pasted["JavaScript"], "world"),
        ([sys.executable], "snippet.py", pasted["Python"], "world"),
        ([node], "fetch.mjs", pasted["fetch"], "{ result: 'OK' }"),
        ([node], "cloudflare.mjs", worker, "Visit number 1"),
        ([node], "vercel.mjs", vercel, '{"visits":2}'),
    ]
    for command, name, text, expected in programs:
        (folder / name).write_text(text)
        done = subprocess.run(
            [*command, name],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "UPSTASH_DISABLE_TELEMETRY": "1"},
        )
        assert expected in done.stdout, (name, done.stdout, done.stderr)


def test_usage_is_charted_with_a_line_that_follows(someone: Visitor, member: Api, service: Service) -> None:
    instance = make(member, "charted")
    with Client(service.port, instance["rest_token"]) as client:
        for number in range(50):
            assert client.post("/", ["SET", f"k{number}", "v"]).status == 200
    wait_for(
        lambda: member.call("GET", f"redis-instances/{instance['id']}/usage?step=minute")["total"]["commands"] >= 50,
        15,
        "usage to be written",
    )
    page = someone.page
    page.goto(home(member, instance, "/usage"))
    expect(page.locator(".figure").first).to_have_text("50")
    chart = page.locator("#chart-latency svg")
    chart.hover()
    tip = page.locator("#chart-latency .chart-tip")
    expect(tip).to_contain_text("p99")
    first = tip.inner_text()
    chart.focus()
    expect(tip).to_be_visible()
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    assert "ms" in first
    page.locator("#chart-latency summary").click()
    expect(page.locator("#chart-latency tbody tr")).to_have_count(60)
    check_accessibility(page)
    page.get_by_role("link", name="24 hours").click()
    expect(page.locator("[aria-current=page]", has_text="24 hours")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    assert Path(download.value.path()).read_text().startswith("time,commands,")


def test_a_snapshot_is_downloaded_and_loaded_in_parts(
    someone: Visitor, member: Api, service: Service, tmp_path: Path
) -> None:
    instance = make(member, HOSTILE, max_memory=16 * MIB)
    with Client(service.port, instance["rest_token"]) as client:
        assert client.post("/", ["SET", "kept", "in the snapshot"]).status == 200
        for number in range(8):  # more than one part of what cannot be compressed
            assert client.post("/", ["SET", f"large{number}", secrets.token_hex(450_000)]).status == 200
        page = someone.page
        page.goto(home(member, instance, "/settings"))
        with page.expect_download() as download:
            page.get_by_role("link", name="Download a snapshot").click()
        file = tmp_path / "backup.rdb"
        download.value.save_as(file)
        assert file.stat().st_size > 4 * MIB
        assert client.post("/", ["FLUSHALL"]).status == 200
        page.locator("summary", has_text="Load a snapshot").click()
        button = page.locator("#load-form button")
        expect(button).to_be_disabled()
        page.get_by_label("RDB file").set_input_files(file)
        page.locator("#confirm-load").fill(instance["name"])
        button.click()
        expect(page.locator("#load-told")).to_have_text("The instance runs with the data of the snapshot.")
        assert client.post("/", ["GET", "kept"]).json() == {"result": "in the snapshot"}
        file.write_bytes(b"REDIS0009 and nothing more")
        page.get_by_label("RDB file").set_input_files(file)
        page.locator("#confirm-load").fill(instance["name"])
        button.click()
        expect(page.locator("#load-told")).to_contain_text("the data is as it was")
        assert client.post("/", ["GET", "kept"]).json() == {"result": "in the snapshot"}


def test_without_scripts_everything_works(visit: Any, member: Api, service: Service, tmp_path: Path) -> None:
    visitor: Visitor = visit(java_script_enabled=False)
    visitor.sign_in(member.email, PASSWORD)
    page = visitor.page
    page.goto(f"/dashboard/{member.organization_id}/instances/new")
    page.get_by_label("Name").fill(HOSTILE)
    page.get_by_label("An existing Redis").check()
    expect(page.get_by_label("Address of the Redis")).to_be_visible()
    expect(page.get_by_label("Version")).to_be_hidden()
    page.get_by_label("A new Redis").check()
    page.get_by_role("button", name="Create the instance").click()
    url = page.url

    def running() -> bool:
        page.reload()
        return page.get_by_role("heading", name="It is running").is_visible()

    wait_for(running, 15, "the instance to run")
    page.get_by_role("button", name="Show tokens").click()
    token = page.locator("#shown-token").inner_text()
    assert token in page.locator("#snippet-curl").inner_text()
    with Client(service.port, token) as client:
        assert client.post("/", ["SET", "key", "value"]).status == 200
        page.goto(f"{url}/settings")
        page.locator("summary", has_text="Load a snapshot").click()
        taken = visitor.context.request.get(
            f"/api/organizations/{member.organization_id}/redis-instances/{url.rpartition('/')[2]}/snapshot"
        )
        assert client.post("/", ["DEL", "key"]).json() == {"result": 1}
        page.get_by_label("RDB file").set_input_files(
            {"name": "b.rdb", "mimeType": "application/octet-stream", "buffer": taken.body()}
        )
        page.locator("#confirm-load").fill(" ".join(HOSTILE.split()))
        page.locator("#load-form button").click()
        expect(page.locator(".flash")).to_contain_text("The snapshot has arrived")
        wait_for(lambda: client.post("/", ["GET", "key"]).body == b'{"result":"value"}', 15, "the snapshot")
    page.locator("summary", has_text="Delete").click()
    page.locator("#delete input[name=confirm]").fill(HOSTILE)
    page.locator("#delete button").click()
    expect(page.locator(".note")).to_contain_text("This instance is deleted")
    page.get_by_role("button", name="Restore").click()
    expect(page.locator(".flash")).to_contain_text("It is coming back.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 2560])
def test_pages_fit_and_are_accessible(visit: Any, member: Api, scheme: str, width: int) -> None:
    found = member.call("GET", "redis-instances")["items"]
    instance = next((one for one in found if one["name"] == HOSTILE), None) or make(member, HOSTILE)
    visitor: Visitor = visit(viewport={"width": width, "height": 900}, color_scheme=scheme, locale="vi-VN")
    visitor.page.goto("/login")
    visitor.page.locator("#f-email").fill(member.email)
    visitor.page.locator("#f-password").fill(PASSWORD)
    visitor.page.locator("main button").first.click()
    visitor.page.wait_for_url("**/dashboard/**")
    for target in (
        f"/dashboard/{member.organization_id}/instances/new",
        *(home(member, instance, tab) for tab in ("", "/usage", "/settings")),
    ):
        visitor.page.goto(target)
        for summary in visitor.page.locator("details.danger > summary").all():
            summary.click()
        check_accessibility(visitor.page)
        overflow = visitor.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, target
