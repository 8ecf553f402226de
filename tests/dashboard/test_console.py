"""The console's pages without a browser: keys and values of each type, what two people change, roles, hostile data."""

import base64
import html
import re
import threading
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest

from control.browser import name_of, pretty_json
from control.pages import MAX_FORM_BYTES
from tests.control.service import PASSWORD, Api, register
from tests.dashboard.conftest import Pages, Service
from tests.servers import RedisServer, needs_redis_7

HOSTILE = "<script>alert(1)</script>\"'& \u202eright to left" + "x" * 200


@pytest.fixture(scope="module")
def service_settings() -> dict[str, str]:
    return {"REDISGATE_ALLOWED_NETWORKS": "127.0.0.0/8"}


@pytest.fixture(scope="module")
def home(owner_api: Api, redis: RedisServer) -> str:
    made = owner_api.instance("console", redis.url)
    return f"/dashboard/{owner_api.organization_id}/instances/{made['id']}"


async def visitor(service: Service, person: Api) -> Pages:
    pages = Pages(httpx.AsyncClient(base_url=service.url))
    await pages.sign_in(person.email, PASSWORD)
    return pages


@pytest.fixture
async def member(service: Service, owner_api: Api, redis: RedisServer) -> AsyncIterator[Pages]:
    redis.raw(b"FLUSHALL\r\n", 5)
    pages = await visitor(service, owner_api)
    yield pages
    await pages.client.aclose()


@pytest.fixture
async def viewer(service: Service, viewer_api: Api) -> AsyncIterator[Pages]:
    pages = await visitor(service, viewer_api)
    yield pages
    await pages.client.aclose()


def run(redis: RedisServer, *argv: str | bytes | int) -> bytes:
    """One command past the service; the raw reply."""
    words = [word if isinstance(word, bytes) else str(word).encode() for word in argv]
    payload = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
    return redis.raw(payload, 1)


def address(home: str, key: str | bytes, **more: str) -> str:
    name = name_of(key if isinstance(key, bytes) else key.encode())
    return f"{home}/data?" + urlencode({"key": name, **more})


def seen(text: str) -> str:
    """The digest in the form that saves."""
    found = re.search(r'name="action" value="save">.*?name="seen" value="([0-9a-f]*)"', text, re.S)
    assert found is not None
    return found[1]


def test_json_is_laid_out_and_stays_what_it_is() -> None:
    text = '{"a":[1.10,-0,1e400,"x, {y}: \\"z\\""],"b":{},"a":null}'
    pretty = pretty_json(text)
    assert (
        pretty == '{\n  "a": [\n    1.10,\n    -0,\n    1e400,\n    "x, {y}: \\"z\\""\n  ],\n  "b": {},\n  "a": null\n}'
    )
    assert pretty_json(pretty) == pretty


@pytest.mark.parametrize("value", [b"plain", b" padded ", b"\xff\x00", b"base64:x", b"a\nb", "chào".encode(), b""])
def test_names_of_keys_survive_addresses(value: bytes) -> None:
    from control.browser import bytes_of

    assert bytes_of(name_of(value)) == value
    assert name_of(value).strip() == name_of(value)


async def test_an_empty_instance_says_what_to_do(member: Pages, home: str) -> None:
    text = (await member.get(f"{home}/data")).text
    assert "No keys yet" in text
    assert "create a key here" in text


async def test_keys_are_listed_with_type_ttl_and_size(member: Pages, home: str, redis: RedisServer) -> None:
    run(redis, "SET", "user:1", "v", "EX", 3600)
    run(redis, "HSET", "user:2", "f", "v")
    run(redis, "RPUSH", "other", "v")
    text = (await member.get(f"{home}/data?pattern=user:*")).text
    assert "user:1" in text
    assert "user:2" in text
    assert ">other<" not in text
    assert "59 min" in text or "1 h 0 min" in text
    assert "About 3 of 3 keys" in text
    assert "user:1" not in (await member.get(f"{home}/data?pattern=user:*&type=hash")).text
    assert "Looked up directly" in (await member.get(f"{home}/data?pattern=other")).text
    assert "No key matches" in (await member.get(f"{home}/data?pattern=nothing*")).text
    for wrong, said in (
        ("type=nonsense&pattern=user:*", "is none of string"),
        ("cursor=zz&pattern=user:*", "the cursor is not one"),
        ("pattern=base64:!", "is not base64"),
        ("key=base64:!&pattern=user:*", "is not base64"),
        ("key=user:2&field=base64:!&pattern=user:*", "is not base64"),
    ):
        text = (await member.get(f"{home}/data?{wrong}", 400)).text
        assert said in text, wrong
        assert 'id="keys"' in text, wrong  # the rest of what was asked for is there
        assert "user:1" in text
    assert 'id="keys"' in (await member.get(f"{home}/data/delete?pattern=base64:!", 400)).text


async def test_a_string_is_edited_and_keeps_its_time_to_live(member: Pages, home: str, redis: RedisServer) -> None:
    run(redis, "SET", "greeting", "  hello\nworld ", "EX", 1000)
    at = address(home, "greeting")
    text = (await member.get(at)).text
    assert "\n  hello\nworld </textarea>" in text
    fields = {"action": "save", "kind": "string", "name": "", "seen": seen(text), "value_as": "text"}
    response = await member.post(at, value=" new\r\nvalue  ", **fields)
    assert "Saved." in (await member.follow(response)).text
    assert run(redis, "GET", "greeting") == b"$12\r\n new\nvalue  \r\n"
    assert b":9" in run(redis, "TTL", "greeting") or run(redis, "TTL", "greeting") == b":1000\r\n"


async def test_the_second_of_two_people_is_told(member: Pages, home: str, redis: RedisServer, service: Service) -> None:
    run(redis, "SET", "shared", "before")
    at = address(home, "shared")
    mine = (await member.get(at)).text
    run(redis, "SET", "shared", "of somebody else")
    fields = {"action": "save", "kind": "string", "name": "", "value_as": "text"}
    response = await member.post(at, 409, value="of mine", seen=seen(mine), **fields)
    assert "somebody changed this after you opened it" in response.text
    assert "of mine</textarea>" in response.text
    assert "of somebody else" in response.text
    assert run(redis, "GET", "shared") == b"$16\r\nof somebody else\r\n"
    await member.post(at, value="of mine", seen=seen(response.text), **fields)
    assert run(redis, "GET", "shared") == b"$7\r\nof mine\r\n"


async def test_the_second_is_told_of_fields_and_list_elements_too(member: Pages, home: str, redis: RedisServer) -> None:
    run(redis, "HSET", "h", "f", "1")
    run(redis, "RPUSH", "l", "a", "b", "c")
    run(redis, "ZADD", "z", "1.5", "m")
    for key, kind, name, change in (
        ("h", "hash", "f", ("HSET", "h", "f", "2")),
        ("l", "list", "1", ("LPUSH", "l", "new")),
    ):
        at = address(home, key, field=name)
        text = (await member.get(at)).text
        run(redis, *change)
        fields = {"kind": kind, "name": name, "seen": seen(text)}
        await member.post(at, 409, action="save", value="mine", value_as="text", **fields)
        await member.post(at, 409, action="take_out", **fields)
    text = (await member.get(address(home, "z"))).text
    run(redis, "ZADD", "z", "7", "m")
    await member.post(address(home, "z"), 409, action="save", kind="zset", name="m", value="2", seen=seen(text))
    assert run(redis, "HGET", "h", "f") == b"$1\r\n2\r\n"
    assert run(redis, "LRANGE", "l", 0, -1) == b"*4\r\n$3\r\nnew\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n"
    text = (await member.get(address(home, "l", field="1"))).text
    await member.post(address(home, "l"), action="take_out", kind="list", name="1", seen=seen(text))
    assert run(redis, "LRANGE", "l", 0, -1) == b"*3\r\n$3\r\nnew\r\n$1\r\nb\r\n$1\r\nc\r\n"


@pytest.mark.parametrize(
    ("kind", "first", "added", "look"),
    [
        ("hash", ("f1", "v1"), ("f2", "v2"), ("HGET", "k", "f2")),
        ("list", ("", "v1"), ("", "v2"), ("LINDEX", "k", "1")),
        ("set", ("", "v1"), ("", "v2"), ("SISMEMBER", "k", "v2")),
        ("zset", ("1.5", "v1"), ("2", "v2"), ("ZSCORE", "k", "v2")),
        ("stream", ("f1", "v1"), ("f2", "v2"), ("XLEN", "k")),
    ],
)
async def test_each_type_is_created_added_to_and_taken_from(
    member: Pages, home: str, redis: RedisServer, kind: str, first: tuple[str, str], added: tuple[str, str], look: Any
) -> None:
    await member.get(f"{home}/data")
    new = {"action": "create", "new_key": "k", "new_type": kind, "new_name": first[0], "new_value": first[1]}
    response = await member.post(f"{home}/data", new_seconds="500", **new)
    text = (await member.follow(response)).text
    assert "v1" in text
    assert run(redis, "TYPE", "k") == f"+{kind}\r\n".encode()
    assert run(redis, "TTL", "k") in (b":500\r\n", b":499\r\n")
    assert "already" in (await member.post(f"{home}/data", 409, **new)).text
    at = address(home, "k")
    fields = {"action": "add", "kind": kind, "added_name": added[0], "added_value": added[1]}
    text = (await member.follow(await member.post(at, **fields))).text
    assert "v2" in text
    assert run(redis, *look) in (b"$2\r\nv2\r\n", b":1\r\n", b"$1\r\n2\r\n", b":2\r\n")
    if kind in ("hash", "set", "zset"):
        assert "already" in (await member.post(at, 409, **fields)).text
    if kind in ("set", "zset", "stream"):
        found = re.findall(r'name="action" value="take_out">.*?name="name" value="([^"]+)"', text, re.S)
        await member.post(at, action="take_out", kind=kind, name=found[-1])
        await member.post(at, 404, action="take_out", kind=kind, name=found[-1])


async def test_a_key_is_renamed_expired_kept_and_deleted(member: Pages, home: str, redis: RedisServer) -> None:
    run(redis, "SET", "a", "1")
    run(redis, "SET", "taken", "1")
    at = address(home, "a")
    await member.get(at)
    assert "already" in (await member.post(at, 409, action="rename", to="taken")).text
    response = await member.post(at, action="rename", to="b")
    assert "key=b" in response.headers["location"]
    at = address(home, "b")
    await member.post(at, 400, action="expire", seconds="-1")
    await member.post(at, action="expire", seconds="100")
    assert run(redis, "TTL", "b") in (b":100\r\n", b":99\r\n")
    await member.post(at, action="expire", seconds="")
    assert run(redis, "TTL", "b") == b":-1\r\n"
    await member.post(at, action="delete")
    assert run(redis, "EXISTS", "b") == b":0\r\n"
    await member.post(at, 404, action="delete")
    assert "no such key" in (await member.get(at, 404)).text


async def test_binary_is_shown_as_hex_and_base64_and_edited(member: Pages, home: str, redis: RedisServer) -> None:
    key, value = b"\x00\xffkey", b"\x89PNG\r\n\x1a\n"
    run(redis, "SET", key, value)
    assert urlencode({"key": name_of(key)}) in (await member.get(f"{home}/data")).text
    text = (await member.get(address(home, key))).text
    assert "00000000  89 50 4e 47 0d 0a 1a 0a" in text
    assert base64.b64encode(value).decode() in text
    fields = {"action": "save", "kind": "string", "name": "", "seen": seen(text), "value_as": "base64"}
    await member.post(address(home, key), 400, value="***", **fields)
    await member.post(address(home, key), value=base64.b64encode(b"\xfe\xff").decode(), **fields)
    assert run(redis, "GET", key) == b"$2\r\n\xfe\xff\r\n"


async def test_json_is_laid_out_and_checked(member: Pages, home: str, redis: RedisServer) -> None:
    run(redis, "SET", "doc", '{"a":[1,2]}')
    at = address(home, "doc")
    text = (await member.get(at)).text
    assert html.unescape(text).count('{\n  "a": [\n    1,\n    2\n  ]\n}') == 1
    fields = {"action": "save", "kind": "string", "name": "", "seen": seen(text), "json": "1", "value_as": "text"}
    response = await member.post(at, 400, value='{"a": [1,', **fields)
    assert "is not JSON" in response.text
    assert "line 1, column 10" in response.text
    await member.post(at, value='{"a": 2}', **fields)
    assert run(redis, "GET", "doc") == b'$8\r\n{"a": 2}\r\n'


async def test_hostile_names_and_values_are_data(member: Pages, home: str, redis: RedisServer) -> None:
    run(redis, "HSET", HOSTILE, HOSTILE, HOSTILE)
    run(redis, "XADD", "s" + HOSTILE, "*", HOSTILE, HOSTILE)
    run(redis, "ZADD", "z" + HOSTILE, 1, HOSTILE)
    for target in (
        f"{home}/data",
        f"{home}/data?" + urlencode({"pattern": HOSTILE}),
        address(home, HOSTILE),
        address(home, HOSTILE, field=HOSTILE),
        address(home, "s" + HOSTILE),
        address(home, "z" + HOSTILE),
        f"{home}/data/delete?" + urlencode({"pattern": HOSTILE}),
    ):
        text = (await member.get(target)).text
        assert "<script>alert" not in text
        assert len(text.encode()) < 60_000
    await member.get(f"{home}/cli")
    response = await member.post(
        f"{home}/cli", 200, lines=f"GET '{HOSTILE.replace(chr(39), '')}'\nGET \"<script>alert(1)\""
    )
    assert "<script>alert" not in response.text
    response = await member.post(f"{home}/cli", 400, lines='"<script>alert(1)</script>')
    assert "<script>alert" not in response.text


async def test_large_values_and_collections_are_cut(member: Pages, home: str, redis: RedisServer) -> None:
    run(redis, "SET", "big", "x" * 1_000_000)
    text = (await member.get(address(home, "big"))).text
    assert "64 KiB of 976.6 KiB are shown" in text
    assert '<textarea id="edit-value"' not in text
    assert len(text) < 90_000
    run(redis, "EVAL", "for i = 1, 100000 do redis.call('ZADD', KEYS[1], i, 'member' .. i) end", 1, "zset")
    run(redis, "EVAL", "for i = 1, 1000 do redis.call('XADD', KEYS[1], i .. '-1', 'f', i) end", 1, "stream")
    run(redis, "EVAL", "for i = 1, 1000 do redis.call('HSET', KEYS[1], 'f' .. i, i) end", 1, "hash")
    for key, last, following in (("zset", "member50", "member51"), ("stream", "951-1", "950-1")):
        text = (await member.get(address(home, key))).text
        assert f">{last}<" in text
        assert f">{following}<" not in text
        onward = re.search(r'href="([^"]*at=[^"]+)"', text)
        assert onward is not None
        text = (await member.get(html.unescape(onward[1]))).text
        assert f">{following}<" in text
    text = (await member.get(address(home, "hash", match="f77*"))).text
    assert ">f770<" in text
    assert ">f1<" not in text


@pytest.mark.parametrize("kind", ["hash", "list", "set", "stream"])
async def test_huge_elements_are_shown_by_their_heads(
    member: Pages, home: str, redis: RedisServer, kind: str, owner_api: Api
) -> None:
    fill = {
        "hash": "redis.call('HSET', KEYS[1], 'f' .. i, i .. big)",
        "list": "redis.call('RPUSH', KEYS[1], i .. big)",
        "set": "redis.call('SADD', KEYS[1], i .. big)",
        "stream": "redis.call('XADD', KEYS[1], i .. '-1', 'f', i .. big)",
    }[kind]
    run(redis, "EVAL", f"local big = string.rep('x', 1000000) for i = 1, 40 do {fill} end", 1, "huge")
    text = (await member.get(address(home, "huge"))).text
    assert text.count(" KiB in all") + text.count("976.6 KiB") >= 40
    assert len(text) < 400_000
    if kind in ("hash", "list"):
        edited = (await member.get(address(home, "huge", field="f7" if kind == "hash" else "6"))).text
        assert "The first 64 KiB of 976.6 KiB are shown" in edited
        assert '<textarea id="edit-value"' not in edited


async def test_many_keys_are_counted_and_deleted(member: Pages, home: str, redis: RedisServer) -> None:
    run(redis, "EVAL", "for i = 1, 3000 do redis.call('SET', 'many:' .. i, i) end", 0)
    run(redis, "SET", "other", "1")
    target = f"{home}/data/delete"
    assert "3000 keys match" in (await member.get(f"{target}?pattern=many:*")).text
    await member.post(target, 400, pattern="many:*", confirm="many")
    response = await member.post(target, pattern="many:*", confirm="many:*")
    assert "3000 keys deleted" in (await member.follow(response)).text
    assert run(redis, "DBSIZE") == b":1\r\n"
    await member.get(target, 303)


async def test_the_command_line_works_without_scripts(member: Pages, home: str, redis: RedisServer) -> None:
    await member.get(f"{home}/cli")
    text = (await member.post(f"{home}/cli", 200, lines="SET a 1\nINCR a\nLRANGE none 0 -1\nNOSUCH")).text
    for shown in ("&gt; SET a 1", "OK", "(integer) 2", "(empty array)", "(error) ERR unknown command"):
        assert shown in text
    response = await member.post(f"{home}/cli", 409, lines="FLUSHALL")
    assert "FLUSHALL deletes every key" in response.text
    assert "FLUSHALL</textarea>" in response.text
    await member.post(f"{home}/cli", 200, lines="FLUSHALL", confirmed="1")
    assert run(redis, "DBSIZE") == b":0\r\n"


@needs_redis_7
async def test_a_script_that_does_not_end_is_ended_from_the_data_browser(
    member: Pages, viewer: Pages, home: str, redis: RedisServer
) -> None:
    run(redis, "CONFIG", "SET", "busy-reply-threshold", 100)
    stuck = threading.Thread(target=run, args=(redis, "EVAL", "while true do end", 0))
    stuck.start()
    deadline = time.monotonic() + 10
    while not run(redis, "PING").startswith(b"-BUSY"):
        assert time.monotonic() < deadline
    text = (await member.get(f"{home}/data", 503)).text
    assert "a script runs on this instance" in text
    assert 'name="lines" value="SCRIPT KILL"' in text
    assert 'value="SCRIPT KILL"' not in (await viewer.get(f"{home}/data", 503)).text
    assert "OK" in (await member.post(f"{home}/cli", 200, lines="SCRIPT KILL")).text
    stuck.join()
    run(redis, "CONFIG", "SET", "busy-reply-threshold", 5000)
    await member.get(f"{home}/data")


async def test_no_kind_of_form_brings_more_text_than_the_bound(viewer: Pages, home: str) -> None:
    await viewer.get(f"{home}/cli")
    large = "x" * MAX_FORM_BYTES
    token = {"csrf_token": viewer.csrf}
    for part in ((None, large), ("a.txt", large)):  # as text, and as a file where none is taken
        response = await viewer.client.post(f"{home}/cli", data=token, files={"lines": part})
        assert response.status_code == 413, response.text
        assert "at most 1048576" in response.text
    small = await viewer.client.post(f"{home}/cli", data=token, files={"lines": (None, "PING")})
    assert small.status_code == 200
    assert "PONG" in small.text
    load = f"{home}/snapshot"  # which takes files
    response = await viewer.client.post(load, data=token, files={"name": (None, large + "x")})
    assert response.status_code == 413


async def test_publishing_works_without_scripts(member: Pages, home: str) -> None:
    text = (await member.get(f"{home}/pubsub")).text
    assert "curl -N -X POST" in text
    response = await member.post(f"{home}/pubsub", channel="news", message="hello", message_as="text")
    assert "received by 0 subscribers" in (await member.follow(response)).text
    await member.post(f"{home}/pubsub", 400, channel="", message="x")
    assert "curl -N -X POST" in (await member.get(f"{home}/monitor")).text


async def test_a_viewer_sees_everything_and_changes_nothing(
    viewer: Pages, member: Pages, home: str, redis: RedisServer
) -> None:
    run(redis, "SET", "k", "value")
    run(redis, "HSET", "h", "f", "v")
    for target in (f"{home}/data", address(home, "k"), address(home, "h"), address(home, "h", field="f")):
        text = (await viewer.get(target)).text
        assert 'name="action"' not in text
    assert "value" in (await viewer.get(address(home, "k"))).text
    assert "role member" in (await viewer.get(f"{home}/monitor")).text
    assert "You can listen" in (await viewer.get(f"{home}/pubsub")).text
    await viewer.get(f"{home}/data/delete?pattern=*", 403)
    await viewer.get(f"{home}/cli")
    assert "value" in (await viewer.post(f"{home}/cli", 200, lines="GET k")).text
    assert "NOPERM" in (await viewer.post(f"{home}/cli", 200, lines="SET k changed")).text
    await viewer.post(address(home, "k"), 403, action="delete")
    await viewer.post(f"{home}/pubsub", 403, channel="c", message="m")
    assert run(redis, "GET", "k") == b"$5\r\nvalue\r\n"


async def test_forms_without_their_token_do_nothing(member: Pages, home: str, redis: RedisServer) -> None:
    run(redis, "SET", "k", "v")
    for target, fields in (
        (address(home, "k"), {"action": "delete"}),
        (f"{home}/data/delete", {"pattern": "*", "confirm": "*"}),
        (f"{home}/cli", {"lines": "DEL k"}),
        (f"{home}/pubsub", {"channel": "c", "message": "m"}),
    ):
        await member.post(target, 403, csrf_token="0" * 64, **fields)
    assert run(redis, "EXISTS", "k") == b":1\r\n"


async def test_strangers_find_nothing(service: Service, home: str) -> None:
    pages = await visitor(service, register(service.port, "stranger"))
    for tab in ("data", "cli", "monitor", "pubsub"):
        await pages.get(f"{home}/{tab}", 404)
    await pages.client.aclose()


@pytest.mark.parametrize("tab", ["data", "cli", "monitor", "pubsub"])
async def test_the_pages_are_in_vietnamese_too(member: Pages, home: str, tab: str, redis: RedisServer) -> None:
    run(redis, "SET", "k", "v")
    headers = {"Accept": "text/html", "Accept-Language": "vi"}
    text = (await member.client.get(f"{home}/{tab}?key=k", headers=headers)).text
    assert 'lang="vi"' in text
    assert {"data": "Xóa khóa", "cli": "Lệnh", "monitor": "Lệnh đang chạy", "pubsub": "Lắng nghe"}[tab] in text


async def test_an_instance_that_is_away_is_told_on_its_pages(member: Pages, owner_api: Api, service: Service) -> None:
    other = RedisServer()
    made = owner_api.instance("away", other.url)
    other.kill()
    home = f"/dashboard/{owner_api.organization_id}/instances/{made['id']}"
    text = (await member.get(f"{home}/data", 503)).text
    assert "does not answer" in text
    assert "Try again" in text
    assert "does not answer" in (await member.get(f"{home}/data/delete?pattern=*", 503)).text
    response = await member.post(f"{home}/cli", 503, lines="PING")
    assert "nothing was run" in response.text
    assert "PING</textarea>" in response.text
