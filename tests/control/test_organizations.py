"""Organizations, members and invitations, over HTTP."""

import asyncio
import re
from uuid import uuid4

import asyncpg
import httpx
import pytest

from control.http import Context
from control.mailer import Mailer, Message
from control.organizations import MAX_OWN_ORGANIZATIONS, slugify
from control.roles import ROLES, rank
from tests.control.people import Person, join, make_admin, register

Owner = asyncpg.Connection


@pytest.fixture
async def person(client: httpx.AsyncClient) -> Person:
    """The owner of an organization."""
    return await register(client, "owner")


def path(person: Person, end: str = "") -> str:
    return f"/api/organizations/{person.organization_id}{end}"


async def call(
    client: httpx.AsyncClient, who: Person, method: str, url: str, body: dict[str, object] | None = None
) -> httpx.Response:
    return await client.request(method, url, json=body, headers=who.headers)


async def roles_in(client: httpx.AsyncClient, person: Person, who: Person) -> dict[str, str]:
    response = await call(client, who, "GET", path(person, "/members?limit=100"))
    assert response.status_code == 200, response.text
    return {member["email"]: member["role"] for member in response.json()["data"]["items"]}


# Organizations


async def test_a_new_organization_is_its_makers(client: httpx.AsyncClient, person: Person) -> None:
    response = await call(client, person, "POST", "/api/organizations", {"name": "  Công ty  Đỏ "})
    assert response.status_code == 201
    data = response.json()["data"]
    assert data["name"] == "Công ty Đỏ"
    assert re.fullmatch(r"cong-ty-do-[a-z0-9]{6}", data["slug"])
    assert (data["plan"], data["role"]) == ("free", "owner")
    listed = (await call(client, person, "GET", "/api/organizations")).json()["data"]
    assert [item["id"] for item in listed["items"]] == [str(person.organization_id), data["id"]]
    assert listed["total_count"] == 2


@pytest.mark.parametrize("name", ["", "   ", "x" * 101, None, 7, "a\0b"], ids=repr)
async def test_a_name_that_is_none_is_a_bad_request(client: httpx.AsyncClient, person: Person, name: object) -> None:
    for method, url in (("POST", "/api/organizations"), ("PATCH", path(person)), ("PUT", path(person))):
        response = await call(client, person, method, url, {"name": name})
        assert response.status_code == 400
        assert response.json()["data"]["fields"].keys() == {"name"}


async def test_one_name_may_be_had_by_many(client: httpx.AsyncClient, person: Person) -> None:
    other = await register(client)
    made = [await call(client, who, "POST", "/api/organizations", {"name": "Acme"}) for who in (person, other)]
    assert [response.status_code for response in made] == [201, 201]
    assert len({response.json()["data"]["slug"] for response in made}) == 2


async def test_one_person_makes_a_bounded_number_even_all_at_once(client: httpx.AsyncClient, person: Person) -> None:
    responses = await asyncio.gather(
        *(
            call(client, person, "POST", "/api/organizations", {"name": f"Number {number}"})
            for number in range(MAX_OWN_ORGANIZATIONS + 5)
        )
    )
    made = [response for response in responses if response.status_code == 201]
    refused = [response for response in responses if response.status_code == 403]
    assert len(made) == MAX_OWN_ORGANIZATIONS - 1  # one was made when they registered
    assert len(refused) == 6
    assert refused[0].json()["data"]["limit"] == MAX_OWN_ORGANIZATIONS


async def test_an_organization_is_shown_and_renamed(client: httpx.AsyncClient, person: Person) -> None:
    before = (await call(client, person, "GET", path(person))).json()["data"]
    assert before["member_count"] == 1
    after = (await call(client, person, "PATCH", path(person), {"name": "New"})).json()["data"]
    assert after["name"] == "New"
    assert after["slug"] == before["slug"]
    again = await call(client, person, "PUT", path(person), {"name": "Newer"})
    assert again.json()["data"] == after | {"name": "Newer", "updated_at": again.json()["data"]["updated_at"]}


async def test_a_deleted_organization_is_gone_for_everybody(
    client: httpx.AsyncClient, person: Person, owner: Owner
) -> None:
    member = await join(client, person, "admin")
    await owner.execute(
        "INSERT INTO api_keys (organization_id, user_id, name, digest, prefix, scopes, expires_at) VALUES ($1, $2, 'k',"
        " sha256(gen_random_uuid()::text::bytea), 'rg_12345678', '{read}', now() + interval '1 day')",
        person.organization_id,
        person.id,
    )
    assert (await call(client, person, "DELETE", path(person))).status_code == 200
    for who in (person, member):
        assert (await call(client, who, "GET", path(person))).status_code == 404
        assert (await call(client, who, "GET", path(person, "/quota"))).status_code == 404
    listed = (await call(client, member, "GET", "/api/organizations")).json()["data"]["items"]
    assert str(person.organization_id) not in {item["id"] for item in listed}
    live = "SELECT count(*) FROM api_keys WHERE organization_id = $1 AND revoked_at IS NULL"
    assert await owner.fetchval(live, person.organization_id) == 0


async def test_an_organization_with_instances_is_not_deleted(
    client: httpx.AsyncClient, person: Person, owner: Owner
) -> None:
    await owner.execute(
        "INSERT INTO instances (organization_id, name, slug, label, provisioner, max_memory, token_digest,"
        " token_encrypted, readonly_token_digest, readonly_token_encrypted) SELECT $1, 'one', 'one', 'one-' || $1,"
        " 'local', 1048576, sha256(id), '', sha256(id || '2'::bytea), '' FROM (SELECT uuid_send($1) AS id)",
        person.organization_id,
    )
    response = await call(client, person, "DELETE", path(person))
    assert response.status_code == 409
    assert response.json()["data"] == {"instances": 1}
    assert (await call(client, person, "GET", path(person))).status_code == 200


async def test_only_administrators_of_the_platform_set_the_plan(
    client: httpx.AsyncClient, person: Person, owner: Owner
) -> None:
    assert (await call(client, person, "PUT", path(person, "/plan"), {"plan": "pro"})).status_code == 403
    admin = await register(client, "admin")
    await make_admin(owner, admin)
    response = await call(client, admin, "PUT", path(person, "/plan"), {"plan": "pro"})
    assert response.status_code == 200
    assert response.json()["data"]["quota"]["max_instances"] == 50
    assert (await call(client, person, "GET", path(person))).json()["data"]["plan"] == "pro"
    assert (await call(client, admin, "PUT", path(person, "/plan"), {"plan": "gold"})).status_code == 400
    missing = f"/api/organizations/{uuid4()}/plan"
    assert (await call(client, admin, "PUT", missing, {"plan": "pro"})).status_code == 404


# Members


async def test_members_are_listed_with_their_roles(client: httpx.AsyncClient, person: Person) -> None:
    viewer, admin = await join(client, person, "viewer"), await join(client, person, "admin")
    found = await roles_in(client, person, viewer)
    assert list(found.items()) == [(person.email, "owner"), (admin.email, "admin"), (viewer.email, "viewer")]


@pytest.mark.parametrize("own", ROLES)
@pytest.mark.parametrize("old", ROLES)
@pytest.mark.parametrize("new", ROLES)
async def test_nobody_changes_or_grants_a_role_above_their_own(
    client: httpx.AsyncClient, person: Person, own: str, old: str, new: str
) -> None:
    """Each role changing each role to each role."""
    actor, target = await join(client, person, own), await join(client, person, old)
    response = await call(client, actor, "PATCH", path(person, f"/members/{target.id}"), {"role": new})
    allowed = rank(own) >= rank("admin") and rank(own) >= rank(old) and rank(own) >= rank(new)
    assert response.status_code == (200 if allowed else 403)
    assert (await roles_in(client, person, person))[target.email] == (new if allowed else old)


@pytest.mark.parametrize("own", ROLES)
@pytest.mark.parametrize("role", ROLES)
async def test_nobody_removes_a_member_above_them(
    client: httpx.AsyncClient, person: Person, own: str, role: str
) -> None:
    actor, target = await join(client, person, own), await join(client, person, role)
    response = await call(client, actor, "DELETE", path(person, f"/members/{target.id}"))
    allowed = rank(own) >= rank("admin") and rank(own) >= rank(role)
    assert response.status_code == (200 if allowed else 403)
    assert (target.email in await roles_in(client, person, person)) is not allowed


async def test_a_removed_member_is_out_at_once_and_their_keys_with_them(
    client: httpx.AsyncClient, person: Person, owner: Owner
) -> None:
    member = await join(client, person, "admin")
    key = await owner.fetchval(
        "INSERT INTO api_keys (organization_id, user_id, name, digest, prefix, scopes, expires_at) VALUES ($1, $2, 'k',"
        " sha256(gen_random_uuid()::text::bytea), 'rg_12345678', '{read}', now() + interval '1 day') RETURNING id",
        person.organization_id,
        member.id,
    )
    invited = await call(client, member, "POST", path(person, "/invitations"), {"email": "friend@example.com"})
    assert invited.status_code == 201
    assert (await call(client, person, "DELETE", path(person, f"/members/{member.id}"))).status_code == 200
    assert (await call(client, member, "GET", path(person))).status_code == 404
    assert await owner.fetchval("SELECT revoked_at FROM api_keys WHERE id = $1", key) is not None
    assert (await call(client, person, "GET", path(person, "/invitations"))).json()["data"]["total_count"] == 0
    assert (await call(client, person, "DELETE", path(person, f"/members/{member.id}"))).status_code == 404


async def test_the_last_owner_cannot_leave_be_demoted_or_removed(client: httpx.AsyncClient, person: Person) -> None:
    own = path(person, f"/members/{person.id}")
    assert (await call(client, person, "POST", path(person, "/leave"))).status_code == 409
    assert (await call(client, person, "PATCH", own, {"role": "admin"})).status_code == 409
    assert (await call(client, person, "DELETE", own)).status_code == 409
    second = await join(client, person, "owner")
    assert (await call(client, person, "POST", path(person, "/leave"))).status_code == 200
    assert (await call(client, person, "GET", path(person))).status_code == 404
    assert (await call(client, second, "POST", path(person, "/leave"))).status_code == 409


async def test_two_owners_who_leave_at_once_do_not_both(client: httpx.AsyncClient, owner: Owner) -> None:
    for round in range(5):
        first = await register(client, "owner")
        second = await join(client, first, "owner")
        requests = [
            call(client, first, "POST", path(first, "/leave")),
            call(client, second, "POST", path(first, "/leave"))
            if round % 2
            else call(client, second, "PATCH", path(first, f"/members/{second.id}"), {"role": "viewer"}),
        ]
        codes = sorted(response.status_code for response in await asyncio.gather(*requests))
        assert codes == [200, 409]
        owners = "SELECT count(*) FROM memberships WHERE organization_id = $1 AND role = 'owner'"
        assert await owner.fetchval(owners, first.organization_id) == 1


async def test_two_admins_who_remove_each_other_do_not_both(client: httpx.AsyncClient, person: Person) -> None:
    first, second = await join(client, person, "admin"), await join(client, person, "admin")
    responses = await asyncio.gather(
        call(client, first, "DELETE", path(person, f"/members/{second.id}")),
        call(client, second, "DELETE", path(person, f"/members/{first.id}")),
    )
    assert sorted(response.status_code for response in responses) == [200, 404]


async def test_members_of_other_organizations_do_not_exist(client: httpx.AsyncClient, person: Person) -> None:
    other = await register(client)
    for method, body in (("PATCH", {"role": "viewer"}), ("DELETE", None)):
        for user_id in (other.id, uuid4(), "x"):
            response = await call(client, person, method, path(person, f"/members/{user_id}"), body)
            assert response.status_code == 404


@pytest.mark.parametrize("role", ["king", "", None, 1, ["owner"]], ids=repr)
async def test_a_role_that_is_none_is_a_bad_request(client: httpx.AsyncClient, person: Person, role: object) -> None:
    member = await join(client, person, "viewer")
    for method, end, body in (
        ("PATCH", f"/members/{member.id}", {"role": role}),
        ("POST", "/invitations", {"email": "x@example.com", "role": role}),
    ):
        response = await call(client, person, method, path(person, end), body)
        assert response.status_code == 400
        assert response.json()["data"]["fields"].keys() == {"role"}


# Invitations


async def invite(
    client: httpx.AsyncClient, by: Person, person: Person, email: str, role: str = "member"
) -> httpx.Response:
    return await call(client, by, "POST", path(person, "/invitations"), {"email": email, "role": role})


async def accept(client: httpx.AsyncClient, who: Person, token: str) -> httpx.Response:
    return await call(client, who, "POST", "/api/invitations/accept", {"token": token})


async def test_an_invitation_goes_by_mail_and_is_good_once(
    client: httpx.AsyncClient, person: Person, context: Context, owner: Owner
) -> None:
    sent: list[Message] = []

    async def deliver(message: Message) -> None:
        sent.append(message)

    context.mailer = Mailer(deliver)
    guest = await register(client)
    data = (await invite(client, person, person, guest.email.upper())).json()["data"]
    await context.mailer.flush()
    assert data["url"] in sent[0].text
    assert data["url"].endswith(f"/invitations?token={data['token']}")
    assert data["token"] not in str(await owner.fetch("SELECT * FROM invitations")), "only a digest is stored"
    (shown,) = (await call(client, person, "GET", path(person, "/invitations"))).json()["data"]["items"]
    assert shown == data["invitation"]
    joined = await accept(client, guest, data["token"])
    assert joined.json()["data"] == {"organization_id": str(person.organization_id), "role": "member"}
    assert (await accept(client, guest, data["token"])).status_code == 404
    assert (await call(client, person, "GET", path(person, "/invitations"))).json()["data"]["items"] == []


async def test_an_organizations_name_cannot_forge_a_mail(
    client: httpx.AsyncClient, person: Person, context: Context
) -> None:
    sent: list[Message] = []

    async def deliver(message: Message) -> None:
        sent.append(message)

    context.mailer = Mailer(deliver)
    await call(client, person, "PATCH", path(person), {"name": "Acme\r\nBcc: all@example.com\n\nPay here"})
    await invite(client, person, person, "guest@example.com")
    await context.mailer.flush()
    assert "\n" not in sent[0].subject
    assert "\nPay here" not in sent[0].text


async def test_an_invitation_is_for_one_address(client: httpx.AsyncClient, person: Person) -> None:
    other = await register(client)
    token = (await invite(client, person, person, "guest@example.com")).json()["data"]["token"]
    assert (await accept(client, other, token)).status_code == 403
    assert (await accept(client, other, "made up")).status_code == 404


async def test_who_belongs_or_is_invited_is_a_conflict(client: httpx.AsyncClient, person: Person) -> None:
    member = await join(client, person, "member")
    assert (await invite(client, person, person, member.email.upper())).status_code == 409
    assert (await invite(client, person, person, "twice@example.com")).status_code == 201
    assert (await invite(client, person, person, "TWICE@example.com")).status_code == 409


async def test_of_ten_invitations_of_one_address_one_succeeds(client: httpx.AsyncClient, person: Person) -> None:
    responses = await asyncio.gather(*(invite(client, person, person, "ten@example.com") for _ in range(10)))
    assert sorted(response.status_code for response in responses) == [201] + [409] * 9


async def test_an_expired_invitation_is_none_and_makes_room(
    client: httpx.AsyncClient, person: Person, owner: Owner
) -> None:
    guest = await register(client)
    token = (await invite(client, person, person, guest.email)).json()["data"]["token"]
    await owner.execute("UPDATE invitations SET expires_at = now() WHERE organization_id = $1", person.organization_id)
    assert (await accept(client, guest, token)).status_code == 404
    assert (await call(client, person, "GET", path(person, "/invitations"))).json()["data"]["total_count"] == 0
    assert (await invite(client, person, person, guest.email)).status_code == 201


async def test_a_revoked_invitation_is_none(client: httpx.AsyncClient, person: Person) -> None:
    guest, other = await register(client), await register(client)
    data = (await invite(client, person, person, guest.email)).json()["data"]
    end = f"/invitations/{data['invitation']['id']}"
    assert (await call(client, other, "DELETE", path(other, end))).status_code == 404, "another organization's"
    assert (await call(client, person, "DELETE", path(person, end))).status_code == 200
    assert (await call(client, person, "DELETE", path(person, end))).status_code == 404
    assert (await accept(client, guest, data["token"])).status_code == 404


@pytest.mark.parametrize("own", ROLES)
@pytest.mark.parametrize("role", ROLES)
async def test_nobody_invites_above_themselves(client: httpx.AsyncClient, person: Person, own: str, role: str) -> None:
    actor = await join(client, person, own)
    response = await invite(client, actor, person, "guest@example.com", role)
    allowed = rank(own) >= rank("admin") and rank(own) >= rank(role)
    assert response.status_code == (201 if allowed else 403)


async def test_who_is_demoted_takes_back_what_they_could_not_offer_now(
    client: httpx.AsyncClient, person: Person
) -> None:
    second = await join(client, person, "owner")
    guest, low = await register(client), await register(client)
    token = (await invite(client, second, person, guest.email, "owner")).json()["data"]["token"]
    still = (await invite(client, second, person, low.email, "viewer")).json()["data"]["token"]
    await call(client, person, "PATCH", path(person, f"/members/{second.id}"), {"role": "admin"})
    assert (await accept(client, guest, token)).status_code == 404
    assert (await accept(client, low, still)).status_code == 200


async def test_nobody_joins_a_deleted_organization(client: httpx.AsyncClient, person: Person) -> None:
    guest = await register(client)
    token = (await invite(client, person, person, guest.email)).json()["data"]["token"]
    await call(client, person, "DELETE", path(person))
    assert (await accept(client, guest, token)).status_code == 404


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Acme", "acme"),
        ("  A  &  B -- C ", "a-b-c"),
        ("Đội Đỏ", "doi-do"),
        ("東京", ""),
        ("x" * 100, "x" * 40),
        ("a" * 39 + " b", "a" * 39),
    ],
)
def test_slugs_are_what_host_names_take(name: str, slug: str) -> None:
    assert slugify(name) == slug


@pytest.mark.parametrize("role", ["owner", "admin"])
async def test_a_key_gives_no_role_that_may_do_more_than_the_key(
    client: httpx.AsyncClient, person: Person, role: str
) -> None:
    organization = f"/api/organizations/{person.organization_id}"
    made = await client.post(
        f"{organization}/api-keys",
        json={"name": "inviter", "scopes": ["read", "invitations.create", "members.update"]},
        headers=person.headers,
    )
    assert made.status_code == 201, made.text
    headers = {"Authorization": f"Bearer {made.json()['data']['key']}"}
    member = await join(client, person, "viewer")
    invited = await client.post(
        f"{organization}/invitations", json={"email": "somebody@example.com", "role": role}, headers=headers
    )
    promoted = await client.patch(f"{organization}/members/{member.id}", json={"role": role}, headers=headers)
    assert (invited.status_code, promoted.status_code) == (403, 403), (invited.text, promoted.text)
