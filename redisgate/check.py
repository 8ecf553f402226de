"""`redisgate check`: is every configured Redis usable, and if not, what to do."""

import asyncio
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from redisgate.config import InstanceConfig, Settings, TokenConfig
from redisgate.findings import Finding, Report
from redisgate.units import bytes_text
from resp.address import Address
from resp.connection import connect
from resp.errors import ConnectFailed, ReplyLost, RespError
from resp.info import ask, parse_info, server_version

MIN_TOKEN_LENGTH: Final = 16
"""Shorter tokens can be guessed."""
MAX_AT_ONCE: Final = 32
"""Connections that are tried side by side."""
OLDEST_REDIS: Final = (6, 2)
"""What still gets fixes."""
SLOW_SECONDS: Final = 0.02
"""A Redis that answers later is in another place."""
MAX_CLOCK_SKEW: Final = 2.0
"""Seconds by which clocks may differ."""
NEARLY_FULL: Final = 0.95
"""Of a bound: then it is time to do something."""
CERTIFICATE_DAYS: Final = 21
"""Before a certificate ends it should be renewed."""


def run_check(settings: Settings, control: Callable[[Settings], list[Finding]]) -> int:
    """Print a report; returns 0 if everything is usable, else 1. `control` looks at the control plane."""
    report = Report()
    if settings.control.enabled:
        report.add(control(settings))
    look_at_instances(settings, report)
    print(report.text())
    return int(report.failed)


def look_at_instances(settings: Settings, report: Report) -> None:
    """Connect to every Redis that the settings name, as every user that they name."""
    results, logins = asyncio.run(_look_at_all(settings))
    servers: dict[str, list[str]] = {}
    used = {token.instance for token in settings.tokens}
    for instance, result in zip(settings.instances, results, strict=True):
        report.about(f"instance {instance.id} ({instance.address.display})")
        if isinstance(result, ConnectFailed):
            report.wrong(result.detail, cure_of(instance.address, result))
        else:
            describe(report, instance.address, result)
            if result.run_id:
                servers.setdefault(result.run_id, []).append(instance.id)
        if instance.id in used:
            continue
        if settings.tokens:
            report.note("no token names it")
        else:
            report.wrong("there is no token, so every command will be answered 401", "add one to the file: [[tokens]]")
    for together in servers.values():
        if len(together) > 1:
            report.about(f"instances {', '.join(together)}")
            report.note(
                "share one Redis server: scripts and server-wide commands such as FLUSHALL reach all of them",
                "treat them as one trust domain, or give each a server of its own",
            )
    for token, failure in zip(settings.tokens, logins, strict=True):
        _look_at_token(report, token, failure)


async def _look_at_all(settings: Settings) -> tuple[list["Facts | ConnectFailed"], list[ConnectFailed | None]]:
    """What is known of each instance, and why the login of each token's user failed, if it did."""
    instances = {instance.id: instance for instance in settings.instances}
    turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def look(instance: InstanceConfig) -> Facts | ConnectFailed:
        async with turns:
            return await look_at(instance.address, instance.connect_timeout, instance.command_timeout)

    async def log_in(token: TokenConfig) -> ConnectFailed | None:
        async with turns:
            return await _log_in(instances[token.instance], token)

    results, logins = await asyncio.gather(
        asyncio.gather(*map(look, settings.instances)), asyncio.gather(*map(log_in, settings.tokens))
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


@dataclass(frozen=True)
class Facts:
    """What a Redis says of itself; times in seconds."""

    info: dict[str, str]
    transactions: bool
    policy: str | None
    """Of eviction; None: not permitted to know."""
    latency: float
    """Of one command, there and back."""
    ahead: float | None
    """Its clock before ours."""
    certificate_ends: float | None
    """Unix time; None: no certificate was verified."""

    @property
    def run_id(self) -> str | None:
        return self.info.get("run_id")

    @property
    def version(self) -> str | None:
        return server_version(self.info)


async def look_at(address: Address, connect_timeout: float, command_timeout: float) -> Facts | ConnectFailed:
    """Connect, log in, and ask a Redis about itself."""
    try:
        connection = await connect(address, timeout=connect_timeout)
    except ConnectFailed as error:
        return error
    try:
        async with asyncio.timeout(command_timeout):
            began = time.time()
            [now] = await ask(connection, ["TIME"])
            latency = time.time() - began
            info, policy = await ask(connection, ["INFO"], ["CONFIG", "GET", "maxmemory-policy"])
    except (TimeoutError, RespError) as error:
        return ConnectFailed(f"it accepts the login but does not answer: {error or 'no reply in time'}")
    finally:
        transactions = connection.transactions
        certificate = connection.peer_certificate
        connection.close(ReplyLost("done"))
    ahead = None
    if isinstance(now, list) and len(now) == 2:
        ahead = int(now[0]) + int(now[1]) / 1e6 - (began + latency / 2)
    return Facts(
        parse_info(info),
        transactions,
        policy[1] if isinstance(policy, list) and len(policy) == 2 else None,
        latency,
        ahead,
        ssl.cert_time_to_seconds(certificate["notAfter"]) if certificate else None,
    )


def describe(report: Report, address: Address, facts: Facts) -> None:
    """Say what is to be known of a Redis that can be used."""
    info = facts.info
    report.ok(
        f"reachable, {'version ' + facts.version if facts.version else 'INFO is not permitted'},"
        f" {facts.latency * 1000:.1f} ms"
    )
    if facts.version and _older(facts.version, OLDEST_REDIS):
        report.note(
            f"Redis {facts.version} gets no fixes any more",
            f"upgrade it to {'.'.join(map(str, OLDEST_REDIS))} or newer",
        )
    if facts.latency > SLOW_SECONDS:
        report.note("that is far: every command waits for it", "put the gateway and Redis beside each other")
    if facts.ahead is not None and abs(facts.ahead) > MAX_CLOCK_SKEW:
        report.wrong(
            f"its clock is {abs(facts.ahead):.0f} s {'ahead of' if facts.ahead > 0 else 'behind'} this machine's: keys"
            " expire at other times than clients think",
            "have both clocks set by NTP (chrony, systemd-timesyncd)",
        )
    if address.tls:
        _describe_tls(report, address, facts)
    if address.password is not None:
        report.ok(f"login as {address.username or 'default'} accepted")
    report.ok(f"database {address.database} selected")
    if facts.transactions:
        report.ok("MULTI and EXEC permitted")
    else:
        report.note("MULTI or EXEC not permitted to this user: /multi-exec will be refused")
    if info.get("cluster_enabled") == "1":
        report.wrong(
            "it is a node of a Redis Cluster, and the gateway does not follow slots to other nodes",
            "name a Redis that is not clustered",
        )
    if info.get("role") == "slave":
        report.note("it is a replica: writes will be refused", "name its primary, unless tokens only read")
        if info.get("master_link_status") == "down":
            report.wrong("it is a replica that has lost its primary: what it answers is old", "mend its replication")
    _describe_persistence(report, info)
    _describe_memory(report, info, facts.policy)
    clients, most = _number(info, "connected_clients"), _number(info, "maxclients")
    if clients and most and clients > most * NEARLY_FULL:
        report.wrong(
            f"{clients} of {most} clients are connected: the next ones are refused",
            "raise its maxclients, or lower pool_size or the number of workers",
        )


def _describe_tls(report: Report, address: Address, facts: Facts) -> None:
    if not address.verify:
        report.note("TLS without verification: anybody in between can read along; remove tls_verify = false")
        return
    report.ok("TLS, certificate verified")
    if facts.certificate_ends is not None:
        days = (facts.certificate_ends - time.time()) / 86400
        if days < CERTIFICATE_DAYS:
            report.note(f"its certificate ends in {days:.0f} days", "renew it at the server of this Redis")


def _describe_persistence(report: Report, info: dict[str, str]) -> None:
    if info.get("rdb_last_bgsave_status") == "err":
        report.wrong(
            "its last snapshot failed, and by default it refuses writes until one succeeds",
            "look into its log; most often the disk is full or its directory cannot be written",
        )
    if info.get("aof_enabled") == "1" and info.get("aof_last_write_status") == "err":
        report.wrong("its last write to the append-only file failed", "look into its log; most often the disk is full")
    if info.get("aof_enabled") == "0" and info.get("rdb_changes_since_last_save", "0") != "0":
        report.note("no append-only file: a crash loses what was written since the last snapshot")


def _describe_memory(report: Report, info: dict[str, str], policy: str | None) -> None:
    used, most = _number(info, "used_memory"), _number(info, "maxmemory")
    if info.get("maxmemory") == "0":
        report.note("no maxmemory: it may grow until the machine has no memory left")
    elif policy not in (None, "noeviction"):
        report.note(f"eviction is {policy}: keys may disappear when memory is full")
    elif used and most and used > most * NEARLY_FULL:
        report.wrong(
            f"{bytes_text(used)} of {bytes_text(most)} are used: beyond that every write is refused",
            "give it more memory (maxmemory), delete keys, or let it evict some",
        )


def _number(info: dict[str, str], name: str) -> int | None:
    value = info.get(name, "")
    return int(value) if value.isdigit() else None


def _older(version: str, than: tuple[int, int]) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < than


def _look_at_token(report: Report, token: TokenConfig, failure: ConnectFailed | None) -> None:
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
    report.about(f"token {token.name}")
    for text, cure in wrongs:
        report.wrong(text, cure)


def cure_of(address: Address, error: ConnectFailed) -> str:
    """What to do about a Redis that cannot be used."""
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
    if address.tls:
        return "check that this host and port can be reached, and that they speak TLS"
    return "check that host and port can be reached from here, and whether the server wants TLS (rediss://)"
