"""What an organization may use, what it uses, and what that costs."""

import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.responses import Response

from control import quotas, usage
from control.charts import Chart, Line, bins
from control.dashboard.overview import warnings
from control.http import ApiError, BadRequest, convert_body
from control.pages import PageRequest, page, redirect, render
from control.quotas import GIB, MIB
from control.routes import quota as routes
from control.routes.quota import SetQuota
from redisgate.units import bytes_text, number_text

_PATH: Final = "/dashboard/{org_id}/quota"
SPANS: Final[dict[str, tuple[timedelta, timedelta, str]]] = {
    "24h": (timedelta(hours=24), timedelta(hours=1), "hour"),
    "7d": (timedelta(days=7), timedelta(hours=3), "hour"),
    "30d": (timedelta(days=30), timedelta(days=1), "day"),
    "365d": (timedelta(days=365), timedelta(days=5), "day"),
}
"""How far a chart of the organization's usage goes back, in which steps, and from which rows it is made."""
_SUMMED: Final = ("commands", "reads", "writes", "requests", "errors", "bytes_in", "bytes_out", "cost")
_NULLABLE: Final = ("max_commands_per_day", "max_requests_per_second", "max_request_size")


def span_of(request: PageRequest) -> str:
    """The span that the address names, else the last 30 days."""
    wanted = request.query.get("span", "30d")
    return wanted if wanted in SPANS else "30d"


@page("GET", _PATH, permission="quota.read")
async def quota(request: PageRequest) -> Response:
    """Limits, and what is used."""
    return await _quota(request)


async def _quota(request: PageRequest, error: ApiError | None = None) -> Response:
    context, settings = request.context, request.context.settings
    span = span_of(request)
    times, points = await _points(request, span)
    now = context.now()
    async with context.database.connection() as connection:
        found = await quotas.get_quota(connection, request.organization_id)
        costs = await usage.costs(connection, settings, request.organization_id, now - SPANS["30d"][0], now)
    total = {name: sum(item[name] for item in costs) for name in ("commands", "bytes_in", "bytes_out")}
    return await render(
        request,
        "organization/quota.html",
        error=error,
        quota=found,
        plan=quotas.PLANS[found.plan],
        shown=shown(found.limits),
        plan_shown=shown(quotas.PLANS[found.plan]),
        warnings=warnings(request, found),
        span=span,
        spans=SPANS,
        charts=_charts(request, SPANS[span][1], times, points),
        costs=costs,
        total=total,
        cost=usage.cost(settings, total["commands"], total["bytes_in"] + total["bytes_out"]),
        priced=bool(settings.price_per_100k_commands or settings.price_per_gb),
        prices=(settings.price_per_100k_commands, settings.price_per_gb),
    )


async def _points(request: PageRequest, span: str) -> tuple[list[datetime], list[dict[str, Any]]]:
    """The times of a span, and what was used in each."""
    context = request.context
    length, step, source = SPANS[span]
    times = bins(length, step, context.now())
    points: list[dict[str, Any]] = [dict.fromkeys(_SUMMED, 0) for _ in times]
    async with context.database.connection() as connection:
        found = await usage.series(
            connection, context.settings, request.organization_id, source, times[0], times[-1] + step
        )
    for point in found["series"]:
        into = points[(point["at"] - times[0]) // step]
        for name in _SUMMED:
            into[name] += point[name]
    return times, points


def _charts(request: PageRequest, step: timedelta, times: list[datetime], points: list[dict[str, Any]]) -> list[Chart]:
    t = request.texts

    def line(text: str, *names: str) -> Line:
        return Line(t(text), [sum(point[name] for name in names) for point in points])

    return [
        Chart(
            "commands",
            t("organization.usage.commands"),
            times[0],
            step,
            [line("organization.usage.reads", "reads"), line("organization.usage.writes", "writes")],
            number_text,
        ),
        Chart(
            "traffic",
            t("organization.usage.traffic"),
            times[0],
            step,
            [line("organization.usage.bytes_in", "bytes_in"), line("organization.usage.bytes_out", "bytes_out")],
            bytes_text,
            binary=True,
        ),
    ]


def shown(limits: quotas.Limits) -> dict[str, str]:
    """Limits as the fields of a form: text, empty where there is none."""
    values = {
        "max_redis_instances": limits.max_instances,
        "max_memory_gb": f"{limits.max_memory / GIB:.15g}",
        "max_api_keys": limits.max_api_keys,
        "max_commands_per_day": limits.commands_per_day,
        "max_requests_per_second": limits.requests_per_second,
        "max_request_size": None if limits.max_request_bytes is None else f"{limits.max_request_bytes / MIB:.15g}",
    }
    return {name: "" if value is None else str(value) for name, value in values.items()}


def wanted_quota(request: PageRequest) -> SetQuota:
    """What a form of limits asks for; a limit that is left empty is none. Raises BadRequest."""
    values: dict[str, Any] = {}
    for name in shown(quotas.PLANS["free"]):
        if request.form.has(name):
            text = request.form.get(name)
            if text or name in _NULLABLE:
                values[name] = text or None
    size = values.get("max_request_size")
    if size is not None:
        try:
            values["max_request_size"] = round(float(size) * MIB)
        except (ValueError, OverflowError):
            raise BadRequest(fields={"max_request_size": request.texts("organization.quota.no_number")}) from None
    wanted: SetQuota = convert_body(SetQuota, values)
    return wanted


@page("POST", _PATH, permission="quota.update")
async def set_quota(request: PageRequest) -> Response:
    """Other limits."""
    try:
        await routes.put_quota(request, wanted_quota(request))
    except ApiError as error:
        return await _quota(request, error)
    return redirect(request, request.raw.url.path, "common.saved")


@page("GET", _PATH + "/usage.csv", permission="usage.read")
async def usage_csv(request: PageRequest) -> Response:
    """The numbers behind the charts."""
    times, points = await _points(request, span := span_of(request))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("at", *_SUMMED))
    for moment, point in zip(times, points, strict=True):
        at = moment.astimezone(UTC).isoformat(timespec="seconds")
        writer.writerow((at, *(point[name] for name in _SUMMED)))
    return Response(
        text.getvalue(),
        media_type="text/csv",
        headers={"Content-Disposition": f'attachment; filename="usage-{span}.csv"'},
    )
