"""What an organization may use: plans, quotas, what is used of them.

Every organization has one row in `quotas`, filled from its plan when it is made. Its own people may lower the limits
and raise them again up to the plan; above the plan only an administrator of the platform raises them.

That row is also what reservations lock: fifty requests that arrive together stand in line for it, and each counts what
those before it have committed. What is counted are the rows of instances and keys themselves; there is no counter
that could differ from them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from control.audit import Acting, record
from control.database import Connection, Record
from control.http import BadRequest, Forbidden, NotFound, QuotaExceeded, Said

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB
WARNING_PERCENT: Final = 90.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one organization may use; None is unlimited."""

    max_instances: int
    max_memory: int
    """Bytes, all instances together."""
    max_api_keys: int
    commands_per_day: int | None
    requests_per_second: int | None
    max_request_bytes: int | None


PLANS: Final[dict[str, Limits]] = {
    "free": Limits(5, 10 * GIB, 10, None, None, None),
    "pro": Limits(50, 100 * GIB, 100, None, None, None),
    "enterprise": Limits(500, 1024 * GIB, 1_000, None, None, None),
}
"""Commands are priced, not capped: an organization that wants a cap sets one for itself, and requests are in any case
bounded by the gateway's own limits."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an organization uses now."""

    instances: int
    memory: int
    """Bytes that its instances may fill."""
    api_keys: int
    commands_today: int
    """Since midnight UTC; right to the minute that is under way."""

    def percentages(self, limits: Limits) -> dict[str, float]:
        """How full each quota is, in percent with two decimals. What is unlimited has no percentage."""
        pairs: list[tuple[str, int, int | None]] = [
            ("instances", self.instances, limits.max_instances),
            ("memory", self.memory, limits.max_memory),
            ("api_keys", self.api_keys, limits.max_api_keys),
            ("commands", self.commands_today, limits.commands_per_day),
        ]
        return {name: _percent(used, allowed) for name, used, allowed in pairs if allowed is not None}


@dataclass(frozen=True, slots=True)
class Quota:
    """The limits of an organization, its plan, and what it uses."""

    organization_id: UUID
    plan: str
    limits: Limits
    usage: Usage

    def shown(self) -> dict[str, object]:
        """As the API shows it. Sizes in the units that the names tell, a GB being 2^30 bytes; null is unlimited."""
        limits, usage = self.limits, self.usage
        return {
            "plan": self.plan,
            "max_instances": limits.max_instances,
            "current_instances": usage.instances,
            "max_memory_gb": _number(limits.max_memory / GIB),
            "current_memory_mb": _number(usage.memory / MIB),
            "available_memory_mb": _number(max(0, limits.max_memory - usage.memory) / MIB),
            "max_api_keys": limits.max_api_keys,
            "current_api_keys": usage.api_keys,
            "max_commands_per_day": limits.commands_per_day,
            "current_commands_today": usage.commands_today,
            "max_requests_per_second": limits.requests_per_second,
            "max_request_size": limits.max_request_bytes,
        } | {f"{name}_percentage": percent for name, percent in usage.percentages(limits).items()}

    def warnings(self) -> list[str]:
        """What is nearly or wholly used up, for people."""
        limits, usage = self.limits, self.usage
        used = {
            "instances": f"{usage.instances} of {limits.max_instances} instances",
            "memory": f"{usage.memory / GIB:.2f} GB of {limits.max_memory / GIB:g} GB of memory",
            "api_keys": f"{usage.api_keys} of {limits.max_api_keys} API keys",
            "commands": f"{usage.commands_today} of {limits.commands_per_day} commands today",
        }
        return [
            f"{used[name]} are used ({percent:.0f} %)"
            for name, percent in usage.percentages(limits).items()
            if percent >= WARNING_PERCENT
        ]


def _percent(used: int, allowed: int) -> float:
    if allowed == 0:
        return 100.0
    return round(100 * used / allowed, 2)


def _number(value: float) -> int | float:
    """Without decimals where there are none to show."""
    return int(value) if value == int(value) else round(value, 3)


# Reading and setting


async def create_quota(connection: Connection, organization_id: UUID, plan: str) -> None:
    """The row of a new organization, from its plan."""
    limits = PLANS[plan]
    await connection.execute(
        "INSERT INTO quotas (organization_id, max_instances, max_memory, max_api_keys, commands_per_day,"
        " requests_per_second, max_request_bytes) VALUES ($1, $2, $3, $4, $5, $6, $7)",
        organization_id,
        *dataclasses.astuple(limits),
    )


async def get_quota(connection: Connection, organization_id: UUID) -> Quota:
    """Quota and usage.

    Raises:
        NotFound: there is no such organization.
    """
    row = await connection.fetchrow(
        "SELECT o.plan, q.* FROM quotas q JOIN organizations o ON o.id = q.organization_id"
        " WHERE q.organization_id = $1 AND o.deleted_at IS NULL",
        organization_id,
    )
    if row is None:
        raise NotFound("there is no such organization")
    return Quota(organization_id, row["plan"], _limits(row), await _usage(connection, organization_id))


async def set_quota(
    connection: Connection, acting: Acting, organization_id: UUID, wanted: dict[str, Any], *, platform_admin: bool
) -> Quota:
    """Set some limits, named as in `Limits`. Lower than what is used is allowed: nothing is taken away, nothing added.

    Raises:
        BadRequest: a limit that cannot be absent is None.
        Forbidden: a limit above the plan, and above what it is already, by somebody who is no administrator of the
            platform.
        NotFound: there is no such organization.
    """
    plan_name, old = await _lock(connection, organization_id)
    plan = PLANS[plan_name]
    missing = {
        name: "must be a number" for name in ("max_instances", "max_memory", "max_api_keys") if _is_none(wanted, name)
    }
    if missing:
        raise BadRequest("some limits cannot be unlimited", {_PUBLIC[name]: text for name, text in missing.items()})
    above = [
        name
        for name, value in wanted.items()
        if value != getattr(old, name) and _above(value, getattr(plan, name)) and _above(value, getattr(old, name))
    ]
    if above and not platform_admin:
        names = ", ".join(_PUBLIC[name] for name in above)
        raise Forbidden(
            f"{names}: the {plan_name} plan does not allow that much; only an administrator of the platform can raise"
            " an organization above its plan",
            {"plan": plan_name, "plan_limits": shown_limits(plan)},
        )
    new = dataclasses.replace(old, **wanted)
    if new != old:
        await connection.execute(
            "UPDATE quotas SET max_instances = $2, max_memory = $3, max_api_keys = $4, commands_per_day = $5,"
            " requests_per_second = $6, max_request_bytes = $7, updated_at = now() WHERE organization_id = $1",
            organization_id,
            *dataclasses.astuple(new),
        )
    quota = Quota(organization_id, plan_name, new, await _usage(connection, organization_id))
    if new != old:
        changed = {name for name in wanted if getattr(new, name) != getattr(old, name)}
        await record(
            connection,
            acting,
            "quota.update",
            ("organization", organization_id),
            {name: getattr(old, name) for name in sorted(changed)},
            {name: getattr(new, name) for name in sorted(changed)},
            organization_id=organization_id,
        )
    return quota


async def set_plan(connection: Connection, acting: Acting, organization_id: UUID, plan: str) -> Quota:
    """Move an organization to another plan, with that plan's limits. Who may do that is the caller's to decide.

    Raises:
        NotFound: there is no such organization.
    """
    old_plan, old = await _lock(connection, organization_id)
    limits = PLANS[plan]
    await connection.execute(
        "UPDATE organizations SET plan = $2, updated_at = now() WHERE id = $1", organization_id, plan
    )
    await connection.execute(
        "UPDATE quotas SET max_instances = $2, max_memory = $3, max_api_keys = $4, commands_per_day = $5,"
        " requests_per_second = $6, max_request_bytes = $7, updated_at = now() WHERE organization_id = $1",
        organization_id,
        *dataclasses.astuple(limits),
    )
    quota = Quota(organization_id, plan, limits, await _usage(connection, organization_id))
    await record(
        connection,
        acting,
        "organization.plan",
        ("organization", organization_id),
        {"plan": old_plan} | shown_limits(old),
        {"plan": plan} | shown_limits(limits),
        organization_id=organization_id,
    )
    return quota


_PUBLIC: Final = {
    "max_instances": "max_redis_instances",
    "max_memory": "max_memory_gb",
    "max_api_keys": "max_api_keys",
    "commands_per_day": "max_commands_per_day",
    "requests_per_second": "max_requests_per_second",
    "max_request_bytes": "max_request_size",
}


def shown_limits(limits: Limits) -> dict[str, object]:
    """Limits under the names that `PUT …/quota` takes."""
    values = dataclasses.asdict(limits) | {"max_memory": _number(limits.max_memory / GIB)}
    return {public: values[name] for name, public in _PUBLIC.items()}


def _is_none(wanted: dict[str, Any], name: str) -> bool:
    return name in wanted and wanted[name] is None


def _above(value: int | None, limit: int | None) -> bool:
    return limit is not None and (value is None or value > limit)


# Reservations


async def reserve_instance(
    connection: Connection, organization_id: UUID, max_memory: int, *, instance_id: UUID | None = None
) -> None:
    """Make sure that one more instance of `max_memory` bytes fits, and let nobody else reserve until this transaction
    ends: insert its row before that.

    With `instance_id`, that instance's memory becomes `max_memory`, or it comes back from deletion: it is not counted
    beside itself, and making it smaller is always allowed.

    Raises:
        QuotaExceeded: it does not fit; `data` has the numbers.
        NotFound: there is no such organization.
    """
    _, limits = await _lock(connection, organization_id)
    used = await connection.fetchrow(
        "SELECT count(*) AS instances, coalesce(sum(max_memory), 0)::bigint AS memory,"
        " max(max_memory) FILTER (WHERE id = $2) AS own FROM instances"
        " WHERE organization_id = $1 AND counts_against_quota",
        organization_id,
        instance_id,
    )
    assert used is not None
    own: int | None = used["own"]
    instances, memory = used["instances"] - (own is not None), used["memory"] - (own or 0)
    if own is None and instances + 1 > limits.max_instances:
        raise QuotaExceeded(
            Said(
                "quota_instances",
                "{used} of {limit} instances are used; delete one, or ask for a larger quota",
                used=instances,
                limit=limits.max_instances,
            ),
            {"quota": "max_instances", "limit": limits.max_instances, "used": instances, "requested": 1},
        )
    if memory + max_memory > limits.max_memory and (own is None or max_memory > own):
        raise QuotaExceeded(
            Said(
                "quota_memory",
                "{used} MiB of {limit} MiB of memory are used, so {more} MiB do not fit; ask for less, free some, or"
                " ask for a larger quota",
                used=f"{memory / MIB:g}",
                limit=f"{limits.max_memory / MIB:g}",
                more=f"{max_memory / MIB:g}",
            ),
            {
                "quota": "max_memory_gb",
                "limit": limits.max_memory,
                "used": memory,
                "requested": max_memory,
                "unit": "bytes",
            },
        )


async def reserve_api_key(connection: Connection, organization_id: UUID) -> None:
    """Make sure that one more API key fits, and let nobody else reserve until this transaction ends: insert its row
    before that. Keys that were revoked, expired or rotated away do not count.

    Raises:
        QuotaExceeded: it does not fit; `data` has the numbers.
        NotFound: there is no such organization.
    """
    _, limits = await _lock(connection, organization_id)
    used = await connection.fetchval(_LIVE_KEYS, organization_id)
    if used + 1 > limits.max_api_keys:
        raise QuotaExceeded(
            Said(
                "quota_keys",
                "{used} of {limit} API keys are used; revoke one, or ask for a larger quota",
                used=used,
                limit=limits.max_api_keys,
            ),
            {"quota": "max_api_keys", "limit": limits.max_api_keys, "used": used, "requested": 1},
        )


_LIVE_KEYS: Final = (
    "SELECT count(*) FROM api_keys WHERE organization_id = $1 AND revoked_at IS NULL AND valid_until IS NULL"
    " AND expires_at > now()"
)


async def _lock(connection: Connection, organization_id: UUID) -> tuple[str, Limits]:
    """Plan and limits; the quota row is ours until the transaction ends.

    What is read in the same statement that waits for a lock may be older than the lock; so the organization, and later
    the counts, are read by statements of their own, which see all that was committed meanwhile.
    """
    row = await connection.fetchrow("SELECT * FROM quotas WHERE organization_id = $1 FOR UPDATE", organization_id)
    plan = await connection.fetchval(
        "SELECT plan FROM organizations WHERE id = $1 AND deleted_at IS NULL", organization_id
    )
    if row is None or plan is None:
        raise NotFound("there is no such organization")
    return plan, _limits(row)


async def lock_usage(connection: Connection, organization_id: UUID) -> Usage:
    """What is used, while nobody can reserve anything until this transaction ends.

    Raises:
        NotFound: there is no such organization.
    """
    await _lock(connection, organization_id)
    return await _usage(connection, organization_id)


def _limits(row: Record) -> Limits:
    return Limits(**{field.name: row[field.name] for field in dataclasses.fields(Limits)})


async def _usage(connection: Connection, organization_id: UUID) -> Usage:
    row = await connection.fetchrow(
        "SELECT count(*) AS instances, coalesce(sum(max_memory), 0)::bigint AS memory FROM instances"
        " WHERE organization_id = $1 AND counts_against_quota",
        organization_id,
    )
    assert row is not None
    keys = await connection.fetchval(_LIVE_KEYS, organization_id)
    commands = await connection.fetchval(
        "SELECT coalesce(sum(commands), 0)::bigint FROM usage"
        " WHERE organization_id = $1 AND step = 'minute' AND at >= date_trunc('day', now(), 'UTC')",
        organization_id,
    )
    return Usage(row["instances"], row["memory"], keys, commands)
