"""People: registration, sign-in, sessions, profile, passwords.

Nobody learns from here whether an e-mail address has an account, except by registering it, which is throttled: sign-in
and password reset give unknown addresses the same answer after the same work.
"""

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import asyncpg

from control import organizations
from control.audit import Acting, as_user, plain_address, record
from control.database import Connection, Record
from control.duties import duty
from control.http import BadRequest, Conflict, Context, NotFound, Unauthorized
from control.mailer import Message
from control.organizations import describe, token_digest
from control.passwords import Turn

SESSION_DAYS: Final = 30
"""After which a session ends however often it is refreshed."""
RESETS_PER_HOUR: Final = 3
"""Password reset mails to one address."""

USER_COLUMNS: Final = "id, email, username, first_name, last_name, is_admin, created_at, last_login_at"


@dataclass(frozen=True, slots=True)
class Registration:
    """What somebody says of themselves."""

    email: str
    username: str
    first_name: str
    last_name: str


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A session that has begun or goes on."""

    token: str
    expires_at: datetime
    session_id: UUID
    user: Record


async def register(
    connection: Connection,
    acting: Acting,
    registration: Registration,
    password_hash: str,
    *,
    organization_name: str | None = None,
    plan: str = "free",
) -> tuple[Record, Record]:
    """A new person with an organization of their own; returns both.

    Raises:
        Conflict: the e-mail address or the username is taken.
    """
    try:
        user = await connection.fetchrow(
            "INSERT INTO users (email, username, password_hash, first_name, last_name) VALUES ($1, $2, $3, $4, $5)"
            f" RETURNING {USER_COLUMNS}",
            registration.email,
            registration.username,
            password_hash,
            registration.first_name,
            registration.last_name,
        )
    except asyncpg.UniqueViolationError as error:
        raise _taken(error) from None
    assert user is not None
    actor = as_user(acting, user["id"], user["email"])
    name = organization_name or f"{registration.first_name or registration.username}'s organization"
    organization = await organizations.create_organization(connection, actor, user["id"], name[:100], plan)
    await record(
        connection,
        actor,
        "users.register",
        ("user", user["id"]),
        after={"email": user["email"], "username": user["username"]},
        organization_id=organization["id"],
    )
    return user, organization


def _taken(error: asyncpg.UniqueViolationError) -> Conflict:
    field = "email" if error.constraint_name == "users_email_key" else "username"
    text = "e-mail address" if field == "email" else "username"
    return Conflict(f"this {text} has an account already", {"fields": {field: "is taken"}})


# Signing in


async def sign_in(
    context: Context, acting: Acting, email: str, password: str, *, address: str, user_agent: str
) -> SignedIn:
    """Begin a session.

    Raises:
        Unauthorized: the address or the password is wrong, whichever.
        TooManyRequests: too many attempts failed; `throttle` says how it counts.
        TooBusy: too many others sign in.
    """
    database, throttle = context.database, context.throttle
    subjects = await throttle.sign_in_subjects(database, email, address)
    await throttle.check(database, subjects)
    async with context.passwords.turn() as turn:
        # Once more: as many attempts as there are threads can be under way, and no more, before failures show.
        await throttle.check(database, subjects)
        user = await database.fetchrow(
            f"SELECT {USER_COLUMNS}, password_hash, password_changed_at, disabled_at FROM users"
            " WHERE lower(email) = lower($1)",
            email,
        )
        right = await turn.verify(password, None if user is None else user["password_hash"])
        if not right or user is None or user["disabled_at"] is not None:
            await throttle.failed(database, subjects)
            async with database.transaction() as connection:
                target = ("user", None if user is None else user["id"])
                await record(connection, acting, "sessions.create", target, after={"email": email}, outcome="failure")
            raise Unauthorized("the e-mail address or the password is wrong")
        if context.passwords.needs_rehash(user["password_hash"]):
            await _store_rehash(context, turn, user, password)
    await throttle.succeeded(database, subjects)
    async with database.transaction() as connection:
        # The password may have been changed, and all sessions ended, since it was looked at.
        same = await connection.fetchval(
            "SELECT true FROM users WHERE id = $1 AND password_changed_at = $2 AND disabled_at IS NULL"
            " FOR NO KEY UPDATE",
            user["id"],
            user["password_changed_at"],
        )
        if not same:
            raise Unauthorized("the e-mail address or the password is wrong")
        return await begin_session(
            context,
            connection,
            as_user(acting, user["id"], user["email"]),
            user,
            address=address,
            user_agent=user_agent,
        )


async def _store_rehash(context: Context, turn: Turn, user: Record, password: str) -> None:
    await context.database.execute(
        "UPDATE users SET password_hash = $2 WHERE id = $1 AND password_hash = $3",
        user["id"],
        await turn.hash(password),
        user["password_hash"],  # unless it was changed meanwhile
    )


async def begin_session(
    context: Context, connection: Connection, acting: Acting, user: Record, *, address: str, user_agent: str
) -> SignedIn:
    """A session for somebody who has shown who they are."""
    now = context.now()
    ends_at = now + timedelta(days=SESSION_DAYS)
    expires_at = min(now + timedelta(seconds=context.settings.session_lifetime), ends_at)
    session_id: UUID = await connection.fetchval(
        "INSERT INTO sessions (user_id, expires_at, ends_at, address, user_agent)"
        " VALUES ($1, $2, $3, $4::text::inet, $5) RETURNING id",
        user["id"],
        expires_at,
        ends_at,
        plain_address(address),
        user_agent,
    )
    await connection.execute("UPDATE users SET last_login_at = now() WHERE id = $1", user["id"])
    await record(connection, acting, "sessions.create", ("session", session_id))
    token = context.tokens.issue_session(session_id=session_id, user_id=user["id"], expires_at=expires_at)
    return SignedIn(token, expires_at, session_id, user)


async def refresh_session(context: Context, connection: Connection, session_id: UUID) -> SignedIn:
    """A fresh token for a session; the old one is good until it expires.

    Raises:
        Unauthorized: the session has ended.
    """
    expires_at = context.now() + timedelta(seconds=context.settings.session_lifetime)
    row = await connection.fetchrow(
        "UPDATE sessions SET refreshed_at = now(), expires_at = least($2, ends_at)"
        " WHERE id = $1 AND revoked_at IS NULL AND ends_at > now() RETURNING user_id, expires_at",
        session_id,
        expires_at,
    )
    if row is None:
        raise Unauthorized("this session has ended; sign in again")
    user = await get_user(connection, row["user_id"])
    token = context.tokens.issue_session(session_id=session_id, user_id=user["id"], expires_at=row["expires_at"])
    return SignedIn(token, row["expires_at"], session_id, user)


async def list_sessions(connection: Connection, user_id: UUID, *, page: int, limit: int) -> tuple[list[Record], int]:
    """Somebody's sessions that can still be used, the newest first."""
    usable = "user_id = $1 AND revoked_at IS NULL AND expires_at > now()"
    total = await connection.fetchval(f"SELECT count(*) FROM sessions WHERE {usable}", user_id)
    rows = await connection.fetch(
        "SELECT id, created_at, refreshed_at, expires_at, host(address) AS address, user_agent FROM sessions"
        f" WHERE {usable} ORDER BY created_at DESC, id LIMIT $2 OFFSET $3",
        user_id,
        limit,
        (page - 1) * limit,
    )
    return rows, total


async def revoke_session(connection: Connection, acting: Acting, user_id: UUID, session_id: UUID) -> None:
    """End one of somebody's sessions: its token is refused from now on.

    Raises:
        NotFound: they have no such session.
    """
    found = await connection.fetchval(
        "UPDATE sessions SET revoked_at = now() WHERE id = $1 AND user_id = $2 AND revoked_at IS NULL RETURNING true",
        session_id,
        user_id,
    )
    if not found:
        raise NotFound("there is no such session")
    await record(connection, acting, "sessions.revoke", ("session", session_id))


async def revoke_sessions(connection: Connection, acting: Acting, user_id: UUID, *, but: UUID | None = None) -> int:
    """End all of somebody's sessions, but for one; returns how many were ended."""
    rows = await connection.fetch(
        "UPDATE sessions SET revoked_at = now() WHERE user_id = $1 AND revoked_at IS NULL AND expires_at > now()"
        " AND id IS DISTINCT FROM $2 RETURNING id",
        user_id,
        but,
    )
    if rows:
        await record(
            connection, acting, "sessions.revoke", ("user", user_id), after={"sessions": [row["id"] for row in rows]}
        )
    return len(rows)


# Profile and password


async def get_user(connection: Connection, user_id: UUID) -> Record:
    """Somebody, without secrets.

    Raises:
        NotFound: there is no such person.
    """
    user = await connection.fetchrow(f"SELECT {USER_COLUMNS} FROM users WHERE id = $1", user_id)
    if user is None:
        raise NotFound("there is no such person")
    return user


async def update_profile(
    connection: Connection, acting: Acting, user_id: UUID, changes: dict[str, str]
) -> tuple[Record, Record]:
    """Change `username`, `first_name`, `last_name` or `email`; returns the person before and after.

    That the password was asked for before an e-mail address changes is the caller's to see to.

    Raises:
        Conflict: the e-mail address or the username is taken.
    """
    before = await connection.fetchrow(f"SELECT {USER_COLUMNS} FROM users WHERE id = $1 FOR NO KEY UPDATE", user_id)
    if before is None:
        raise NotFound("there is no such person")
    changed = {name: value for name, value in changes.items() if before[name] != value}
    if not changed:
        return before, before
    columns = sorted(changed)
    assignments = ", ".join(f"{name} = ${number}" for number, name in enumerate(columns, 2))
    try:
        user = await connection.fetchrow(
            f"UPDATE users SET {assignments}, updated_at = now() WHERE id = $1 RETURNING {USER_COLUMNS}",
            user_id,
            *[changed[name] for name in columns],
        )
    except asyncpg.UniqueViolationError as error:
        raise _taken(error) from None
    assert user is not None
    if "email" in changed:
        # A link that went to the old mailbox would give the account to whoever reads that.
        await connection.execute(
            "UPDATE password_resets SET used_at = now() WHERE user_id = $1 AND used_at IS NULL", user_id
        )
    await record(
        connection, acting, "users.update", ("user", user_id), {name: before[name] for name in columns}, changed
    )
    return before, user


def address_changed_message(old: str, new: str) -> Message:
    """What goes to an address that is not an account's any more."""
    return Message(
        old,
        "Your e-mail address was changed",
        f"The e-mail address of your account is now {new}. If it was not you who changed it, somebody knows your"
        " password: tell whoever runs this service.",
    )


async def check_password(context: Context, user_id: UUID, password: str, *, address: str, field: str) -> None:
    """Make sure that it is the person who asks, and not somebody at their session. Throttled like signing in.

    Raises:
        BadRequest: the password is wrong; names `field`.
        TooManyRequests: too many attempts failed.
    """
    database, throttle = context.database, context.throttle
    user = await database.fetchrow("SELECT email, password_hash FROM users WHERE id = $1", user_id)
    if user is None:
        raise Unauthorized
    subjects = await throttle.sign_in_subjects(database, user["email"], address)
    await throttle.check(database, subjects)
    async with context.passwords.turn() as turn:
        await throttle.check(database, subjects)
        if not await turn.verify(password, user["password_hash"]):
            await throttle.failed(database, subjects)
            raise BadRequest("the current password is wrong", {field: "is wrong"})
    await throttle.succeeded(database, subjects)


async def change_password(
    connection: Connection, acting: Acting, user_id: UUID, password_hash: str, *, session_id: UUID | None
) -> int:
    """Set another password and end all sessions but this one; returns how many ended."""
    await connection.execute(
        "UPDATE users SET password_hash = $2, password_changed_at = now(), updated_at = now() WHERE id = $1",
        user_id,
        password_hash,
    )
    await connection.execute(
        "UPDATE password_resets SET used_at = now() WHERE user_id = $1 AND used_at IS NULL", user_id
    )
    ended = await revoke_sessions(connection, acting, user_id, but=session_id)
    await record(connection, acting, "users.password", ("user", user_id))
    return ended


async def request_password_reset(context: Context, acting: Acting, email: str, *, address: str, url: str) -> None:
    """Send somebody a link to set another password, `url` with the token at its end. For an address that nobody has the
    same is done, but for the mail, which leaves behind the request.

    Raises:
        TooManyRequests: too many requests from this network.
    """
    database, throttle = context.database, context.throttle
    subjects = throttle.reset_subjects(address)
    await throttle.check(database, subjects)
    await throttle.failed(database, subjects)
    token = secrets.token_urlsafe(32)
    lifetime = timedelta(seconds=context.settings.reset_lifetime)
    async with database.transaction() as connection:
        user = await connection.fetchrow(
            "SELECT id, email, (SELECT count(*) FROM password_resets r WHERE r.user_id = u.id"
            " AND r.created_at > now() - interval '1 hour') AS recent"
            " FROM users u WHERE lower(email) = lower($1) AND disabled_at IS NULL",
            email,
        )
        mailed = user is not None and user["recent"] < RESETS_PER_HOUR
        await connection.execute(
            "INSERT INTO password_resets (user_id, token_digest, expires_at, address)"
            " VALUES ($1, $2, $3, $4::text::inet)",
            user["id"]
            if user is not None and mailed
            else None,  # only what is mailed counts, or it would shut them out
            token_digest(token),
            context.now() + lifetime,
            plain_address(address),
        )
        target = ("user", None if user is None else user["id"])
        await record(connection, acting, "users.reset_request", target, after={"email": email})
    if user is not None and mailed:
        context.mailer.post(
            Message(
                user["email"],
                "Set a new password",
                "Somebody, probably you, wants to set a new password for your account. To do so, open\n"
                f"{url}{token}\n\nwithin {describe(lifetime)}. If it was not you, there is nothing to do: without this"
                " link your password stays as it is.",
            )
        )


async def find_reset(connection: Connection, token: str) -> Record:
    """The person for whom a reset token is good; their row of `password_resets` is locked.

    Raises:
        BadRequest: it is unknown, used or too old.
    """
    row = await connection.fetchrow(
        "SELECT r.id AS reset_id, u.id, u.email FROM password_resets r JOIN users u ON u.id = r.user_id"
        " WHERE r.token_digest = $1 AND r.used_at IS NULL AND r.expires_at > now() AND u.disabled_at IS NULL"
        " FOR UPDATE OF r",
        token_digest(token),
    )
    if row is None:
        raise BadRequest("this link is not valid any more; ask for another", {"token": "is unknown, used or too old"})
    return row


async def reset_password(context: Context, acting: Acting, token: str, password: str) -> None:
    """Set another password by a token that was sent by mail, and end all sessions.

    Raises:
        BadRequest: the token is unknown, used or too old.
        TooBusy: too many sign in at the moment.
    """
    async with context.database.transaction() as connection:
        await find_reset(connection, token)  # before anything that costs
    password_hash = await context.passwords.hash(password)
    async with context.database.transaction() as connection:
        user = await find_reset(connection, token)
        await change_password(
            connection, as_user(acting, user["id"], user["email"]), user["id"], password_hash, session_id=None
        )


# Administration


async def set_admin(connection: Connection, acting: Acting, email: str, is_admin: bool) -> Record:
    """Make somebody an administrator of the platform, or no longer one.

    Raises:
        NotFound: nobody has this e-mail address.
    """
    user = await connection.fetchrow(
        f"UPDATE users SET is_admin = $2, updated_at = now() WHERE lower(email) = lower($1) RETURNING {USER_COLUMNS}",
        email,
        is_admin,
    )
    if user is None:
        raise NotFound(f"nobody has the e-mail address {email}")
    await record(connection, acting, "users.admin", ("user", user["id"]), after={"is_admin": is_admin})
    return user


@duty("purge of what has expired", every=3600)
async def purge_expired(context: Context) -> None:
    """Delete sessions that ended long ago, reset tokens and failed attempts that are of no more use."""
    from control.throttle import KEEP_SECONDS, KNOWN_NETWORK_DAYS

    async with context.database.transaction() as connection:
        # A session is kept for what it tells of the networks that its owner uses.
        await connection.execute(
            "DELETE FROM sessions WHERE ends_at < now() AND created_at < now() - make_interval(days => $1)",
            KNOWN_NETWORK_DAYS,
        )
        await connection.execute("DELETE FROM password_resets WHERE expires_at < now() - interval '1 day'")
        await connection.execute(
            "DELETE FROM throttle WHERE failed_at < now() - make_interval(secs => $1)", KEEP_SECONDS
        )
