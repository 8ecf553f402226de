"""Instances that are RedisHttpInstances: we write what is wanted into the cluster, the operator does the rest.

An organization has a namespace, whose quota follows from its plan. The resource's name follows from the row, so what
was made before a crash is found again; a resource that says that it belongs to somebody else is left alone. What the
gateways need to reach an instance comes from the operator: no password of it is kept in PostgreSQL, where the
password's column only tells one rotation from the next.

A resource that somebody deleted in the cluster is not made anew: its data is gone, and an empty instance in its place
would look like the old one.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from control.kubernetes.client import (
    CONFIG_MAPS,
    CRON_JOBS,
    DEPLOYMENTS,
    INSTANCES,
    JOBS,
    LIMIT_RANGES,
    NAMESPACES,
    PODS,
    RESOURCE_QUOTAS,
    SERVICES,
    STATEFUL_SETS,
    VOLUME_CLAIMS,
    ApiError,
    Conflict,
    KubernetesClient,
    KubernetesError,
    NotFound,
    Object,
    Resource,
)
from control.kubernetes.client import Unavailable as ClusterAway
from control.kubernetes.spec import DATA_PERCENT, MANAGED_LABEL, SpecError, quantity
from control.provisioners import Found, OnStep, ProvisionError, Spec
from control.quotas import GIB, MIB, Limits

log = logging.getLogger(__name__)

FIELD_MANAGER: Final = "redisgate-control-plane"
ORGANIZATION_LABEL: Final = "redisgate.io/organization"
INSTANCE_LABEL: Final = "redisgate.io/instance-id"
READY_SECONDS: Final = 120.0
"""For an instance to be ready; then the attempt has failed. Images are pulled and volumes made meanwhile."""
GONE_SECONDS: Final = 60.0
"""For what was deleted to be gone; then it is looked at again later."""
FIRST_LOOK_SECONDS: Final = 0.05
MAX_LOOK_SECONDS: Final = 1.0
"""Between two looks at a resource that is waited for: doubles from the first to the second."""
ROUTE_SECONDS: Final = 5.0
"""For the gateways to say that they route to an instance that is ready; then its owner is told."""

LEAST_POD_MEMORY: Final = 64 * MIB
"""Of a pod, however small its instance; only below 6.4 MiB of data it is less, since the share has at least 10 %."""
LEAST_VOLUME: Final = GIB
VOLUME_FACTOR: Final = 3
"""A volume holds the data, the log of changes since, and a new one while it is being written."""
LEAST_REQUEST_BYTES: Final = 1024
"""The least that the resource allows; what is below that the gateway refuses by the organization's quota."""
HELPER_MEMORY: Final = 256 * MIB
"""For an exporter, a backup or a pod that takes another's place: what one instance may use beside its pod."""
KEPT_ANNOTATION: Final = "redisgate.io/kept-for"
"""On a namespace that outlives its last instance: what is still in it."""
MAX_KEPT_NAMES: Final = 10
"""Of what a namespace is kept for, in the annotation."""
_LOOKED_FOR: Final = (VOLUME_CLAIMS, PODS, SERVICES, CONFIG_MAPS, DEPLOYMENTS, STATEFUL_SETS, CRON_JOBS, JOBS)
"""Before a namespace is deleted. Secrets are not: whoever may list them may read them."""
_OPERATOR: Final = "redisgate-operator"
_AUTOMATIC: Final = frozenset(("kube-root-ca.crt", "openshift-service-ca.crt", "istio-ca-root-cert"))
"""ConfigMaps that a cluster writes into each namespace."""

_HOPELESS: Final = frozenset(("ModeNotBuilt", "InvalidSpec", "RefusedByCluster", "NameTaken", "NamespaceRefused"))


@dataclass(frozen=True)
class Place:
    """Where the resource of an instance is."""

    namespace: str
    name: str


def place_of(spec: Spec) -> Place:
    """From the row alone."""
    assert spec.organization_id is not None
    # At most 40 characters, and a letter first.
    slug = spec.slug if spec.slug[:1].isalpha() else f"r-{spec.slug}"
    return Place(namespace_of(spec.organization_id), f"{slug[:31].rstrip('-')}-{spec.id.hex[:8]}")


def namespace_of(organization_id: UUID) -> str:
    """Of an organization."""
    return f"redisgate-{organization_id}"


def memory_of(max_memory: int) -> tuple[int, int]:
    """A pod's memory in bytes, and the percentage of it that the data may take, so that this is `max_memory`."""
    percent = max(10, min(DATA_PERCENT, 100 * max_memory // LEAST_POD_MEMORY))
    return math.ceil(max_memory * 100 / percent), percent


def volume_of(max_memory: int) -> int:
    """Bytes, in whole GiB."""
    return max(LEAST_VOLUME, math.ceil(VOLUME_FACTOR * max_memory / GIB) * GIB)


def manifest(spec: Spec, *, suspend: bool, base_domain: str, max_request_bytes: int, live: Object | None) -> Object:
    """The resource of an instance, as far as it is ours to say; `live` is the resource as it is."""
    place = place_of(spec)
    memory, percent = memory_of(spec.max_memory)
    metadata: Object = {
        "name": place.name,
        "namespace": place.namespace,
        "labels": {
            MANAGED_LABEL: FIELD_MANAGER,
            ORGANIZATION_LABEL: str(spec.organization_id),
            INSTANCE_LABEL: str(spec.id),
        },
    }
    wanted: Object = {
        "mode": "Standalone",
        "replicas": 1,
        "suspend": suspend,
        "resources": {
            "requests": {"cpu": spec.cpu_request or "50m", "memory": spec.memory_request or str(memory)},
            "limits": {"memory": str(memory)},
        },
        "memory": {"maxmemoryPercent": percent, "evictionPolicy": spec.eviction},
        "gateway": {
            "hosts": [f"{spec.label}.{base_domain}"] if base_domain else [],
            "maxRequestBytes": max(max_request_bytes, LEAST_REQUEST_BYTES),
        },
        "deletionPolicy": "Delete",
    }
    if spec.redis_version is not None:
        wanted["engine"] = {"type": "Redis", "version": spec.redis_version}
    if spec.persistence:
        size = volume_of(spec.max_memory)
        if live is not None:  # a volume never shrinks
            size = max(size, int(quantity((live["spec"].get("persistence") or {}).get("size", 0))))
        wanted["persistence"] = {"size": str(size)}
    nonce = spec.next_password or spec.password
    if nonce is not None:
        # Another one whenever the password's column changes, and only then.
        trigger = hashlib.blake2b(nonce.encode(), digest_size=16, person=b"rotation").hexdigest()
        wanted["auth"] = {"rotation": {"trigger": trigger}}
    if live is not None:
        metadata["uid"] = live["metadata"]["uid"]
    return {"apiVersion": INSTANCES.api_version, "kind": INSTANCES.kind, "metadata": metadata, "spec": wanted}


def max_memory_of(resource: Object) -> int | None:
    """How much data an instance may hold, by its resource: bytes, None where it does not say."""
    spec = resource["spec"]
    percent = (spec.get("memory") or {}).get("maxmemoryPercent")
    limit = ((spec.get("resources") or {}).get("limits") or {}).get("memory")
    if percent is None or limit is None:
        return None
    try:
        return int(quantity(limit)) * int(percent) // 100
    except SpecError:
        return None


def condition_of(resource: Object, name: str) -> Object:
    """A condition of the resource's newest generation; without one, nothing is known yet."""
    for condition in (resource.get("status") or {}).get("conditions") or ():
        if condition["type"] == name and condition.get("observedGeneration", 0) >= resource["metadata"]["generation"]:
            found: Object = condition
            return found
    return {}


class Foreign(ProvisionError):
    """What has the name in the cluster is not ours."""


class KubernetesProvisioner:
    """Of one process, which is the only one in the deployment that works on instances of the cluster."""

    def __init__(
        self,
        client: KubernetesClient,
        limits: Callable[[UUID], Awaitable[Limits]],
        *,
        base_domain: str = "",
        max_request_bytes: int = 1024 * 1024,
        on_step: OnStep = lambda step: None,
    ) -> None:
        """`limits` tells what an organization may use; `max_request_bytes` is the gateway's own limit."""
        self._client = client
        self._limits = limits
        self._base_domain = base_domain.strip(".")
        self._max_request_bytes = max_request_bytes
        self._on_step = on_step
        self._quotas: dict[UUID, Limits] = {}  # as applied last, by organization
        self._locks: dict[UUID, asyncio.Lock] = {}  # by organization; as many as have instances here

    async def ensure(self, spec: Spec) -> Found:
        """See `Provisioner.ensure`."""
        place = place_of(spec)
        try:
            async with self._organization(spec):
                live = await self._find(spec)
                if live is None and spec.endpoint is not None:
                    raise ProvisionError(
                        f"its RedisHttpInstance {place.name} was deleted in the cluster, and its data with it;"
                        " delete it here too, and make another"
                    )
                if live is None:
                    await self._ensure_namespace(spec)
                live = await self.apply(spec, live, suspend=False)
                self._on_step("kubernetes: applied")
            live = await self._until_ready(live)
            warning = await self._route_warning(live)
        except KubernetesError as error:
            raise _failure(error) from error
        status = live.get("status") or {}
        endpoint = {"kubernetes": live["metadata"]["uid"], "namespace": place.namespace, "name": place.name}
        return Found(endpoint, status.get("version"), warning=warning)

    async def alive(self, spec: Spec) -> str | None:
        """See `Provisioner.alive`. With the API server away nothing is said against an instance: the gateways, who do
        not need it, go on using it."""
        try:
            live = await self._find(spec)
        except ClusterAway:
            return None
        except KubernetesError as error:
            raise _failure(error) from error
        if live is None:
            return f"its RedisHttpInstance {place_of(spec).name} is no longer in the cluster"
        ready = condition_of(live, "Ready")
        if ready.get("status") == "False":
            return f"{ready['reason']}: {ready['message']}"
        return None

    async def stop(self, spec: Spec) -> None:
        """See `Provisioner.stop`: suspended, its volume stays."""
        try:
            live = await self._find(spec)
            if live is None:
                return
            live = await self.apply(spec, live, suspend=True)
            await self._until(
                live, lambda item: condition_of(item, "Ready").get("reason") == "Suspended", GONE_SECONDS, "stopped"
            )
        except (NotFound, Foreign):
            return
        except KubernetesError as error:
            raise _failure(error) from error

    async def destroy(self, spec: Spec) -> None:
        """See `Provisioner.destroy`. The namespace goes with its last instance, unless there is more in it."""
        place = place_of(spec)
        try:
            live = await self._find(spec)
            if live is not None:
                if live["spec"].get("deletionProtection"):
                    raise ProvisionError("it is protected from deletion in the cluster: spec.deletionProtection")
                uid = live["metadata"]["uid"]
                if "deletionTimestamp" not in live["metadata"]:
                    await self._client.delete(INSTANCES, place.name, place.namespace, uid=uid)
                    self._on_step("kubernetes: deleted")
                try:
                    await self._until(live, lambda item: item["metadata"]["uid"] != uid, GONE_SECONDS, "gone")
                except NotFound:
                    pass
            async with self._organization(spec):
                await self._remove_namespace(spec)
        except (NotFound, Foreign):
            return
        except KubernetesError as error:
            raise _failure(error) from error

    async def apply(self, spec: Spec, live: Object | None, *, suspend: bool) -> Object:
        """Write what is wanted. Raises KubernetesError."""
        wanted = await self._manifest(spec, live, suspend=suspend)
        # What is new is not forced: it would fall on somebody who was quicker.
        return await self._client.apply(wanted, field_manager=FIELD_MANAGER, force=live is not None)

    async def put_back(self, spec: Spec, live: Object, *, suspend: bool) -> bool:
        """Undo what somebody changed of what is ours to say; whether there was anything. Raises KubernetesError."""
        wanted = await self._manifest(spec, live, suspend=suspend)
        if _contains(live, {"metadata": wanted["metadata"], "spec": wanted["spec"]}):
            return False
        await self._client.apply(wanted, field_manager=FIELD_MANAGER, force=True)
        return True

    async def _manifest(self, spec: Spec, live: Object | None, *, suspend: bool) -> Object:
        assert spec.organization_id is not None
        limits = await self._limits(spec.organization_id)
        size = min(limits.max_request_bytes or self._max_request_bytes, self._max_request_bytes)
        return manifest(spec, suspend=suspend, base_domain=self._base_domain, max_request_bytes=size, live=live)

    async def find(self, spec: Spec) -> Object | None:
        """The resource of an instance; None: there is none. Raises KubernetesError, ProvisionError."""
        return await self._find(spec)

    async def _find(self, spec: Spec) -> Object | None:
        place = place_of(spec)
        try:
            live = await self._client.get(INSTANCES, place.name, place.namespace)
        except NotFound:
            return None
        labels = live["metadata"].get("labels") or {}
        recorded = (spec.endpoint or {}).get("kubernetes")
        ours = labels.get(INSTANCE_LABEL) == str(spec.id) or live["metadata"]["uid"] == recorded
        if not ours or (recorded is not None and live["metadata"]["uid"] != recorded):
            raise Foreign(
                f"{place.namespace}/{place.name} in the cluster is somebody else's, and is left alone", permanent=True
            )
        return live

    async def _until_ready(self, live: Object) -> Object:
        def is_ready(item: Object) -> bool:
            ready = condition_of(item, "Ready")
            if ready.get("status") != "True" and ready.get("reason") in _HOPELESS:
                raise ProvisionError(f"{ready['reason']}: {ready['message']}", permanent=True)
            # Ready it may be as it was before, and about to restart.
            return ready.get("status") == "True" and condition_of(item, "Progressing").get("status") == "False"

        return await self._until(live, is_ready, READY_SECONDS, "ready")

    async def _route_warning(self, live: Object) -> str | None:
        """Wait a moment for the gateways; what is to be known of them."""

        def is_told(item: Object) -> bool:
            return bool(condition_of(item, "RouteProgrammed"))

        try:
            live = await self._until(live, is_told, ROUTE_SECONDS, "routed")
        except ProvisionError:
            return "no gateway has said yet that it routes there"
        route = condition_of(live, "RouteProgrammed")
        return None if route["status"] == "True" else f"{route['reason']}: {route['message']}"

    async def _until(self, live: Object, reached: Callable[[Object], bool], seconds: float, what: str) -> Object:
        """Look until it is so. Raises ProvisionError after `seconds`, and NotFound."""
        deadline, pause = time.monotonic() + seconds, FIRST_LOOK_SECONDS
        metadata = live["metadata"]
        while not reached(live):
            if time.monotonic() > deadline:
                ready = condition_of(live, "Ready")
                why = f": {ready['reason']}: {ready['message']}" if ready else ": no operator has looked at it"
                raise ProvisionError(f"it is not {what} after {seconds:g} s{why}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_LOOK_SECONDS)
            live = await self._client.get(INSTANCES, metadata["name"], metadata["namespace"])
        return live

    # The namespace of an organization

    def _organization(self, spec: Spec) -> asyncio.Lock:
        """So that a namespace does not go while an instance comes."""
        assert spec.organization_id is not None
        return self._locks.setdefault(spec.organization_id, asyncio.Lock())

    async def _ensure_namespace(self, spec: Spec) -> None:
        assert spec.organization_id is not None
        organization_id = spec.organization_id
        name = namespace_of(organization_id)
        live = await self._namespace(name)
        if live is not None:
            labels = live["metadata"].get("labels") or {}
            if labels.get(ORGANIZATION_LABEL) != str(organization_id):
                raise ProvisionError(f"the namespace {name} is somebody else's, and is left alone", permanent=True)
            if "deletionTimestamp" in live["metadata"]:
                await self._until_gone(name)
                live = None
        if live is None:
            self._quotas.pop(organization_id, None)
        await self._client.apply(
            _namespace_object(organization_id), field_manager=FIELD_MANAGER, force=live is not None
        )
        await self.limit(organization_id)

    async def _namespace(self, name: str) -> Object | None:
        try:
            return await self._client.get(NAMESPACES, name)
        except NotFound:
            return None

    async def _until_gone(self, name: str) -> None:
        """The one before went with its last instance. Raises ProvisionError after `GONE_SECONDS`."""
        deadline, pause = time.monotonic() + GONE_SECONDS, FIRST_LOOK_SECONDS
        while await self._namespace(name) is not None:
            if time.monotonic() > deadline:
                raise ProvisionError(f"the namespace {name} is being deleted, and is not gone after {GONE_SECONDS:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_LOOK_SECONDS)

    async def limit(self, organization_id: UUID) -> None:
        """Let the quota of an organization's namespace follow its plan. Raises KubernetesError."""
        limits = await self._limits(organization_id)
        if self._quotas.get(organization_id) == limits:
            return
        for item in quota_objects(organization_id, limits):
            await self._client.apply(item, field_manager=FIELD_MANAGER, force=True)
        self._quotas[organization_id] = limits

    async def _remove_namespace(self, spec: Spec) -> None:
        assert spec.organization_id is not None
        name = namespace_of(spec.organization_id)
        live = await self._client.get(NAMESPACES, name)
        labels = live["metadata"].get("labels") or {}
        ours = labels.get(MANAGED_LABEL) == FIELD_MANAGER and labels.get(ORGANIZATION_LABEL) == str(
            spec.organization_id
        )
        if not ours or "deletionTimestamp" in live["metadata"] or await self._client.list_all(INSTANCES, name):
            return
        kept = await self._kept_for(name)
        if kept:
            what = ", ".join(kept[:MAX_KEPT_NAMES]) + (", …" if len(kept) > MAX_KEPT_NAMES else "")
            log.warning("namespace %s has no instance any more, and is kept for %s", name, what)
            namespace = _namespace_object(spec.organization_id, {KEPT_ANNOTATION: what})
            namespace["metadata"]["uid"] = live["metadata"]["uid"]
            await self._client.apply(namespace, field_manager=FIELD_MANAGER, force=True)
            self._on_step("kubernetes: namespace kept")
            return
        self._quotas.pop(spec.organization_id, None)
        await self._client.delete(NAMESPACES, name, uid=live["metadata"]["uid"])
        self._on_step("kubernetes: namespace deleted")

    async def _kept_for(self, namespace: str) -> list[str]:
        """What would go with a namespace and is not ours to delete: volumes that were retained, things of others."""
        found = []
        for resource in _LOOKED_FOR:
            for item in await self._client.list_all(resource, namespace):
                metadata = item["metadata"]
                ours = (metadata.get("labels") or {}).get(MANAGED_LABEL) in (_OPERATOR, FIELD_MANAGER)
                automatic = resource == CONFIG_MAPS and metadata["name"] in _AUTOMATIC
                if resource == VOLUME_CLAIMS or not (ours or automatic):
                    found.append(f"{resource.kind} {metadata['name']}")
        return found


def _namespace_object(organization_id: UUID, annotations: dict[str, str] | None = None) -> Object:
    labels = {
        MANAGED_LABEL: FIELD_MANAGER,
        ORGANIZATION_LABEL: str(organization_id),
        "pod-security.kubernetes.io/enforce": "restricted",
    }
    metadata: Object = {"name": namespace_of(organization_id), "labels": labels}
    if annotations:
        metadata["annotations"] = annotations
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def quota_objects(organization_id: UUID, limits: Limits) -> list[Object]:
    """What an organization may use in its namespace."""
    name, labels = (
        namespace_of(organization_id),
        {MANAGED_LABEL: FIELD_MANAGER, ORGANIZATION_LABEL: str(organization_id)},
    )
    count, memory = limits.max_instances, limits.max_memory
    # Pods are larger than their data; one that takes another's place is there twice for a moment.
    pods = 2 * math.ceil(memory * 100 / DATA_PERCENT) + count * (LEAST_POD_MEMORY + HELPER_MEMORY)
    hard = {
        f"count/{INSTANCES.plural}.{INSTANCES.group}": str(count),
        "limits.memory": str(pods),
        "requests.storage": str(VOLUME_FACTOR * memory + count * LEAST_VOLUME),
        "persistentvolumeclaims": str(2 * count),
    }

    def item(resource: Resource, spec: Object) -> Object:
        metadata = {"name": "redisgate", "namespace": name, "labels": labels}
        return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata, "spec": spec}

    default = {
        "type": "Container",
        "default": {"memory": str(HELPER_MEMORY)},
        "defaultRequest": {"cpu": "10m", "memory": "32Mi"},
    }
    return [item(RESOURCE_QUOTAS, {"hard": hard}), item(LIMIT_RANGES, {"limits": [default]})]


def _contains(live: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(
            _contains(live.get(key, [] if value == [] else None), value) for key, value in wanted.items()
        )
    return bool(live == wanted)


def _failure(error: KubernetesError) -> ProvisionError:
    """In words for the owner of an instance."""
    if isinstance(error, Conflict):
        return ProvisionError(f"it was changed in the cluster at the same moment: {error}")
    if isinstance(error, NotFound):
        return ProvisionError(f"something is missing in the cluster (redisgate crd, redisgate operator?): {error}")
    if isinstance(error, ApiError):
        return ProvisionError(f"the cluster refuses it: {error}", permanent=error.status in (400, 422))
    return ProvisionError(str(error))
