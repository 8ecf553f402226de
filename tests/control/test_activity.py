"""What an instance does: counted by its server, sampled once a minute, summed for charts."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from control import activity, usage
from control.activity import SPANS
from control.http import Context
from control.usage import Sample
from resp.address import Address
from resp.pool import Pool
from tests.control.people import Person, register
from tests.control.test_usage import put, put_instance
from tests.servers import RedisServer


@pytest.fixture
async def person(client: httpx.AsyncClient) -> Person:
    return await register(client)


@pytest.fixture
async def instance_id(context: Context, person: Person) -> UUID:
    found = uuid4()
    await put_instance(context, person.organization_id, found, {"unix": "/nowhere/redis.sock"})
    return found


def sample(run_id: str = "a", hits: int = 0, **calls: int) -> Sample:
    counters = {"hits": hits, "misses": 1, "evicted": 2, "expired": 3}
    return Sample(5, 1000, 2, run_id, counters, {name: [count, count * 10, 0] for name, count in calls.items()})


async def keep(context: Context, instance_id: UUID, *samples: Sample) -> list[Any]:
    """Each a minute after the one before; what was kept, the newest last."""
    for one in samples:
        await context.database.execute(
            "UPDATE instance_counters SET sampled_at = sampled_at - interval '1 minute' WHERE instance_id = $1",
            instance_id,
        )
        await context.database.execute(
            "UPDATE instance_samples SET at = at - interval '1 minute' WHERE instance_id = $1", instance_id
        )
        await usage._keep_samples(context.database, [(instance_id, one)])
    return await context.database.fetch(
        "SELECT * FROM instance_samples WHERE instance_id = $1 ORDER BY at", instance_id
    )


async def calls(context: Context, instance_id: UUID) -> dict[str, int]:
    async with context.database.connection() as connection:
        found = await activity.top_commands(connection, instance_id, datetime.now(UTC) - timedelta(hours=1))
    return {one["command"]: one["calls"] for one in found}


async def test_samples_hold_what_has_come_since_the_one_before(context: Context, instance_id: UUID) -> None:
    kept = await keep(context, instance_id, sample(hits=100, get=50), sample(hits=130, get=58, set=4))
    assert [row["hits"] for row in kept] == [0, 30]  # of what was before the first look, nothing is known
    assert [row["misses"] for row in kept] == [0, 0]
    assert await calls(context, instance_id) == {"get": 8, "set": 4}


def test_what_administers_a_server_is_none_of_its_commands() -> None:
    """Sampling, snapshots, the reconciler and the data browser leave their traces in the same statistics."""
    own = ("info", "sync", "psync", "replconf", "config|set", "client|setname", "memory|usage", "command|docs")
    lines = {f"cmdstat_{name}": "calls=1,usec=1,failed_calls=0" for name in (*own, "get", "x.y")}
    assert usage._commands(lines) == {"get": [1, 1, 0], "x.y": [1, 1, 0]}


async def test_a_server_that_was_started_anew_counts_from_zero(context: Context, instance_id: UUID) -> None:
    kept = await keep(context, instance_id, sample("a", 100, get=50), sample("b", 120, get=60))
    assert kept[-1]["hits"] == 120
    assert kept[-1]["evicted"] == 2
    assert await calls(context, instance_id) == {"get": 60}


async def test_counters_that_were_set_back_are_not_taken_away(context: Context, instance_id: UUID) -> None:
    kept = await keep(context, instance_id, sample(hits=100, get=50), sample(hits=7, get=3))
    assert kept[-1]["hits"] == 7
    assert await calls(context, instance_id) == {"get": 3}


async def test_whoever_samples_second_in_a_minute_adds_nothing(context: Context, instance_id: UUID) -> None:
    await keep(context, instance_id, sample(hits=1), sample(hits=5, get=5))
    await context.database.execute("UPDATE instance_counters SET sampled_at = date_trunc('minute', now())")
    await usage._keep_samples(context.database, [(instance_id, sample(hits=50, get=50))])
    rows = await context.database.fetch("SELECT hits FROM instance_samples WHERE instance_id = $1", instance_id)
    assert sorted(row["hits"] for row in rows) == [0, 4]
    assert await calls(context, instance_id) == {"get": 5}


async def test_a_real_server_tells_its_commands(redis_server: RedisServer) -> None:
    redis_server.raw(b"SET k 1\r\n", 5)
    redis_server.raw(b"GET k\r\n", 4)
    pool = Pool(Address(host="127.0.0.1", port=redis_server.port))
    try:
        found = await usage._look(pool, 0)
    finally:
        pool.abort()
    assert found.run_id
    assert found.counters["hits"] >= 1
    assert found.commands["get"][0] >= 1
    assert "info" not in found.commands
    assert all(len(counted) == 3 for counted in found.commands.values())


@pytest.mark.parametrize("name", SPANS)
async def test_every_span_has_even_steps_and_counts_all_once(
    context: Context, person: Person, instance_id: UUID, name: str
) -> None:
    now = datetime.now(UTC)
    minute = now.replace(second=0, microsecond=0)
    for ago in (0, 5, 50):
        await put(context, person.organization_id, minute - timedelta(minutes=ago), 7, instance_id=instance_id)
    async with context.database.transaction() as connection:
        await usage.sum_up(connection, now - timedelta(hours=2))
        found = await activity.read(connection, person.organization_id, instance_id, SPANS[name], now)
    assert len(found.times) == SPANS[name].length / SPANS[name].step
    assert found.times[-1] <= now < found.times[-1] + SPANS[name].step
    assert found.total("commands") == 21
    assert found.total_percentile(0.5) == pytest.approx(0.04, rel=0.3)
    assert found.total_hit_ratio() is None
    assert set(found.sampled("keys")) == {None}


async def test_rates_are_per_second_and_nothing_is_told_of_a_minute_that_has_only_begun(
    context: Context, person: Person, instance_id: UUID
) -> None:
    minute = datetime(2026, 11, 24, 18, 30, tzinfo=UTC)
    for at in (minute, minute - timedelta(minutes=1)):
        await put(context, person.organization_id, at, 120, instance_id=instance_id)
    async with context.database.connection() as connection:
        for seconds, expected in ((3, [2.0, None]), (30, [2.0, 4.0])):
            now = minute + timedelta(seconds=seconds)
            found = await activity.read(connection, person.organization_id, instance_id, SPANS["1h"], now)
            assert found.rates("commands")[-2:] == expected
        rates = await activity.recent_rates(connection, person.organization_id, [instance_id], minute)
    assert rates[instance_id][-2:] == [2.0, 2.0]


async def test_samples_are_shown_by_the_api_and_old_ones_go(
    context: Context, client: httpx.AsyncClient, person: Person, instance_id: UUID
) -> None:
    await keep(context, instance_id, sample(hits=0), sample(hits=3, get=9, set=1))
    path = f"/api/organizations/{person.organization_id}/redis-instances/{instance_id}"
    series = (await client.get(f"{path}/usage?step=hour", headers=person.headers)).json()["data"]["series"]
    assert sum(point["hits"] for point in series) == 3
    answer = (await client.get(f"{path}/commands?span=1h", headers=person.headers)).json()["data"]
    assert answer["commands"][0] == {"command": "get", "calls": 9, "failed": 0, "mean_micros": 10.0}
    assert (await client.get(f"{path}/commands?span=2h", headers=person.headers)).status_code == 400
    stranger = await register(client)
    assert (await client.get(f"{path}/commands", headers=stranger.headers)).status_code == 404
    await context.database.execute("UPDATE instance_commands SET at = at - interval '31 days'")
    await usage.purge(context)
    assert await context.database.fetchval("SELECT count(*) FROM instance_commands") == 0


async def test_old_samples_are_thinned_out_to_hours_and_nothing_counted_is_lost(
    context: Context, person: Person, instance_id: UUID
) -> None:
    hour = (datetime.now(UTC) - timedelta(days=4)).replace(minute=0, second=0, microsecond=0)
    for at in (*(hour + timedelta(minutes=minute) for minute in range(0, 120, 5)), datetime.now(UTC)):
        await context.database.execute(
            "INSERT INTO instance_samples (instance_id, at, keys, memory, connections, hits)"
            " VALUES ($1, $2, $3, 7, 1, 2)",
            instance_id,
            at,
            at.minute,
        )
        await context.database.execute(
            "INSERT INTO instance_commands VALUES ($1, $2, 'get', 3, 30, 0)", instance_id, at
        )
    span = SPANS["7d"]

    async def seen() -> tuple[Any, ...]:
        async with context.database.connection() as connection:
            found = await activity.read(connection, person.organization_id, instance_id, span, context.now())
            commands = await activity.top_commands(connection, instance_id, hour)
        return found.samples, commands

    before = await seen()
    for _ in range(2):
        await usage.thin_out(context)
        assert await seen() == before
    rows = await context.database.fetch(
        "SELECT at, keys, hits FROM instance_samples WHERE instance_id = $1 ORDER BY at", instance_id
    )
    assert [(row["keys"], row["hits"]) for row in rows[:2]] == [(55, 24), (55, 24)]
    assert len(rows) == 3
    assert await context.database.fetchval("SELECT sum(calls) FROM instance_commands") == 25 * 3
