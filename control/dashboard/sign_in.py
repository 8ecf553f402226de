"""The pages before the dashboard: sign in, register, a forgotten password, an invitation, the language."""

from starlette.responses import Response

from control import demo, organizations
from control.database import Record
from control.http import ApiError, NotFound, session_cookie
from control.pages import (
    LANGUAGE_COOKIE,
    LANGUAGE_SECONDS,
    LANGUAGES,
    PageRequest,
    own_path,
    page,
    redirect,
    render,
)
from control.routes import auth
from control.routes import organizations as routes
from control.routes.auth import ForgotPassword, Login, Register, ResetPassword
from control.routes.organizations import AcceptInvitation


@page("GET", "/", permission="public")
async def front(request: PageRequest) -> Response:
    """Where a browser arrives."""
    return redirect(request, "/dashboard")


@page("GET", "/dashboard", permission="session")
async def home(request: PageRequest) -> Response:
    """The organization that a person starts in."""
    async with request.context.database.connection() as connection:
        found = await organizations.home_organization(connection, request.user_id)
    return redirect(request, "/dashboard/account" if found is None else f"/dashboard/{found}")


@page("GET", "/login", permission="public")
async def login_form(request: PageRequest) -> Response:
    """Sign in."""
    if request.principal.kind == "user":
        return redirect(request, own_path(request.query.get("next", ""), "/dashboard"))
    return await _login_form(request)


async def _login_form(request: PageRequest, error: ApiError | None = None) -> Response:
    return await render(
        request,
        "account/login.html",
        error=error,
        next=own_path(request.form.get("next") or request.query.get("next", ""), ""),
        registration=request.context.settings.registration,
        demo=await _has_demo(request),
    )


async def _has_demo(request: PageRequest) -> bool:
    """Whether newcomers are told of the demo account: on a trial installation that has it."""
    if request.context.settings.mode != "dev":
        return False
    found = await request.context.database.fetchval("SELECT true FROM users WHERE email = $1", demo.EMAIL)
    return found is True


@page("POST", "/login", permission="public")
async def login(request: PageRequest) -> Response:
    """Sign in, and go to where one was going."""
    try:
        reply = await auth.login(request, request.body(Login))
    except ApiError as error:
        return await _login_form(request, error)
    request.cookies += reply.headers
    return redirect(request, own_path(request.form.get("next"), "/dashboard"))


@page("POST", "/logout", permission="session")
async def logout(request: PageRequest) -> Response:
    """Sign out."""
    reply = await auth.logout(request)
    request.cookies += reply.headers
    response = redirect(request, "/login", "account.signed_out")
    response.headers["Clear-Site-Data"] = '"storage"'  # what was typed at the console, in this browser's tabs
    return response


@page("GET", "/register", permission="public")
async def register_form(request: PageRequest) -> Response:
    """Make an account."""
    return await _register_form(request)


async def _register_form(request: PageRequest, error: ApiError | None = None) -> Response:
    token = request.form.get("invitation") or request.query.get("invitation", "")
    return await render(
        request,
        "account/register.html",
        error=error,
        invitation=token,
        invited=await _invited_to(request, token),
        open=request.context.settings.registration,
    )


@page("POST", "/register", permission="public")
async def register(request: PageRequest) -> Response:
    """Make an account, sign in with it, and go to its organization, or to the one that invited."""
    try:
        body = request.body(Register)
        made = await auth.register(request, body)
        reply = await auth.login(request, Login(body.email, body.password))
    except ApiError as error:
        return await _register_form(request, error)
    request.cookies += reply.headers
    organization_id = made["joined_organization_id"] or made["organization_id"]
    return redirect(request, f"/dashboard/{organization_id}", "account.welcome", name=body.first_name or body.username)


# A forgotten password


@page("GET", "/reset", permission="public")
async def reset_form(request: PageRequest) -> Response:
    """Ask for a link, or, having come by it, choose another password."""
    return await _reset_form(request)


async def _reset_form(request: PageRequest, error: ApiError | None = None, sent: bool = False) -> Response:
    token = request.form.get("token") or request.query.get("token", "")
    return await render(
        request,
        "account/reset.html",
        error=error,
        token=token,
        sent=sent,
        logged=request.context.settings.mailer == "log",
    )


@page("POST", "/reset", permission="public")
async def reset(request: PageRequest) -> Response:
    """Send the link, or set the password."""
    try:
        if not request.form.has("token"):
            await auth.forgot_password(request, request.body(ForgotPassword))
            return await _reset_form(request, sent=True)
        await auth.reset_password(request, request.body(ResetPassword))
    except ApiError as error:
        return await _reset_form(request, error)
    request.cookies.append(session_cookie(request, "", 0))
    return redirect(request, "/login", "account.password_set")


# Invitations


async def _invited_to(request: PageRequest, token: str) -> Record | None:
    if not token:
        return None
    async with request.context.database.connection() as connection:
        return await organizations.open_invitation(connection, token)


@page("GET", "/invitations", permission="public")
async def invitation(request: PageRequest) -> Response:
    """To which organization one is invited, and as what."""
    return await _invitation(request, request.query.get("token", ""))


async def _invitation(request: PageRequest, token: str, error: ApiError | None = None) -> Response:
    invited = await _invited_to(request, token)
    if invited is None and error is None:
        error = NotFound(request.texts("account.invitation_gone"))
    return await render(request, "account/invitation.html", error=error, token=token, invited=invited)


@page("POST", "/invitations", permission="session")
async def accept(request: PageRequest) -> Response:
    """Join."""
    token = request.form.get("token")
    try:
        joined = await routes.accept_invitation(request, request.body(AcceptInvitation))
    except ApiError as error:
        return await _invitation(request, token, error)
    return redirect(request, f"/dashboard/{joined['organization_id']}", "account.joined")


# The language


@page("POST", "/dashboard/language", permission="public")
async def language(request: PageRequest) -> Response:
    """Choose the language; who chose it is remembered by the browser."""
    chosen = request.form.get("language")
    if chosen in LANGUAGES:
        request.set_cookie(LANGUAGE_COOKIE, chosen, LANGUAGE_SECONDS)
    return redirect(request, own_path(request.form.get("back"), "/dashboard"))
