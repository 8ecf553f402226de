"""People, their organizations and their sessions, for the tests of the control plane's routes."""

import itertools
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx

PASSWORD = "correct horse 1!"

_numbers = itertools.count(1)


@dataclass
class Person:
    """Somebody who has registered and signed in."""

    id: UUID
    email: str
    token: str = field(repr=False)
    organization_id: UUID
    """The organization that was made for them."""
    password: str = field(default=PASSWORD, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """Of a request of theirs."""
        return {"Authorization": f"Bearer {self.token}"}


def registration(name: str = "person", **changes: object) -> dict[str, Any]:
    """The body of a registration that nobody has used."""
    unique = f"{name}{next(_numbers)}"
    body = {
        "email": f"{unique}@example.com",
        "username": unique,
        "password": PASSWORD,
        "first_name": "Ada",
        "last_name": "Lovelace",
    }
    return body | changes


async def register(client: httpx.AsyncClient, name: str = "person") -> Person:
    """A new person, signed in."""
    body = registration(name)
    response = await client.post("/auth/register", json=body)
    assert response.status_code == 201, response.text
    data = response.json()["data"]
    token = await sign_in(client, body["email"])
    return Person(UUID(data["user"]["id"]), body["email"], token, UUID(data["organization_id"]))


async def sign_in(client: httpx.AsyncClient, email: str, password: str = PASSWORD) -> str:
    """The token of a new session."""
    response = await client.post("/auth/login", json={"email": email, "password": password})
    client.cookies.clear()
    assert response.status_code == 200, response.text
    token: str = response.json()["data"]["token"]
    return token


async def join(client: httpx.AsyncClient, owner: Person, role: str, person: Person | None = None) -> Person:
    """Somebody, by default new, who belongs to the owner's organization in this role."""
    person = person or await register(client, role)
    invited = await client.post(
        f"/api/organizations/{owner.organization_id}/invitations",
        json={"email": person.email, "role": role},
        headers=owner.headers,
    )
    assert invited.status_code == 201, invited.text
    accepted = await client.post(
        "/api/invitations/accept", json={"token": invited.json()["data"]["token"]}, headers=person.headers
    )
    assert accepted.status_code == 200, accepted.text
    return person


async def make_admin(connection: Any, person: Person) -> None:
    """An administrator of the platform."""
    await connection.execute("UPDATE users SET is_admin = true WHERE id = $1", person.id)
