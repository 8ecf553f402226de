"""Every route with every role: the decisions stand here once more, written by hand, so that a new route needs one."""

import dataclasses
import secrets
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from control import api_keys
from control.http import Context
from control.openapi import document
from control.roles import ROLES

# The lowest role that may, or: public, session (anybody who is signed in), platform (its administrators).
DECISIONS = {
    "GET /health": "public",
    "GET /health/live": "public",
    "GET /health/ready": "public",
    "GET /version": "public",
    "GET /stats": "platform",
    "GET /openapi.json": "public",
    "GET /docs": "public",
    "POST /auth/register": "public",
    "POST /auth/login": "public",
    "POST /auth/refresh": "session",
    "POST /auth/logout": "session",
    "GET /auth/me": "session",
    "PATCH /auth/me": "session",
    "POST /auth/password": "session",
    "POST /auth/password/forgot": "public",
    "POST /auth/password/reset": "public",
    "GET /auth/sessions": "session",
    "DELETE /auth/sessions": "session",
    "DELETE /auth/sessions/{session_id}": "session",
    "GET /api/organizations": "session",
    "POST /api/organizations": "session",
    "POST /api/invitations/accept": "session",
    "GET /api/organizations/{org_id}": "viewer",
    "PATCH /api/organizations/{org_id}": "admin",
    "PUT /api/organizations/{org_id}": "admin",
    "DELETE /api/organizations/{org_id}": "owner",
    "PUT /api/organizations/{org_id}/plan": "platform",
    "POST /api/organizations/{org_id}/leave": "viewer",
    "GET /api/organizations/{org_id}/members": "viewer",
    "PATCH /api/organizations/{org_id}/members/{user_id}": "admin",
    "DELETE /api/organizations/{org_id}/members/{user_id}": "admin",
    "GET /api/organizations/{org_id}/invitations": "admin",
    "POST /api/organizations/{org_id}/invitations": "admin",
    "DELETE /api/organizations/{org_id}/invitations/{invitation_id}": "admin",
    "GET /api/organizations/{org_id}/quota": "viewer",
    "PUT /api/organizations/{org_id}/quota": "admin",
    "GET /api/organizations/{org_id}/audit-logs": "admin",
    "GET /api/organizations/{org_id}/audit-logs/export": "admin",
    "GET /api/organizations/{org_id}/redis-instances/{instance_id}/usage": "viewer",
    "GET /api/organizations/{org_id}/redis-instances/{instance_id}/health": "viewer",
    "GET /api/organizations/{org_id}/usage": "viewer",
    "GET /api/organizations/{org_id}/cost": "viewer",
    "GET /api/organizations/{org_id}/api-keys": "viewer",
    "POST /api/organizations/{org_id}/api-keys": "member",
    "GET /api/organizations/{org_id}/api-keys/{key_id}": "viewer",
    "PATCH /api/organizations/{org_id}/api-keys/{key_id}": "member",
    "POST /api/organizations/{org_id}/api-keys/{key_id}/rotate": "member",
    "DELETE /api/organizations/{org_id}/api-keys/{key_id}": "member",
    "GET /api/admin/metrics": "platform",
    "GET /api/admin/log-level": "platform",
    "PUT /api/admin/log-level": "platform",
    "GET /api/audit-logs": "platform",
    "GET /api/audit-logs/export": "platform",
    "GET /api/admin/organizations": "platform",
    "GET /api/admin/users": "platform",
    "PATCH /api/admin/users/{user_id}": "platform",
    "GET /api/admin/instances": "platform",
    "GET /api/admin/workers": "platform",
    "GET /api/organizations/{org_id}/redis-instances": "viewer",
    "POST /api/organizations/{org_id}/redis-instances": "member",
    "GET /api/organizations/{org_id}/redis-instances/{instance_id}": "viewer",
    "PATCH /api/organizations/{org_id}/redis-instances/{instance_id}": "member",
    "PUT /api/organizations/{org_id}/redis-instances/{instance_id}": "member",
    "DELETE /api/organizations/{org_id}/redis-instances/{instance_id}": "admin",
    "PUT /api/organizations/{org_id}/redis-instances/{instance_id}/status": "member",
    "GET /api/organizations/{org_id}/redis-instances/{instance_id}/credentials": "member",
    "POST /api/organizations/{org_id}/redis-instances/{instance_id}/rotate-credentials": "admin",
    "POST /api/organizations/{org_id}/redis-instances/{instance_id}/restore": "admin",
    "GET /api/organizations/{org_id}/redis-instances/{instance_id}/commands": "viewer",
    "POST /api/organizations/{org_id}/redis-instances/{instance_id}/console/commands": "viewer",
    "GET /api/organizations/{org_id}/redis-instances/{instance_id}/console/keys": "viewer",
    "POST /api/organizations/{org_id}/redis-instances/{instance_id}/console/count-keys": "viewer",
    "POST /api/organizations/{org_id}/redis-instances/{instance_id}/console/delete-keys": "member",
    "GET /api/organizations/{org_id}/redis-instances/{instance_id}/console/monitor": "member",
    "GET /api/organizations/{org_id}/redis-instances/{instance_id}/console/subscribe": "viewer",
    "GET /api/organizations/{org_id}/redis-instances/{instance_id}/snapshot": "member",
    "PUT /api/organizations/{org_id}/redis-instances/{instance_id}/snapshot": "admin",
}
# What administrators of the platform may do in an organization that they do not belong to, beside reading.
PLATFORM_MAY = {"PUT /api/organizations/{org_id}/quota"}
ROUTES = {
    f"{method.upper()} {path}": operation
    for path, methods in document()["paths"].items()
    for method, operation in methods.items()
}


def test_every_route_has_a_decision() -> None:
    assert set(ROUTES) == set(DECISIONS)


@dataclasses.dataclass
class World:
    """Makes people, organizations and credentials, without the API."""

    context: Context
    owner: "asyncpg.Connection[asyncpg.Record]"

    async def user(self, *, administrator: bool = False) -> UUID:
        name = secrets.token_hex(6)
        found: UUID = await self.owner.fetchval(
            "INSERT INTO users (email, username, password_hash, is_admin) VALUES ($1, $2, 'none', $3) RETURNING id",
            f"{name}@example.com",
            name,
            administrator,
        )
        return found

    async def organization(self) -> UUID:
        found: UUID = await self.owner.fetchval(
            "INSERT INTO organizations (name, slug) VALUES ('Test', $1) RETURNING id", secrets.token_hex(6)
        )
        await self.owner.execute(
            "INSERT INTO quotas (organization_id, max_instances, max_memory, max_api_keys) VALUES ($1, 5, 1 << 30, 5)",
            found,
        )
        # Not the only owner, so that leaving is not refused for that.
        await self.join(found, await self.user(), "owner")
        return found

    async def join(self, organization: UUID, user: UUID, role: str) -> None:
        await self.owner.execute("INSERT INTO memberships VALUES ($1, $2, $3)", organization, user, role)

    async def session(self, user: UUID, *, lasts: float = 3600) -> str:
        end = datetime.now(UTC) + timedelta(seconds=lasts)
        session: UUID = await self.owner.fetchval(
            "INSERT INTO sessions (user_id, expires_at, ends_at) VALUES ($1, $2, $2) RETURNING id", user, end
        )
        return self.context.tokens.issue_session(session_id=session, user_id=user, expires_at=end)

    async def api_key(self, user: UUID, organization: UUID, *scopes: str) -> str:
        key = uuid4()
        end = datetime.now(UTC) + timedelta(hours=1)
        token = self.context.tokens.issue_api_key(
            api_key_id=key, user_id=user, organization_id=organization, scopes=scopes, key_prefix="rg_x", expires_at=end
        )
        await self.owner.execute(
            "INSERT INTO api_keys (id, organization_id, user_id, name, digest, prefix, scopes, expires_at)"
            " VALUES ($1, $2, $3, 'test', $4, 'rg_x', $5, $6)",
            key,
            organization,
            user,
            api_keys.digest(token),
            list(scopes),
            end,
        )
        return token

    async def member(self, role: str | None) -> tuple[UUID, UUID]:
        """An organization, and somebody with this role in it; None: in another one."""
        organization, user = await self.organization(), await self.user()
        await self.join(organization if role is not None else await self.organization(), user, role or "owner")
        return organization, user


@pytest.fixture
def world(context: Context, owner: "asyncpg.Connection[asyncpg.Record]") -> World:
    """People and organizations to ask with."""
    return World(context, owner)


async def ask(client: httpx.AsyncClient, route: str, token: str | None, organization: UUID) -> httpx.Response:
    """A request without a body, for things that do not exist in an organization that does."""
    method, path = route.split(" ")
    path = path.replace("{org_id}", str(organization))
    while "{" in path:
        path = path[: path.index("{")] + str(uuid4()) + path[path.index("}") + 1 :]
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return await client.request(method, path, headers=headers)


def is_refused(response: httpx.Response) -> bool:
    """Whether who asked may not, as opposed to that what they asked for cannot be."""
    if response.status_code in (401, 403):
        return True
    return response.status_code == 404 and response.json()["message"] == "there is no such organization"


@pytest.mark.parametrize("route", ROUTES)
async def test_route(route: str, client: httpx.AsyncClient, world: World) -> None:
    decision = DECISIONS[route]
    in_organization = decision in ROLES

    # Nobody, and those whose credential is worth nothing.
    organization = await world.organization()
    gone = await world.session(await world.user(), lasts=-1)
    for token in (None, "garbage", gone):
        response = await ask(client, route, token, organization)
        if decision == "public":
            assert response.status_code in (200, 400)
        else:
            assert response.status_code == 401, (token, response.text)
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert response.json()["success"] is False

    # Members of the organization, by role.
    for role in ROLES:
        organization, user = await world.member(role)
        response = await ask(client, route, await world.session(user), organization)
        may = decision in ("public", "session") or (in_organization and ROLES.index(role) >= ROLES.index(decision))
        assert is_refused(response) is not may, (role, response.text)
        if not may:
            assert response.status_code == 403

    # Somebody from elsewhere: as if the organization did not exist.
    organization, user = await world.member(None)
    response = await ask(client, route, await world.session(user), organization)
    if in_organization:
        missing = await ask(client, route, await world.session(user), uuid4())
        assert response.status_code == missing.status_code == 404
        assert response.json() | {"timestamp": 0} == missing.json() | {"timestamp": 0}

    # Administrators of the platform.
    organization, user = await world.organization(), await world.user(administrator=True)
    response = await ask(client, route, await world.session(user), organization)
    reads = route.startswith("GET ") and "/console/" not in route and not route.endswith(("/credentials", "/snapshot"))
    assert is_refused(response) is (in_organization and not reads and route not in PLATFORM_MAY), response.text


@pytest.mark.parametrize("route", [route for route, decision in DECISIONS.items() if decision != "public"])
async def test_route_with_an_api_key(route: str, client: httpx.AsyncClient, world: World) -> None:
    decision = DECISIONS[route]
    in_organization = decision in ROLES
    permission = ROUTES[route]["x-permission"]
    reads = route.startswith("GET ") and "/console/" not in route and not route.endswith(("/credentials", "/snapshot"))
    for role, scopes, enough in (
        ("owner", ["manage"], True),
        ("owner", ["read", "write"], False),
        ("owner", ["manage:read"], reads),
        ("owner", [permission], True),
        ("viewer", ["manage"], decision == "viewer"),
    ):
        organization, user = await world.member(role)
        key = await world.api_key(user, organization, *scopes)
        elsewhere = await ask(client, route, key, await world.organization())
        assert elsewhere.status_code == (404 if in_organization else 403)
        response = await ask(client, route, key, organization)
        may = enough and in_organization and "/console/" not in route  # which is for people
        assert is_refused(response) is not may, (role, scopes, response.text)


async def test_an_administrator_of_the_platform_loses_it_at_once(client: httpx.AsyncClient, world: World) -> None:
    user = await world.user(administrator=True)
    token = await world.session(user)
    assert (await ask(client, "GET /stats", token, uuid4())).status_code == 200
    await world.owner.execute("UPDATE users SET is_admin = false WHERE id = $1", user)
    assert (await ask(client, "GET /stats", token, uuid4())).status_code == 403


async def test_a_deleted_organization_is_gone_for_its_owner(client: httpx.AsyncClient, world: World) -> None:
    organization, user = await world.member("owner")
    token = await world.session(user)
    assert (await ask(client, "DELETE /api/organizations/{org_id}", token, organization)).status_code == 200
    assert (await ask(client, "GET /api/organizations/{org_id}", token, organization)).status_code == 404
