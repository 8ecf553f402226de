"""What the operator says to a running Redis: users and settings are changed without a restart.

The same stands in the Secret that the pod mounts, for its next start. A kubelet takes up to a minute to bring a changed
Secret into a pod, so the running server is told directly, after each of its starts too.
"""

import asyncio
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from resp.address import Address
from resp.connection import Connection, connect
from resp.errors import ConnectFailed, LoginRefused, ReplyLost, RespError
from resp.info import ask, parse_info, server_version
from resp.parser import ErrorReply

CONNECT_SECONDS: Final = 2.0
ANSWER_SECONDS: Final = 5.0
"""For all commands of one adjustment."""

FRESH_SECONDS: Final = 60
"""A snapshot that is not older holds as much as snapshots promise."""

# Where they lie is decided when Redis starts; they are never sent to a running one.
_FIXED: Final = frozenset(
    "aclfile bind databases dir port protected-mode tls-port tls-cert-file tls-key-file tls-ca-cert-file".split()
)


class Unreachable(Exception):
    """The Redis cannot be asked. The text is for people."""


class LoginLost(Unreachable):
    """It does not accept any password that we have."""


@dataclass(frozen=True)
class Running:
    """What a Redis says of itself."""

    version: str
    refused: Mapping[str, str]
    """By setting: why it could not be changed while it runs."""


async def adjust(addresses: Sequence[Address], users: Mapping[str, list[str]], config: Mapping[str, str]) -> Running:
    """Let a Redis have these users, as ACL rules from nothing, and these settings.

    `addresses` are of the same server with several logins: the first one that works is used.

    Raises:
        Unreachable: it did not answer, or refused a user.
        LoginLost: no login is good.
    """
    connection = await _open(addresses)
    try:
        wanted = {key: _one_value(value) for key, value in config.items() if key not in _FIXED}
        commands = [
            ["INFO", "server"],
            *(["ACL", "SETUSER", name, "reset", *rules] for name, rules in users.items()),
            *(["CONFIG", "SET", key, value] for key, value in wanted.items()),
        ]
        replies = await _ask(connection, commands)
    finally:
        connection.close(ReplyLost("done"))
    refused = {}
    for command, reply in zip(commands, replies, strict=True):
        if isinstance(reply, ErrorReply):
            if command[0] != "CONFIG":
                raise Unreachable(f"Redis refused {command[0]} {command[1]}: {reply}")
            refused[command[2]] = str(reply)
    return Running(server_version(parse_info(replies[0])) or "", refused)


async def is_written(addresses: Sequence[Address], *, append_only: bool) -> bool:
    """Let a Redis write its data in the form that it is to start from, an append-only file or a snapshot. Answers
    whether that is there: until then a start from it would find nothing. Raises as `adjust()` does."""
    connection = await _open(addresses)
    try:
        if append_only:
            answer, info = await _ask(connection, [["CONFIG", "SET", "appendonly", "yes"], ["INFO", "persistence"]])
            if isinstance(answer, ErrorReply):
                raise Unreachable(f"Redis refused CONFIG SET appendonly: {answer}")
            facts = parse_info(info)
            busy = {facts.get(f"aof_rewrite_{what}") for what in ("in_progress", "scheduled")}
            return facts.get("aof_enabled") == "1" and busy == {"0"} and facts.get("aof_last_bgrewrite_status") == "ok"
        info, server, time = await _ask(connection, [["INFO", "persistence"], ["INFO", "server"], ["TIME"]])
        facts, now = parse_info(info), int(time[0])
        if facts.get("rdb_bgsave_in_progress") != "0":
            return False
        # One that has just started says that it saved then, and a snapshot for a replica is in no file.
        saved, started = int(facts["rdb_last_save_time"]), now - int(parse_info(server)["uptime_in_seconds"])
        if saved > started + 1 and now - saved <= FRESH_SECONDS and facts["rdb_last_bgsave_status"] == "ok":
            return True
        (answer,) = await _ask(connection, [["BGSAVE", "SCHEDULE"]])
        if isinstance(answer, ErrorReply):
            raise Unreachable(f"Redis refused BGSAVE: {answer}")
        return False
    finally:
        connection.close(ReplyLost("done"))


async def _open(addresses: Sequence[Address]) -> Connection:
    refused: ConnectFailed | None = None
    for address in addresses:
        try:
            return await connect(address, timeout=CONNECT_SECONDS)
        except LoginRefused as error:
            refused = error
        except ConnectFailed as error:
            raise Unreachable(f"Redis cannot be reached: {error.detail}") from error
    raise LoginLost("Redis accepts none of the passwords that the operator has") from refused


async def _ask(connection: Connection, commands: list[list[str]]) -> list[Any]:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await ask(connection, *commands)
    except (TimeoutError, RespError) as error:
        raise Unreachable("Redis stopped answering") from error


def _one_value(value: str) -> str:
    """CONFIG SET takes one argument where redis.conf may have several words."""
    return " ".join(shlex.split(value)) if value[:1] in ("'", '"') else value
