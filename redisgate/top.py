"""`redisgate top`: what a gateway does, live in the terminal; the extra `tools`.

It reads `/status` of the metrics port. Without a terminal, or with `--once`, it prints one picture and ends.
"""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from redisgate.config import ConfigError
from redisgate.units import bytes_rate_text, bytes_text, microseconds_text, span_text

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

FETCH_SECONDS: Final = 5.0
"""For the gateway to answer."""
MAX_STATUS_BYTES: Final = 16 * 1024 * 1024
"""Of an answer; a gateway's is far below."""
MIN_INTERVAL: Final = 0.5
"""Seconds between two pictures; the gateway's own figures change once a second."""

_MISSING = "redisgate top needs rich: pip install redisgate[tools]"


class TopError(Exception):
    """Nothing can be shown; one line for the operator."""


def run_top(options: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    """Show until Ctrl-C; the exit status."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        print(f"redisgate: {_MISSING}", file=sys.stderr)
        return 1
    url = address(options.get("url"), environ)
    try:
        interval = max(float(options["interval"]), MIN_INTERVAL)
    except ValueError:
        raise ConfigError("--interval: expected seconds such as 1") from None
    console = Console()
    try:
        status = fetch(url)
        if options["once"] or not console.is_terminal:
            console.print(picture(status, url))
            return 0
        with Live(picture(status, url), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    live.update(picture(fetch(url), url), refresh=True)
                except TopError as error:  # it may come back: a restart, a network that blinks
                    live.update(f"{error}\n\ntrying again; Ctrl-C ends", refresh=True)
    except TopError as error:
        print(f"redisgate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def address(given: str | None, environ: Mapping[str, str]) -> str:
    """The address of the metrics port, without a path. Raises ConfigError."""
    if given is None:
        port = environ.get("REDISGATE_METRICS_PORT", "9400")
        host = environ.get("REDISGATE_METRICS_HOST", "127.0.0.1")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        given = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url: expected the metrics port's address such as http://127.0.0.1:9400, not {given!r}")
    return f"{parts.scheme}://{parts.netloc}"


def fetch(url: str) -> dict[str, Any]:
    """The status of a gateway. Raises TopError."""
    try:
        with urllib.request.urlopen(f"{url}/status", timeout=FETCH_SECONDS) as answer:
            found = json.loads(answer.read(MAX_STATUS_BYTES))
    except urllib.error.HTTPError as error:
        raise TopError(
            f"{url}/status answered {error.code}: that is no metrics port; the gateway needs metrics_port"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TopError(
            f"cannot read {url}/status: {reason}; is the gateway running, with REDISGATE_METRICS_PORT set?"
        ) from error
    if not isinstance(found, dict) or "workers" not in found:
        raise TopError(f"{url}/status is not a gateway's")
    return found


def picture(status: Mapping[str, Any], url: str) -> "Group":
    """Everything on one screen."""
    from rich.console import Group
    from rich.text import Text

    totals, redis, access = status["totals"], status["redis"], status["access"]
    up = time.time() - status["started"] if status["started"] else 0.0
    head = Text(
        f"RedisGate {status['version']} at {url}, up {span_text(up)}, over the last {status['window_seconds']:g} s"
    )
    latency = totals["latency_us"]
    lines = [
        f"requests/s {totals['requests_per_second']:,.0f}  failed/s {totals['failed_per_second']:,.1f}  "
        f"commands/s {totals['commands_per_second']:,.0f}  "
        "  ".join(f"{name} {microseconds_text(latency[name])}" for name in ("p50", "p90", "p99")),
        f"clients {totals['connections']:,}  streams {totals['streams']:,}  "
        f"in {bytes_rate_text(totals['bytes_in_per_second'])}  out {bytes_rate_text(totals['bytes_out_per_second'])}  "
        f"refused by limits/s {totals['limit_refusals_per_second']:,.1f}",
        f"Redis: connections {redis['connections']:,}  waiting {redis['waiting']:,}  away {redis['instances_away']:,}  "
        f"lost {redis['lost']:,}   worker restarts {totals['worker_restarts']:,}"
        + (f"   access table {access['age_seconds']:.1f} s old" if access["age_seconds"] is not None else ""),
    ]
    return Group(head, *[Text(line) for line in lines], _workers(status), _families(status), _instances(status))


def _table(title: str, first: str, *columns: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _workers(status: Mapping[str, Any]) -> "Table":
    table = _table(
        "Processes", "process", "CPU", "memory", "requests/s", "failed/s", "p99", "clients", "waiting", "lag", ""
    )
    for process in (*status["workers"], *status["processes"]):
        worker = "requests_per_second" in process
        table.add_row(
            f"worker {process['worker']}" if worker else process["worker"],
            f"{process['cpu']:.0%}",
            bytes_text(process["memory_bytes"]),
            f"{process['requests_per_second']:,.0f}" if worker else "",
            f"{process['failed_per_second']:,.1f}" if worker else "",
            microseconds_text(process["latency_us"]["p99"]) if worker else "",
            f"{process['connections']:,}" if worker else "",
            f"{process['redis_waiting']:,}" if worker else "",
            f"{process['loop_lag_ms']:,.1f} ms",
            f"SILENT {span_text(process['silent_seconds'])}" if process["stuck"] else "",
            style="bold red" if process["stuck"] else None,
        )
    return table


def _families(status: Mapping[str, Any]) -> "Table":
    table = _table("Commands", "family", "commands/s", "errors/s", "p50", "p99", "ever")
    for family in status["families"]:
        table.add_row(
            family["family"],
            f"{family['commands_per_second']:,.0f}",
            f"{family['errors_per_second']:,.1f}",
            microseconds_text(family["latency_us"]["p50"]),
            microseconds_text(family["latency_us"]["p99"]),
            f"{family['commands']:,}",
        )
    return table


def _instances(status: Mapping[str, Any]) -> "Table":
    table = _table("Instances", "instance", "requests/s", "errors/s", "in", "out", "mean", "p99", "ever")
    for instance in status["instances"]:
        table.add_row(
            instance["name"],
            f"{instance['requests_per_second']:,.0f}",
            f"{instance['errors_per_second']:,.1f}",
            bytes_rate_text(instance["bytes_in_per_second"]),
            bytes_rate_text(instance["bytes_out_per_second"]),
            microseconds_text(instance["mean_us"]),
            microseconds_text(instance["latency_us"]["p99"]),
            f"{instance['requests']:,}",
        )
    return table
