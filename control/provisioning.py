"""What a steward counts of its work: for `redisgate.metrics`."""

import time
from typing import Final

from control.duties import duty
from control.http import Context
from redisgate.counters import Series
from redisgate.metering import bucket_of
from redisgate.metrics import Document

COUNT_SECONDS: Final = 5.0
"""Between two counts of all instances."""


class Provisioning:
    """Counts of one steward: the steps that it took, and how many instances there are."""

    def __init__(self) -> None:
        self.leads = False
        """This host works for the whole deployment."""
        self.statuses: dict[str, int] = {}
        """How many instances there are, by status; as the leader last saw it."""
        self._steps: dict[tuple[str, str, str], int] = {}
        self._durations: dict[str, Series] = {}

    def step(self, provisioner: str, step: str, outcome: str, began: float) -> None:
        """A step that began at `began` (`time.monotonic()`) has ended."""
        key = (provisioner, step, outcome)
        self._steps[key] = self._steps.get(key, 0) + 1
        series = self._durations.setdefault(step, Series())
        nanos = int((time.monotonic() - began) * 1e9)
        series.nanos += nanos
        series.buckets[bucket_of(nanos)] += 1

    def collect(self, document: Document) -> None:
        """For `redisgate.metrics`: what has been counted until now."""
        for (provisioner, step, outcome), number in self._steps.items():
            document.count(
                "redisgate_provisioning_steps_total", number, provisioner=provisioner, step=step, outcome=outcome
            )
        for step, series in self._durations.items():
            document.histogram("redisgate_provisioning_step_duration_seconds", series.nanos, series.buckets, step=step)
        document.gauge("redisgate_steward_leads", self.leads)
        if self.leads:
            for status, number in self.statuses.items():
                document.gauge("redisgate_instances", number, status=status)


PROVISIONING: Final = Provisioning()


@duty("the count of instances", every=COUNT_SECONDS)
async def count_instances(context: Context) -> None:
    """How many instances there are, by status."""
    rows = await context.database.fetch(
        "SELECT status, count(*) AS number FROM instances WHERE deleted_at IS NULL GROUP BY status"
    )
    found = {row["status"]: int(row["number"]) for row in rows}
    # A status that nobody has any more is told as 0, not forgotten: an alert that fires on it must end.
    PROVISIONING.statuses = dict.fromkeys(PROVISIONING.statuses, 0) | found
