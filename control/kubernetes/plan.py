"""From a resource to the objects that it needs: a pure function, so that what an operator would do can be read and
tested without a cluster.

A mode is a plan. `PLANS` knows how each mode becomes objects; the operator applies whatever it gets and never asks for
the mode. What follows from an observation (credentials, certificates, which hosts are ours) is an argument.

The pod template depends on the resource alone, not on our version: an operator that is upgraded restarts nothing. So
settings and users lie in a Secret, and what may change at run time is changed in the running server (redis.py).
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

import msgspec

from control.kubernetes.apply import OWNER_LABEL
from control.kubernetes.client import (
    CERTIFICATES,
    CRON_JOBS,
    DEPLOYMENTS,
    DISRUPTION_BUDGETS,
    INGRESSES,
    INSTANCES,
    JOBS,
    NETWORK_POLICIES,
    POD_MONITORS,
    SECRETS,
    STATEFUL_SETS,
    Object,
    Resource,
)
from control.kubernetes.spec import DATA_PERCENT, MANAGED_LABEL, S3, Instance, SpecError, quantity
from control.provisioners import ADMIN_USER, GATEWAY_RULES, GATEWAY_USER

MANAGER: Final = "redisgate-operator"
FINALIZER: Final = "redisgate.io/operator"
COMPONENT_LABEL: Final = "app.kubernetes.io/component"
NAME_LABEL: Final = "redisgate.io/instance-name"
NAMESPACE_LABEL: Final = "redisgate.io/instance-namespace"
ROUTE_LABEL: Final = "redisgate.io/route"
ORGANIZATION_PREFIX: Final = "redisgate.io/organization"
"""Labels of a resource that begin so are on all its objects."""
ADDRESS_ANNOTATION: Final = "redisgate.io/address"
"""On the client Service: host:port, for an operator and a gateway outside of the cluster."""
IMAGE_ANNOTATION: Final = "redisgate.io/image-of-"
"""On a StatefulSet or Deployment, with the name of a container; without it the operator takes its newest one."""
ROUTE_TYPE: Final = "redisgate.io/route"
STRATEGY_ANNOTATION: Final = "redisgate.io/strategy"
"""On the Secret of the configuration: how the data lies that Redis is to start from."""
SETTINGS_ANNOTATION: Final = "redisgate.io/settings"
"""On the same: the settings that Redis has accepted, each with a digest of what was accepted."""
MADE_ANNOTATION: Final = "redisgate.io/made"
"""On the same: objects of kinds that no cluster must have, so that nothing is watched of them."""

PORT: Final = 6379
EXPORTER_PORT: Final = 9121
RUN_AS: Final = 999
"""The user and group `redis` of the official images."""
STOP_SECONDS: Final = 60
"""For Redis to write what it has in memory and end."""
LOAD_SECONDS: Final = 3600
"""For Redis to load its data after a start."""
BACKUP_SECONDS: Final = 6 * 3600
"""For one backup; then its job is ended."""
LEAST_KEY_LENGTH: Final = 32
"""Characters of an API key, which somebody may have written: the SHA-256 of a short one tells it."""
NEVER_ANNOTATIONS: Final = frozenset(
    (
        "external-dns.alpha.kubernetes.io/hostname",
        "external-dns.alpha.kubernetes.io/target",
        "cert-manager.io/alt-names",
        "cert-manager.io/common-name",
        "cert-manager.io/secret-template",
    )
)
"""Whoever writes one of them has names of others, or Secrets of their own making beside the gateway."""
CONFIG_DIR: Final = "/etc/redisgate"
DATA_DIR: Final = "/data"
SAVE_POINTS: Final = "3600 1 300 100 60 10000"
OFFICIAL_IMAGES: Final = tuple(
    f"{registry}{name}{end}"
    for registry, name in (
        ("", "valkey/valkey"),
        ("docker.io/", "valkey/valkey"),
        ("", "redis"),
        ("docker.io/library/", "redis"),
    )
    for end in (":", "@sha256:")
)
"""Beginnings, up to the tag or digest, so that no other name begins so."""
ANY_REPLY: Final = "PONG|[A-Z]+ "
POD_MANAGEMENT: Final = "Parallel"
"""Else a StatefulSet waits for a pod that can never be ready, and no correction reaches it."""
TLS_DIR: Final = "/tls"

# What Redis reads at its start only; a change of one of them restarts the pod, all others are changed while it runs.
START_ONLY: Final = frozenset(
    (
        "aclfile always-show-logo disable-thp io-threads io-threads-do-reads rdbchecksum syslog-enabled syslog-facility"
        " syslog-ident tcp-backlog set-proc-title"
    ).split()
)


@dataclass(frozen=True)
class OperatorSettings:
    """What an operator is told about the place where it works."""

    base_domain: str = ""
    """Hosts of instances lie under it; empty: instances have no hosts, and are reached by /redis/<uid>/."""
    public_url: str = ""
    """Of the gateway, where there is no base domain."""
    url_scheme: str = "https"
    cluster_domain: str = "cluster.local"
    gateway_namespace: str = "redisgate"
    gateway_service: str = "redisgate-gateway"
    gateway_port: int = 80
    gateway_labels: Mapping[str, str] = field(
        default_factory=lambda: {"app.kubernetes.io/name": "redisgate", COMPONENT_LABEL: "gateway"}
    )
    operator_namespace: str = "redisgate"
    operator_labels: Mapping[str, str] = field(
        default_factory=lambda: {"app.kubernetes.io/name": "redisgate", COMPONENT_LABEL: "operator"}
    )
    ingress_class: str | None = None
    ingress_annotations: frozenset[str] = frozenset()
    """Annotations that a resource may give its Ingress, which lies in the gateway's namespace: whole keys."""
    ingress_tls_secrets: frozenset[str] = frozenset()
    """Secrets in the gateway's namespace whose certificates a resource may name for its hosts."""
    engine_images: tuple[str, ...] = OFFICIAL_IMAGES
    """Beginnings of the images that a resource may name: they get Secrets that whoever made it may not read."""
    open_networks: bool = True
    """Whether a resource may do without a NetworkPolicy."""
    monitoring_namespace: str | None = None
    image: str = "redisgate/redisgate:latest"
    exporter_image: str = "oliver006/redis_exporter:v1.67.0"
    max_request_bytes: int = 10 * 1024 * 1024
    """The gateway's own limit."""
    outside_cluster: bool = False
    """Believe ADDRESS_ANNOTATION."""


@dataclass(frozen=True)
class Login:
    """One generation of an instance's passwords."""

    generation: int
    secret_name: str
    created: str
    password: str = field(repr=False)
    admin_password: str = field(repr=False)


@dataclass(frozen=True)
class Observed:
    """What a plan needs to know of the cluster."""

    logins: tuple[Login, ...] = ()
    """That are good now, the newest first."""
    token: str = field(default="", repr=False)
    readonly_token: str = field(default="", repr=False)
    hosts: tuple[str, ...] = ()
    refused_hosts: Mapping[str, str] = field(default_factory=dict)
    """By host: why it is not ours."""
    copies: Mapping[str, Object] = field(default_factory=dict)
    """By name: Secrets beside the resource that its pods need in a namespace of their own."""
    tls_digest: str = ""
    """Of the certificate, so that a renewed one is used."""
    tls_ca: str | None = None
    strategy: str = ""
    """Of the data that the instance starts from; empty: it has never been started."""
    accepted: Mapping[str, str] = field(default_factory=dict)
    """By setting of the resource: a digest of what the running Redis has accepted."""
    images: Mapping[str, str] = field(default_factory=dict)
    """By container, as the pods have them. A newer operator restarts nobody for the images of its own."""
    address: tuple[str, int] | None = None
    """Where the instance really is, if not at its Service's name."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as the resource says. It makes a condition False, and does not stop the rest."""

    condition: str
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    """`objects` are to be as they are here, in this order; `absent` are not to be, if they are ours."""

    objects: list[Object] = field(default_factory=list)
    absent: list[tuple[Resource, str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    refusal: Problem | None = None
    """Nothing can be done for this resource."""


def make_plan(instance: Instance, settings: OperatorSettings, observed: Observed) -> Plan:
    """What is to be there for `instance`."""
    try:
        return PLANS[instance.spec.mode](instance, settings, observed)
    except SpecError as error:
        return Plan(refusal=Problem("Ready", "InvalidSpec", str(error)))


# Names


def home(instance: Instance) -> str:
    """The namespace where its pods are."""
    return instance.label if instance.spec.placement.namespace_mode == "Dedicated" else instance.namespace


def route_name(instance: Instance) -> str:
    """Of its routing Secret and its Ingress, both in the gateway's namespace."""
    return f"route-{instance.uid}"


def ingress_tls_name(instance: Instance) -> str:
    """Of the Secret into which cert-manager writes the certificate of its hosts, in the gateway's namespace."""
    return f"{route_name(instance)}-tls"


def login_name(instance: Instance, generation: int) -> str:
    """Of the Secret with the passwords of one generation."""
    return f"{instance.name}-auth-{generation}"


def key_name(instance: Instance) -> str:
    """Of the Secret with the API keys, for people."""
    return f"{instance.name}-api-key"


def claim_template(instance: Instance) -> str:
    """The name within the StatefulSet. With the uid: a retained volume is never mounted by a successor of the name."""
    return f"data-{instance.label[-6:]}"


def claim_names(instance: Instance) -> list[str]:
    """Of all volume claims that it can have."""
    return [f"{claim_template(instance)}-{instance.name}-0"]


def service_host(instance: Instance, settings: OperatorSettings) -> str:
    """The name of its client Service. A name, never the address of a pod: those are given to others later."""
    return f"{instance.name}.{home(instance)}.svc.{settings.cluster_domain}"


def labels_of(instance: Instance, component: str = "redis") -> dict[str, str]:
    """On everything that is made for it."""
    return {
        **{key: value for key, value in instance.labels.items() if key.startswith(ORGANIZATION_PREFIX)},
        "app.kubernetes.io/name": "redis",
        "app.kubernetes.io/instance": instance.name,
        MANAGED_LABEL: MANAGER,
        COMPONENT_LABEL: component,
        OWNER_LABEL: instance.uid,
        NAME_LABEL: instance.name,
        NAMESPACE_LABEL: instance.namespace,
    }


def selector_of(instance: Instance, component: str = "redis") -> dict[str, str]:
    """Finds its pods, and nobody else's."""
    return {OWNER_LABEL: instance.uid, COMPONENT_LABEL: component}


def metadata_of(instance: Instance, name: str, namespace: str, component: str = "redis") -> Object:
    """With an owner reference where there may be one: across namespaces it would get the object deleted."""
    metadata: Object = {"name": name, "namespace": namespace, "labels": labels_of(instance, component)}
    if namespace == instance.namespace:
        metadata["ownerReferences"] = [
            {
                "apiVersion": INSTANCES.api_version,
                "kind": INSTANCES.kind,
                "name": instance.name,
                "uid": instance.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]
    return metadata


def is_made_for(instance: Instance, item: Object) -> bool:
    """Whether an object with the labels of an instance is where we make one, under the name that we give it and, beside
    its resource, with the resource as its owner."""
    metadata, kind = item["metadata"], item["kind"]
    namespace, name = metadata.get("namespace", ""), metadata["name"]
    labels = metadata.get("labels") or {}
    if namespace != home(instance):
        return False
    if kind == "PersistentVolumeClaim":  # made by the controller of StatefulSets, kept when the resource goes
        return name in claim_names(instance)
    if kind == "Secret" and labels.get(COMPONENT_LABEL) == "login":
        if name != login_name(instance, 0)[:-1] + str(labels.get("redisgate.io/generation")):
            return False
    elif not name.startswith(f"{instance.name}-") and name != instance.name:
        return False
    if kind == "Job":  # most are of the schedule of backups
        return True
    owners = [reference["uid"] for reference in metadata.get("ownerReferences") or ()]
    return namespace != instance.namespace or instance.uid in owners


def encode(data: Mapping[str, str]) -> dict[str, str]:
    """As the `data` of a Secret."""
    return {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}


def decode(secret: Object) -> dict[str, str]:
    """The data of a Secret as text; what is not text is left out."""
    result = {}
    for key, value in (secret.get("data") or {}).items():
        try:
            result[key] = base64.b64decode(value).decode()
        except ValueError:
            continue
    return result


# Secrets that are made once and never written over


def login_secret(instance: Instance, generation: int, password: str, admin_password: str, trigger: str) -> Object:
    """Passwords of one generation. A new generation is a new Secret: none is ever changed."""
    metadata = metadata_of(instance, login_name(instance, generation), home(instance), "login")
    metadata["labels"]["redisgate.io/generation"] = str(generation)
    metadata["annotations"] = {"redisgate.io/trigger": trigger}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "type": "Opaque",
        "data": encode({"password": password, "admin-password": admin_password}),
    }


def key_secret(instance: Instance, token: str, readonly_token: str, url: str) -> Object:
    """What people need to use the instance over HTTP, beside the resource."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata_of(instance, key_name(instance), instance.namespace, "api-key"),
        "type": "Opaque",
        "data": encode({"token": token, "readonly-token": readonly_token, "url": url}),
    }


def url_of(instance: Instance, settings: OperatorSettings, hosts: tuple[str, ...]) -> str:
    """Where requests for it go."""
    if hosts:
        return f"{settings.url_scheme}://{hosts[0]}"
    service = f"http://{settings.gateway_service}.{settings.gateway_namespace}.svc.{settings.cluster_domain}"
    port = "" if settings.gateway_port == 80 else f":{settings.gateway_port}"
    return f"{settings.public_url or service + port}/redis/{instance.uid}"


# Standalone


def _standalone(instance: Instance, settings: OperatorSettings, observed: Observed) -> Plan:
    spec, namespace = instance.spec, home(instance)
    refusal = _refusal(instance, settings)
    if refusal is not None:
        return Plan(refusal=refusal)
    problems: list[Problem] = []
    objects: list[Object] = []
    absent: list[tuple[Resource, str, str]] = []
    if namespace != instance.namespace:
        namespaced = metadata_of(instance, namespace, "", "namespace")
        del namespaced["namespace"]
        namespaced["labels"]["pod-security.kubernetes.io/enforce"] = "restricted"
        objects.append({"apiVersion": "v1", "kind": "Namespace", "metadata": namespaced})
        objects += [_copy(instance, secret, namespace) for secret in observed.copies.values()]
    if spec.tls is not None and spec.tls.issuer_ref is not None:
        objects.append(_certificate(instance, settings))
    else:
        absent.append((CERTIFICATES, namespace, certificate_name(instance)))
    objects.append(config_secret(instance, observed))
    objects.append(_service(instance, namespace, headless=False))
    image = _image(instance, observed, problems)
    template = _pod_template(instance, settings, observed, image)
    if spec.persistence is not None:
        objects += [_service(instance, namespace, headless=True), _stateful_set(instance, namespace, template)]
        absent.append((DEPLOYMENTS, namespace, instance.name))
    else:
        objects.append(_deployment(instance, namespace, template))
        absent.append((STATEFUL_SETS, namespace, instance.name))
    if spec.network_policy.mode == "Managed":
        objects.append(_network_policy(instance, settings, namespace))
    else:
        absent.append((NETWORK_POLICIES, namespace, instance.name))
    if spec.pod_disruption_budget.mode == "Auto":
        objects.append(_disruption_budget(instance, namespace))
    else:
        absent.append((DISRUPTION_BUDGETS, namespace, instance.name))
    if spec.backup is not None and observed.logins:
        objects.append(_backup_schedule(instance, settings, observed, namespace))
    elif spec.backup is None:
        absent.append((CRON_JOBS, namespace, f"{instance.name}-backup"))
    if spec.monitoring is not None and spec.monitoring.pod_monitor:
        objects.append(_pod_monitor(instance, namespace))
    else:
        absent.append((POD_MONITORS, namespace, instance.name))
    objects_of_the_gateway, gone, notes = _at_the_gateway(instance, settings, observed)
    problems += notes
    return Plan(objects + objects_of_the_gateway, absent + gone, problems)


def _refusal(instance: Instance, settings: OperatorSettings) -> Problem | None:
    image = instance.spec.engine.image
    if image is not None and not image.startswith(settings.engine_images):
        text = f"spec.engine.image: {image}: the operator allows what begins with {', '.join(settings.engine_images)}"
        return Problem("Ready", "ImageRefused", text)
    if instance.spec.network_policy.mode == "Disabled" and not settings.open_networks:
        text = "spec.networkPolicy.mode: the operator allows no instance without a NetworkPolicy"
        return Problem("Ready", "OpenNetworkRefused", text)
    return None


def config_name(instance: Instance) -> str:
    """Of the Secret with what Redis reads when it starts."""
    return f"{instance.name}-config"


def config_secret(instance: Instance, observed: Observed) -> Object:
    """What Redis reads when it starts, and beside it what the next plan has to know of it."""
    metadata = metadata_of(instance, config_name(instance), home(instance), "config")
    spec = instance.spec
    made = []
    if spec.tls is not None and spec.tls.issuer_ref is not None:
        made.append(CERTIFICATES.kind)
    if spec.monitoring is not None and spec.monitoring.pod_monitor:
        made.append(POD_MONITORS.kind)
    metadata["annotations"] = {
        STRATEGY_ANNOTATION: start_strategy(instance, observed),
        SETTINGS_ANNOTATION: json.dumps(dict(sorted(observed.accepted.items()))),
        MADE_ANNOTATION: ",".join(made),
    }
    data = encode({"redis.conf": redis_conf(instance, observed), "users.acl": users_acl(observed.logins)})
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": data}


def strategy_of(instance: Instance) -> str:
    """How its data is to be kept; empty without a volume."""
    return instance.spec.persistence.strategy if instance.spec.persistence is not None else ""


def is_append_only(strategy: str) -> bool:
    """Whether Redis starts from an append-only file; it then reads no snapshot, and the other way round."""
    return strategy.startswith("AOF")


def start_strategy(instance: Instance, observed: Observed) -> str:
    """The one that the data is in: what the resource says, once the running Redis has written it so."""
    wanted = strategy_of(instance)
    if not wanted or not observed.strategy or is_append_only(wanted) == is_append_only(observed.strategy):
        return wanted
    return observed.strategy


def is_switching(instance: Instance, observed: Observed) -> bool:
    """Whether the data is yet to be written in the form that the resource says."""
    return start_strategy(instance, observed) != strategy_of(instance)


def setting_mark(instance: Instance, value: str) -> str:
    """Of a setting that was accepted: another value or another server has to accept it again."""
    return _digest([image_of(instance), value])


def redis_conf(instance: Instance, observed: Observed) -> str:
    """The configuration file. Values of a resource are one line each, which the definition sees to. Of its settings
    only those that Redis has accepted while it ran are in it: it does not start with one that it does not know."""
    accepted = {
        key: value
        for key, value in instance.spec.config.items()
        if key in START_ONLY or observed.accepted.get(key) == setting_mark(instance, value)
    }
    config = server_config(instance, start_strategy(instance, observed), accepted)
    return "".join(f"{key} {value}\n" for key, value in config.items())


def running_config(instance: Instance, observed: Observed) -> dict[str, str]:
    """What a running Redis is told. A form of its data is added, and ended at its next start only: a kubelet takes a
    while to bring a changed file into a pod, and a container that restarts meanwhile starts from the former form."""
    config = server_config(instance, start_strategy(instance, observed), instance.spec.config)
    if start_strategy(instance, observed) != strategy_of(instance):
        config["save"] = SAVE_POINTS
    if config["save"] != SAVE_POINTS:
        del config["save"]
    if config["appendonly"] == "no":
        del config["appendonly"]
    return {key: value for key, value in config.items() if key not in START_ONLY}


def server_config(instance: Instance, strategy: str, settings: Mapping[str, str]) -> dict[str, str]:
    """By name. As in redis.conf: a value with blanks that is one word is in quotes."""
    spec = instance.spec
    config = {
        "bind": "* -::*",
        "protected-mode": "no",
        "port": "0" if spec.tls is not None else str(PORT),
        "dir": DATA_DIR,
        "aclfile": f"{CONFIG_DIR}/users.acl",
        "databases": "1",
        "appendonly": "yes" if is_append_only(strategy) else "no",
        "appendfsync": "everysec",
        "save": SAVE_POINTS if strategy in ("RDB", "AOFAndRDB") else '""',
        "maxmemory": str(maxmemory(instance)),
        "maxmemory-policy": spec.memory.eviction_policy,
    }
    if spec.tls is not None:
        config |= {
            "tls-port": str(PORT),
            "tls-cert-file": f"{TLS_DIR}/tls.crt",
            "tls-key-file": f"{TLS_DIR}/tls.key",
            "tls-auth-clients": "optional" if spec.tls.client_auth == "Optional" else "no",
        }
        if spec.tls.client_auth == "Optional":
            config["tls-ca-cert-file"] = f"{TLS_DIR}/ca.crt"
    return config | {key: _in_quotes(value) for key, value in sorted(settings.items())}


def _in_quotes(value: str) -> str:
    """Redis splits a line at blanks, as several settings want it; only what it could not read is quoted."""
    return json.dumps(value) if value == "" or '"' in value or "'" in value or "#" in value else value


def maxmemory(instance: Instance) -> int:
    """Bytes; 0: no limit. Raises SpecError."""
    limit = instance.spec.resources.limits.get("memory")
    if limit is None:
        return 0
    percent = instance.spec.memory.maxmemory_percent or DATA_PERCENT
    return int(quantity(limit, "spec.resources.limits.memory") * percent / Decimal(100))


def digests(passwords: list[str]) -> list[str]:
    """As Redis keeps passwords."""
    return ["#" + hashlib.sha256(password.encode()).hexdigest() for password in passwords]


def users_of(logins: tuple[Login, ...]) -> dict[str, list[str]]:
    """The rules of each user, from nothing. What a resource denies, the gateway denies, and scripts with it. Probes and
    the exporter need no password: they may see numbers only."""
    return {
        "default": ["off", "resetpass", "-@all"],
        ADMIN_USER: ["on", *digests([login.admin_password for login in logins]), "~*", "&*", "+@all"],
        GATEWAY_USER: ["on", *digests([login.password for login in logins]), *GATEWAY_RULES],
        "probe": ["on", "nopass", "-@all", "+ping"],
        "exporter": ["on", "nopass", "-@all", "+ping", "+info", "+slowlog|len", "+latency|latest"],
    }


def users_acl(logins: tuple[Login, ...]) -> str:
    """The file of users that redis-server reads when it starts."""
    return "".join(f"user {name} {' '.join(rules)}\n" for name, rules in users_of(logins).items())


def _copy(instance: Instance, secret: Object, namespace: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata_of(instance, secret["metadata"]["name"], namespace, "copy"),
        "type": secret.get("type", "Opaque"),
        "data": secret.get("data") or {},
    }


def _certificate(instance: Instance, settings: OperatorSettings) -> Object:
    tls = instance.spec.tls
    assert tls is not None
    assert tls.issuer_ref is not None
    host = service_host(instance, settings)
    return {
        "apiVersion": "cert-manager.io/v1",
        "kind": "Certificate",
        "metadata": metadata_of(instance, certificate_name(instance), home(instance), "certificate"),
        "spec": {
            "secretName": tls_secret_name(instance),
            "dnsNames": [host, host.removesuffix("." + settings.cluster_domain)],
            "issuerRef": {"name": tls.issuer_ref.name, "kind": tls.issuer_ref.kind, "group": "cert-manager.io"},
        },
    }


def certificate_name(instance: Instance) -> str:
    """Of what cert-manager is asked for."""
    return f"{instance.name}-tls"


def tls_secret_name(instance: Instance) -> str | None:
    """Where its certificate lies, None without TLS."""
    tls = instance.spec.tls
    return None if tls is None else tls.secret_name or f"{instance.name}-tls"


def _service(instance: Instance, namespace: str, *, headless: bool) -> Object:
    spec: Object = {
        "type": "ClusterIP",
        "selector": selector_of(instance),
        "ports": [{"name": "redis", "port": PORT, "targetPort": "redis", "protocol": "TCP"}],
    }
    if headless:
        spec |= {"clusterIP": "None", "publishNotReadyAddresses": True}
    name = f"{instance.name}-headless" if headless else instance.name
    metadata = metadata_of(instance, name, namespace)
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def image_of(instance: Instance) -> str:
    """The image of its server: the one it names, else the official one of its engine and version."""
    engine = instance.spec.engine
    if engine.image is not None:
        return engine.image
    return f"{'valkey/valkey' if engine.type == 'Valkey' else 'redis'}:{engine.version}"


def _image(instance: Instance, observed: Observed, problems: list[Problem]) -> str:
    """The one that was asked for, unless it is older than what has written the volume."""
    wanted, live = image_of(instance), observed.images.get("redis", "")
    if instance.spec.persistence is None or instance.spec.engine.image is not None:
        return wanted
    name, _, version = wanted.partition(":")
    former, _, written = live.partition(":")
    if former != name or not written.replace(".", "").isdecimal():
        return wanted
    if [int(part) for part in version.split(".")] >= [
        int(part) for part in written.split(".")[: version.count(".") + 1]
    ]:
        return wanted
    text = f"spec.engine.version: {version} may not be able to read what {written} has written, which goes on; restore"
    text += " a backup into a new resource, or insist by spec.engine.image"
    problems.append(Problem("Degraded", "DowngradeRefused", text))
    return live


def _hardened() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _pod_security() -> Object:
    return {
        "runAsNonRoot": True,
        "runAsUser": RUN_AS,
        "runAsGroup": RUN_AS,
        "fsGroup": RUN_AS,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _probe(instance: Instance, answers: str) -> Object:
    """`answers` is a pattern for a reply: PONG, or an error code. What redis-cli says itself has none."""
    tls = " --tls --insecure" if instance.spec.tls is not None else ""
    cli = "valkey-cli" if instance.spec.engine.type == "Valkey" else "redis-cli"
    ask = f"{cli} -p {PORT}{tls} --user probe --pass probe --no-auth-warning ping 2>&1"
    reply = f"{ask} | sed 's/^AUTH failed: //'"
    return {"exec": {"command": ["sh", "-c", f"{reply} | grep -qE '^({answers})'"]}, "timeoutSeconds": 5}


def _pod_template(instance: Instance, settings: OperatorSettings, observed: Observed, image: str) -> Object:
    spec = instance.spec
    mounts: list[Object] = [
        {"name": claim_template(instance), "mountPath": DATA_DIR},
        {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
    ]
    volumes: list[Object] = [{"name": "config", "secret": {"secretName": config_name(instance)}}]
    if spec.persistence is None:
        volumes.append({"name": claim_template(instance), "emptyDir": {}})
    if spec.tls is not None:
        mounts.append({"name": "tls", "mountPath": TLS_DIR, "readOnly": True})
        files = ["tls.crt", "tls.key", *(["ca.crt"] if spec.tls.client_auth == "Optional" else [])]
        items = [{"key": name, "path": name} for name in files]
        volumes.append({"name": "tls", "secret": {"secretName": tls_secret_name(instance), "items": items}})
    server = "valkey-server" if spec.engine.type == "Valkey" else "redis-server"
    redis: Object = {
        "name": "redis",
        "image": image,
        "command": [server, f"{CONFIG_DIR}/redis.conf"],
        "ports": [{"name": "redis", "containerPort": PORT, "protocol": "TCP"}],
        "volumeMounts": mounts,
        "securityContext": _hardened(),
        # What answers is alive, also while it loads its data, has too many clients or a full disk, which a restart
        # would not mend. With a full disk it still reads, so it is ready.
        "startupProbe": _probe(instance, ANY_REPLY) | {"periodSeconds": 2, "failureThreshold": LOAD_SECONDS // 2},
        "livenessProbe": _probe(instance, ANY_REPLY) | {"periodSeconds": 10, "failureThreshold": 6},
        "readinessProbe": _probe(instance, "PONG|MISCONF ") | {"periodSeconds": 5, "failureThreshold": 2},
    }
    if spec.resources.requests or spec.resources.limits:
        redis["resources"] = {
            name: {key: str(value) for key, value in values.items()}
            for name, values in (("requests", spec.resources.requests), ("limits", spec.resources.limits))
            if values
        }
    containers = [redis]
    if spec.monitoring is not None and spec.monitoring.exporter:
        containers.append(_exporter(instance, settings, observed))
    pod: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "securityContext": _pod_security(),
        "containers": containers,
        "volumes": volumes,
    }
    if spec.bootstrap is not None:
        pod["initContainers"] = [_restore(instance, settings, observed, mounts[0])]
    annotations = {}
    if observed.tls_digest:
        annotations["redisgate.io/certificate"] = observed.tls_digest
    if at_start := {key: value for key, value in spec.config.items() if key in START_ONLY}:
        annotations["redisgate.io/start-config"] = _digest(at_start)
    metadata: Object = {"labels": labels_of(instance)}
    if annotations:
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": pod | _scheduling(instance)}


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:16]


def _exporter(instance: Instance, settings: OperatorSettings, observed: Observed) -> Object:
    scheme = "rediss" if instance.spec.tls is not None else "redis"
    environment = {
        "REDIS_ADDR": f"{scheme}://127.0.0.1:{PORT}",
        "REDIS_USER": "exporter",
        "REDIS_PASSWORD": "exporter",
        "REDIS_EXPORTER_CONFIG_COMMAND": "-",
        "REDIS_EXPORTER_SKIP_TLS_VERIFICATION": "true",
    }
    return {
        "name": "exporter",
        "image": observed.images.get("exporter", settings.exporter_image),
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [{"name": "metrics", "containerPort": EXPORTER_PORT, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}},
        "securityContext": _hardened(),
    }


def _scheduling(instance: Instance) -> Object:
    wanted = instance.spec.scheduling
    affinity = dict(wanted.affinity)
    if "podAntiAffinity" not in affinity and wanted.anti_affinity != "None":
        term = {"labelSelector": {"matchLabels": selector_of(instance)}, "topologyKey": wanted.topology_key}
        affinity["podAntiAffinity"] = (
            {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
            if wanted.anti_affinity == "Required"
            else {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}
        )
    result: Object = {
        "affinity": affinity,
        "nodeSelector": wanted.node_selector,
        "tolerations": wanted.tolerations,
        "topologySpreadConstraints": wanted.topology_spread_constraints,
        "priorityClassName": wanted.priority_class_name,
    }
    return {key: value for key, value in result.items() if value}


def _workload_metadata(instance: Instance, namespace: str, template: Object) -> Object:
    metadata, pod = metadata_of(instance, instance.name, namespace), template["spec"]
    containers = (*pod.get("initContainers", ()), *pod["containers"])
    metadata["annotations"] = {IMAGE_ANNOTATION + each["name"]: each["image"] for each in containers}
    return metadata


def _stateful_set(instance: Instance, namespace: str, template: Object) -> Object:
    persistence = instance.spec.persistence
    assert persistence is not None
    claim: Object = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": persistence.size}}}
    if persistence.storage_class_name is not None:
        claim["storageClassName"] = persistence.storage_class_name
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": _workload_metadata(instance, namespace, template),
        "spec": {
            "replicas": instance.spec.pods,
            "serviceName": f"{instance.name}-headless",
            "selector": {"matchLabels": selector_of(instance)},
            "podManagementPolicy": POD_MANAGEMENT,
            "revisionHistoryLimit": 3,
            "updateStrategy": {"type": "OnDelete" if instance.spec.update.strategy == "OnDelete" else "RollingUpdate"},
            "template": template,
            "volumeClaimTemplates": [
                {
                    "apiVersion": "v1",
                    "kind": "PersistentVolumeClaim",
                    "metadata": {"name": claim_template(instance), "labels": labels_of(instance, "data")},
                    "spec": claim,
                }
            ],
        },
    }


def _deployment(instance: Instance, namespace: str, template: Object) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _workload_metadata(instance, namespace, template),
        "spec": {
            "replicas": instance.spec.pods,
            "selector": {"matchLabels": selector_of(instance)},
            # never two at once behind one Service: each would have half of the keys
            "strategy": {"type": "Recreate"},
            "revisionHistoryLimit": 3,
            "template": template,
        },
    }


def _from(namespace: str, labels: Mapping[str, str]) -> Object:
    return {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "podSelector": {"matchLabels": dict(labels)},
    }


def _network_policy(instance: Instance, settings: OperatorSettings, namespace: str) -> Object:
    peers = [
        _from(settings.gateway_namespace, settings.gateway_labels),
        _from(settings.operator_namespace, settings.operator_labels),
        {"podSelector": {"matchLabels": selector_of(instance, "backup")}},
        *instance.spec.network_policy.extra_from,
    ]
    ingress: list[Object] = [{"from": peers, "ports": [{"port": "redis", "protocol": "TCP"}]}]
    if settings.monitoring_namespace is not None:
        ingress.append(
            {
                "from": [_from(settings.monitoring_namespace, {})],
                "ports": [{"port": EXPORTER_PORT, "protocol": "TCP"}],
            }
        )
    spec: Object = {
        "podSelector": {"matchLabels": selector_of(instance)},
        "policyTypes": ["Ingress"],
        "ingress": ingress,
    }
    if instance.spec.bootstrap is None:  # which fetches a backup
        spec |= {"policyTypes": ["Ingress", "Egress"], "egress": []}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata_of(instance, instance.name, namespace),
        "spec": spec,
    }


def _disruption_budget(instance: Instance, namespace: str) -> Object:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata_of(instance, instance.name, namespace),
        "spec": {
            "maxUnavailable": instance.spec.pod_disruption_budget.max_unavailable,
            "selector": {"matchLabels": selector_of(instance)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def _pod_monitor(instance: Instance, namespace: str) -> Object:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": metadata_of(instance, instance.name, namespace),
        "spec": {
            "selector": {"matchLabels": selector_of(instance)},
            "podMetricsEndpoints": [{"port": "metrics"}],
        },
    }


# Backups: jobs of the cluster, so that they need no operator and the operator needs no keys to anybody's bucket


def _s3_arguments(s3: S3) -> list[str]:
    return [
        "--bucket",
        s3.bucket,
        *(["--endpoint", s3.endpoint] if s3.endpoint else []),
        *(["--region", s3.region] if s3.region else []),
    ]


def _s3_environment(s3: S3, **more: bool) -> list[Object]:
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": s3.credentials_secret, "key": name} | more}}
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    ]


def _restore(instance: Instance, settings: OperatorSettings, observed: Observed, mount: Object) -> Object:
    bootstrap, persistence = instance.spec.bootstrap, instance.spec.persistence
    assert bootstrap is not None
    assert persistence is not None
    form = "aof" if is_append_only(start_strategy(instance, observed)) else "rdb"
    return {
        "name": "restore",
        "image": observed.images.get("restore", settings.image),
        "command": ["redisgate", "restore"],
        "args": [
            *_s3_arguments(bootstrap.s3),
            "--key",
            bootstrap.from_backup,
            "--into",
            DATA_DIR,
            "--as",
            form,
        ],
        # after the first start nobody needs the bucket, nor its keys
        "env": _s3_environment(bootstrap.s3, optional=True),
        "volumeMounts": [mount],
        "securityContext": _hardened(),
    }


def backup_prefix(instance: Instance) -> str:
    """Of the keys of its backups. With the uid: a successor of the same name does not prune its forebear's."""
    backup = instance.spec.backup
    assert backup is not None
    prefix = backup.s3.prefix.strip("/")
    return f"{prefix + '/' if prefix else ''}{instance.namespace}/{instance.name}/{instance.uid}/"


def _backup_pod(instance: Instance, settings: OperatorSettings, observed: Observed) -> Object:
    backup = instance.spec.backup
    assert backup is not None
    login = observed.logins[0]
    host, port = observed.address or (service_host(instance, settings), PORT)
    arguments = ["--host", host, "--port", str(port), "--user", ADMIN_USER, *_s3_arguments(backup.s3)]
    arguments += ["--prefix", backup_prefix(instance), "--keep", str(backup.keep)]
    mounts: list[Object] = []
    volumes: list[Object] = []
    if instance.spec.tls is not None:
        arguments += ["--tls", "--ca", f"{TLS_DIR}/ca.crt"] if observed.tls_ca else ["--tls"]
        mounts.append({"name": "tls", "mountPath": TLS_DIR, "readOnly": True})
        items = [{"key": "ca.crt", "path": "ca.crt"}] if observed.tls_ca else [{"key": "tls.crt", "path": "tls.crt"}]
        volumes.append({"name": "tls", "secret": {"secretName": tls_secret_name(instance), "items": items}})
    password = {"secretKeyRef": {"name": login.secret_name, "key": "admin-password"}}
    return {
        "metadata": {"labels": labels_of(instance, "backup")},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": _pod_security(),
            "containers": [
                {
                    "name": "backup",
                    "image": settings.image,
                    "command": ["redisgate", "backup"],
                    "args": arguments,
                    "env": [
                        {"name": "REDISGATE_BACKUP_PASSWORD", "valueFrom": password},
                        *_s3_environment(backup.s3),
                    ],
                    "volumeMounts": mounts,
                    "securityContext": _hardened(),
                }
            ],
            "volumes": volumes,
        },
    }


def _job_spec(instance: Instance, settings: OperatorSettings, observed: Observed) -> Object:
    return {
        "backoffLimit": 2,
        "activeDeadlineSeconds": BACKUP_SECONDS,
        "template": _backup_pod(instance, settings, observed),
    }


def _backup_schedule(instance: Instance, settings: OperatorSettings, observed: Observed, namespace: str) -> Object:
    backup = instance.spec.backup
    assert backup is not None
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": metadata_of(instance, f"{instance.name}-backup", namespace, "backup"),
        "spec": {
            "schedule": backup.schedule,
            "timeZone": "Etc/UTC",
            "concurrencyPolicy": "Forbid",
            "suspend": instance.spec.pods == 0,
            "successfulJobsHistoryLimit": 1,
            "failedJobsHistoryLimit": 1,
            "jobTemplate": {
                "metadata": {"labels": labels_of(instance, "backup")},
                "spec": _job_spec(instance, settings, observed),
            },
        },
    }


def final_backup(instance: Instance, settings: OperatorSettings, observed: Observed) -> Object:
    """The job that deletionPolicy BackupThenDelete waits for."""
    return {
        "apiVersion": JOBS.api_version,
        "kind": JOBS.kind,
        "metadata": metadata_of(instance, f"{instance.name}-final-backup", home(instance), "backup"),
        "spec": _job_spec(instance, settings, observed),
    }


# What lies in the gateway's namespace


def _at_the_gateway(
    instance: Instance, settings: OperatorSettings, observed: Observed
) -> tuple[list[Object], list[tuple[Resource, str, str]], list[Problem]]:
    namespace, name = settings.gateway_namespace, route_name(instance)
    problems = [
        Problem("Degraded", "HostRefused", f"spec.gateway.hosts: {host}: {why}")
        for host, why in observed.refused_hosts.items()
    ]
    short = [
        key
        for key, value in (("token", observed.token), ("readonly-token", observed.readonly_token))
        if is_short(value)
    ]
    if short:
        message = (
            f"Secret {key_name(instance)}: {', '.join(short)}: an API key has {LEAST_KEY_LENGTH} characters or more"
        )
        problems.append(Problem("CredentialsReady", "KeyTooShort", message))
    if instance.spec.pods == 0 or not observed.logins:
        return [], [(SECRETS, namespace, name), (INGRESSES, namespace, name)], problems
    objects = [_route(instance, settings, observed)]
    absent = []
    if observed.hosts:
        ingress, refused = _ingress(instance, settings, observed.hosts)
        objects.append(ingress)
        problems += refused
    else:
        absent.append((INGRESSES, namespace, name))
    return objects, absent, problems


def is_short(key: str) -> bool:
    """Whether it is an API key, but none that may be used."""
    return 0 < len(key) < LEAST_KEY_LENGTH


def _route(instance: Instance, settings: OperatorSettings, observed: Observed) -> Object:
    gateway, logins = instance.spec.gateway, observed.logins
    host, port = observed.address or (service_host(instance, settings), PORT)
    tokens = [(observed.token, ["read", "write"]), (observed.readonly_token, ["read"])]
    limits: Object = {
        "maxRequestBytes": min(gateway.max_request_bytes, settings.max_request_bytes),
        "commands": {"allow": gateway.commands.allow, "deny": gateway.commands.deny},
    }
    if gateway.rate_limit is not None:
        limits["rateLimit"] = {
            "requestsPerSecond": gateway.rate_limit.requests_per_second,
            "burst": gateway.rate_limit.burst,
        }
    route = {
        "id": instance.uid,
        "namespace": instance.namespace,
        "name": instance.name,
        "hosts": list(observed.hosts),
        "host": host,
        "port": port,
        "tls": instance.spec.tls is not None,
        "ca": observed.tls_ca,
        "user": GATEWAY_USER,
        "password": logins[0].password,
        "tokens": [
            {"sha256": hashlib.sha256(token.encode()).hexdigest(), "scopes": scopes, "expires": None}
            for token, scopes in tokens
            if token and not is_short(token)
        ],
        "limits": limits,
        "generation": instance.generation,
    }
    metadata = metadata_of(instance, route_name(instance), settings.gateway_namespace, "route")
    metadata["labels"][ROUTE_LABEL] = "true"
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "type": ROUTE_TYPE,
        "data": encode({"instance.json": msgspec.json.encode(route).decode()}),
    }


def _ingress(instance: Instance, settings: OperatorSettings, hosts: tuple[str, ...]) -> tuple[Object, list[Problem]]:
    """For its hosts, to the gateway, never to Redis; it lies with the gateway, whose Service it names."""
    wanted = instance.spec.gateway.ingress
    size = min(instance.spec.gateway.max_request_bytes, settings.max_request_bytes)
    annotations = {"nginx.ingress.kubernetes.io/proxy-body-size": str(size)}
    allowed = settings.ingress_annotations - NEVER_ANNOTATIONS
    refused = [key for key in wanted.annotations if key not in allowed]
    annotations |= {key: value for key, value in wanted.annotations.items() if key in allowed}
    problems = []
    if refused:
        message = f"spec.gateway.ingress.annotations: {', '.join(refused)}: the operator allows "
        message += ", ".join(sorted(allowed)) or "none (--ingress-annotation)"
        problems.append(Problem("Degraded", "AnnotationRefused", message))
    service = {"name": settings.gateway_service, "port": {"number": settings.gateway_port}}
    path = {"path": "/", "pathType": "Prefix", "backend": {"service": service}}
    spec: Object = {"rules": [{"host": host, "http": {"paths": [path]}} for host in hosts]}
    class_name = wanted.class_name or settings.ingress_class
    if class_name is not None:
        spec["ingressClassName"] = class_name
    if wanted.tls_secret_name is not None:
        # The Secret is beside the gateway: a name of theirs could be anybody's.
        if wanted.tls_secret_name in settings.ingress_tls_secrets:
            spec["tls"] = [{"hosts": list(hosts), "secretName": wanted.tls_secret_name}]
        elif any(key.startswith("cert-manager.io/") for key in annotations):
            spec["tls"] = [{"hosts": list(hosts), "secretName": ingress_tls_name(instance)}]
        else:
            message = f"spec.gateway.ingress.tlsSecretName: {wanted.tls_secret_name}: the operator allows "
            message += ", ".join(sorted(settings.ingress_tls_secrets)) or "none (--ingress-tls-secret)"
            problems.append(Problem("Degraded", "TlsSecretRefused", message))
    metadata = metadata_of(instance, route_name(instance), settings.gateway_namespace, "route")
    metadata["annotations"] = annotations
    return {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": metadata, "spec": spec}, problems


def _not_built(instance: Instance, settings: OperatorSettings, observed: Observed) -> Plan:
    mode = instance.spec.mode
    message = f"mode {mode} is not built yet: nothing is made for it. Use mode Standalone in a new resource"
    return Plan(refusal=Problem("Ready", "ModeNotBuilt", message))


PLANS: Final[dict[str, Callable[[Instance, OperatorSettings, Observed], Plan]]] = {
    "Standalone": _standalone,
    "Sentinel": _not_built,
    "Cluster": _not_built,
}


# Hosts


Precedence = tuple[int, str, str]
"""Sorts claims of one host: whose it is comes first."""


def claim_of(instance: Instance, host: str, own: str) -> Precedence:
    """An instance's own label is always its; then who was given the host first; then the oldest resource. An older one
    that asks later does not get what works for another."""
    if host == own:
        return 0, "", instance.uid
    for granted in instance.status.get("hosts") or ():
        if granted["host"] == host:
            return 1, granted["since"], instance.uid
    return 2, *instance.age


def granted_hosts(instance: Instance, hosts: tuple[str, ...], now: str) -> list[Object]:
    """For the status: its further hosts, and since when it has each."""
    since = {each["host"]: each["since"] for each in instance.status.get("hosts") or ()}
    return [{"host": host, "since": since.get(host, now)} for host in hosts if host in instance.spec.gateway.hosts]


def claim_hosts(
    instance: Instance, others: Mapping[str, list[tuple[Precedence, str]]], base_domain: str, dashboard: str = ""
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The hosts that are an instance's, the one of its own first, and why others are not.

    `others` tells of each host who claims it, by uid, itself among them. `dashboard` is the host of the gateway's own.
    """
    if not base_domain:
        return (), dict.fromkeys(instance.spec.gateway.hosts, "this gateway has no base domain")
    ours, refused = [f"{instance.label}.{base_domain}"], {}
    for host in instance.spec.gateway.hosts:
        first = min(others.get(host, []), default=None)
        if not host.endswith("." + base_domain):
            refused[host] = f"it is not under {base_domain}"
        elif "." in host.removesuffix("." + base_domain):
            refused[host] = (
                f"it is more than one label under {base_domain}, which a wildcard certificate does not cover"
            )
        elif host == dashboard:
            refused[host] = "it is the dashboard's"
        elif first is not None and first[1] != instance.uid and first[0] < claim_of(instance, host, ours[0]):
            refused[host] = "another instance has it"
        elif host not in ours:
            ours.append(host)
    return tuple(ours), refused
