"""Organizations, who belongs to them, and who is invited.

Whoever changes memberships holds the organization's row, so that two owners who demote each other at the same moment
do not leave it without one; and reads their own role again then, because it may have changed since it was checked.
"""

import hashlib
import re
import secrets
import unicodedata
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import asyncpg

from control.audit import Acting, record
from control.database import Connection, Record
from control.http import Conflict, Forbidden, NotFound, QuotaExceeded, Said
from control.mailer import Message
from control.quotas import create_quota, lock_usage
from control.roles import may_grant, rank

MAX_INVITATIONS_A_DAY: Final = 200
"""Of one organization: an account here is no relay for mail to anybody."""
MAX_OWN_ORGANIZATIONS: Final = 20
"""That one person may have made and not deleted."""
_SLUG_LETTERS: Final = "abcdefghjkmnpqrstuvwxyz23456789"

_COLUMNS: Final = "o.id, o.name, o.slug, o.plan, o.created_at, o.updated_at"


def slugify(name: str, *, longest: int = 40) -> str:
    """Lower-case letters, digits and hyphens, as a host name takes them; empty when nothing of the name is left."""
    plain = unicodedata.normalize("NFKD", name).replace("đ", "d").replace("Đ", "D").encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:longest].rstrip("-")


async def create_organization(
    connection: Connection, acting: Acting, user_id: UUID, name: str, plan: str = "free"
) -> Record:
    """A new organization, owned by this person.

    Raises:
        QuotaExceeded: the person has made `MAX_OWN_ORGANIZATIONS` already.
    """
    await connection.execute("SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE", user_id)
    made = await connection.fetchval(
        "SELECT count(*) FROM organizations WHERE created_by = $1 AND deleted_at IS NULL", user_id
    )
    if made >= MAX_OWN_ORGANIZATIONS:
        raise QuotaExceeded(
            f"you have made {made} organizations, which is all that one person may; delete one first",
            {"quota": "organizations", "limit": MAX_OWN_ORGANIZATIONS, "used": made, "requested": 1},
        )
    suffix = "".join(secrets.choice(_SLUG_LETTERS) for _ in range(6))
    organization = await connection.fetchrow(
        "INSERT INTO organizations AS o (name, slug, plan, created_by) VALUES ($1, $2, $3, $4)"
        f" RETURNING {_COLUMNS}, 'owner' AS role",
        name,
        f"{slugify(name) or 'organization'}-{suffix}",
        plan,
        user_id,
    )
    assert organization is not None
    await create_quota(connection, organization["id"], plan)
    await connection.execute(
        "INSERT INTO memberships (organization_id, user_id, role) VALUES ($1, $2, 'owner')",
        organization["id"],
        user_id,
    )
    await record(
        connection,
        acting,
        "organization.create",
        ("organization", organization["id"]),
        after={"name": name, "slug": organization["slug"], "plan": plan},
        organization_id=organization["id"],
    )
    return organization


async def list_organizations(
    connection: Connection, user_id: UUID, *, page: int, limit: int
) -> tuple[list[Record], int]:
    """The organizations that somebody belongs to, with their role there, in the order in which they joined."""
    total = await connection.fetchval(
        "SELECT count(*) FROM memberships m JOIN organizations o ON o.id = m.organization_id"
        " WHERE m.user_id = $1 AND o.deleted_at IS NULL",
        user_id,
    )
    rows = await connection.fetch(
        f"SELECT {_COLUMNS}, m.role FROM memberships m JOIN organizations o ON o.id = m.organization_id"
        " WHERE m.user_id = $1 AND o.deleted_at IS NULL ORDER BY m.created_at, o.id LIMIT $2 OFFSET $3",
        user_id,
        limit,
        (page - 1) * limit,
    )
    return rows, total


async def home_organization(connection: Connection, user_id: UUID) -> UUID | None:
    """The organization that somebody starts in: the oldest of those where their role is highest."""
    found: UUID | None = await connection.fetchval(
        "SELECT m.organization_id FROM memberships m JOIN organizations o ON o.id = m.organization_id"
        " WHERE m.user_id = $1 AND o.deleted_at IS NULL"
        " ORDER BY array_position(ARRAY['owner', 'admin', 'member', 'viewer'], m.role), m.created_at, o.id LIMIT 1",
        user_id,
    )
    return found


async def get_organization(connection: Connection, organization_id: UUID, role: str | None) -> dict[str, object]:
    """An organization, with the role of who asks and how many belong to it.

    Raises:
        NotFound: there is none.
    """
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS}, (SELECT count(*) FROM memberships m WHERE m.organization_id = o.id) AS member_count"
        " FROM organizations o WHERE o.id = $1 AND o.deleted_at IS NULL",
        organization_id,
    )
    if row is None:
        raise NotFound("there is no such organization")
    return dict(row) | {"role": role}


async def rename_organization(connection: Connection, acting: Acting, organization_id: UUID, name: str) -> None:
    """Give an organization another name; its slug stays.

    Raises:
        NotFound: there is none.
    """
    before = await _lock(connection, organization_id)
    await connection.execute(
        "UPDATE organizations SET name = $2, updated_at = now() WHERE id = $1", organization_id, name
    )
    await record(
        connection,
        acting,
        "organization.update",
        ("organization", organization_id),
        {"name": before["name"]},
        {"name": name},
        organization_id=organization_id,
    )


async def delete_organization(connection: Connection, acting: Acting, organization_id: UUID) -> None:
    """Delete an organization without instances; its API keys end with it.

    Raises:
        Conflict: it has instances.
        NotFound: there is none.
    """
    before = await _lock(connection, organization_id)
    usage = await lock_usage(connection, organization_id)
    if usage.instances:
        raise Conflict(
            f"the organization has {usage.instances} instances; delete them first", {"instances": usage.instances}
        )
    await connection.execute(
        "UPDATE organizations SET deleted_at = now(), updated_at = now() WHERE id = $1", organization_id
    )
    await connection.execute(
        "UPDATE api_keys SET revoked_at = now() WHERE organization_id = $1 AND revoked_at IS NULL", organization_id
    )
    await connection.execute(
        "UPDATE invitations SET revoked_at = now() WHERE organization_id = $1 AND accepted_at IS NULL"
        " AND revoked_at IS NULL",
        organization_id,
    )
    await record(
        connection,
        acting,
        "organization.delete",
        ("organization", organization_id),
        {"name": before["name"], "slug": before["slug"], "plan": before["plan"]},
        organization_id=organization_id,
    )


# Members


async def list_members(
    connection: Connection, organization_id: UUID, *, page: int, limit: int
) -> tuple[list[Record], int]:
    """Who belongs to an organization, the highest roles first."""
    total = await connection.fetchval("SELECT count(*) FROM memberships WHERE organization_id = $1", organization_id)
    rows = await connection.fetch(
        "SELECT m.user_id, u.email, u.username, u.first_name, u.last_name, m.role, m.created_at AS joined_at"
        " FROM memberships m JOIN users u ON u.id = m.user_id WHERE m.organization_id = $1"
        " ORDER BY array_position(ARRAY['owner', 'admin', 'member', 'viewer'], m.role), m.created_at, m.user_id"
        " LIMIT $2 OFFSET $3",
        organization_id,
        limit,
        (page - 1) * limit,
    )
    return rows, total


async def change_role(
    connection: Connection, acting: Acting, organization_id: UUID, by: UUID, user_id: UUID, role: str
) -> Record:
    """Give a member another role. `by` is who does it, or for whom an API key does.

    Raises:
        Forbidden: the old or the new role is above that of `by`.
        Conflict: it is the last owner.
        NotFound: there is no such organization or member.
    """
    await _lock(connection, organization_id)
    own = await _role(connection, organization_id, by, "there is no such organization")
    old = await _role(connection, organization_id, user_id, "there is no such member")
    if not may_grant(own, old) or not may_grant(own, role):
        raise Forbidden(f"your role here is {own}; you can neither change nor give a role above it")
    if role != old:
        if old == "owner":
            await _refuse_last_owner(connection, organization_id)
        await connection.execute(
            "UPDATE memberships SET role = $3, updated_at = now() WHERE organization_id = $1 AND user_id = $2",
            organization_id,
            user_id,
            role,
        )
        await _revoke_invitations(connection, organization_id, user_id, above=role)
        await record(
            connection,
            acting,
            "members.update",
            ("user", user_id),
            {"role": old},
            {"role": role},
            organization_id=organization_id,
        )
    member = await connection.fetchrow(
        "SELECT m.user_id, u.email, u.username, u.first_name, u.last_name, m.role, m.created_at AS joined_at"
        " FROM memberships m JOIN users u ON u.id = m.user_id WHERE m.organization_id = $1 AND m.user_id = $2",
        organization_id,
        user_id,
    )
    assert member is not None
    return member


async def remove_member(connection: Connection, acting: Acting, organization_id: UUID, by: UUID, user_id: UUID) -> None:
    """End a membership, one's own included. The API keys that the person made for the organization are revoked, and
    their open invitations.

    Raises:
        Forbidden: the member's role is above that of `by`.
        Conflict: it is the last owner.
        NotFound: there is no such organization or member.
    """
    await _lock(connection, organization_id)
    own = await _role(connection, organization_id, by, "there is no such organization")
    role = await _role(connection, organization_id, user_id, "there is no such member")
    if not may_grant(own, role):
        raise Forbidden(f"your role here is {own}; you cannot remove a member whose role is above it")
    if role == "owner":
        await _refuse_last_owner(connection, organization_id)
    await connection.execute(
        "DELETE FROM memberships WHERE organization_id = $1 AND user_id = $2", organization_id, user_id
    )
    keys = await connection.fetch(
        "UPDATE api_keys SET revoked_at = now() WHERE organization_id = $1 AND user_id = $2 AND revoked_at IS NULL"
        " RETURNING id",
        organization_id,
        user_id,
    )
    await _revoke_invitations(connection, organization_id, user_id)
    await record(
        connection,
        acting,
        "organization.leave" if by == user_id else "members.remove",
        ("user", user_id),
        {"role": role},
        {"revoked_api_keys": [key["id"] for key in keys]},
        organization_id=organization_id,
    )


async def _refuse_last_owner(connection: Connection, organization_id: UUID) -> None:
    owners = await connection.fetchval(
        "SELECT count(*) FROM memberships WHERE organization_id = $1 AND role = 'owner'", organization_id
    )
    if owners <= 1:
        raise Conflict(Said("last_owner", "this is the organization's last owner; make somebody else an owner first"))


async def _role(connection: Connection, organization_id: UUID, user_id: UUID, missing: str) -> str:
    role: str | None = await connection.fetchval(
        "SELECT role FROM memberships WHERE organization_id = $1 AND user_id = $2", organization_id, user_id
    )
    if role is None:
        raise NotFound(missing)
    return role


async def _lock(connection: Connection, organization_id: UUID) -> Record:
    """The organization; its row is ours until the transaction ends. Foreign keys may still refer to it."""
    row = await connection.fetchrow(
        "SELECT * FROM organizations WHERE id = $1 AND deleted_at IS NULL FOR NO KEY UPDATE", organization_id
    )
    if row is None:
        raise NotFound("there is no such organization")
    return row


# Invitations

_INVITATION: Final = "i.id, i.email, i.role, i.created_at, i.expires_at, i.invited_by"
_NO_INVITATION: Final = "there is no such open invitation; ask for another"
_OPEN: Final = "i.accepted_at IS NULL AND i.revoked_at IS NULL AND i.expires_at > now()"


def token_digest(token: str) -> bytes:
    """What is stored of a token that was sent by mail."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


async def invite_member(
    connection: Connection,
    acting: Acting,
    organization_id: UUID,
    by: UUID,
    *,
    email: str,
    role: str,
    expires_at: datetime,
) -> tuple[dict[str, object], str]:
    """Invite somebody; returns the invitation, and the token that the mail carries.

    Raises:
        Forbidden: the role is above that of `by`.
        Conflict: they belong to the organization already, or are invited.
        NotFound: there is no such organization.
        QuotaExceeded: `MAX_INVITATIONS_A_DAY` were sent.
    """
    await _lock(connection, organization_id)
    own = await _role(connection, organization_id, by, "there is no such organization")
    if not may_grant(own, role):
        raise Forbidden(f"your role here is {own}; you cannot give a role above it")
    sent = await connection.fetchval(
        "SELECT count(*) FROM invitations WHERE organization_id = $1 AND created_at > now() - interval '1 day'",
        organization_id,
    )
    if sent >= MAX_INVITATIONS_A_DAY:
        raise QuotaExceeded(
            f"{sent} invitations were sent within a day, which is the most; wait", {"quota": "invitations_per_day"}
        )
    if await connection.fetchval(
        "SELECT true FROM memberships m JOIN users u ON u.id = m.user_id"
        " WHERE m.organization_id = $1 AND lower(u.email) = lower($2)",
        organization_id,
        email,
    ):
        raise Conflict(f"{email} belongs to the organization already")
    await connection.execute(
        "UPDATE invitations SET revoked_at = now() WHERE organization_id = $1 AND lower(email) = lower($2)"
        " AND accepted_at IS NULL AND revoked_at IS NULL AND expires_at <= now()",
        organization_id,
        email,
    )
    token = secrets.token_urlsafe(32)
    try:
        invitation = await connection.fetchrow(
            "INSERT INTO invitations AS i (organization_id, email, role, token_digest, invited_by, expires_at)"
            f" VALUES ($1, $2, $3, $4, $5, $6) RETURNING {_INVITATION}",
            organization_id,
            email,
            role,
            token_digest(token),
            by,
            expires_at,
        )
    except asyncpg.UniqueViolationError:
        raise Conflict(f"{email} is invited already; revoke that invitation to send another") from None
    assert invitation is not None
    await record(
        connection,
        acting,
        "invitations.create",
        ("invitation", invitation["id"]),
        after={"email": email, "role": role, "expires_at": expires_at},
        organization_id=organization_id,
    )
    return dict(invitation), token


def invitation_message(email: str, organization: str, inviter: str, url: str, lifetime: timedelta) -> Message:
    """The mail that carries an invitation."""
    # On one line: what somebody calls their organization must not look like more of the mail than it is.
    name = " ".join(organization.split())
    return Message(
        email,
        f"Invitation to {name}",
        f"{inviter} invites you to the organization {name}.\n\nTo accept, open\n{url}\n\n"
        f"within {describe(lifetime)}. If you expect no invitation, there is nothing to do.",
    )


def describe(lifetime: timedelta) -> str:
    """A time as a mail tells it."""
    minutes = round(lifetime.total_seconds() / 60)
    for unit, size in (("day", 1440), ("hour", 60)):
        if minutes >= 2 * size:
            return f"{minutes // size} {unit}s"
    return f"{minutes} minutes"


async def list_invitations(
    connection: Connection, organization_id: UUID, *, page: int, limit: int
) -> tuple[list[Record], int]:
    """Invitations that can still be accepted, the newest first."""
    total = await connection.fetchval(
        f"SELECT count(*) FROM invitations i WHERE i.organization_id = $1 AND {_OPEN}", organization_id
    )
    rows = await connection.fetch(
        f"SELECT {_INVITATION} FROM invitations i WHERE i.organization_id = $1 AND {_OPEN}"
        " ORDER BY i.created_at DESC, i.id LIMIT $2 OFFSET $3",
        organization_id,
        limit,
        (page - 1) * limit,
    )
    return rows, total


async def revoke_invitation(connection: Connection, acting: Acting, organization_id: UUID, invitation_id: UUID) -> None:
    """Take an invitation back.

    Raises:
        NotFound: there is no such open invitation.
    """
    row = await connection.fetchrow(
        "UPDATE invitations SET revoked_at = now() WHERE id = $1 AND organization_id = $2 AND accepted_at IS NULL"
        " AND revoked_at IS NULL RETURNING email, role",
        invitation_id,
        organization_id,
    )
    if row is None:
        raise NotFound("there is no such open invitation")
    await record(
        connection,
        acting,
        "invitations.revoke",
        ("invitation", invitation_id),
        {"email": row["email"], "role": row["role"]},
        organization_id=organization_id,
    )


async def hold_invitation(connection: Connection, token: str) -> UUID:
    """The organization that a token invites to; its memberships are ours until the transaction ends. Whoever accepts
    in a transaction that records something before does this first: the audit log's lock is the last that anybody takes.

    Raises:
        NotFound: the token is unknown, or the organization is deleted.
    """
    organization_id: UUID | None = await connection.fetchval(
        "SELECT organization_id FROM invitations WHERE token_digest = $1", token_digest(token)
    )
    if organization_id is None:
        raise NotFound(_NO_INVITATION)
    await _lock(connection, organization_id)
    return organization_id


async def open_invitation(connection: Connection, token: str) -> Record | None:
    """What a token invites to, while it is good: the organization's id and name, the e-mail address, the role."""
    return await connection.fetchrow(
        "SELECT o.id, o.name, i.email, i.role FROM invitations i JOIN organizations o ON o.id = i.organization_id"
        f" WHERE i.token_digest = $1 AND {_OPEN} AND o.deleted_at IS NULL",
        token_digest(token),
    )


async def accept_invitation(connection: Connection, acting: Acting, user_id: UUID, token: str) -> tuple[UUID, str]:
    """Join the organization that a token invites to; returns it, and the role there.

    Raises:
        NotFound: the token is unknown, used, taken back, or too old; the organization is deleted.
        Forbidden: it was sent to another e-mail address than this person's.
        Conflict: they belong to the organization already.
    """
    organization_id = await hold_invitation(connection, token)
    invitation = await connection.fetchrow(
        "SELECT i.*, lower(i.email) = lower(u.email) AS own FROM invitations i, users u"
        f" WHERE i.token_digest = $1 AND u.id = $2 AND {_OPEN}",
        token_digest(token),
        user_id,
    )
    if invitation is None:
        raise NotFound(_NO_INVITATION)
    if not invitation["own"]:
        raise Forbidden("this invitation was sent to another e-mail address; sign in with that one")
    joined = await connection.fetchval(
        "INSERT INTO memberships (organization_id, user_id, role) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
        " RETURNING true",
        organization_id,
        user_id,
        invitation["role"],
    )
    if not joined:
        raise Conflict("you belong to this organization already")
    await connection.execute(
        "UPDATE invitations SET accepted_at = now(), accepted_by = $2 WHERE id = $1", invitation["id"], user_id
    )
    await record(
        connection,
        acting,
        "invitations.accept",
        ("invitation", invitation["id"]),
        after={"user_id": user_id, "role": invitation["role"]},
        organization_id=organization_id,
    )
    return organization_id, invitation["role"]


async def _revoke_invitations(
    connection: Connection, organization_id: UUID, invited_by: UUID, *, above: str | None = None
) -> None:
    """Take back what somebody has offered and could not offer any more."""
    roles = [role for role in ("owner", "admin", "member", "viewer") if above is None or rank(role) > rank(above)]
    await connection.execute(
        "UPDATE invitations SET revoked_at = now() WHERE organization_id = $1 AND invited_by = $2"
        " AND accepted_at IS NULL AND revoked_at IS NULL AND role = ANY($3)",
        organization_id,
        invited_by,
        roles,
    )
