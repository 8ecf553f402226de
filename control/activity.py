"""What one instance did over a span of time, in the form that its charts need: even steps, rates, percentiles.

Commands, latency, errors and bytes are what the gateway counted (`control.usage`); keys, memory, hits and commands by
name are what the instance's server said of itself once a minute.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from control.charts import bins
from control.database import Connection
from control.usage import COUNTERS, FLUSH_SECONDS, sums_of_counters
from redisgate.metering import BUCKETS, percentile

MAX_TOP_COMMANDS: Final = 20
"""Shown of those that ran in a span."""

# Bucket by bucket, which PostgreSQL adds up in a fifth of the time that sum_histograms takes.
_LATENCY: Final = "ARRAY[" + ", ".join(f"sum(latency[{bucket}])::bigint" for bucket in range(1, BUCKETS + 1)) + "]"
_COUNTS: Final = ("commands", "reads", "writes", "requests", "errors", "bytes_in", "bytes_out")


@dataclass(frozen=True, slots=True)
class Span:
    """How far a chart goes back, in which steps, and from which rows of `usage` it is made."""

    name: str
    length: timedelta
    step: timedelta
    source: str


SPANS: Final[dict[str, Span]] = {
    span.name: span
    for span in (
        Span("1h", timedelta(hours=1), timedelta(minutes=1), "minute"),
        Span("24h", timedelta(hours=24), timedelta(minutes=30), "minute"),
        Span("7d", timedelta(days=7), timedelta(hours=3), "hour"),
        Span("30d", timedelta(days=30), timedelta(hours=12), "hour"),
    )
}


@dataclass(frozen=True, slots=True)
class Activity:
    """What there was in each step, and altogether. Counts are 0 where nothing was, samples None where none was made."""

    span: Span
    times: list[datetime]
    counts: dict[str, list[int]]
    latency: list[Sequence[int]]
    """A histogram for each step."""
    samples: list[dict[str, int] | None]
    """The highest keys, memory and connections of each step, and the sums of what was counted."""
    now: datetime

    def rates(self, name: str) -> list[float | None]:
        """A count per second; of a step that has only begun, whose counts are still on their way, None."""
        found: list[float | None] = []
        for moment, count in zip(self.times, self.counts[name], strict=True):
            passed = min(self.span.step.total_seconds(), (self.now - moment).total_seconds())
            found.append(count / passed if passed >= 2 * FLUSH_SECONDS else None)
        return found

    def percentiles(self, fraction: float) -> list[float | None]:
        """Latency in milliseconds."""
        return [_milliseconds(percentile(histogram, fraction)) for histogram in self.latency]

    def sampled(self, name: str) -> list[int | None]:
        """One of the values of the samples."""
        return [None if sample is None else sample[name] for sample in self.samples]

    def hit_ratios(self) -> list[float | None]:
        """Of lookups in percent; None where there were none."""
        return [None if sample is None else _ratio(sample["hits"], sample["misses"]) for sample in self.samples]

    def total(self, name: str) -> int:
        """A count over the whole span."""
        return sum(self.counts[name])

    def total_percentile(self, fraction: float) -> float | None:
        """Latency in milliseconds over the whole span."""
        merged = [0] * max((len(histogram) for histogram in self.latency), default=0)
        for histogram in self.latency:
            for bucket, count in enumerate(histogram):
                merged[bucket] += count
        return _milliseconds(percentile(merged, fraction))

    def total_hit_ratio(self) -> float | None:
        """Of all lookups, in percent."""
        known = [sample for sample in self.samples if sample is not None]
        return _ratio(sum(sample["hits"] for sample in known), sum(sample["misses"] for sample in known))

    def latest(self, name: str) -> int | None:
        """The last value of the samples."""
        return next((sample[name] for sample in reversed(self.samples) if sample is not None), None)


def _milliseconds(micros: float | None) -> float | None:
    return None if micros is None else micros / 1000


def _ratio(hits: int, misses: int) -> float | None:
    return 100 * hits / (hits + misses) if hits + misses else None


async def read(connection: Connection, organization_id: UUID, instance_id: UUID, span: Span, now: datetime) -> Activity:
    """What an instance did in the span that ends now."""
    times = bins(span.length, span.step, now)
    places = {moment: index for index, moment in enumerate(times)}
    counts = {name: [0] * len(times) for name in _COUNTS}
    latency: list[Sequence[int]] = [()] * len(times)
    samples: list[dict[str, int] | None] = [None] * len(times)
    for row in await connection.fetch(
        "SELECT date_bin($4, at, 'epoch') AS bin, "
        + ", ".join(f"sum({name})::bigint AS {name}" for name in _COUNTS)
        + f", {_LATENCY} AS latency FROM usage WHERE organization_id = $1 AND instance_id = $2"
        " AND step = $3 AND at >= $5 AND at < $6 GROUP BY bin",
        organization_id,
        instance_id,
        span.source,
        span.step,
        times[0],
        times[-1] + span.step,
    ):
        index = places[row["bin"]]
        for name in _COUNTS:
            counts[name][index] = row[name]
        latency[index] = [count or 0 for count in row["latency"]]
    for row in await connection.fetch(
        "SELECT date_bin($2, at, 'epoch') AS bin, max(keys) AS keys, max(memory) AS memory,"
        f" max(connections) AS connections, {sums_of_counters()}"
        " FROM instance_samples WHERE instance_id = $1 AND at >= $3 AND at < $4 GROUP BY bin",
        instance_id,
        span.step,
        times[0],
        times[-1] + span.step,
    ):
        samples[places[row["bin"]]] = {name: row[name] for name in ("keys", "memory", "connections", *COUNTERS)}
    return Activity(span, times, counts, latency, samples, now)


async def top_commands(
    connection: Connection, instance_id: UUID, start: datetime, *, limit: int = MAX_TOP_COMMANDS
) -> list[dict[str, Any]]:
    """The commands that the instance's server ran most since then, with their mean time in microseconds."""
    rows = await connection.fetch(
        "SELECT command, sum(calls)::bigint AS calls, sum(micros)::bigint AS micros, sum(failed)::bigint AS failed"
        " FROM instance_commands WHERE instance_id = $1 AND at >= $2 GROUP BY command"
        " ORDER BY calls DESC, command LIMIT $3",
        instance_id,
        start,
        limit,
    )
    return [
        {"command": row["command"], "calls": row["calls"], "failed": row["failed"]}
        | {"mean_micros": round(row["micros"] / row["calls"], 1)}
        for row in rows
    ]


async def recent_rates(
    connection: Connection, organization_id: UUID, instance_ids: Sequence[UUID], now: datetime
) -> dict[UUID, list[float]]:
    """Commands per second in each of the last sixty minutes, for a list of instances: the values of sparklines."""
    span = SPANS["1h"]
    times = bins(span.length, span.step, now)
    places = {moment: index for index, moment in enumerate(times)}
    found = {instance_id: [0.0] * len(times) for instance_id in instance_ids}
    for row in await connection.fetch(
        "SELECT instance_id, at, sum(commands)::bigint AS commands FROM usage WHERE organization_id = $1"
        " AND instance_id = ANY ($2) AND step = 'minute' AND at >= $3 GROUP BY instance_id, at",
        organization_id,
        instance_ids,
        times[0],
    ):
        index = places.get(row["at"])
        if index is not None:
            found[row["instance_id"]][index] = row["commands"] / span.step.total_seconds()
    return found
