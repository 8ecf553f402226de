"""Makes templates/static/js/hints.js, what the command line completes with: commands that may run, and their arguments.

    python -m control.hints redis://127.0.0.1:6379 > templates/static/js/hints.js

From the COMMAND DOCS of a server of version 7 or newer, as far as the policy lets a member run a command, and the
servers that the service runs itself let the gateway.
"""

import asyncio
import json
import sys
from typing import Any

from control.provisioners import GATEWAY_RULES
from redisgate.policy import Policy, Scope
from resp.address import parse_url
from resp.commands import Command, bundled_table
from resp.pool import Pool

_HEAD = "// Made by `python -m control.hints`: commands of Redis and their arguments, for the command line.\n\n"


async def docs(url: str) -> Any:
    """The server's COMMAND DOCS."""
    pool = Pool(parse_url(url))
    try:
        return await pool.call(b"COMMAND", b"DOCS")
    finally:
        pool.abort()


def hints(reply: Any) -> dict[str, str]:
    """By the name of each command that may run, what follows it."""
    table = bundled_table()
    policy = Policy(table, Scope())
    found = {"MULTI": "", "EXEC": "", "DISCARD": ""}  # which the console takes in pasted lines
    for name, entry in _pairs(reply).items():
        about = _pairs(entry)
        subcommands = _pairs(about.get("subcommands", []))
        for full, sub in subcommands.items() if subcommands else ((name, entry),):
            words = full.upper().split("|")
            argv = [word.encode() for word in words]
            rule = policy.rule(argv[0])
            # Arguments that every check of the arguments lets through.
            if rule is None or rule.refusal is not None or _refused(rule.check([*argv, b"0", b"0", b"0"])):
                continue
            command = table.find(argv)
            if command is None or not _permitted(command):
                continue
            found[" ".join(words)] = " ".join(_argument(one) for one in _pairs(sub).get("arguments", []))
    return dict(sorted(found.items()))


def _permitted(command: Command) -> bool:
    """Whether the rules of the gateway's user permit it: the last that speaks of it decides."""
    name = command.name.decode().lower()
    permitted = False
    for rule in GATEWAY_RULES:
        subject = rule[1:]
        categories = {f"@{category}" for category in command.categories}
        if rule[0] in "+-" and subject in {"@all", name, name.partition("|")[0], *categories}:
            permitted = rule[0] == "+"
    return permitted


def _refused(verdict: Any) -> bool:
    return (
        verdict.refusal is not None
        and b"wrong number" not in verdict.refusal
        and b"only settings" not in verdict.refusal
    )


def _pairs(flat: Any) -> dict[str, Any]:
    return {key.decode(): value for key, value in zip(flat[::2], flat[1::2], strict=True)}


def _argument(flat: Any) -> str:
    """One argument as the documentation writes it: [NX | XX], key [key ...]."""
    about = _pairs(flat)
    flags = {flag.decode() for flag in about.get("flags", [])}
    kind, token = about["type"].decode(), about.get("token", b"").decode()
    inner = [_argument(one) for one in about.get("arguments", [])]
    if kind == "oneof":
        text = " | ".join(inner)
        if "optional" not in flags:
            text = f"<{text}>"
    elif kind == "block":
        text = " ".join(inner)
    elif kind == "pure-token":
        text = token
    else:
        text = about.get("display_text", about["name"]).decode()
    if token and kind != "pure-token":
        text = f"{token or chr(34) * 2} {text}"
    if "multiple" in flags:
        again = text if "multiple_token" in flags or not token else text.removeprefix(f"{token} ")
        text = f"{text} [{again} ...]"
    return f"[{text}]" if "optional" in flags else text


if __name__ == "__main__":
    made = hints(asyncio.run(docs(sys.argv[1])))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(arguments)}" for name, arguments in made.items())
    sys.stdout.write(f"{_HEAD}export const hints = {{\n{lines},\n}};\n")
