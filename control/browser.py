"""The data browser: keys found by SCAN, never by KEYS; values a page at a time; changes only to what was seen.

Every answer is bounded in time and size, whatever the number and size of the keys. A change carries the digest of what
the person saw, and a script on the server makes it only if that is still there: whoever saves second is told.
"""

import base64
import hashlib
import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from control.console import ConsoleSession, text_of
from control.http import ApiError, BadRequest, Conflict, NotFound, Unavailable
from resp.parser import ErrorReply

PAGE_KEYS: Final = 50
"""Keys on one page, and as many again and more where Redis gives them together."""
PAGE_ELEMENTS: Final = 50
"""Elements of a list, hash, set, sorted set or stream on one page."""
SCAN_SECONDS: Final = 0.1
"""For one page of keys to be found; then it says how far it came."""
SCAN_COUNT: Final = 1000
"""Keys that Redis looks at in one SCAN at most, while everybody else waits."""
SWEEP_SECONDS: Final = 1.0
"""For one request that counts or deletes matching keys; the next goes on from there."""
DELETE_KEYS: Final = 500
"""In one UNLINK."""
MAX_VALUE_BYTES: Final = 64 * 1024
"""Of a string that is shown, and can be edited."""
MAX_CELL_BYTES: Final = 512
"""Of an element that is shown among others."""
BUSY_SECONDS: Final = 1
"""After which to ask again while a script runs."""
MAX_KEY_BYTES: Final = 4096
"""Of a key that has an address here; longer ones are listed only."""
TYPES: Final = ("string", "hash", "list", "set", "zset", "stream")
SIZE_COMMANDS: Final = {
    "string": b"STRLEN",
    "hash": b"HLEN",
    "list": b"LLEN",
    "set": b"SCARD",
    "zset": b"ZCARD",
    "stream": b"XLEN",
}

# Runs one command on a key if what another reads there is what somebody saw. ARGV: the digest of that, how many of the
# following are the command that reads, it, the command that writes; both without the key.
_IF_UNCHANGED: Final = b"""
local count = tonumber(ARGV[2])
local read, write = {ARGV[3], KEYS[1]}, {ARGV[3 + count], KEYS[1]}
for i = 4, 2 + count do read[#read + 1] = ARGV[i] end
for i = 4 + count, #ARGV do write[#write + 1] = ARGV[i] end
local seen = redis.call(unpack(read))
if (seen and redis.sha1hex(tostring(seen)) or '') ~= ARGV[1] then return {0} end
return {1, redis.call(unpack(write))}
"""
# A list has no command that deletes by position. ARGV: digest, position, a value that nothing else has.
_DELETE_AT: Final = b"""
local seen = redis.call('LINDEX', KEYS[1], ARGV[2])
if (seen and redis.sha1hex(seen) or '') ~= ARGV[1] then return {0} end
redis.call('LSET', KEYS[1], ARGV[2], ARGV[3])
return {1, redis.call('LREM', KEYS[1], 1, ARGV[3])}
"""
# Runs a command that reads elements, and cuts its reply while it is on the server: an element may have 512 MiB. ARGV:
# how much of a string is wanted, how many fields of a stream's entry, the command without its key. A string that was
# cut is a list of its head and its size.
_READ_CUT: Final = b"""
local longest, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local read = {ARGV[3], KEYS[1]}
for i = 4, #ARGV do read[#read + 1] = ARGV[i] end
local function cut(value, depth)
  if type(value) == 'string' and #value > longest then return {string.sub(value, 1, longest), #value} end
  if type(value) ~= 'table' or value.err then return value end
  local parts = {}
  for i = 1, depth < 2 and #value or math.min(#value, most) do parts[i] = cut(value[i], depth + 1) end
  return parts
end
return cut(redis.pcall(unpack(read)), 0)
"""
ABSENT: Final = ""
"""The digest of what is not there."""


class Refused(ApiError):
    """Redis answered with an error."""

    def __init__(self, error: str) -> None:
        super().__init__(400, f"Redis refused: {error}")


class Busy(Unavailable):
    """A script does not end, and nothing else runs; `kill` ends it, unless it has written."""

    def __init__(self, error: str) -> None:
        super().__init__("a script runs on this instance, and until it ends nothing else does", BUSY_SECONDS)
        self.kill = "FUNCTION KILL" if "FUNCTION KILL" in error else "SCRIPT KILL"


class OverCapacity(ApiError):
    """What would make the data grow is refused, as it is to programs."""

    def __init__(self) -> None:
        super().__init__(400, "the instance holds more than its capacity: delete something first")


class ChangedMeanwhile(Conflict):
    """Somebody else was quicker."""

    def __init__(self) -> None:
        super().__init__(
            "somebody changed this after you opened it, and nothing of yours was saved: look at what is there now,"
            " then save again"
        )


# Bytes in addresses, forms and pages


def name_of(value: bytes) -> str:
    """Bytes as text that survives addresses and forms: themselves, or base64: and what follows."""
    text = text_of(value)
    if text is None or text != text.strip() or any(char in text for char in "\r\n\t") or text.startswith("base64:"):
        return "base64:" + base64.urlsafe_b64encode(value).decode()
    return text


def bytes_of(name: str) -> bytes:
    """What `name_of` made text of. Raises BadRequest."""
    if not name.startswith("base64:"):
        return name.encode()
    try:
        return base64.b64decode(name[7:].replace("-", "+").replace("_", "/"), validate=True)
    except ValueError as error:
        raise BadRequest("what follows base64: is not base64") from error


def digest(value: bytes | None) -> str:
    """What a change says of what was seen."""
    return ABSENT if value is None else hashlib.sha1(value, usedforsecurity=False).hexdigest()


def hexdump(value: bytes) -> str:
    """16 bytes a line, as hexdump -C."""
    lines = []
    for at in range(0, len(value), 16):
        row = value[at : at + 16]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{at:08x}  {row[:8].hex(' '):23}  {row[8:].hex(' '):23}  |{shown}|")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Shown:
    """A value, or its beginning, as a page shows it."""

    raw: bytes
    size: int
    """Of the whole, in bytes."""

    @property
    def text(self) -> str | None:
        """The value as text, where it is text. A cut may have gone through a character."""
        return (
            text_of(self.raw)
            if not self.cut
            else next((t for n in range(4) if (t := text_of(self.raw[: len(self.raw) - n])) is not None), None)
        )

    @property
    def cut(self) -> bool:
        """Whether there is more than is shown."""
        return self.size > len(self.raw)

    @property
    def name(self) -> str:
        """For addresses and forms."""
        return name_of(self.raw)

    @property
    def digest(self) -> str:
        """Of a whole value."""
        return digest(self.raw)

    @property
    def hex(self) -> str:
        """Lines of a hex dump, of at most 4 KiB."""
        return hexdump(self.raw[:4096])

    @property
    def base64(self) -> str:
        """Of what is shown."""
        return base64.b64encode(self.raw).decode()

    @property
    def in_form(self) -> bool:
        """Whether a form's text area gives back the same bytes."""
        return self.text is not None and b"\r" not in self.raw


def show(value: bytes | list[Any], limit: int = MAX_CELL_BYTES) -> Shown:
    """A value of which a page shows so much; one that the server cut is a list of its head and its size."""
    if isinstance(value, bytes):
        return Shown(value[:limit], len(value))
    return Shown(value[0][:limit], value[1])


# Finding keys


@dataclass(slots=True)
class Key:
    """A key in the list."""

    name: Shown
    type: str
    ttl: int | None
    """Milliseconds left; None: it does not expire."""
    memory: int | None
    """Bytes; None where the server does not say."""
    size: int | None = None
    """Bytes of a string, elements of the others."""

    @property
    def addressable(self) -> bool:
        """Whether it has a page."""
        return not self.name.cut


@dataclass(slots=True)
class Keys:
    """A page of keys. A `cursor` of 0 is the end."""

    keys: list[Key] = field(default_factory=list)
    cursor: int = 0
    scanned: int = 0
    total: int = 0


def check_cursor(text: str) -> int:
    """A SCAN's cursor. Raises BadRequest."""
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) >= 1 << 64:
        raise BadRequest("the cursor is not one")
    return int(text)


def check_type(kind: str) -> None:
    """Raises BadRequest where a filter is no type of a key."""
    if kind and kind not in TYPES:
        raise BadRequest("some fields are wrong", {"type": f"is none of {', '.join(TYPES)}"})


def _filters(pattern: str, kind: str) -> list[bytes]:
    check_type(kind)
    arguments = [b"MATCH", bytes_of(pattern)] if pattern and pattern != "*" else []
    return arguments + ([b"TYPE", kind.encode()] if kind else [])


def is_exact(pattern: str) -> bool:
    """Whether a pattern can match one key only."""
    return bool(pattern) and not any(char in pattern for char in "*?[\\")


async def find_keys(session: ConsoleSession, pattern: str = "", kind: str = "", cursor: int = 0) -> Keys:
    """The next keys that match, with what is known of each; a name without * ? [ is looked up directly."""
    filters = _filters(pattern, kind)
    total = _good(await session.call(b"DBSIZE"))
    found = Keys(total=total)
    names: dict[bytes, None] = {}
    if is_exact(pattern):
        names[bytes_of(pattern)] = None
        found.keys = [
            key for key in await _describe(session, list(names)) if key.type != "none" and kind in ("", key.type)
        ]
        found.scanned = 1
        return found
    until, count = time.monotonic() + SCAN_SECONDS, PAGE_KEYS if not filters else SCAN_COUNT // 4
    while True:
        cursor_text, keys = _good(await session.call(b"SCAN", b"%d" % cursor, *filters, b"COUNT", b"%d" % count))
        cursor = int(cursor_text)
        names.update(dict.fromkeys(keys))
        found.scanned += count
        if not cursor or len(names) >= PAGE_KEYS or time.monotonic() > until:
            break
        count = min(count * 2, SCAN_COUNT) if len(keys) < count // 8 else count
    found.cursor, found.scanned = cursor, min(found.scanned, total)
    found.keys = [key for key in await _describe(session, list(names)) if key.type != "none"]
    return found


async def _describe(session: ConsoleSession, names: Sequence[bytes]) -> list[Key]:
    """Type, time to live, memory and size of keys: in two turns, however many there are."""
    commands: list[list[bytes]] = []
    for name in names:
        commands += [b"TYPE", name], [b"PTTL", name], [b"MEMORY", b"USAGE", name, b"SAMPLES", b"5"]
    replies = await session.pipeline(commands)
    keys: list[Key] = []
    for name, kind, ttl, memory in zip(names, replies[::3], replies[1::3], replies[2::3], strict=True):
        keys.append(
            Key(
                Shown(name[:MAX_KEY_BYTES], len(name)),
                _good(kind).decode("latin-1"),
                ttl if isinstance(ttl, int) and ttl >= 0 else None,
                memory if isinstance(memory, int) else None,
            )
        )
    measured = [key for key in zip(names, keys, strict=True) if key[1].type in SIZE_COMMANDS]
    sizes = await session.pipeline([[SIZE_COMMANDS[key.type], name] for name, key in measured])
    for (_, key), size in zip(measured, sizes, strict=True):
        key.size = size if isinstance(size, int) else None
    return keys


@dataclass(slots=True)
class Swept:
    """How far a walk over all keys came; `cursor` 0: to the end."""

    count: int
    cursor: int
    scanned: int
    total: int


async def count_matching(session: ConsoleSession, pattern: str, kind: str, cursor: int = 0) -> Swept:
    """Count the keys that match, from `cursor` on, for a while. A key may be counted twice while keys come and go."""
    return await _sweep(session, pattern, kind, cursor, delete=False)


async def delete_matching(session: ConsoleSession, pattern: str, kind: str, cursor: int = 0) -> Swept:
    """Delete the keys that match, from `cursor` on, for a while."""
    return await _sweep(session, pattern, kind, cursor, delete=True)


async def _sweep(session: ConsoleSession, pattern: str, kind: str, cursor: int, *, delete: bool) -> Swept:
    filters = _filters(pattern, kind)
    swept = Swept(0, cursor, 0, _good(await session.call(b"DBSIZE")))
    until = time.monotonic() + SWEEP_SECONDS
    while True:
        text, names = _good(await session.call(b"SCAN", b"%d" % swept.cursor, *filters, b"COUNT", b"%d" % SCAN_COUNT))
        swept.cursor = int(text)
        swept.scanned += SCAN_COUNT
        if delete:
            for at in range(0, len(names), DELETE_KEYS):
                swept.count += _good(await session.call(b"UNLINK", *names[at : at + DELETE_KEYS]))
        else:
            swept.count += len(names)
        if not swept.cursor or time.monotonic() > until:
            swept.scanned = min(swept.scanned, swept.total)
            return swept


# Looking at a key


@dataclass(slots=True)
class Row:
    """An element; its name is a position in a list, a field, a member or a stream entry's id."""

    name: Shown
    value: Shown | None = None
    score: str = ""
    pairs: list[tuple[Shown, Shown]] = field(default_factory=list)


@dataclass(slots=True)
class Value:
    """A key and a page of what it holds."""

    key: Key
    rows: list[Row] = field(default_factory=list)
    whole: Shown | None = None
    """Of a string."""
    next: str = ""
    """What the address of the following page says as `at`; empty: there is none."""
    encoding: str = ""


async def look(session: ConsoleSession, key: bytes, at: str = "", match: str = "") -> Value:
    """A key and a page of its value; `match` is a pattern for fields and members.

    Raises:
        NotFound: there is no such key.
    """
    described = (await _describe(session, [key]))[0]
    if described.type == "none":
        raise NotFound("there is no such key; it may have expired or been deleted a moment ago")
    value = Value(described)
    encoding = await session.call(b"OBJECT", b"ENCODING", key)
    value.encoding = encoding.decode("latin-1") if isinstance(encoding, bytes) else ""
    if described.type in _READERS:
        await _READERS[described.type](session, key, value, at, match)
    return value


async def _string(session: ConsoleSession, key: bytes, value: Value, at: str, match: str) -> None:
    raw = _good(await session.call(b"GETRANGE", key, b"0", b"%d" % (MAX_VALUE_BYTES - 1)))
    value.whole = Shown(raw, max(len(raw), value.key.size or 0) if len(raw) == MAX_VALUE_BYTES else len(raw))


async def _read(
    session: ConsoleSession, key: bytes, command: bytes, *arguments: bytes, longest: int = MAX_KEY_BYTES
) -> Any:
    """The reply of a command that reads elements of a key, its strings cut on the server."""
    most = 2 * PAGE_ELEMENTS
    reply = await session.call(b"EVAL", _READ_CUT, b"1", key, b"%d" % longest, b"%d" % most, command, *arguments)
    if isinstance(reply, ErrorReply) and reply.startswith("NOPERM"):
        # A user that may run no script reads elements whole: what is too large altogether is refused.
        reply = await session.call(command, key, *arguments)
    return _good(reply)


async def _scanned(session: ConsoleSession, command: bytes, key: bytes, value: Value, at: str, match: str) -> list[Any]:
    cursor, found = check_cursor(at or "0"), []
    until = time.monotonic() + SCAN_SECONDS
    filters = [b"MATCH", bytes_of(match)] if match else []
    while True:
        text, items = await _read(session, key, command, b"%d" % cursor, *filters, b"COUNT", b"%d" % PAGE_ELEMENTS)
        cursor = int(text)
        found += items
        if not cursor or len(found) >= PAGE_ELEMENTS or time.monotonic() > until:
            value.next = str(cursor) if cursor else ""
            return found


async def _hash(session: ConsoleSession, key: bytes, value: Value, at: str, match: str) -> None:
    items = await _scanned(session, b"HSCAN", key, value, at, match)
    value.rows = [
        Row(show(name, MAX_KEY_BYTES), show(item)) for name, item in zip(items[::2], items[1::2], strict=True)
    ]


async def _set(session: ConsoleSession, key: bytes, value: Value, at: str, match: str) -> None:
    members = await _scanned(session, b"SSCAN", key, value, at, match)
    value.rows = [Row(show(name, MAX_KEY_BYTES)) for name in members]


async def _zset(session: ConsoleSession, key: bytes, value: Value, at: str, match: str) -> None:
    if match:
        items = await _scanned(session, b"ZSCAN", key, value, at, match)
    else:
        first = check_cursor(at or "0")
        last = first + PAGE_ELEMENTS - 1
        items = await _read(session, key, b"ZRANGE", b"%d" % first, b"%d" % last, b"WITHSCORES")
        value.next = str(last + 1) if last + 1 < (value.key.size or 0) else ""
    value.rows = [
        Row(show(name, MAX_KEY_BYTES), score=score.decode("latin-1"))
        for name, score in zip(items[::2], items[1::2], strict=True)
    ]


async def _list(session: ConsoleSession, key: bytes, value: Value, at: str, match: str) -> None:
    first = check_cursor(at or "0")
    last = first + PAGE_ELEMENTS - 1
    items = await _read(session, key, b"LRANGE", b"%d" % first, b"%d" % last)
    value.rows = [Row(show(b"%d" % (first + index)), show(item)) for index, item in enumerate(items)]
    value.next = str(last + 1) if last + 1 < (value.key.size or 0) else ""


_STREAM_ID: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")


async def _stream(session: ConsoleSession, key: bytes, value: Value, at: str, match: str) -> None:
    """The newest first; `at` is the id after which older ones follow."""
    if at and not _STREAM_ID.fullmatch(at):
        raise BadRequest("this is no entry's id")
    count = b"%d" % (PAGE_ELEMENTS + (1 if at else 0) + 1)
    entries = await _read(session, key, b"XREVRANGE", at.encode() or b"+", b"-", b"COUNT", count)
    entries = [entry for entry in entries if entry[0] != at.encode()]
    for name, fields in entries[:PAGE_ELEMENTS]:
        pairs = [(show(one), show(other)) for one, other in zip(fields[::2], fields[1::2], strict=True)]
        value.rows.append(Row(show(name), pairs=pairs[:PAGE_ELEMENTS]))
    if len(entries) > PAGE_ELEMENTS:
        value.next = entries[PAGE_ELEMENTS - 1][0].decode("latin-1")


_READERS: Final = {"string": _string, "hash": _hash, "set": _set, "zset": _zset, "list": _list, "stream": _stream}


async def element(session: ConsoleSession, key: bytes, kind: str, name: bytes) -> Shown | None:
    """One element of a hash or list whole, up to what can be edited; None: it is not there."""
    value = await _read(session, key, *_reading(kind, name), longest=MAX_VALUE_BYTES)
    return None if value is None else show(value, MAX_VALUE_BYTES)


def _reading(kind: str, name: bytes) -> list[bytes]:
    """The command, without its key, that reads what a change depends on."""
    match kind:
        case "string":
            return [b"GET"]
        case "hash":
            return [b"HGET", name]
        case "list":
            return [b"LINDEX", name]
        case "zset":
            return [b"ZSCORE", name]
        case "new":
            return [b"EXISTS"]
    raise BadRequest("some fields are wrong", {"type": "cannot be edited here"})


# Changing


async def save(session: ConsoleSession, key: bytes, kind: str, name: bytes, value: bytes, seen: str) -> None:
    """Set a string, a field, the element at a position or a member's score, if what was seen is still there.

    A string keeps its time to live. `seen` is the digest of the old value; `ABSENT`: there was none.
    Raises ChangedMeanwhile.
    """
    writing = {
        "string": [b"SET", value, b"KEEPTTL"],
        "hash": [b"HSET", name, value],
        "list": [b"LSET", name, value],
        "zset": [b"ZADD", value, name],
    }
    if kind not in writing:
        raise BadRequest("some fields are wrong", {"type": "cannot be edited here"})
    await _if_unchanged(session, key, _reading(kind, name), writing[kind], seen)


async def create(
    session: ConsoleSession, key: bytes, kind: str, name: bytes, value: bytes, seconds: int | None = None
) -> None:
    """Make a key with its first element, unless there is one of that name. Raises Conflict."""
    writing = {
        "string": [b"SET", value],
        "hash": [b"HSET", name, value],
        "list": [b"RPUSH", value],
        "set": [b"SADD", value],
        "zset": [b"ZADD", name or b"0", value],
        "stream": [b"XADD", b"*", name, value],
    }
    if kind not in writing:
        raise BadRequest("some fields are wrong", {"type": f"is none of {', '.join(TYPES)}"})
    if not key:
        raise BadRequest("some fields are wrong", {"key": "is missing"})
    try:
        await _if_unchanged(session, key, _reading("new", b""), writing[kind], digest(b"0"))
    except ChangedMeanwhile:
        raise Conflict("there is a key of this name already; open it, or choose another name") from None
    if seconds is not None:
        _good(await session.call(b"EXPIRE", key, b"%d" % seconds))


async def add(
    session: ConsoleSession, key: bytes, kind: str, name: bytes, value: bytes, *, first: bool = False
) -> None:
    """Add an element to a key that is there. Raises NotFound, Conflict."""
    if kind == "hash":
        try:
            await _if_unchanged(session, key, _reading(kind, name), [b"HSET", name, value], ABSENT)
        except ChangedMeanwhile:
            raise Conflict("there is such a field already; edit it instead") from None
        return
    adding = {
        "list": [b"LPUSHX" if first else b"RPUSHX", value],
        "set": [b"SADD", value],
        "zset": [b"ZADD", b"NX", name, value],
        "stream": [b"XADD", b"*", name, value],
    }
    if kind not in adding:
        raise BadRequest("some fields are wrong", {"type": "takes no elements"})
    _check_capacity(session, adding[kind])
    added = _good(await session.call(adding[kind][0], key, *adding[kind][1:]))
    if added == 0:
        raise Conflict("it is in there already" if kind != "list" else "the list is no longer there")


async def take_out(session: ConsoleSession, key: bytes, kind: str, name: bytes, seen: str = ABSENT) -> None:
    """Delete an element. Of a list or hash only if it is what was seen. Raises ChangedMeanwhile."""
    if kind == "list":
        mark = b"deleted by the console " + secrets.token_hex(16).encode()
        reply = _good(await session.call(b"EVAL", _DELETE_AT, b"1", key, seen.encode(), name, mark))
        if reply[0] == 0:
            raise ChangedMeanwhile
        return
    if kind == "hash" and seen:
        await _if_unchanged(session, key, _reading(kind, name), [b"HDEL", name], seen)
        return
    commands = {"hash": b"HDEL", "set": b"SREM", "zset": b"ZREM", "stream": b"XDEL"}
    if kind not in commands:
        raise BadRequest("some fields are wrong", {"type": "has no elements"})
    if _good(await session.call(commands[kind], key, name)) == 0:
        raise NotFound("it was deleted already")


async def rename(session: ConsoleSession, key: bytes, to: bytes) -> None:
    """Give a key another name, which no key has. Raises Conflict."""
    if not to:
        raise BadRequest("some fields are wrong", {"to": "is missing"})
    if to != key and _good(await session.call(b"RENAMENX", key, to)) == 0:
        raise Conflict("there is a key of this name already, and it was left as it is")


async def expire(session: ConsoleSession, key: bytes, seconds: int | None) -> None:
    """Let a key end after so many seconds; None: never. Raises NotFound."""
    if seconds is None:
        _good(await session.call(b"PERSIST", key))
    elif _good(await session.call(b"EXPIRE", key, b"%d" % seconds)) == 0:
        raise NotFound("there is no such key any more")


async def delete(session: ConsoleSession, key: bytes) -> None:
    """Delete a key. Raises NotFound."""
    if _good(await session.call(b"UNLINK", key)) == 0:
        raise NotFound("there is no such key any more; somebody deleted it, or it expired")


async def _if_unchanged(
    session: ConsoleSession, key: bytes, reading: Sequence[bytes], writing: Sequence[bytes], seen: str
) -> None:
    _check_capacity(session, writing)
    reply = _good(
        await session.call(b"EVAL", _IF_UNCHANGED, b"1", key, seen.encode(), b"%d" % len(reading), *reading, *writing)
    )
    if reply[0] == 0:
        raise ChangedMeanwhile


def _check_capacity(session: ConsoleSession, writing: Sequence[bytes]) -> None:
    """Raises OverCapacity."""
    if session.instance.over_capacity and session.instance.needs_memory(writing):
        raise OverCapacity


def _good(reply: Any) -> Any:
    """A reply that is no error. Raises Refused, Busy."""
    if isinstance(reply, ErrorReply):
        raise Busy(reply) if reply.startswith("BUSY ") else Refused(str(reply))
    return reply


# JSON in strings


def looks_like_json(text: str | None) -> bool:
    """Whether a string is a JSON object or array."""
    if text is None or text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def check_json(text: str) -> None:
    """Raises BadRequest, which says where it is wrong."""

    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not in JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        problem = f"is not JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        raise BadRequest("the value was not saved", {"value": problem}) from error
    except (ValueError, RecursionError) as error:
        raise BadRequest("the value was not saved", {"value": f"is not JSON: {error}"}) from error


_TOKENS: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def pretty_json(text: str) -> str:
    """Valid JSON with a line for each value; numbers, names and their order stay as they are written."""
    parts: list[str] = []
    depth, before = 0, ""
    for token in _TOKENS.findall(text):
        if token in ("}", "]"):
            depth -= 1
            if before not in ("{", "["):
                parts.append("\n" + "  " * depth)
        elif before in ("{", "[", ","):
            parts.append("\n" + "  " * depth)
        parts.append(token + (" " if token == ":" else ""))
        depth += token in ("{", "[")
        before = token
    return "".join(parts)
