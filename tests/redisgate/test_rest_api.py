"""The wire contract, line by line, over a real Redis and two workers."""

import base64
import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.http import Client
from tests.servers import Gateway, RedisServer, needs_redis_7, single_instance, wait_for


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    with Client(gateway.port, gateway.token) as client:
        client.command("FLUSHALL")
        yield client


@pytest.fixture
def reader(gateway: Gateway) -> Iterator[Client]:
    with Client(gateway.port, gateway.readonly_token) as client:
        yield client


# Requests


@pytest.mark.parametrize(
    ("method", "target", "body", "argv"),
    [
        ("GET", "/echo/foo", b"", [b"foo"]),
        ("GET", "/echo/a%2Fb", b"", [b"a/b"]),
        ("GET", "/echo/a+b%20c", b"", [b"a+b c"]),
        ("GET", "/echo/", b"", [b""]),
        ("GET", "/echo/%00%ff%C3%A9", b"", [b"\x00\xff\xc3\xa9"]),
        ("GET", "/ECHO/x", b"", [b"x"]),
        ("GET", "/%65cho/x", b"", [b"x"]),
        ("GET", "/echo/%zz%", b"", [b"%zz%"]),
        ("POST", "/echo", b"\x00body\xff/%41", [b"\x00body\xff/%41"]),
        ("PUT", "/echo", b"body", [b"body"]),
        ("GET", "/echo?value", b"", [b"value"]),
        ("GET", "/echo?a+b%20c", b"", [b"a+b c"]),
        ("POST", "/eval/return%20ARGV/0", b"x", [b"x"]),
        ("POST", "/eval/return%20ARGV/0?EX=100&NX&k=", b"x", [b"x", b"EX", b"100", b"NX", b"k", b""]),
        ("GET", "/eval/return%20ARGV/0/p?q=1&_token=zzz", b"", [b"p", b"q", b"1"]),
        ("GET", "/eval/return%20ARGV/0//", b"", [b"", b""]),
    ],
)
def test_paths_bodies_and_queries_become_arguments(
    client: Client, method: str, target: str, body: bytes, argv: list[bytes]
) -> None:
    response = client.request(method, target, body, {"Upstash-Encoding": "base64"})
    result = response.result
    values = result if isinstance(result, list) else [result]
    assert [base64.b64decode(value) for value in values] == argv


def test_the_documented_examples(client: Client) -> None:
    assert client.get("/set/foo/bar").result == "OK"
    assert client.get("/set/foo/bar/EX/100").result == "OK"
    assert client.request("POST", "/set/foo?EX=100", b"bar").result == "OK"
    assert client.get("/ttl/foo").result in (99, 100)
    assert client.get("/get/foo").result == "bar"
    assert client.command("SET", "foo", "bar", "EX", 100).result == "OK"
    assert client.get("/zadd/teams/100/team-x/90/team-y").result == 2
    assert client.get("/mget/foo/nope").result == ["bar", None]
    assert client.get("/strlen").error == "ERR wrong number of arguments for 'strlen' command"
    assert client.get("/strlen").status == 400


@pytest.mark.parametrize(
    "literal",
    ["1e+21", "9007199254740993", "1.10", "-0", "-0.0", "123456789012345678901234567890", "1E5", "true", "false"],
)
def test_literals_reach_redis_as_written(client: Client, literal: str) -> None:
    assert client.request("POST", "/", f'["ECHO", {literal}]'.encode()).result == literal


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'"PING"',
        b"null",
        b"[null]",
        b'["ECHO", null]',
        b'["ECHO", ["a"]]',
        b'["ECHO", {"a": 1}]',
        b'["ECHO", NaN]',
        b'["ECHO", Infinity]',
        b'["ECHO", "\\ud800"]',
        b'["ECHO", "\xff"]',
        b'["ECHO", "\xed\xa0\x80"]',
        b'["ECHO", "a"',
        b'["ECHO", "a"] x',
        b'["ECHO", "a",]',
        b'["ECHO", "\x01"]',
        b"\xef\xbb\xbf[]",
        b'["ECHO", 01]',
        b"[" * 100_000,
        '["ECHO", "a"]'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_bodies_that_are_no_command_are_refused(client: Client, body: bytes) -> None:
    response = client.request("POST", "/", body)
    assert response.status == 400
    assert response.error.startswith("ERR ")
    assert client.command("PING").result == "PONG"


@pytest.mark.parametrize("value", ["é", "\u2028", '\x00\x1f"\\/', "😀", ""], ids=ascii)
def test_strings_survive_both_ways(client: Client, value: str) -> None:
    assert client.command("SET", value, value).result == "OK"
    assert client.command("GET", value).result == value
    assert client.command("GET", value, upstash_encoding="base64").result == base64.b64encode(value.encode()).decode()


@pytest.mark.parametrize("method", ["DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"])
@pytest.mark.parametrize("target", ["/get/foo", "/pipeline", "/"])
def test_other_methods_are_405_with_allow(client: Client, method: str, target: str) -> None:
    response = client.request(method, target)
    assert response.status == 405
    assert response.headers["allow"] == "GET, HEAD, POST, PUT"
    assert response.error


@pytest.mark.parametrize("target", ["/pipeline", "/multi-exec"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_lists_of_commands_need_a_body(client: Client, target: str, method: str) -> None:
    response = client.request(method, target)
    assert response.status == 405
    assert "POST" in response.headers["allow"]


def test_head_answers_as_get_without_a_body(client: Client) -> None:
    client.get("/set/foo/bar")
    response = client.request("HEAD", "/get/foo")
    assert response.status == 200
    assert response.headers["content-length"] == str(len(b'{"result":"bar"}'))
    assert client.get("/get/foo").result == "bar"


def test_chunked_bodies_and_expect_work(client: Client) -> None:
    head = b"POST /set/chunked HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer token\r\n"
    client.sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    assert client.read().result == "OK"
    assert client.get("/get/chunked").result == "abcde"
    client.sock.sendall(head + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert client.file.readline() == b"HTTP/1.1 100 Continue\r\n"
    assert client.file.readline() == b"\r\n"
    client.sock.sendall(b"ok")
    assert client.read().result == "OK"


# Credentials


@pytest.mark.parametrize(
    ("authorization", "query", "status"),
    [
        ("Bearer token", "", 200),
        ("bearer token", "", 200),
        ("BEARER  token", "", 200),
        (None, "?_token=token", 200),
        (None, "?_tok%65n=token", 200),
        ("Bearer token", "?_token=wrong", 200),
        ("Bearer wrong", "?_token=token", 401),
        (None, "", 401),
        (None, "?_token=wrong", 401),
        (None, "?_token", 401),
        ("Bearer", "", 401),
        ("Bearer ", "", 401),
        ("Basic token", "", 401),
        ("token", "", 401),
    ],
)
def test_credentials(gateway: Gateway, authorization: str | None, query: str, status: int) -> None:
    with Client(gateway.port, None) as client:
        headers = {"Authorization": authorization} if authorization is not None else {}
        response = client.request("GET", f"/echo/x{query}", b"", headers)
        assert response.status == status
        if status == 401:
            assert response.body == b'{"error":"WRONGPASS invalid or missing auth token"}'
        else:
            assert response.result == "x"


def test_the_instance_may_be_named_by_path(client: Client) -> None:
    for base in ("/redis/default", "/redis/default/"):
        assert client.post(base, ["ECHO", "x"]).result == "x"
    assert client.get("/redis/default/echo/x").result == "x"
    assert client.post("/redis/default/pipeline", [["ECHO", "x"]]).json() == [{"result": "x"}]
    for other in ("/redis/other/echo/x", "/redis//echo/x", "/redis", "/redis/"):
        assert client.get(other).status == 401


# Responses


def test_errors_are_redis_own_lines(client: Client) -> None:
    client.command("SET", "s", "x")
    cases: list[tuple[list[Any], str]] = [
        (["INCR", "s"], "ERR value is not an integer or out of range"),
        (["LPUSH", "s", "x"], "WRONGTYPE Operation against a key holding the wrong kind of value"),
        (["EVALSHA", "f" * 40, 0], "NOSCRIPT No matching script. Please use EVAL."),
        (["NOSUCH", "a", "b"], "ERR unknown command 'NOSUCH', with args beginning with: 'a' 'b' "),
    ]
    for argv, line in cases:
        response = client.command(*argv)
        assert (response.status, response.error) == (400, line)


def test_values_map_to_json(client: Client) -> None:
    script = "return {1, 'a', false, {}, {{-7}}, redis.error_reply('MY error'), redis.status_reply('fine')}"
    assert client.command("EVAL", script, 0).result == [1, "a", None, [], [[-7]], "MY error", "fine"]
    assert client.command("INCRBY", "n", "9007199254740993").body == b'{"result":9007199254740993}'
    assert client.command("LPOP", "none", 2).result is None
    client.request("POST", "/set/bin", b"a\xff\xfeb")
    assert client.get("/get/bin").result == "a��b"


def test_base64_encodes_every_string_but_a_top_level_ok(client: Client) -> None:
    def b64(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    headers = {"upstash_encoding": "base64"}
    assert client.command("SET", "k", "OK", **headers).result == "OK"
    assert client.command("GET", "k", **headers).result == "OK"
    assert client.command("PING", **headers).result == b64("PONG")
    assert client.command("MGET", "k", "none", **headers).result == [b64("OK"), None]
    script = "return {redis.status_reply('OK'), redis.error_reply('MY bad'), 5, {'x'}}"
    assert client.command("EVAL", script, 0, **headers).result == [b64("OK"), b64("MY bad"), 5, [b64("x")]]
    assert client.command("INCR", "k", **headers).error == "ERR value is not an integer or out of range"
    items = client.post("/pipeline", [["SET", "k", "v"], ["GET", "k"], ["MGET", "k"], ["NO"]], **headers).json()
    assert items[:3] == [{"result": "OK"}, {"result": b64("v")}, {"result": [b64("v")]}]
    assert items[3]["error"].startswith("ERR unknown command")
    items = client.post("/multi-exec", [["SET", "k", "v"], ["GET", "k"]], **headers).json()
    assert items == [{"result": "OK"}, {"result": b64("v")}]


@pytest.mark.parametrize(
    "headers",
    [
        {"Upstash-Encoding": "gzip"},
        {"Upstash-Encoding": ""},
        {"Upstash-Response-Format": "resp3"},
        {"Upstash-Response-Format": "resp2", "Upstash-Encoding": "base64"},
    ],
    ids=str,
)
def test_unknown_formats_are_refused(client: Client, headers: dict[str, str]) -> None:
    response = client.request("GET", "/ping", b"", headers)
    assert response.status == 400
    assert response.error.startswith("ERR ")


def test_resp2_is_what_redis_says(client: Client) -> None:
    headers = {"upstash_response_format": "resp2"}
    client.command("SET", "k", "OK")
    response = client.command("GET", "k", **headers)
    assert (response.body, response.headers["content-type"]) == (b"$2\r\nOK\r\n", "application/octet-stream")
    assert client.command("SET", "k", "v", **headers).body == b"+OK\r\n"
    response = client.command("INCR", "k", **headers)
    assert (response.status, response.body) == (400, b"-ERR value is not an integer or out of range\r\n")
    response = client.command("AUTH", "x", **headers)
    assert response.status == 400
    assert response.body.startswith(b"-ERR AUTH")
    response = client.post("/pipeline", [["GET", "k"], ["AUTH", "x"], ["LPOP", "none", 1]], **headers)
    assert response.status == 200
    assert response.body.startswith(b"$1\r\nv\r\n-ERR AUTH")
    assert response.body.endswith(b"*-1\r\n")
    assert client.post("/multi-exec", [["GET", "k"]], **headers).json() == [{"result": "v"}]


def test_resp2_refusals_of_the_gateway_are_error_lines(gateway: Gateway) -> None:
    with Client(gateway.port, "wrong") as client:
        response = client.get("/get/x", upstash_response_format="resp2")
        assert (response.status, response.body) == (401, b"-WRONGPASS invalid or missing auth token\r\n")


def test_a_pipeline_answers_in_order_and_goes_on_after_errors(client: Client) -> None:
    response = client.post("/pipeline", [["SET", "a", 1], ["INCR", "a"], ["LPUSH", "a", 1], ["GET", "a"]])
    assert response.status == 200
    assert response.json() == [
        {"result": "OK"},
        {"result": 2},
        {"error": "WRONGTYPE Operation against a key holding the wrong kind of value"},
        {"result": "2"},
    ]
    assert client.post("/pipeline", []).json() == []
    assert client.post("/pipeline", [["ECHO", "x"], []]).status == 400
    assert client.post("/pipeline", ["ECHO", "x"]).status == 400
    assert client.post("/pipeline", {"a": 1}).status == 400


def test_a_hundred_thousand_commands_in_one_pipeline(client: Client) -> None:
    response = client.post("/pipeline", [["INCR", "n"]] * 100_000)
    assert [item["result"] for item in response.json()] == list(range(1, 100_001))


def test_a_transaction_is_all_or_nothing_but_runtime_errors_are_items(client: Client) -> None:
    assert client.post("/multi-exec", [["SET", "a", 1], ["LPUSH", "a", 1], ["INCR", "a"]]).json() == [
        {"result": "OK"},
        {"error": "WRONGTYPE Operation against a key holding the wrong kind of value"},
        {"result": 2},
    ]
    for bad in (["INCR"], ["NOSUCH", "x"], ["AUTH", "x"], ["MULTI"], ["BLPOP", "l", 0], ["SELECT", 1]):
        response = client.post("/multi-exec", [["SET", "a", "changed"], bad])
        assert response.status == 400, bad
        assert list(response.json()) == ["error"]
    assert client.get("/get/a").result == "2"
    assert client.post("/multi-exec", []).json() == []


def test_every_command_response_has_a_fresh_sync_token(client: Client) -> None:
    tokens = {client.get("/ping", upstash_sync_token="anything").headers["upstash-sync-token"] for _ in range(5)}
    tokens.add(client.get("/nosuch").headers["upstash-sync-token"])
    tokens.add(client.post("/pipeline", [["PING"]]).headers["upstash-sync-token"])
    assert len(tokens) == 7


def test_pipelined_http_requests_run_and_answer_in_order(client: Client) -> None:
    for number in range(200):
        target = ("/incr/n", "/eval/return%20redis.call('incr',%20'n')/0", "/keys/nothing", "/nosuch")[number % 4]
        client.send("GET", target)
    answers = [client.read() for _ in range(200)]
    assert [answer.status for answer in answers] == [200, 200, 200, 400] * 50
    assert [answers[index].result for index in range(200) if index % 4 < 2] == list(range(1, 101))


def test_large_values_stream_in_every_format(client: Client) -> None:
    value = bytes(range(256)) * 8192  # 2 MiB
    assert client.request("POST", "/set/big", value).result == "OK"
    assert client.get("/get/big", upstash_response_format="resp2").body == b"$%d\r\n%b\r\n" % (len(value), value)
    assert base64.b64decode(client.get("/get/big", upstash_encoding="base64").result) == value
    assert client.get("/get/big").result == value.decode("utf-8", "replace")
    items = client.post("/pipeline", [["PING"], ["GET", "big"], ["AUTH", "x"], ["PING"]]).json()
    assert items[1] == {"result": value.decode("utf-8", "replace")}
    assert [items[0], items[3]] == [{"result": "PONG"}] * 2
    assert client.post("/multi-exec", [["PING"], ["GET", "big"]]).json()[1] == items[1]
    client.command("EVAL", "for i = 1, 50000 do redis.call('rpush', 'list', i) end", 0)
    assert client.get("/lrange/list/0/-1").result == [str(number) for number in range(1, 50_001)]
    response = client.request("HEAD", "/get/big")
    assert response.status == 200
    assert client.get("/echo/still").result == "still"


def test_a_reply_nested_too_deep_is_an_error_for_its_command_alone(client: Client) -> None:
    script = "local t = {} for i = 1, %d do t = {t} end return t"
    pipeline = client.post("/pipeline", [["ECHO", "a"], ["EVAL", script % 7000, 0], ["ECHO", "b"]]).json()
    assert pipeline[0] == {"result": "a"}
    assert "nests deeper" in pipeline[1]["error"]
    # One that is too large to be held is streamed, however deep.
    large = "local t={string.rep('x',400000)} for i=2,tonumber(ARGV[1]) do t={t} end return t"
    response = client.command("EVAL", large, 0, 2000)
    assert response.status == 200
    assert response.body == b'{"result":' + b"[" * 2000 + b'"' + b"x" * 400_000 + b'"' + b"]" * 2000 + b"}"
    body = client.post("/pipeline", [["ECHO", "a"], ["EVAL", large, 0, 2000], ["ECHO", "b"]]).body
    assert body.startswith(b'[{"result":"a"},{"result":[[')
    assert body.endswith(b']]},{"result":"b"}]')
    assert pipeline[2] == {"result": "b"}
    assert client.command("EVAL", script % 7000, 0).status == 400
    assert client.command("EVAL", script % 900, 0).body == b'{"result":' + b"[" * 901 + b"]" * 901 + b"}"
    raw = client.command("EVAL", script % 7000, 0, upstash_response_format="resp2")
    assert raw.body == b"*1\r\n" * 7000 + b"*0\r\n"


# Commands


def test_refused_commands_say_why_and_leave_the_connection_alone(client: Client) -> None:
    refused: list[list[Any]] = [
        ["AUTH", "x"], ["HELLO", 3], ["SELECT", 1], ["QUIT"], ["RESET"], ["CLIENT", "REPLY", "OFF"],
        ["CLIENT", "KILL", "x"],
        ["MULTI"], ["EXEC"], ["DISCARD"], ["WATCH", "k"], ["UNWATCH"], ["MOVE", "k", 1], ["copy", "a", "b", "dB", 1],
        ["SWAPDB", 0, 1], ["SUBSCRIBE", "c"], ["PSUBSCRIBE", "c"], ["UNSUBSCRIBE"], ["MONITOR"], ["BLPOP", "l", 0],
        ["XREAD", "BLOCK", 0, "STREAMS", "s", "$"], ["SHUTDOWN"], ["DEBUG", "SLEEP", 1], ["MODULE", "LIST"],
        ["REPLICAOF", "a", 1], ["SAVE"], ["CONFIG", "SET", "maxmemory", 1], ["CONFIG", "GET", "*"],
        ["CONFIG", "GET", "requirepass"], ["ACL", "SETUSER", "x"], ["MIGRATE", "h", 1, "k", 0, 1], ["CLUSTER", "INFO"],
        ["WAIT", 1, 0], ["SCRIPT", "KILL"], ["sUbScRiBe", "c"], ["SSUBSCRIBE", "c"], ["SYNC"], ["PSYNC", "a", 1],
    ]  # fmt: skip
    client.command("SET", "k", "mine")
    for argv in refused:
        response = client.command(*argv)
        assert response.status == 400, argv
        assert len(response.error) > 20, argv
        assert client.post("/pipeline", [argv, ["GET", "k"]]).json()[1] == {"result": "mine"}, argv
    assert client.get("/SUBSCRIBE/x").status == 400


def test_local_answers(client: Client) -> None:
    assert client.command("SELECT", 0).result == "OK"
    assert client.command("CLIENT", "SETINFO", "lib-name", "x").result == "OK"
    assert client.command("CLIENT", "SETNAME", "x").result == "OK"
    assert client.post("/multi-exec", [["SELECT", 0], ["ECHO", "x"]]).json() == [{"result": "OK"}, {"result": "x"}]
    assert client.post("/pipeline", [["SELECT", 0], ["CLIENT", "SETNAME", "x"]]).json() == [{"result": "OK"}] * 2
    raw = client.post("/pipeline", [["SELECT", 0], ["ECHO", "x"]], upstash_response_format="resp2")
    assert raw.body == b"+OK\r\n$1\r\nx\r\n"


@needs_redis_7
def test_read_only_tokens_read_only(client: Client, reader: Client) -> None:
    client.command("SET", "k", "v")
    assert reader.get("/get/k").result == "v"
    assert reader.command("EVAL_RO", "return redis.call('get', 'k')", 0).result == "v"
    for argv in (["SET", "k", "x"], ["KEYS", "*"], ["SCAN", "0"], ["EVAL", "return 1", 0], ["FLUSHALL"]):
        response = reader.command(*argv)
        assert response.status == 400
        assert response.error == f"NOPERM this user has no permissions to run the '{argv[0].lower()}' command"
    assert reader.post("/multi-exec", [["GET", "k"], ["DEL", "k"]]).status == 400
    assert reader.post("/pipeline", [["GET", "k"], ["DEL", "k"]]).json()[0] == {"result": "v"}
    assert reader.get("/monitor").status == 400
    assert client.get("/get/k").result == "v"


# Scripts


def test_unknown_script_flags_are_removed_and_the_original_sha_works_in_every_worker(gateway: Gateway) -> None:
    script = "#!lua flags=allow-key-locking,no-writes\nreturn 'flagged'"
    sha = hashlib.sha1(script.encode()).hexdigest()
    with Client(gateway.port) as client:
        assert client.command("EVALSHA", sha, 0).error == "NOSCRIPT No matching script. Please use EVAL."
        assert client.command("SCRIPT", "LOAD", script).result == sha
    for _ in range(12):  # SO_REUSEPORT spreads connections over the workers
        with Client(gateway.port) as client:
            assert client.command("EVALSHA", sha, 0).result == "flagged"
            assert client.command("SCRIPT", "EXISTS", sha, "f" * 40).result == [1, 0]
            assert client.post("/multi-exec", [["EVALSHA", sha.upper(), 0]]).json() == [{"result": "flagged"}]
            assert client.post("/pipeline", [["EVALSHA", sha, 0], ["PING"]]).json()[0] == {"result": "flagged"}


@needs_redis_7
def test_eval_with_unknown_flags_makes_its_sha_known(client: Client) -> None:
    script = "#!lua flags=allow-key-locking\nreturn ARGV[1]"
    sha = hashlib.sha1(script.encode()).hexdigest()
    assert client.command("EVAL", script, 0, "a").result == "a"
    assert client.command("EVALSHA", sha, 0, "b").result == "b"
    items = client.post("/pipeline", [["SCRIPT", "LOAD", script + " "], ["SCRIPT", "LOAD", "return 1"]]).json()
    assert items[0] == {"result": hashlib.sha1((script + " ").encode()).hexdigest()}
    assert items[1] == {"result": hashlib.sha1(b"return 1").hexdigest()}
    items = client.post("/multi-exec", [["SCRIPT", "LOAD", script + "  "], ["EVAL", script, 0, "c"]]).json()
    assert items == [{"result": hashlib.sha1((script + "  ").encode()).hexdigest()}, {"result": "c"}]
    assert "Error compiling" in client.command("SCRIPT", "LOAD", script + " syntax error").error
    assert client.command("EVAL", "#!lua name=x\nreturn 1", 0).status == 400


# Streams


def read_events(client: Client, count: int) -> list[bytes]:
    events: list[bytes] = []
    while len(events) < count:
        chunk = client.read_chunk()
        assert chunk, events
        events += [event for event in chunk.split(b"\n\n") if event and not event.startswith(b":")]
    return events


def test_subscribers_hear_what_is_published(gateway: Gateway, client: Client) -> None:
    with Client(gateway.port) as one, Client(gateway.port, gateway.readonly_token) as two:
        one.send("POST", "/subscribe/chat/other", b"[]", {"Upstash-Encoding": "base64", "Accept": "text/event-stream"})
        status, headers = one.read_head()
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        assert read_events(one, 2) == [b"data: subscribe,chat,1", b"data: subscribe,other,2"]
        two.send("GET", "/psubscribe/ch%3Ft")
        assert two.read_head()[0] == 200
        assert read_events(two, 1) == [b"data: psubscribe,ch?t,1"]
        assert client.get("/publish/chat/hello").result >= 1
        assert read_events(one, 1) == [b"data: message,chat,hello"]
        assert read_events(two, 1) == [b"data: pmessage,ch?t,chat,hello"]
        client.request("POST", "/publish/chat", b"a\nb\r\nc\rd\xff")
        expected = b"a\ndata: b\ndata: c\ndata: d\xef\xbf\xbd"
        assert read_events(one, 1) == [b"data: message,chat," + expected]
        with Client(gateway.port) as three:
            three.send("GET", "/subscribe/chat")
            three.read_head()
            assert read_events(three, 1) == [b"data: subscribe,chat,1"]


def test_one_connection_carries_all_subscriptions_and_is_closed_after_the_last(
    gateway: Gateway, redis_server: RedisServer, client: Client
) -> None:
    def subscribers() -> int:
        listing = redis_server.raw(b"CLIENT LIST TYPE pubsub\r\n", 5)
        return listing.count(b"id=")

    streams = [Client(gateway.port) for _ in range(20)]
    for number, stream in enumerate(streams):
        stream.send("GET", f"/subscribe/c{number % 3}")
        assert stream.read_head()[0] == 200
        read_events(stream, 1)
    assert 1 <= subscribers() <= 2  # one per worker
    for stream in streams:
        stream.close()
    wait_for(lambda: subscribers() == 0, what="the subscriptions to end")


def test_monitor_shows_commands(gateway: Gateway, client: Client) -> None:
    with Client(gateway.port) as stream:
        stream.send("POST", "/monitor", b"", {"Accept": "text/event-stream"})
        assert stream.read_head()[0] == 200
        assert read_events(stream, 1) == [b'data: "OK"']
        client.command("SET", "monitored", "a\nb")
        while b'"SET" "monitored" "a\\nb"' not in (event := read_events(stream, 1)[0]):
            assert event.startswith(b"data: ")


def test_streams_need_a_channel_and_a_token(gateway: Gateway, client: Client) -> None:
    assert client.get("/subscribe").status == 400
    for target in ("/subscribe/head", "/psubscribe/head", "/monitor"):
        head = client.request("HEAD", target)
        assert head.status == 200
        assert head.headers["content-type"] == "text/event-stream"
        assert client.get("/echo/next").result == "next"
    assert client.command("PUBSUB", "NUMSUB", "head").result == ["head", 0]
    with Client(gateway.port, "wrong") as stranger:
        assert stranger.get("/subscribe/x").status == 401


def test_quiet_streams_get_heartbeats(redis_server: RedisServer) -> None:
    gateway = Gateway(single_instance(redis_server), ["--workers", "1", "--heartbeat-interval", "50ms"])
    try:
        with Client(gateway.port) as stream:
            stream.send("GET", "/subscribe/quiet")
            stream.read_head()
            stream.read_chunk()
            assert stream.read_chunk() == b": \n\n"
            assert stream.read_chunk() == b": \n\n"
    finally:
        gateway.stop()


# ACL RESTTOKEN


def test_resttoken_carries_the_permissions_of_its_redis_user(
    gateway: Gateway, client: Client, redis_server: RedisServer
) -> None:
    redis_server.raw(b"ACL SETUSER alice on >wonder ~a:* +get +set +eval +ping\r\n", 5)
    wrong = client.command("ACL", "RESTTOKEN", "alice", "wrong")
    assert wrong.error == 'ERR Wrong password or user "alice" does not exist'
    token = client.command("ACL", "RESTTOKEN", "alice", "wonder").result
    with Client(gateway.port, token) as alice:
        assert alice.command("SET", "a:1", "x").result == "OK"
        assert alice.command("GET", "a:1").result == "x"
        assert alice.command("GET", "b:1").error.startswith("NOPERM")
        assert alice.command("EVAL", "return redis.call('get', 'b:1')", 0).status == 400
        assert alice.command("DEL", "a:1").error.startswith("NOPERM")
        # A user who may not MULTI would have the commands of a transaction run one by one.
        response = alice.post("/multi-exec", [["SET", "a:1", "changed"], ["GET", "a:1"]])
        assert response.error == "NOPERM this user has no permissions to run the 'multi' command"
        assert alice.command("GET", "a:1").result == "x"
    tampered = token[:-2] + ("AA" if not token.endswith("AA") else "BB")
    with Client(gateway.port, tampered) as stranger:
        assert stranger.get("/get/a:1").status == 401


def test_guessing_passwords_is_throttled(redis_server: RedisServer) -> None:
    gateway = Gateway(single_instance(redis_server), ["--workers", "1"])
    try:
        with Client(gateway.port) as client:
            statuses = [client.command("ACL", "RESTTOKEN", "bob", str(number)).status for number in range(8)]
            assert statuses[:5] == [400] * 5
            assert set(statuses[5:]) == {429}
            assert int(client.command("ACL", "RESTTOKEN", "bob", "x").headers["retry-after"]) >= 1
    finally:
        gateway.stop()


# Limits and scopes, by a configuration file


def test_scoped_and_limited_tokens(redis_server: RedisServer, tmp_path: Any) -> None:
    config = tmp_path / "redisgate.toml"
    config.write_text(f"""
base_domain = "redis.test"
cors_origins = ["https://app.test"]
[[instances]]
id = "one"
slug = "first"
url = "{redis_server.unix_url}?db=1"
[[instances]]
id = "two"
url = "{redis_server.unix_url}?db=2"
[[tokens]]
name = "full"
token = "full-token"
instance = "one"
[[tokens]]
name = "other"
token = "other-token"
instance = "two"
[[tokens]]
name = "prefixed"
token = "prefix-token"
instance = "one"
prefixes = ["app:"]
[[tokens]]
name = "allowed"
token = "allow-token"
instance = "one"
allow = ["@read", "incr"]
deny = ["hgetall"]
[[tokens]]
name = "expired"
token = "expired-token"
instance = "one"
expires = 2020-01-01T00:00:00Z
[[tokens]]
name = "daily"
token = "daily-token"
instance = "one"
daily = 10
[[tokens]]
name = "rated"
token = "rate-token"
instance = "one"
rate = 5
""")
    gateway = Gateway({}, ["--config", str(config), "--workers", "2"])
    try:
        with Client(gateway.port, "full-token") as full, Client(gateway.port, "other-token") as other:
            full.command("SET", "app:k", "v")
            assert other.command("GET", "app:k").result is None  # another database
            assert full.get("/redis/first/get/app:k").result == "v"
            assert full.get("/redis/two/get/app:k").status == 401
            assert full.command("SELECT", 0).result == "OK"
            assert full.command("GET", "app:k").result == "v"
        with Client(gateway.port, "prefix-token") as client:
            assert client.command("GET", "app:k").result == "v"
            noperm = "NOPERM this user has no permissions to access one of the keys used as arguments"
            assert client.command("GET", "k").error == noperm
            assert client.command("MGET", "app:k", "k").error == noperm
            assert client.command("EVAL", "return redis.call('get', KEYS[1])", 1, "k").status == 400
            assert client.command("KEYS", "*").status == 400
            assert client.post("/multi-exec", [["SET", "app:k", "x"], ["SET", "k", "x"]]).status == 400
            assert client.command("GET", "app:k").result == "v"
            assert client.get("/subscribe/x").status == 400
        with Client(gateway.port, "allow-token") as client:
            assert client.command("INCR", "app:n").result == 1
            assert client.command("GET", "app:n").result == "1"
            assert client.command("SET", "app:n", 1).error.startswith("NOPERM")
            assert client.command("HGETALL", "h").error.startswith("NOPERM")
        with Client(gateway.port, "expired-token") as client:
            assert client.command("PING").status == 401
        with Client(gateway.port, "daily-token") as client:
            assert client.post("/pipeline", [["PING"]] * 8).status == 200
            response = client.post("/pipeline", [["PING"]] * 3)
            assert response.status == 429
            assert response.error == "ERR max daily request limit exceeded. Limit: 10, Usage: 8"
            assert 0 < int(response.headers["retry-after"]) <= 86_400
            assert client.post("/pipeline", [["PING"]] * 2).status == 200
            assert client.command("PING").status == 429
        with Client(gateway.port, "rate-token") as client:
            statuses = [client.command("PING").status for _ in range(12)]
            assert statuses[:5] == [200] * 5
            limited = client.command("PING")
            assert limited.status == 429
            assert limited.error.startswith("ERR max requests limit exceeded. Limit: 5, Usage: ")
            assert limited.headers["retry-after"] == "1"
            wait_for(lambda: client.command("PING").status == 200, what="the rate to allow more")
        # The instance's own host: every path is a command there.
        with Client(gateway.port, None) as client:
            for host, status in (
                ("first.redis.test", 200),
                ("FIRST.redis.test:3000", 200),
                ("two.redis.test", 401),
                ("x.redis.test", 401),
            ):
                head = f"GET /get/app:k HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer full-token\r\n\r\n"
                client.sock.sendall(head.encode())
                assert client.read().status == status
            client.sock.sendall(
                b"GET /auth/x HTTP/1.1\r\nHost: first.redis.test\r\nAuthorization: Bearer full-token\r\n\r\n"
            )
            assert "AUTH" in client.read().error
            # Browsers
            preflight = {"Origin": "https://app.test", "Access-Control-Request-Method": "POST"}
            response = client.request("OPTIONS", "/", b"", preflight)
            assert response.status == 204
            assert response.headers["access-control-allow-origin"] == "https://app.test"
            assert "Authorization" in response.headers["access-control-allow-headers"]
            preflight["Origin"] = "https://evil.test"
            assert client.request("OPTIONS", "/", b"", preflight).status == 405
            response = client.request("GET", "/ping?_token=full-token", b"", {"Origin": "https://app.test"})
            assert response.headers["access-control-allow-origin"] == "https://app.test"
            assert (
                client.get("/ping?_token=full-token", origin="https://evil.test").headers.get(
                    "access-control-allow-origin"
                )
                is None
            )
        assert "-token" not in gateway.log()
    finally:
        gateway.stop()


def test_pages_that_are_no_commands(gateway: Gateway) -> None:
    with Client(gateway.port, None) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/health/live").status == 200
        assert client.get("/version").json()["name"] == "RedisGate"
        assert client.get("/").json()["name"] == "RedisGate"
        for path in ("/dashboard", "/api/x", "/login", "/metrics"):
            assert client.get(path).status == 404
        assert client.get("/nosuch").status == 401
    with Client(gateway.port) as client:
        assert "AUTH" in client.get("/AUTH/x").error


def test_two_hundred_commands_have_the_bytes_of_a_plain_socket(client: Client, redis_server: RedisServer) -> None:
    script = (
        "return {redis.status_reply('fine'), redis.error_reply('ERR bad'), {false, 1, {}}, 'x', 3.9,"
        " redis.status_reply('')}"
    )
    argvs: list[list[str]] = [["EVAL", script, "0"], ["EVAL", "return redis.error_reply('MY own')", "0"]]
    for number in range(14):
        key = f"k{number}"
        argvs += [
            ["SET", key, "OK" if number % 2 else ""], ["GET", key], ["GET", key + "x"], ["STRLEN", key],
            ["LPUSH", key, "x"],
            ["RPUSH", f"l{number}", "a", "b", ""], ["LRANGE", f"l{number}", "0", "-1"], ["LPOP", "none", "1"],
            ["HSET", f"h{number}", "f", "v"], ["HGETALL", f"h{number}"], ["ZADD", f"z{number}", "1.5", "m"],
            ["ZRANGE", f"z{number}", "0", "-1", "WITHSCORES"], ["TYPE", key], ["MGET", key, "none"],
            ["GEOPOS", "g", "m"],
        ]  # fmt: skip
    argvs.append(["DEL", "k0"])
    assert len(argvs) > 200

    def encode(argv: list[str]) -> bytes:
        parts = [f"${len(item.encode())}\r\n{item}\r\n" for item in argv]
        return f"*{len(argv)}\r\n{''.join(parts)}".encode()

    payload = b"".join(encode(argv) for argv in argvs)
    client.command("FLUSHALL")
    ours = client.post("/pipeline", argvs, upstash_response_format="resp2").body
    client.command("FLUSHALL")
    singles = b"".join(client.command(*argv, upstash_response_format="resp2").body for argv in argvs)
    client.command("FLUSHALL")
    plain = redis_server.raw(payload, len(ours))
    assert ours == plain
    assert singles == plain


def test_bodies_are_complete_and_typed(client: Client) -> None:
    response = client.command("PING")
    assert response.headers["content-type"] == "application/json"
    assert response.body == b'{"result":"PONG"}'
