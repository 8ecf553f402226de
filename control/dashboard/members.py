"""Who belongs to an organization, in which role, and who is invited."""

from typing import Any

from starlette.responses import Response

from control import organizations, roles
from control.dashboard.forms import PAGE_SIZE, page_count, page_number, people
from control.http import MAX_PAGE_LIMIT, ApiError
from control.pages import PageRequest, page, redirect, render
from control.roles import allows
from control.routes import organizations as routes
from control.routes.organizations import Invite, SetRole

_PATH = "/dashboard/{org_id}/members"


@page("GET", _PATH, permission="members.read")
async def listing(request: PageRequest) -> Response:
    """Members, the highest roles first; and open invitations, for who may see them."""
    return await _listing(request)


async def _listing(
    request: PageRequest, error: ApiError | None = None, section: str = "", invited: dict[str, Any] | None = None
) -> Response:
    number, own = page_number(request), request.principal.role
    assert own is not None
    invitations: list[Any] = []
    invitation_total = 0
    async with request.context.database.connection() as connection:
        rows, total = await organizations.list_members(
            connection, request.organization_id, page=number, limit=PAGE_SIZE
        )
        if allows(own, "invitations.read"):
            invitations, invitation_total = await organizations.list_invitations(
                connection, request.organization_id, page=1, limit=MAX_PAGE_LIMIT
            )
        inviters = await people(connection, [one["invited_by"] for one in invitations])
    return await render(
        request,
        "organization/members.html",
        status=200 if invited is None else 201,
        error=error,
        section=section,
        members=[dict(row) | {"within_reach": roles.may_grant(own, row["role"])} for row in rows],
        roles=[role for role in reversed(roles.ROLES) if roles.may_grant(own, role)],
        invitations=invitations,
        invitation_total=invitation_total,
        inviters=inviters,
        invited=invited,
        mailed=request.context.settings.mailer != "log",
        total=total,
        number=number,
        pages=page_count(total),
    )


@page("POST", _PATH + "/{user_id}/role", permission="members.update")
async def change_role(request: PageRequest) -> Response:
    """Another role."""
    try:
        member: Any = await routes.change_role(request, request.body(SetRole))
    except ApiError as error:
        return await _listing(request, error, "members")
    return _back(request, "organization.members.changed", name=member["email"])


@page("POST", _PATH + "/{user_id}/remove", permission="members.remove")
async def remove(request: PageRequest) -> Response:
    """End a membership."""
    try:
        await routes.remove_member(request)
    except ApiError as error:
        return await _listing(request, error, "members")
    return _back(request, "organization.members.removed")


@page("POST", "/dashboard/{org_id}/invitations", permission="invitations.create")
async def invite(request: PageRequest) -> Response:
    """Invite somebody; the link is shown once."""
    try:
        invited: Any = await routes.invite_member(request, request.body(Invite))
    except ApiError as error:
        return await _listing(request, error, "invite")
    return await _listing(request, invited=invited)


@page("POST", "/dashboard/{org_id}/invitations/{invitation_id}/revoke", permission="invitations.revoke")
async def revoke_invitation(request: PageRequest) -> Response:
    """Take an invitation back."""
    try:
        await routes.revoke_invitation(request)
    except ApiError as error:
        return await _listing(request, error, "invite")
    return _back(request, "organization.members.taken_back")


def _back(request: PageRequest, message: str, **values: Any) -> Response:
    return redirect(request, f"/dashboard/{request.organization_id}/members", message, **values)
