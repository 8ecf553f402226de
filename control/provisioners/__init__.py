"""Where instances come from: what every provisioner offers, and the choice among them.

A provisioner makes the world match a `Spec`. Each of its methods may be called again after a crash at any point of
the call before, and then finishes what that began; it reports what it found, and remembers nothing that it could not
find again. What is wanted, what was recorded and when to try again is the reconciler's business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable
from uuid import UUID

GATEWAY_USER: Final = "gateway"
"""The Redis user of managed instances that commands run as."""
ADMIN_USER: Final = "redisgate-admin"
"""The Redis user of managed instances that we administer them as."""
# What the gateway's user may not run, so that scripts cannot either. Administration is a category; what the flags do
# not tell is as in redisgate/policy.py: MIGRATE connects to any address it is told, the others leave the database.
GATEWAY_RULES: Final = (
    "~* &* +@all -@admin -migrate -move -select -swapdb -restore-asking"
    " -asking -readonly -readwrite -wait"
    # Read by the gateway for its clients, after a look at the arguments; not permitted to scripts by Redis itself.
    " +monitor +config|get"
).split()

OnStep = Callable[[str], None]
"""Called after each thing that was done to the world, with its name."""


class ProvisionError(Exception):
    """It did not work. The text is for the owner of the instance: no paths, no passwords.

    `permanent`: trying again will not help.
    """

    def __init__(self, reason: str, *, permanent: bool = False) -> None:
        super().__init__(reason)
        self.permanent = permanent


@dataclass(frozen=True)
class Spec:
    """What an instance is to be; sizes in bytes."""

    id: UUID
    max_memory: int
    redis_version: str | None
    persistence: bool
    backup: bool
    eviction: str
    user: str | None
    password: str | None = field(repr=False)
    next_password: str | None = field(default=None, repr=False)
    """To be accepted as well."""
    admin_password: str | None = field(default=None, repr=False)
    only_these_passwords: bool = True
    """Whether a password that Redis still accepts besides them is to be forgotten."""
    endpoint: Mapping[str, Any] | None = None
    """As it was recorded last."""
    process: Mapping[str, Any] | None = None
    """As it was recorded last."""
    organization_id: UUID | None = None
    slug: str = ""
    label: str = ""
    """Its name under the base domain."""
    cpu_request: str | None = None
    memory_request: str | None = None


@dataclass(frozen=True)
class Found:
    """What an instance is."""

    endpoint: dict[str, Any]
    redis_version: str | None
    process: dict[str, Any] | None = None
    warning: str | None = None
    """Something that its owner should know; None: nothing."""


class Provisioner(Protocol):
    """One way of having instances."""

    async def ensure(self, spec: Spec) -> Found:
        """Make it if need be, start it if need be, and let it be as the spec says.

        Raises:
            ProvisionError: it does not run, or not as wanted.
        """
        ...

    async def alive(self, spec: Spec) -> str | None:
        """None if it runs as it was recorded, else in words why not."""
        ...

    async def stop(self, spec: Spec) -> None:
        """End it in good order; its data stays.

        Raises:
            ProvisionError: it still runs.
        """
        ...

    async def destroy(self, spec: Spec) -> None:
        """Leave nothing of it.

        Raises:
            ProvisionError: something is left.
        """
        ...


@runtime_checkable
class LoadsSnapshots(Protocol):
    """A provisioner whose instances' data can be replaced by that of a snapshot (an RDB file)."""

    async def load(self, spec: Spec, upload: UUID) -> Found:
        """Replace an instance's data by that of an upload, which is removed. The old data is kept until the new runs.

        Raises:
            ProvisionError: the data is as it was; the instance may have been stopped meanwhile.
        """
        ...


def version_matches(wanted: str | None, version: str) -> bool:
    """Whether a version is what was asked for: the same major and minor number, as far as they were given."""
    if wanted is None:
        return True
    asked = wanted.split(".")[:2]
    return version.split(".")[: len(asked)] == asked
