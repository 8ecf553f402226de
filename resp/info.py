"""Asking a Redis about itself: a few commands on a connection of their own, and what INFO answers.

For places off the straight line of a request, where a reply may become Python objects.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from resp.connection import Connection, FutureWaiter
from resp.encoder import encode_commands
from resp.parser import ErrorReply, Parser


async def ask(connection: Connection, *commands: Sequence[str]) -> list[Any]:
    """The replies to these commands as text, in order; an error reply is an `ErrorReply` among them.

    Waits without end: whoever asks says how long, by `asyncio.timeout`.

    Raises:
        RespError: the connection was lost, or what came is not RESP.
    """
    waiter = FutureWaiter(len(commands), asyncio.get_running_loop())
    connection.send(encode_commands([[word.encode() for word in command] for command in commands]), waiter)
    return Parser(text=True).parse(await waiter.future, len(commands))


def parse_info(reply: object) -> dict[str, str]:
    """The fields of a reply to INFO; none where the user may not run it.

    https://redis.io/docs/latest/commands/info/
    """
    if isinstance(reply, bytes):
        reply = reply.decode("utf-8", "replace")
    if not isinstance(reply, str) or isinstance(reply, ErrorReply):
        return {}
    return dict(line.split(":", 1) for line in reply.splitlines() if ":" in line)


def server_version(info: Mapping[str, str]) -> str | None:
    """The version among these fields. Valkey gives its own, and in `redis_version` the Redis that it stands for."""
    return info.get("valkey_version") or info.get("redis_version")
