"""Bytes through a fake transport: where requests end, and what is refused."""

import asyncio
import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redisgate.config import Limits
from redisgate.exchange import Exchange
from redisgate.http_protocol import MAX_KNOWN_HEADS, HttpConnection, HttpServer
from redisgate.http_response import ResponseHeads
from redisgate.replies import JSON


class FakeTransport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False
        self.eof = False
        self.reading = True

    def write(self, data: bytes) -> None:
        if not self.closed:
            self.written += data

    def writelines(self, pieces: Iterable[bytes]) -> None:
        self.write(b"".join(pieces))

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_extra_info(self, name: str) -> None:
        return None

    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.written)]


class Echo:
    """A gateway that answers every request at once, or when told to."""

    def __init__(self, *, at_once: bool = True) -> None:
        self.requests: list[tuple[bytes, bytes, bytes]] = []
        self.hosts: list[bytes] = []
        self.exchanges: list[Exchange] = []
        self.prepared = 0
        self._at_once = at_once

    def prepare(self, head: Any) -> None:
        self.prepared += 1
        head.rendering = JSON

    def handle(self, connection: HttpConnection, method: bytes, target: bytes, head: Any, body: bytes) -> None:
        self.requests.append((method, target, body))
        self.hosts.append(head.host)
        exchange = Exchange(connection, head, method)
        self.exchanges.append(exchange)
        if self._at_once:
            exchange.respond(200, b"ok", b"text/plain")


def connect(gateway: Echo, **limits: Any) -> tuple[HttpConnection, FakeTransport]:
    server = HttpServer(gateway, Limits(**limits), ResponseHeads(b"t"))
    connection = server.protocol()
    transport = FakeTransport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    return connection, transport


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


REQUESTS = {
    "get": (b"GET /get/foo HTTP/1.1\r\nHost: a\r\n\r\n", (b"GET", b"/get/foo", b"")),
    "post": (b"POST /set/k HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nva\r\nl", (b"POST", b"/set/k", b"va\r\nl")),
    "empty body": (b"POST / HTTP/1.1\r\nhost:a\r\ncontent-length: 0\r\n\r\n", (b"POST", b"/", b"")),
    "chunked": (
        b"PUT /set/k HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n",
        (b"PUT", b"/set/k", b"abc0123456789"),
    ),
    "expect": (
        b"POST /set/k HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
        (b"POST", b"/set/k", b"abc"),
    ),
    "upgrade": (
        b"GET /ping HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: x\r\n\r\n",
        (b"GET", b"/ping", b""),
    ),
    "raw utf-8": ("GET /get/é HTTP/1.1\r\nHost: a\r\n\r\n".encode(), (b"GET", "/get/é".encode(), b"")),
    "absolute": (b"GET http://a/get/x?y HTTP/1.1\r\nHost: a\r\n\r\n", (b"GET", b"/get/x?y", b"")),
    "leading empty line": (b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", (b"GET", b"/", b"")),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_is_the_same_split_at_every_offset(name: str) -> None:
    raw, expected = REQUESTS[name]
    following, expected_following = REQUESTS["get"]
    stream = raw + following
    for offset in range(1, len(stream)):
        gateway = Echo()
        connection, transport = connect(gateway)
        connection.data_received(stream[:offset])
        connection.data_received(stream[offset:])
        await settle()
        assert gateway.requests == [expected, expected_following], offset
        assert transport.statuses()[-2:] == [200, 200]
        assert not transport.closed


@given(st.lists(st.sampled_from(sorted(REQUESTS)), min_size=1, max_size=8), st.data())
def test_any_sequence_of_requests_cut_anywhere_is_framed_alike(names: list[str], data: st.DataObject) -> None:
    stream = b"".join(REQUESTS[name][0] for name in names)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))

    async def run() -> None:
        gateway = Echo()
        connection, _ = connect(gateway)
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            connection.data_received(stream[start:end])
        await settle()
        assert gateway.requests == [REQUESTS[name][1] for name in names]

    asyncio.run(run())


HOST = b"Host: a\r\n"
REFUSED = {
    "length and chunked": (
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        400,
    ),
    "chunked and length": (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        400,
    ),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "the same length twice": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
    "a list of lengths": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\n", 400),
    "a signed length": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", 400),
    "an empty length": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n", 400),
    "a hexadecimal length": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1\r\n\r\n", 400),
    "another coding": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 400),
    "identity": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n", 400),
    "chunked twice": (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        400,
    ),
    "space before colon": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n", 400),
    "chunked in 1.0": (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "bare LF in headers": (b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400),
    "bare LF everywhere": (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    "bare LF in the target": (b"GET /a\nb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "bare CR in a value": (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", 400),
    "folded header": (b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", 400),
    "NUL in a value": (b"GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\nX: a\r\n\r\n", 400),
    "no header at all": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "no host beside the target's": (b"GET http://a/ HTTP/1.1\r\nX: a\r\n\r\n", 400),
    "two hosts beside the target's": (b"GET http://a/ HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    "a user in the target": (b"GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "another scheme": (b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    "a host with a space": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "two authorizations": (b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: a\r\nAuthorization: a\r\n\r\n", 400),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 400),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "tab in the request line": (b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "no slash": (b"GET get HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a method with digits": (b"G3T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "CONNECT": (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    "unknown expectation": (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 1\r\n\r\na", 417),
    "chunk size": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    "chunk size with sign": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\na\r\n", 400),
    "chunk longer than it says": (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        400,
    ),
    "chunk with bare LF": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n", 400),
    "long target": (b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "endless target": (b"GET /" + b"a" * 17_000, 414),
    "large headers": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: aaaaaaaa\r\n" * 4_000 + b"\r\n", 431),
    "endless headers": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: aaaaaaaa\r\n" * 4_000, 431),
    "large body": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10485761\r\n\r\n", 413),
    "large chunked body": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nA00001\r\n", 413),
    "enormous length": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999999999999\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_ambiguous_is_refused_and_nothing_after_it_is_believed(name: str) -> None:
    raw, status = REFUSED[name]
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    for stream in ([raw + smuggled], [raw, smuggled], [bytes((byte,)) for byte in raw[:300]] + [raw[300:], smuggled]):
        gateway = Echo()
        connection, transport = connect(gateway)
        for piece in stream:
            if piece:
                connection.data_received(piece)
        await settle()
        assert transport.statuses()[-1:] == [status], transport.written
        assert b"Connection: close" in transport.written
        assert transport.written.rpartition(b"\r\n\r\n")[2].startswith(b'{"error":"ERR ')
        assert transport.eof or transport.closed
        assert not any(target == b"/smuggled" for _, target, _ in gateway.requests)


async def test_the_refusal_names_limit_and_actual_size() -> None:
    connection, transport = connect(Echo(), max_body_bytes=10)
    connection.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n")
    assert b"ERR max request size exceeded. Limit: 10 bytes, Actual: 11 bytes" in transport.written
    connection, transport = connect(Echo(), max_body_bytes=10)
    connection.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nB\r\n")
    assert b"ERR max request size exceeded. Limit: 10 bytes, Actual: 11 bytes" in transport.written


@pytest.mark.parametrize(
    ("target", "host"),
    [(b"http://b.test/ping", b"b.test"), (b"HTTPS://b.test:81", b"b.test:81"), (b"/ping", b"a.test")],
)
async def test_the_host_of_an_absolute_target_counts(target: bytes, host: bytes) -> None:
    gateway = Echo()
    connection, _ = connect(gateway)
    connection.data_received(b"GET %b HTTP/1.1\r\nX: y\r\nhost: a.test\r\n\r\n" % target)
    assert gateway.hosts == [host]
    assert gateway.requests[0][1].startswith(b"/")


@pytest.mark.parametrize("rest", [b"", b"GET /unfinished HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n\r\n"])
async def test_a_client_that_closes_its_side_gets_all_its_answers(rest: bytes) -> None:
    gateway = Echo(at_once=False)
    connection, transport = connect(gateway, max_pipelined_requests=3)
    connection.data_received(b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(10)) + rest)
    assert connection.eof_received()
    while len(gateway.requests) < 10 or connection.exchanges:
        assert not transport.closed
        connection.exchanges[0].respond(200, b"", b"text/plain")
        await settle()
    assert transport.statuses() == [200] * 10 + [400] * (b"\r\n\r\n" in rest)
    assert transport.closed or transport.eof
    assert not connect(gateway)[0].eof_received()


async def test_a_refusal_waits_for_the_answers_before_it() -> None:
    gateway = Echo(at_once=False)
    connection, transport = connect(gateway)
    connection.data_received(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
    connection.data_received(b"GARBAGE\r\n\r\n")
    assert connection.deadline == float("inf")
    assert not transport.eof
    gateway.exchanges[0].respond(200, b"", b"text/plain")
    assert transport.statuses() == [200, 400]
    assert transport.eof
    assert connection.deadline < connection.server.now + 3


async def test_a_body_behind_another_request_has_its_time_too() -> None:
    gateway = Echo(at_once=False)
    connection, transport = connect(gateway, body_timeout=5.0)
    connection.data_received(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
    connection.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab")
    gateway.exchanges[0].respond(200, b"", b"text/plain")
    assert connection.deadline <= connection.server.now + 5
    connection.overdue()
    assert transport.statuses() == [200, 408]


async def test_continue_is_sent_before_the_body_and_only_then() -> None:
    connection, transport = connect(Echo())
    connection.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
    assert transport.written == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.data_received(b"x")
    assert transport.statuses() == [100, 200]


async def test_answers_leave_in_the_order_of_the_requests() -> None:
    gateway = Echo(at_once=False)
    connection, transport = connect(gateway)
    connection.data_received(b"".join(b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(4)))
    for number in (2, 1, 3):
        gateway.exchanges[number].respond(200, b"answer %d" % number, b"text/plain")
    assert transport.written == b""
    gateway.exchanges[0].respond(200, b"answer 0", b"text/plain")
    assert [transport.written.index(b"answer %d" % number) for number in range(4)] == sorted(
        transport.written.index(b"answer %d" % number) for number in range(4)
    )


async def test_requests_under_way_are_bounded_and_reading_pauses() -> None:
    gateway = Echo(at_once=False)
    connection, transport = connect(gateway, max_pipelined_requests=3)
    one = b"GET /" + b"a" * 1000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"
    for _ in range(100):
        connection.data_received(one)
    assert len(gateway.requests) == 3
    assert not transport.reading
    while len(gateway.requests) < 100:
        for exchange in list(gateway.exchanges):
            exchange.respond(200, b"", b"text/plain")
        await settle()
    assert transport.reading


@pytest.mark.parametrize(
    ("request_head", "keeps"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", False),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Keep-Alive, Close\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", True),
    ],
    ids=["1.1", "close", "both", "1.0", "1.0 keep-alive"],
)
async def test_connections_are_kept_as_the_client_asks(request_head: bytes, keeps: bool) -> None:
    connection, transport = connect(Echo())
    connection.data_received(request_head)
    assert transport.closed is not keeps
    assert (b"Connection: close" in transport.written) is not keeps


async def test_head_has_the_length_and_not_the_body() -> None:
    connection, transport = connect(Echo())
    connection.data_received(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"Content-Length: 2\r\n" in transport.written
    assert transport.written.endswith(b"\r\n\r\n")


async def test_overdue_heads_and_bodies_get_408_and_idle_connections_are_closed_silently() -> None:
    for start in (b"GET / HT", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab"):
        connection, transport = connect(Echo())
        connection.data_received(start)
        assert connection.deadline < connection.server.now + 31
        connection.overdue()
        assert transport.statuses() == [408]
    connection, transport = connect(Echo())
    connection.overdue()
    assert transport.closed
    assert transport.written == b""


async def test_a_header_block_is_interpreted_anew_when_it_changes() -> None:
    gateway = Echo()
    connection, _ = connect(gateway)
    connection.data_received(b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na")
    connection.data_received(b"POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab")
    connection.data_received(b"POST /3 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\ncd")
    assert [body for _, _, body in gateway.requests] == [b"a", b"ab", b"cd"]


# Header blocks that are known


def test_a_header_block_is_interpreted_once_for_all_connections() -> None:
    gateway = Echo()
    connection, transport = connect(gateway)
    other = connection.server.protocol()
    other.connection_made(transport)  # type: ignore[arg-type]
    for who in (connection, other):
        for size in (1, 2, 1):
            who.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (size, b"x" * size))
    assert [body for _, _, body in gateway.requests] == [b"x", b"xx", b"x"] * 2
    assert gateway.prepared == 2


def test_a_sync_token_that_comes_back_changes_nothing() -> None:
    gateway = Echo()
    connection, transport = connect(gateway)
    token = b"0"
    for number in range(5):
        connection.data_received(
            b"GET /%d HTTP/1.1\r\nHost: a\r\nUpstash-Sync-Token: %b\r\nAccept: x\r\n\r\n" % (number, token)
        )
        token = re.findall(rb"Upstash-Sync-Token: (\w+)\r\n", transport.written)[-1]
    assert [target for _, target, _ in gateway.requests] == [b"/%d" % number for number in range(5)]
    assert gateway.prepared == 2  # the first token was of another length
    tokens = re.findall(rb"Upstash-Sync-Token: (\w+)\r\n", transport.written)
    assert len(set(tokens)) == 5


@pytest.mark.parametrize(
    "value",
    [b"abcd\r\nContent-Length: 3", b"ab\r\n\r\nGET", b"ab cd", b"abcde", b"abc", b"", b"abcd\r\nAuthorization: x"],
)
def test_what_is_no_token_of_that_length_is_interpreted(value: bytes) -> None:
    """Whatever stands where the token was, the request is framed as if nothing were remembered."""
    first = b"GET /first HTTP/1.1\r\nHost: a\r\nUpstash-Sync-Token: abcd\r\nX: y\r\n\r\n"
    second = b"GET /second HTTP/1.1\r\nHost: a\r\nUpstash-Sync-Token: %b\r\nX: y\r\n\r\n" % value
    remembering, fresh = Echo(), Echo()
    connection, _ = connect(remembering)
    connection.data_received(first)
    connection.data_received(second)
    connect(fresh)[0].data_received(second)
    assert remembering.requests[1:] == fresh.requests
    assert remembering.prepared == 1 + fresh.prepared


def test_what_is_remembered_is_bounded() -> None:
    gateway = Echo()
    connection, _ = connect(gateway)
    for number in range(3 * MAX_KNOWN_HEADS):
        connection.data_received(b"GET / HTTP/1.1\r\nHost: a\r\nX: %d\r\n\r\n" % number)
    assert len(connection.server._heads) <= MAX_KNOWN_HEADS


def test_a_version_is_part_of_what_is_remembered() -> None:
    gateway = Echo()
    connection, transport = connect(gateway)
    connection.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert not transport.closed
    connection.data_received(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n")
    assert transport.closed


def test_sync_tokens_stay_fresh_when_they_run_out() -> None:
    heads = ResponseHeads(b"p")
    starts = [heads.start(200, b"text/plain") for _ in range(10_000)]
    assert len(set(starts)) == 10_000
    assert len({len(start) for start in starts}) == 1
