"""Usage: collected by each worker, written every few seconds, rolled up from minutes to hours to days.

A request adds to plain integers (`redisgate.metering`). Every few seconds a worker takes what has come together and
adds it to the rows of the minute, in one transaction with the number of the batch; so a batch whose acknowledgement
was lost is not added twice. What a worker had not written when it was killed is lost: `FLUSH_SECONDS` at most.

Hours are summed from minutes, and days from hours, by replacing: doing it again changes nothing, and what comes late
is there after the next time. How long each is kept is a setting; the least is what rolling up needs.

Latency is kept as a histogram, so that percentiles of any span are right to an eighth of their value.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

from control.database import Connection, Database, DatabaseAway, Record
from control.duties import duty
from control.encryption import Encryption
from control.http import BadRequest, Context
from control.instances import Routes, address_of
from redisgate.access import AccessTable, Instance, IpAddress
from redisgate.config import ControlSettings
from redisgate.metering import READ, WRITE, UsageCell, percentile
from resp.commands import CommandTable, bundled_table
from resp.errors import RespError
from resp.info import parse_info
from resp.pool import Pool

FLUSH_SECONDS: Final = 5.0
"""Between two writes of a worker."""
QUERY_SECONDS: Final = 10.0
"""For PostgreSQL to take a batch."""
MAX_PENDING: Final = 20_000
"""Rows that wait for a PostgreSQL that is away; more push out the oldest."""
MAX_IDLE_CELLS: Final = 10_000
LAST_USED_SECONDS: Final = 60.0
"""Between two times that a worker writes when a key was used last."""
SAMPLE_SECONDS: Final = 60.0
SAMPLE_TIMEOUT: Final = 2.0
MAX_SAMPLED_AT_ONCE: Final = 8
ROLL_UP_HOURS: Final = 3
"""What is rolled up every minute."""
LATE_HOURS: Final = 24
"""What is rolled up every hour, for what came late."""
LEAST_MINUTES: Final = timedelta(hours=LATE_HOURS + 2)
LEAST_HOURS: Final = timedelta(days=3)
MAX_POINTS: Final = 1500
"""In one series."""
SAMPLES_KEPT: Final = timedelta(days=30)
MAX_COMMANDS: Final = 200
"""Of one instance whose calls are counted: those that ran most."""
COMMANDS_STEP: Final = timedelta(minutes=10)
"""In which calls of commands are summed."""
OWN_COMMANDS: Final = frozenset({"auth", "client", "command", "hello", "info", "ping"})
"""What every connection needs for itself is not counted among an instance's commands; nor is what administers it."""
COUNTERS: Final = {
    "hits": "keyspace_hits",
    "misses": "keyspace_misses",
    "evicted": "evicted_keys",
    "expired": "expired_keys",
}
"""What is kept of what servers count, by INFO's names."""

NO_KEY: Final = UUID(int=0)
STEPS: Final = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}
COUNTS: Final = ("commands", "reads", "writes", "requests", "errors", "bytes_in", "bytes_out", "micros")

_CREDENTIALS = {"key": "key", "token": "token", "ro": "readonly_token", "session": "session"}

_MOST_BIGINT = 2**63 - 1
_MOST_INT = 2**31 - 1

log = logging.getLogger(__name__)


# Collecting


@dataclass(frozen=True, slots=True)
class UsageKey:
    """What usage is counted by."""

    organization_id: UUID
    instance_id: UUID
    credential: str
    api_key_id: UUID


@dataclass(slots=True)
class Amount:
    """What was used in a time."""

    counts: list[int]
    latency: list[int]

    def add(self, other: "Amount") -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.latency = [mine + theirs for mine, theirs in zip(self.latency, other.latency, strict=True)]


@dataclass(slots=True)
class _Batch:
    number: int
    rows: dict[tuple[datetime, UsageKey], Amount]
    used: dict[UUID, tuple[datetime, IpAddress | None]] = field(default_factory=dict)


class UsageCollector:
    """What one worker has counted and not yet written."""

    def __init__(self, database: Database, access: AccessTable) -> None:
        self._database = database
        self._access = access
        self._writer = uuid4()
        self._cells: dict[UsageKey, UsageCell] = {}
        self._pending: dict[tuple[datetime, UsageKey], Amount] = {}
        self._used: dict[UUID, tuple[datetime, IpAddress | None]] = {}
        self._used_written: dict[UUID, float] = {}  # monotonic
        self._sending: _Batch | None = None
        self._batches = 0
        self._tasks: list[asyncio.Task[None]] = []

    def cell(
        self, organization_id: UUID, instance_id: UUID, credential: str, api_key_id: UUID | None, table: CommandTable
    ) -> UsageCell:
        """Where a credential's requests to an instance are counted."""
        key = UsageKey(organization_id, instance_id, _CREDENTIALS[credential], api_key_id or NO_KEY)
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = UsageCell(table)
        return cell

    def start(self) -> None:
        """Begin to write every few seconds, and to sample the instances that are in use."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._write()), loop.create_task(self._sample())]

    async def stop(self) -> None:
        """Write what is left, if PostgreSQL is there."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(DatabaseAway, TimeoutError):
            # What was about to be written, and then what has come since.
            await self.flush()
            await self.flush()

    async def _write(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.flush()
            except (DatabaseAway, TimeoutError):
                pass  # it is kept; who needs PostgreSQL now says so
            except Exception:
                log.exception("usage cannot be written")

    async def flush(self) -> None:
        """Write what has come together. Raises DatabaseAway, and keeps it then."""
        self._gather()
        if self._sending is None:
            if not self._pending and not self._used:
                return
            self._batches += 1
            self._sending = _Batch(self._batches, self._pending, self._used)
            self._pending, self._used = {}, {}
        async with asyncio.timeout(QUERY_SECONDS):
            async with self._database.transaction() as connection:
                await _add(connection, self._writer, self._sending)
        self._sending = None

    def _gather(self) -> None:
        """Empty the cells into the minute in which they were filled."""
        now = time.time()
        minute = datetime.fromtimestamp((now - FLUSH_SECONDS / 2) // 60 * 60, UTC)
        for key, cell in list(self._cells.items()):
            if not cell.used:
                # Who still counts in it has it by another reference than ours and this loop's.
                if len(self._cells) > MAX_IDLE_CELLS and sys.getrefcount(cell) <= 3:
                    del self._cells[key]
                continue
            amount = _taken(cell)
            if key.api_key_id != NO_KEY:
                self.note_use(key.api_key_id, cell.address)
            cell.clear()
            known = self._pending.get((minute, key))
            if known is None:
                self._pending[minute, key] = amount
            else:
                known.add(amount)
        excess = len(self._pending) - MAX_PENDING
        if excess > 0:
            log.error("PostgreSQL is away for too long: usage of %d minutes and credentials is lost", excess)
            for oldest in sorted(self._pending, key=lambda item: item[0])[:excess]:
                del self._pending[oldest]

    def note_use(self, api_key_id: UUID, address: IpAddress | None) -> None:
        """A key is used now, from there; written with the usage."""
        written = self._used_written.get(api_key_id)
        if written is None or time.monotonic() - written >= LAST_USED_SECONDS:
            if len(self._used_written) > MAX_PENDING:
                self._used_written.clear()
            self._used_written[api_key_id] = time.monotonic()
            self._used[api_key_id] = datetime.now(UTC), address

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS - time.time() % SAMPLE_SECONDS)
            samples = []
            for instance in list(self._access.instances.values()):
                with contextlib.suppress(RespError, TimeoutError, ValueError):
                    instance_id = UUID(instance.id)
                    database = instance.config.address.database
                    async with asyncio.timeout(SAMPLE_TIMEOUT):
                        samples.append((instance_id, await _look(instance.backend.pool, database)))
            try:
                await _keep_samples(self._database, samples)
            except (DatabaseAway, TimeoutError):
                pass
            except Exception:
                # One server's odd answer must not end the looking at all others.
                log.exception("samples cannot be kept")


def _taken(cell: UsageCell) -> Amount:
    """What is in a cell, in the order of COUNTS."""
    commands = cell.commands
    requests = sum(cell.buckets)
    counts = [sum(commands), commands[READ], commands[WRITE], requests, cell.errors, cell.bytes_in, cell.bytes_out]
    return Amount([*counts, cell.nanos // 1000], cell.buckets)


async def _add(connection: Connection, writer: UUID, batch: _Batch) -> None:
    """Add a batch to the rows of its minutes, unless that was done before."""
    new = await connection.fetchval(
        "INSERT INTO usage_writers AS w (writer, batch) VALUES ($1, $2)"
        " ON CONFLICT (writer) DO UPDATE SET batch = $2, seen_at = now() WHERE w.batch < $2 RETURNING true",
        writer,
        batch.number,
    )
    if not new:
        return
    # In one order in every worker: rows that two of them write at once must not make them wait for each other.
    rows = sorted(
        batch.rows.items(),
        key=lambda item: (
            item[0][0],
            item[0][1].organization_id,
            item[0][1].instance_id,
            item[0][1].credential,
            item[0][1].api_key_id,
        ),
    )
    if rows:
        await _add_rows(connection, rows)
    if batch.used:
        used = sorted(batch.used.items())
        await connection.execute(
            "UPDATE api_keys k SET last_used_at = n.at, last_used_from = coalesce(n.address, k.last_used_from)"
            " FROM unnest($1::uuid[], $2::timestamptz[], $3::inet[]) AS n (id, at, address)"
            " WHERE k.id = n.id AND (k.last_used_at IS NULL OR k.last_used_at < n.at)",
            [key_id for key_id, _ in used],
            [at for _, (at, _) in used],
            [address for _, (_, address) in used],
        )


async def _add_rows(connection: Connection, rows: Sequence[tuple[tuple[datetime, UsageKey], Amount]]) -> None:
    names = ", ".join(COUNTS)
    counts = [[amount.counts[index] for _, amount in rows] for index in range(len(COUNTS))]
    placeholders = ", ".join(f"${6 + index}::bigint[]" for index in range(len(COUNTS)))
    await connection.execute(
        f"INSERT INTO usage AS u (step, at, organization_id, instance_id, credential, api_key_id, {names}, latency)"
        f" SELECT 'minute', n.at, n.organization_id, n.instance_id, n.credential, n.api_key_id,"
        f" {', '.join('n.' + name for name in COUNTS)}, n.latency::bigint[]"
        f" FROM unnest($1::timestamptz[], $2::uuid[], $3::uuid[], $4::text[], $5::uuid[], {placeholders},"
        f" ${6 + len(COUNTS)}::text[])"
        f" AS n (at, organization_id, instance_id, credential, api_key_id, {names}, latency)"
        " ON CONFLICT (organization_id, instance_id, step, at, credential, api_key_id) DO UPDATE SET "
        + ", ".join(f"{name} = u.{name} + excluded.{name}" for name in COUNTS)
        + ", latency = add_histograms(u.latency, excluded.latency)",
        [at for (at, _), _ in rows],
        [key.organization_id for (_, key), _ in rows],
        [key.instance_id for (_, key), _ in rows],
        [key.credential for (_, key), _ in rows],
        [key.api_key_id for (_, key), _ in rows],
        *counts,
        ["{" + ",".join(map(str, _without_zeros(amount.latency))) + "}" for _, amount in rows],
    )


def _without_zeros(latency: Sequence[int]) -> Sequence[int]:
    end = len(latency)
    while end and not latency[end - 1]:
        end -= 1
    return latency[:end]


# Samples of instances


@dataclass(frozen=True, slots=True)
class Sample:
    """What INFO says; memory in bytes. Counters go from the server's start, which `run_id` tells apart."""

    keys: int
    memory: int
    connections: int
    run_id: str = ""
    counters: Mapping[str, int] = field(default_factory=dict)
    """By the names of COUNTERS."""
    commands: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Calls, microseconds and failed calls by the command's name in small letters."""


async def _look(pool: Pool, database: int) -> Sample:
    """Raises RespError, ValueError."""
    reply = await pool.call(b"INFO", b"all")
    if not isinstance(reply, bytes):
        raise ValueError("INFO was refused")
    info = parse_info(reply)
    keyspace = dict(part.split("=", 1) for part in info.get(f"db{database}", "keys=0").split(",") if "=" in part)
    return Sample(
        _number(keyspace.get("keys"), _MOST_BIGINT),
        _number(info.get("used_memory"), _MOST_BIGINT),
        _number(info.get("connected_clients"), _MOST_INT),
        info.get("run_id", "")[:100],
        {name: _number(info.get(theirs), _MOST_BIGINT) for name, theirs in COUNTERS.items()},
        _commands(info),
    )


def _commands(info: Mapping[str, str]) -> dict[str, list[int]]:
    """The commands that ran most, from INFO's lines. Raises ValueError."""
    found: dict[str, list[int]] = {}
    for line, text in info.items():
        name = line.removeprefix("cmdstat_").lower()
        if name == line.lower() or "\0" in name or _is_own(name):
            continue
        stats = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
        found[name[:100]] = [_number(stats.get(part), _MOST_BIGINT) for part in ("calls", "usec", "failed_calls")]
    return dict(sorted(found.items(), key=lambda item: -item[1][0])[:MAX_COMMANDS])


def _is_own(name: str) -> bool:
    if name.partition("|")[0] in OWN_COMMANDS or name == "memory|usage":  # which the data browser asks for each key
        return True
    command = bundled_table().find([word.encode() for word in name.split("|")])
    return command is not None and "admin" in command.flags


def _number(text: str | None, most: int) -> int:
    """What a server says, as far as the database has room for it; 0 where it says nothing. Raises ValueError."""
    return 0 if text is None else min(max(int(text), 0), most)


async def look_at(
    row: Record, encryption: Encryption, loaded: Instance | None = None, routes: Routes | None = None
) -> tuple[float, Sample]:
    """How long an instance takes to answer, in seconds, and what it says; over the gateway's connections if it has any.

    Raises:
        RespError, ValueError: it does not answer, or not as it should.
        DecryptionError: the key of its password is missing.
    """
    if loaded is not None:
        pool, database = loaded.backend.pool, loaded.config.address.database
    else:
        address = address_of(row, encryption, routes)
        pool, database = Pool(address, size=2, connect_timeout=SAMPLE_TIMEOUT), address.database
    try:
        await pool.call(b"PING")  # connects, if nobody has yet
        began = time.perf_counter()
        await pool.call(b"PING")
        return time.perf_counter() - began, await _look(pool, database)
    finally:
        if loaded is None:
            pool.abort()


async def _keep_samples(database: Database, samples: Sequence[tuple[UUID, Sample]]) -> None:
    """Keep what each shows, and what its server has counted since the sample before."""
    if not samples:
        return
    by_id = dict(samples)
    async with database.transaction() as connection:
        await connection.execute(
            "INSERT INTO instance_counters (instance_id) SELECT id FROM instances WHERE id = ANY ($1) ORDER BY id"
            " ON CONFLICT DO NOTHING",
            list(by_id),
        )
        # One per instance and minute, whoever of the workers and the steward is first.
        before = await connection.fetch(
            "SELECT * FROM instance_counters WHERE instance_id = ANY ($1) AND sampled_at < date_trunc('minute', now())"
            " ORDER BY instance_id FOR UPDATE",
            list(by_id),
        )
        if before:
            await _keep(connection, [(row, by_id[row["instance_id"]]) for row in before])


async def _keep(connection: Connection, pairs: Sequence[tuple[Record, Sample]]) -> None:
    """Write samples, each beside what was counted before it."""
    ids = [row["instance_id"] for row, _ in pairs]
    grown = [_grown(row, sample) for row, sample in pairs]
    await connection.execute(
        f"INSERT INTO instance_samples (instance_id, at, keys, memory, connections, {', '.join(COUNTERS)})"
        " SELECT n.id, date_trunc('minute', now()), n.keys, n.memory, n.connections, n.a, n.b, n.c, n.d"
        " FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::int[], $5::bigint[], $6::bigint[], $7::bigint[],"
        " $8::bigint[]) AS n (id, keys, memory, connections, a, b, c, d) ON CONFLICT DO NOTHING",
        ids,
        [sample.keys for _, sample in pairs],
        [sample.memory for _, sample in pairs],
        [sample.connections for _, sample in pairs],
        *([counters[name] for counters, _ in grown] for name in COUNTERS),
    )
    commands = [
        (instance_id, name, *counted)
        for instance_id, (_, more) in zip(ids, grown, strict=True)
        for name, counted in sorted(more.items())
    ]
    if commands:
        await connection.execute(
            "INSERT INTO instance_commands AS c (instance_id, at, command, calls, micros, failed)"
            " SELECT n.id, date_bin($1, now(), 'epoch'), n.command, n.calls, n.micros, n.failed"
            " FROM unnest($2::uuid[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[])"
            " AS n (id, command, calls, micros, failed) ON CONFLICT (instance_id, at, command) DO UPDATE SET"
            " calls = c.calls + excluded.calls, micros = c.micros + excluded.micros,"
            " failed = c.failed + excluded.failed",
            COMMANDS_STEP,
            *(list(column) for column in zip(*commands, strict=True)),
        )
    await connection.execute(
        "UPDATE instance_counters c SET run_id = n.run_id, sampled_at = now(), counters = n.counters,"
        " commands = n.commands FROM unnest($1::uuid[], $2::text[], $3::jsonb[], $4::jsonb[])"
        " AS n (id, run_id, counters, commands) WHERE c.instance_id = n.id",
        ids,
        [sample.run_id for _, sample in pairs],
        [dict(sample.counters) for _, sample in pairs],
        [dict(sample.commands) for _, sample in pairs],
    )


def _grown(before: Record, sample: Sample) -> tuple[dict[str, int], dict[str, list[int]]]:
    """By how much counters grew, and each command that ran; of a server that is looked at first, nothing is known."""
    counters, commands = dict.fromkeys(COUNTERS, 0), {}
    if before["run_id"] is None:
        return counters, {}
    same = before["run_id"] == sample.run_id
    for name in COUNTERS:
        counters[name] = _since(sample.counters.get(name, 0), before["counters"].get(name, 0) if same else 0)
    for name, now in sample.commands.items():
        then = before["commands"].get(name, (0, 0, 0)) if same else (0, 0, 0)
        grown = [_since(one, other) for one, other in zip(now, then, strict=True)]
        if grown[0]:
            commands[name] = grown
    return counters, commands


def _since(now: int, then: int) -> int:
    """What came to a counter, which somebody may have set back."""
    return now - then if now >= then else now


@duty("samples of instances", every=SAMPLE_SECONDS)
async def sample_instances(context: Context) -> None:
    """Look at the running instances that can be reached from this host, also those that nobody uses."""
    rows = await context.database.fetch(
        "SELECT i.id, i.endpoint, i.redis_user, i.password_encrypted FROM instances i"
        " WHERE i.deleted_at IS NULL AND i.status = 'running' AND i.endpoint IS NOT NULL AND NOT EXISTS"
        " (SELECT FROM instance_samples s WHERE s.instance_id = i.id AND s.at >= date_trunc('minute', now()))"
    )
    turns = asyncio.Semaphore(MAX_SAMPLED_AT_ONCE)

    async def one(row: Record) -> tuple[UUID, Sample] | None:
        async with turns:
            try:
                async with asyncio.timeout(SAMPLE_TIMEOUT):
                    return row["id"], (
                        await look_at(row, context.encryption, routes=context.extra.get("kubernetes.routes"))
                    )[1]
            except Exception as error:
                log.debug("no sample of instance %s: %s", row["id"], error)
                return None

    samples = await asyncio.gather(*(one(row) for row in rows))
    await _keep_samples(context.database, [sample for sample in samples if sample is not None])


# Rolling up


@duty("usage roll-up", every=60)
async def roll_up(context: Context) -> None:
    """Make hours of minutes and days of hours."""
    now = context.now()
    last_late = context.extra.get("usage.late")
    hours = ROLL_UP_HOURS
    if last_late is None or now - last_late >= timedelta(hours=1):
        hours = LATE_HOURS
    async with context.database.transaction() as connection:
        await sum_up(connection, now - timedelta(hours=hours))
    if hours == LATE_HOURS:
        context.extra["usage.late"] = now


async def sum_up(connection: Connection, since: datetime) -> None:
    """Make the hours and days since then anew, from what is in their minutes and hours."""
    names = ", ".join(COUNTS)
    for step, source in (("hour", "minute"), ("day", "hour")):
        await connection.execute(
            f"INSERT INTO usage (step, at, organization_id, instance_id, credential, api_key_id, {names}, latency)"
            " SELECT $1, date_trunc($1, at), organization_id, instance_id, credential, api_key_id, "
            + ", ".join(f"sum({name})::bigint" for name in COUNTS)
            + ", sum_histograms(latency) FROM usage WHERE step = $2 AND at >= date_trunc($1, $3::timestamptz)"
            " GROUP BY date_trunc($1, at), organization_id, instance_id, credential, api_key_id"
            " ON CONFLICT (organization_id, instance_id, step, at, credential, api_key_id) DO UPDATE SET "
            + ", ".join(f"{name} = excluded.{name}" for name in COUNTS)
            + ", latency = excluded.latency",
            step,
            source,
            since,
        )


@duty("thinning of samples", every=600)
async def thin_out(context: Context) -> None:
    """Sum samples and calls of commands up to hours once nobody asks for them by the minute."""
    before = (context.now() - retention(context.settings)["minute"]).replace(minute=0, second=0, microsecond=0)
    counted, highest = ", ".join(COUNTERS), ("keys", "memory", "connections")
    async with context.database.transaction() as connection:
        await connection.execute(
            "WITH old AS (DELETE FROM instance_samples WHERE at < $1 AND at <> date_trunc('hour', at, 'UTC')"
            f" RETURNING *) INSERT INTO instance_samples AS s (instance_id, at, {', '.join(highest)}, {counted})"
            " SELECT instance_id, date_trunc('hour', at, 'UTC'), "
            + ", ".join([*(f"max({name})" for name in highest), sums_of_counters()])
            + " FROM old GROUP BY 1, 2 ON CONFLICT (instance_id, at) DO UPDATE SET "
            + ", ".join(
                [
                    *(f"{name} = greatest(s.{name}, excluded.{name})" for name in highest),
                    *(f"{name} = s.{name} + excluded.{name}" for name in COUNTERS),
                ]
            ),
            before,
        )
        await connection.execute(
            "WITH old AS (DELETE FROM instance_commands WHERE at < $1 AND at <> date_trunc('hour', at, 'UTC')"
            " RETURNING *) INSERT INTO instance_commands AS c (instance_id, at, command, calls, micros, failed)"
            " SELECT instance_id, date_trunc('hour', at, 'UTC'), command, sum(calls)::bigint, sum(micros)::bigint,"
            " sum(failed)::bigint FROM old GROUP BY 1, 2, 3 ON CONFLICT (instance_id, at, command) DO UPDATE SET"
            " calls = c.calls + excluded.calls, micros = c.micros + excluded.micros,"
            " failed = c.failed + excluded.failed",
            before,
        )


@duty("purge of usage", every=600)
async def purge(context: Context) -> None:
    """Remove what is older than the settings keep it, and what feeds and leases need no more."""
    now = context.now()
    for step, kept in retention(context.settings).items():
        await context.database.execute("DELETE FROM usage WHERE step = $1 AND at < $2", step, now - kept)
    await context.database.execute("DELETE FROM instance_samples WHERE at < $1", now - SAMPLES_KEPT)
    await context.database.execute("DELETE FROM instance_commands WHERE at < $1", now - SAMPLES_KEPT)
    await context.database.execute("DELETE FROM usage_writers WHERE seen_at < $1", now - timedelta(days=2))
    await context.database.execute("DELETE FROM daily_leases WHERE day < $1", (now - timedelta(days=2)).date())
    await context.database.execute("DELETE FROM access_changes WHERE at < $1", now - timedelta(hours=1))


def retention(settings: ControlSettings) -> dict[str, timedelta]:
    """For how long each step is kept."""
    return {
        "minute": max(timedelta(seconds=settings.retain_minutes), LEAST_MINUTES),
        "hour": max(timedelta(seconds=settings.retain_hours), LEAST_HOURS),
        "day": timedelta(seconds=settings.retain_days),
    }


# Reading


def span(
    step: str, start: datetime | None, end: datetime | None, now: datetime, settings: ControlSettings
) -> tuple[datetime, datetime]:
    """The beginning and end of a series, on the step's bounds.

    Raises:
        BadRequest: it is too long, or turned around.
    """
    length = STEPS[step]
    fields: dict[str, str] = {}
    for name, moment in (("from", start), ("to", end)):
        if moment is not None and moment.tzinfo is None:
            fields[name] = "needs a time zone, as in 2030-01-01T00:00:00Z"
    if fields:
        raise BadRequest("some parameters of the query are wrong", fields)
    end = min(end or now, now + length)
    default = {"minute": 60, "hour": 24, "day": 30}[step]
    start = start or end - default * length
    start = max(start, now - retention(settings)[step] - length)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    first = epoch + (start - epoch) // length * length
    if first >= end:
        raise BadRequest("some parameters of the query are wrong", {"from": "is not before to"})
    if (end - first) / length > MAX_POINTS:
        raise BadRequest(
            "some parameters of the query are wrong",
            {"from": f"at most {MAX_POINTS} points are shown; ask for less, or for a longer step"},
        )
    return first, end


async def series(
    connection: Connection,
    settings: ControlSettings,
    organization_id: UUID,
    step: str,
    start: datetime,
    end: datetime,
    *,
    instance_id: UUID | None = None,
    api_key_id: UUID | None = None,
) -> dict[str, Any]:
    """What was used, step by step and altogether; steps without use are missing from the series."""
    rows = await connection.fetch(
        "SELECT at, " + ", ".join(f"sum({name})::bigint AS {name}" for name in COUNTS) + ","
        " sum_histograms(latency) AS latency FROM usage WHERE organization_id = $1 AND step = $2 AND at >= $3"
        " AND at < $4 AND ($5::uuid IS NULL OR instance_id = $5) AND ($6::uuid IS NULL OR api_key_id = $6)"
        " GROUP BY at ORDER BY at",
        organization_id,
        step,
        start,
        end,
        instance_id,
        api_key_id,
    )
    points = {row["at"]: _shown(row, settings) | {"at": row["at"]} for row in rows}
    if instance_id is not None:
        samples = await connection.fetch(
            "SELECT date_trunc($2, at, 'UTC') AS at, max(keys) AS keys, max(memory) AS memory,"
            f" max(connections) AS connections, {sums_of_counters()} FROM instance_samples WHERE instance_id = $1"
            " AND at >= $3 AND at < $4 GROUP BY 1",
            instance_id,
            step,
            start,
            end,
        )
        nothing = _shown(dict.fromkeys(COUNTS, 0) | {"latency": []}, settings)
        for row in samples:
            points.setdefault(row["at"], nothing | {"at": row["at"]}).update(
                {name: row[name] for name in ("keys", "memory", "connections", *COUNTERS)}
            )
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in COUNTS}
    total["latency"] = _sum([row["latency"] for row in rows])
    return {
        "step": step,
        "from": start,
        "to": end,
        "retention_seconds": int(retention(settings)[step].total_seconds()),
        "total": _shown(total, settings),
        "series": [points[at] for at in sorted(points)],
    }


def sums_of_counters() -> str:
    """The columns that add up what samples counted."""
    return ", ".join(f"sum({name})::bigint AS {name}" for name in COUNTERS)


async def costs(
    connection: Connection, settings: ControlSettings, organization_id: UUID, start: datetime, end: datetime
) -> list[dict[str, Any]]:
    """Commands, bytes and cost of each credential on each instance, on the days from `start` to `end`, dearest first.

    Today is what its minutes say, the days before are what was rolled up.
    """
    rows = await connection.fetch(
        "SELECT u.instance_id, i.name AS instance_name, u.credential, nullif(u.api_key_id, $4) AS api_key_id,"
        " k.name AS api_key_name, sum(u.commands)::bigint AS commands, sum(u.bytes_in)::bigint AS bytes_in,"
        " sum(u.bytes_out)::bigint AS bytes_out FROM usage u LEFT JOIN instances i ON i.id = u.instance_id"
        " LEFT JOIN api_keys k ON k.id = u.api_key_id WHERE u.organization_id = $1 AND u.at >= $2 AND u.at < $3"
        " AND ((u.step = 'day' AND u.at < date_trunc('day', now(), 'UTC'))"
        " OR (u.step = 'minute' AND u.at >= date_trunc('day', now(), 'UTC')))"
        " GROUP BY u.instance_id, i.name, u.credential, u.api_key_id, k.name ORDER BY commands DESC, u.instance_id",
        organization_id,
        start,
        end,
        NO_KEY,
    )
    return [dict(row) | {"cost": cost(settings, row["commands"], row["bytes_in"] + row["bytes_out"])} for row in rows]


def cost(settings: ControlSettings, commands: int, size: int) -> float:
    """What commands and bytes cost."""
    return round(
        commands / 100_000 * settings.price_per_100k_commands + size / 1_000_000_000 * settings.price_per_gb, 6
    )


def _shown(row: Any, settings: ControlSettings) -> dict[str, Any]:
    latency = row["latency"]
    shown: dict[str, Any] = {name: row[name] for name in COUNTS if name != "micros"}
    for name, fraction in (("latency_p50_ms", 0.5), ("latency_p95_ms", 0.95), ("latency_p99_ms", 0.99)):
        micros = percentile(latency, fraction)
        shown[name] = None if micros is None else round(micros / 1000, 3)
    shown["latency_mean_ms"] = round(row["micros"] / row["requests"] / 1000, 3) if row["requests"] else None
    shown["cost"] = cost(settings, row["commands"], row["bytes_in"] + row["bytes_out"])
    return shown


def _sum(histograms: Sequence[Sequence[int]]) -> list[int]:
    total = [0] * max((len(histogram) for histogram in histograms), default=0)
    for histogram in histograms:
        for bucket, count in enumerate(histogram):
            total[bucket] += count
    return total
