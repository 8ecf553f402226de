"""What an instance needs next follows from its row alone; every combination of its columns is tried."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from control.reconciler import MAX_CREATE_ATTEMPTS, Step, next_step

NOW = datetime(2026, 11, 24, 16, tzinfo=UTC)
PAST, FUTURE = NOW - timedelta(minutes=1), NOW + timedelta(minutes=1)

COLUMNS: dict[str, list[Any]] = {
    "desired_state": ["running", "stopped", "deleted"],
    "status": ["pending", "creating", "running", "updating", "stopping", "stopped", "error", "deleting"],
    "provisioned_at": [None, PAST],
    "counts_against_quota": [True, False],
    "attempts": [0, MAX_CREATE_ATTEMPTS],
    "retry_at": [None, PAST, FUTURE],
    "generation": [2],
    "observed_generation": [1, 2],
    "restarts_wanted": [1],
    "restarts_done": [0, 1],
    "load_upload": [None, UUID(int=1)],
    "old_password_until": [None, PAST, FUTURE],
    "purge_at": [None, PAST, FUTURE],
}
ROWS = [dict(zip(COLUMNS, values, strict=True)) for values in itertools.product(*COLUMNS.values())]


def test_data_is_destroyed_only_when_it_was_never_used_or_its_time_is_over() -> None:
    for row in ROWS:
        step = next_step(row, NOW).step
        if step is Step.PURGE:
            assert row["desired_state"] == "deleted", row
            assert row["purge_at"] == PAST, row
        if step is Step.ROLL_BACK:
            assert row["provisioned_at"] is None, row
            assert row["counts_against_quota"], row


def test_nothing_runs_that_is_not_wanted_and_nothing_is_stopped_that_is() -> None:
    for row in ROWS:
        step = next_step(row, NOW).step
        if row["desired_state"] == "running":
            assert step not in (Step.STOP, Step.PURGE), row
        else:
            assert step in (Step.STOP, Step.PURGE, Step.NOTHING), row


def test_whoever_waits_is_looked_at_again_and_nobody_is_tried_before_the_time() -> None:
    for row in ROWS:
        found = next_step(row, NOW)
        if row["retry_at"] == FUTURE:
            assert found.step in (Step.NOTHING, Step.CHECK), row
        if found.at is not None:
            assert found.at in (row["retry_at"], row["purge_at"], row["old_password_until"]), row
        if found.step is Step.NOTHING and found.at is None:
            settled = row["status"] == "stopped" and row["observed_generation"] == row["generation"]
            given_up = row["provisioned_at"] is None and not row["counts_against_quota"]
            assert (settled and row["desired_state"] != "running") or given_up, row


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"status": "pending", "provisioned_at": None}, Step.CREATE),
        ({"status": "creating", "provisioned_at": None}, Step.CREATE),
        ({"status": "creating", "provisioned_at": None, "attempts": MAX_CREATE_ATTEMPTS}, Step.ROLL_BACK),
        ({"status": "error", "provisioned_at": None, "counts_against_quota": False}, Step.NOTHING),
        ({"status": "error"}, Step.START),
        ({"status": "stopped"}, Step.START),
        ({"status": "updating"}, Step.UPDATE),
        ({"observed_generation": 1}, Step.UPDATE),
        ({"restarts_done": 0}, Step.RESTART),
        ({"load_upload": UUID(int=1)}, Step.LOAD),
        ({"load_upload": UUID(int=1), "status": "error"}, Step.START),
        ({"load_upload": UUID(int=1), "desired_state": "stopped"}, Step.STOP),
        ({"old_password_until": PAST}, Step.FORGET_PASSWORD),
        ({}, Step.CHECK),
        ({"desired_state": "stopped"}, Step.STOP),
        ({"desired_state": "stopped", "status": "stopped"}, Step.NOTHING),
        ({"desired_state": "deleted"}, Step.STOP),
        ({"desired_state": "deleted", "status": "stopped", "purge_at": FUTURE}, Step.NOTHING),
        ({"desired_state": "deleted", "status": "stopped", "purge_at": PAST}, Step.PURGE),
    ],
    ids=str,
)
def test_the_step_that_a_row_needs(changes: dict[str, Any], step: Step) -> None:
    row = {
        "desired_state": "running",
        "status": "running",
        "provisioned_at": PAST,
        "counts_against_quota": True,
        "attempts": 0,
        "retry_at": None,
        "generation": 2,
        "observed_generation": 2,
        "restarts_wanted": 1,
        "restarts_done": 1,
        "load_upload": None,
        "old_password_until": None,
        "purge_at": None,
    }
    assert next_step(row | changes, NOW).step is step
