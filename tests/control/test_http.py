"""The frame of the HTTP API: envelope, errors, bodies, queries, cookies, addresses."""

import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Annotated, Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from control import http
from control.app import load_endpoints
from control.database import Database
from control.http import (
    NAME_PATTERN,
    ApiRequest,
    BadRequest,
    Conflict,
    Context,
    Endpoint,
    Forbidden,
    NotFound,
    QuotaExceeded,
    Reply,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    convert_body,
    endpoint,
    forwarded_address,
    page,
    parse_body,
)

Handler = Callable[..., Any]


class Body(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=2, max_length=5)]
    size: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1
    tags: list[str] = []
    owner: UUID | None = None


class Query(msgspec.Struct):
    size: Annotated[int, msgspec.Meta(ge=1)] = 1
    word: str | None = None


class Shown(msgspec.Struct):
    id: int


@pytest.fixture
async def serve(context: Context) -> AsyncIterator[Callable[..., httpx.AsyncClient]]:
    """A client of an application with one endpoint."""
    clients: list[httpx.AsyncClient] = []

    def make(handler: Handler, *, peer: str = "203.0.113.7", **options: Any) -> httpx.AsyncClient:
        entry = Endpoint(**({"method": "GET", "path": "/x", "permission": "public", "handler": handler} | options))

        class Raw:
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                response = await http.answer(Request(scope, receive), {entry.method: entry}, context)
                await response(scope, receive, send)

        transport = httpx.ASGITransport(Starlette(routes=[Route(entry.path, Raw())]), client=(peer, 1))
        client = httpx.AsyncClient(transport=transport, base_url="http://redisgate.test")
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.aclose()


async def test_the_envelope(serve: Callable[..., httpx.AsyncClient]) -> None:
    async def handler(request: ApiRequest) -> object:
        return {"id": 1, "secret": "x"}

    response = await serve(handler, message="done", status=201).get("/x")
    document = response.json()
    assert response.status_code == 201
    assert (document["success"], document["data"], document["message"]) == (True, {"id": 1, "secret": "x"}, "done")
    assert abs(datetime.fromisoformat(document["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-request-id"]


async def test_nothing_leaves_that_is_not_declared(serve: Callable[..., httpx.AsyncClient]) -> None:
    async def one(request: ApiRequest) -> object:
        return {"id": 1, "secret": "x"}

    async def many(request: ApiRequest) -> object:
        return page([{"id": 1, "secret": "x"}], 3, 1, 1)

    assert (await serve(one, response=Shown).get("/x")).json()["data"] == {"id": 1}
    document = (await serve(many, response=Shown, listing=True).get("/x")).json()["data"]
    assert document == {"items": [{"id": 1}], "total_count": 3, "page": 1, "limit": 1, "total_pages": 3}


@pytest.mark.parametrize(
    ("error", "status", "data", "headers"),
    [
        (BadRequest("bad", {"a": "is wrong"}), 400, {"fields": {"a": "is wrong"}}, {}),
        (Unauthorized(), 401, None, {"www-authenticate": "Bearer"}),
        (Forbidden("no"), 403, None, {}),
        (QuotaExceeded("full", {"max": 5}), 403, {"max": 5}, {}),
        (NotFound(), 404, None, {}),
        (Conflict("taken"), 409, None, {}),
        (TooManyRequests("slow", 2.1), 429, None, {"retry-after": "3"}),
        (Unavailable("away"), 503, None, {"retry-after": "2"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_errors(
    serve: Callable[..., httpx.AsyncClient], error: Exception, status: int, data: object, headers: dict[str, str]
) -> None:
    async def handler(request: ApiRequest) -> object:
        raise error

    response = await serve(handler).get("/x")
    document = response.json()
    assert (response.status_code, document["success"], document["data"]) == (status, False, data)
    assert document["message"] == str(error)
    assert headers.items() <= dict(response.headers).items()


async def test_a_mistake_of_ours_tells_nothing(
    serve: Callable[..., httpx.AsyncClient], caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: ApiRequest) -> object:
        raise LookupError("the inside")

    response = await serve(handler).get("/x?token=secret")
    assert response.status_code == 500
    assert "the inside" not in response.text
    reference = response.json()["message"].split("reference ")[1].partition(";")[0]
    assert reference in caplog.text
    assert "the inside" in caplog.text
    assert "token=secret" not in caplog.text


async def test_a_database_that_is_away_is_503(
    serve: Callable[..., httpx.AsyncClient], context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)

    async def handler(request: ApiRequest) -> object:
        return await request.context.database.fetchval("SELECT 1")

    database = context.database
    context.database = Database("postgresql://u:p@/d?host=/nonexistent")
    response = await serve(handler).get("/x")
    context.database = database
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "nonexistent" not in response.text


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"", {"name": "is required"}),
        (b"{}", {"name": "is required"}),
        (
            b'{"name":"x","size":"2","tags":[1],"owner":"x"}',
            {
                "name": "expected str of a length of at least 2",
                "size": "expected int, got str",
                "tags": "expected str, got int (at [0])",
                "owner": "invalid UUID",
            },
        ),
        (b'{"name":"abc","other":1}', {"other": "there is no such field"}),
        (rb'{"name":"a\u0000b"}', {"name": "must not contain the character NUL"}),
        (b'{"name":"abc","size":1e400}', None),
        (b'{"name":"\\ud800"}', None),
        (b"{", None),
        (b"[]", None),
        (b"\xff", None),
        (b"[" * 100_000, None),
    ],
    ids=["empty", "missing", "all-wrong", "unknown", "nul", "huge", "surrogate", "cut", "array", "bytes", "deep"],
)
def test_a_body_that_is_wrong(body: bytes, fields: dict[str, str] | None) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_body(Body, body)
    assert caught.value.data is None or isinstance(caught.value.data, dict)
    if fields is not None:
        assert caught.value.data == {"fields": fields}


class Bounded(msgspec.Struct):
    count: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    memory: Annotated[int, msgspec.Meta(ge=1 << 20, le=16 << 30)] = 1 << 20
    name: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)] = "x"
    slug: Annotated[str, msgspec.Meta(pattern="^[a-z]+$")] = "x"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("count", 0, "expected int of at least 1"),
        ("count", 101, "expected int of at most 100"),
        ("memory", 1 << 40, "expected int of at most 17179869184 (16 GiB)"),
        ("memory", 1, "expected int of at least 1048576 (1 MiB)"),
        *(
            ("name", name, "must have no control characters, and no white space at its beginning or end")
            for name in (" x", "x ", "x\n", "a\tb", "a\x9fb", "\u00a0x")
        ),
        ("slug", "A", "has characters, or an order of them, that are not permitted here"),
    ],
)
def test_bounds_are_told_in_words(field: str, value: object, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        convert_body(Bounded, {field: value})
    assert caught.value.data == {"fields": {field: words}}


@pytest.mark.parametrize("name", ["x", "a  b", "Tiếng Việt", "-", "'\"<>&"])
def test_a_name_may_be_anything_on_one_line(name: str) -> None:
    assert convert_body(Bounded, {"name": name}).name == name


def test_a_body_that_is_right() -> None:
    owner = uuid4()
    body = parse_body(Body, b'{"name":"abc","size":9,"tags":["x"],"owner":"%b"}' % str(owner).encode())
    assert body == Body("abc", 9, ["x"], owner)


async def test_a_large_body_is_413(serve: Callable[..., httpx.AsyncClient]) -> None:
    async def handler(request: ApiRequest, body: Body) -> object:
        return None

    client = serve(handler, method="POST", body=Body)
    response = await client.post("/x", content=b" " * (http.MAX_BODY_BYTES + 1))
    assert response.status_code == 413
    assert response.json()["success"] is False


async def test_a_query_has_types(serve: Callable[..., httpx.AsyncClient]) -> None:
    async def handler(request: ApiRequest) -> object:
        return dataclasses.asdict(
            dataclasses.make_dataclass("Q", ["size", "word"])(*msgspec.structs.astuple(request.parameters))
        )

    client = serve(handler, query=Query)
    assert (await client.get("/x?size=7&word=w&other=1")).json()["data"] == {"size": 7, "word": "w"}
    assert (await client.get("/x?word=7")).json()["data"] == {"size": 1, "word": "7"}
    response = await client.get("/x?size=zero&word=%00")
    assert response.status_code == 400
    assert set(response.json()["data"]["fields"]) == {"size", "word"}


@pytest.mark.parametrize("query", ["page=0", "page=x", "limit=0", "limit=101", "page=-1", "page=1e3", "limit=٣"])
async def test_pages_that_cannot_be(serve: Callable[..., httpx.AsyncClient], query: str) -> None:
    async def handler(request: ApiRequest) -> object:
        return request.paging()

    assert (await serve(handler).get(f"/x?{query}")).status_code == 400


async def test_methods(serve: Callable[..., httpx.AsyncClient]) -> None:
    async def handler(request: ApiRequest) -> object:
        return 1

    client = serve(handler)
    response = await client.post("/x")
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD"
    assert (await client.head("/x")).status_code == 200


async def test_a_path_with_no_id_is_404(serve: Callable[..., httpx.AsyncClient]) -> None:
    async def handler(request: ApiRequest) -> object:
        return request.path

    client = serve(handler, path="/y/{thing_id}")
    found = uuid4()
    assert (await client.get(f"/y/{found}")).json()["data"] == {"thing_id": str(found)}
    for wrong in ("x", "%00", f"{found}0"):
        response = await client.get(f"/y/{wrong}")
        assert response.status_code == 404
        assert response.json()["message"] == "there is no such thing"


async def test_request_ids(serve: Callable[..., httpx.AsyncClient]) -> None:
    async def handler(request: ApiRequest) -> object:
        return request.request_id

    client = serve(handler)
    response = await client.get("/x", headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == response.json()["data"] == "mine-1"
    for other in ("a b", "x" * 65, ""):
        response = await client.get("/x", headers={"X-Request-Id": other})
        assert response.json()["data"] not in (other, "")


async def test_a_reply_says_more(serve: Callable[..., httpx.AsyncClient]) -> None:
    async def handler(request: ApiRequest) -> object:
        return Reply({"a": ip_network("10.0.0.0/8")}, "said", 202, [("X-A", "1"), ("X-A", "2")])

    response = await serve(handler).get("/x")
    assert (response.status_code, response.json()["message"]) == (202, "said")
    assert response.json()["data"] == {"a": "10.0.0.0/8"}
    assert response.headers.get_list("x-a") == ["1", "2"]


# Who asks


@pytest.fixture
async def session(context: Context, owner: "asyncpg.Connection[asyncpg.Record]") -> str:
    name = uuid4().hex[:12]
    end = datetime.now(UTC) + timedelta(hours=1)
    user = await owner.fetchval(
        "INSERT INTO users (email, username, password_hash) VALUES ($1, $2, 'none') RETURNING id", f"{name}@x.org", name
    )
    found = await owner.fetchval(
        "INSERT INTO sessions (user_id, expires_at, ends_at) VALUES ($1, $2, $2) RETURNING id", user, end
    )
    return context.tokens.issue_session(session_id=found, user_id=user, expires_at=end)


async def _who(request: ApiRequest) -> object:
    return request.principal.kind


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {}, 200),
        ("POST", {}, 200),
        ("POST", {"Origin": "http://redisgate.test"}, 200),
        ("POST", {"Sec-Fetch-Site": "same-origin"}, 200),
        ("POST", {"Origin": "http://evil.test"}, 403),
        ("POST", {"Origin": "null"}, 403),
        ("POST", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", {"Sec-Fetch-Site": "same-site"}, 403),
        ("GET", {"Sec-Fetch-Site": "cross-site"}, 200),
    ],
)
async def test_cookies_count_for_our_own_pages_only(
    serve: Callable[..., httpx.AsyncClient], session: str, method: str, headers: dict[str, str], status: int
) -> None:
    client = serve(_who, method=method, permission="session")
    cookie = {"Cookie": f"{http.SESSION_COOKIE}={session}"}
    assert (await client.request(method, "/x", headers=headers | cookie)).status_code == status


async def test_a_wrong_header_is_not_made_good_by_a_cookie(
    serve: Callable[..., httpx.AsyncClient], session: str
) -> None:
    client = serve(_who, permission="session")
    cookie = {"Cookie": f"{http.SESSION_COOKIE}={session}"}
    assert (await client.get("/x", headers=cookie)).status_code == 200
    for wrong in ("Bearer nonsense", "Basic dTpw", "", f"Bearer {session[:-2]}"):
        assert (await client.get("/x", headers=cookie | {"Authorization": wrong})).status_code == 401


async def test_a_session_in_the_query_is_nothing(serve: Callable[..., httpx.AsyncClient], session: str) -> None:
    assert (await serve(_who, permission="session").get(f"/x?_token={session}")).status_code == 401


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "expected"),
    [
        ("9.9.9.9", "1.1.1.1", (), "9.9.9.9"),
        ("9.9.9.9", "1.1.1.1", ("10.0.0.0/8",), "9.9.9.9"),
        ("10.0.0.1", "1.1.1.1", ("10.0.0.0/8",), "1.1.1.1"),
        ("10.0.0.1", "6.6.6.6, 1.1.1.1, 10.0.0.2", ("10.0.0.0/8",), "1.1.1.1"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", ("10.0.0.0/8",), "10.0.0.3"),
        ("10.0.0.1", "nonsense", ("10.0.0.0/8",), "10.0.0.1"),
        ("10.0.0.1", "", ("10.0.0.0/8",), "10.0.0.1"),
        ("::ffff:10.0.0.1", "2001:db8::1", ("10.0.0.0/8",), "2001:db8::1"),
        ("fd00::1", "[2001:db8::1]", ("fd00::/8",), "2001:db8::1"),
    ],
)
def test_whose_word_counts_for_an_address(peer: str, forwarded: str, trusted: tuple[str, ...], expected: str) -> None:
    assert forwarded_address(peer, forwarded, trusted) == expected


# The registry


def test_a_permission_that_does_not_exist_cannot_be_registered() -> None:
    load_endpoints()
    with pytest.raises(ValueError, match="there is no permission"):
        endpoint("GET", "/api/organizations/{org_id}/x", permission="nothing.do", summary="x")
    with pytest.raises(ValueError, match="the path has"):
        endpoint("GET", "/api/x", permission="instances.read", summary="x")
    with pytest.raises(ValueError, match="registered twice"):
        endpoint("GET", "/auth/me", permission="public", summary="x")(_who)
