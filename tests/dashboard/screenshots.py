"""The pictures of the dashboard in the documentation: `python -m tests.dashboard.screenshots docs/images`.

A trial installation is started and filled with a shop's sample data and a day of sample usage; then a real Chromium
looks at its pages.
"""

import asyncio
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock
from uuid import UUID

import asyncpg
from playwright.sync_api import Page, sync_playwright

from control.embedded import EmbeddedPostgres
from redisgate.metering import BUCKETS, bucket_of
from tests.dashboard.conftest import CHROMIUM_ARGUMENTS
from tests.http import Client
from tests.redisgate.test_dev import Dev

WIDE, NARROW = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


def fill(port: int, token: str) -> None:
    """A shop's keys, of each type."""
    commands: list[list[object]] = [
        ["SET", "shop:motto", "Everything that is red"],
        ["SET", "shop:settings", json.dumps({"currency": "EUR", "tax": 0.19, "languages": ["en", "vi"]})],
        ["SET", "session:8f14e45f", json.dumps({"user": 17, "since": "2026-11-24T08:12:00Z"}), "EX", 3600],
        ["SET", "counter:visits", 48_213],
        ["RPUSH", "queue:mails", "welcome:17", "invoice:1042", "newsletter:11"],
        ["SADD", "tags", "red", "round", "new", "sale"],
        ["ZADD", "ranking", 412, "apple", 398, "cherry", 377, "tomato", 104, "radish"],
        ["XADD", "orders", "*", "article", "cherry", "count", 12],
        ["XADD", "orders", "*", "article", "apple", "count", 3],
    ]
    for number, (name, price) in enumerate([("Apple", 0.5), ("Cherry", 3.2), ("Tomato", 2.1), ("Radish", 1.1)], 1):
        commands.append(["HSET", f"article:{number}", "name", name, "price", price, "stock", 20 * number])
        commands.append(["SET", f"cart:{number}", json.dumps([{"article": number, "count": 2}]), "EX", 86_400])
    with Client(port, token) as client:
        response = client.post("/pipeline", commands)
        assert response.status == 200, response


def traffic(port: int, token: str, stop: threading.Event) -> None:
    """A few customers."""
    with Client(port, token) as client:
        while not stop.wait(0.12):
            number = random.randint(1, 4)
            client.post(
                "/",
                random.choice(
                    [["HGETALL", f"article:{number}"], ["INCR", "counter:visits"], ["GET", f"cart:{number}"]]
                ),
            )


async def a_day(url: str, organization_id: UUID, instance_id: UUID, max_memory: int) -> None:
    """A day of sample usage: more by day than by night."""
    connection = await asyncpg.connect(url)
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    usage, samples, commands = [], [], []
    for minute in range(2, 24 * 60):
        at = now - timedelta(minutes=minute)
        busy = 1.15 - math.cos((at.hour * 60 + at.minute) / 1440 * 2 * math.pi) + random.uniform(-0.1, 0.1)
        count = int(60 * 38 * busy)
        latency = [0] * BUCKETS
        for micros, share in ((180, 0.5), (260, 0.3), (390, 0.15), (700, 0.04), (2_400 * busy, 0.01)):
            latency[bucket_of(int(micros * 1000))] += int(count * share)
        counted = [count, int(count * 0.8), int(count * 0.2), count, int(count * 0.002), count * 110, count * 240]
        usage.append(("minute", at, organization_id, instance_id, "token", UUID(int=0), *counted, count * 420, latency))
        memory = int(max_memory * (0.34 + 0.1 * busy + 0.04 * math.sin(minute / 9)))
        samples.append(
            (
                instance_id,
                at,
                int(21_000 + 4_000 * busy),
                memory,
                4,
                int(count * 0.76),
                int(count * 0.04),
                0,
                int(busy * 9),
            )
        )
        if minute % 10 == 0:
            for name, share, micros in (
                ("get", 0.5, 1.4),
                ("hgetall", 0.24, 2.9),
                ("set", 0.14, 1.9),
                ("incr", 0.08, 1.2),
            ):
                calls = int(count * 10 * share)
                commands.append(
                    (instance_id, at.replace(minute=at.minute // 10 * 10), name, calls, int(calls * micros), 0)
                )
    try:
        await connection.execute("UPDATE users SET is_admin = true")
        await connection.executemany(
            "INSERT INTO usage VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)"
            " ON CONFLICT DO NOTHING",
            usage,
        )
        await connection.execute(  # what the hourly work would have done by now
            "INSERT INTO usage SELECT 'hour', date_trunc('hour', at), organization_id, instance_id, credential,"
            " api_key_id, sum(commands), sum(reads), sum(writes), sum(requests), sum(errors), sum(bytes_in),"
            " sum(bytes_out), sum(micros), sum_histograms(latency) FROM usage WHERE step = 'minute'"
            " GROUP BY 2, 3, 4, 5, 6 ON CONFLICT DO NOTHING"
        )
        await connection.executemany(
            "INSERT INTO instance_samples (instance_id, at, keys, memory, connections, hits, misses, evicted, expired)"
            " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING",
            samples,
        )
        await connection.executemany(
            "INSERT INTO instance_commands VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING", commands
        )
    finally:
        await connection.close()


def take(page: Page, folder: Path, name: str) -> None:
    page.wait_for_load_state("networkidle") if "/monitor" not in page.url and "/pubsub" not in page.url else None
    page.screenshot(path=folder / f"{name}.png")


def main(folder: Path) -> None:
    """Make every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    assert executable is not None, "apt-get install chromium"
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="screenshots")))
        postgres = EmbeddedPostgres(data / "postgres", durable=False)
        postgres.start()
        stack.callback(postgres.stop)
        stack.enter_context(mock.patch.dict(os.environ, DATABASE_URL=postgres.url()))
        started = Dev(data, "--port", "0", "--data", str(data / "dev")).ready()
        stack.callback(started.end, signal.SIGTERM)
        token, organization = started.token(), started.token("Organization")
        instance = re.search(r"Instance +(\S+)", started.text())[1]  # type: ignore[index]
        fill(started.port, token)
        with asyncio.Runner() as runner:
            runner.run(a_day(postgres.url(), UUID(organization), UUID(instance), 256 << 20))
        stop = threading.Event()
        customers = threading.Thread(target=traffic, args=(started.port, token, stop))
        customers.start()
        stack.callback(customers.join)
        stack.callback(stop.set)
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGUMENTS)
        stack.callback(browser.close)

        def visit(**options: object) -> Page:
            context = browser.new_context(base_url=f"http://127.0.0.1:{started.port}", locale="en-GB", **options)  # type: ignore[arg-type]
            page = context.new_page()
            page.goto("/login")
            return page

        def sign_in(page: Page) -> None:
            page.get_by_label("Password").fill("Demo123456!")
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_url("**/dashboard/**")

        at, here = f"/dashboard/{organization}", f"/dashboard/{organization}/instances/{instance}"
        page = visit(viewport=WIDE, color_scheme="light")
        take(page, folder, "sign-in")
        sign_in(page)
        for name, address in (
            ("overview", at),
            ("create", f"{at}/instances/new"),
            ("connect", here),
            ("usage", f"{here}/usage?span=24h"),
            ("data", f"{here}/data?key=article:2"),
            ("keys", f"{at}/keys"),
            ("audit", f"{at}/audit"),
            ("platform", "/admin"),
        ):
            page.goto(address)
            take(page, folder, name)
        page.goto(f"{here}/monitor")
        page.get_by_role("button", name="Start").click()
        page.get_by_role("main").get_by_text("hgetall").first.wait_for(timeout=20_000)
        time.sleep(1.5)  # so that there is something to see
        take(page, folder, "monitor")
        page.goto(f"{here}/cli")
        box = page.get_by_label("Commands", exact=True)
        for line in ("HGETALL article:2", "ZREVRANGE ranking 0 2 WITHSCORES"):
            box.fill(line)
            box.press("Enter")
            page.get_by_text(line).last.wait_for()
        time.sleep(0.5)
        take(page, folder, "cli")
        dark = visit(viewport=WIDE, color_scheme="dark")
        sign_in(dark)
        dark.goto(f"{here}/usage?span=24h")
        take(dark, folder, "usage-dark")
        narrow = visit(viewport=NARROW, color_scheme="dark")
        sign_in(narrow)
        narrow.goto(here)
        take(narrow, folder, "connect-narrow")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
