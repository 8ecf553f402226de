"""The table of permissions, and the page of the documentation that is made from it."""

import re
from pathlib import Path

import pytest

from control.app import load_endpoints
from control.http import ENDPOINTS, SPECIAL_PERMISSIONS, endpoint
from control.roles import PERMISSIONS, ROLES, allows, is_managing_scope, markdown_table, may_grant, rank

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"


def test_each_role_may_do_what_those_below_it_may() -> None:
    for permission in PERMISSIONS:
        may = [allows(role, permission) for role in ROLES]
        assert may == sorted(may)
        assert may[-1], "an owner may do everything"


def test_viewers_only_read_and_leave() -> None:
    allowed = {name for name in PERMISSIONS if allows("viewer", name)}
    assert {name for name in allowed if not PERMISSIONS[name].reads} == {"organization.leave", "console.read"}


def test_every_permission_is_used_and_every_route_has_one() -> None:
    load_endpoints()
    used = {entry.permission for entry in ENDPOINTS.values()}
    assert used <= set(PERMISSIONS) | set(SPECIAL_PERMISSIONS)
    assert set(PERMISSIONS) - used == set()


def test_a_route_without_a_decision_cannot_be_registered() -> None:
    with pytest.raises(ValueError, match=r"no permission 'made\.up'"):
        endpoint("GET", "/api/organizations/{org_id}/made-up", permission="made.up", summary="")
    with pytest.raises(ValueError, match="org_id"):
        endpoint("GET", "/api/made-up", permission="quota.read", summary="")


def test_reading_is_by_get_and_by_nothing_else() -> None:
    load_endpoints()
    for entry in ENDPOINTS.values():
        if entry.permission in PERMISSIONS and PERMISSIONS[entry.permission].reads:
            assert entry.method == "GET", str(entry)


@pytest.mark.parametrize(
    ("scopes", "permission", "expected"),
    [
        ([], "instances.read", False),
        (["read", "write"], "instances.read", False),
        (["*"], "instances.read", False),
        ([".*"], "instances.read", False),
        (["manage"], "organization.delete", True),
        (["manage:read"], "instances.read", True),
        (["manage:read"], "instances.credentials", False),
        (["manage:read"], "instances.create", False),
        (["instances.*"], "instances.delete", True),
        (["instances.*"], "api_keys.read", False),
        (["instances.create"], "instances.create", True),
        (["instances.create"], "instances.read", False),
        (["instances"], "instances.read", False),
        (["read", "quota.read"], "quota.read", True),
    ],
    ids=str,
)
def test_scopes_narrow_what_an_api_key_may(scopes: list[str], permission: str, expected: bool) -> None:
    assert allows("owner", permission, scopes) is expected
    if expected:
        assert all(allows(role, permission, scopes) is allows(role, permission) for role in ROLES)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("manage", True),
        ("manage:read", True),
        ("instances.*", True),
        ("instances.create", True),
        ("instances.fly", False),
        ("nothing.*", False),
        ("*", False),
        ("read", False),
        ("", False),
    ],
)
def test_scopes_for_managing_name_what_exists(scope: str, expected: bool) -> None:
    assert is_managing_scope(scope) is expected


@pytest.mark.parametrize("own", ROLES)
def test_nobody_grants_above_themselves(own: str) -> None:
    assert [role for role in ROLES if may_grant(own, role)] == list(ROLES[: rank(own) + 1])


def test_what_is_not_in_the_table_is_an_error() -> None:
    with pytest.raises(KeyError):
        allows("owner", "made.up")
    with pytest.raises(ValueError, match="king"):
        allows("king", "quota.read")


def test_the_page_shows_the_table() -> None:
    """If this fails: python -m control.roles"""
    match = re.search(r"<!-- roles:[^>]*-->\n(.*?)<!-- end of roles -->", SECURITY.read_text(), re.DOTALL)
    assert match is not None
    assert match[1] == markdown_table()
