"""The console over HTTP, on a real service and a real Redis: by role, bounded, shown as redis-cli shows it."""

import base64
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from control import browser, console
from control.console import LineError, format_reply, quoted, split_line, split_lines
from control.http import BadRequest
from redisgate.access import Instance
from redisgate.config import InstanceConfig
from redisgate.scripts import ScriptCache
from redisgate.shared import SharedState
from resp.address import parse_url
from tests.control.conftest import Service, Urls
from tests.control.service import Api, execute, register
from tests.http import Client
from tests.servers import RedisServer, needs_redis_7, wait_for


@pytest.fixture(scope="module")
def service_settings() -> dict[str, str]:
    return {"REDISGATE_ALLOWED_NETWORKS": "127.0.0.0/8"}


@pytest.fixture(scope="module")
def instance(owner_api: Api, redis: RedisServer) -> str:
    return str(owner_api.instance("console", redis.url)["id"])


class Terminal:
    """One person at one instance's console."""

    def __init__(self, api: Api, instance: str) -> None:
        self.api = api
        self.path = f"redis-instances/{instance}/console"

    def run(self, lines: str, **more: Any) -> list[str]:
        data = self.api.call("POST", f"{self.path}/commands", {"lines": lines, **more})
        return [reply["text"] for reply in data["replies"]]

    def post(self, path: str, body: Any) -> Any:
        target = f"/api/organizations/{self.api.organization_id}/{self.path}/{path}"
        with Client(self.api.port, self.api.token) as client:
            return client.post(target, body)


@pytest.fixture
def terminal(owner_api: Api, instance: str, redis: RedisServer) -> Terminal:
    redis.raw(b"FLUSHALL\r\n", 5)
    return Terminal(owner_api, instance)


@pytest.fixture
def reader(viewer_api: Api, instance: str) -> Terminal:
    return Terminal(viewer_api, instance)


# Lines, as redis-cli reads them


@pytest.mark.parametrize(
    ("line", "argv"),
    [
        ("", []),
        ("  get   key ", [b"get", b"key"]),
        (r'set "a b" "\x00\xff\n\"\\"', [b"set", b"a b", b'\x00\xff\n"\\']),
        (r"set 'it''s' x", None),
        (r"echo 'it\'s \n'", [b"echo", rb"it's \n"]),
        ('echo pre"fix"', [b"echo", b"prefix"]),
        ('echo ""', [b"echo", b""]),
        ("echo Xin chào", [b"echo", b"Xin", "chào".encode()]),
        (r'echo "\xzz"', [b"echo", b"xzz"]),
        ('echo "open', None),
        ("echo 'open", None),
        ('echo "a"b', None),
    ],
)
def test_a_line_is_split_as_by_redis_cli(line: str, argv: list[bytes] | None) -> None:
    if argv is None:
        with pytest.raises(LineError):
            split_line(line)
    else:
        assert split_line(line) == argv


def test_what_is_shown_of_bytes_is_read_back_as_the_same() -> None:
    value = bytes(range(256))
    assert split_line(f"echo {quoted(value)}") == [b"echo", value]


def test_long_lines_and_many_commands_are_refused_before_they_are_split() -> None:
    longest = "x" * console.MAX_LINE_CHARACTERS
    assert split_lines(longest + "\n" * 100_000) == [[longest.encode()]]
    with pytest.raises(BadRequest, match=r"line 2 cannot be read: it has 65537 characters"):
        split_lines("ping\n" + longest + "x")
    assert len(split_lines("ping\n" * console.MAX_COMMANDS)) == console.MAX_COMMANDS
    # What follows is not even looked at.
    with pytest.raises(BadRequest, match="more than 1000 commands"):
        split_lines("ping\n" * (console.MAX_COMMANDS + 1) + '"')


# Replies, as redis-cli prints them

SESSION = r"""
ping
set k "a\"b\\\n\t\x00\xff é"
get k
get none
incr n
incr k
rpush l a b c d e f g h i j k l
lrange l 0 -1
lrange l 5 1
hset h f v g w
hgetall h
eval "return {1,{2,{3,'x'},{}},'y',false,{err='E r'}}" 0
nosuch a b
get
multi
incr n
lrange l 0 1
exec
geoadd places 13.361389 38.115556 Palermo
geosearch places fromlonlat 15 37 byradius 200 km withcoord withdist
xadd s 1-1 f v
xrange s - +
command info get nosuch
lolwut version 5 1 1 1
memory doctor
"""


def test_replies_look_as_in_redis_cli(terminal: Terminal, redis: RedisServer) -> None:
    client = shutil.which("redis-cli")
    assert client is not None, "apt-get install redis-tools"
    lines = SESSION.strip().splitlines()
    shown = terminal.run(SESSION)
    redis.raw(b"FLUSHALL\r\n", 5)
    expected = subprocess.run(
        [client, "-p", str(redis.port), "--no-raw"], input=SESSION.strip(), capture_output=True, text=True, check=True
    ).stdout.rstrip("\n")
    said, meant = ([line for line in text.splitlines() if line] for text in ("\n".join(shown), expected))
    assert said == meant, lines


def test_reports_are_shown_to_be_read(terminal: Terminal) -> None:
    text, doctor, client, other = terminal.run("info server\nmemory doctor\nclient info\necho 'a\"b'")
    assert text.startswith("# Server\nredis_version:")
    assert "\\r\\n" not in text
    assert not doctor.startswith('"')
    assert client.startswith("id=")
    assert other == r'"a\"b"'


def test_a_transaction_runs_as_one_and_not_without_its_exec(terminal: Terminal) -> None:
    assert terminal.run("MULTI\nset a 1\nincr a\nEXEC") == ["OK", "QUEUED", "QUEUED", "1) OK\n2) (integer) 2"]
    assert terminal.run("MULTI\nset a 9\nDISCARD") == ["OK", "QUEUED", "OK"]
    replies = terminal.run("MULTI\nset a 9\nmigrate h 1 k 0 1\nEXEC\nget a")
    assert replies[2].startswith("(error) ERR MIGRATE is not available")
    assert replies[3] == "(error) EXECABORT Transaction discarded because of previous errors."
    assert replies[4] == '"2"'
    assert "has no EXEC" in terminal.run("MULTI\nset a 9")[0]
    assert terminal.run("get a") == ['"2"']
    assert terminal.run("MULTI\nselect 0\nget a\nEXEC")[-1] == '1) "OK"\n2) "2"'


def test_the_policy_of_the_gateway_holds(terminal: Terminal) -> None:
    for line in ("subscribe x", "monitor", "select 1", "config set maxmemory 1", "debug sleep 1", "auth x", "exec"):
        assert terminal.run(line)[0].startswith("(error) ERR"), line
    assert "a token is no thing" in terminal.run("acl resttoken a b")[0]


def test_a_script_with_flags_runs(terminal: Terminal) -> None:
    assert terminal.run(r'eval "#!lua flags=allow-key-locking\nreturn 7" 0') == ["(integer) 7"]


def test_values_keep_their_types(terminal: Terminal) -> None:
    data = terminal.api.call("POST", f"{terminal.path}/commands", {"lines": 'set b "\\xff"\nget b\nget c\nincr n'})
    assert [reply["reply"] for reply in data["replies"]] == [
        {"type": "status", "text": "OK"},
        {"type": "bulk", "base64": base64.b64encode(b"\xff").decode()},
        {"type": "nil"},
        {"type": "integer", "integer": 1},
    ]


# Roles


def test_a_viewer_reads_and_never_writes(terminal: Terminal, reader: Terminal) -> None:
    terminal.run("set k v")
    assert reader.run("get k\ntype k\nttl k") == ['"v"', "string", "(integer) -1"]
    assert reader.run("scan 0")[0].endswith('2) 1) "k"')
    for line in ("set k w", "del k", "eval 'return 1' 0", "publish c m", "expire k 1", "function flush"):
        answer = reader.run(line, confirmed=True)
        assert answer[0].startswith("(error) NOPERM"), line
    assert reader.run("MULTI\nset k w\nEXEC")[-1].startswith("(error) EXECABORT")
    assert reader.post("delete-keys", {"pattern": "*"}).status == 403
    assert terminal.run("get k") == ['"v"']


def test_a_stranger_and_an_api_key_are_refused(service: Service, terminal: Terminal, owner_api: Api) -> None:
    stranger = register(service.port)
    path = f"/api/organizations/{owner_api.organization_id}/{terminal.path}/commands"
    with Client(service.port, stranger.token) as client:
        assert client.post(path, {"lines": "ping"}).status == 404
    key, _ = owner_api.key(scopes=["manage", "read", "write"])
    with Client(service.port, key) as client:
        response = client.post(path, {"lines": "ping"})
        assert response.status == 403
        assert "sign in as a person" in response.json()["message"]
    other = f"/api/organizations/{stranger.organization_id}/{terminal.path}/commands"
    with Client(service.port, stranger.token) as client:
        assert client.post(other, {"lines": "ping"}).status == 404


def test_what_is_dangerous_asks_first_and_is_put_on_record(
    terminal: Terminal, owner_api: Api, database_urls: Urls
) -> None:
    terminal.run("set k v")
    response = terminal.post("commands", {"lines": "get k\nflushall"})
    assert response.status == 409
    assert response.json()["data"]["confirm"] == ["FLUSHALL deletes every key"]
    assert terminal.run("get k") == ['"v"']
    assert terminal.run("get k\nflushall", confirmed=True) == ['"v"', "OK"]
    events = owner_api.call("GET", "audit-logs?action=console.dangerous")["items"]
    assert events[0]["after"] == {"commands": ["FLUSHALL deletes every key"]}
    terminal.run("set a 1\nset b 1\nset other 1")
    assert terminal.post("delete-keys", {"pattern": "?"}).json()["data"]["count"] == 2
    events = owner_api.call("GET", "audit-logs?action=console.delete_keys")["items"]
    assert events[0]["after"] == {"pattern": "?", "type": None}
    assert terminal.run("dbsize") == ["(integer) 1"]


def test_what_is_dangerous_in_a_script_asks_first_too(terminal: Terminal, owner_api: Api) -> None:
    terminal.run("set k v")
    for line in (
        "eval \"return redis.call('flushall')\" 0",
        "eval \"return redis.pcall( 'FlushAll' )\" 0",
        "eval 'return redis.call([[flushall]])' 0",
        "script load \"return redis.call('flushall')\"",
    ):
        response = terminal.post("commands", {"lines": line})
        assert response.status == 409, line
        assert response.json()["data"]["confirm"][0].endswith("runs FLUSHALL, which deletes every key")
    assert terminal.run("get k") == ['"v"']
    assert terminal.run("eval \"return redis.call('get', KEYS[1])\" 1 k") == ['"v"']  # KEYS there is no command
    assert terminal.run("eval \"return redis.call('flushall')\" 0", confirmed=True) == ["OK"]
    events = owner_api.call("GET", "audit-logs?action=console.dangerous")["items"]
    assert events[0]["after"] == {"commands": ["EVAL runs FLUSHALL, which deletes every key"]}


def test_a_viewer_runs_no_script_and_a_member_ends_one(
    terminal: Terminal, reader: Terminal, redis: RedisServer
) -> None:
    for line in ("eval_ro 'while true do end' 0", "evalsha_ro x 0", "fcall_ro f 0"):
        assert reader.run(line)[0].startswith("(error) NOPERM a script may hold up everybody"), line
    for line in ("script kill", "function kill"):
        assert "not available" in reader.run(line)[0]
    assert terminal.run("script kill")[0].startswith("(error) NOTBUSY")
    assert terminal.run("function kill")[0].startswith("(error) NOTBUSY")


@needs_redis_7
@pytest.mark.parametrize("kind", ["SCRIPT", "FUNCTION"])
def test_whoever_began_what_does_not_end_ends_it(terminal: Terminal, redis: RedisServer, kind: str) -> None:
    redis.raw(b"CONFIG SET busy-reply-threshold 100\r\n", 5)
    line = "eval 'while true do end' 0"
    if kind == "FUNCTION":
        loop = "callback=function() while true do end end, flags={'no-writes'}"
        library = rf"#!lua name=forever\nredis.register_function{{function_name='forever', {loop}}}"
        terminal.run(f'function load replace "{library}"')
        line = "fcall forever 0"
    answers: list[list[str]] = []
    thread = threading.Thread(target=lambda: answers.append(terminal.run(line)))
    thread.start()
    try:
        wait_for(lambda: "BUSY" in terminal.run("get k")[0], what="a busy server")
        # By a connection of its own: the one that the script came by answers nothing.
        assert terminal.run(f"{kind} KILL") == ["OK"]
    finally:
        thread.join()
        redis.raw(b"CONFIG SET busy-reply-threshold 5000\r\n", 5)
    assert "killed by user" in answers[0][0].lower()
    assert terminal.run("get k") == ["(nil)"]


async def test_the_browser_adds_nothing_beyond_the_capacity(redis: RedisServer) -> None:
    instance = Instance(InstanceConfig("full", parse_url(redis.url)), ScriptCache(SharedState.anonymous(1)))
    session: Any = console.ConsoleSession(None, instance, None, True)  # type: ignore[arg-type]
    redis.raw(b"FLUSHALL\r\n", 5)
    await browser.create(session, b"h", "hash", b"f", b"v")
    instance.over_capacity = True
    for writing in (
        browser.create(session, b"k", "string", b"", b"v"),
        browser.save(session, b"h", "hash", b"f", b"w", browser.digest(b"v")),
        browser.add(session, b"h", "hash", b"g", b"w"),
        browser.add(session, b"l", "list", b"", b"w"),
    ):
        with pytest.raises(browser.OverCapacity):
            await writing
    await browser.take_out(session, b"h", "hash", b"f", browser.digest(b"v"))
    assert redis.raw(b"DBSIZE\r\n", 4) == b":0\r\n"
    instance.abort()


def test_the_console_counts_against_no_quota(terminal: Terminal, owner_api: Api, database_urls: Urls) -> None:
    execute(database_urls.owner, "UPDATE quotas SET commands_per_day = 1")
    try:
        assert terminal.run("ping\n" * 50) == ["PONG"] * 50
    finally:
        execute(database_urls.owner, "UPDATE quotas SET commands_per_day = NULL")


# Bounds


def test_what_is_too_large_to_show_says_so(terminal: Terminal, redis: RedisServer) -> None:
    terminal.run("eval \"redis.call('set', 'big', string.rep('x', 2000000))\" 0")
    data = terminal.api.call("POST", f"{terminal.path}/commands", {"lines": "get big\nping"})
    first, second = data["replies"]
    assert first["reply"]["size"] == 2_000_000
    assert len(first["reply"]["text"]) == console.MAX_SHOWN_BYTES - 7
    assert second["reply"] == {"type": "omitted"}
    terminal.run("eval \"for i = 1, 30000 do redis.call('rpush', 'many', i) end\" 0")
    node = terminal.api.call("POST", f"{terminal.path}/commands", {"lines": "lrange many 0 -1"})["replies"][0]["reply"]
    assert len(node["items"]) + node["omitted"] == 30000
    assert format_reply(node).endswith(f"({node['omitted']} more, not shown)")
    assert terminal.post("commands", {"lines": "ping\n" * 1001}).status == 400


def test_large_replies_do_not_take_the_connection_from_others(
    terminal: Terminal, owner_api: Api, instance: str, service: Service
) -> None:
    terminal.run("eval \"redis.call('set', 'big', string.rep('x', 3000000))\" 0\nset small v")
    lines = "get big\n" * 30 + "get small\nMULTI\n" + "get big\n" * 25 + "EXEC\nset after 1"
    answers: list[list[str]] = []
    thread = threading.Thread(target=lambda: answers.append(terminal.run(lines)))
    thread.start()
    token = owner_api.call("GET", f"redis-instances/{instance}/credentials")["token"]
    with Client(service.port, token) as client:
        while thread.is_alive():
            assert client.command("LRANGE", "none", 0, -1).result == []  # by the slow lane
    thread.join()
    assert len(answers[0]) == 59
    assert answers[0][0].endswith("… (3000000 bytes, cut here)")
    assert answers[0][-1].startswith("(not shown")
    assert terminal.run("get after") == ['"1"']


def test_nested_replies_are_shown_to_a_bound(terminal: Terminal) -> None:
    text = terminal.run('eval "local t = {} for i = 1, 60 do t = {t} end return t" 0')[0]
    assert "1 more, not shown" in text


def test_requests_of_one_person_are_bounded(terminal: Terminal, redis: RedisServer) -> None:
    redis.pause()
    try:
        responses: list[int] = []

        def ask() -> None:
            responses.append(terminal.post("commands", {"lines": "ping"}).status)

        # Two workers: beyond twice the bound somebody is refused, wherever the connections went.
        threads = [threading.Thread(target=ask) for _ in range(2 * console.MAX_PER_PERSON + 2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: 429 in responses, what="a refusal")
    finally:
        redis.resume()
    for thread in threads:
        thread.join()
    assert set(responses) == {200, 429}


# Streams


class Events:
    """A stream of events in a thread's place: read as they come."""

    def __init__(self, api: Api, path: str) -> None:
        self._client = Client(api.port, api.token)
        self._client.send("GET", f"/api/organizations/{api.organization_id}/{path}")
        self.status, self.headers = self._client.read_head()
        self._text = ""

    def next(self) -> tuple[str, Any]:
        while True:
            block, end, rest = self._text.partition("\n\n")
            if not end:
                chunk = self._client.read_chunk().decode()
                assert chunk, "the stream ended without a word"
                self._text += chunk
                continue
            self._text = rest
            fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if fields:
                return fields.get("event", ""), json.loads(fields["data"])

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def listen(owner_api: Api) -> Iterator[Any]:
    opened: list[Events] = []

    def begin(path: str, api: Api = owner_api) -> Events:
        opened.append(Events(api, path))
        return opened[-1]

    yield begin
    for events in opened:
        events.close()


def test_the_monitor_shows_commands_filtered(terminal: Terminal, listen: Any, redis: RedisServer) -> None:
    events = listen(f"{terminal.path}/monitor?filter=WANTED")
    assert events.status == 200
    assert events.headers["content-type"].startswith("text/event-stream")
    assert events.next() == ("ready", {})
    redis.raw(b"SET other 1\r\nSET wanted 1\r\n", 10)
    kind, event = events.next()
    assert kind == ""
    assert '"SET" "wanted" "1"' in event["value"]["text"]


def test_messages_of_channels_and_patterns_arrive(terminal: Terminal, reader: Terminal, listen: Any) -> None:
    events = listen(f"{terminal.path}/subscribe?channels=news&patterns=n*+x*", reader.api)
    assert events.next() == ("ready", {})
    terminal.run(r'publish news "a\nb"' + "\n" + r'publish xx "\xff"')
    received = [events.next()[1] for _ in range(3)]
    assert received[0]["channel"] == {"type": "bulk", "text": "news"}
    assert received[0]["value"] == {"type": "bulk", "text": "a\nb"}
    assert received[2]["pattern"]["text"] == "x*"
    assert "base64" in received[2]["value"]


def test_a_flood_is_skipped_and_counted(terminal: Terminal, listen: Any, redis: RedisServer) -> None:
    events = listen(f"{terminal.path}/monitor?filter=flood")
    assert events.next() == ("ready", {})
    redis.raw(b"SET flood 1\r\n" * 20_000, 5 * 20_000)
    kinds = []
    while "skipped" not in kinds:
        kinds.append(events.next()[0])
    assert len(kinds) < 20_000


def test_a_viewer_may_not_watch_commands(reader: Terminal, listen: Any) -> None:
    assert listen(f"{reader.path}/monitor", reader.api).status == 403


def test_a_stream_ends_with_the_right_to_it(service: Service, owner_api: Api, instance: str, listen: Any) -> None:
    person = register(service.port, "leaving")
    invitation = owner_api.call("POST", "invitations", {"email": person.email, "role": "member"})
    person.call("POST", "/api/invitations/accept", {"token": invitation["token"]})
    member = Api(service.port, person.token, owner_api.organization_id, person.email)
    events = listen(f"redis-instances/{instance}/console/subscribe?channels=c", member)
    assert events.next() == ("ready", {})
    person.call("POST", f"/api/organizations/{owner_api.organization_id}/leave")
    kind, event = events.next()  # at the next look, seconds later
    assert kind == "ended"
    assert "no such organization" in event["reason"]


def test_streams_of_one_person_are_bounded(terminal: Terminal, listen: Any) -> None:
    from control.live import MAX_STREAMS_PER_PERSON

    statuses = [listen(f"{terminal.path}/subscribe?channels=c").status for _ in range(2 * MAX_STREAMS_PER_PERSON + 1)]
    assert 429 in statuses


def test_redis_that_is_away_is_told(service: Service, owner_api: Api, listen: Any) -> None:
    other = RedisServer()
    made = owner_api.instance("away", other.url)
    terminal = Terminal(owner_api, made["id"])
    assert terminal.run("ping") == ["PONG"]
    other.kill()
    response = terminal.post("commands", {"lines": "ping"})
    assert response.status in (502, 503)
    assert "nothing was run" in response.json()["message"] or "may have run" in response.json()["message"]


def test_the_head_of_a_stream_is_an_answer_of_its_own(terminal: Terminal) -> None:
    target = f"/api/organizations/{terminal.api.organization_id}/{terminal.path}/subscribe?channels=c"
    with Client(terminal.api.port, terminal.api.token) as client:
        client.send("HEAD", target)
        response = client.read(head_only=True)
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/event-stream")
