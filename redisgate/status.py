"""What a gateway does at this moment, in short: for `redisgate top`, and for the administrators' page.

Rates and latencies are of the last ten seconds: each process keeps its
document of then beside its newest one, so whoever asks needs no memory.
"""

import time
from collections.abc import Sequence
from typing import Any, Final

import redisgate
from redisgate.board import SILENT_SECONDS, Board
from redisgate.metering import bucket_start, percentile
from redisgate.metrics import Document, InstanceCount, decoded

MAX_INSTANCES: Final = 100
"""Instances in one answer, the busiest."""

_QUANTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))


def status(board: Board, instances: int = MAX_INSTANCES) -> dict[str, Any]:
    """The whole; rates per second, sizes in bytes, latencies in microseconds (null where nothing was asked)."""
    now = time.time()
    total, earlier = Document(time=0.0), Document(time=0.0)
    workers: list[dict[str, Any]] = []
    processes: list[dict[str, Any]] = []
    seconds = 0.0
    for entry in board.entries():
        newest, before = decoded(entry)
        if not entry.live or board.is_supervisor(entry):
            total.add(newest, gauges=entry.live)
            earlier.add(newest if not entry.live else before, gauges=False)
            continue
        total.add(newest)
        earlier.add(before, gauges=False)
        seconds = max(seconds, newest.time - before.time)
        shown = _process(newest, before, now)
        (workers if newest.who.isdigit() else processes).append(shown)
    span = seconds or 1.0
    gauges = total.gauges
    return {
        "version": redisgate.__version__,
        "time": now,
        "started": gauges.get("redisgate_start_time_seconds"),
        "window_seconds": round(seconds, 1),
        "workers": sorted(workers, key=lambda worker: int(worker["worker"])),
        "processes": sorted(processes, key=lambda process: str(process["worker"])),
        "totals": {
            **_traffic(total, earlier, span),
            "connections": int(gauges.get("redisgate_http_connections", 0)),
            "streams": int(gauges.get("redisgate_http_streams", 0)),
            "bytes_in_per_second": _rate(total, earlier, "redisgate_http_received_bytes_total", span),
            "bytes_out_per_second": _rate(total, earlier, "redisgate_http_sent_bytes_total", span),
            "limit_refusals_per_second": _rate(total, earlier, "redisgate_limit_refusals_total", span),
            "worker_restarts": int(_count(total, "redisgate_worker_restarts_total")),
        },
        "redis": {
            "connections": int(gauges.get("redisgate_redis_connections", 0)),
            "waiting": int(gauges.get("redisgate_redis_waiting_commands", 0)),
            "instances_away": int(gauges.get("redisgate_redis_instances_away", 0)),
            "lost": int(_count(total, "redisgate_redis_connections_lost_total")),
        },
        "access": {
            "hits_per_second": _rate(total, earlier, "redisgate_access_hits_total", span),
            "misses_per_second": _rate(total, earlier, "redisgate_access_misses_total", span),
            "age_seconds": gauges.get("redisgate_access_table_age_seconds"),
        },
        "families": _families(total, earlier, span),
        "instances": _instances(total, earlier, span, instances),
    }


def _process(newest: Document, before: Document, now: float) -> dict[str, Any]:
    span = newest.time - before.time or 1.0
    silent = max(now - newest.time, 0.0)
    label = f'{{worker="{newest.who}"}}'
    gauges = newest.gauges
    shown = {
        "worker": newest.who,
        "cpu": _rate(newest, before, "redisgate_process_cpu_seconds_total", span),
        "memory_bytes": int(gauges.get(f"redisgate_process_resident_memory_bytes{label}", 0)),
        "loop_lag_ms": round(gauges.get(f"redisgate_event_loop_lag_max_seconds{label}", 0.0) * 1000, 2),
        "silent_seconds": round(silent, 1),
        "stuck": silent > SILENT_SECONDS,
    }
    if newest.who.isdigit():
        shown |= _traffic(newest, before, span)
        shown["connections"] = int(gauges.get("redisgate_http_connections", 0))
        shown["redis_waiting"] = int(gauges.get("redisgate_redis_waiting_commands", 0))
    return shown


def _traffic(newest: Document, before: Document, span: float) -> dict[str, Any]:
    failed = _count(newest, "redisgate_http_requests_total", 'status="5') - _count(
        before, "redisgate_http_requests_total", 'status="5'
    )
    command = 'redisgate_http_request_duration_seconds{route="command"}'
    return {
        "requests_per_second": _rate(newest, before, "redisgate_http_requests_total", span),
        "failed_per_second": round(failed / span, 2),
        "commands_per_second": _rate(newest, before, "redisgate_commands_total", span),
        "latency_us": _latency(newest.histograms.get(command), before.histograms.get(command)),
    }


def _count(document: Document, name: str, having: str = "") -> float:
    return sum(value for key, value in document.counters.items() if key.partition("{")[0] == name and having in key)


def _rate(newest: Document, before: Document, name: str, span: float) -> float:
    return round(max(_count(newest, name) - _count(before, name), 0.0) / span, 2)


def _gain(newest: Sequence[float] | None, before: Sequence[float] | None) -> list[float]:
    """What a histogram's buckets have gained."""
    if newest is None:
        return []
    if before is None or len(before) != len(newest):
        return list(newest[1:])
    return [max(b - a, 0) for a, b in zip(before[1:], newest[1:], strict=True)]


def _latency(newest: Sequence[float] | None, before: Sequence[float] | None) -> dict[str, float | None]:
    gained = [int(count) for count in _gain(newest, before)]
    return {name: _rounded(percentile(gained, fraction)) for name, fraction in _QUANTILES}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _families(total: Document, earlier: Document, span: float) -> list[dict[str, Any]]:
    families: list[dict[str, Any]] = []
    for key, count in total.counters.items():
        name, _, rest = key.partition("{")
        if name != "redisgate_commands_total":
            continue
        gained = count - earlier.counters.get(key, 0)
        histogram, errors = f"redisgate_command_duration_seconds{{{rest}", f"redisgate_command_errors_total{{{rest}"
        families.append(
            {
                "family": rest.split('"')[1],
                "commands": int(count),
                "commands_per_second": round(gained / span, 2),
                "errors_per_second": round((total.counters.get(errors, 0) - earlier.counters.get(errors, 0)) / span, 2),
                "latency_us": _latency(total.histograms.get(histogram), earlier.histograms.get(histogram)),
            }
        )
    return sorted(families, key=lambda family: -family["commands_per_second"])


def _instances(total: Document, earlier: Document, span: float, most: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for key, count in total.instances.items():
        before = earlier.instances.get(key) or InstanceCount.of(count.name, [0] * len(count.numbers()))
        requests, errors, bytes_in, bytes_out, nanos, *buckets = [
            max(b - a, 0) for a, b in zip(before.numbers(), count.numbers(), strict=True)
        ]
        found.append(
            {
                "instance_id": key,
                "name": count.name,
                "requests": count.requests,
                "requests_per_second": round(requests / span, 2),
                "errors_per_second": round(errors / span, 2),
                "bytes_in_per_second": round(bytes_in / span, 1),
                "bytes_out_per_second": round(bytes_out / span, 1),
                "mean_us": round(nanos / requests / 1000, 1) if requests else None,
                "latency_us": {name: _octave_percentile(buckets, fraction) for name, fraction in _QUANTILES},
            }
        )
    found.sort(key=lambda one: (-one["requests_per_second"], -one["requests"]))
    return found[:most]


def _octave_percentile(octaves: Sequence[int], fraction: float) -> float | None:
    """As `redisgate.metering.percentile`, of a histogram by octave; within half of it."""
    wanted = fraction * sum(octaves)
    seen = 0
    for octave, count in enumerate(octaves):
        seen += count
        if count and seen >= wanted:
            start, end = bucket_start(4 * octave), bucket_start(4 * (octave + 1))
            return round(start + (end - start) * (1 - (seen - wanted) / count), 1)
    return None
