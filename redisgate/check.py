"""`redisgate check`: is every configured Redis usable, and if not, what to do."""

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any

from redisgate.config import InstanceConfig, Settings, TokenConfig
from resp.connection import Connection, FutureWaiter, connect
from resp.encoder import encode_commands
from resp.errors import ConnectFailed, ReplyLost, RespError
from resp.parser import ErrorReply, Parser

MIN_TOKEN_LENGTH = 16
"""Shorter tokens can be guessed."""


class _Report:
    """What was found; anything wrong makes the exit status 1."""

    def __init__(self) -> None:
        self.failed = False

    def ok(self, text: str) -> None:
        print(f"  ok    {text}")

    def note(self, text: str) -> None:
        print(f"  note  {text}")

    def wrong(self, text: str, cure: str) -> None:
        self.failed = True
        print(f"  FAIL  {text}\n        {cure}")


def run_check(settings: Settings, control: Callable[[Settings], tuple[list[str], list[tuple[str, str]]]]) -> int:
    """Print a report; returns 0 if everything is usable, else 1.

    `control` tells of the control plane, if there is one: what is well, and what is wrong with what to do about it.
    """
    report = _Report()
    if settings.control.enabled:
        print("control plane")
        well, wrong = control(settings)
        for text in well:
            report.ok(text)
        for text, cure in wrong:
            report.wrong(text, cure)
    results, logins = asyncio.run(_look_at_all(settings))
    servers: dict[str, list[str]] = {}
    for instance, result in zip(settings.instances, results, strict=True):
        print(f"instance {instance.id} ({instance.address.display})")
        if isinstance(result, ConnectFailed):
            report.wrong(result.detail, _cure(instance, result))
            continue
        _describe(report, instance, result)
        run_id = result["info"].get("run_id")
        if run_id:
            servers.setdefault(run_id, []).append(instance.id)
    for together in servers.values():
        if len(together) > 1:
            print(f"instances {', '.join(together)}")
            report.note("share one Redis server: scripts and server-wide commands such as FLUSHALL reach all of them;")
            report.note("treat them as one trust domain, or give each a server of its own")
    used = {token.instance for token in settings.tokens}
    for instance in settings.instances:
        if instance.id not in used:
            print(f"instance {instance.id}")
            if settings.tokens:
                report.note("no token names it")
            else:
                report.wrong(
                    "there is no token, so every command will be answered 401", "add one to the file: [[tokens]]"
                )
    for token, failure in zip(settings.tokens, logins, strict=True):
        _look_at_token(report, token, failure)
    print("Something has to be mended." if report.failed else "All is well.")
    return int(report.failed)


async def _look_at_all(
    settings: Settings,
) -> tuple[list[dict[str, Any] | ConnectFailed], list[ConnectFailed | None]]:
    """What is known of each instance, and why the login of each token's user failed, if it did."""
    instances = {instance.id: instance for instance in settings.instances}
    results, logins = await asyncio.gather(
        asyncio.gather(*(_look_at(instance) for instance in settings.instances)),
        asyncio.gather(*(_log_in(instances[token.instance], token) for token in settings.tokens)),
    )
    return results, logins


async def _log_in(instance: InstanceConfig, token: TokenConfig) -> ConnectFailed | None:
    if token.user is None:
        return None
    address = instance.address.with_login(token.user, token.password or "")
    try:
        connection = await connect(address, timeout=instance.connect_timeout)
    except ConnectFailed as error:
        return error
    connection.close(ReplyLost("done"))
    return None


async def _look_at(instance: InstanceConfig) -> dict[str, Any] | ConnectFailed:
    try:
        connection = await connect(instance.address, timeout=instance.connect_timeout)
    except ConnectFailed as error:
        return error
    try:
        async with asyncio.timeout(instance.command_timeout):
            info, policy = await _ask(connection, [b"INFO"], [b"CONFIG", b"GET", b"maxmemory-policy"])
    except (TimeoutError, RespError) as error:
        return ConnectFailed(f"it accepts the login but does not answer: {error or 'no reply in time'}")
    finally:
        transactions = connection.transactions
        connection.close(ReplyLost("done"))
    fields = {}
    if isinstance(info, str) and not isinstance(info, ErrorReply):
        fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    return {
        "info": fields,
        "transactions": transactions,
        "policy": policy[1] if isinstance(policy, list) and len(policy) == 2 else None,
    }


async def _ask(connection: Connection, *commands: list[bytes]) -> list[Any]:
    waiter = FutureWaiter(len(commands), asyncio.get_running_loop())
    connection.send(encode_commands(commands), waiter)
    return Parser(text=True).parse(await waiter.future, len(commands))


def _describe(report: _Report, instance: InstanceConfig, result: dict[str, Any]) -> None:
    info = result["info"]
    address = instance.address
    version = info.get("valkey_version") or info.get("redis_version")
    report.ok(f"reachable, {'version ' + version if version else 'INFO is not permitted'}")
    if address.tls:
        if address.verify:
            report.ok("TLS, certificate verified")
        else:
            report.note("TLS without verification: anybody in between can read along; remove tls_verify = false")
    if address.password is not None:
        report.ok(f"login as {address.username or 'default'} accepted")
    report.ok(f"database {address.database} selected")
    if result["transactions"]:
        report.ok("MULTI and EXEC permitted")
    else:
        report.note("MULTI or EXEC not permitted to this user: /multi-exec will be refused")
    if info.get("role") == "slave":
        report.note("it is a replica: writes will be refused")
    if info.get("aof_enabled") == "0" and info.get("rdb_changes_since_last_save", "0") != "0":
        report.note("no append-only file: a crash loses what was written since the last snapshot")
    if info.get("maxmemory") == "0":
        report.note("no maxmemory: it may grow until the machine has no memory left")
    elif result["policy"] not in (None, "noeviction"):
        report.note(f"eviction is {result['policy']}: keys may disappear when memory is full")


def _look_at_token(report: _Report, token: TokenConfig, failure: ConnectFailed | None) -> None:
    wrongs = []
    if token.expires is not None and token.expires <= time.time():
        wrongs.append(("it has expired", "remove it, or move its expires"))
    elif len(token.token) < MIN_TOKEN_LENGTH or len(set(token.token)) < 6:
        wrongs.append(("it is easy to guess", "`openssl rand -hex 32` makes a good one"))
    if failure is not None:
        cure = "check user and password of the token: they are a Redis user's (ACL SETUSER)"
        refused = "AUTH was refused" in failure.detail
        wrongs.append(
            (f"its user {token.user} cannot log in: {failure.detail}", cure if refused else "see its instance")
        )
    if wrongs:
        print(f"token {token.name}")
    for text, cure in wrongs:
        report.wrong(text, cure)


def _cure(instance: InstanceConfig, error: ConnectFailed) -> str:
    cause = error.cause
    text = error.detail
    if isinstance(cause, ssl.SSLError):
        return "check tls_ca_file and tls_server_name, and that this port speaks TLS"
    if "AUTH was refused" in text or "NOAUTH" in text or "WRONGPASS" in text:
        return "check user and password in the URL: redis://user:password@host:port"
    if "SELECT was refused" in text:
        return "the server has fewer databases; choose another number at the end of the URL"
    if "LOADING" in text:
        return "it is loading its data; try again in a moment"
    if isinstance(cause, ConnectionRefusedError):
        return "is Redis running there, and listening on this address? check host and port"
    if isinstance(cause, FileNotFoundError):
        return "there is no such socket; is Redis running with this unixsocket?"
    if instance.address.tls:
        return "check that this host and port can be reached, and that they speak TLS"
    return "check that host and port can be reached from here, and whether the server wants TLS (rediss://)"
