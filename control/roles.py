"""Who may do what: one table, from which the checks, the tests and docs/security.md are made.

A permission is named `<what>.<act>`. Every route of the control plane names one (or is public, for any signed-in
user, or for administrators of the platform), and a route whose permission is not in the table cannot be registered.

An API key acts for the person who made it: it may do what both its scopes and that person's role allow. Its scopes
for managing are permissions (`instances.create`), groups (`instances.*`), `manage:read` (everything that only reads)
and `manage` (everything that its maker may do).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROLES: Final = ("viewer", "member", "admin", "owner")
"""From the least to the most; each role may do what those before it may."""

MANAGE: Final = "manage"
MANAGE_READ: Final = "manage:read"


@dataclass(frozen=True)
class Permission:
    """One thing to be allowed: `role` is the lowest role that may do it."""

    name: str
    role: str
    description: str
    reads: bool = False
    """It changes nothing and shows no secret."""
    people: bool = False
    """Whoever signed in as a person may; no API key, whatever its scopes."""


_TABLE: tuple[Permission, ...] = (
    Permission("organization.read", "viewer", "see the organization", reads=True),
    Permission("organization.update", "admin", "rename the organization"),
    Permission("organization.delete", "owner", "delete the organization"),
    Permission("organization.leave", "viewer", "leave the organization"),
    Permission("members.read", "viewer", "see who belongs to it", reads=True),
    Permission("members.update", "admin", "change a member's role, up to one's own"),
    Permission("members.remove", "admin", "remove a member whose role is not above one's own"),
    Permission("invitations.read", "admin", "see open invitations", reads=True),
    Permission("invitations.create", "admin", "invite somebody, with a role up to one's own"),
    Permission("invitations.revoke", "admin", "take an invitation back"),
    Permission("quota.read", "viewer", "see quotas and what is used of them", reads=True),
    Permission("quota.update", "admin", "set quotas, up to the plan"),
    Permission("audit.read", "admin", "read and export the audit log", reads=True),
    Permission("instances.read", "viewer", "see instances, their health and their addresses", reads=True),
    Permission("instances.create", "member", "create an instance"),
    Permission("instances.update", "member", "rename an instance, change its memory or eviction"),
    Permission("instances.status", "member", "start, stop, restart or reconcile an instance"),
    Permission("instances.credentials", "member", "see an instance's REST tokens"),
    Permission("instances.backup", "member", "download an instance's data"),
    Permission("instances.load", "admin", "replace an instance's data by an RDB file"),
    Permission("instances.rotate", "admin", "replace an instance's tokens and password"),
    Permission("instances.delete", "admin", "delete an instance"),
    Permission("instances.restore", "admin", "restore a deleted instance"),
    Permission("api_keys.read", "viewer", "see API keys, never the secret", reads=True),
    Permission("api_keys.create", "member", "create an API key"),
    Permission("api_keys.update", "member", "rename an API key; another person's: admin"),
    Permission("api_keys.rotate", "member", "replace an API key; another person's: admin"),
    Permission("api_keys.revoke", "member", "revoke an API key; another person's: admin"),
    Permission("console.read", "viewer", "look at an instance's data in the console", people=True),
    Permission(
        "console.write", "member", "change an instance's data in the console, and watch its commands", people=True
    ),
    Permission("usage.read", "viewer", "see usage and cost", reads=True),
)

PERMISSIONS: Final[dict[str, Permission]] = {permission.name: permission for permission in _TABLE}


def rank(role: str) -> int:
    """How high a role stands, from 0.

    Raises:
        ValueError: there is no such role.
    """
    if role not in ROLES:
        raise ValueError(f"there is no role {role!r}")
    return ROLES.index(role)


def allows(role: str, permission: str, scopes: Iterable[str] | None = None) -> bool:
    """Whether a role has a permission; with `scopes`, whether an API key of such a person has it.

    Raises:
        KeyError: there is no such permission.
    """
    entry = PERMISSIONS[permission]
    if rank(role) < rank(entry.role):
        return False
    return scopes is None or any(_covers(scope, entry) for scope in scopes)


def is_managing_scope(scope: str) -> bool:
    """Whether a scope of an API key speaks of managing, and of something that exists."""
    return scope in (MANAGE, MANAGE_READ) or any(
        scope in (name, name.partition(".")[0] + ".*") for name, entry in PERMISSIONS.items() if not entry.people
    )


def may_grant(own: str, role: str) -> bool:
    """Whether somebody with the role `own` may give, change or take away `role`: nobody reaches above themselves."""
    return rank(role) <= rank(own)


def _covers(scope: str, permission: Permission) -> bool:
    if permission.people:
        return False
    if scope == MANAGE or scope == permission.name:
        return True
    if scope == MANAGE_READ:
        return permission.reads
    return scope.endswith(".*") and permission.name.startswith(scope[:-1])


def markdown_table() -> str:
    """The table as docs/security.md shows it."""
    lines = ["| permission | allows to | " + " | ".join(ROLES) + " |", "| --- | --- |" + " --- |" * len(ROLES)]
    for permission in PERMISSIONS.values():
        marks = " | ".join("✓" if allows(role, permission.name) else "" for role in ROLES)
        lines.append(f"| `{permission.name}` | {permission.description} | {marks} |")
    return "\n".join(lines) + "\n"


def update_page(text: str) -> str:
    """docs/security.md with the table as it is now."""
    head, begin, rest = text.partition("<!-- roles:")
    mark, _, rest = rest.partition("\n")
    _, end, tail = rest.partition("<!-- end of roles -->")
    return f"{head}{begin}{mark}\n{markdown_table()}{end}{tail}"


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "security.md"
    page.write_text(update_page(page.read_text()))
