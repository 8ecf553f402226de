"""Quotas: shown, set up to the plan, and right when many requests arrive together."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from control.database import Connection, Database
from control.http import NotFound, QuotaExceeded
from control.quotas import GIB, MIB, reserve_api_key, reserve_instance
from tests.control.people import Person, join, make_admin, register

Owner = asyncpg.Connection


@pytest.fixture
async def person(client: httpx.AsyncClient) -> Person:
    return await register(client)


def path(person: Person) -> str:
    return f"/api/organizations/{person.organization_id}/quota"


async def put(client: httpx.AsyncClient, who: Person, person: Person, **body: object) -> httpx.Response:
    return await client.put(path(person), json=body, headers=who.headers)


async def quota(client: httpx.AsyncClient, person: Person) -> dict[str, Any]:
    response = await client.get(path(person), headers=person.headers)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["data"]
    return found


async def add_instance(connection: Connection, organization_id: UUID, max_memory: int = MIB) -> UUID:
    found: UUID = await connection.fetchval(
        "INSERT INTO instances (id, organization_id, name, slug, label, provisioner, max_memory, token_digest,"
        " token_encrypted, readonly_token_digest, readonly_token_encrypted) VALUES ($1, $2, 'x', $3, $3, 'local', $4,"
        " sha256(uuid_send($1)), '', sha256(uuid_send($1) || '2'), '') RETURNING id",
        uuid4(),
        organization_id,
        str(uuid4()),
        max_memory,
    )
    return found


async def add_key(connection: Connection, person: Person, expires: str = "1 day") -> UUID:
    found: UUID = await connection.fetchval(
        "INSERT INTO api_keys (organization_id, user_id, name, digest, prefix, scopes, expires_at) VALUES ($1, $2, 'k',"
        " sha256(gen_random_uuid()::text::bytea), 'rg_12345678', '{read}', now() + $3::text::interval) RETURNING id",
        person.organization_id,
        person.id,
        expires,
    )
    return found


async def reserve(database: Database, person: Person, max_memory: int = MIB, instance_id: UUID | None = None) -> None:
    async with database.transaction() as connection:
        await reserve_instance(connection, person.organization_id, max_memory, instance_id=instance_id)
        if instance_id is None:
            await add_instance(connection, person.organization_id, max_memory)
        else:
            await connection.execute(
                "UPDATE instances SET max_memory = $2, counts_against_quota = true WHERE id = $1",
                instance_id,
                max_memory,
            )


# Reading


async def test_a_new_organization_has_the_free_plan(client: httpx.AsyncClient, person: Person) -> None:
    found = await quota(client, person)
    assert found["warnings"] == []
    expected = {
        "plan": "free",
        "max_instances": 5,
        "current_instances": 0,
        "max_memory_gb": 10,
        "current_memory_mb": 0,
        "available_memory_mb": 10240,
        "max_api_keys": 10,
        "current_api_keys": 0,
        "instances_percentage": 0,
        "memory_percentage": 0,
        "api_keys_percentage": 0,
    }
    assert expected.items() <= found["quota"].items()


async def test_what_is_used_is_shown_with_percentages(client: httpx.AsyncClient, person: Person, owner: Owner) -> None:
    await add_instance(owner, person.organization_id, 512 * MIB)
    await add_instance(owner, person.organization_id, 2 * GIB)
    await add_key(owner, person)
    found = (await quota(client, person))["quota"]
    assert (found["current_instances"], found["current_memory_mb"], found["available_memory_mb"]) == (2, 2560, 7680)
    assert (found["instances_percentage"], found["memory_percentage"], found["api_keys_percentage"]) == (40, 25, 10)


async def test_warnings_begin_at_ninety_percent(client: httpx.AsyncClient, person: Person, owner: Owner) -> None:
    for _ in range(8):
        await add_key(owner, person)
    assert (await quota(client, person))["warnings"] == []
    await add_key(owner, person)
    await add_instance(owner, person.organization_id, 9 * GIB)
    assert (await quota(client, person))["warnings"] == [
        "9.00 GB of 10 GB of memory are used (90 %)",
        "9 of 10 API keys are used (90 %)",
    ]


async def test_todays_commands_are_counted(client: httpx.AsyncClient, person: Person, owner: Owner) -> None:
    await put(client, person, person, max_commands_per_day=1000)
    midnight = "date_trunc('day', now(), 'UTC')"
    for step, at in (
        ("minute", midnight),
        ("minute", "now()"),
        ("minute", f"{midnight} - interval '1 minute'"),
        ("hour", "now()"),
    ):
        await owner.execute(
            f"INSERT INTO usage VALUES ($1, {at}, $2, gen_random_uuid(), 'token', gen_random_uuid(), 475, 0, 0, 0, 0,"
            " 0, 0, 0, '{}')",
            step,
            person.organization_id,
        )
    found = await quota(client, person)
    assert found["quota"]["current_commands_today"] == 950
    assert found["quota"]["commands_percentage"] == 95
    assert found["warnings"] == ["950 of 1000 commands today are used (95 %)"]


async def test_what_is_over_does_not_count(
    client: httpx.AsyncClient, person: Person, owner: Owner, database: Database
) -> None:
    await add_key(owner, person, expires="-1 second")
    for change in ("revoked_at = now()", "valid_until = now() + interval '1 hour'"):
        await owner.execute(f"UPDATE api_keys SET {change} WHERE id = $1", await add_key(owner, person))
    gone = await add_instance(owner, person.organization_id)
    await owner.execute("UPDATE instances SET counts_against_quota = false WHERE id = $1", gone)
    found = (await quota(client, person))["quota"]
    assert (found["current_api_keys"], found["current_instances"], found["current_memory_mb"]) == (0, 0, 0)


# Setting


async def test_limits_are_set_up_to_the_plan(client: httpx.AsyncClient, person: Person) -> None:
    response = await put(
        client,
        person,
        person,
        max_redis_instances=2,
        max_memory_gb=0.5,
        max_api_keys=3,
        max_commands_per_day=1000,
        max_requests_per_second=50,
        max_request_size=65536,
    )
    assert response.status_code == 200
    expected = {
        "max_instances": 2,
        "max_memory_gb": 0.5,
        "available_memory_mb": 512,
        "max_api_keys": 3,
        "max_commands_per_day": 1000,
        "max_requests_per_second": 50,
        "max_request_size": 65536,
        "commands_percentage": 0,
    }
    assert expected.items() <= response.json()["data"]["quota"].items()
    assert expected.items() <= (await quota(client, person))["quota"].items()
    raised = await put(client, person, person, max_redis_instances=5, max_commands_per_day=None)
    assert raised.status_code == 200
    found = (await quota(client, person))["quota"]
    assert (found["max_instances"], found["max_commands_per_day"], found["max_api_keys"]) == (5, None, 3)


@pytest.mark.parametrize(
    "above",
    [{"max_redis_instances": 6}, {"max_memory_gb": 10.1}, {"max_api_keys": 11}],
    ids=lambda body: next(iter(body)),
)
async def test_only_administrators_of_the_platform_go_above_the_plan(
    client: httpx.AsyncClient, person: Person, owner: Owner, above: dict[str, float]
) -> None:
    refused = await put(client, person, person, **above)
    assert refused.status_code == 403
    assert next(iter(above)) in refused.json()["message"]
    assert refused.json()["data"]["plan_limits"]["max_redis_instances"] == 5
    admin = await register(client, "admin")
    await make_admin(owner, admin)
    assert (await put(client, admin, person, **above)).status_code == 200
    same = await put(client, person, person, **above)
    assert same.status_code == 200, "what it is already"
    higher = {name: value + 1 for name, value in above.items()}
    assert (await put(client, person, person, **higher)).status_code == 403


async def test_a_limit_below_what_is_used_takes_nothing_away(
    client: httpx.AsyncClient, person: Person, owner: Owner, database: Database
) -> None:
    instance = await add_instance(owner, person.organization_id, 512 * MIB)
    await add_instance(owner, person.organization_id, 512 * MIB)
    response = await put(client, person, person, max_redis_instances=1, max_memory_gb=0.5)
    assert response.status_code == 200
    found = response.json()["data"]
    assert found["quota"]["available_memory_mb"] == 0
    assert found["quota"]["instances_percentage"] == 200
    assert len(found["warnings"]) == 2
    with pytest.raises(QuotaExceeded):
        await reserve(database, person)
    with pytest.raises(QuotaExceeded):
        await reserve(database, person, 513 * MIB, instance)
    await reserve(database, person, 256 * MIB, instance)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"max_redis_instances": -1}, "max_redis_instances"),
        ({"max_redis_instances": 1.5}, "max_redis_instances"),
        ({"max_redis_instances": "5"}, "max_redis_instances"),
        ({"max_redis_instances": None}, "max_redis_instances"),
        ({"max_redis_instances": 10**12}, "max_redis_instances"),
        ({"max_memory_gb": -0.1}, "max_memory_gb"),
        ({"max_memory_gb": None}, "max_memory_gb"),
        ({"max_api_keys": True}, "max_api_keys"),
        ({"max_commands_per_day": 0}, "max_commands_per_day"),
        ({"max_requests_per_second": 2**40}, "max_requests_per_second"),
        ({"max_request_size": "1MiB"}, "max_request_size"),
    ],
    ids=str,
)
async def test_wrong_limits_are_named(
    client: httpx.AsyncClient, person: Person, body: dict[str, object], field: str
) -> None:
    response = await put(client, person, person, **body)
    assert response.status_code == 400
    assert response.json()["data"]["fields"].keys() == {field}


async def test_members_see_the_quota_and_do_not_set_it(client: httpx.AsyncClient, person: Person) -> None:
    for role in ("viewer", "member"):
        member = await join(client, person, role)
        assert (await client.get(path(person), headers=member.headers)).status_code == 200
        assert (await put(client, member, person, max_api_keys=1)).status_code == 403


# Reserving


async def test_of_fifty_instances_at_once_as_many_are_made_as_fit(
    client: httpx.AsyncClient, person: Person, database: Database, owner: Owner
) -> None:
    results = await asyncio.gather(*(reserve(database, person) for _ in range(50)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, QuotaExceeded)]
    assert len(refused) == 45
    assert refused[0].data == {"quota": "max_instances", "limit": 5, "used": 5, "requested": 1}
    assert (await quota(client, person))["quota"]["current_instances"] == 5


async def test_of_fifty_memories_at_once_as_many_are_given_as_fit(
    client: httpx.AsyncClient, person: Person, database: Database
) -> None:
    results = await asyncio.gather(*(reserve(database, person, 4 * GIB) for _ in range(50)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, QuotaExceeded)]
    assert len(refused) == 48
    assert {result.data["quota"] for result in refused} == {"max_memory_gb"}  # type: ignore[index]
    assert (await quota(client, person))["quota"]["current_memory_mb"] == 8192


async def test_of_fifty_enlargements_at_once_as_many_are_made_as_fit(
    client: httpx.AsyncClient, person: Person, database: Database, owner: Owner
) -> None:
    instances = [await add_instance(owner, person.organization_id, GIB) for _ in range(5)]
    results = await asyncio.gather(
        *(reserve(database, person, 3 * GIB, instance) for instance in instances * 10), return_exceptions=True
    )
    assert sum(isinstance(result, QuotaExceeded) for result in results) == 30
    assert (await quota(client, person))["quota"]["current_memory_mb"] == 9 * 1024


async def test_of_fifty_keys_at_once_as_many_are_made_as_fit(
    client: httpx.AsyncClient, person: Person, database: Database
) -> None:
    async def make() -> None:
        async with database.transaction() as connection:
            await reserve_api_key(connection, person.organization_id)
            await add_key(connection, person)

    results = await asyncio.gather(*(make() for _ in range(50)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, QuotaExceeded)]
    assert len(refused) == 40
    assert refused[0].data == {"quota": "max_api_keys", "limit": 10, "used": 10, "requested": 1}
    assert (await quota(client, person))["quota"]["current_api_keys"] == 10


async def test_what_is_rolled_back_is_free_again(database: Database, person: Person, client: httpx.AsyncClient) -> None:
    async def fail() -> None:
        async with database.transaction() as connection:
            await reserve_instance(connection, person.organization_id, GIB)
            await add_instance(connection, person.organization_id, GIB)
            raise ZeroDivisionError

    for _ in range(10):
        with pytest.raises(ZeroDivisionError):
            await fail()
    assert (await quota(client, person))["quota"]["current_instances"] == 0
    await reserve(database, person, GIB)


async def test_a_deleted_instance_comes_back_if_it_fits(database: Database, person: Person, owner: Owner) -> None:
    deleted = await add_instance(owner, person.organization_id, GIB)
    await owner.execute("UPDATE instances SET counts_against_quota = false WHERE id = $1", deleted)
    for _ in range(5):
        await reserve(database, person)
    with pytest.raises(QuotaExceeded):
        await reserve(database, person, GIB, deleted)


async def test_reservation_and_deletion_of_the_organization_do_not_both_happen(
    client: httpx.AsyncClient, database: Database, owner: Owner
) -> None:
    for _ in range(8):
        person = await register(client)
        deleted, reserved = await asyncio.gather(
            client.delete(f"/api/organizations/{person.organization_id}", headers=person.headers),
            reserve(database, person),
            return_exceptions=True,
        )
        assert isinstance(deleted, httpx.Response)
        if deleted.status_code == 200:
            assert isinstance(reserved, NotFound)
        else:
            assert deleted.status_code == 409
            assert reserved is None


async def test_organizations_do_not_wait_for_each_other(database: Database, client: httpx.AsyncClient) -> None:
    first, second = await register(client), await register(client)
    async with database.transaction() as connection, asyncio.timeout(5):
        await reserve_instance(connection, first.organization_id, MIB)
        await reserve(database, second)


async def test_no_organization_is_no_quota(database: Database) -> None:
    async with database.transaction() as connection:
        with pytest.raises(NotFound):
            await reserve_instance(connection, uuid4(), MIB)
        with pytest.raises(NotFound):
            await reserve_api_key(connection, uuid4())
