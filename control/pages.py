"""The dashboard's frame: pages, forms, who asks, messages that outlive a redirect, languages, static files.

A page is a function with a decorator, as an endpoint of the API is (`control.http`), with the same permissions; it
calls the same functions underneath.

    @page("GET", "/dashboard/{org_id}/keys", permission="api_keys.read")
    async def keys(request: PageRequest) -> Response: ...

Pages take a session's cookie only. Each form that changes something carries a token that is bound to the session; no
page contains a script or a style of its own, and the Content-Security-Policy takes none.
"""

import base64
import functools
import gzip
import hashlib
import hmac
import json
import logging
import re
import secrets
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, quote, urlencode
from uuid import UUID

import jinja2
import msgspec
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response

from control import http
from control.database import DatabaseAway
from control.http import (
    SESSION_COOKIE,
    ApiError,
    ApiRequest,
    BadRequest,
    Context,
    Endpoint,
    Forbidden,
    Said,
    SomeHandler,
    Unauthorized,
)
from control.roles import PERMISSIONS, allows
from control.settings import secret_keys
from redisgate.units import NOTHING, bytes_text, number_text

FLASH_COOKIE: Final = "redisgate_flash"
FORM_COOKIE: Final = "redisgate_form"
"""Ties forms to a browser that has not signed in yet."""
LANGUAGE_COOKIE: Final = "redisgate_language"
CSRF_FIELD: Final = "csrf_token"
LANGUAGES: Final[dict[str, str]] = {"en": "English", "vi": "Tiếng Việt"}
MAX_FORM_FIELDS: Final = 1000
"""Of one form, else 400."""
MAX_FORM_BYTES: Final = http.MAX_BODY_BYTES
"""Of a form's text, else 413; only files may be larger, where a page takes files."""
MAX_PART_HEAD_BYTES: Final = 4096
"""Of what stands before the content of one field of a form with files, else 400."""
FLASH_SECONDS: Final = 60
"""For which a message waits for the page that shows it."""
MAX_SWITCHER: Final = 50
"""Organizations in the menu; the page of all organizations has the rest."""
LANGUAGE_SECONDS: Final = 365 * 86400
STATIC_SECONDS: Final = 365 * 86400
"""For which a browser keeps a static file; its address changes with its content."""

SECURITY_HEADERS: Final[dict[str, str]] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}

_TEXT_AREAS: Final = ("common", "account", "organization", "admin", "instances", "console")
_Body = TypeVar("_Body", bound=msgspec.Struct)

log = logging.getLogger(__name__)

_TAKES_FILES: Final = "multipart/form-data"

PAGES: Final[dict[tuple[str, str], Endpoint]] = {}
"""By path and method."""


def page(method: str, path: str, *, permission: str, files: bool = False) -> Callable[[SomeHandler], SomeHandler]:
    """Make the decorated function answer `method` on `path`; permissions are those of `control.http.endpoint`.

    With `files`, its form may carry some, as large as the gateway's own bound lets them be.
    """
    if permission not in http.SPECIAL_PERMISSIONS and (permission not in PERMISSIONS or "{org_id}" not in path):
        raise ValueError(f"{method} {path}: {permission!r} is no permission for it")

    def register(handler: SomeHandler) -> SomeHandler:
        if (path, method) in PAGES:
            raise ValueError(f"{method} {path} is registered twice")
        PAGES[path, method] = Endpoint(
            method, path, permission, handler, enveloped=False, takes=_TAKES_FILES if files else ""
        )
        return handler

    return register


class Form:
    """What a form posted: text by name, of a repeated name the last; `all` has each."""

    def __init__(self, fields: Sequence[tuple[str, str]] = ()) -> None:
        self._fields = list(fields)

    def get(self, name: str, default: str = "") -> str:
        """The last value of this name, without white space around it."""
        return next((value.strip() for key, value in reversed(self._fields) if key == name), default)

    def exact(self, name: str, default: str = "") -> str:
        """The last value of this name as it was typed: white space counts in data."""
        return next((value for key, value in reversed(self._fields) if key == name), default)

    def all(self, name: str) -> list[str]:
        """Each value of this name that is not empty."""
        return [value.strip() for key, value in self._fields if key == name and value.strip()]

    def has(self, name: str) -> bool:
        """Whether the form had it: a ticked box."""
        return any(key == name for key, _ in self._fields)

    def __bool__(self) -> bool:
        return bool(self._fields)


class PageRequest(ApiRequest):
    """A request for a page; `form` is what was posted."""

    def __init__(self, request: Request, endpoint: Endpoint, context: Context, request_id: str) -> None:
        super().__init__(request, endpoint, context, request_id)
        self.form = Form()
        self.files: dict[str, bytes] = {}
        """Files that a form posted, by the name of their field."""
        self.cookies: list[tuple[str, str]] = []
        """Headers that the answer will have."""

    @functools.cached_property
    def language(self) -> str:
        """That the person chose, else the first of the browser's that there is, else English."""
        chosen = self.raw.cookies.get(LANGUAGE_COOKIE)
        if chosen in LANGUAGES:
            return chosen
        accepted = self.raw.headers.get("accept-language", "")[:200]
        for part in accepted.split(","):
            code = part.partition(";")[0].strip().partition("-")[0].lower()
            if code in LANGUAGES:
                return code
        return "en"

    @property
    def texts(self) -> "Texts":
        """The catalogue in the person's language."""
        return texts(self.language)

    def body(self, kind: type[_Body], values: Mapping[str, Any] | None = None) -> _Body:
        """The form as the body of an endpoint of the API; `values` go before what was posted.

        Text that is empty counts as absent, lists are the repeated fields or the lines and commas of one.
        Raises BadRequest, which names each field that is wrong.
        """
        document: dict[str, Any] = {}
        for field in msgspec.structs.fields(kind):
            name = field.encode_name
            if values is not None and name in values:
                document[name] = values[name]
            elif self.form.has(name):
                given = _given(field.type, self.form, name)
                if given is not None:
                    document[name] = given
        converted: _Body = http.convert_body(kind, document)
        return converted

    # Forms are this site's own

    @functools.cached_property
    def _form_subject(self) -> str:
        if self.principal.session_id is not None:
            return f"session:{self.principal.session_id}"
        known = self.raw.cookies.get(FORM_COOKIE, "")
        if not re.fullmatch(r"[0-9a-f]{32}", known):
            known = secrets.token_hex(16)
            self.set_cookie(FORM_COOKIE, known, None)
        return f"browser:{known}"

    @property
    def csrf_token(self) -> str:
        """What a form of this session carries."""
        return _csrf_token(secret_keys(self.context.gateway_settings)[0], self._form_subject)

    def check_form(self) -> None:
        """Refuse what another site made a browser send. Raises Forbidden."""
        given = self.form.get(CSRF_FIELD) or self.raw.headers.get("x-csrf-token", "")
        right = [
            _csrf_token(secret, self._form_subject).encode() for secret in secret_keys(self.context.gateway_settings)
        ]
        matches = [hmac.compare_digest(given.encode(), token) for token in right]
        if not any(matches) or not http.same_origin(self.raw):
            raise Forbidden(self.texts("common.form_expired"))

    def set_cookie(self, name: str, value: str, max_age: int | None) -> None:
        """A cookie that scripts cannot read, on the answer; without `max_age` it ends with the browser."""
        age = "" if max_age is None else f"; Max-Age={max_age}"
        secure = "; Secure" if self.is_secure else ""
        self.cookies.append(("Set-Cookie", f"{name}={value}; Path=/; HttpOnly; SameSite=Lax{age}{secure}"))


def _csrf_token(secret: bytes, subject: str) -> str:
    return hmac.new(secret, b"redisgate form token\0" + subject.encode(), hashlib.sha256).hexdigest()


def _given(kind: Any, form: Form, name: str) -> Any:
    """A form's field as a JSON body would have it; None where nothing was given."""
    if _takes_list(kind):
        pieces = [piece.strip() for text in form.all(name) for piece in re.split(r"[\n,]", text)]
        return [piece for piece in pieces if piece]
    text = form.get(name)
    return text if text != "" else None


def _takes_list(kind: Any) -> bool:
    inner = getattr(kind, "__args__", ())
    origin = getattr(kind, "__origin__", None)
    return origin in (list, tuple, set) or any(_takes_list(one) for one in inner)


# Texts


class Texts:
    """The catalogue in one language: `texts("area.name", count=3)`; `count` chooses `name_one` where there is one."""

    def __init__(self, language: str, entries: Mapping[str, str]) -> None:
        self.language = language
        self._entries = entries

    def __call__(self, key: str, **values: Any) -> str:
        entry = self._entries.get(f"{key}_one") if values.get("count") == 1 else None
        entry = entry if entry is not None else self._entries[key]
        return entry.format_map(values) if values else entry

    def get(self, key: str, default: str) -> str:
        """The text where there is one, else the default: for names that come from elsewhere."""
        return self._entries.get(key, default)

    def rich(self, key: str, **values: Any) -> Markup:
        """With `code` and **strong** marked up, and nothing else."""
        text = str(escape(self._entries[key])).format_map({name: escape(value) for name, value in values.items()})
        text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
        return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text))

    def keys(self) -> set[str]:
        """Of all texts."""
        return set(self._entries)


@functools.cache
def texts(language: str) -> Texts:
    """The catalogue in this language."""
    entries: dict[str, str] = {}
    for area in _TEXT_AREAS:
        file = _templates() / "texts" / language / f"{area}.toml"
        if file.is_file():
            _flatten(tomllib.loads(file.read_text("utf-8")), "", entries)
    return Texts(language, entries)


def _flatten(table: Mapping[str, Any], prefix: str, into: dict[str, str]) -> None:
    for name, value in table.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{name}.", into)
        else:
            into[prefix + name] = value


# Rendering


@functools.cache
def _templates() -> Path:
    installed = Path(__file__).parent / "templates"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "templates"


@functools.cache
def environment() -> jinja2.Environment:
    """The templates; what they do not know is an error, what they show is escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_templates()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {"bytes": bytes_text, "number": number_text, "moment": _moment, "query": urlencode}
    made.globals |= {"static": static_url, "languages": LANGUAGES}
    return made


def prepare() -> None:
    """Read and compile everything that pages are made of: a supervisor does it once for all of its workers.

    A worker would do so at the first request for each page, and answer nobody else meanwhile.
    """
    for name in environment().list_templates(extensions=["html"]):
        environment().get_template(name)
    for language in LANGUAGES:
        texts(language)
    static_files()


def _moment(value: datetime | None, empty: str = NOTHING) -> Markup:
    """A point in time: in UTC, which the page's script turns into the reader's own."""
    if value is None:
        return Markup(escape(empty))
    return Markup('<time datetime="{}" data-moment>{} UTC</time>').format(
        value.isoformat(timespec="seconds"), value.strftime("%Y-%m-%d %H:%M")
    )


def initial_values(request: PageRequest) -> dict[str, Any]:
    """What every template knows."""

    def csrf() -> Markup:
        return Markup('<input type="hidden" name="{}" value="{}">').format(CSRF_FIELD, request.csrf_token)

    def can(permission: str) -> bool:
        role = request.principal.role
        if role is None:
            return False
        if request.principal.looks_in and permission not in http.ADMINISTRATORS_MAY:
            return PERMISSIONS[permission].reads
        return allows(role, permission)

    return {
        "request": request,
        "t": request.texts,
        "language": request.language,
        "csrf": csrf,
        "csrf_token": lambda: request.csrf_token,
        "can": can,
        "principal": request.principal,
        "role": request.principal.role,
        "path": request.raw.url.path,
        "address": request.raw.url.path + (f"?{request.raw.url.query}" if request.raw.url.query else ""),
        "form": request.form,
        "error": None,
        "fields": {},
        "flash": None,
        "shell": None,
        "public_url": http_public_url(request),
        "refreshing": request.raw.headers.get("x-refresh") is not None,
    }


def http_public_url(request: PageRequest) -> str:
    """Where clients reach the gateway: as configured, else as this browser did."""
    configured = request.context.settings.public_url
    if configured:
        return configured.rstrip("/")
    return f"{'https' if request.is_secure else 'http'}://{request.raw.headers.get('host', 'localhost')}"


async def render(
    request: PageRequest,
    template: str,
    *,
    status: int = 200,
    error: ApiError | None = None,
    headers: Mapping[str, str] | None = None,
    **values: Any,
) -> Response:
    """A page. With `error`, it says what happened, and has its status; `fields` are the errors of a form's fields."""
    known = initial_values(request)
    if request.principal.kind == "user" and not known["refreshing"]:
        known["shell"] = await _shell(request)
    if error is not None:
        status = error.status
        fields = {name: _in_their_words(request, text) for name, text in fields_of(error).items()}
        known |= {"error": _in_their_words(request, error.message), "fields": fields}
    flash = request.raw.cookies.get(FLASH_COOKIE)
    if flash is not None and not known["refreshing"]:
        request.set_cookie(FLASH_COOKIE, "", 0)
        known["flash"] = _read_flash(request, flash)
    text = environment().get_template(template).render(known | values)
    response = Response(text, status, media_type="text/html", headers=dict(headers or {}))
    if error is not None:
        for name, value in error.headers.items():
            response.headers.setdefault(name, value)
    return response


def _in_their_words(request: PageRequest, text: str) -> str:
    if not isinstance(text, Said):
        return text
    values = {
        name: request.texts(f"common.role_{value}") if name in ("role", "needed") else value
        for name, value in text.values.items()
    }
    return request.texts(f"common.said_{text.key}", **values)


def fields_of(error: ApiError) -> dict[str, str]:
    """What is wrong with each field."""
    found = error.data.get("fields") if isinstance(error.data, dict) else None
    return dict(found) if isinstance(found, dict) else {}


def redirect(request: PageRequest, url: str, message: str | None = None, **values: Any) -> Response:
    """Go on to another page of this site, which shows the message: a key of the catalogue."""
    if message is not None:
        text = json.dumps(
            [message, {name: value if isinstance(value, int) else str(value)[:200] for name, value in values.items()}]
        )
        kept = base64.urlsafe_b64encode(text.encode()).decode()
        signature = _flash_signature(secret_keys(request.context.gateway_settings)[0], kept)
        request.set_cookie(FLASH_COOKIE, f"{signature}.{kept}", FLASH_SECONDS)
    return Response(status_code=303, headers={"Location": quote(url, safe="/:?&=%#~+,;@!$'()*-._")})


def _read_flash(request: PageRequest, cookie: str) -> str | None:
    """The message; None where the cookie is none of ours."""
    signature, _, kept = cookie.partition(".")
    right = [_flash_signature(secret, kept).encode() for secret in secret_keys(request.context.gateway_settings)]
    if not any(hmac.compare_digest(signature.encode(), one) for one in right):
        return None
    try:
        key, values = json.loads(base64.urlsafe_b64decode(kept))
        return request.texts(key, **values)
    except KeyError:
        return None  # of another version, whose catalogue had it


def _flash_signature(secret: bytes, kept: str) -> str:
    return hmac.new(secret, b"redisgate message\0" + kept.encode(), hashlib.sha256).hexdigest()


def own_path(text: str, default: str) -> str:
    """An address on this site that somebody may be sent to, else the default."""
    if re.fullmatch(r"/[A-Za-z0-9_~-][^\\\s\x00-\x1f]{0,500}|/", text):
        return text
    return default


async def _shell(request: PageRequest) -> dict[str, Any]:
    """What surrounds every page of somebody who signed in: who they are, their organizations, the one at hand."""
    async with request.context.database.connection() as connection:
        user = await connection.fetchrow(
            "SELECT id, email, username, first_name, last_name, is_admin FROM users WHERE id = $1", request.user_id
        )
        found = await connection.fetch(
            "SELECT o.id, o.name, o.plan, m.role FROM memberships m JOIN organizations o ON o.id = m.organization_id"
            " WHERE m.user_id = $1 AND o.deleted_at IS NULL ORDER BY lower(o.name), o.id LIMIT $2",
            request.user_id,
            MAX_SWITCHER,
        )
        current_id: UUID | None = request.path.get("org_id")
        current = next((row for row in found if row["id"] == current_id), None)
        if current is None and current_id is not None:  # an administrator of the platform looks in
            current = await connection.fetchrow(
                "SELECT id, name, plan, NULL AS role FROM organizations WHERE id = $1", current_id
            )
    return {"user": user, "organizations": found, "organization": current}


# Answering


async def answer(request: Request, endpoints: Mapping[str, Endpoint], context: Context) -> Response:
    """Answer a request to a page whose methods are these."""
    request_id = http.request_id(request)
    method = "GET" if request.method == "HEAD" else request.method
    chosen = endpoints.get(method)
    page_request = PageRequest(request, chosen or next(iter(endpoints.values())), context, request_id)

    async def work() -> Response:
        if chosen is None:
            allowed = ", ".join(sorted({*endpoints, *(("HEAD",) if "GET" in endpoints else ())}))
            raise ApiError(405, page_request.texts("common.method_not_allowed"), headers={"Allow": allowed})
        return await _call(page_request)

    async def failed(error: ApiError) -> Response:
        return _to_sign_in(page_request) if isinstance(error, Unauthorized) else await error_page(page_request, error)

    response = await http.answered(request, work, failed, away=page_request.texts("common.database_away"))
    for name, value in page_request.cookies:
        response.headers.append(name, value)
    for name, value in SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("X-Request-Id", request_id)
    response.headers.setdefault("Cache-Control", "no-store")
    return response


async def _call(request: PageRequest) -> Response:
    permission = request.endpoint.permission
    if permission == "public":
        await _recognize(request)
    if request.raw.method == "POST":
        request.form, request.files = await _read_form(request.raw, request.endpoint.takes == _TAKES_FILES)
    if permission != "public" and "authorization" in request.raw.headers:
        raise Unauthorized()  # programs have the API
    await http.admit(request)
    if request.raw.method not in ("GET", "HEAD"):
        request.check_form()
    if request.endpoint.query is not None:
        request.parameters = http.read_query(request.endpoint.query, request.raw)
    response = await request.endpoint.handler(request)
    assert isinstance(response, Response), f"{request.endpoint} answered with {type(response).__name__}"
    return response


async def _recognize(request: PageRequest) -> None:
    """Who asks for a public page, if they have signed in."""
    if SESSION_COOKIE in request.raw.cookies:
        try:
            found = await http.authenticate(request)
        except ApiError:
            return
        if found.kind == "user":
            request.principal = found


async def _read_form(request: Request, takes_files: bool) -> tuple[Form, dict[str, bytes]]:
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in ("application/x-www-form-urlencoded", "multipart/form-data", ""):
        return Form(), {}  # the page reads the body itself; the token is in a header, or it is refused
    body = await request.body()
    if len(body) > MAX_FORM_BYTES and not (takes_files and kind == "multipart/form-data"):
        raise _too_large(len(body))
    if kind == "multipart/form-data":
        fields, files = read_multipart(body, content_type)
    else:
        files = {}
        try:
            fields = parse_qsl(
                body.decode("utf-8"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FORM_FIELDS
            )
        except ValueError as error:
            raise BadRequest(f"the form cannot be read: {error}") from error
    if any("\0" in name or "\0" in value for name, value in fields):
        raise BadRequest("the form contains the character NUL, which cannot be stored")
    return Form([(name, value.replace("\r\n", "\n")) for name, value in fields]), files


def _too_large(size: int) -> ApiError:
    return ApiError(413, f"the form has {size} bytes of text; at most {MAX_FORM_BYTES} are taken here")


def read_multipart(body: bytes, content_type: str) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
    """The fields and files of a form with files (RFC 7578).

    Raises:
        ApiError: it is none, or its text is longer than `MAX_FORM_BYTES`.
    """
    boundary = re.search(r'boundary="?([^";,]{1,70})"?', content_type)
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary[1].encode(), MAX_FORM_FIELDS) if boundary is not None else []
    if len(parts) < 2 or not parts[-1].startswith(b"--") or len(parts) > MAX_FORM_FIELDS:
        raise BadRequest("the form cannot be read: its parts are not complete")
    fields: list[tuple[str, str]] = []
    files: dict[str, bytes] = {}
    text_bytes = 0
    for part in parts[1:-1]:
        head, found, content = part.partition(b"\r\n\r\n")
        if len(head) > MAX_PART_HEAD_BYTES:
            raise BadRequest("the form cannot be read: the head of a part of it is too long")
        text = head.decode("utf-8", "replace")
        name = re.search(r'(?im)^content-disposition:\s*form-data;.*?\bname="([^"\r\n]*)"', text)
        if not found or name is None:
            raise BadRequest("the form cannot be read: a part of it has no name")
        if re.search(r"(?i);\s*filename\*?=", text) is not None:
            files[name[1]] = content
            continue
        text_bytes += len(content)
        if text_bytes > MAX_FORM_BYTES:
            raise _too_large(text_bytes)
        try:
            fields.append((name[1], content.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise BadRequest("the form cannot be read: its text is not UTF-8") from error
    return fields, files


def _to_sign_in(request: PageRequest) -> Response:
    """Who is not known signs in first, and comes back."""
    url = request.raw.url
    back = url.path + (f"?{url.query}" if url.query else "")
    if request.raw.method not in ("GET", "HEAD"):
        back = "/dashboard"
    if request.raw.headers.get("x-refresh") is not None:
        return Response(status_code=401)
    target = "/login" if back in ("/", "/dashboard") else "/login?" + urlencode({"next": back})
    message = "common.session_ended" if SESSION_COOKIE in request.raw.cookies else None
    return redirect(request, target, message)


async def error_page(request: PageRequest, error: ApiError) -> Response:
    """A page that says what happened and where to go on; in the frame of the organization where it can."""
    if request.raw.headers.get("x-refresh") is not None:
        return Response(error.message, error.status, media_type="text/plain", headers=error.headers)
    try:
        return await render(request, "error.html", error=error, status_code=error.status)
    except Exception as again:
        # What surrounds a page may fail as the page did; anything else is to be found in the log.
        if not isinstance(again, (DatabaseAway, ApiError)):
            http.unexpected(again, request.raw)
        anonymous = PageRequest(request.raw, request.endpoint, request.context, request.request_id)
        anonymous.cookies = request.cookies
        return await render(anonymous, "error.html", error=error, status_code=error.status)


async def not_found(request: Request, context: Context) -> Response:
    """The page for an address at which there is nothing."""
    endpoint = Endpoint("GET", request.url.path, "public", _nothing)
    return await answer(request, {"GET": endpoint, "POST": endpoint}, context)


async def _nothing(request: PageRequest) -> Response:
    raise http.NotFound(request.texts("common.no_page"))


# Static files


_STATIC_KINDS: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class _Static:
    """All static files, read once: they are few and small."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, bytes, str]] = {}
        folder = _templates() / "static"
        for file in sorted(file for file in folder.rglob("*") if file.suffix in _STATIC_KINDS):
            content = file.read_bytes()
            compressed = gzip.compress(content, 9, mtime=0)
            self.files[file.relative_to(folder).as_posix()] = (content, compressed, _STATIC_KINDS[file.suffix])
        digest = hashlib.sha256()
        for path, (content, _, _) in self.files.items():
            digest.update(path.encode() + b"\0" + content + b"\0")
        self.version = digest.hexdigest()[:12]


@functools.cache
def static_files() -> _Static:
    """What is under /static."""
    return _Static()


def static_url(path: str) -> str:
    """The address of a static file, with the version of all of them: modules that import each other stay together."""
    files = static_files()
    if path not in files.files:
        raise LookupError(f"there is no static file {path}")
    return f"/static/{files.version}/{path}"


async def static(request: Request) -> Response:
    """A static file, compressed for who takes it."""
    files = static_files()
    version, path = request.path_params["version"], request.path_params["path"]
    found = files.files.get(path)
    if found is None:
        return Response("there is no such file", 404, media_type="text/plain")
    content, compressed, kind = found
    headers = {"X-Content-Type-Options": "nosniff", "Vary": "Accept-Encoding", "Cache-Control": "no-cache"}
    if version == files.version:
        headers["Cache-Control"] = f"public, max-age={STATIC_SECONDS}, immutable"
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        content = compressed
    return Response(content, media_type=kind, headers=headers)
