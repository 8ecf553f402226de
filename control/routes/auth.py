"""Accounts over HTTP: register, sign in, sessions, profile, passwords."""

from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, UnsetType

from control import accounts, api_keys, organizations
from control.accounts import Registration, SignedIn
from control.audit import as_user
from control.database import Connection
from control.http import (
    ApiRequest,
    BadRequest,
    Conflict,
    Forbidden,
    Reply,
    endpoint,
    page,
    same_origin,
    session_cookie,
)
from control.passwords import MAX_PASSWORD_LENGTH, MIN_PASSWORD_LENGTH
from control.routes.api_keys import ApiKey
from control.settings import public_url

TAGS: Final = ["Accounts"]

# No white space and no control characters, so that an address cannot be more than one header line of a mail. Python's $
# matches before a newline at the end as well.
Email = Annotated[
    str, Meta(min_length=3, max_length=254, pattern=r"^[^@\s\x00-\x1f\x7f<>]+@[^@\s\x00-\x1f\x7f<>]+$(?!\n)")
]
Username = Annotated[str, Meta(min_length=2, max_length=64, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$(?!\n)")]
PersonName = Annotated[str, Meta(max_length=100)]
NewPassword = Annotated[str, Meta(min_length=MIN_PASSWORD_LENGTH, max_length=MAX_PASSWORD_LENGTH)]
GivenPassword = Annotated[str, Meta(max_length=MAX_PASSWORD_LENGTH)]
Token = Annotated[str, Meta(min_length=1, max_length=200)]


class User(msgspec.Struct):
    """A person."""

    id: UUID
    email: str
    username: str
    first_name: str
    last_name: str
    is_admin: bool
    created_at: datetime
    last_login_at: datetime | None


class Register(msgspec.Struct):
    """Who registers. With the token of an invitation, they join that organization as well."""

    email: Email
    username: Username
    password: NewPassword
    first_name: PersonName | None = None
    last_name: PersonName | None = None
    invitation: Token | None = None


class Registered(msgspec.Struct):
    """A new person, and the organization that was made for them."""

    user: User
    organization_id: UUID
    organization: dict[str, object]
    joined_organization_id: UUID | None


@endpoint(
    "POST",
    "/auth/register",
    permission="public",
    body=Register,
    response=Registered,
    status=201,
    summary="Register",
    tags=TAGS,
    message="registered; sign in with POST /auth/login",
)
async def register(request: ApiRequest, body: Register) -> dict[str, Any]:
    """Make an account, and an organization that it owns."""
    context = request.context
    if not context.settings.registration and body.invitation is None:
        raise Forbidden("registration is closed here; ask for an invitation")
    subjects = context.throttle.registration_subjects(request.client_address)
    await context.throttle.check(context.database, subjects)
    password_hash = await context.passwords.hash(body.password)
    registration = Registration(
        body.email, body.username, (body.first_name or "").strip(), (body.last_name or "").strip()
    )
    joined = None
    try:
        async with context.database.transaction() as connection:
            if body.invitation is not None:
                await organizations.hold_invitation(connection, body.invitation)
            user, organization = await accounts.register(connection, request, registration, password_hash)
            if body.invitation is not None:
                actor = as_user(request, user["id"], user["email"])
                joined, _ = await organizations.accept_invitation(connection, actor, user["id"], body.invitation)
    except Conflict:
        await context.throttle.failed(context.database, subjects)
        raise
    return {
        "user": user,
        "organization_id": organization["id"],
        "organization": organization,
        "joined_organization_id": joined,
    }


class Login(msgspec.Struct):
    """Who signs in."""

    email: Annotated[str, Meta(max_length=254)]
    password: GivenPassword


class Session(msgspec.Struct):
    """A session. `api_key` is what is known of the organization's newest API key, never the key itself."""

    token: str
    token_type: str
    expires_at: datetime
    session_id: UUID
    user: User
    organization_id: UUID | None
    api_key: ApiKey | None


@endpoint(
    "POST",
    "/auth/login",
    permission="public",
    body=Login,
    response=Session,
    summary="Sign in",
    tags=TAGS,
    message="signed in",
)
async def login(request: ApiRequest, body: Login) -> Reply:
    """Begin a session. Its token goes into `Authorization: Bearer …`; a browser keeps it as a cookie."""
    signed_in = await accounts.sign_in(
        request.context,
        request,
        body.email,
        body.password,
        address=request.client_address,
        user_agent=request.user_agent,
    )
    return await _session(request, signed_in)


@endpoint("POST", "/auth/refresh", permission="session", response=Session, summary="Stay signed in", tags=TAGS)
async def refresh(request: ApiRequest) -> object:
    """A fresh token for the session, in good time before the old one expires."""
    assert request.principal.session_id is not None
    async with request.context.database.transaction() as connection:
        signed_in = await accounts.refresh_session(request.context, connection, request.principal.session_id)
    return await _session(request, signed_in)


async def _session(request: ApiRequest, signed_in: SignedIn) -> Reply:
    async with request.context.database.connection() as connection:
        organization_id = await organizations.home_organization(connection, signed_in.user["id"])
        api_key = None if organization_id is None else await _newest_api_key(connection, organization_id)
    data = {
        "token": signed_in.token,
        "token_type": "Bearer",
        "expires_at": signed_in.expires_at,
        "session_id": signed_in.session_id,
        "user": signed_in.user,
        "organization_id": organization_id,
        "api_key": api_key,
    }
    headers = []
    if same_origin(request.raw):  # another site must not sign a browser in here, as somebody else
        lifetime = (signed_in.expires_at - request.context.now()).total_seconds()
        headers.append(session_cookie(request, signed_in.token, lifetime))
    return Reply(data, headers=headers)


async def _newest_api_key(connection: Connection, organization_id: UUID) -> dict[str, object] | None:
    keys, _ = await api_keys.list_keys(connection, organization_id, page=1, limit=1)
    return api_keys.view(keys[0]) if keys else None


@endpoint("POST", "/auth/logout", permission="session", summary="Sign out", tags=TAGS, message="signed out")
async def logout(request: ApiRequest) -> Reply:
    """End this session: its token is refused from now on."""
    assert request.principal.session_id is not None
    async with request.context.database.transaction() as connection:
        await accounts.revoke_session(connection, request, request.user_id, request.principal.session_id)
    return Reply(headers=[session_cookie(request, "", 0)])


# Profile


class Me(msgspec.Struct):
    """Who asks."""

    user: User
    organization_id: UUID | None
    session_id: UUID


@endpoint("GET", "/auth/me", permission="session", response=Me, summary="Who I am", tags=TAGS)
async def me(request: ApiRequest) -> object:
    """The person whose session this is, and the organization they start in."""
    async with request.context.database.connection() as connection:
        return {
            "user": await accounts.get_user(connection, request.user_id),
            "organization_id": await organizations.home_organization(connection, request.user_id),
            "session_id": request.principal.session_id,
        }


class UpdateMe(msgspec.Struct):
    """What changes; what is absent stays. Another e-mail address needs `current_password`."""

    email: Email | UnsetType = UNSET
    username: Username | UnsetType = UNSET
    first_name: PersonName | UnsetType = UNSET
    last_name: PersonName | UnsetType = UNSET
    current_password: GivenPassword | UnsetType = UNSET


@endpoint(
    "PATCH", "/auth/me", permission="session", body=UpdateMe, response=User, summary="Change my profile", tags=TAGS
)
async def update_me(request: ApiRequest, body: UpdateMe) -> object:
    """Change names, username or e-mail address."""
    changes = {
        name: value
        for name in ("email", "username", "first_name", "last_name")
        if not isinstance(value := getattr(body, name), UnsetType)
    }
    if "email" in changes:
        if isinstance(body.current_password, UnsetType):
            raise BadRequest(fields={"current_password": "is required to change the e-mail address"})
        await accounts.check_password(
            request.context,
            request.user_id,
            body.current_password,
            address=request.client_address,
            field="current_password",
        )
    # A conflict tells that an address or a name is taken, so it is throttled as at registration.
    context = request.context
    subjects = context.throttle.registration_subjects(request.client_address)
    await context.throttle.check(context.database, subjects)
    try:
        async with context.database.transaction() as connection:
            before, user = await accounts.update_profile(connection, request, request.user_id, changes)
    except Conflict:
        await context.throttle.failed(context.database, subjects)
        raise
    if user["email"] != before["email"]:
        request.context.mailer.post(accounts.address_changed_message(before["email"], user["email"]))
    return user


# Passwords


class ChangePassword(msgspec.Struct):
    """The password as it is, and as it shall be."""

    current_password: GivenPassword
    new_password: NewPassword


class Ended(msgspec.Struct):
    """How many other sessions were ended."""

    ended_sessions: int


@endpoint(
    "POST",
    "/auth/password",
    permission="session",
    body=ChangePassword,
    response=Ended,
    summary="Change my password",
    tags=TAGS,
    message="the password is changed; all other sessions were ended",
)
async def change_password(request: ApiRequest, body: ChangePassword) -> object:
    """Set another password. All other sessions end."""
    context = request.context
    await accounts.check_password(
        context,
        request.user_id,
        body.current_password,
        address=request.client_address,
        field="current_password",
    )
    password_hash = await context.passwords.hash(body.new_password)
    async with context.database.transaction() as connection:
        ended = await accounts.change_password(
            connection, request, request.user_id, password_hash, session_id=request.principal.session_id
        )
    return {"ended_sessions": ended}


class ForgotPassword(msgspec.Struct):
    """Whose password is forgotten."""

    email: Email


@endpoint(
    "POST",
    "/auth/password/forgot",
    permission="public",
    body=ForgotPassword,
    status=202,
    summary="Ask for a password reset",
    tags=TAGS,
    message="if this address has an account, a mail with a link is on its way",
)
async def forgot_password(request: ApiRequest, body: ForgotPassword) -> object:
    """Send a link to set another password. The answer does not tell whether there is such an account."""
    await accounts.request_password_reset(
        request.context,
        request,
        body.email,
        address=request.client_address,
        url=f"{public_url(request.context.gateway_settings)}/reset?token=",
    )
    return None


class ResetPassword(msgspec.Struct):
    """The token that the mail brought, and the new password."""

    token: Token
    password: NewPassword


@endpoint(
    "POST",
    "/auth/password/reset",
    permission="public",
    body=ResetPassword,
    summary="Set another password by a token",
    tags=TAGS,
    message="the password is changed; sign in with it",
)
async def reset_password(request: ApiRequest, body: ResetPassword) -> object:
    """Set another password by the token of a reset mail, which is good once. All sessions end."""
    await accounts.reset_password(request.context, request, body.token, body.password)
    return Reply(headers=[session_cookie(request, "", 0)])


# Sessions


class OneSession(msgspec.Struct):
    """A session that can still be used."""

    id: UUID
    created_at: datetime
    refreshed_at: datetime
    expires_at: datetime
    address: str | None
    user_agent: str | None
    current: bool


@endpoint(
    "GET",
    "/auth/sessions",
    permission="session",
    response=OneSession,
    listing=True,
    summary="My sessions",
    tags=TAGS,
)
async def list_sessions(request: ApiRequest) -> object:
    """Where I am signed in, the newest first."""
    number, limit = request.paging()
    async with request.context.database.connection() as connection:
        rows, total = await accounts.list_sessions(connection, request.user_id, page=number, limit=limit)
    items = [dict(row) | {"current": row["id"] == request.principal.session_id} for row in rows]
    return page(items, total, number, limit)


@endpoint(
    "DELETE",
    "/auth/sessions",
    permission="session",
    response=Ended,
    summary="End my other sessions",
    tags=TAGS,
    message="all other sessions were ended",
)
async def revoke_sessions(request: ApiRequest) -> object:
    """End all sessions but this one."""
    async with request.context.database.transaction() as connection:
        ended = await accounts.revoke_sessions(connection, request, request.user_id, but=request.principal.session_id)
    return {"ended_sessions": ended}


@endpoint(
    "DELETE",
    "/auth/sessions/{session_id}",
    permission="session",
    summary="End a session of mine",
    tags=TAGS,
    message="the session was ended",
)
async def revoke_session(request: ApiRequest) -> object:
    """End one session: its token is refused from now on."""
    async with request.context.database.transaction() as connection:
        await accounts.revoke_session(connection, request, request.user_id, request.path["session_id"])
    return None
