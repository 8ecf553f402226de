"""What several areas of the dashboard do alike: confirmations, paging, names for ids."""

from collections.abc import Iterable
from typing import Any, Final
from uuid import UUID

from control.database import Connection
from control.http import MAX_PAGE, BadRequest
from control.pages import PageRequest

PAGE_SIZE: Final = 25
"""Rows of a list on one page."""
MAX_SEARCH: Final = 100
"""Characters of what is searched for."""


def check_confirmed(request: PageRequest, name: str) -> None:
    """Whether the name was typed that a destructive form asks for; white space does not count.

    Raises:
        BadRequest: it was not.
    """
    if one_line(request.form.get("confirm")) != one_line(name):
        raise BadRequest(request.texts("common.name_differs"))


def one_line(name: str) -> str:
    """A name as a form's field can take it."""
    return " ".join(name.split())


def page_number(request: PageRequest) -> int:
    """Which page of a list; what is no number is the first."""
    text = request.query.get("page", "1")
    return min(max(int(text), 1), MAX_PAGE) if text.isascii() and text.isdigit() and len(text) < 9 else 1


def page_count(total: int, size: int = PAGE_SIZE) -> int:
    """How many pages a list has."""
    return max(1, -(-total // size))


async def people(connection: Connection, ids: Iterable[UUID | None]) -> dict[UUID, str]:
    """E-mail addresses of people."""
    rows = await connection.fetch("SELECT id, email FROM users WHERE id = ANY ($1)", _known(ids))
    return {row["id"]: row["email"] for row in rows}


async def instance_names(connection: Connection, ids: Iterable[UUID | None]) -> dict[UUID, str]:
    """Names of instances, also of those that were deleted."""
    rows = await connection.fetch("SELECT id, name FROM instances WHERE id = ANY ($1)", _known(ids))
    return {row["id"]: row["name"] for row in rows}


def _known(ids: Iterable[Any]) -> list[Any]:
    return list({one for one in ids if one is not None})
