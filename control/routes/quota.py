"""Quotas over HTTP."""

from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType

from control.http import ApiRequest, endpoint
from control.quotas import GIB, Quota, get_quota, set_quota

TAGS: Final = ["Quota"]

Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Gigabytes = Annotated[float, Meta(ge=0, le=1_000_000)]
PositiveInt = Annotated[int, Meta(ge=1, le=2_147_483_647)]
PositiveBigInt = Annotated[int, Meta(ge=1, le=2**53)]


class QuotaAndUse(msgspec.Struct):
    """Limits and what is used of them; a GB is 2^30 bytes, an MB 2^20. Null is unlimited."""

    plan: str
    max_instances: int
    current_instances: int
    max_memory_gb: float
    current_memory_mb: float
    available_memory_mb: float
    max_api_keys: int
    current_api_keys: int
    max_commands_per_day: int | None
    current_commands_today: int
    max_requests_per_second: int | None
    max_request_size: int | None
    instances_percentage: float
    memory_percentage: float
    api_keys_percentage: float
    commands_percentage: float | UnsetType = UNSET


class QuotaReport(msgspec.Struct):
    """A quota, and texts about what is used up from 90 % on."""

    quota: QuotaAndUse
    warnings: list[str]


class SetQuota(msgspec.Struct):
    """What changes; what is absent stays. Null is unlimited, where the plan allows it. `max_request_size` in bytes."""

    max_redis_instances: Count | UnsetType = UNSET
    max_memory_gb: Gigabytes | UnsetType = UNSET
    max_api_keys: Count | UnsetType = UNSET
    max_commands_per_day: PositiveBigInt | UnsetType | None = UNSET
    max_requests_per_second: PositiveInt | UnsetType | None = UNSET
    max_request_size: PositiveBigInt | UnsetType | None = UNSET


def _report(quota: Quota) -> dict[str, object]:
    return {"quota": quota.shown(), "warnings": quota.warnings()}


@endpoint(
    "GET",
    "/api/organizations/{org_id}/quota",
    permission="quota.read",
    response=QuotaReport,
    summary="Quota and what is used of it",
    tags=TAGS,
)
async def read_quota(request: ApiRequest) -> object:
    """Limits, what is used, percentages, and warnings from 90 % on."""
    async with request.context.database.connection() as connection:
        return _report(await get_quota(connection, request.organization_id))


@endpoint(
    "PUT",
    "/api/organizations/{org_id}/quota",
    permission="quota.update",
    body=SetQuota,
    response=QuotaReport,
    summary="Set the quota",
    tags=TAGS,
    message="the quota is set",
)
async def put_quota(request: ApiRequest, body: SetQuota) -> object:
    """Up to the plan; above it only administrators of the platform raise a limit. A limit below what is used takes
    nothing away; it lets nothing be added."""
    given: dict[str, Any] = {
        "max_instances": body.max_redis_instances,
        "max_memory": UNSET if isinstance(body.max_memory_gb, UnsetType) else round(body.max_memory_gb * GIB),
        "max_api_keys": body.max_api_keys,
        "commands_per_day": body.max_commands_per_day,
        "requests_per_second": body.max_requests_per_second,
        "max_request_bytes": body.max_request_size,
    }
    wanted = {name: value for name, value in given.items() if not isinstance(value, UnsetType)}
    async with request.context.database.transaction() as connection:
        quota = await set_quota(
            connection, request, request.organization_id, wanted, platform_admin=request.principal.is_admin
        )
    return _report(quota)
