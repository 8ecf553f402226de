"""The console over HTTP. What it does stands in `control.console`, `control.browser` and `control.live`."""

from typing import Any

import msgspec

from control import browser, live
from control.console import DELETES_KEYS, bulk, format_answer, note, open_session, run_typed, split_lines
from control.http import ApiRequest, BadRequest, Reply, endpoint

_PATH = "/api/organizations/{org_id}/redis-instances/{instance_id}/console"
_TAGS = ("Console",)


class RunCommands(msgspec.Struct, forbid_unknown_fields=True):
    """Commands as typed: a line each, with quotes as redis-cli takes them. MULTI … EXEC lines are one transaction."""

    lines: str
    confirmed: bool = False
    """That dangerous commands are meant."""


class CommandReply(msgspec.Struct):
    """What one command was answered: typed, and as redis-cli prints it."""

    reply: dict[str, Any]
    text: str


class Replies(msgspec.Struct):
    """In the order of the commands."""

    replies: list[CommandReply]


@endpoint(
    "POST",
    _PATH + "/commands",
    permission="console.read",
    body=RunCommands,
    response=Replies,
    summary="Run commands at the console",
    tags=_TAGS,
)
async def run(request: ApiRequest, body: RunCommands) -> object:
    """A viewer's only read. What is dangerous is answered with 409 and what it would do, until it is `confirmed`; then
    it is put on record. A reply is `{"type": "status" | "error" | "integer" | "bulk" | "nil" | "array", …}`; what is no
    text is `base64`. The commands count against no quota.
    """
    commands = split_lines(body.lines)
    if not commands:
        raise BadRequest("some fields are wrong", {"lines": "holds no command"})
    async with open_session(request) as session:
        nodes = await run_typed(session, commands, confirmed=body.confirmed)
    return {
        "replies": [
            {"reply": node, "text": format_answer(argv, node)} for argv, node in zip(commands, nodes, strict=True)
        ]
    }


class FindKeys(msgspec.Struct):
    """`pattern` as of SCAN; a name without `*`, `?` and `[` is looked up directly. `cursor` of the page before."""

    pattern: str = ""
    type: str = ""
    cursor: str = "0"


class FoundKey(msgspec.Struct):
    """A key; `ttl` in milliseconds, null: it does not expire. `memory` in bytes; `size` in bytes or elements."""

    name: dict[str, Any]
    type: str
    ttl: int | None
    memory: int | None
    size: int | None


class KeysPage(msgspec.Struct):
    """A `cursor` of "0" is the end. `scanned` keys of `total` were looked at."""

    keys: list[FoundKey]
    cursor: str
    scanned: int
    total: int


@endpoint(
    "GET",
    _PATH + "/keys",
    permission="console.read",
    query=FindKeys,
    response=KeysPage,
    summary="Find keys",
    tags=_TAGS,
)
async def keys(request: ApiRequest) -> object:
    """By SCAN, for a tenth of a second at most: a page may be empty and yet not the last."""
    wanted: FindKeys = request.parameters
    async with open_session(request) as session:
        found = await browser.find_keys(session, wanted.pattern, wanted.type, browser.check_cursor(wanted.cursor))
    listed = [
        {"name": bulk(key.name.raw), "type": key.type, "ttl": key.ttl, "memory": key.memory, "size": key.size}
        for key in found.keys
    ]
    return {"keys": listed, "cursor": str(found.cursor), "scanned": found.scanned, "total": found.total}


class Matching(msgspec.Struct, forbid_unknown_fields=True):
    """Which keys; `cursor` of the answer before, to go on."""

    pattern: str
    type: str = ""
    cursor: str = "0"


class Swept(msgspec.Struct):
    """How many keys in this step; a `cursor` of "0" is the end, else ask again with it."""

    count: int
    cursor: str
    scanned: int
    total: int


@endpoint(
    "POST",
    _PATH + "/count-keys",
    permission="console.read",
    body=Matching,
    response=Swept,
    summary="Count keys that match",
    tags=_TAGS,
)
async def count(request: ApiRequest, body: Matching) -> object:
    """By SCAN, for a second at most."""
    async with open_session(request) as session:
        swept = await browser.count_matching(session, body.pattern, body.type, browser.check_cursor(body.cursor))
    return _swept(swept)


@endpoint(
    "POST",
    _PATH + "/delete-keys",
    permission="console.write",
    body=Matching,
    response=Swept,
    summary="Delete keys that match",
    tags=_TAGS,
)
async def delete(request: ApiRequest, body: Matching) -> object:
    """By SCAN and UNLINK, for a second at most. Its beginning is put on record."""
    async with open_session(request, write=True) as session:
        cursor = browser.check_cursor(body.cursor)
        if not body.pattern:
            raise BadRequest("some fields are wrong", {"pattern": "is missing; * stands for all keys"})
        if not cursor:
            await note(request, DELETES_KEYS, {"pattern": body.pattern, "type": body.type or None})
        swept = await browser.delete_matching(session, body.pattern, body.type, cursor)
    return Reply(_swept(swept), f"{swept.count} keys deleted")


def _swept(swept: browser.Swept) -> dict[str, object]:
    return {"count": swept.count, "cursor": str(swept.cursor), "scanned": swept.scanned, "total": swept.total}


class Watch(msgspec.Struct):
    """`filter`: only lines with this text, whatever its case."""

    filter: str = ""


@endpoint(
    "GET",
    _PATH + "/monitor",
    permission="console.write",
    query=Watch,
    content_type="text/event-stream",
    summary="Watch commands",
    tags=_TAGS,
)
async def monitor(request: ApiRequest) -> object:
    """Every command that the instance runs, as it runs them. Events: `ready`, one without a name per line with `value`,
    `skipped` with how many were left out, `ended` with the reason.
    """
    async with open_session(request, write=True, wait=False) as session:
        return await live.watch(request, session, request.parameters.filter)


class Listen(msgspec.Struct):
    """Names are separated by spaces."""

    channels: str = ""
    patterns: str = ""
    filter: str = ""


@endpoint(
    "GET",
    _PATH + "/subscribe",
    permission="console.read",
    query=Listen,
    content_type="text/event-stream",
    summary="Listen to channels",
    tags=_TAGS,
)
async def subscribe(request: ApiRequest) -> object:
    """What is published. Events as those of `monitor`, with `channel` and, where one matched, `pattern`."""
    wanted: Listen = request.parameters
    async with open_session(request, wait=False) as session:
        channels = [name.encode() for name in wanted.channels.split()]
        patterns = [name.encode() for name in wanted.patterns.split()]
        return await live.subscribe(request, session, channels, patterns, wanted.filter)
