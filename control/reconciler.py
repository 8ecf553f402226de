"""From what is wanted to what there is: one instance, one step at a time.

A row says what is wanted (`desired_state`, `generation`, `restarts_wanted`) and what there is (`status`,
`observed_generation`, `restarts_done`, `endpoint`, `process`). `next_step` compares the two and nothing else, so a
crash at any point loses nothing: whoever looks next finds the same difference and takes the same step, each of which
may be taken again. What a provisioner did and nobody recorded, it finds again by itself.

    running   pending → creating → running            first failure: again, a little later
                          ↓ too many, or hopeless
                        error, and nothing is left of it, in the quota neither
              running ⇄ updating                      a change, a new password, a restart
              running → error → running               its process ended; started again, later each time
    stopped   running → stopping → stopped
    deleted   … → deleting → stopped → (purge_at) nothing
"""

import enum
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TypeAlias
from uuid import UUID

from control import audit
from control.database import Connection, Database, Record
from control.encryption import DecryptionError, Encryption
from control.instances import secret_context, spec_of
from control.provisioners import Found, LoadsSnapshots, OnStep, Provisioner, ProvisionError, Spec
from control.provisioning import PROVISIONING
from redisgate import tracing

MAX_CREATE_ATTEMPTS: Final = 3
"""Failures after which a creation is rolled back."""
FIRST_BACKOFF_SECONDS: Final = 0.5
MAX_BACKOFF_SECONDS: Final = 60.0
"""Between two attempts: doubles from the first to the second. A process that ended is at first started at once."""
STABLE_SECONDS: Final = 60.0
"""What has run for so long has not failed in a row."""
PASSWORD_OVERLAP_SECONDS: Final = 30.0
"""Redis goes on accepting the old password after a rotation, until every gateway knows the new one."""
MAX_STEPS: Final = 20
"""In one go; then the next instance's turn."""
KEPT_STEPS: Final = 100
"""On record per instance."""

Row: TypeAlias = Record | Mapping[str, Any]

log = logging.getLogger(__name__)


class Step(enum.Enum):
    """What to do next."""

    NOTHING = "nothing"
    CHECK = "check"
    CREATE = "create"
    ROLL_BACK = "roll back"
    START = "start"
    RESTART = "restart"
    UPDATE = "update"
    FORGET_PASSWORD = "forget the old password"
    LOAD = "load a snapshot"
    STOP = "stop"
    PURGE = "purge"


@dataclass(frozen=True)
class Next:
    """A step; or, with NOTHING and `at`, when to look again."""

    step: Step
    at: datetime | None = None


def next_step(row: Row, now: datetime) -> Next:
    """What an instance needs, from its row alone."""
    wanted = row["desired_state"]
    if wanted == "deleted" and row["purge_at"] is not None and row["purge_at"] <= now:
        return _when_due(row, now, Step.PURGE)
    if wanted in ("deleted", "stopped"):
        if row["status"] == "stopped" and row["observed_generation"] >= row["generation"]:
            return Next(Step.NOTHING, row["purge_at"])
        return _when_due(row, now, Step.STOP)
    if row["provisioned_at"] is None:
        if not row["counts_against_quota"]:
            return Next(Step.NOTHING)  # rolled back, and nobody has asked for another attempt
        return _when_due(row, now, Step.ROLL_BACK if row["attempts"] >= MAX_CREATE_ATTEMPTS else Step.CREATE)
    if row["restarts_done"] < row["restarts_wanted"]:
        return _when_due(row, now, Step.RESTART)
    if row["status"] not in ("running", "updating"):
        return _when_due(row, now, Step.START)
    if row["load_upload"] is not None:
        return _when_due(row, now, Step.LOAD)
    if row["status"] == "updating" or row["observed_generation"] < row["generation"]:
        return _when_due(row, now, Step.UPDATE)
    if row["old_password_until"] is not None and row["old_password_until"] <= now:
        return _when_due(row, now, Step.FORGET_PASSWORD)
    return Next(Step.CHECK, row["old_password_until"])


def _when_due(row: Row, now: datetime, step: Step) -> Next:
    if row["retry_at"] is not None and row["retry_at"] > now:
        return Next(Step.NOTHING, row["retry_at"])
    return Next(step)


def backoff(attempts: int) -> timedelta:
    """How long to wait after so many failures in a row."""
    return timedelta(seconds=min(FIRST_BACKOFF_SECONDS * 2 ** (attempts - 1), MAX_BACKOFF_SECONDS) if attempts else 0)


class Reconciler:
    """Takes the steps, for the instances of one host and, on one host, those of none."""

    def __init__(
        self,
        database: Database,
        encryption: Encryption,
        provisioners: Mapping[str, Provisioner],
        host_id: UUID,
        actor: audit.Actor,
        *,
        clock: Callable[[], datetime],
        on_step: OnStep = lambda step: None,
    ) -> None:
        """`on_step` hears of what was done and recorded; `actor` is who the audit log names."""
        self._database = database
        self._encryption = encryption
        self._provisioners = provisioners
        self._host_id = host_id
        self._actor = actor
        self._clock = clock
        self._on_step = on_step

    async def reconcile(self, instance_id: UUID) -> datetime | None:
        """Bring about what is wanted of one instance; returns when to look again, None: when something changes.

        Must not run twice at a time for the same instance. Raises DatabaseAway.
        """
        for _ in range(MAX_STEPS):
            row = await self._database.fetchrow("SELECT * FROM instances WHERE id = $1", instance_id)
            if row is None or row["host_id"] not in (None, self._host_id):
                return None
            provisioner = self._provisioners.get(row["provisioner"])
            if provisioner is None:
                return None  # another host's, or nobody's
            found = next_step(row, self._clock())
            if found.step is Step.NOTHING:
                return found.at
            if found.step is Step.CHECK:
                if await self._check(row, provisioner):
                    return found.at
            else:
                await self._take(found.step, row, provisioner)
        return self._clock()

    async def _take(self, step: Step, row: Record, provisioner: Provisioner) -> None:
        """Take a step, and put on record how it went."""
        began = time.monotonic()
        try:
            # What Redis is told of passwords beside the current one depends on the step.
            only_these = row["old_password_until"] is None or step in (Step.FORGET_PASSWORD, Step.START, Step.CREATE)
            # An end must not fail because a key is missing.
            encryption = None if step in (Step.STOP, Step.PURGE, Step.ROLL_BACK) else self._encryption
            spec = spec_of(row, encryption, only_these_passwords=only_these)
            with tracing.work(step.value, redisgate_instance=str(row["id"]), redisgate_provisioner=row["provisioner"]):
                await _STEPS[step](self, row, spec, provisioner)
        except (ProvisionError, DecryptionError) as error:
            permanent = isinstance(error, DecryptionError) or error.permanent
            PROVISIONING.step(row["provisioner"], step.value, "failed", began)
            await self._failed(row, step, str(error), permanent)
        else:
            PROVISIONING.step(row["provisioner"], step.value, "done", began)
            self._on_step(f"{step.value}: recorded")

    async def _check(self, row: Record, provisioner: Provisioner) -> bool:
        """Whether a running instance still runs; if not, that is recorded."""
        try:
            reason = await provisioner.alive(spec_of(row, self._encryption))
        except (ProvisionError, DecryptionError) as error:
            reason = str(error)
        if reason is None:
            if row["attempts"] and self._clock() - row["status_at"] > timedelta(seconds=STABLE_SECONDS):
                await self._database.execute(
                    "UPDATE instances SET attempts = 0, retry_at = NULL WHERE id = $1 AND status = 'running'", row["id"]
                )
            return True
        log.warning("instance %s: %s", row["id"], reason)
        PROVISIONING.step(row["provisioner"], Step.CHECK.value, "failed", time.monotonic())
        async with self._database.transaction() as connection:
            await connection.execute(
                "UPDATE instances SET status = 'error', status_reason = $2, status_at = now(), attempts = attempts + 1,"
                " retry_at = $3 WHERE id = $1 AND status = 'running'",
                row["id"],
                f"{reason}; it is being brought back",
                self._clock() + backoff(row["attempts"]),
            )
            await self._note(connection, row, "check", "failed", reason)
        self._on_step("check: recorded")
        return False

    # Steps. Each records its end; the beginning where people would otherwise be told something else meanwhile.

    async def _create(self, row: Record, spec: Spec, provisioner: Provisioner) -> None:
        claimed = await self._database.fetchval(
            "UPDATE instances SET status = 'creating', status_at = now(), host_id = $2 WHERE id = $1"
            " AND desired_state = 'running' AND (host_id IS NULL OR host_id = $2) RETURNING id",
            row["id"],
            self._host_id if row["provisioner"] == "local" else None,
        )
        if claimed is None:
            return  # another host was faster, or it is not wanted any more
        self._on_step("create: claimed")
        await self._runs(row, "create", await provisioner.ensure(spec))

    async def _roll_back(self, row: Record, spec: Spec, provisioner: Provisioner) -> None:
        await provisioner.destroy(spec)
        async with self._database.transaction() as connection:
            await connection.execute(
                "UPDATE instances SET status = 'error', status_at = now(), counts_against_quota = false,"
                " host_id = NULL, endpoint = NULL, process = NULL, retry_at = NULL,"
                " observed_generation = greatest(observed_generation, $2) WHERE id = $1",
                row["id"],
                row["generation"],
            )
            await self._note(connection, row, "roll back", "done", row["status_reason"])
            await audit.record(
                connection,
                self._actor,
                "instances.create",
                ("instance", row["id"]),
                after={"reason": row["status_reason"]},
                outcome="failure",
                organization_id=row["organization_id"],
            )

    async def _start(self, row: Record, spec: Spec, provisioner: Provisioner) -> None:
        if row["status"] != "error":
            await self._status(row, "updating")
        await self._runs(row, "start", await provisioner.ensure(spec), keep_attempts=row["status"] == "error")

    async def _restart(self, row: Record, spec: Spec, provisioner: Provisioner) -> None:
        await self._status(row, "updating")
        await provisioner.stop(spec)
        await self._runs(row, "restart", await provisioner.ensure(spec), restarted=True)

    async def _update(self, row: Record, spec: Spec, provisioner: Provisioner) -> None:
        await self._status(row, "updating")
        await self._runs(row, "update", await provisioner.ensure(spec))

    async def _load(self, row: Record, spec: Spec, provisioner: Provisioner) -> None:
        await self._status(row, "updating")
        assert isinstance(provisioner, LoadsSnapshots), "only instances that can load a snapshot are given one"
        try:
            found = await provisioner.load(spec, row["load_upload"])
        except ProvisionError as error:
            # Its data is as it was: it is not tried again, and the next step starts what may not run.
            log.warning("instance %s: a snapshot was not loaded: %s", row["id"], error)
            async with self._database.transaction() as connection:
                await self._loaded(connection, row)
                await self._note(connection, row, Step.LOAD.value, "failed", f"{error}; the data is as it was")
                await audit.record(
                    connection,
                    self._actor,
                    "instances.load",
                    ("instance", row["id"]),
                    after={"reason": str(error)},
                    outcome="failure",
                    organization_id=row["organization_id"],
                )
            self._on_step("load a snapshot: failure recorded")
        else:
            await self._runs(row, Step.LOAD.value, found, loaded=True)

    async def _loaded(self, connection: Connection, row: Record) -> None:
        """Nothing is to be loaded any more."""
        await connection.execute(
            "UPDATE instances SET load_upload = NULL WHERE id = $1 AND load_upload = $2", row["id"], row["load_upload"]
        )

    async def _forget_password(self, row: Record, spec: Spec, provisioner: Provisioner) -> None:
        await self._runs(row, "forget the old password", await provisioner.ensure(spec), forgotten=True)

    async def _stop(self, row: Record, spec: Spec, provisioner: Provisioner) -> None:
        deleted = row["desired_state"] == "deleted"
        await self._status(row, "deleting" if deleted else "stopping")
        if row["host_id"] is not None or row["provisioner"] != "local":
            await provisioner.stop(spec)
        async with self._database.transaction() as connection:
            await connection.execute(
                "UPDATE instances SET status = 'stopped', status_reason = NULL, status_at = now(), process = NULL,"
                " attempts = 0, retry_at = NULL, observed_generation = greatest(observed_generation, $2),"
                " restarts_done = greatest(restarts_done, $3) WHERE id = $1 AND desired_state = $4",
                row["id"],
                row["generation"],
                row["restarts_wanted"],
                row["desired_state"],
            )
            await self._note(connection, row, "stop", "done", None)

    async def _purge(self, row: Record, spec: Spec, provisioner: Provisioner) -> None:
        if row["host_id"] is not None or row["provisioner"] != "local":
            await provisioner.destroy(spec)
        async with self._database.transaction() as connection:
            gone = await connection.fetchval(
                "DELETE FROM instances WHERE id = $1 AND desired_state = 'deleted' AND purge_at <= $2 RETURNING id",
                row["id"],
                self._clock(),
            )
            if gone is not None:
                await audit.record(
                    connection,
                    self._actor,
                    "instances.purge",
                    ("instance", row["id"]),
                    {"name": row["name"], "slug": row["slug"], "deleted_at": row["deleted_at"]},
                    organization_id=row["organization_id"],
                )

    # Recording

    async def _status(self, row: Record, status: str) -> None:
        if row["status"] != status:
            await self._database.execute(
                "UPDATE instances SET status = $2, status_at = now() WHERE id = $1 AND desired_state = $3",
                row["id"],
                status,
                row["desired_state"],
            )
            self._on_step(f"{status}: recorded")

    async def _runs(
        self,
        row: Record,
        step: str,
        found: Found,
        *,
        keep_attempts: bool = False,
        restarted: bool = False,
        forgotten: bool = False,
        loaded: bool = False,
    ) -> None:
        """Record that an instance runs as its row, as it was read, says."""
        switched = row["next_password_encrypted"] is not None
        # `desired_state` may have changed meanwhile: what there is is recorded all the same, and the next step is
        # another one; `password` may have been rotated once more: then the newest waits for its turn.
        async with self._database.transaction() as connection:
            await connection.execute(
                "UPDATE instances SET status = CASE WHEN desired_state = 'running' THEN 'running' ELSE status END,"
                " status_reason = CASE WHEN desired_state = 'running' THEN $2 ELSE status_reason END,"
                " status_at = now(), endpoint = $3, process = $4, redis_version = coalesce($5, redis_version),"
                " provisioned_at = coalesce(provisioned_at, now()),"
                " observed_generation = greatest(observed_generation, $6),"
                " attempts = CASE WHEN $7 THEN attempts ELSE 0 END, retry_at = NULL,"
                " restarts_done = CASE WHEN $8 THEN greatest(restarts_done, $9) ELSE restarts_done END,"
                " old_password_until = CASE WHEN $10 THEN NULL ELSE old_password_until END WHERE id = $1",
                row["id"],
                found.warning,
                found.endpoint,
                found.process,
                found.redis_version,
                row["generation"],
                keep_attempts,
                restarted or row["provisioned_at"] is None,
                row["restarts_wanted"],
                forgotten,
            )
            if switched:
                await self._switch_password(connection, row)
            if loaded:
                await self._loaded(connection, row)
            await self._note(connection, row, step, "done", found.warning)

    async def _switch_password(self, connection: Connection, row: Record) -> None:
        """Redis accepts the next password: from now on the gateways use it."""
        context = secret_context(row["id"], "next_password")
        password = self._encryption.decrypt(row["next_password_encrypted"], context)
        await connection.execute(
            "UPDATE instances SET password_encrypted = $2, old_password_until = $3, next_password_encrypted ="
            " CASE WHEN next_password_encrypted = $4 THEN NULL ELSE next_password_encrypted END WHERE id = $1",
            row["id"],
            self._encryption.encrypt(password, secret_context(row["id"], "password")),
            self._clock() + timedelta(seconds=PASSWORD_OVERLAP_SECONDS),
            row["next_password_encrypted"],
        )

    async def _failed(self, row: Record, step: Step, reason: str, permanent: bool) -> None:
        attempts = row["attempts"] + 1
        created = row["provisioned_at"] is not None
        if permanent and not created:
            attempts = max(attempts, MAX_CREATE_ATTEMPTS)
        log.warning("instance %s: %s failed: %s", row["id"], step.value, reason)
        async with self._database.transaction() as connection:
            await connection.execute(
                "UPDATE instances SET status = CASE WHEN $3 THEN 'error' ELSE status END, status_reason = $2,"
                " status_at = now(), attempts = $4, retry_at = $5 WHERE id = $1 AND desired_state = $6",
                row["id"],
                reason,
                created and row["desired_state"] == "running",
                attempts,
                None if step is Step.CREATE and attempts >= MAX_CREATE_ATTEMPTS else self._clock() + backoff(attempts),
                row["desired_state"],
            )
            await self._note(connection, row, step.value, "failed", reason)
        self._on_step(f"{step.value}: failure recorded")

    async def _note(self, connection: Connection, row: Record, step: str, outcome: str, detail: str | None) -> None:
        await connection.execute(
            "INSERT INTO instance_steps (instance_id, host_id, generation, step, outcome, detail)"
            " SELECT id, $2, $3, $4, $5, $6 FROM instances WHERE id = $1",
            row["id"],
            self._host_id,
            row["generation"],
            step,
            outcome,
            detail,
        )
        await connection.execute(
            "DELETE FROM instance_steps WHERE instance_id = $1 AND id <= (SELECT id FROM instance_steps"
            " WHERE instance_id = $1 ORDER BY id DESC OFFSET $2 LIMIT 1)",
            row["id"],
            KEPT_STEPS,
        )


_STEPS: Final = {
    Step.CREATE: Reconciler._create,
    Step.ROLL_BACK: Reconciler._roll_back,
    Step.START: Reconciler._start,
    Step.RESTART: Reconciler._restart,
    Step.UPDATE: Reconciler._update,
    Step.FORGET_PASSWORD: Reconciler._forget_password,
    Step.LOAD: Reconciler._load,
    Step.STOP: Reconciler._stop,
    Step.PURGE: Reconciler._purge,
}
