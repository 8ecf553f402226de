"""Audit events for people: who, what, to what, and what changed, line by line."""

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

import msgspec

from control.dashboard.forms import instance_names, people
from control.database import Connection

MAX_VALUE: Final = 300
"""Characters of one value in a list of changes."""


async def described(connection: Connection, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events with names for what they are about, and with their changes."""
    ids: dict[str, list[UUID]] = {"user": [], "instance": [], "api_key": [], "organization": [], "invitation": []}
    for event in events:
        target = event["target"]
        if target["kind"] in ids and _uuid(target["id"]) is not None:
            ids[target["kind"]].append(UUID(target["id"]))
    names: dict[str, dict[UUID, str]] = {
        "user": await people(connection, ids["user"]) if ids["user"] else {},
        "instance": await instance_names(connection, ids["instance"]) if ids["instance"] else {},
    }
    for kind, column, table in (
        ("api_key", "name", "api_keys"),
        ("organization", "name", "organizations"),
        ("invitation", "email", "invitations"),
    ):
        if ids[kind]:
            rows = await connection.fetch(f"SELECT id, {column} FROM {table} WHERE id = ANY ($1)", ids[kind])
            names[kind] = {row["id"]: row[column] for row in rows}
    return [
        event
        | {
            "about": _name(names, event["target"]),
            "changes": changes(event["before"], event["after"]),
        }
        for event in events
    ]


def grouped(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Described events, of equal neighbours the first, with their number as `times`: for a short list."""
    found: list[dict[str, Any]] = []
    for event in events:
        if found and _gist(found[-1]) == _gist(event):
            found[-1]["times"] += 1
        else:
            found.append(event | {"times": 1})
    return found


def _gist(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["action"], event["target"], event["outcome"], event["actor"]["kind"], event["actor"]["name"]


def _name(names: dict[str, dict[UUID, str]], target: dict[str, Any]) -> str | None:
    found = _uuid(target["id"])
    return None if found is None else names.get(target["kind"], {}).get(found)


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text or "")
    except ValueError:
        return None


def changes(before: Any, after: Any) -> list[tuple[str, str | None, str | None]]:
    """What differs: a name, the value before, the value after; None where there was none."""
    old, new = _mapping(before), _mapping(after)
    found = []
    for name in dict.fromkeys([*old, *new]):
        was, now = _value(old, name), _value(new, name)
        if was != now:
            found.append((name, was, now))
    return found


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _value(values: dict[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        text = ", ".join(value)
    else:
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}…"
