"""ASGI applications on the gateway's HTTP server, over real sockets."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from redisgate.asgi import AsgiServer, Receive, Scope, Send
from redisgate.config import Limits
from redisgate.http_head import Head
from redisgate.http_protocol import HttpConnection, HttpServer
from redisgate.http_response import ResponseHeads
from redisgate.replies import JSON

DEADLINE = 10.0


class Plane:
    """A gateway with nothing but an application."""

    draining = False

    def __init__(self) -> None:
        self.app: Callable[[Scope, Receive, Send], Awaitable[None]] = hello
        self.asgi = AsgiServer(lambda *call: self.app(*call), b'{"success":false}')

    def prepare(self, head: Head) -> None:
        head.rendering = JSON

    def handle(self, connection: HttpConnection, method: bytes, target: bytes, head: Head, body: bytes) -> None:
        path, _, query = target.partition(b"?")
        self.asgi.handle(connection, method, path, query, head, body)


class Server:
    def __init__(self, plane: Plane, http: HttpServer, port: int) -> None:
        self.plane = plane
        self.http = http
        self.port = port

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, *requests: bytes) -> bytes:
        """What comes back until the server closes, which the last request should ask for."""
        reader, writer = await self.connect()
        writer.write(b"".join(requests))
        async with asyncio.timeout(DEADLINE):
            received = await reader.read()
        writer.close()
        return received


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    plane = Plane()
    http = HttpServer(plane, Limits(write_timeout=2), ResponseHeads(b"test"))  # type: ignore[arg-type]
    http.start()
    listening = await asyncio.get_running_loop().create_server(http.protocol, "127.0.0.1", 0)
    yield Server(plane, http, listening.sockets[0].getsockname()[1])
    listening.close()
    await http.drain(0.1)
    await plane.asgi.finish(1)


def request(
    method: str = "GET", target: str = "/", body: bytes = b"", *headers: str, close: bool = True, version: str = "1.1"
) -> bytes:
    lines = [f"{method} {target} HTTP/{version}", "Host: h", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def answer(send: Send, body: bytes, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, b"hello", 200, (b"content-type", b"text/plain"))


async def test_what_an_application_is_told(server: Server) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope, await receive()))
        await answer(send, b"{}", 201, (b"content-type", b"application/json"), (b"x-a", b"1"), (b"set-cookie", b"c=1"))

    server.plane.app = app
    received = await server.exchange(request("PATCH", "/a%20b/%C3%A9?x=%26&y", b"body", "X-B: 2", "Cookie: q=1"))
    (scope, message) = seen[0]
    assert (scope["type"], scope["method"], scope["http_version"], scope["scheme"]) == ("http", "PATCH", "1.1", "http")
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == ("/a b/é", b"/a%20b/%C3%A9", b"x=%26&y")
    assert (b"x-b", b"2") in scope["headers"]
    assert (b"cookie", b"q=1") in scope["headers"]
    assert scope["client"][0] == "127.0.0.1"
    assert message == {"type": "http.request", "body": b"body", "more_body": False}
    assert received.startswith(b"HTTP/1.1 201 Created\r\n")
    assert b"\r\nContent-Type: application/json\r\n" in received
    assert b"\r\nx-a: 1\r\nset-cookie: c=1\r\n" in received
    assert received.endswith(b"Content-Length: 2\r\n\r\n{}")


async def test_head_has_the_length_and_no_body(server: Server) -> None:
    received = await server.exchange(request("HEAD"))
    assert b"Content-Length: 5\r\n" in received
    assert received.endswith(b"\r\n\r\n")


async def test_pipelined_requests_run_one_after_the_other(server: Server) -> None:
    running: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert not running
        running.append(scope["raw_path"])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        running.clear()
        await answer(send, scope["raw_path"])

    server.plane.app = app
    received = await server.exchange(
        *(request("GET", f"/{number}", close=False) for number in range(20)), request("GET", "/last")
    )
    assert [part.rpartition(b"\r\n\r\n")[2] for part in received.split(b"HTTP/1.1 200 OK")[1:]] == [
        *(b"/%d" % number for number in range(20)),
        b"/last",
    ]


async def test_an_answer_in_pieces_is_chunked(server: Server) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/csv")]})
        for piece in (b"one", b"", b"two"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"three"})

    server.plane.app = app
    received = await server.exchange(request())
    assert b"Transfer-Encoding: chunked\r\n" in received
    assert b"Content-Type: text/csv\r\n" in received
    assert received.endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n")
    received = await server.exchange(request(version="1.0", close=False))
    assert b"chunked" not in received
    assert received.endswith(b"\r\n\r\nonetwothree")
    received = await server.exchange(request("HEAD"))
    assert received.endswith(b"\r\n\r\n")


async def test_a_slow_reader_holds_up_the_application(server: Server) -> None:
    sent = 0
    finished = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(400):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent += 1
        await send({"type": "http.response.body", "body": b""})
        finished.set()

    server.plane.app = app
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, request())
    # The buffers on the way fill up; then nothing moves until somebody reads.
    last = -1
    async with asyncio.timeout(DEADLINE):
        while sent == 0 or sent != last:
            last = sent
            await asyncio.sleep(0.05)
    assert 0 < sent < 400
    received = 0
    async with asyncio.timeout(DEADLINE):
        while data := await loop.sock_recv(sock, 1 << 20):
            received += len(data)
        await finished.wait()
    sock.close()
    assert received > 400 * 65536


async def test_a_client_that_leaves_is_noticed(server: Server) -> None:
    begun, seen = asyncio.Event(), asyncio.Event()
    messages: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        begun.set()
        messages.append(await receive())
        with pytest.raises(OSError, match="the client has left"):
            await answer(send, b"nobody reads this")
        seen.set()

    server.plane.app = app
    _, writer = await server.connect()
    writer.write(request(close=False))
    async with asyncio.timeout(DEADLINE):
        await begun.wait()
        # By RST; who only closes the sending side may still wait for the answer.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        await seen.wait()
    assert messages == [{"type": "http.disconnect"}]


async def test_a_mistake_is_an_answer_and_the_connection_goes_on(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/good":
            await answer(send, b"good")
            return
        raise LookupError("a mistake")

    server.plane.app = app
    received = await server.exchange(request(close=False), request("GET", "/good"))
    assert received.startswith(b"HTTP/1.1 500 ")
    assert b"a mistake" not in received
    assert received.endswith(b"good")
    assert "a mistake" in caplog.text


async def test_a_mistake_in_the_middle_resets_the_connection(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise LookupError("a mistake")

    server.plane.app = app
    with pytest.raises(ConnectionResetError):
        await server.exchange(request(close=False))
    assert "a mistake" in caplog.text


async def test_more_requests_than_the_bound_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redisgate.asgi.MAX_REQUESTS", 1)
    release, begun = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await release.wait()
        await answer(send, b"done")

    server.plane.app = app
    first = asyncio.create_task(server.exchange(request()))
    async with asyncio.timeout(DEADLINE):
        await begun.wait()
    refused = await server.exchange(request())
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 1\r\n" in refused
    assert refused.endswith(b'{"success":false}')
    release.set()
    assert (await first).endswith(b"done")
