"""Fixtures of the dashboard's tests: pages without a browser, and a real Chromium over a real service.

Modules with a browser are called test_*_browser.py and have no async tests: Playwright keeps an event loop running in
the thread as long as the browser is open.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from tests.control.conftest import (  # noqa: F401  fixtures
    Service,
    Urls,
    app,
    client,
    context,
    database,
    database_urls,
    empty_database,
    migrated,
    owner,
    owner_api,
    postgres_server,
    redis,
    service,
    service_settings,
    settings,
    viewer_api,
)
from tests.control.service import Api, register

CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_TOKEN = re.compile(r'name="csrf_token" value="([0-9a-f]{64})"')


class Pages:
    """One person at the pages, without a browser and without scripts: what a form posts is posted."""

    def __init__(self, client: httpx.AsyncClient) -> None:  # noqa: F811
        self.client = client
        self.csrf = ""

    async def get(self, path: str, status: int = 200) -> httpx.Response:
        """A page; its form token is kept."""
        response = await self.client.get(path, headers={"Accept": "text/html"})
        assert response.status_code == status, (path, response.status_code, response.text)
        self.keep(response)
        return response

    def keep(self, response: httpx.Response) -> None:
        """Keep the token that the page's forms carry."""
        found = _TOKEN.search(response.text)
        if found is not None:
            self.csrf = found[1]

    async def post(self, path: str, status: int = 303, **fields: Any) -> httpx.Response:
        """Send a form; lists are repeated fields."""
        response = await self.client.post(path, data={"csrf_token": self.csrf} | fields)
        assert response.status_code == status, (path, response.status_code, response.text)
        self.keep(response)
        return response

    async def follow(self, response: httpx.Response) -> httpx.Response:
        """The page that a redirect leads to."""
        return await self.get(response.headers["location"])

    async def sign_in(self, email: str, password: str) -> None:
        """Begin a session in this browser."""
        await self.get("/login")
        await self.post("/login", email=email, password=password)
        await self.get("/dashboard/account")


@pytest.fixture
def pages(client: httpx.AsyncClient) -> Pages:  # noqa: F811
    """Somebody who has not signed in."""
    return Pages(client)


@pytest.fixture(scope="module")
def browser(service: Service) -> Iterator[Browser]:  # noqa: F811
    """Chromium; after the service, so that it is closed before it."""
    executable = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
    if executable is None:
        pytest.fail("the dashboard's tests need Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


class Visitor:
    """A person with a browser window of their own; ends the test on any error in the page's console."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.context: BrowserContext = browser.new_context(base_url=url, **options)
        self.context.set_default_timeout(10_000)
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))

    def _console(self, message: ConsoleMessage) -> None:
        # Chromium writes each answer of 400 and above to the console; the tests look at those themselves.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def sign_in(self, email: str, password: str) -> None:
        """By the form, as everybody."""
        self.page.goto("/login")
        self.page.get_by_label("E-mail address").fill(email)
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.wait_for_url("**/dashboard/**")

    def close(self) -> None:
        """Fails if the pages had errors."""
        self.context.close()
        assert not self.problems, self.problems


@pytest.fixture
def visit(browser: Browser, service: Service) -> Iterator[Any]:  # noqa: F811
    """Makes visitors; takes what a browser's context does: viewport, color_scheme, java_script_enabled, locale."""
    made: list[Visitor] = []

    def make(**options: Any) -> Visitor:
        made.append(Visitor(browser, service.url, **({"locale": "en-GB"} | options)))
        return made[-1]

    yield make
    for visitor in made:
        visitor.close()


@pytest.fixture(scope="module")
def member(service: Service) -> Api:  # noqa: F811
    """Somebody with an organization, for a module; signed in at the API."""
    return register(service.port)


AXE = Path(__file__).parents[1] / "clients" / "js" / "node_modules" / "axe-core" / "axe.min.js"


def check_accessibility(page: Page) -> None:
    """No violation of level serious or above, by axe-core."""
    if not AXE.exists():
        pytest.fail("axe-core is missing: `make test` installs it (npm ci in tests/clients/js)")
    # Not as a script element, which the page's own policy refuses.
    page.evaluate(AXE.read_text() + "; null")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    serious = [
        (violation["id"], violation["impact"], [node["html"][:200] for node in violation["nodes"]])
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    assert not serious, serious
