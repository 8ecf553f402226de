"""Pages call the API's handlers after a look of their own at who asks: none lets through whom the API refuses."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import pytest

from control.app import load_endpoints, load_pages
from control.http import Endpoint
from control.roles import PERMISSIONS, ROLES

LEVELS = ("public", "session", *ROLES, "platform")
"""What permissions ask for, from the least to the most."""


def pages_and_what_they_call() -> list[tuple[Endpoint, Endpoint]]:
    """Each page with each endpoint of the API whose handler it calls, itself or through the dashboard's helpers."""
    by_handler: dict[Callable[..., Any], list[Endpoint]] = {}
    for methods in load_endpoints().values():
        for endpoint in methods.values():
            by_handler.setdefault(endpoint.handler, []).append(endpoint)
    return [
        (page, endpoint)
        for methods in load_pages().values()
        for page in methods.values()
        for function in sorted(functions_in(page.handler, set()), key=lambda function: function.__qualname__)
        for endpoint in by_handler.get(function, [])
    ]


def functions_in(function: Any, seen: set[Any]) -> set[Any]:
    """The functions that one names, and those of the dashboard that it reaches so."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        named: Any = None
        if isinstance(node, ast.Name):
            named = function.__globals__.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = function.__globals__.get(node.value.id)
            named = getattr(module, node.attr, None) if isinstance(module, ModuleType) else None
        if isinstance(named, FunctionType) and named not in seen:
            seen.add(named)
            if named.__module__.startswith("control.dashboard."):
                functions_in(named, seen)
    return seen


def level(permission: str) -> int:
    if permission == "admin":  # of the platform; a role of that name only counts in an organization
        return LEVELS.index("platform")
    return LEVELS.index(permission if permission in ("public", "session") else PERMISSIONS[permission].role)


CALLS = pages_and_what_they_call()


def test_the_calls_are_found() -> None:
    found = {(page.path, endpoint.path) for page, endpoint in CALLS}
    assert ("/login", "/auth/login") in found
    assert ("/dashboard/{org_id}/keys", "/api/organizations/{org_id}/api-keys") in found
    assert len(found) >= 20


@pytest.mark.parametrize(
    ("page", "endpoint"),
    CALLS,
    ids=[f"{page.method} {page.path} - {endpoint.method} {endpoint.path}" for page, endpoint in CALLS],
)
def test_a_page_asks_for_no_less_than_what_it_calls(page: Endpoint, endpoint: Endpoint) -> None:
    assert page.permission == endpoint.permission or level(page.permission) > level(endpoint.permission), (
        f"{page.permission} lets through whom {endpoint.permission} refuses"
    )
