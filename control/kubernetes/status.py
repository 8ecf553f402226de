"""The status of a resource: how far it is, in conditions with reasons that people can act on.

Pure functions of what was planned and seen; the operator writes what they say. RouteProgrammed is not ours: the
gateway writes it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from control.kubernetes import plan as planning
from control.kubernetes.apply import OWNER_LABEL
from control.kubernetes.client import CRON_JOBS, JOBS, VOLUME_CLAIMS, Object, Resource
from control.kubernetes.plan import Observed, Problem
from control.kubernetes.redis import Running
from control.kubernetes.spec import Instance, quantity

Children = Callable[[Resource], list[Object]]
"""What there is of an instance, of one kind."""


@dataclass(frozen=True)
class Condition:
    """As in the status, without what follows from the time before."""

    status: bool
    reason: str
    message: str


@dataclass(frozen=True)
class Health:
    """Of the pods."""

    ready: int
    current: bool
    """It is told of what is wanted now; else of what was before."""
    settled: bool
    """Nothing is being rolled out, as far as the controller of the pods has told."""
    state: str
    """Changes with each start of a pod that we can see."""


def conditions_of(
    instance: Instance,
    observed: Observed,
    health: Health,
    running: Running | None,
    problems: Mapping[str, list[Problem]],
    children: Children,
    was_ready: bool,
) -> dict[str, Condition]:
    """What is to be said, by type of the condition."""
    spec, pods = instance.spec, instance.spec.pods

    def unless_problem(condition: str, reason: str, message: str) -> Condition:
        found = problems.get(condition)
        if not found:
            return Condition(True, reason, message)
        return Condition(False, found[0].reason, "; ".join(problem.message for problem in found))

    where = "there is no password yet"
    if observed.logins:
        where = f"the password is in Secret {observed.logins[0].secret_name},"
        where += f" the API keys are in {planning.key_name(instance)}"
    accepted = "Accepted" if running is not None else "Created"
    conditions = {"CredentialsReady": unless_problem("CredentialsReady", accepted, where)}
    if pods == 0:
        why = "spec.suspend is set" if spec.suspend else "spec.replicas is 0"
        conditions["Suspended"] = Condition(True, "Suspended", f"{why}: no pod runs, and its data is kept")
    else:
        conditions["Suspended"] = Condition(False, "Running", "it is to run")
    if spec.persistence is not None:
        conditions["StorageReady"] = _storage_condition(children, unless_problem)
    if spec.tls is not None:
        conditions["TLSReady"] = unless_problem("TLSReady", "CertificateThere", "the certificate is mounted")
    if spec.backup is not None:
        conditions["BackupHealthy"] = _backup_condition(children, unless_problem)
    degraded = problems.get("Degraded")
    conditions["Degraded"] = (
        Condition(True, degraded[0].reason, "; ".join(problem.message for problem in degraded))
        if degraded
        else Condition(False, "AsExpected", "nothing is known to be wrong")
    )
    stands_in_the_way = [
        (name, conditions[name])
        for name in ("CredentialsReady", "TLSReady")
        if name in conditions and not conditions[name].status
    ]
    unreachable = degraded is not None and any(problem.reason == "Unreachable" for problem in degraded)
    if stands_in_the_way:
        _, found = stands_in_the_way[0]
        conditions["Ready"] = Condition(False, found.reason, found.message)
    elif pods == 0:
        stopped = health.ready == 0
        text = "it is suspended" if stopped else "its pod is being stopped"
        conditions["Ready"] = Condition(False, "Suspended", text)
    elif not health.current and not was_ready:
        conditions["Ready"] = Condition(False, "PodsNotReady", "the cluster has not begun with the pods yet")
    elif health.ready < pods:
        text = f"{health.ready} of {pods} pods are ready: kubectl describe pod -l {OWNER_LABEL}={instance.uid}"
        conditions["Ready"] = Condition(False, "PodsNotReady", text)
    elif unreachable and degraded is not None:
        conditions["Ready"] = Condition(False, "Unreachable", degraded[0].message)
    else:
        conditions["Ready"] = Condition(True, "Ready", "Redis answers")
    ready = conditions["Ready"]
    if health.settled and (ready.status or pods == 0):
        conditions["Progressing"] = Condition(False, "Settled", "everything is as the resource says")
    else:
        text = "the pods are brought to what the resource says"
        conditions["Progressing"] = Condition(True, "RollingOut", text)
    return conditions


def storage_of(instance: Instance, children: Children) -> Object:
    """What the status tells of the volumes."""
    persistence = instance.spec.persistence
    claims = children(VOLUME_CLAIMS)
    result: Object = {"requested": persistence.size if persistence is not None else ""}
    capacities = [((claim.get("status") or {}).get("capacity") or {}).get("storage") for claim in claims]
    if capacities and all(capacities):
        result["capacity"] = min((str(each) for each in capacities), key=quantity)
    result["resizing"] = [claim["metadata"]["name"] for claim in claims if is_growing(claim)]
    return result


def _storage_condition(children: Children, unless_problem: Callable[..., Condition]) -> Condition:
    claims = children(VOLUME_CLAIMS)
    growing = [claim["metadata"]["name"] for claim in claims if is_growing(claim)]
    condition = unless_problem("StorageReady", "Bound", "the volume is as large as asked")
    if not condition.status:
        return condition
    if growing:
        return Condition(False, "Resizing", f"{', '.join(growing)}: the volume grows")
    if not claims:
        return Condition(False, "ClaimPending", "the volume claim is made with the first pod")
    return condition


def backups_of(children: Children) -> Object:
    """What the status tells of the backups."""
    result: Object = {}
    for schedule in children(CRON_JOBS):
        if done := (schedule.get("status") or {}).get("lastSuccessfulTime"):
            result["lastSuccess"] = done
    failures = [failed for job in children(JOBS) if (failed := _failure(job)) is not None]
    if failures:
        result["lastFailure"], result["message"] = max(failures)
    return result


def _backup_condition(children: Children, unless_problem: Callable[..., Condition]) -> Condition:
    found = backups_of(children)
    if found.get("lastFailure", "") > found.get("lastSuccess", ""):
        return Condition(False, "BackupFailed", found.get("message") or "the last backup failed")
    last = found.get("lastSuccess")
    return unless_problem(
        "BackupHealthy",
        "BackedUp" if last else "Scheduled",
        f"the last one is of {last}" if last else "none was due yet",
    )


def rendered(conditions: Mapping[str, Condition], before: Mapping[str, Object], generation: int) -> list[Object]:
    """As they are written; one whose status is as `before` keeps the time of its last change."""
    now = stamp(datetime.now(UTC))
    result = []
    for kind, condition in conditions.items():
        status, known = "True" if condition.status else "False", before.get(kind, {})
        result.append(
            {
                "type": kind,
                "status": status,
                "reason": condition.reason,
                "message": condition.message,
                "observedGeneration": generation,
                "lastTransitionTime": known["lastTransitionTime"] if known.get("status") == status else now,
            }
        )
    return result


def is_growing(claim: Object) -> bool:
    """Whether a volume claim asks for more than its volume has."""
    capacity = ((claim.get("status") or {}).get("capacity") or {}).get("storage")
    return capacity is not None and quantity(capacity) < size(claim)


def _failure(job: Object) -> tuple[str, str] | None:
    for condition in (job.get("status") or {}).get("conditions") or ():
        if condition["type"] == "Failed" and condition["status"] == "True":
            text = f"Job {job['metadata']['name']}: {condition.get('message') or condition.get('reason') or 'failed'}"
            return condition.get("lastTransitionTime", ""), text
    return None


def stamp(moment: datetime) -> str:
    """As Kubernetes writes times."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def size(claim: Object) -> Decimal:
    """Bytes that a volume claim asks for."""
    return quantity(claim["spec"]["resources"]["requests"]["storage"])
