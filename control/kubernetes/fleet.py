"""The control plane's instances in the cluster, as one process of the deployment looks after them.

A change of a resource is looked at at once, all of them every half minute. What somebody changed in the cluster that
our API can say too (memory, eviction, version, suspended or not) counts as asked for: it is written down, and shows
in the dashboard. What is not theirs to change is put back. A resource that says that it is ours, and of which we know
nothing, is reported and left alone: a database that was restored from an old backup must not end anybody's data.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

from control import audit, quotas
from control.database import DatabaseAway, Record
from control.encryption import DecryptionError
from control.http import Context, NotFound, QuotaExceeded
from control.instances import MAX_MEMORY, spec_of
from control.kubernetes.client import EVENTS, INSTANCES, SECRETS, KubernetesClient, KubernetesError, Object, key_of
from control.kubernetes.reflector import ADDED, DELETED, Reflector
from control.kubernetes.routes import ROUTE_LABEL, RouteError, connect, gateway_namespace, read_route, routed_uid
from control.kubernetes.spec import MANAGED_LABEL
from control.provisioners import OnStep, Provisioner, ProvisionError, Spec
from control.provisioners.kubernetes import (
    FIELD_MANAGER,
    INSTANCE_LABEL,
    KubernetesProvisioner,
    max_memory_of,
)
from control.quotas import MIB, Limits
from resp.address import Address

SWEEP_SECONDS: Final = 30.0
"""Between two looks at everything."""
MAX_CHANGED: Final = 10_000
"""Resources that have changed and wait to be looked at; beyond it the next sweep finds them."""
GROWTH: Final = 1.5
"""By how much an instance's memory grows when it stays nearly full."""

log = logging.getLogger(__name__)


class Addresses:
    """Where instances in the cluster are: see `control.instances.Routes`."""

    def __init__(self, reflector: Reflector) -> None:
        self._addresses: dict[str, Address] = {}
        reflector.subscribe(self._heard)

    def address(self, uid: str) -> Address | None:
        """None: there is no way to it now."""
        return self._addresses.get(uid)

    def _heard(self, kind: str, secret: Object, before: Object | None) -> None:
        uid = routed_uid(secret)
        if uid is None:
            return
        try:
            if kind == DELETED:
                self._addresses.pop(uid, None)
            else:
                self._addresses[uid] = read_route(secret).address
        except RouteError as error:
            self._addresses.pop(uid, None)
            log.warning("%s cannot be read: %s", secret["metadata"]["name"], error)


class Fleet:
    """Of the steward that works for the whole deployment."""

    def __init__(
        self, context: Context, look_at: Callable[[UUID], None], *, on_step: OnStep = lambda step: None
    ) -> None:
        """`look_at` has the reconciler look at an instance."""
        self._context = context
        self._look_at = look_at
        self._on_step = on_step
        self._actor = audit.Actor(context.audit, "system", name="steward")
        self._changed: dict[UUID, None] = {}  # in the order of the changes
        self._wake = asyncio.Event()
        self._new = False  # whether there may be resources of which we know nothing
        self._reported: set[str] = set()  # uids of resources of which we know nothing
        self._trouble = ""

    async def run(self, offer: Callable[[Provisioner], None]) -> None:
        """Work until cancelled; `offer` gets the provisioner once there is one."""
        settings = self._context.gateway_settings
        client = await connect(settings.cluster)
        try:
            self._provisioner = KubernetesProvisioner(
                client,
                self._limits,
                base_domain=settings.base_domain,
                max_request_bytes=settings.limits.max_body_bytes,
                on_step=self._on_step,
            )
            resources = Reflector(client, INSTANCES, labels=f"{MANAGED_LABEL}={FIELD_MANAGER}")
            resources.subscribe(self._heard)
            routes = Reflector(
                client, SECRETS, namespace=gateway_namespace(settings.cluster, client), labels=f"{ROUTE_LABEL}=true"
            )
            self._context.extra["kubernetes.routes"] = Addresses(routes)
            offer(self._provisioner)
            async with asyncio.TaskGroup() as group:
                group.create_task(resources.run())
                group.create_task(routes.run())
                group.create_task(self._work(client, resources))
        finally:
            self._context.extra.pop("kubernetes.routes", None)
            await client.close()

    def _heard(self, kind: str, resource: Object, before: Object | None) -> None:
        self._new = self._new or kind == ADDED
        self._wake.set()
        instance_id = _instance_id(resource)
        if instance_id is not None and len(self._changed) < MAX_CHANGED:
            self._changed[instance_id] = None

    async def _work(self, client: KubernetesClient, resources: Reflector) -> None:
        loop = asyncio.get_running_loop()
        sweep_at = loop.time()
        while True:
            try:
                if loop.time() >= sweep_at:
                    sweep_at = loop.time() + SWEEP_SECONDS
                    await self._sweep(client, resources)
                while self._changed:
                    instance_id = next(iter(self._changed))
                    del self._changed[instance_id]
                    self._look_at(instance_id)
                    await self._compare(instance_id)
                if self._new and resources.synced.is_set():
                    self._new = False
                    await self._report_orphans(client, list(resources.store.values()))
                self._trouble = ""
            except (DatabaseAway, KubernetesError) as error:
                if str(error) != self._trouble:
                    log.warning("instances in the cluster are not looked after: %s", error)
                self._trouble = str(error)
            self._wake.clear()
            try:
                async with asyncio.timeout(max(sweep_at - loop.time(), 0.05)):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _sweep(self, client: KubernetesClient, resources: Reflector) -> None:
        rows = await self._context.database.fetch("SELECT * FROM instances WHERE provisioner = 'kubernetes'")
        for row in rows:
            self._look_at(row["id"])
            await self._compare(row["id"])
        for organization_id in {row["organization_id"] for row in rows if row["provisioned_at"] is not None}:
            await self._provisioner.limit(organization_id)
        self._new = True
        await self._scale()

    async def _limits(self, organization_id: UUID) -> Limits:
        async with self._context.database.transaction() as connection:
            try:
                return (await quotas.get_quota(connection, organization_id)).limits
            except NotFound:  # it is being deleted, and its instances with it
                return quotas.PLANS["free"]

    # What somebody changed in the cluster

    async def _compare(self, instance_id: UUID) -> None:
        """Take over what was asked for in the cluster, and put back the rest. Raises DatabaseAway, KubernetesError."""
        row = await self._context.database.fetchrow(
            "SELECT * FROM instances WHERE id = $1 AND provisioner = 'kubernetes' AND provisioned_at IS NOT NULL"
            " AND observed_generation >= generation AND (status, desired_state) IN"
            " (('running', 'running'), ('stopped', 'stopped'), ('error', 'running'))",
            instance_id,
        )
        if row is None:
            return  # our own change is under way
        try:
            spec = spec_of(row, self._context.encryption)
            # Read after the row: what was recorded as done had been applied before.
            live = await self._provisioner.find(spec)
            if live is None or "deletionTimestamp" in live["metadata"]:
                return
            changes = changes_in(live, row)
            if changes:
                try:
                    await self._take_over(row, changes)
                except QuotaExceeded as error:
                    await self._refuse_memory(row, spec, live, changes, error)
                return
            if row["status"] != "error":
                suspend = row["desired_state"] == "stopped"
                if await self._provisioner.put_back(spec, live, suspend=suspend):
                    log.warning("instance %s: what was changed of its resource in the cluster is put back", instance_id)
        except (ProvisionError, DecryptionError) as error:
            log.warning("instance %s: %s", instance_id, error)

    async def _refuse_memory(
        self, row: Record, spec: Spec, live: Object, changes: dict[str, Any], error: QuotaExceeded
    ) -> None:
        """Put back memory for which the organization's quota has no room; the rest was asked for as ever."""
        memory = changes.pop("max_memory")
        if changes:
            await self._take_over(row, changes)  # the memory is put back when that is brought about
        else:
            await self._provisioner.put_back(spec, live, suspend=row["desired_state"] == "stopped")
        log.warning("instance %s: %d bytes, asked for in the cluster, are refused: %s", row["id"], memory, error)
        await self._context.database.execute(
            "UPDATE instances SET status_reason = $2 WHERE id = $1",
            row["id"],
            f"the memory that its resource in the cluster was given is put back, over the quota: {error}",
        )

    async def _take_over(self, row: Record, changes: dict[str, Any]) -> None:
        """Write down what was asked for in the cluster, unless something else was asked for meanwhile.

        Raises:
            QuotaExceeded: it is more memory than the organization may have; then nothing is written.
        """
        assignments = ", ".join(f"{name} = ${number}" for number, name in enumerate(changes, 3))
        async with self._context.database.transaction() as connection:
            if "max_memory" in changes:
                await quotas.reserve_instance(
                    connection, row["organization_id"], changes["max_memory"], instance_id=row["id"]
                )
            taken = await connection.fetchval(
                f"UPDATE instances SET {assignments}, generation = generation + 1, updated_at = now(), status ="
                " CASE WHEN status = 'running' THEN 'updating' ELSE status END"
                " WHERE id = $1 AND generation = $2 RETURNING id",
                row["id"],
                row["generation"],
                *changes.values(),
            )
            if taken is None:
                return
            await audit.record(
                connection,
                self._actor,
                "instances.update",
                ("instance", row["id"]),
                {name: row[name] for name in changes},
                {**changes, "by": "a change of its resource in the cluster"},
                organization_id=row["organization_id"],
            )
        log.info("instance %s: changed in the cluster: %s", row["id"], ", ".join(changes))

    # Resources of which we know nothing

    async def _report_orphans(self, client: KubernetesClient, resources: list[Object]) -> None:
        ids = [_instance_id(resource) for resource in resources]
        rows = await self._context.database.fetch("SELECT id FROM instances WHERE id = ANY ($1)", ids)
        known = {row["id"] for row in rows}
        orphans = [resource for resource in resources if _instance_id(resource) not in known]
        self._reported &= {resource["metadata"]["uid"] for resource in orphans}
        for resource in orphans:
            uid = resource["metadata"]["uid"]
            if uid in self._reported:
                continue
            self._reported.add(uid)
            namespace, name = key_of(resource)
            message = "the control plane that made this instance knows nothing of it; delete it if nobody needs it"
            log.warning("RedisHttpInstance %s/%s: %s", namespace, name, message)
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            await client.create(
                {
                    "apiVersion": EVENTS.api_version,
                    "kind": EVENTS.kind,
                    "metadata": {"name": f"{name}.{uuid4().hex[:12]}", "namespace": namespace},
                    "involvedObject": {
                        "apiVersion": INSTANCES.api_version,
                        "kind": INSTANCES.kind,
                        "namespace": namespace,
                        "name": name,
                        "uid": uid,
                    },
                    "type": "Warning",
                    "reason": "Orphan",
                    "message": message,
                    "source": {"component": FIELD_MANAGER},
                    "firstTimestamp": now,
                    "lastTimestamp": now,
                    "count": 1,
                }
            )

    # Memory

    async def _scale(self) -> None:
        """Give an instance that has stayed nearly full more memory, as far as its organization's quota goes."""
        cluster = self._context.gateway_settings.cluster
        if not cluster.scale_memory_above:
            return
        minutes = max(1, round(cluster.scale_memory_after / 60))
        rows = await self._context.database.fetch(
            "SELECT i.* FROM instances i WHERE i.provisioner = 'kubernetes' AND i.status = 'running'"
            " AND i.desired_state = 'running' AND i.observed_generation >= i.generation AND i.updated_at < $2"
            " AND (SELECT count(*) >= $3 AND min(s.memory) >= i.max_memory * $1::float8 / 100 FROM instance_samples s"
            " WHERE s.instance_id = i.id AND s.at >= $2)",
            float(cluster.scale_memory_above),
            self._context.now() - timedelta(minutes=minutes),
            minutes,
        )
        for row in rows:
            await self._grow(row)

    async def _grow(self, row: Record) -> None:
        memory = min(-(-int(row["max_memory"] * GROWTH) // MIB) * MIB, MAX_MEMORY)
        if memory <= row["max_memory"]:
            return
        try:
            async with self._context.database.transaction() as connection:
                await quotas.reserve_instance(connection, row["organization_id"], memory, instance_id=row["id"])
                grown = await connection.fetchval(
                    "UPDATE instances SET max_memory = $3, generation = generation + 1, updated_at = now(),"
                    " status = 'updating' WHERE id = $1 AND generation = $2 RETURNING id",
                    row["id"],
                    row["generation"],
                    memory,
                )
                if grown is None:
                    return
                await audit.record(
                    connection,
                    self._actor,
                    "instances.update",
                    ("instance", row["id"]),
                    {"max_memory": row["max_memory"]},
                    {"max_memory": memory, "by": "it has stayed nearly full"},
                    organization_id=row["organization_id"],
                )
        except QuotaExceeded as error:
            log.warning("instance %s is nearly full and cannot grow: %s", row["id"], error)
            await self._context.database.execute(
                "UPDATE instances SET status_reason = $3 WHERE id = $1 AND generation = $2",
                row["id"],
                row["generation"],
                f"it is nearly full, and the organization's quota leaves no room to grow: {error}",
            )
            return
        log.info("instance %s has stayed nearly full: from %d to %d bytes", row["id"], row["max_memory"], memory)


def changes_in(live: Object, row: Record) -> dict[str, Any]:
    """What the resource says otherwise than the row, of what the API can say too."""
    spec, changes = live["spec"], dict[str, Any]()
    memory = max_memory_of(live)
    # The resource has it as a share of the pod's memory: a byte or two is rounding.
    if memory is not None and abs(memory - row["max_memory"]) > max(2, row["max_memory"] // 1000):
        changes["max_memory"] = min(max(memory, MIB), MAX_MEMORY)
    eviction = (spec.get("memory") or {}).get("evictionPolicy")
    if eviction is not None and eviction != row["eviction"]:
        changes["eviction"] = eviction
    engine = spec.get("engine") or {}
    wanted = row["redis_version_wanted"]
    if wanted is not None and engine.get("type") == "Redis" and engine.get("version") != wanted:
        changes["redis_version_wanted"] = engine.get("version")
    suspended = bool(spec.get("suspend"))
    if suspended != (row["desired_state"] == "stopped"):
        changes["desired_state"] = "stopped" if suspended else "running"
    if changes.get("max_memory") == row["max_memory"]:
        del changes["max_memory"]
    return changes


def _instance_id(resource: Object) -> UUID | None:
    try:
        return UUID((resource["metadata"].get("labels") or {}).get(INSTANCE_LABEL, ""))
    except ValueError:
        return None
