"""Pages of instances: create one, connect to it, see what it does, change it, save and restore its data, delete it."""

import csv
import io
import shlex
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final, get_args

from starlette.responses import Response

from control import activity, backups, hosts, instances, quotas
from control.activity import SPANS, Activity
from control.charts import Chart, Line
from control.dashboard.forms import check_confirmed
from control.dashboard.frame import find_instance, home_of, show
from control.dashboard.snippets import snippets
from control.database import Record
from control.http import ApiError, BadRequest
from control.instances import ChangeStatus, CreateInstance, Eviction, RotateCredentials, UpdateInstance
from control.pages import PageRequest, http_public_url, page, redirect, render
from control.routes import usage as usage_routes
from redisgate.units import (
    bytes_rate_text,
    bytes_text,
    milliseconds_text,
    number_text,
    percent_text,
    rate_text,
    short_number,
)

_MIB = 1024 * 1024
SIZES: Final = tuple(_MIB << power for power in range(4, 15))
"""Memory to choose from: 16 MiB to 16 GiB."""
DEFAULT_SIZE: Final = 256 * _MIB
NEW_FOR: Final = timedelta(minutes=2)
"""After its creation an instance's page still shows how that went."""
BUSY: Final = ("pending", "creating", "updating", "stopping", "deleting")

_INSTANCE = "/dashboard/{org_id}/instances/{instance_id}"
_EVICTIONS = get_args(Eviction)


# Creating


@page("GET", "/dashboard/{org_id}/instances/new", permission="instances.create")
async def new(request: PageRequest) -> Response:
    """The form, with what is left of the quota."""
    return await _new(request)


async def _new(request: PageRequest, error: ApiError | None = None) -> Response:
    async with request.context.database.connection() as connection:
        quota = await quotas.get_quota(connection, request.organization_id)
    left = max(0, quota.limits.max_memory - quota.usage.memory)
    only_existing = request.context.settings.provisioner == "external"
    return await render(
        request,
        "instances/new.html",
        error=error,
        organization_id=request.organization_id,
        quota=quota,
        left=left,
        room=quota.usage.instances < quota.limits.max_instances,
        sizes=_sizes(request, left),
        chosen_size=_chosen_size(request, left),
        versions=await hosts.redis_versions(request.context.database),
        evictions=_EVICTIONS,
        only_existing=only_existing,
        kind="existing" if only_existing or request.form.get("kind") == "existing" else "new",
    )


def _chosen_size(request: PageRequest, left: int) -> int:
    posted = request.form.get("max_memory")
    if posted.isascii() and posted.isdigit():
        return int(posted[:12])
    return max((size for size in SIZES if size <= min(left, DEFAULT_SIZE)), default=SIZES[0])


def _sizes(request: PageRequest, left: int, current: int = 0) -> list[dict[str, Any]]:
    """Sizes with what each leaves of the organization's memory; `current` is what the instance gives back."""
    found = []
    for size in sorted({*SIZES, *([current] if current else ())}):
        rest = left + current - size
        key = "instances.size_leaves" if rest >= 0 else "instances.size_too_large"
        text = request.texts(key, size=bytes_text(size), left=bytes_text(max(rest, 0)))
        found.append({"value": size, "text": text, "rest": rest, "possible": rest >= 0})
    return found


@page("POST", "/dashboard/{org_id}/instances/new", permission="instances.create")
async def create(request: PageRequest) -> Response:
    """Write it down; its page shows how it comes about."""
    fixed: dict[str, Any] = {"organization_id": None, "cpu_request": None, "memory_request": None}
    if request.form.get("kind") == "existing":
        fixed |= {"max_memory": None, "redis_version": None, "eviction": "noeviction"}
        fixed |= {
            "persistence_enabled": True,
            "backup_enabled": False,
            "external_url": request.form.get("external_url"),
        }
    else:
        fixed |= {"external_url": None}
        fixed |= {name: request.form.has(name) for name in ("persistence_enabled", "backup_enabled")}
    try:
        body = request.body(CreateInstance, fixed)
        instance_id, _ = await instances.create(
            request.context, request, request.organization_id, request.user_id, body
        )
    except ApiError as error:
        return await _new(request, error)
    return redirect(
        request, f"/dashboard/{request.organization_id}/instances/{instance_id}", "instances.created", name=body.name
    )


# Connecting


@page("GET", _INSTANCE, permission="instances.read")
async def connect(request: PageRequest) -> Response:
    """Its address, and code that reaches it; the tokens are not in it."""
    return await _connect(request)


@page("POST", _INSTANCE + "/tokens", permission="instances.credentials")
async def tokens(request: PageRequest) -> Response:
    """The same with the tokens, which is put on record."""
    shown = await instances.reveal(request.context, request, request.organization_id, request.path["instance_id"])
    return await _connect(request, shown)


async def _connect(request: PageRequest, shown: dict[str, str] | None = None) -> Response:
    row = await find_instance(request)
    url = rest_url(request, row)
    health: Any = None
    if row["deleted_at"] is None and row["status"] in ("running", "updating"):
        health = await usage_routes.health(request)
    return await show(
        request,
        "connect",
        "instances/connect.html",
        row=row,
        url=url,
        tokens=shown,
        health=health,
        snippets=snippets(url, shown["token"] if shown else None, redis_cli(row)),
        phases=phases(row, health),
        steps=await instances.steps(request.context.database, row["id"]),
        busy=row["status"] in BUSY,
        show_phases=row["status"] != "running" or request.context.now() - row["created_at"] < NEW_FOR,
    )


def redis_cli(row: Record) -> str | None:
    """The arguments by which redis-cli reaches an instance; None: it does not."""
    address: str | None = row["external_url"]
    if address is None or not address.startswith(("redis://", "rediss://")):
        return None  # it has no port, or several servers stand for it
    return f"-u {shlex.quote(address)}{' --askpass' if row['password_encrypted'] is not None else ''}"


def rest_url(request: PageRequest, row: Record) -> str:
    """Where clients reach an instance: its own domain, or a path where the browser is."""
    view = instances.view(row, request.context.gateway_settings)
    url: str = view["rest_url"]
    if url.endswith(f"/redis/{row['id']}"):
        return f"{http_public_url(request)}/redis/{row['id']}"
    return url


def phases(row: Record, health: Any) -> list[tuple[str, str]]:
    """What it takes until commands flow, and how far it is: done, busy, failed or open."""
    reachable = health is not None and health["reachable"]
    provisioned = row["provisioned_at"] is not None
    done = [
        ("written", True),
        ("placed", provisioned or row["host_id"] is not None or row["provisioner"] != "local"),
        ("started", provisioned and row["status"] in ("running", "updating")),
        ("reachable", reachable),
    ]
    found: list[tuple[str, str]] = []
    stopped = row["desired_state"] != "running"
    for name, is_done in done:
        before = all(state == "done" for _, state in found)
        if is_done and before:
            state = "done"
        elif not before or stopped:
            state = "open"
        else:
            state = "failed" if row["status"] == "error" else "busy"
        found.append((name, state))
    return found


# Usage


@page("GET", _INSTANCE + "/usage", permission="usage.read")
async def usage(request: PageRequest) -> Response:
    """Charts of the last hour, day, week or month."""
    row, found = await _read(request)
    async with request.context.database.connection() as connection:
        commands = await activity.top_commands(connection, row["id"], request.context.now() - found.span.length)
    return await show(
        request,
        "usage",
        "instances/usage.html",
        row=row,
        spans=list(SPANS),
        span=found.span.name,
        charts=charts(request, found, row["max_memory"]),
        figures=figures(request, found),
        commands=commands,
        most=max((one["calls"] for one in commands), default=1),
    )


async def _read(request: PageRequest) -> tuple[Record, Activity]:
    span = SPANS.get(request.query.get("span", "1h"), SPANS["1h"])
    row = await find_instance(request)
    async with request.context.database.connection() as connection:
        found = await activity.read(connection, request.organization_id, row["id"], span, request.context.now())
    return row, found


def charts(request: PageRequest, found: Activity, max_memory: int) -> list[Chart]:
    """All charts of a span."""
    t = request.texts

    def made(
        name: str, unit: Callable[[float], str], *lines: tuple[str, Sequence[float | int | None]], **more: Any
    ) -> Chart:
        drawn = [Line(t(f"instances.line_{line}"), values, limit=line == "limit") for line, values in lines]
        title = t(f"instances.chart_{name}")
        return Chart(name, title, found.times[0], found.span.step, drawn, unit, **more)

    limit = [("limit", [max_memory] * len(found.times))] if max_memory else []
    return [
        made("throughput", rate_text, *((name, found.rates(name)) for name in ("reads", "writes", "commands"))),
        made("latency", milliseconds_text, *((f"p{n}", found.percentiles(n / 100)) for n in (50, 95, 99))),
        made("hit_ratio", percent_text, ("hits", found.hit_ratios()), top=100.0),
        made("memory", bytes_text, ("memory", found.sampled("memory")), *limit, binary=True),
        made("keys", short_number, ("keys", found.sampled("keys"))),
        made("errors", rate_text, ("errors", found.rates("errors"))),
        made(
            "traffic", bytes_rate_text, *((name, found.rates(name)) for name in ("bytes_in", "bytes_out")), binary=True
        ),
        made("removed", short_number, *((name, found.sampled(name)) for name in ("expired", "evicted"))),
    ]


def figures(request: PageRequest, found: Activity) -> list[tuple[str, str]]:
    """The span in a few numbers: a word of the catalogue and a text."""
    t = request.texts
    requests, ratio, p99 = found.total("requests"), found.total_hit_ratio(), found.total_percentile(0.99)
    return [
        (t("instances.figure_commands"), number_text(found.total("commands"))),
        (t("instances.figure_p99"), milliseconds_text(p99)),
        (t("instances.figure_hit_ratio"), percent_text(ratio)),
        (
            t("instances.figure_errors"),
            percent_text(100 * found.total("errors") / requests if requests else None),
        ),
        (t("instances.figure_memory"), bytes_text(found.latest("memory"))),
        (t("instances.figure_keys"), number_text(found.latest("keys"))),
    ]


_SAMPLED = ("hits", "misses", "memory", "keys", "connections", "evicted", "expired")


@page("GET", _INSTANCE + "/usage.csv", permission="usage.read")
async def usage_csv(request: PageRequest) -> Response:
    """The numbers of all charts, for spreadsheets; times in UTC, sizes in bytes, latency in milliseconds."""
    row, found = await _read(request)
    file = io.StringIO()
    writer = csv.writer(file)
    latency = {f"latency_p{n}_ms": found.percentiles(n / 100) for n in (50, 95, 99)}
    sampled = {name: found.sampled(name) for name in _SAMPLED}
    columns: dict[str, Sequence[float | int | None]] = {**found.counts, **latency, **sampled}
    writer.writerow(["time", *columns])
    for index, moment in enumerate(found.times):
        values = [column[index] for column in columns.values()]
        shown = ["" if value is None else round(value, 3) for value in values]
        writer.writerow([moment.isoformat().replace("+00:00", "Z"), *shown])
    name = f"{row['slug']}-{found.span.name}.csv"
    return Response(
        file.getvalue(),
        media_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


# Settings


@page("GET", _INSTANCE + "/settings", permission="instances.read")
async def settings(request: PageRequest) -> Response:
    """What can be changed, and by whom."""
    return await _settings(request)


async def _settings(request: PageRequest, error: ApiError | None = None, section: str = "") -> Response:
    row = await find_instance(request)
    async with request.context.database.connection() as connection:
        quota = await quotas.get_quota(connection, request.organization_id)
    left = max(0, quota.limits.max_memory - quota.usage.memory)
    return await show(
        request,
        "settings",
        "instances/settings.html",
        row=row,
        error=error,
        section=section,
        sizes=_sizes(request, left, row["max_memory"]),
        evictions=_EVICTIONS,
        steps=await instances.steps(request.context.database, row["id"]),
        busy=row["status"] in BUSY,
        loading=row["load_upload"] is not None,
        most_upload=request.context.gateway_settings.limits.max_body_bytes,
    )


async def _done(request: PageRequest, section: str, message: str, act: Any) -> Response:
    """Do it, and show the settings with the message; or with what went wrong."""
    try:
        await act
    except ApiError as error:
        return await _settings(request, error, section)
    return redirect(request, f"{home_of(request)}/settings", message)


@page("POST", _INSTANCE + "/settings", permission="instances.update")
async def change(request: PageRequest) -> Response:
    """Its name, memory, eviction; the URL of an existing Redis."""

    async def act() -> None:
        # An empty name is one that was taken away, and refused.
        body = request.body(UpdateInstance, {"name": request.form.get("name")})
        await instances.update(request.context, request, request.organization_id, request.path["instance_id"], body)

    return await _done(request, "general", "instances.changed", act())


@page("POST", _INSTANCE + "/status", permission="instances.status")
async def status(request: PageRequest) -> Response:
    """Start, stop, restart, or look again."""

    async def act() -> None:
        body = request.body(ChangeStatus)
        await instances.change_status(
            request.context, request, request.organization_id, request.path["instance_id"], body.action
        )

    return await _done(request, "status", "instances.under_way", act())


@page("POST", _INSTANCE + "/rotate", permission="instances.rotate")
async def rotate(request: PageRequest) -> Response:
    """Replace tokens and password; the new tokens are on the first page, for who asks there."""
    chosen = {name: request.form.has(name) for name in ("token", "readonly_token", "password")}

    async def act() -> None:
        await instances.rotate(
            request.context,
            request,
            request.organization_id,
            request.path["instance_id"],
            request.body(RotateCredentials, chosen),
        )

    return await _done(request, "rotate", "instances.rotated", act())


@page("POST", _INSTANCE + "/snapshot", permission="instances.load", files=True)
async def load(request: PageRequest) -> Response:
    """Replace its data by that of a file; scripts send large ones in parts to the API."""

    async def act() -> None:
        row = await find_instance(request)
        check_confirmed(request, row["name"])
        content = request.files.get("snapshot", b"")
        if not content:
            raise BadRequest(fields={"snapshot": request.texts("instances.choose_file")})
        await backups.take_in(
            request.context, request, request.organization_id, row["id"], backups.read_part(content, None)
        )

    return await _done(request, "snapshot", "instances.loading_begun", act())


@page("POST", _INSTANCE + "/delete", permission="instances.delete")
async def delete(request: PageRequest) -> Response:
    """End it; until it is purged it can be restored."""

    async def act() -> None:
        row = await find_instance(request)
        check_confirmed(request, row["name"])
        await instances.delete(request.context, request, request.organization_id, row["id"])

    return await _done(request, "delete", "instances.deleted", act())


@page("POST", _INSTANCE + "/restore", permission="instances.restore")
async def restore(request: PageRequest) -> Response:
    """Bring it back with its data."""
    return await _done(
        request,
        "restore",
        "instances.restored",
        instances.restore(request.context, request, request.organization_id, request.path["instance_id"]),
    )
