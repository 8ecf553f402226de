"""The audit log: who did what, to what, from where, with which outcome. Rows are only ever added.

Each event carries an HMAC over itself and the HMAC of the event before it, under a key that is not in the database.
So whoever changes, removes or reorders events is found by `verify`. That the *last* events were cut off shows only
against a head of the chain that was noted elsewhere: `note_head` writes it to the log and to a file every minute.

Events are chained in the order in which their transactions commit. That takes a lock from `record` to the commit, so
`record` is the last thing that a business act does. Measured with client and server on the same two cores: 50
connections that do nothing but record and commit get 700 events a second through.
"""

import asyncio
import dataclasses
import hmac
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias
from uuid import UUID

import msgspec

from control.database import Connection, Database, Record
from control.duties import duty
from control.tokens import derive_key, key_id

if TYPE_CHECKING:
    from control.http import ApiRequest, Context

MAX_TEXT: Final = 1000
"""Characters of one text column."""
PATIENCE_SECONDS = 10.0
"""After which PostgreSQL ends a transaction that has recorded something and then stands still (a process that was
stopped, a machine that is gone): everybody else waits for it."""
VERIFY_BATCH: Final = 1000
"""Events that `verify` holds at a time."""
MAX_PROBLEMS: Final = 100
"""Problems that a report lists; the others are counted."""
CHECK_AGAIN: Final = timedelta(days=1)
"""A chain that held is not read again before, unless it has grown."""
CHECKS_KEPT: Final = 100

_MASKED: Final = re.compile(r"password|secret|token(?!_id)", re.IGNORECASE)
_HEAD_LINE: Final = re.compile(r"audit head sequence=(\d+) mac=([0-9a-f]{64})")
_NO_EVENT: Final = b"\0" * 32

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts when it is not a request: a duty of the service, the command line, a test."""

    audit: "Audit" = field(repr=False)
    kind: str
    """user, api_key, system or anonymous."""
    id: UUID | None = None
    name: str | None = None
    address: str | None = None
    request_id: str | None = None
    organization_id: UUID | None = None


Acting: TypeAlias = "Actor | ApiRequest"


class Audit:
    """The keys of the chain."""

    __slots__ = ("_current", "_keys")

    def __init__(self, secret_keys: Sequence[bytes]) -> None:
        """The first of `secret_keys` makes new codes; all of them verify."""
        self._keys = {key_id(key): key for key in (derive_key(secret, "audit") for secret in secret_keys)}
        self._current = next(iter(self._keys))

    def system(self, name: str) -> Actor:
        """The service itself, or the part of it with this name."""
        return Actor(self, "system", name=name)

    @property
    def current(self) -> str:
        """The id of the key that makes new codes."""
        return self._current

    def code(self, key: str, previous: bytes, event: Sequence[str | int | None]) -> bytes | None:
        """The code of an event, from the previous one's; None: the key is not known."""
        secret = self._keys.get(key)
        if secret is None:
            return None
        text = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        return hmac.digest(secret, previous + text, "sha256")


async def record(
    connection: Connection,
    acting: Acting,
    action: str,
    target: tuple[str, UUID | str | None],
    before: Mapping[str, object] | None = None,
    after: Mapping[str, object] | None = None,
    outcome: str = "success",
    *,
    organization_id: UUID | None = None,
) -> None:
    """Add an event in the transaction of the act. From here to the commit nobody else can: call it last.

    `action` is named like a permission (`instances.create`); `target` is what was acted upon, as kind and id; `before`
    and `after` are what changed, in plain values (ids, times and addresses are understood), never secrets: what is
    called a password, secret or token is masked. `outcome` is success, failure or denied. The organization is the one
    that the request's path names, unless given.
    """
    actor = actor_of(acting)
    organization = organization_id or actor.organization_id
    head = await connection.fetchrow(
        "SELECT head.*, set_config('idle_in_transaction_session_timeout', $3, true)"
        " FROM audit_head($1::text::jsonb, $2::text::jsonb) AS head",
        _json(before),
        _json(after),
        f"{PATIENCE_SECONDS * 1000:.0f}",
    )
    assert head is not None
    sequence = (head["sequence"] or 0) + 1
    key = actor.audit.current
    values = (
        organization,
        actor.kind,
        actor.id,
        _text(actor.name),
        action,
        target[0],
        None if target[1] is None else _text(str(target[1])),
        outcome,
        head["before_text"],
        head["after_text"],
        plain_address(actor.address),
        _text(actor.request_id),
    )
    mac = actor.audit.code(key, head["mac"] or _NO_EVENT, _signed(sequence, head["at"], values, key))
    await connection.execute(
        "INSERT INTO audit_events (sequence, at, organization_id, actor_kind, actor_id, actor_name, action,"
        " target_kind, target_id, outcome, before, after, address, request_id, key_id, mac) VALUES ($1, $2, $3, $4, $5,"
        " $6, $7, $8, $9, $10, $11::text::jsonb, $12::text::jsonb, $13::text::inet, $14, $15, $16)",
        sequence,
        head["at"],
        *values,
        key,
        mac,
    )


def as_user(acting: Acting, user_id: UUID, name: str) -> Actor:
    """Somebody who has just shown who they are, from where `acting` came."""
    return dataclasses.replace(actor_of(acting), kind="user", id=user_id, name=name)


def actor_of(acting: Acting) -> Actor:
    """Who acts."""
    return acting if isinstance(acting, Actor) else acting.actor()


def _signed(sequence: int, at: datetime, values: Iterable[object], key: str) -> list[str | int | None]:
    """What the code of an event covers, in this order for ever."""
    moment = at.astimezone(UTC).isoformat(timespec="microseconds")
    return [sequence, moment, *(None if value is None else str(value) for value in values), key]


def _text(value: str | None) -> str | None:
    # PostgreSQL stores neither NUL nor lone surrogates.
    if value is None:
        return None
    return value[:MAX_TEXT].replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def plain_address(value: str | None) -> str | None:
    """An IP address in the one form in which it is stored and signed; None for what is none.

    PostgreSQL writes some IPv6 addresses differently, so `verify` brings what it reads into this form, too. A zone
    (fe80::1%eth0) means nothing elsewhere.
    """
    try:
        found = ip_address((value or "").partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return str(mapped or found)


def _json(values: Mapping[str, object] | None) -> str | None:
    if values is None:
        return None
    masked = {name: "•••" if value is not None and _MASKED.search(name) else value for name, value in values.items()}
    text = msgspec.json.encode(masked, enc_hook=str).decode()
    return text.replace("\\u0000", "\\ufffd")


# Reading


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events: each criterion that is not None must hold. `action` may end in `*`."""

    organization_id: UUID | None = None
    action: str | None = None
    actor_id: UUID | None = None
    target_kind: str | None = None
    target_id: str | None = None
    outcome: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def sql(self) -> tuple[str, list[object]]:
        """A condition with its arguments from $1."""
        conditions: list[str] = []
        values: list[object] = []

        def add(condition: str, value: object) -> None:
            values.append(value)
            conditions.append(condition.format(f"${len(values)}"))

        for name in ("organization_id", "actor_id", "target_kind", "target_id", "outcome"):
            value = getattr(self, name)
            if value is not None:
                add(name + " = {}", value)
        if self.action is not None:
            if self.action.endswith("*"):
                add("starts_with(action, {})", self.action[:-1])
            else:
                add("action = {}", self.action)
        if self.since is not None:
            add("at >= {}", self.since)
        if self.until is not None:
            add("at < {}", self.until)
        return " AND ".join(conditions) or "true", values


_COLUMNS: Final = (
    "sequence, at, organization_id, actor_kind, actor_id, actor_name, action, target_kind, target_id, outcome,"
    " before, after, host(address) AS address, request_id"
)


async def list_events(
    connection: Connection, wanted: Filter, *, page: int, limit: int
) -> tuple[list[dict[str, object]], int]:
    """One page of events, the newest first, and how many there are in all."""
    condition, values = wanted.sql()
    total = await connection.fetchval(f"SELECT count(*) FROM audit_events WHERE {condition}", *values)
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM audit_events WHERE {condition} ORDER BY sequence DESC"
        f" LIMIT ${len(values) + 1} OFFSET ${len(values) + 2}",
        *values,
        limit,
        (page - 1) * limit,
    )
    return [_shown(row) for row in rows], total


async def export(database: Database, wanted: Filter) -> AsyncIterator[bytes]:
    """Events as JSON lines, the oldest first, each piece some hundreds of lines. A page per transaction: a slow reader
    must not hold one open."""
    condition, values = wanted.sql()
    after = 0
    while True:
        rows = await database.fetch(
            f"SELECT {_COLUMNS} FROM audit_events WHERE {condition} AND sequence > ${len(values) + 1}"
            f" ORDER BY sequence LIMIT {VERIFY_BATCH}",
            *values,
            after,
        )
        if not rows:
            return
        yield b"".join(msgspec.json.encode(_shown(row), enc_hook=str) + b"\n" for row in rows)
        after = rows[-1]["sequence"]


def _shown(row: Record) -> dict[str, object]:
    event = dict(row)
    event["actor"] = {name: event.pop(f"actor_{name}") for name in ("kind", "id", "name")}
    event["target"] = {name: event.pop(f"target_{name}") for name in ("kind", "id")}
    return event


# The head of the chain, and whether the chain holds


@dataclass(frozen=True, slots=True)
class Head:
    """The last event at some moment: how many there were, and its code."""

    sequence: int
    mac: bytes

    def __str__(self) -> str:
        return f"sequence={self.sequence} mac={self.mac.hex()}"


def parse_heads(text: str) -> list[Head]:
    """The heads that a log mentions: lines with `audit head sequence=… mac=…`."""
    return [Head(int(match[1]), bytes.fromhex(match[2])) for match in _HEAD_LINE.finditer(text)]


async def current_head(connection: Connection) -> Head | None:
    """The last event; None while there is none."""
    row = await connection.fetchrow("SELECT sequence, mac FROM audit_events ORDER BY sequence DESC LIMIT 1")
    return None if row is None else Head(row["sequence"], row["mac"])


@duty("audit head", every=60)
async def note_head_of(context: "Context") -> None:
    """The steward's part: the head into the log and into this host's file."""
    await note_head(context.database, head_file(context.gateway_settings.state_dir))


def head_file(state_dir: Path) -> Path:
    """Where a host keeps the last head that it noted."""
    return state_dir / "audit.head"


async def note_head(database: Database, file: Path) -> Head | None:
    """Write the head to the log, and to a file that `verify` looks at; once a minute.

    The file is not moved backwards: when the event that it names is not there any more as it was, that is logged as an
    error, each minute, and the file keeps the evidence.
    """
    noted = (await asyncio.to_thread(_read_heads, file))[-1:]
    async with database.connection() as connection:
        head = await current_head(connection)
        for old in noted:
            mac = await connection.fetchval("SELECT mac FROM audit_events WHERE sequence = $1", old.sequence)
            if mac != old.mac:
                log.error("the audit log was tampered with: it no longer contains the event of audit head %s", old)
                return head
    if head is not None:
        log.info("audit head %s", head)
        if [head] != noted:
            await asyncio.to_thread(_write_head, file, head)
    return head


def _read_heads(file: Path) -> list[Head]:
    try:
        return parse_heads(file.read_text())
    except FileNotFoundError:
        return []


def _write_head(file: Path, head: Head) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = file.with_name(file.name + ".new")
    new.write_text(f"audit head {head}\n")
    os.replace(new, file)


@dataclass
class Report:
    """What `verify` found."""

    events: int = 0
    head: Head | None = None
    compared: int = 0
    """Noted heads that the chain was compared with."""
    problems: list[str] = field(default_factory=list)
    problem_count: int = 0

    @property
    def intact(self) -> bool:
        """Whether nothing was found."""
        return self.problem_count == 0

    def add(self, problem: str) -> None:
        """Note a problem."""
        self.problem_count += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def __str__(self) -> str:
        lines = list(self.problems)
        if self.problem_count > len(lines):
            lines.append(f"… and {self.problem_count - len(lines)} more")
        lines.append(f"{self.events} events, " + ("the chain holds" if self.intact else "THE CHAIN IS BROKEN"))
        if self.head is not None:
            lines.append(f"audit head {self.head}")
        if not self.compared:
            lines.append(
                "no earlier head to compare with: that the last events were removed would not show."
                " Give the log that has the lines 'audit head …'"
            )
        return "\n".join(lines)


async def verify(connection: Connection, audit: Audit, heads: Iterable[Head] = ()) -> Report:
    """Read the whole chain and say where it does not hold; `heads` are what was noted elsewhere.

    Call it inside a transaction: it reads through a cursor.
    """
    report = Report()
    noted: dict[int, set[bytes]] = {}
    for head in heads:
        noted.setdefault(head.sequence, set()).add(head.mac)
    expected, previous = 1, _NO_EVENT
    vouched = True  # whether `previous` is what stood before the event
    query = (
        "SELECT sequence, at, organization_id, actor_kind, actor_id, actor_name, action, target_kind, target_id,"
        " outcome, before::text AS before, after::text AS after, host(address) AS address, request_id, key_id, mac"
        " FROM audit_events ORDER BY sequence"
    )
    async for row in connection.cursor(query, prefetch=VERIFY_BATCH):
        sequence, at, *values, address, request_id, key, mac = tuple(row)
        values += (plain_address(address), request_id)
        if sequence != expected:
            last = sequence - 1
            report.add(
                f"event {expected} is missing" if last == expected else f"events {expected} to {last} are missing"
            )
            vouched = False
        code = audit.code(key, previous, _signed(sequence, at, values, key))
        if code is None:
            report.add(f"event {sequence} was written under the key {key}, which is not among the secret keys")
        elif vouched and not hmac.compare_digest(code, mac):
            report.add(f"event {sequence} of {at:%Y-%m-%d %H:%M:%S} UTC is not as it was written")
        if any(mac != other for other in noted.get(sequence, ())):
            report.add(f"event {sequence} is not the one that the log noted as head")
        report.events += 1
        expected, previous, vouched = sequence + 1, mac, True
        report.head = Head(sequence, mac)
    report.compared = len(noted)
    last_noted = max(noted, default=0)
    if last_noted >= expected:
        report.add(
            f"the last events are missing: the log noted a head at event {last_noted}, the table ends at {expected - 1}"
        )
    return report


async def verify_database(database: Database, audit: Audit, state_dir: Path, logs: Iterable[Path] = ()) -> Report:
    """`redisgate audit verify`: compare with the head that this host noted, and with those in log files.

    Raises:
        OSError: a log file cannot be read.
    """
    heads = await asyncio.to_thread(_read_heads, head_file(state_dir))
    for path in logs:
        heads += parse_heads(await asyncio.to_thread(path.read_text, errors="replace"))
    async with database.transaction() as connection:
        await connection.execute("SET LOCAL statement_timeout = 0")
        return await verify(connection, audit, heads)


@duty("audit check", every=3600)
async def check_chain(context: "Context") -> None:
    """The steward's part: read the whole chain and keep what was found, for people who look at the log."""
    database = context.database
    async with database.connection() as connection:
        last, head = await last_check(connection), await current_head(connection)
    if last is not None and not last["problem_count"] and last["at"] > context.now() - CHECK_AGAIN:
        if head is None or last["head_sequence"] == head.sequence:
            return
    started = time.monotonic()
    report = await verify_database(database, context.audit, context.gateway_settings.state_dir)
    if not report.intact:
        log.error("the audit log was tampered with, or lacks a secret key: %s", report)
    await database.execute(
        "INSERT INTO audit_checks (seconds, events, head_sequence, compared, problem_count, problems)"
        " VALUES ($1, $2, $3, $4, $5, $6)",
        time.monotonic() - started,
        report.events,
        None if report.head is None else report.head.sequence,
        report.compared,
        report.problem_count,
        report.problems,
    )
    await database.execute("DELETE FROM audit_checks WHERE id <= (SELECT max(id) FROM audit_checks) - $1", CHECKS_KEPT)


async def last_check(connection: Connection) -> Record | None:
    """What the last look at the whole chain found; None before the first."""
    return await connection.fetchrow("SELECT * FROM audit_checks ORDER BY id DESC LIMIT 1")
