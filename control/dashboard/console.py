"""Pages of an instance's data: the browser of keys, the command line, the live views of commands and messages."""

import base64
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlencode

from starlette.responses import Response

from control import browser
from control.browser import TYPES, ChangedMeanwhile, bytes_of, name_of
from control.console import (
    DELETES_KEYS,
    ConsoleSession,
    format_answer,
    note,
    open_session,
    quoted,
    run_typed,
    split_lines,
)
from control.dashboard.frame import home_of, show
from control.http import ApiError, BadRequest
from control.pages import PageRequest, http_public_url, page, redirect
from redisgate.units import duration_text

_INSTANCE: Final = "/dashboard/{org_id}/instances/{instance_id}"
_KEPT: Final = ("pattern", "type", "cursor", "key", "at", "match", "field")
"""What the data browser's address says."""
_AWAY: Final = (502, 503)
MAX_SECONDS: Final = 10 * 365 * 86400
"""Of a key's time to live that can be set here."""
_EXAMPLES: Final[dict[str, tuple[str, ...]]] = {
    "read": ("DBSIZE", "SCAN 0 COUNT 20", "INFO server"),
    "write": ("SET greeting hello EX 3600", "GET greeting", "INFO server"),
}


async def _away(request: PageRequest, tab: str, error: ApiError) -> Response:
    """The page without its content, where Redis cannot be asked."""
    kill = error.kill if isinstance(error, browser.Busy) else ""
    return await show(request, tab, "console/away.html", error=error, kill=kill)


# Keys and values


def _read_query(request: PageRequest) -> tuple[dict[str, str], BadRequest | None]:
    """What the address says, as far as it can be read, and what is wrong with the rest: addresses get cut."""
    said, wrong = dict(request.query), None
    checks: dict[str, Callable[[str], object]] = {"type": browser.check_type, "cursor": browser.check_cursor}
    for name in ("type", "cursor", "pattern", "key", "field", "match"):
        try:
            if said.get(name):
                checks.get(name, bytes_of)(said[name])
        except BadRequest as error:
            wrong = wrong or error
            del said[name]
    return said, wrong


def _link(request: PageRequest) -> Callable[..., str]:
    """Makes addresses of the data browser that differ from this page's in what is given; None: not there."""
    base = home_of(request) + "/data"
    said, _ = _read_query(request)
    here = {name: said[name] for name in _KEPT if said.get(name)}

    def link(**changes: object) -> str:
        values = {name: str(value) for name, value in (here | changes).items() if value not in (None, "")}
        return base + ("?" + urlencode(values) if values else "")

    return link


@page("GET", _INSTANCE + "/data", permission="console.read")
async def data(request: PageRequest) -> Response:
    """Keys that match, and one of them opened."""
    return await _data(request)


async def _data(request: PageRequest, error: ApiError | None = None, posted: str = "") -> Response:
    query, wrong = _read_query(request)
    error = error or wrong
    key_name = query.get("key", "")
    value = edited = None
    gone: ApiError | None = None
    try:
        async with open_session(request) as session:
            cursor = browser.check_cursor(query.get("cursor") or "0")
            found = await browser.find_keys(session, query.get("pattern", ""), query.get("type", ""), cursor)
            if key_name:
                key = bytes_of(key_name)
                try:
                    value = await browser.look(session, key, query.get("at", ""), query.get("match", ""))
                    if query.get("field") and value.key.type in ("hash", "list"):
                        field = bytes_of(query["field"])
                        edited = await browser.element(session, key, value.key.type, field)
                        if edited is None:
                            gone = ApiError(404, request.texts("console.element_gone"))
                except ApiError as problem:
                    if problem.status in _AWAY:
                        raise
                    gone = problem
    except ApiError as problem:
        if problem.status in _AWAY:
            return await _away(request, "data", problem)
        raise
    return await show(
        request,
        "data",
        "console/data.html",
        row=session.row,
        error=error,
        status=404 if gone is not None and error is None else 200,
        gone=gone.message if gone is not None else None,
        posted=posted,
        conflict=isinstance(error, ChangedMeanwhile),
        query=query,
        found=found,
        key_name=key_name,
        value=value,
        edited=edited,
        field_shown=browser.show(bytes_of(query["field"])) if query.get("field") else None,
        types=TYPES,
        may_write=session.may_write,
        link=_link(request),
        duration=duration_text,
        exact=browser.is_exact(query.get("pattern", "")),
        is_json=browser.looks_like_json,
        pretty=browser.pretty_json,
        typed=request.form.exact,
        quoted=quoted,
        digest=lambda text: browser.digest(text.encode()),
    )


def _written(request: PageRequest, name: str) -> bytes:
    """A value that was typed, as text or as base64. Raises BadRequest."""
    text = request.form.exact(name)
    if request.form.get(f"{name}_as") != "base64":
        return text.encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise BadRequest(request.texts("common.not_done"), {name: request.texts("console.no_base64")}) from error


def _name(request: PageRequest, name: str) -> bytes:
    """The name of a key, field or member that was typed, or that the form kept."""
    return bytes_of(request.form.exact(name))


def _seconds(request: PageRequest, name: str) -> int | None:
    """A time to live that was typed; None where nothing was. Raises BadRequest."""
    text = request.form.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 0 < int(text) <= MAX_SECONDS):
        raise BadRequest(request.texts("common.not_done"), {name: request.texts("console.no_seconds")})
    return int(text)


async def _create(request: PageRequest, session: ConsoleSession, key: bytes) -> str | None:
    new = _name(request, "new_key")
    kind = request.form.get("new_type", "string")
    await browser.create(
        session, new, kind, _name(request, "new_name"), _written(request, "new_value"), _seconds(request, "new_seconds")
    )
    return name_of(new)


async def _save(request: PageRequest, session: ConsoleSession, key: bytes) -> str | None:
    kind = request.form.get("kind")
    value = _written(request, "value")
    if request.form.has("json"):
        browser.check_json(value.decode("utf-8", "replace"))
    await browser.save(session, key, kind, _name(request, "name"), value, request.form.get("seen"))
    return name_of(key)


async def _add(request: PageRequest, session: ConsoleSession, key: bytes) -> str | None:
    await browser.add(
        session,
        key,
        request.form.get("kind"),
        _name(request, "added_name"),
        _written(request, "added_value"),
        first=request.form.get("end") == "first",
    )
    return name_of(key)


async def _take_out(request: PageRequest, session: ConsoleSession, key: bytes) -> str | None:
    await browser.take_out(session, key, request.form.get("kind"), _name(request, "name"), request.form.get("seen"))
    return name_of(key)


async def _rename(request: PageRequest, session: ConsoleSession, key: bytes) -> str | None:
    to = _name(request, "to")
    await browser.rename(session, key, to)
    return name_of(to)


async def _expire(request: PageRequest, session: ConsoleSession, key: bytes) -> str | None:
    await browser.expire(session, key, _seconds(request, "seconds"))
    return name_of(key)


async def _delete(request: PageRequest, session: ConsoleSession, key: bytes) -> str | None:
    await browser.delete(session, key)
    return None


_ACTIONS: Final[dict[str, Callable[[PageRequest, ConsoleSession, bytes], Awaitable[str | None]]]] = {
    "create": _create,
    "save": _save,
    "add": _add,
    "take_out": _take_out,
    "rename": _rename,
    "expire": _expire,
    "delete": _delete,
}


@page("POST", _INSTANCE + "/data", permission="console.write")
async def change(request: PageRequest) -> Response:
    """One change to a key; what somebody else changed meanwhile is not overwritten."""
    action = request.form.get("action")
    if action not in _ACTIONS:
        raise BadRequest(request.texts("common.error_400"))
    try:
        async with open_session(request, write=True) as session:
            key = await _ACTIONS[action](request, session, bytes_of(request.query.get("key", "")))
    except ApiError as error:
        return await _data(request, error, action)
    stays = action in ("save", "expire")
    target = _link(request)(
        key=key,
        at=request.query.get("at") if stays or action == "take_out" else None,
        field=None,
        cursor=request.query.get("cursor") if action != "create" else None,
    )
    return redirect(request, target, f"console.done_{action}")


# Many keys at once


@page("GET", _INSTANCE + "/data/delete", permission="console.write")
async def ask_to_sweep(request: PageRequest) -> Response:
    """How many keys match, before they are deleted."""
    pattern, kind = request.query.get("pattern", ""), request.query.get("type", "")
    if not pattern:
        return redirect(request, home_of(request) + "/data", "console.pattern_first")
    try:
        async with open_session(request, write=True) as session:
            swept = await browser.count_matching(
                session, pattern, kind, browser.check_cursor(request.query.get("cursor") or "0")
            )
    except ApiError as error:
        if error.status in _AWAY:
            return await _away(request, "data", error)
        return await _data(request, error)
    counted = swept.count + _count(request.query.get("counted", ""))
    return await _sweep_page(request, session, pattern, kind, swept, counted=counted, deleted=None)


@page("POST", _INSTANCE + "/data/delete", permission="console.write")
async def sweep(request: PageRequest) -> Response:
    """Delete keys that match, for a while; the page goes on from there."""
    pattern, kind = request.form.exact("pattern"), request.form.get("type")
    cursor = browser.check_cursor(request.form.get("cursor") or "0")
    if not pattern or (not cursor and request.form.exact("confirm") != pattern):
        raise BadRequest(request.texts("common.name_differs"))
    async with open_session(request, write=True) as session:
        if not cursor:
            await note(request, DELETES_KEYS, {"pattern": pattern, "type": kind or None})
        swept = await browser.delete_matching(session, pattern, kind, cursor)
    deleted = swept.count + _count(request.form.get("deleted"))
    if not swept.cursor:
        target = home_of(request) + "/data?" + urlencode({"pattern": pattern})
        return redirect(request, target, "console.swept", count=deleted)
    return await _sweep_page(
        request, session, pattern, kind, swept, counted=_count(request.form.get("counted")), deleted=deleted
    )


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


async def _sweep_page(
    request: PageRequest,
    session: ConsoleSession,
    pattern: str,
    kind: str,
    swept: browser.Swept,
    *,
    counted: int,
    deleted: int | None,
) -> Response:
    return await show(
        request,
        "data",
        "console/sweep.html",
        row=session.row,
        pattern=pattern,
        kind=kind,
        swept=swept,
        counted=counted,
        deleted=deleted,
        link=_link(request),
    )


# The command line


@page("GET", _INSTANCE + "/cli", permission="console.read")
async def command_line(request: PageRequest) -> Response:
    """A prompt."""
    return await _command_line(request)


@page("POST", _INSTANCE + "/cli", permission="console.read")
async def run(request: PageRequest) -> Response:
    """Run the lines; what is dangerous is asked about first."""
    lines = request.form.exact("lines")
    try:
        commands = split_lines(lines)
        async with open_session(request) as session:
            nodes = await run_typed(session, commands, confirmed=request.form.has("confirmed"))
    except ApiError as error:
        warnings = error.data.get("confirm", []) if isinstance(error.data, dict) else []
        return await _command_line(request, error=error, lines=lines, warnings=warnings)
    answers = [
        (" ".join(_shown_word(word) for word in argv), format_answer(argv, node))
        for argv, node in zip(commands, nodes, strict=True)
    ]
    return await _command_line(request, answers=answers)


def _shown_word(word: bytes) -> str:
    shown = quoted(word)
    return shown if shown != f'"{word.decode("latin-1")}"' or not word or b" " in word or b"'" in word else shown[1:-1]


async def _command_line(
    request: PageRequest,
    *,
    error: ApiError | None = None,
    lines: str = "",
    warnings: list[str] | None = None,
    answers: list[tuple[str, str]] | None = None,
) -> Response:
    writes = request.principal.role not in (None, "viewer")
    return await show(
        request,
        "cli",
        "console/cli.html",
        error=error,
        lines=lines,
        warnings=warnings or [],
        answers=answers or [],
        examples=_EXAMPLES["write" if writes else "read"],
        may_write=writes,
    )


# Live


@page("GET", _INSTANCE + "/monitor", permission="console.read")
async def monitor(request: PageRequest) -> Response:
    """Commands as they run."""
    return await _live(request, "monitor")


@page("GET", _INSTANCE + "/pubsub", permission="console.read")
async def pubsub(request: PageRequest) -> Response:
    """Messages as they are published."""
    return await _live(request, "pubsub")


@page("POST", _INSTANCE + "/pubsub", permission="console.write")
async def publish(request: PageRequest) -> Response:
    """Send one message."""
    channel = request.form.exact("channel")
    try:
        if not channel:
            raise BadRequest(request.texts("common.not_done"), {"channel": request.texts("console.channel_missing")})
        async with open_session(request, write=True) as session:
            node = (await session.run([[b"PUBLISH", bytes_of(channel), _written(request, "message")]]))[0]
        if node["type"] != "integer":
            raise browser.Refused(str(node.get("text")))
    except ApiError as error:
        return await _live(request, "pubsub", error)
    target = home_of(request) + "/pubsub?" + urlencode({"channel": channel})
    return redirect(request, target, "console.published", count=node["integer"])


async def _live(request: PageRequest, tab: str, error: ApiError | None = None) -> Response:
    return await show(
        request,
        tab,
        f"console/{tab}.html",
        error=error,
        may_write=request.principal.role not in (None, "viewer"),
        address=http_public_url(request),
        query=request.query,
    )
