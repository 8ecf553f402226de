"""The HTTP API's frame: endpoints, who asks, what they may, bodies, errors, the envelope.

A route is a function with a decorator; the decorator's registry is all there is: the application, the OpenAPI
document and the tests of every role on every route are made from it.

    @endpoint("POST", "/api/organizations/{org_id}/api-keys", permission="api_keys.create", body=CreateApiKey,
              status=201, summary="Create an API key", tags=["API keys"])
    async def create(request: ApiRequest, body: CreateApiKey) -> object: ...

What it returns becomes `data` of the envelope; a `Reply` says more; a Starlette response is sent as it is.
"""

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from control.database import Database, DatabaseAway
from control.roles import PERMISSIONS, allows
from control.tokens import InvalidToken, Tokens
from redisgate import tracing
from redisgate.config import ControlSettings, Settings
from redisgate.counters import METHODS, WORKER

if TYPE_CHECKING:
    from control.audit import Actor, Audit
    from control.encryption import Encryption
    from control.instance_tokens import InstanceTokens
    from control.mailer import Mailer
    from control.passwords import Passwords
    from control.throttle import Throttle

SESSION_COOKIE: Final = "redisgate_session"
MAX_PAGE_LIMIT: Final = 100
"""Items on one page of a list."""
MAX_BODY_BYTES: Final = 1024 * 1024
"""Of a request's body, else 413."""
NAME_PATTERN: Final = r"^[^\s\x00-\x1f\x7f-\x9f](?:[^\x00-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f])?$(?!\n)"
"""Of the names that people give to things: one line that looks as it is."""
MAX_PAGE: Final = 1_000_000
NO_ROUTE: Final = "none"
"""What metrics call addresses at which there is nothing."""
RETRY_SECONDS: Final = 2
"""After which a client tries again when PostgreSQL is away."""

SPECIAL_PERMISSIONS: Final = ("public", "session", "admin")
"""Anybody; any person who signed in; administrators of the platform. Everything else is in `control.roles`."""
ADMINISTRATORS_MAY: Final = frozenset({"quota.update"})
"""What administrators of the platform may do in organizations they do not belong to, beside reading."""

_SAFE_METHODS = ("GET", "HEAD")
_GIVES_ALL = ("instances.credentials", "instances.rotate", "instances.create", "instances.backup", "instances.load")
"""Permissions that give an instance's tokens, or all of its data: more than a narrowed API key is to reach."""
_PARAMETER = re.compile(r"\{([a-z_]+)\}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

_NOT_MIGRATED = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError)

log = logging.getLogger(__name__)


# Errors: each becomes an answer in the envelope


class Said(str):
    """A sentence in English, as the API has it, that pages have in the reader's language: `common.said_<key>`."""

    __slots__ = ("key", "values")

    def __new__(cls, key: str, english: str, **values: object) -> "Said":
        """`english` is what the English catalogue has under this key."""
        made = super().__new__(cls, english.format_map(values) if values else english)
        made.key, made.values = key, values
        return made

    key: str
    values: dict[str, object]


class ApiError(Exception):
    """An answer that is no success. The message says what to do about it."""

    def __init__(
        self, status: int, message: str, data: object = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.data = data
        self.headers = dict(headers or {})


class BadRequest(ApiError):
    """The request is wrong; `fields` says what is wrong with each."""

    def __init__(
        self, message: str = Said("fields", "some fields are wrong"), fields: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(400, message, {"fields": dict(fields)} if fields else None)


class Unauthorized(ApiError):
    """Nobody known asks."""

    def __init__(self, message: str = "sign in: a valid Authorization: Bearer token is needed") -> None:
        super().__init__(401, message, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(ApiError):
    """Who asks may not."""

    def __init__(self, message: str, data: object = None) -> None:
        super().__init__(403, message, data)


class NotFound(ApiError):
    """It does not exist, or not for who asks."""

    def __init__(self, message: str = "not found") -> None:
        super().__init__(404, message)


class Conflict(ApiError):
    """It cannot be, because of what there is already."""

    def __init__(self, message: str, data: object = None) -> None:
        super().__init__(409, message, data)


class QuotaExceeded(ApiError):
    """The organization has used up what it may; `data` has the numbers."""

    def __init__(self, message: str, data: object = None) -> None:
        super().__init__(403, message, data)


class TooManyRequests(ApiError):
    """Not now; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(429, message, headers={"Retry-After": str(max(1, int(retry_after + 0.999)))})


class Unavailable(ApiError):
    """Something that is needed is away; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: float = RETRY_SECONDS) -> None:
        super().__init__(503, message, headers={"Retry-After": str(max(1, int(retry_after + 0.999)))})


# What endpoints work with


@dataclass(eq=False)
class Context:
    """What the business functions need: one per process, made by `control.app.make_context`."""

    gateway_settings: Settings
    database: Database
    tokens: Tokens
    instance_tokens: "InstanceTokens"
    passwords: "Passwords"
    mailer: "Mailer"
    throttle: "Throttle"
    audit: "Audit"
    encryption: "Encryption"
    clock: Callable[[], float] = time.time
    extra: dict[str, Any] = field(default_factory=dict)
    """What modules keep for the life of the process, under their own names."""

    @property
    def settings(self) -> ControlSettings:
        """The control plane's settings."""
        return self.gateway_settings.control

    def now(self) -> datetime:
        """This moment, in UTC."""
        return datetime.fromtimestamp(self.clock(), UTC)

    async def close(self) -> None:
        """End what the context holds; mails that wait have a second to leave."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.mailer.flush(), 1.0)
        self.passwords.close()
        await self.database.close()


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. `kind` is "user" (a session), "api_key", or None for nobody."""

    kind: str | None = None
    user_id: UUID | None = None
    session_id: UUID | None = None
    api_key_id: UUID | None = None
    organization_id: UUID | None = None
    """The organization that the path names, or the one that an API key belongs to."""
    role: str | None = None
    """In the organization that the path names."""
    is_admin: bool = False
    """Of the platform. An API key never is."""
    looks_in: bool = False
    """An administrator of the platform in an organization that they do not belong to."""
    scopes: tuple[str, ...] | None = None
    """Of an API key."""
    instance_ids: tuple[UUID, ...] | None = None
    """Of an API key: the instances that it is for; None: all of its organization."""
    narrowed: bool = False
    """Of an API key: an instance's own token may do more on the instance than it."""
    name: str | None = None
    """What logs call it."""


class ApiRequest:
    """One request to an endpoint."""

    def __init__(self, request: Request, endpoint: "Endpoint", context: Context, request_id: str) -> None:
        self.raw = request
        self.endpoint = endpoint
        self.context = context
        self.request_id = request_id
        self.principal = Principal()
        self.path: dict[str, Any] = {}
        """Parameters of the path; those whose names end in `_id` are UUIDs."""
        self.parameters: Any = None
        """The query as the endpoint's `query` type."""

    @property
    def query(self) -> Mapping[str, str]:
        """The query as it came; of a repeated name the last."""
        return self.raw.query_params

    @property
    def user_id(self) -> UUID:
        """Of the person who asks, or for whom an API key acts."""
        assert self.principal.user_id is not None, "a public endpoint has no user"
        return self.principal.user_id

    @property
    def organization_id(self) -> UUID:
        """That the path names."""
        found: UUID = self.path["org_id"]
        return found

    @cached_property
    def client_address(self) -> str:
        """The address of who asks, past the proxies that are trusted."""
        peer = self.raw.client.host if self.raw.client is not None else ""
        forwarded = self.raw.headers.getlist("x-forwarded-for")
        return forwarded_address(peer, ", ".join(forwarded), self.context.settings.trusted_proxies)

    @property
    def user_agent(self) -> str:
        """What the client calls itself; at most 200 characters."""
        return self.raw.headers.get("user-agent", "")[:200].replace("\0", "")

    @cached_property
    def is_secure(self) -> bool:
        """Whether the client came by TLS."""
        if self.context.settings.public_url.startswith("https://") or self.raw.scope["scheme"] == "https":
            return True
        peer = self.raw.client.host if self.raw.client is not None else ""
        trusted = _in_networks(peer, self.context.settings.trusted_proxies)
        return trusted and self.raw.headers.get("x-forwarded-proto", "").lower() == "https"

    def paging(self) -> tuple[int, int]:
        """`page` (from 1) and `limit` of a list's query. Raises BadRequest."""
        fields: dict[str, str] = {}
        page = _whole_number(self.query.get("page"), 1, MAX_PAGE, 1, "page", fields)
        limit = _whole_number(self.query.get("limit"), 1, MAX_PAGE_LIMIT, 20, "limit", fields)
        if fields:
            raise BadRequest("some parameters of the query are wrong", fields)
        return page, limit

    def actor(self) -> "Actor":
        """Who acts, for the audit log."""
        from control.audit import Actor

        principal = self.principal
        return Actor(
            self.context.audit,
            principal.kind or "anonymous",
            principal.api_key_id or principal.user_id,
            principal.name,
            self.client_address or None,
            self.request_id,
            self.path.get("org_id") or principal.organization_id,
        )


@dataclass
class Reply:
    """An answer with more to it than its data."""

    data: object = None
    message: str | None = None
    status: int | None = None
    headers: Sequence[tuple[str, str]] = ()


def page(items: Sequence[object], total: int, page: int, limit: int) -> dict[str, object]:
    """A page of a list, as every list looks."""
    return {
        "items": list(items),
        "total_count": total,
        "page": page,
        "limit": limit,
        "total_pages": -(-total // limit),
    }


def session_cookie(request: ApiRequest, token: str, max_age: float) -> tuple[str, str]:
    """The header that keeps a session in a browser; an empty token ends it."""
    secure = "; Secure" if request.is_secure else ""
    age = int(max_age) if token else 0
    return "Set-Cookie", f"{SESSION_COOKIE}={token}; Path=/; HttpOnly; SameSite=Lax; Max-Age={age}{secure}"


# The registry

Handler = Callable[..., Awaitable[object]]
SomeHandler = TypeVar("SomeHandler", bound=Handler)


@dataclass(frozen=True, eq=False)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    permission: str
    handler: Handler
    body: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    response: Any = None
    """The type of `data`, for the documentation."""
    listing: bool = False
    """A list with `page` and `limit`; `response` is the type of an item."""
    status: int = 200
    summary: str = ""
    tags: tuple[str, ...] = ()
    message: str = ""
    """What the envelope says by default."""
    content_type: str = "application/json"
    enveloped: bool = True
    """False: the handler's own response is the answer."""
    takes: str = ""
    """The content type of a body that is no JSON, which the handler reads itself."""

    @property
    def parameters(self) -> list[str]:
        """Names in the path, in order."""
        return _PARAMETER.findall(self.path)

    @property
    def description(self) -> str:
        """The handler's docstring."""
        return " ".join((self.handler.__doc__ or "").split())

    @property
    def name(self) -> str:
        """Unique among all: for the documentation."""
        return f"{self.handler.__module__.rpartition('.')[2]}_{self.handler.__name__}"

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


ENDPOINTS: Final[dict[tuple[str, str], Endpoint]] = {}
"""By path and method."""


def endpoint(
    method: str,
    path: str,
    *,
    permission: str,
    body: type[msgspec.Struct] | None = None,
    query: type[msgspec.Struct] | None = None,
    response: Any = None,
    listing: bool = False,
    status: int = 200,
    summary: str,
    tags: Sequence[str] = (),
    message: str = "",
    content_type: str = "application/json",
    enveloped: bool = True,
    takes: str = "",
) -> Callable[[SomeHandler], SomeHandler]:
    """Make the decorated function answer `method` on `path`; see the module."""
    if permission not in SPECIAL_PERMISSIONS:
        if permission not in PERMISSIONS:
            raise ValueError(f"{method} {path}: there is no permission {permission!r} in control.roles")
        if "{org_id}" not in path:
            raise ValueError(f"{method} {path}: {permission} is held in an organization, so the path has {{org_id}}")

    def register(handler: SomeHandler) -> SomeHandler:
        if (path, method) in ENDPOINTS:
            raise ValueError(f"{method} {path} is registered twice")
        ENDPOINTS[path, method] = Endpoint(
            method=method,
            path=path,
            permission=permission,
            handler=handler,
            body=body,
            query=query,
            response=response,
            listing=listing,
            status=status,
            summary=summary,
            tags=tuple(tags),
            message=message,
            content_type=content_type,
            enveloped=enveloped and content_type == "application/json",
            takes=takes,
        )
        return handler

    return register


# Answering


async def answer(request: Request, endpoints: Mapping[str, Endpoint], context: Context) -> Response:
    """Answer a request to a path whose endpoints are these, by method."""
    identifier = request_id(request)

    async def work() -> Response:
        chosen = endpoints.get("GET" if request.method == "HEAD" else request.method)
        if chosen is None:
            allowed = sorted({*endpoints, *(("HEAD",) if "GET" in endpoints else ())})
            raise ApiError(405, f"use {' or '.join(allowed)} here", headers={"Allow": ", ".join(allowed)})
        result = await _call(ApiRequest(request, chosen, context, identifier))
        return result if isinstance(result, Response) else _success(chosen, result)

    async def failed(error: ApiError) -> Response:
        return failure(error)

    response = await answered(request, work, failed)
    response.headers.setdefault("X-Request-Id", identifier)
    response.headers.setdefault("Cache-Control", "no-store")
    return response


async def answered(
    request: Request,
    work: Callable[[], Awaitable[Response]],
    failed: Callable[[ApiError], Awaitable[Response]],
    *,
    away: str = "the database is not available at the moment; try again",
) -> Response:
    """The answer that `work` makes; `failed` makes one of what went wrong, `away` says that PostgreSQL is."""
    try:
        return await work()
    except ApiError as error:
        return await failed(error)
    except DatabaseAway as error:
        WORKER.database_errors += 1
        log.warning("%s %s: %s", request.method, request.url.path, error)
        return await failed(Unavailable(away))
    except ClientDisconnect:
        return Response(status_code=400)
    except Exception as error:
        return await failed(unexpected(error, request))


async def measured(request: Request, route: str | None, answering: Awaitable[Response]) -> Response:
    """The answer; metrics and trace know it by its route, None where there is nothing."""
    began = time.perf_counter_ns()
    method = request.method if request.method.encode() in METHODS else "other"

    def count(status: int) -> None:
        WORKER.control_answered(route or NO_ROUTE, method, status, time.perf_counter_ns() - began)

    if route is not None:
        tracing.name_route(request.method, route)
    try:
        response = await answering
    except Exception:
        count(500)  # which is what the server makes of it
        raise
    count(response.status_code)
    return response


def unexpected(error: Exception, request: Request) -> ApiError:
    """What to answer when something went wrong that nobody thought of; it is in the log, under a reference."""
    from control.passwords import TooBusy

    if isinstance(error, TooBusy):
        return Unavailable("too many people sign in at the moment; try again")
    if isinstance(error, _NOT_MIGRATED):
        log.error("%s %s: the database lacks migrations: %s", request.method, request.url.path, error)
        return Unavailable("the database is being brought up to date; try again")
    reference = secrets.token_hex(6)
    log.error("internal error %s: %s %s", reference, request.method, request.url.path, exc_info=error)
    return ApiError(500, f"internal error, reference {reference}; it is in the log")


async def admit(request: ApiRequest) -> None:
    """Find out who asks for what, and whether they may. Raises Unauthorized, NotFound, Forbidden."""
    if request.endpoint.permission != "public":
        request.principal = await authenticate(request)
    request.path = _path(request.endpoint, request.raw.path_params)
    try:
        await _authorize(request)
    except Forbidden:
        await _record_refusal(request)
        raise


async def _call(request: ApiRequest) -> object:
    await admit(request)
    chosen = request.endpoint
    if chosen.query is not None:
        request.parameters = read_query(chosen.query, request.raw)
    if chosen.body is None:
        return await chosen.handler(request)
    body = await request.raw.body()
    if len(body) > MAX_BODY_BYTES:
        raise ApiError(413, f"the body has {len(body)} bytes; at most {MAX_BODY_BYTES} are taken here")
    return await chosen.handler(request, parse_body(chosen.body, body))


async def authenticate(request: ApiRequest) -> Principal:
    """Who asks. Raises Unauthorized; Forbidden for a browser's request that another site made."""
    header = request.raw.headers.get("authorization")
    if header is not None:
        scheme, _, token = header.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized()
        return await _principal(request, token.strip())
    cookie = request.raw.cookies.get(SESSION_COOKIE)
    if cookie is None:
        raise Unauthorized()
    if request.raw.method not in _SAFE_METHODS and not same_origin(request.raw):
        raise Forbidden("a browser's session is taken from this site's own pages only")
    return await _principal(request, cookie, sessions_only=True)


async def _principal(request: ApiRequest, token: str, *, sessions_only: bool = False) -> Principal:
    tokens = request.context.tokens
    try:
        session = tokens.verify_session(token)
    except InvalidToken:
        if sessions_only:
            raise Unauthorized() from None
        return await _api_key(request, token)
    row = await request.context.database.fetchrow(
        "SELECT u.is_admin, u.email FROM sessions s JOIN users u ON u.id = s.user_id"
        " WHERE s.id = $1 AND s.user_id = $2 AND s.revoked_at IS NULL AND s.ends_at > now() AND u.disabled_at IS NULL",
        session.session_id,
        session.user_id,
    )
    if row is None:
        raise Unauthorized("this session has ended; sign in again")
    return Principal(
        "user",
        user_id=session.user_id,
        session_id=session.session_id,
        is_admin=row["is_admin"],
        name=row["email"],
    )


async def _api_key(request: ApiRequest, token: str) -> Principal:
    from control.api_keys import digest

    try:
        claims = request.context.tokens.verify_api_key(token)
    except InvalidToken:
        raise Unauthorized() from None
    row = await request.context.database.fetchrow(
        "SELECT k.id, k.user_id, k.organization_id, k.name, k.prefix, k.scopes, k.instance_ids, k.networks,"
        " k.key_prefixes, k.requests_per_second, k.commands_per_day"
        " FROM api_keys k JOIN users u ON u.id = k.user_id WHERE k.id = $1 AND k.digest = $2 AND k.revoked_at IS NULL"
        " AND k.expires_at > now() AND (k.valid_until IS NULL OR k.valid_until > now()) AND u.disabled_at IS NULL",
        claims.api_key_id,
        digest(token),
    )
    if row is None:
        raise Unauthorized("this API key is revoked or has expired")
    if row["networks"] and not _in_networks(request.client_address, row["networks"]):
        raise Forbidden("this API key is not accepted from your address")
    collector = request.context.extra.get("usage")
    if collector is not None:
        collector.note_use(row["id"], _address(request.client_address))
    return Principal(
        "api_key",
        user_id=row["user_id"],
        api_key_id=row["id"],
        organization_id=row["organization_id"],
        scopes=tuple(row["scopes"]),
        instance_ids=None if row["instance_ids"] is None else tuple(row["instance_ids"]),
        narrowed=_is_narrowed(row),
        name=f"{row['prefix']} ({row['name']})",
    )


def _is_narrowed(row: Any) -> bool:
    """Whether an instance's own token may do more on it than this API key."""
    scopes = set(row["scopes"])
    return bool(
        row["key_prefixes"]
        or row["networks"]
        or row["requests_per_second"] is not None
        or row["commands_per_day"] is not None
        or ("read" in scopes and "write" not in scopes)
        or any(scope[:1] in ("+", "-") for scope in scopes)
    )


async def _authorize(request: ApiRequest) -> None:
    """Whether who asks may. Raises NotFound, Forbidden."""
    permission, principal = request.endpoint.permission, request.principal
    if permission == "public":
        return
    if permission in ("session", "admin"):
        if principal.kind != "user":
            raise Forbidden("an API key cannot do this; sign in as a person")
        if permission == "admin" and not principal.is_admin:
            raise Forbidden(Said("administrators", "only administrators of the platform may do this"))
        return
    organization_id: UUID = request.path["org_id"]
    role = None
    if principal.kind == "user" or principal.organization_id == organization_id:
        role = await request.context.database.fetchval(
            "SELECT m.role FROM memberships m JOIN organizations o ON o.id = m.organization_id"
            " WHERE m.organization_id = $1 AND m.user_id = $2 AND o.deleted_at IS NULL",
            organization_id,
            principal.user_id,
        )
    if role is None and principal.is_admin and await _exists(request, organization_id):
        if not PERMISSIONS[permission].reads and permission not in ADMINISTRATORS_MAY:
            raise Forbidden("administrators of the platform may read here, and set quotas; this is for members")
        role, principal = "admin", dataclasses.replace(principal, looks_in=True)
    if role is None:
        raise NotFound(Said("no_organization", "there is no such organization"))
    if not allows(role, permission):
        needed = PERMISSIONS[permission].role
        raise Forbidden(Said("role", "your role here is {role}; this needs {needed}", role=role, needed=needed))
    if principal.scopes is not None and PERMISSIONS[permission].people:
        raise Forbidden("an API key cannot do this; sign in as a person")
    if principal.scopes is not None and not allows(role, permission, principal.scopes):
        raise Forbidden(f"this API key lacks the scope {permission}")
    if principal.narrowed and permission in _GIVES_ALL:
        raise Forbidden("this API key is narrowed, and this gives all of an instance: use another key, or sign in")
    if principal.instance_ids is not None and request.path.get("instance_id") not in (None, *principal.instance_ids):
        raise NotFound(Said("no_instance", "there is no such instance"))
    request.principal = dataclasses.replace(principal, organization_id=organization_id, role=role)


async def _record_refusal(request: ApiRequest) -> None:
    """Put on record that somebody tried what they may not; reading is not recorded, refused or not."""
    from control import audit

    permission = request.endpoint.permission
    if permission == "session" or request.raw.method in _SAFE_METHODS:
        return
    name, value = next(reversed(request.path.items()), ("route", request.endpoint.path))
    target = ({"org_id": "organization", "key_id": "api_key"}.get(name, name.removesuffix("_id")), value)
    async with request.context.database.transaction() as connection:
        action = "platform.administer" if permission == "admin" else permission
        await audit.record(connection, request, action, target, outcome="denied")


async def _exists(request: ApiRequest, organization_id: UUID) -> bool:
    found = await request.context.database.fetchval(
        "SELECT true FROM organizations WHERE id = $1 AND deleted_at IS NULL", organization_id
    )
    return found is True


def same_origin(request: Request) -> bool:
    """Whether a browser says that its request comes from our own pages."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == request.headers.get("host", "").lower()


# Input


def _path(chosen: Endpoint, found: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in chosen.parameters:
        values[name] = text = str(found[name])
        if name.endswith("_id"):
            if _UUID.fullmatch(text) is None:
                raise NotFound(f"there is no such {_readable(name)}")
            values[name] = UUID(text)
        elif "\0" in text:
            raise NotFound()
    return values


def _readable(name: str) -> str:
    return {"org": "organization"}.get(name[:-3], name[:-3].replace("_", " "))


def _whole_number(text: str | None, low: int, high: int, default: int, name: str, fields: dict[str, str]) -> int:
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        fields[name] = f"expected a whole number from {low} to {high}"
        return default
    return int(text)


def read_query(kind: type[msgspec.Struct], request: Request) -> Any:
    """The query as its type. Raises BadRequest, which names each parameter that is wrong."""
    values: dict[str, str] = dict(request.query_params)
    return _convert(kind, values, "some parameters of the query are wrong", strict=False, ignore_unknown=True)


def parse_body(kind: type[msgspec.Struct], body: bytes) -> Any:
    """A JSON body as its type. Raises BadRequest, which names each field that is wrong."""
    if not body:
        document: Any = {}
    else:
        try:
            document = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        except RecursionError as error:
            raise BadRequest("the body is nested too deeply") from error
    if not isinstance(document, dict):
        raise BadRequest("the body is not a JSON object")
    return _convert(kind, document, "some fields are wrong", strict=True, ignore_unknown=False)


def convert_body(kind: type[msgspec.Struct], values: dict[str, Any]) -> Any:
    """A form's fields, which are text, as the type of a body. Raises BadRequest, which names each field."""
    return _convert(kind, values, Said("fields", "some fields are wrong"), strict=False, ignore_unknown=False)


def _convert(
    kind: type[msgspec.Struct], values: dict[str, Any], message: str, *, strict: bool, ignore_unknown: bool
) -> Any:
    fields: dict[str, str] = {}
    known = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name, value in values.items():
        if name not in known:
            if not ignore_unknown and kind.__struct_config__.forbid_unknown_fields:
                fields[name] = "there is no such field"
            continue
        if _has_nul(value):
            fields[name] = "must not contain the character NUL"
            continue
        try:
            msgspec.convert(value, known[name].type, strict=strict)
        except msgspec.ValidationError as error:
            fields[name] = _wrong(error)
    for name, one in known.items():
        if one.required and name not in values:
            fields[name] = Said("required", "is required")
    if fields:
        raise BadRequest(message, fields)
    try:
        return msgspec.convert({name: values[name] for name in values if name in known}, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise BadRequest(_wrong(error)) from error


_BOUND: Final = re.compile(r" ([<>]=?) (-?\d+)\b")
_TOLD_BOUND: Final = re.compile(r"expected (?:str( of a length)|int) of at (least|most) (.+)")
_NO_NAME: Final = Said("no_name", "must have no control characters, and no white space at its beginning or end")
_NOT_SO: Final = Said("not_so", "has characters, or an order of them, that are not permitted here")
_SIZES: Final = ((30, "GiB"), (20, "MiB"))


def _wrong(error: msgspec.ValidationError) -> str:
    text, _, at = str(error).partition(" - at `$")
    where = at.rstrip("`").lstrip(".")
    text = text.replace("`", "").replace(" of length >= ", " of a length of at least ")
    text = text.replace(" of length <= ", " of a length of at most ")
    text = _BOUND.sub(_in_words, text)
    if " matching regex " in text:
        text = _NO_NAME if NAME_PATTERN in text or repr(NAME_PATTERN) in text else _NOT_SO
    if text in (_NO_NAME, _NOT_SO) and not where:
        return text
    text = text[:1].lower() + text[1:]
    if where:
        return f"{text} (at {where})"
    bound = _TOLD_BOUND.fullmatch(text)
    if bound is not None:
        length = bound[1] is not None
        key = {"least": "too_short", "most": "too_long"} if length else {"least": "too_small", "most": "too_large"}
        return Said(key[bound[2]], text.replace(bound[3], "{bound}"), bound=bound[3])
    return text


def _in_words(found: re.Match[str]) -> str:
    words = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}[found[1]]
    number = int(found[2])
    size = next(((number >> bits, unit) for bits, unit in _SIZES if number >> bits and not number % (1 << bits)), None)
    return f" of {words} {number}" + (f" ({size[0]} {size[1]})" if size is not None else "")


def _has_nul(value: Any) -> bool:
    # PostgreSQL stores no NUL in text.
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, list):
        return any(_has_nul(item) for item in value)
    if isinstance(value, dict):
        return any(_has_nul(name) or _has_nul(item) for name, item in value.items())
    return False


def forwarded_address(peer: str, forwarded: str, trusted: Sequence[str]) -> str:
    """The client's address: the last of X-Forwarded-For that no trusted proxy has, if `peer` is a trusted proxy."""
    address = peer
    for hop in reversed([hop.strip() for hop in forwarded.split(",")] if forwarded else []):
        if not _in_networks(address, trusted):
            break
        try:
            address = str(ipaddress.ip_address(hop.strip("[]")))
        except ValueError:
            break
    return address


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(text)
    return None


def _in_networks(address: str, networks: Sequence[Any]) -> bool:
    """Whether the address is in one of the networks; an IPv4 address in IPv6 clothes counts as IPv4."""
    if not networks:
        return False
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return any(found in ipaddress.ip_network(str(network), strict=False) for network in networks)


# Output


def request_id(request: Request) -> str:
    """That the client brought, else a new one."""
    brought = request.headers.get("x-request-id", "")
    return brought if _REQUEST_ID.fullmatch(brought) else secrets.token_hex(8)


def _success(chosen: Endpoint, result: object) -> Response:
    reply = result if isinstance(result, Reply) else Reply(result)
    status = reply.status or chosen.status
    if status == 204:
        response = Response(status_code=204)
    else:
        data = _shaped(chosen, reply.data)
        response = envelope(status, True, data, reply.message if reply.message is not None else chosen.message)
    for name, value in reply.headers:
        response.headers.append(name, value)
    return response


def _shaped(chosen: Endpoint, data: object) -> object:
    """What leaves is what the endpoint declares, and not a column more."""
    if chosen.response is None or data is None:
        return data
    kind = chosen.response
    if chosen.listing:
        assert isinstance(data, dict)
        return data | {"items": _as(list[kind], data["items"])}  # type: ignore[valid-type]
    return _as(kind, data)


def _as(kind: Any, data: object) -> object:
    return msgspec.json.decode(msgspec.json.encode(data, enc_hook=_encode), type=kind)


def failure(error: ApiError) -> Response:
    """The answer that an error is."""
    response = envelope(error.status, False, error.data, error.message)
    for name, value in error.headers.items():
        response.headers[name] = value
    return response


def envelope(status: int, success: bool, data: object, message: str) -> Response:
    """Every JSON answer of the control plane."""
    moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    document = {"success": success, "data": data, "message": message, "timestamp": moment}
    return Response(msgspec.json.encode(document, enc_hook=_encode), status, media_type="application/json")


_AS_TEXT = (
    Said,
    ipaddress.IPv4Address,
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
    ipaddress.IPv4Interface,
    ipaddress.IPv6Interface,
)


def _encode(value: Any) -> Any:
    if isinstance(value, _AS_TEXT):
        return str(value)
    if hasattr(value, "items"):
        return dict(value.items())  # a row of the database, a mapping
    raise TypeError(f"{type(value).__name__} is nothing to send")
