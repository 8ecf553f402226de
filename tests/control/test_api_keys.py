"""API keys over HTTP: what may be asked for, whose they are, and that the secret is shown once."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from control import api_keys
from control.http import Context
from tests.control.people import Person, join, register


@pytest.fixture
async def owner(client: httpx.AsyncClient) -> Person:
    return await register(client, "owner")


def path(person: Person, *more: object) -> str:
    return "/".join([f"/api/organizations/{person.organization_id}/api-keys", *map(str, more)])


async def create(client: httpx.AsyncClient, person: Person, of: Person | None = None, **wanted: Any) -> Any:
    response = await client.post(path(of or person), json={"name": "test", **wanted}, headers=person.headers)
    assert response.status_code == 201, response.text
    return response.json()["data"]


async def test_a_key_is_a_signed_token_with_the_claims_of_old(
    context: Context, client: httpx.AsyncClient, owner: Person
) -> None:
    made = await create(client, owner, expires_in_days=7)
    record = made["api_key"]
    claims = context.tokens.verify_api_key(made["key"])
    assert str(claims.api_key_id) == record["id"]
    assert (claims.user_id, claims.organization_id) == (owner.id, owner.organization_id)
    assert claims.scopes == ("read", "write")
    assert claims.key_prefix == record["key_prefix"]
    assert claims.key_prefix.startswith("rg_")
    assert datetime.fromtimestamp(claims.expires_at, UTC) == datetime.fromisoformat(record["expires_at"])
    assert abs(claims.expires_at - claims.issued_at - 7 * 86400) <= 1


async def test_the_secret_is_shown_once_and_kept_nowhere(
    context: Context, client: httpx.AsyncClient, owner: Person
) -> None:
    made = await create(client, owner)
    key, key_id = made["key"], made["api_key"]["id"]
    for target in (path(owner), path(owner, key_id)):
        assert key not in (await client.get(target, headers=owner.headers)).text
    for table in ("api_keys", "audit_events"):
        rows = await context.database.fetch(f"SELECT t::text AS text FROM {table} t")
        assert not any(key in row["text"] or key.split(".")[2] in row["text"] for row in rows)
    stored = await context.database.fetchval("SELECT digest FROM api_keys WHERE id = $1", key_id)
    assert stored == api_keys.digest(key)


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["everything"]}, "scopes"),
        ({"scopes": ["read", "+nosuchcommand"]}, "scopes"),
        ({"scopes": ["read", "-@nosuchcategory"]}, "scopes"),
        ({"scopes": ["read", "+eval"]}, "scopes"),
        ({"scopes": ["+get"]}, "scopes"),
        ({"scopes": ["manage"], "key_prefixes": ["a:"]}, "scopes"),
        ({"scopes": ["instances.fly"]}, "scopes"),
        ({"instance_ids": ["x"]}, "instance_ids"),
        ({"instance_ids": []}, "instance_ids"),
        ({"instance_ids": [str(uuid4())]}, "instance_ids"),
        ({"key_prefixes": [""]}, "key_prefixes"),
        ({"allowed_networks": ["10.0.0.1/8"]}, "allowed_networks"),
        ({"allowed_networks": ["everywhere"]}, "allowed_networks"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": "2999-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_in_days": 0}, "expires_in_days"),
        ({"requests_per_second": 0}, "requests_per_second"),
        ({"commands_per_day": -1}, "commands_per_day"),
        ({"organization_id": str(uuid4())}, "organization_id"),
        ({"colour": "red"}, "colour"),
    ],
    ids=str,
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, owner: Person, wanted: dict[str, Any], field: str
) -> None:
    response = await client.post(path(owner), json={"name": "test", **wanted}, headers=owner.headers)
    assert response.status_code == 400, response.text
    assert list(response.json()["data"]["fields"]) == [field]


async def test_everything_that_may_be_asked_for_is_kept(client: httpx.AsyncClient, owner: Person) -> None:
    wanted: dict[str, Any] = {
        "name": "worker",
        "scopes": ["write", "+@string", "-append", "instances.read", "usage.*"],
        "key_prefixes": ["app:", "ключ:"],
        "allowed_networks": ["203.0.113.0/24", "2001:db8::/32", "198.51.100.7"],
        "requests_per_second": 5,
        "commands_per_day": 100,
    }
    record = (await create(client, owner, **wanted))["api_key"]
    shown = (await client.get(path(owner, record["id"]), headers=owner.headers)).json()["data"]
    assert shown == record
    assert shown["allowed_networks"] == ["203.0.113.0/24", "2001:db8::/32", "198.51.100.7/32"]
    assert all(shown[name] == wanted[name] for name in wanted if name != "allowed_networks")
    assert shown["instance_ids"] is None


async def test_members_manage_their_own_keys_and_admins_all(client: httpx.AsyncClient, owner: Person) -> None:
    member, other, admin = [await join(client, owner, role) for role in ("member", "member", "admin")]
    key_id = (await create(client, member, owner))["api_key"]["id"]
    for person, status in ((other, 403), (admin, 200), (member, 200)):
        response = await client.patch(path(owner, key_id), json={"name": "renamed"}, headers=person.headers)
        assert response.status_code == status, response.text
    assert (await client.post(path(owner, key_id, "rotate"), json={}, headers=other.headers)).status_code == 403
    assert (await client.delete(path(owner, key_id), headers=other.headers)).status_code == 403
    assert (await client.delete(path(owner, key_id), headers=admin.headers)).status_code == 200


async def test_a_viewer_makes_no_key(client: httpx.AsyncClient, owner: Person) -> None:
    viewer = await join(client, owner, "viewer")
    response = await client.post(path(owner), json={"name": "test"}, headers=viewer.headers)
    assert response.status_code == 403
    assert (await client.get(path(owner), headers=viewer.headers)).status_code == 200


@pytest.mark.parametrize(
    ("own", "wanted", "status"),
    [
        (["read", "write", "manage"], ["read", "write", "manage"], 201),
        (["read", "api_keys.create"], ["read"], 201),
        (["read", "api_keys.create"], ["read", "write"], 403),
        (["api_keys.create"], ["read"], 403),
        (["write", "api_keys.create"], ["write", "instances.delete"], 403),
        (["write", "api_keys.*"], ["write", "manage:read"], 403),
        (["write", "+get", "api_keys.*"], ["write"], 403),
        (["write", "+get", "api_keys.*"], ["write", "+get", "+set"], 403),
        (["write", "+get", "api_keys.*"], ["write", "+get"], 201),
    ],
    ids=str,
)
async def test_a_key_makes_no_key_that_may_do_more(
    client: httpx.AsyncClient, owner: Person, own: list[str], wanted: list[str], status: int
) -> None:
    made = await create(client, owner, scopes=own)
    headers = {"Authorization": f"Bearer {made['key']}"}
    response = await client.post(path(owner), json={"name": "child", "scopes": wanted}, headers=headers)
    assert response.status_code == status, response.text


@pytest.mark.parametrize(
    ("own", "wanted", "status"),
    [
        ({"key_prefixes": ["app:"]}, {}, 403),
        ({"key_prefixes": ["app:"]}, {"key_prefixes": ["other:"]}, 403),
        ({"key_prefixes": ["app:"]}, {"key_prefixes": ["app:users:"]}, 201),
        ({"allowed_networks": ["203.0.113.0/24"]}, {}, 403),
        ({"allowed_networks": ["203.0.113.0/24"]}, {"allowed_networks": ["0.0.0.0/0"]}, 403),
        ({"allowed_networks": ["203.0.113.0/24"]}, {"allowed_networks": ["203.0.113.7"]}, 201),
        ({"commands_per_day": 10}, {}, 403),
        ({"commands_per_day": 10}, {"commands_per_day": 11}, 403),
        ({"requests_per_second": 10}, {"requests_per_second": 10}, 403),
        ({"expires_in_days": 2}, {"expires_in_days": 3}, 403),
        ({"expires_in_days": 2}, {"expires_in_days": 1}, 201),
        ({"expires_in_days": 2}, {}, 201),
    ],
    ids=str,
)
async def test_a_narrowed_key_makes_no_wider_one(
    client: httpx.AsyncClient, owner: Person, own: dict[str, Any], wanted: dict[str, Any], status: int
) -> None:
    made = await create(client, owner, scopes=["read", "write", "api_keys.*"], **own)
    headers = {"Authorization": f"Bearer {made['key']}"}
    response = await client.post(path(owner), json={"name": "child", **wanted}, headers=headers)
    assert response.status_code == status, response.text
    if status == 201:
        child = datetime.fromisoformat(response.json()["data"]["api_key"]["expires_at"])
        assert child <= datetime.fromisoformat(made["api_key"]["expires_at"])


async def test_a_rotated_key_is_followed_by_one_that_may_do_the_same(
    context: Context, client: httpx.AsyncClient, owner: Person
) -> None:
    old = (await create(client, owner, scopes=["read", "+get"], commands_per_day=9, key_prefixes=["a"]))["api_key"]
    response = await client.post(path(owner, old["id"], "rotate"), json={"overlap_seconds": 60}, headers=owner.headers)
    assert response.status_code == 201, response.text
    new = response.json()["data"]["api_key"]
    same = ("name", "scopes", "commands_per_day", "key_prefixes", "instance_ids", "expires_at", "allowed_networks")
    assert {name: new[name] for name in same} == {name: old[name] for name in same}
    assert new["rotated_from"] == old["id"]
    shown = (await client.get(path(owner, old["id"]), headers=owner.headers)).json()["data"]
    left = datetime.fromisoformat(shown["valid_until"]) - context.now()
    assert timedelta(seconds=50) < left <= timedelta(seconds=60)
    again = await client.post(path(owner, old["id"], "rotate"), json={}, headers=owner.headers)
    assert again.status_code == 409


async def test_a_rotation_at_the_quota_is_possible(context: Context, client: httpx.AsyncClient, owner: Person) -> None:
    await context.database.execute(
        "UPDATE quotas SET max_api_keys = 1 WHERE organization_id = $1", owner.organization_id
    )
    made = (await create(client, owner))["api_key"]
    assert (await client.post(path(owner), json={"name": "more"}, headers=owner.headers)).status_code == 403
    rotated = await client.post(path(owner, made["id"], "rotate"), json={}, headers=owner.headers)
    assert rotated.status_code == 201, rotated.text


async def test_the_quota_holds_when_twenty_ask_at_once(
    context: Context, client: httpx.AsyncClient, owner: Person
) -> None:
    await context.database.execute(
        "UPDATE quotas SET max_api_keys = 5 WHERE organization_id = $1", owner.organization_id
    )
    answers = await asyncio.gather(
        *(client.post(path(owner), json={"name": f"key {n}"}, headers=owner.headers) for n in range(20))
    )
    statuses = [answer.status_code for answer in answers]
    assert sorted(statuses) == [201] * 5 + [403] * 15
    refused = next(answer for answer in answers if answer.status_code == 403).json()["data"]
    assert refused == {"quota": "max_api_keys", "limit": 5, "used": 5, "requested": 1}


async def test_lists_leave_out_what_grants_nothing_unless_asked(client: httpx.AsyncClient, owner: Person) -> None:
    kept, gone = [(await create(client, owner, name=name))["api_key"]["id"] for name in ("kept", "gone")]
    for _ in range(2):  # a second time changes nothing
        revoked = await client.delete(path(owner, gone), headers=owner.headers)
        assert revoked.status_code == 200
        assert revoked.json()["data"]["revoked_at"] is not None
    listed = (await client.get(path(owner), headers=owner.headers)).json()["data"]
    assert [item["id"] for item in listed["items"]] == [kept]
    everything = (await client.get(path(owner) + "?all=true&limit=1", headers=owner.headers)).json()["data"]
    assert (everything["total_count"], everything["total_pages"], len(everything["items"])) == (2, 2, 1)


async def test_another_organizations_key_does_not_exist(client: httpx.AsyncClient, owner: Person) -> None:
    stranger = await register(client)
    key_id = (await create(client, owner))["api_key"]["id"]
    for method, target in (
        ("GET", path(stranger, key_id)),
        ("PATCH", path(stranger, key_id)),
        ("POST", path(stranger, key_id, "rotate")),
        ("DELETE", path(stranger, key_id)),
    ):
        body = {"name": "mine"} if method == "PATCH" else {} if method == "POST" else None
        response = await client.request(method, target, json=body, headers=stranger.headers)
        assert response.status_code == 404, (method, response.text)


async def test_what_happens_to_keys_is_on_the_record(
    context: Context, client: httpx.AsyncClient, owner: Person
) -> None:
    key_id = (await create(client, owner, scopes=["read"]))["api_key"]["id"]
    await client.patch(path(owner, key_id), json={"name": "new"}, headers=owner.headers)
    await client.post(path(owner, key_id, "rotate"), json={}, headers=owner.headers)
    await client.delete(path(owner, key_id), headers=owner.headers)
    rows = await context.database.fetch(
        "SELECT action, before, after FROM audit_events WHERE target_id = $1 ORDER BY sequence", key_id
    )
    assert [row["action"] for row in rows] == [
        "api_keys.create",
        "api_keys.update",
        "api_keys.rotate",
        "api_keys.revoke",
    ]
    assert rows[0]["after"]["scopes"] == ["read"]
    assert (rows[1]["before"], rows[1]["after"]) == ({"name": "test"}, {"name": "new"})


@pytest.mark.parametrize(
    "narrowing",
    [
        {"key_prefixes": ["a:"]},
        {"allowed_networks": ["0.0.0.0/0", "::/0"]},
        {"requests_per_second": 5},
        {"scopes": ["read", "instances.*"]},
        {"scopes": ["read", "write", "-del", "instances.*"]},
    ],
    ids=lambda narrowing: next(iter(narrowing)),
)
async def test_a_narrowed_key_does_not_get_an_instances_own_token(
    client: httpx.AsyncClient, owner: Person, narrowing: dict[str, Any]
) -> None:
    made = await create(client, owner, **{"scopes": ["read", "write", "instances.*"], **narrowing})
    headers = {"Authorization": f"Bearer {made['key']}"}
    instances = f"/api/organizations/{owner.organization_id}/redis-instances"
    for method, target in (("GET", f"{instances}/{uuid4()}/credentials"), ("POST", instances)):
        response = await client.request(method, target, json={}, headers=headers)
        assert response.status_code == 403, response.text
        assert "narrowed" in response.json()["message"]
    assert (await client.get(instances, headers=headers)).status_code == 200


async def test_a_key_with_limits_does_not_rotate_itself(client: httpx.AsyncClient, owner: Person) -> None:
    made = await create(client, owner, scopes=["read", "api_keys.*"], requests_per_second=5)
    target = path(owner, made["api_key"]["id"], "rotate")
    response = await client.post(target, json={}, headers={"Authorization": f"Bearer {made['key']}"})
    assert response.status_code == 403, response.text
    assert (await client.post(target, json={}, headers=owner.headers)).status_code in (200, 201)


async def test_a_members_key_makes_none_for_the_day_of_its_makers_promotion(
    client: httpx.AsyncClient, owner: Person
) -> None:
    member = await join(client, owner, "member")
    made = await create(client, member, of=owner, scopes=["read", "api_keys.create"])
    response = await client.post(
        path(owner),
        json={"name": "later", "scopes": ["read", "members.update"]},
        headers={"Authorization": f"Bearer {made['key']}"},
    )
    assert response.status_code == 403, response.text
