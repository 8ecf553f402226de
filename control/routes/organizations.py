"""Organizations, members and invitations over HTTP."""

from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from control import organizations, roles
from control.http import ApiRequest, BadRequest, Forbidden, endpoint, page
from control.quotas import set_plan
from control.routes.auth import Email, Token
from control.settings import public_url

TAGS: Final = ["Organizations"]
MEMBERS: Final = ["Members"]

Name = Annotated[str, Meta(min_length=1, max_length=100)]
Role = Literal["owner", "admin", "member", "viewer"]
Plan = Literal["free", "pro", "enterprise"]


class Organization(msgspec.Struct):
    """An organization; `role` is that of who asks."""

    id: UUID
    name: str
    slug: str
    plan: Plan
    role: Role
    created_at: datetime
    updated_at: datetime


class OrganizationInFull(Organization):
    """An organization, and how many belong to it."""

    member_count: int


class CreateOrganization(msgspec.Struct):
    """What a new organization is called."""

    name: Name


class UpdateOrganization(msgspec.Struct):
    """What it is called from now on; the slug stays."""

    name: Name


@endpoint(
    "POST",
    "/api/organizations",
    permission="session",
    body=CreateOrganization,
    response=Organization,
    status=201,
    summary="Create an organization",
    tags=TAGS,
    message="the organization is created",
)
async def create_organization(request: ApiRequest, body: CreateOrganization) -> object:
    """Make an organization and own it. The slug is made from the name."""
    async with request.context.database.transaction() as connection:
        return await organizations.create_organization(connection, request, request.user_id, _name(body.name))


@endpoint(
    "GET",
    "/api/organizations",
    permission="session",
    response=Organization,
    listing=True,
    summary="My organizations",
    tags=TAGS,
)
async def list_organizations(request: ApiRequest) -> object:
    """The organizations that I belong to."""
    number, limit = request.paging()
    async with request.context.database.connection() as connection:
        rows, total = await organizations.list_organizations(connection, request.user_id, page=number, limit=limit)
    return page(rows, total, number, limit)


@endpoint(
    "GET",
    "/api/organizations/{org_id}",
    permission="organization.read",
    response=OrganizationInFull,
    summary="One organization",
    tags=TAGS,
)
async def get_organization(request: ApiRequest) -> object:
    """What the organization is called, its plan, and my role."""
    async with request.context.database.connection() as connection:
        return await organizations.get_organization(connection, request.organization_id, request.principal.role)


@endpoint(
    "PATCH",
    "/api/organizations/{org_id}",
    permission="organization.update",
    body=UpdateOrganization,
    response=OrganizationInFull,
    summary="Rename an organization",
    tags=TAGS,
    message="the organization is renamed",
)
async def update_organization(request: ApiRequest, body: UpdateOrganization) -> object:
    """Give it another name; the slug stays."""
    return await _update(request, body)


@endpoint(
    "PUT",
    "/api/organizations/{org_id}",
    permission="organization.update",
    body=UpdateOrganization,
    response=OrganizationInFull,
    summary="Rename an organization (as PATCH)",
    tags=TAGS,
    message="the organization is renamed",
)
async def put_organization(request: ApiRequest, body: UpdateOrganization) -> object:
    """The same as PATCH."""
    return await _update(request, body)


async def _update(request: ApiRequest, body: UpdateOrganization) -> object:
    async with request.context.database.transaction() as connection:
        await organizations.rename_organization(connection, request, request.organization_id, _name(body.name))
        return await organizations.get_organization(connection, request.organization_id, request.principal.role)


@endpoint(
    "DELETE",
    "/api/organizations/{org_id}",
    permission="organization.delete",
    summary="Delete an organization",
    tags=TAGS,
    message="the organization is deleted",
)
async def delete_organization(request: ApiRequest) -> object:
    """Only without instances. Its API keys are revoked."""
    async with request.context.database.transaction() as connection:
        await organizations.delete_organization(connection, request, request.organization_id)
    return None


class SetPlan(msgspec.Struct):
    """The plan."""

    plan: Plan


@endpoint(
    "PUT",
    "/api/organizations/{org_id}/plan",
    permission="admin",
    body=SetPlan,
    response=dict[str, object],
    summary="Move an organization to another plan",
    tags=TAGS,
    message="the organization has the limits of its new plan",
)
async def put_plan(request: ApiRequest, body: SetPlan) -> object:
    """Set the plan, and with it all limits."""
    async with request.context.database.transaction() as connection:
        quota = await set_plan(connection, request, request.organization_id, body.plan)
    return {"quota": quota.shown(), "warnings": quota.warnings()}


# Members


class Member(msgspec.Struct):
    """Somebody who belongs to the organization."""

    user_id: UUID
    email: str
    username: str
    first_name: str
    last_name: str
    role: Role
    joined_at: datetime


class SetRole(msgspec.Struct):
    """The role."""

    role: Role


@endpoint(
    "GET",
    "/api/organizations/{org_id}/members",
    permission="members.read",
    response=Member,
    listing=True,
    summary="Members",
    tags=MEMBERS,
)
async def list_members(request: ApiRequest) -> object:
    """Who belongs to the organization."""
    number, limit = request.paging()
    async with request.context.database.connection() as connection:
        rows, total = await organizations.list_members(connection, request.organization_id, page=number, limit=limit)
    return page(rows, total, number, limit)


def _check_reach(request: ApiRequest, role: str) -> None:
    """No API key gives a role that may do what the key may not. Raises Forbidden."""
    own, scopes = request.principal.role, request.principal.scopes
    if scopes is None or own is None:
        return
    for permission in roles.PERMISSIONS:
        if roles.allows(role, permission) and not roles.allows(own, permission, scopes):
            raise Forbidden(f"this API key lacks {permission}, so it cannot give a role that has it")


@endpoint(
    "PATCH",
    "/api/organizations/{org_id}/members/{user_id}",
    permission="members.update",
    body=SetRole,
    response=Member,
    summary="Change a member's role",
    tags=MEMBERS,
    message="the member has another role",
)
async def change_role(request: ApiRequest, body: SetRole) -> object:
    """Neither the old nor the new role may be above one's own; the last owner stays one."""
    _check_reach(request, body.role)
    async with request.context.database.transaction() as connection:
        return await organizations.change_role(
            connection, request, request.organization_id, request.user_id, request.path["user_id"], body.role
        )


@endpoint(
    "DELETE",
    "/api/organizations/{org_id}/members/{user_id}",
    permission="members.remove",
    summary="Remove a member",
    tags=MEMBERS,
    message="the member is removed",
)
async def remove_member(request: ApiRequest) -> object:
    """The API keys that the member made for the organization are revoked."""
    async with request.context.database.transaction() as connection:
        await organizations.remove_member(
            connection, request, request.organization_id, request.user_id, request.path["user_id"]
        )
    return None


@endpoint(
    "POST",
    "/api/organizations/{org_id}/leave",
    permission="organization.leave",
    summary="Leave an organization",
    tags=MEMBERS,
    message="you have left the organization",
)
async def leave(request: ApiRequest) -> object:
    """End one's own membership; the last owner cannot."""
    async with request.context.database.transaction() as connection:
        await organizations.remove_member(
            connection, request, request.organization_id, request.user_id, request.user_id
        )
    return None


# Invitations


class Invite(msgspec.Struct):
    """Whom to invite, and as what."""

    email: Email
    role: Role = "member"


class Invitation(msgspec.Struct):
    """An invitation that can still be accepted."""

    id: UUID
    email: str
    role: Role
    created_at: datetime
    expires_at: datetime
    invited_by: UUID


class NewInvitation(msgspec.Struct):
    """An invitation with its link, which is shown this once."""

    invitation: Invitation
    token: str
    url: str


@endpoint(
    "POST",
    "/api/organizations/{org_id}/invitations",
    permission="invitations.create",
    body=Invite,
    response=NewInvitation,
    status=201,
    summary="Invite somebody",
    tags=MEMBERS,
    message="the invitation is on its way",
)
async def invite_member(request: ApiRequest, body: Invite) -> object:
    """A link goes out by mail, and comes back here for those who pass it on themselves. It is good for one person: who
    signs in with this e-mail address."""
    _check_reach(request, body.role)
    context = request.context
    lifetime = timedelta(seconds=context.settings.invitation_lifetime)
    async with context.database.transaction() as connection:
        invitation, token = await organizations.invite_member(
            connection,
            request,
            request.organization_id,
            request.user_id,
            email=body.email,
            role=body.role,
            expires_at=context.now() + lifetime,
        )
        organization = await organizations.get_organization(connection, request.organization_id, None)
    url = f"{public_url(context.gateway_settings)}/invitations?token={token}"
    context.mailer.post(
        organizations.invitation_message(
            body.email, str(organization["name"]), request.principal.name or "Somebody", url, lifetime
        )
    )
    return {"invitation": invitation, "token": token, "url": url}


@endpoint(
    "GET",
    "/api/organizations/{org_id}/invitations",
    permission="invitations.read",
    response=Invitation,
    listing=True,
    summary="Open invitations",
    tags=MEMBERS,
)
async def list_invitations(request: ApiRequest) -> object:
    """Invitations that can still be accepted, the newest first."""
    number, limit = request.paging()
    async with request.context.database.connection() as connection:
        rows, total = await organizations.list_invitations(
            connection, request.organization_id, page=number, limit=limit
        )
    return page(rows, total, number, limit)


@endpoint(
    "DELETE",
    "/api/organizations/{org_id}/invitations/{invitation_id}",
    permission="invitations.revoke",
    summary="Take an invitation back",
    tags=MEMBERS,
    message="the invitation is taken back",
)
async def revoke_invitation(request: ApiRequest) -> object:
    """Its link is of no more use."""
    async with request.context.database.transaction() as connection:
        await organizations.revoke_invitation(
            connection, request, request.organization_id, request.path["invitation_id"]
        )
    return None


class AcceptInvitation(msgspec.Struct):
    """The token of the link."""

    token: Token


class Joined(msgspec.Struct):
    """Where somebody belongs now."""

    organization_id: UUID
    role: Role


@endpoint(
    "POST",
    "/api/invitations/accept",
    permission="session",
    body=AcceptInvitation,
    response=Joined,
    summary="Accept an invitation",
    tags=MEMBERS,
    message="welcome",
)
async def accept_invitation(request: ApiRequest, body: AcceptInvitation) -> dict[str, Any]:
    """Join the organization. Who accepts is signed in with the e-mail address that was invited."""
    async with request.context.database.transaction() as connection:
        organization_id, role = await organizations.accept_invitation(connection, request, request.user_id, body.token)
    return {"organization_id": organization_id, "role": role}


def _name(text: str) -> str:
    name = " ".join(text.split())
    if not name:
        raise BadRequest(fields={"name": "must not be empty"})
    return name
