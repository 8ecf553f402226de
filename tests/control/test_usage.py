"""Usage: written once, rolled up without double counting, kept for as long as it should be, priced."""

import asyncio
import dataclasses
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from control import usage
from control.database import DatabaseAway
from control.http import BadRequest, Context
from control.usage import COUNTS, NO_KEY, UsageCollector
from redisgate.access import AccessTable
from redisgate.config import ControlSettings
from redisgate.metering import BUCKETS, bucket_of, bucket_start, percentile
from resp.address import Address
from resp.commands import bundled_table
from resp.pool import Pool
from tests.control.people import Person, register
from tests.servers import RedisServer


@pytest.fixture
async def person(client: httpx.AsyncClient) -> Person:
    return await register(client)


async def rows(context: Context, organization_id: UUID, step: str = "minute") -> list[Any]:
    return await context.database.fetch(
        "SELECT * FROM usage WHERE organization_id = $1 AND step = $2 ORDER BY at", organization_id, step
    )


async def put(
    context: Context, organization_id: UUID, at: datetime, commands: int, *, instance_id: UUID = NO_KEY
) -> None:
    await context.database.execute(
        "INSERT INTO usage (step, at, organization_id, instance_id, credential, api_key_id, commands, reads, writes,"
        " requests, errors, bytes_in, bytes_out, micros, latency)"
        " VALUES ('minute', $1, $2, $3, 'token', $4, $5, $5, 0, $5, 0, 10, 20, 1000, $6)",
        at,
        organization_id,
        instance_id,
        NO_KEY,
        commands,
        [0, 0, commands],
    )


async def put_instance(context: Context, organization_id: UUID, instance_id: UUID, endpoint: dict[str, Any]) -> None:
    await context.database.execute(
        "INSERT INTO instances (id, organization_id, name, slug, label, provisioner, max_memory, status, endpoint,"
        " token_digest, token_encrypted, readonly_token_digest, readonly_token_encrypted)"
        " VALUES ($1, $2, $3, $3, $3, 'external', 0, 'running', $6, $4, '', $5, '')",
        instance_id,
        organization_id,
        f"s{instance_id.hex[:8]}",
        secrets.token_bytes(32),
        secrets.token_bytes(32),
        endpoint,
    )


async def test_what_a_cell_counted_is_written_once(context: Context, person: Person) -> None:
    collector = UsageCollector(context.database, AccessTable())
    instance_id = uuid4()
    cell = collector.cell(person.organization_id, instance_id, "token", None, bundled_table())
    assert collector.cell(person.organization_id, instance_id, "token", None, bundled_table()) is cell
    cell.commands = [1, 20, 300]
    cell.errors, cell.bytes_in, cell.bytes_out, cell.nanos = 4, 50, 60, 7_000_000
    cell.buckets[10] = 9
    await collector.flush()
    await collector.flush()
    cell.commands[2] = 1
    await collector.flush()
    found = await rows(context, person.organization_id)
    total = {name: sum(row[name] for row in found) for name in COUNTS}
    assert total == {
        "commands": 322,
        "reads": 20,
        "writes": 301,
        "requests": 9,
        "errors": 4,
        "bytes_in": 50,
        "bytes_out": 60,
        "micros": 7000,
    }


async def test_a_batch_whose_acknowledgement_was_lost_is_not_added_twice(context: Context, person: Person) -> None:
    collector = UsageCollector(context.database, AccessTable())
    cell = collector.cell(person.organization_id, uuid4(), "session", None, bundled_table())
    cell.commands[0] = 5
    real = usage._add

    async def add_and_lose(connection: Any, writer: UUID, batch: Any) -> None:
        async with context.database.transaction() as own:
            await real(own, writer, batch)
        raise DatabaseAway("the connection is gone, the transaction is not")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usage, "_add", add_and_lose)
        with pytest.raises(DatabaseAway):
            await collector.flush()
    cell.commands[0] = 7
    await collector.flush()  # the lost batch again
    await collector.flush()  # and what came since
    assert sum(row["commands"] for row in await rows(context, person.organization_id)) == 12


async def test_two_workers_add_to_one_row(context: Context, person: Person) -> None:
    instance_id = uuid4()
    collectors = [UsageCollector(context.database, AccessTable()) for _ in range(4)]
    for collector in collectors:
        for key_id in [uuid4() for _ in range(3)] + [None]:
            kind = "token" if key_id is None else "key"
            cell = collector.cell(person.organization_id, instance_id, kind, key_id, bundled_table())
            cell.commands[1], cell.buckets[3] = 10, 10
    await asyncio.gather(*(collector.flush() for collector in collectors))
    found = [row for row in await rows(context, person.organization_id) if row["credential"] == "token"]
    assert sum(row["commands"] for row in found) == 40
    assert sum(row["latency"][3] for row in found) == 40


async def test_minutes_become_hours_and_hours_days_however_often(context: Context, person: Person) -> None:
    hour = datetime(2026, 3, 4, 5, tzinfo=UTC)
    for minute in range(60):
        await put(context, person.organization_id, hour + timedelta(minutes=minute), 2)
    await put(context, person.organization_id, hour + timedelta(hours=1), 3)
    async with context.database.transaction() as connection:
        await usage.sum_up(connection, hour + timedelta(minutes=30))
        await usage.sum_up(connection, hour)
    hours = await rows(context, person.organization_id, "hour")
    assert [(row["at"], row["commands"], row["latency"]) for row in hours] == [
        (hour, 120, [0, 0, 120]),
        (hour + timedelta(hours=1), 3, [0, 0, 3]),
    ]
    [day] = await rows(context, person.organization_id, "day")
    assert (day["at"], day["commands"], day["bytes_out"]) == (datetime(2026, 3, 4, tzinfo=UTC), 123, 61 * 20)
    # What comes late is there the next time.
    await put(context, person.organization_id, hour + timedelta(hours=1, minutes=5), 100)
    async with context.database.transaction() as connection:
        await usage.sum_up(connection, hour)
    assert (await rows(context, person.organization_id, "day"))[0]["commands"] == 223


async def test_each_step_is_kept_for_its_time(context: Context, person: Person) -> None:
    now = context.now().replace(second=0, microsecond=0)
    kept = usage.retention(context.settings)
    for age in (timedelta(minutes=5), kept["minute"] - timedelta(hours=1), kept["minute"] + timedelta(hours=1)):
        await put(context, person.organization_id, now - age, 1)
    async with context.database.transaction() as connection:
        await usage.sum_up(connection, now - timedelta(days=5))
    await usage.purge(context)
    assert len(await rows(context, person.organization_id)) == 2
    assert sum(row["commands"] for row in await rows(context, person.organization_id, "hour")) == 3
    assert sum(row["commands"] for row in await rows(context, person.organization_id, "day")) == 3


def test_minutes_are_never_purged_before_they_were_rolled_up() -> None:
    assert usage.retention(ControlSettings(retain_minutes=60))["minute"] >= timedelta(hours=usage.LATE_HOURS)


async def test_a_series_has_totals_percentiles_and_cost(
    context: Context, client: httpx.AsyncClient, person: Person
) -> None:
    now = context.now().replace(second=0, microsecond=0)
    for age in range(1, 4):
        await put(context, person.organization_id, now - timedelta(minutes=age), 100_000)
    path = f"/api/organizations/{person.organization_id}/usage"
    response = await client.get(path, params={"step": "minute"}, headers=person.headers)
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [point["commands"] for point in data["series"]] == [100_000] * 3
    total = data["total"]
    assert total["commands"] == 300_000
    assert total["cost"] == pytest.approx(3 * context.settings.price_per_100k_commands, abs=1e-5)
    assert 0.032 <= total["latency_p50_ms"] <= 0.050
    assert data["retention_seconds"] == int(usage.retention(context.settings)["minute"].total_seconds())
    costs = (await client.get(path.replace("/usage", "/cost"), headers=person.headers)).json()["data"]
    if (now - timedelta(minutes=3)).date() == now.date():
        assert costs["commands"] == 300_000
        assert costs["items"][0]["cost"] == total["cost"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"step": "week"}, "step"),
        ({"from": "yesterday"}, "from"),
        ({"from": "2026-01-01T00:00:00"}, "from"),
        ({"step": "hour", "from": "2030-01-02T00:00:00Z", "to": "2030-01-01T00:00:00Z"}, "from"),
        ({"instance_id": "x"}, "instance_id"),
    ],
)
async def test_a_wrong_query_is_told_what_is_wrong(
    client: httpx.AsyncClient, person: Person, query: dict[str, str], field: str
) -> None:
    path = f"/api/organizations/{person.organization_id}/usage"
    response = await client.get(path, params=query, headers=person.headers)
    assert response.status_code == 400, response.text
    assert list(response.json()["data"]["fields"]) == [field]


async def test_another_organizations_usage_does_not_exist(client: httpx.AsyncClient, person: Person) -> None:
    stranger = await register(client)
    for path in ("usage", "cost", f"redis-instances/{uuid4()}/usage", f"redis-instances/{uuid4()}/health"):
        target = f"/api/organizations/{person.organization_id}/{path}"
        assert (await client.get(target, headers=stranger.headers)).status_code == 404
    for path in (f"usage?instance_id={uuid4()}", f"usage?api_key_id={uuid4()}"):
        target = f"/api/organizations/{person.organization_id}/{path}"
        assert (await client.get(target, headers=person.headers)).status_code == 404


def test_a_long_span_needs_a_longer_step() -> None:
    now = datetime(2026, 5, 6, 7, 8, tzinfo=UTC)
    with pytest.raises(BadRequest):
        usage.span("minute", now - timedelta(days=2), now, now, ControlSettings())
    start, end = usage.span("minute", None, None, now, ControlSettings())
    assert (start, end) == (now - timedelta(hours=1), now)


def test_buckets_cover_every_latency_and_percentiles_are_right_to_an_eighth() -> None:
    last = -1
    for nanos in range(0, 50_000_000, 997):
        bucket = bucket_of(nanos)
        assert bucket in (last, last + 1)
        assert bucket_start(bucket) <= nanos / 1000 < bucket_start(bucket + 1)
        last = bucket
    assert bucket_of(10**12) == BUCKETS - 1
    buckets = [0] * BUCKETS
    for micros in range(100, 10_100, 10):
        buckets[bucket_of(micros * 1000)] += 1
    for fraction in (0.1, 0.5, 0.95, 0.99):
        right = 100 + fraction * 10_000
        found = percentile(buckets, fraction)
        assert found is not None
        assert abs(found - right) / right < 0.13
    assert percentile([], 0.5) is None


async def test_usage_waits_for_a_postgresql_that_is_away(context: Context, person: Person) -> None:
    away = UsageCollector(
        dataclasses.replace(context).database.__class__("postgresql://u:p@/x?host=/nowhere"), AccessTable()
    )
    cell = away.cell(person.organization_id, uuid4(), "token", None, bundled_table())
    for _ in range(3):
        cell.commands[0] += 1
        with pytest.raises(DatabaseAway):
            await away.flush()
    away._database = context.database
    await away.flush()
    await away.flush()
    assert sum(row["commands"] for row in await rows(context, person.organization_id)) == 3


async def test_the_duties_roll_up_and_look_at_instances(
    context: Context, client: httpx.AsyncClient, person: Person, redis_server: RedisServer
) -> None:
    instance_id = uuid4()
    for endpoint in ({"host": "127.0.0.1", "port": redis_server.port}, {"unix": "/nowhere/redis.sock"}):
        one = instance_id if "host" in endpoint else uuid4()
        await put_instance(context, person.organization_id, one, endpoint)
    redis_server.raw(b"SET sampled 1\r\n", 5)
    await usage.sample_instances(context)
    await usage.sample_instances(context)
    rows_of = await context.database.fetch("SELECT * FROM instance_samples WHERE instance_id = $1", instance_id)
    assert 1 <= len(rows_of) <= 2  # one each minute
    assert rows_of[0]["keys"] >= 1
    assert rows_of[0]["memory"] > 0
    await put(context, person.organization_id, context.now().replace(second=0, microsecond=0), 5)
    await usage.roll_up(context)
    await usage.roll_up(context)
    assert sum(row["commands"] for row in await rows(context, person.organization_id, "day")) == 5
    target = f"/api/organizations/{person.organization_id}/redis-instances/{instance_id}"
    series = (await client.get(f"{target}/usage?step=minute", headers=person.headers)).json()["data"]["series"]
    assert series[-1]["keys"] >= 1
    health = (await client.get(f"{target}/health", headers=person.headers)).json()["data"]
    assert (health["reachable"], health["keys"] >= 1) == (True, True)


async def test_a_key_for_some_instances_sees_the_usage_of_these_alone(
    context: Context, client: httpx.AsyncClient, person: Person
) -> None:
    own, other = uuid4(), uuid4()
    now = context.now().replace(second=0, microsecond=0)
    for instance_id in (own, other):
        await put_instance(context, person.organization_id, instance_id, {"unix": "/nowhere/redis.sock"})
        await put(context, person.organization_id, now, 5, instance_id=instance_id)
    await usage.roll_up(context)
    organization = f"/api/organizations/{person.organization_id}"
    made = await client.post(
        f"{organization}/api-keys",
        json={"name": "one", "scopes": ["usage.read"], "instance_ids": [str(own)]},
        headers=person.headers,
    )
    assert made.status_code == 201, made.text
    headers = {"Authorization": f"Bearer {made.json()['data']['key']}"}
    for query, status in (("", 403), (f"?instance_id={other}", 403), (f"?instance_id={own}", 200)):
        assert (await client.get(f"{organization}/usage{query}", headers=headers)).status_code == status, query
    costs = (await client.get(f"{organization}/cost", headers=headers)).json()["data"]
    assert ({item["instance_id"] for item in costs["items"]}, costs["commands"]) == ({str(own)}, 5)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (b"redis_version:7\r\n", (0, 0, 0)),
        (b"used_memory:99999999999999999999\r\nconnected_clients:9999999999\r\n", (0, 2**63 - 1, 2**31 - 1)),
        (b"used_memory:-1\r\n", (0, 0, 0)),
    ],
    ids=["nothing", "too much", "less than nothing"],
)
async def test_a_server_that_says_odd_things_of_itself_is_sampled_all_the_same(
    info: bytes, expected: tuple[int, int, int]
) -> None:
    left = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            for name in data.split(b"\r\n")[2::3]:
                if name == b"INFO":
                    writer.write(b"$%d\r\n%b\r\n" % (len(info), info))
                elif name in (b"PING", b"MULTI", b"EXEC"):
                    writer.write(b"*0\r\n" if name == b"EXEC" else b"+OK\r\n")
        writer.close()
        left.set()

    server = await asyncio.start_server(answer, "127.0.0.1")
    pool = Pool(Address(host="127.0.0.1", port=server.sockets[0].getsockname()[1]))
    try:
        sample = await usage._look(pool, 0)
        assert (sample.keys, sample.memory, sample.connections) == expected
    finally:
        pool.abort()
        server.close()
        async with asyncio.timeout(5):
            await left.wait()
