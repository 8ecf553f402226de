"""A RedisHttpInstance as a typed value: what its definition (crd/redishttpinstances.yaml) lets through, field by field.

The API server has checked everything and put in the defaults; those here are the same ones, for objects inside an
optional object, and for tests. What is handed on to Kubernetes as it is (tolerations, affinities, peers) stays a
dictionary.
"""

import hashlib
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal

import msgspec

from control.kubernetes.client import Object

MANAGED_LABEL: Final = "app.kubernetes.io/managed-by"
DATA_PERCENT: Final = 75
"""Of a pod's memory that the data may take: the rest is for copy-on-write, buffers and fragmentation."""

Quantity = str | int | float

_SUFFIXES: Final[dict[str, Decimal]] = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
}
_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|h|m|s)")
_UNITS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


class SpecError(ValueError):
    """The specification says something that cannot be. The text names the field."""


class _Part(msgspec.Struct, rename="camel", frozen=True, kw_only=True):
    pass


class Sentinel(_Part, frozen=True):
    replicas: int = 3


class Engine(_Part, frozen=True):
    type: Literal["Valkey", "Redis"] = "Valkey"
    version: str = "8.1"
    image: str | None = None


class Placement(_Part, frozen=True):
    namespace_mode: Literal["Same", "Dedicated"] = "Same"


class Resources(_Part, frozen=True):
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class Memory(_Part, frozen=True):
    maxmemory_percent: int | None = None
    eviction_policy: str = "noeviction"


class Persistence(_Part, frozen=True):
    size: str
    storage_class_name: str | None = None
    strategy: Literal["AOF", "RDB", "AOFAndRDB"] = "AOF"
    resize_policy: Literal["Expand", "Manual"] = "Expand"


class Rotation(_Part, frozen=True):
    every: str | None = None
    overlap: str = "1h"
    trigger: str | None = None


class Auth(_Part, frozen=True):
    existing_secret: str | None = None
    rotation: Rotation = Rotation()


class IssuerRef(_Part, frozen=True):
    name: str
    kind: str = "Issuer"


class Tls(_Part, frozen=True):
    secret_name: str | None = None
    issuer_ref: IssuerRef | None = None
    client_auth: Literal["None", "Optional"] = "None"


class Ingress(_Part, frozen=True):
    class_name: str | None = None
    tls_secret_name: str | None = None
    annotations: dict[str, str] = {}


class RateLimit(_Part, frozen=True):
    requests_per_second: int
    burst: int | None = None


class Commands(_Part, frozen=True):
    allow: list[str] = []
    deny: list[str] = []


class Gateway(_Part, frozen=True):
    hosts: list[str] = []
    ingress: Ingress = Ingress()
    rate_limit: RateLimit | None = None
    max_request_bytes: int = 1048576
    commands: Commands = Commands()


class NetworkPolicy(_Part, frozen=True):
    mode: Literal["Managed", "Disabled"] = "Managed"
    extra_from: list[dict[str, Any]] = []


class DisruptionBudget(_Part, frozen=True):
    mode: Literal["Auto", "Disabled"] = "Auto"
    max_unavailable: int = 1


class Scheduling(_Part, frozen=True):
    anti_affinity: Literal["None", "Preferred", "Required"] = "Preferred"
    topology_key: str = "kubernetes.io/hostname"
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] = {}
    topology_spread_constraints: list[dict[str, Any]] = []
    priority_class_name: str | None = None


class S3(_Part, frozen=True):
    bucket: str
    credentials_secret: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None


class Backup(_Part, frozen=True):
    schedule: str
    s3: S3
    keep: int = 7


class Bootstrap(_Part, frozen=True):
    from_backup: str
    s3: S3


class Update(_Part, frozen=True):
    strategy: Literal["Automatic", "OnDelete"] = "Automatic"


class Monitoring(_Part, frozen=True):
    exporter: bool = True
    pod_monitor: bool = False


class Spec(_Part, frozen=True):
    mode: Literal["Standalone", "Sentinel", "Cluster"] = "Standalone"
    replicas: int = 1
    shards: int | None = None
    sentinel: Sentinel | None = None
    suspend: bool = False
    engine: Engine = Engine()
    placement: Placement = Placement()
    resources: Resources = Resources()
    memory: Memory = Memory()
    config: dict[str, str] = {}
    persistence: Persistence | None = None
    auth: Auth = Auth()
    tls: Tls | None = None
    gateway: Gateway = Gateway()
    network_policy: NetworkPolicy = NetworkPolicy()
    pod_disruption_budget: DisruptionBudget = DisruptionBudget()
    scheduling: Scheduling = Scheduling()
    backup: Backup | None = None
    bootstrap: Bootstrap | None = None
    update: Update = Update()
    monitoring: Monitoring | None = None
    deletion_policy: Literal["Delete", "Retain", "BackupThenDelete"] = "Retain"
    deletion_protection: bool = False

    @property
    def pods(self) -> int:
        """How many are to run: none of one that is suspended or scaled to nothing."""
        return 0 if self.suspend else self.replicas


@dataclass(frozen=True)
class Instance:
    """One resource: who it is, and what it is to be."""

    name: str
    namespace: str
    uid: str
    generation: int
    created: str
    deleting: bool
    finalizers: tuple[str, ...]
    labels: dict[str, str]
    annotations: dict[str, str]
    spec: Spec
    status: Object

    @property
    def key(self) -> tuple[str, str]:
        return self.namespace, self.name

    @property
    def age(self) -> tuple[str, str]:
        """Sorts the oldest first; of two from the same second, always the same one."""
        return self.created, self.uid

    @property
    def label(self) -> str:
        """Its host label: nobody can claim it before it exists, and a successor of the same name has another."""
        return f"{self.name}-{hashlib.sha256(self.uid.encode()).hexdigest()[:6]}"


def read_instance(item: Object) -> Instance:
    """Raises SpecError for what no version of the definition lets through."""
    metadata = item["metadata"]
    try:
        spec = msgspec.convert(item.get("spec") or {}, Spec)
    except msgspec.ValidationError as error:
        raise SpecError(f"spec: {error}") from error
    return Instance(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        created=metadata.get("creationTimestamp") or "",
        deleting="deletionTimestamp" in metadata,
        finalizers=tuple(metadata.get("finalizers") or ()),
        labels=metadata.get("labels") or {},
        annotations=metadata.get("annotations") or {},
        spec=spec,
        status=item.get("status") or {},
    )


def quantity(value: Quantity, field: str = "quantity") -> Decimal:
    """`256Mi`, `1.5G`, `1e3` or a number, as Kubernetes reads it. Raises SpecError."""
    text = str(value).strip()
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)", text)
    try:
        if match is None or match[2] not in _SUFFIXES:
            raise InvalidOperation
        return Decimal(match[1]) * _SUFFIXES[match[2]]
    except InvalidOperation:
        raise SpecError(f"{field}: {text!r} is not a quantity such as 256Mi or 2Gi") from None


def seconds(text: str, field: str = "duration") -> float:
    """`1h30m`, as Go writes durations. Raises SpecError."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise SpecError(f"{field}: {text!r} is not a duration such as 12h or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
