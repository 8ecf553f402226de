"""The console: commands that a person runs from the dashboard, by their role, and what Redis answers.

Commands go by the worker's own connections and by the gateway's policy, as those of programs do; they count against no
quota. A viewer's only read. Replies keep their types, so that they can be shown as redis-cli shows them.
"""

import asyncio
import base64
import contextlib
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from control import audit, instances
from control.http import ApiError, ApiRequest, BadRequest, Conflict, Forbidden, TooManyRequests, Unavailable
from control.roles import allows
from redisgate.access import Grant, Instance
from redisgate.gateway import Checked
from redisgate.policy import Scope
from resp.connection import FutureWaiter
from resp.encoder import encode_command
from resp.errors import ConnectFailed, ReplyLost, ReplyTooLarge, RespError
from resp.errors import Unavailable as RedisUnavailable

MAX_PER_PERSON: Final = 4
"""Requests of one person to the console under way in one worker; more are told to come again."""
MAX_COMMANDS: Final = 1000
"""In one request."""
MAX_LINE_CHARACTERS: Final = 64 * 1024
"""Of one command as it is typed."""
MAX_SHOWN_BYTES: Final = 256 * 1024
"""Of the replies to one request; what is beyond is not shown."""
MAX_SHOWN_VALUES: Final = 10_000
"""Strings, numbers and lists in them."""
MAX_KEPT_BYTES: Final = 1024 * 1024
"""Of the replies to commands sent together, more than what is shown of them can have; the rest is thrown away."""
COMMANDS_AT_ONCE: Final = 20
"""Sent together; a transaction is sent whole. The replies of more would wait in Redis's memory, however large."""
MAX_DEPTH: Final = 32
"""Of lists within lists in a reply that is shown."""
RETRY_SECONDS: Final = 1.0

READER: Final = Scope(readonly=True)
WRITER: Final = Scope()
_SCRIPTS: Final = (b"EVAL_RO", b"EVALSHA_RO", b"FCALL_RO")
"""Which write nothing, and may run for ever while everybody else waits: kept from viewers."""
_KILLS: Final = ((b"SCRIPT", b"KILL"), (b"FUNCTION", b"KILL"))
"""What Redis takes besides while a script does not end: members may, though programs may not."""
_READERS_MAY: Final = (b"SCAN", b"RANDOMKEY")
"""Kept from read-only tokens; a viewer sees the keys in the data browser anyway."""

# What asks first, with what it does.
DANGEROUS: Final[dict[bytes, str]] = {
    b"FLUSHALL": "deletes every key",
    b"FLUSHDB": "deletes every key",
    b"KEYS": "walks through all keys while everybody else waits; SCAN does not",
    b"FUNCTION|DELETE": "deletes a library of functions",
    b"FUNCTION|FLUSH": "deletes every function",
    b"FUNCTION|RESTORE": "may replace functions",
    b"SCRIPT|FLUSH": "makes the server forget every script",
}

_IN_SCRIPTS: Final = {
    name: re.compile(rb"""(?i)(?:["']|\[=*\[)\s*""" + name + rb"""\s*(?:["']|\]=*\])""")
    for name in (b"FLUSHALL", b"FLUSHDB", b"KEYS")
}
"""A script's call of a dangerous command that may run in scripts."""

RUNS_DANGEROUS: Final = "console.dangerous"
DELETES_KEYS: Final = "console.delete_keys"
"""What the audit log calls these acts."""

Argv = list[bytes]
Node = dict[str, Any]


# Command lines


class LineError(ValueError):
    """A line that is no command; the text says why."""


_ESCAPES: Final = {"n": b"\n", "r": b"\r", "t": b"\t", "b": b"\b", "a": b"\a"}


_SPACE: Final = re.compile(r"\s*")
_PLAIN: Final = re.compile(r"[^\s\"']+")
_WITHIN: Final = {'"': re.compile(r'[^"\\]+'), "'": re.compile(r"[^'\\]+")}


def split_line(line: str) -> Argv:
    """A line as redis-cli reads it: words, "with \\n and \\x00 escapes", 'as it is'. Raises LineError."""
    if len(line) > MAX_LINE_CHARACTERS:
        raise LineError(f"it has {len(line)} characters, of which {MAX_LINE_CHARACTERS} are taken")
    argv: Argv = []
    at = _after(_SPACE, line, 0)
    while at < len(line):
        word = bytearray()
        while at < len(line) and not line[at].isspace():
            if line[at] in "\"'":
                at = _quoted(line, at, word)
                if at < len(line) and not line[at].isspace():
                    raise LineError("after a closing quote comes a space")
            else:
                end = _after(_PLAIN, line, at)
                word += line[at:end].encode("utf-8", "surrogatepass")
                at = end
        argv.append(bytes(word))
        at = _after(_SPACE, line, at)
    return argv


def _after(pattern: re.Pattern[str], line: str, at: int) -> int:
    """Where what the pattern matches from `at` on ends."""
    found = pattern.match(line, at)
    return at if found is None else found.end()


def _quoted(line: str, at: int, word: bytearray) -> int:
    """Add what stands between quotes; returns what is after them."""
    quote = line[at]
    at += 1
    while at < len(line):
        end = _after(_WITHIN[quote], line, at)
        word += line[at:end].encode("utf-8", "surrogatepass")
        if end == len(line):
            break
        char, at = line[end], end + 1
        if char == quote:
            return at
        if at < len(line):
            if quote == "'":
                if line[at] == "'":
                    word += b"'"
                    at += 1
                    continue
            elif line[at] == "x" and all(digit in "0123456789abcdefABCDEF" for digit in line[at + 1 : at + 3].ljust(2)):
                word.append(int(line[at + 1 : at + 3], 16))
                at += 3
                continue
            else:
                word += _ESCAPES.get(line[at]) or line[at].encode("utf-8", "surrogatepass")
                at += 1
                continue
        word += b"\\"
    raise LineError(f"a closing {quote} is missing")


def split_lines(text: str) -> list[Argv]:
    """The commands of pasted lines, one a line. Raises BadRequest, which names the line."""
    commands: list[Argv] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        if len(commands) == MAX_COMMANDS:
            raise BadRequest(f"more than {MAX_COMMANDS} commands; so many are run at once. Nothing was run")
        try:
            commands.append(split_line(line))
        except LineError as error:
            raise BadRequest(f"line {number} cannot be read: {error}; nothing was run") from error
    return commands


def dangerous(commands: Sequence[Argv]) -> list[str]:
    """The commands among these that ask first, each with what it does; also those that a script's text names."""
    found = {}
    for argv in commands:
        name = argv[0].upper()
        for inner, call in _IN_SCRIPTS.items():
            if any(call.search(script) for script in _scripts_of(argv)):
                found[name + b" " + inner] = f"{name.decode()} runs {inner.decode()}, which {DANGEROUS[inner]}"
        for candidate in (name, b"|".join((name, argv[1].upper())) if len(argv) > 1 else name):
            if candidate in DANGEROUS:
                found[candidate] = f"{candidate.decode().replace('|', ' ')} {DANGEROUS[candidate]}"
    return list(found.values())


def _scripts_of(argv: Argv) -> list[bytes]:
    """The texts of scripts that a command brings."""
    name = argv[0].upper()
    if name in (b"EVAL", b"EVAL_RO"):
        return argv[1:2]
    if name in (b"SCRIPT", b"FUNCTION") and len(argv) > 1 and argv[1].upper() == b"LOAD":
        return argv[2:4]  # FUNCTION LOAD REPLACE text
    return []


# A person's session


@dataclass(frozen=True)
class ConsoleSession:
    """A person at an instance's console."""

    request: ApiRequest
    instance: Instance
    row: Any
    """Of the instance."""
    may_write: bool

    async def call(self, *argv: bytes) -> Any:
        """One command of the console's own, past the policy; the reply as `resp.parser` gives it, an error as a value.

        Raises:
            ApiError: there is no reply.
        """
        with _replying():
            return await self.instance.backend.pool.call(*argv)

    async def pipeline(self, commands: Sequence[Sequence[bytes]]) -> list[Any]:
        """Several of the console's own at once; the replies in order. Raises ApiError."""
        from resp.parser import Parser

        if not commands:
            return []
        frames = await self._send(commands)
        return Parser(text=False).parse(frames, len(commands))

    async def _send(self, commands: Sequence[Sequence[bytes]], keep: int | None = None) -> bytes:
        waiter = FutureWaiter(len(commands), asyncio.get_running_loop(), keep)
        with _replying():
            # By the slow lane: nobody knows how large a person's replies are.
            self.instance.backend.pool.submit(b"".join([encode_command(argv) for argv in commands]), waiter, True)
            return await waiter.future

    async def run(self, commands: Sequence[Argv]) -> list[Node]:
        """What a person typed, in order, checked by the policy; MULTI … EXEC among them is one transaction.

        Returns the replies, as `read_replies` gives them. Raises ApiError.
        """
        with _replying():
            outcomes = await self._checked(commands)
        to_send = [outcome for outcome in outcomes if not isinstance(outcome, bytes)]
        shown = _Shown()
        nodes: list[Node] = []
        for group in _groups(to_send):
            try:
                nodes += shown.read(await self._send(group, MAX_KEPT_BYTES), len(group))
            except ApiError as error:
                if nodes:
                    text = f"the connection was lost after {len(nodes)} commands, and those after them may have run"
                    raise ApiError(502, f"{text}: look before you send them again") from error
                raise
        sent = iter(nodes)
        return [_Shown().read(outcome, 1)[0] if isinstance(outcome, bytes) else next(sent) for outcome in outcomes]

    async def _checked(self, commands: Sequence[Argv]) -> list[Argv | bytes]:
        """Each command to send, or the frame that it is answered with."""
        outcomes: list[Argv | bytes] = []
        begun: int | None = None  # where a transaction has begun
        for argv in commands:
            name = argv[0].upper()
            if name == b"MULTI" and len(argv) == 1:
                outcomes.append(b"-ERR MULTI calls can not be nested\r\n" if begun is not None else argv)
                begun = begun if begun is not None else len(outcomes) - 1
            elif name in (b"EXEC", b"DISCARD") and len(argv) == 1 and begun is not None:
                outcomes.append(argv)
                await self._finish(outcomes, begun, name)
                begun = None
            else:
                outcomes.append(await self._check(argv))
        if begun is not None:
            error = b"-ERR this transaction has no EXEC: send all its lines at once. Nothing of it was run\r\n"
            outcomes[begun:] = [error, *([b"-ERR not run\r\n"] * (len(outcomes) - begun - 1))]
        return outcomes

    async def _finish(self, outcomes: list[Argv | bytes], begun: int, name: bytes) -> None:
        """Leave a transaction as it is to be sent, or answer for it."""
        inner = outcomes[begun + 1 : -1]
        refused = any(isinstance(outcome, bytes) and outcome[:1] == b"-" for outcome in inner)
        if name == b"DISCARD" or refused:
            last = (
                b"+OK\r\n"
                if name == b"DISCARD"
                else b"-EXECABORT Transaction discarded because of previous errors.\r\n"
            )
            kept = [
                outcome if isinstance(outcome, bytes) and outcome[:1] == b"-" else b"+QUEUED\r\n" for outcome in inner
            ]
            outcomes[begun:] = [b"+OK\r\n", *kept, last]
        elif not await self.instance.backend.pool.transactions_permitted():
            # Without the right to MULTI the commands in between would run by themselves.
            refusal = b"-NOPERM this user has no permissions to run the 'multi' command\r\n"
            outcomes[begun:] = [refusal] * (len(inner) + 2)
        else:
            # What is answered without Redis keeps its place among the replies.
            outcomes[begun + 1 : -1] = [
                [b"ECHO", outcome.split(b"\r\n")[1] if outcome[:1] == b"$" else outcome[1:-2]]
                if isinstance(outcome, bytes)
                else outcome
                for outcome in inner
            ]

    async def _check(self, argv: Argv) -> Argv | bytes:
        if argv[0].upper() == b"ACL" and len(argv) > 1 and argv[1].upper() == b"RESTTOKEN":
            return b"-ERR a token is no thing for a screen: make an API key instead\r\n"
        words = tuple(word.upper() for word in argv)
        if not self.may_write and words[0] in _SCRIPTS:
            return b"-NOPERM a script may hold up everybody: running one here needs the role member\r\n"
        if self.may_write and words in _KILLS:
            return argv
        instance, pool = self.instance, self.instance.backend.pool
        scope = WRITER if self.may_write or argv[0].upper() in _READERS_MAY else READER
        grant = Grant(instance, scope, name="console")
        checked = Checked(grant)
        if not checked.check([argv], lambda instance_id, name: False):
            if grant.policy.rule(argv[0]) is None:
                reply = await pool.call(b"COMMAND", b"INFO", argv[0])
                if isinstance(reply, list) and len(reply) == 1 and reply[0] is not None:
                    instance.table.learn(reply[0])
            rule = grant.policy.rule(argv[0])
            if rule is not None and rule.script and rule.refusal is None and rule.check(argv).refusal is None:
                if instance.scripts.unsettled(argv):
                    checked.prepared[0] = await instance.scripts.prepare(argv, pool.call, pool.call)
            checked.check([argv], lambda instance_id, name: True)
        return checked.outcomes[0]


def _groups(commands: Sequence[Argv]) -> Iterator[list[Argv]]:
    """What is sent at once: so many commands, and a transaction, from its MULTI to its EXEC, always whole."""
    group: list[Argv] = []
    within = False
    for argv in commands:
        group.append(argv)
        within = argv[0].upper() == b"MULTI" or (within and argv[0].upper() != b"EXEC")
        if len(group) >= COMMANDS_AT_ONCE and not within:
            yield group
            group = []
    if group:
        yield group


@contextlib.contextmanager
def _replying() -> Any:
    """Says for people what became of a command without a reply."""
    try:
        yield
    except ConnectFailed as error:
        raise Unavailable(f"{error}; nothing was run. Try again in a moment", RETRY_SECONDS) from error
    except RedisUnavailable as error:
        raise Unavailable(f"{error}; nothing was run. Try again in a moment", RETRY_SECONDS) from error
    except ReplyTooLarge as error:
        raise ApiError(413, f"{error}: ask for less at a time") from error
    except ReplyLost as error:
        raise ApiError(502, f"{error}; what was sent may have run: look before you send it again") from error
    except RespError as error:
        raise ApiError(502, str(error)) from error


@contextlib.asynccontextmanager
async def open_session(request: ApiRequest, *, write: bool = False, wait: bool = True) -> AsyncIterator[ConsoleSession]:
    """A person's session at the console of the path's instance; `write` where it is needed for what they want.

    Without `wait` it does not count as a request under way: a stream goes on for hours, and has a bound of its own.

    Raises:
        ApiError: an API key asks, too much is under way, the instance is not there.
    """
    may_write = sees_to_write(request)
    if write and not may_write:
        raise Forbidden(f"your role here is {request.principal.role}, which reads; changing data needs member")
    under_way: dict[UUID, int] = request.context.extra.setdefault("console", {})
    person = request.user_id
    if wait and under_way.get(person, 0) >= MAX_PER_PERSON:
        raise TooManyRequests(f"{MAX_PER_PERSON} of your requests to the console are under way; wait for one", 1)
    if wait:
        under_way[person] = under_way.get(person, 0) + 1
    try:
        instance_id = request.path["instance_id"]
        row = await instances.find(request.context.database, request.organization_id, instance_id)
        yield ConsoleSession(request, await _instance(request, instance_id), row, may_write)
    finally:
        if wait:
            under_way[person] -= 1
            if not under_way[person]:
                del under_way[person]


def sees_to_write(request: ApiRequest) -> bool:
    """Whether who asks may write at the console. Raises Forbidden where it is no person."""
    if request.principal.kind != "user" or request.principal.role is None:
        raise Forbidden("the console is for people; a program sends its commands to the instance's REST address")
    return allows(request.principal.role, "console.write")


async def _instance(request: ApiRequest, instance_id: UUID) -> Instance:
    feed = request.context.extra.get("feed")
    if feed is None:
        raise Unavailable("this process serves no Redis; use a worker's address")
    with _replying():
        found = await feed.connect_instance(instance_id)
    if not isinstance(found, Instance):
        raise ApiError(found.status, found.line.decode().removeprefix("ERR "), headers={"Retry-After": "1"})
    return found


async def note(request: ApiRequest, action: str, after: dict[str, object]) -> None:
    """Put on record that a person is about to do something dangerous."""
    async with request.context.database.transaction() as connection:
        target = ("instance", request.path["instance_id"])
        await audit.record(connection, request, action, target, after=after)


async def run_typed(session: ConsoleSession, commands: Sequence[Argv], *, confirmed: bool) -> list[Node]:
    """What a person typed; what is dangerous only where they have said that they mean it. Raises ApiError."""
    warnings = dangerous(commands)
    if warnings and not confirmed:
        raise Conflict("confirm first: " + "; ".join(warnings), {"confirm": warnings})
    if warnings:
        await note(session.request, RUNS_DANGEROUS, {"commands": warnings})
    return await session.run(commands)


# Replies


_CONTROL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def text_of(value: bytes) -> str | None:
    """Bytes that are text a person can read, as text; else None."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return None
    return None if _CONTROL.search(text) else text


def bulk(value: bytes) -> Node:
    """A string as it is sent to a browser."""
    text = text_of(value)
    if text is not None:
        return {"type": "bulk", "text": text}
    return {"type": "bulk", "base64": base64.b64encode(value).decode()}


class _Shown:
    """Reads RESP2 frames into nodes, until the bounds are reached.

    {"type": "status" | "error", "text"} · {"type": "integer", "integer"} · {"type": "bulk", "text" or "base64"} ·
    {"type": "nil"} · {"type": "array", "items"} · {"type": "omitted"}; "size" of a string that was cut, "omitted" of an
    array's items that are not shown.
    """

    def __init__(self) -> None:
        self._bytes = MAX_SHOWN_BYTES
        self._values = MAX_SHOWN_VALUES

    def read(self, frames: bytes, count: int) -> list[Node]:
        """The `count` replies that `frames` holds."""
        nodes: list[Node] = []
        at = 0
        for _ in range(count):
            if self._full():
                nodes.append({"type": "omitted"})
                continue
            node, at = self._node(frames, at, 0)
            nodes.append(node)
        return nodes

    def _full(self) -> bool:
        return self._bytes <= 0 or self._values <= 0

    def _node(self, frames: bytes, at: int, depth: int) -> tuple[Node, int]:
        end = frames.index(b"\r\n", at)
        kind, line = frames[at : at + 1], frames[at + 1 : end]
        at = end + 2
        self._values -= 1
        self._bytes -= len(line)
        if kind in b"+-":
            return {"type": "status" if kind == b"+" else "error", "text": line.decode("utf-8", "replace")}, at
        number = int(line)
        if kind == b":":
            return {"type": "integer", "integer": number}, at
        if number < 0:
            return {"type": "nil"}, at
        if kind == b"$":
            value = frames[at : at + min(number, max(self._bytes, 0))]
            self._bytes -= number
            node = bulk(value)
            if len(value) < number:
                node["size"] = number
            return node, at + number + 2
        items: list[Node] = []
        if depth >= MAX_DEPTH:
            self._values = 0
        while len(items) < number and not self._full():
            item, at = self._node(frames, at, depth + 1)
            items.append(item)
        node = {"type": "array", "items": items}
        if len(items) < number:
            node["omitted"] = number - len(items)
        return node, at


_NAMED: Final = {0x22: '\\"', 0x5C: "\\\\", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t", 0x07: "\\a", 0x08: "\\b"}


def quoted(value: bytes) -> str:
    """Bytes as redis-cli shows a string."""
    return (
        '"' + "".join(_NAMED.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}") for byte in value) + '"'
    )


def value_of(node: Node) -> bytes:
    """The bytes of a string's node."""
    return node["text"].encode() if "text" in node else base64.b64decode(node["base64"])


def format_reply(node: Node, prefix: str = "") -> str:
    """A reply as redis-cli prints it on a terminal."""
    kind = node["type"]
    if kind == "status":
        return str(node["text"])
    if kind == "error":
        return f"(error) {node['text']}"
    if kind == "integer":
        return f"(integer) {node['integer']}"
    if kind == "nil":
        return "(nil)"
    if kind == "omitted":
        return "(not shown: the replies before it are too large; it was run)"
    if kind == "bulk":
        cut = f"… ({node['size']} bytes, cut here)" if "size" in node else ""
        return quoted(value_of(node)) + cut
    items = node["items"]
    if not items and not node.get("omitted"):
        return "(empty array)"
    width = len(str(len(items) + node.get("omitted", 0)))
    inner = prefix + " " * (width + 2)
    lines = []
    for number, item in enumerate(items, 1):
        lines.append(f"{'' if number == 1 else prefix}{number:{width}}) {format_reply(item, inner)}")
    if node.get("omitted"):
        lines.append(f"{prefix if items else ''}({node['omitted']} more, not shown)")
    return "\n".join(lines)


_REPORTS: Final = frozenset(
    {b"INFO", b"LOLWUT", b"MEMORY|DOCTOR", b"MEMORY|MALLOC-STATS", b"CLIENT|INFO", b"CLIENT|LIST", b"LATENCY|DOCTOR"}
)
"""Commands whose reply is a text to be read."""


def format_answer(argv: Argv, node: Node) -> str:
    """What redis-cli prints after a command: a report as it is, anything else by its type."""
    words = [word.upper() for word in argv[:2]]
    if node["type"] == "bulk" and "text" in node and _REPORTS.intersection((words[0], b"|".join(words))):
        cut = f"… ({node['size']} bytes, cut here)" if "size" in node else ""
        return str(node["text"]).replace("\r\n", "\n").rstrip("\n") + cut
    return format_reply(node)
