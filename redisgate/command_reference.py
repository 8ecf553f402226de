"""The page of commands by family, made from the command table and the policy: docs/commands.md.

`python -m redisgate.command_reference > docs/commands.md`; a test compares.
"""

from redisgate.policy import Policy, Scope
from resp.commands import Command, bundled_table

_FAMILIES = (
    ("Strings", "string"),
    ("Bitmaps", "bitmap"),
    ("Hashes", "hash"),
    ("Lists", "list"),
    ("Sets", "set"),
    ("Sorted sets", "sortedset"),
    ("Geospatial", "geo"),
    ("HyperLogLog", "hyperloglog"),
    ("Streams", "stream"),
    ("Scripts and functions", "scripting"),
    ("Transactions", "transaction"),
    ("Pub/Sub", "pubsub"),
    ("Connection", "connection"),
    ("Keys", "keyspace"),
    ("Server", ""),
)
"""Titles, and the categories of Redis that decide; the first that fits has the command."""
_ORDER = ("bitmap", "geo", "hyperloglog", "transaction", "pubsub", "scripting", "connection")
"""Looked at before the others: a bitmap is a string to Redis as well."""

_HEAD = """\
# Commands by family

<!-- Made by `python -m redisgate.command_reference`; change redisgate/policy.py instead. -->

What a token without limits may run, on a Redis 7.0; newer servers and modules (JSON, search, time series) are asked for
their commands when they are used. **Refused** commands are answered 400 with the reason given here. How to send them,
and what is refused only with certain options: [REST API](rest-api.md).
"""


def commands_page() -> str:
    """The text of docs/commands.md."""
    table = bundled_table()
    policy = Policy(table, Scope())
    families: dict[str, list[Command]] = {title: [] for title, _ in _FAMILIES}
    for command in table:
        families[_family(command)].append(command)
    parts = [_HEAD]
    for title, commands in families.items():
        parts.append(f"## {title}\n")
        offered: list[str] = []
        refused: dict[str, list[str]] = {}
        for command in sorted(commands, key=lambda command: command.name):
            for one in command.subcommands.values() or (command,):
                reason = _refusal(policy, one)
                name = f"`{one.name.decode().replace('|', ' ')}`"
                if reason is None:
                    offered.append(name + (" (reads)" if "readonly" in one.flags else ""))
                else:
                    refused.setdefault(reason, []).append(name)
        if offered:
            parts.append(", ".join(offered) + ".\n")
        if refused:
            parts += ["| refused | because |", "| --- | --- |"]
            parts += [f"| {', '.join(names)} | {reason} |" for reason, names in refused.items()]
            parts.append("")
    return "\n".join(parts)


def _family(command: Command) -> str:
    every = {category.lstrip("@") for one in (command, *command.subcommands.values()) for category in one.categories}
    for category in (*_ORDER, *(category for _, category in _FAMILIES if category not in _ORDER)):
        if category in every:
            return next(title for title, own in _FAMILIES if own == category)
    return "Server"


def _refusal(policy: Policy, command: Command) -> str | None:
    container, _, subcommand = command.name.partition(b"|")
    rule = policy.rule(container)
    assert rule is not None, command
    length = max(abs(command.arity), 2 if subcommand else 1)
    argv = [container, *([subcommand] if subcommand else [])]
    argv += [b"1"] * (length - len(argv))
    line = rule.refusal or rule.check(argv).refusal
    if line is None:
        return None
    text = line.decode()
    _, said, reason = text.partition(": ")
    return reason if said else text


if __name__ == "__main__":
    print(commands_page(), end="")
