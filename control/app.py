"""The control plane as one ASGI application: every endpoint that the route modules register."""

import importlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from control import http, pages, settings
from control.audit import Audit
from control.database import Database
from control.encryption import Encryption
from control.http import ENDPOINTS, ApiError, Context, Endpoint, failure
from control.instance_tokens import InstanceTokens
from control.mailer import make_mailer
from control.passwords import Passwords
from control.throttle import Throttle
from control.tokens import Tokens
from redisgate.config import Settings

ROUTE_MODULES: Final = (
    "service",
    "auth",
    "organizations",
    "quota",
    "audit",
    "api_keys",
    "usage",
    "instances",
    "console",
    "admin",
)
"""Of `control.routes`; importing one registers its endpoints."""
PAGE_MODULES: Final = (
    "sign_in",
    "account",
    "overview",
    "keys",
    "instances",
    "members",
    "quota",
    "audit_log",
    "settings",
    "admin",
    "console",
)
"""Of `control.dashboard`; importing one registers its pages."""
STATIC_ROUTE: Final = "/static/{version}/{path:path}"
Answer = Callable[[Request, Mapping[str, Endpoint], Context], Awaitable[Response]]

MAX_WAITING_PASSWORDS: Final = 256
"""Sign-ins of one worker that wait for a thread; more are told to come again."""


def make_context(configured: Settings, *, name: str = "redisgate") -> Context:
    """What the business functions need, for one process and event loop; `name` is what PostgreSQL calls it.

    Nothing is connected yet. The caller closes it.
    """
    control = configured.control
    secrets = settings.secret_keys(configured)
    database = Database(
        control.database_url, control.database_direct_url, pool_size=control.database_pool_size, name=name
    )
    return Context(
        configured,
        database,
        Tokens(secrets),
        InstanceTokens(secrets),
        Passwords(
            time_cost=control.argon2_time_cost,
            memory_kib=control.argon2_memory // 1024,
            parallelism=control.argon2_parallelism,
            threads=control.argon2_threads,
            max_waiting=MAX_WAITING_PASSWORDS,
        ),
        make_mailer(configured),
        Throttle(secrets),
        Audit(settings.audit_keys(configured)),
        Encryption(settings.encryption_keys(configured)),
    )


def load_endpoints() -> dict[str, dict[str, Endpoint]]:
    """Every endpoint there is, by path and method."""
    for name in ROUTE_MODULES:
        importlib.import_module(f"control.routes.{name}")
    return _by_path(ENDPOINTS)


def load_pages() -> dict[str, dict[str, Endpoint]]:
    """Every page of the dashboard, by path and method."""
    for name in PAGE_MODULES:
        importlib.import_module(f"control.dashboard.{name}")
    return _by_path(pages.PAGES)


def prepare() -> None:
    """Load all that a worker serves, before workers are forked: they share it, and serve from their first request."""
    load_endpoints()
    load_pages()
    pages.prepare()


def _by_path(entries: dict[tuple[str, str], Endpoint]) -> dict[str, dict[str, Endpoint]]:
    found: defaultdict[str, dict[str, Endpoint]] = defaultdict(dict)
    for (path, method), entry in entries.items():
        found[path][method] = entry
    return dict(found)


class _Path:
    """All methods of one path, as an ASGI application; `answer` is that of the API or of the pages."""

    def __init__(self, answer: Answer, endpoints: dict[str, Endpoint], context: Context) -> None:
        self._answer = answer
        self._endpoints = endpoints
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        route = next(iter(self._endpoints.values())).path
        answering = self._answer(request, self._endpoints, self._context)
        response = await http.measured(request, route, answering)
        await response(scope, receive, send)


async def _static(request: Request) -> Response:
    return await http.measured(request, STATIC_ROUTE, pages.static(request))


async def _not_found(request: Request, error: Exception) -> Response:
    return await http.measured(request, None, _nothing_here(request))


async def _nothing_here(request: Request) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        return await pages.not_found(request, request.app.state.context)
    return failure(ApiError(404, "there is nothing at this address; see /docs for what there is"))


def _ordered(found: dict[str, dict[str, Endpoint]]) -> list[tuple[str, dict[str, Endpoint]]]:
    # A path without parameters goes before one with: "/sessions/current" is no "{session_id}".
    return sorted(found.items(), key=lambda item: [part.startswith("{") for part in item[0].split("/")])


def make_app(context: Context) -> Starlette:
    """The application over a context, which it does not close."""
    routes = [Route(path, _Path(http.answer, endpoints, context)) for path, endpoints in _ordered(load_endpoints())]
    routes += [Route(path, _Path(pages.answer, endpoints, context)) for path, endpoints in _ordered(load_pages())]
    routes.append(Route(STATIC_ROUTE, _static))
    app = Starlette(routes=routes, exception_handlers={404: _not_found})
    app.router.redirect_slashes = False
    app.state.context = context
    return app
