"""A Kubernetes API server for tests, with the controllers that make deleting work: the collector and namespaces.

What it keeps to is what the conformance suite asks of it and of a real server alike. It lives in a thread with a loop
of its own, so that tests of any kind reach it; alone it is `python -m tests.kubernetes.cluster --port 8001`, and
`kubectl --server http://127.0.0.1:8001` works against it.

A request without a bearer token may do everything; one with a token is held to the Roles in the cluster (rbac.py).
There is no scheduler and no kubelet: a StatefulSet gets no pods unless a test makes them.
"""

import argparse
import asyncio
import base64
import collections
import concurrent.futures
import contextlib
import datetime
import json
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import celpy
import msgspec
import yaml
from aiohttp import web

from tests.kubernetes import fields, rbac, schema, tables
from tests.kubernetes.fields import Object

Key = tuple[str, str]
T = TypeVar("T")

# events that a kind remembers; a watch from before them is answered with 410
HISTORY = 50_000
# between two bookmarks of a watch; a real server's are about a minute apart
BOOKMARK_SECONDS = 60.0
# how long the collector leaves a dependent whose owner is gone
COLLECT_SECONDS = 0.05
REQUESTS = 100_000
# who does what without a bearer token, and the tests themselves
ADMINISTRATOR = "system:admin"


class Refused(Exception):
    """What is answered with a Status object."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": details,
            "code": code,
        }


@dataclass(eq=False)
class Event:
    version: int
    kind: str
    item: Object
    before: Object | None
    # of the event, by its type: made once, for all watches
    encoded: dict[str, bytes] = field(default_factory=dict)

    def line(self, kind: str, columns: list[Object] | None = None) -> bytes:
        """With `columns`, as a Table for kubectl."""
        if columns is not None:
            table = tables.table([self.item], columns, {"resourceVersion": str(self.version)})
            return msgspec.json.encode({"type": kind, "object": table}) + b"\n"
        if kind not in self.encoded:
            self.encoded[kind] = msgspec.json.encode({"type": kind, "object": self.item}) + b"\n"
        return self.encoded[kind]


class Kind:
    """One collection: what it is called, and what lies in it."""

    def __init__(
        self,
        api_version: str,
        plural: str,
        kind: str,
        namespaced: bool = True,
        *,
        short: Iterable[str] = (),
        status: bool = True,
        generation: bool = True,
        categories: Iterable[str] = (),
    ) -> None:
        self.api_version = api_version
        self.group, _, self.version = api_version.rpartition("/")
        self.plural = plural
        self.singular = kind.lower()
        self.kind = kind
        self.namespaced = namespaced
        self.short = list(short)
        self.categories = list(categories)
        self.status = status
        self.scale = kind in {"StatefulSet", "Deployment"}
        self.generation = generation
        self.shape: fields.Shape = fields.built_in_shape
        # a custom resource's version, with its schema
        self.definition: Object | None = None
        self.printer: list[Object] = []
        self.items: dict[Key, Object] = {}
        self.owners: dict[str, fields.Owners] = {}
        self.history: collections.deque[Event] = collections.deque(maxlen=HISTORY)
        # the first version that a watch may still start from
        self.oldest = 0
        self.changed = asyncio.Event()

    @property
    def name(self) -> str:
        """As messages name it: statefulsets.apps."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


def _built_in() -> list[Kind]:
    plain: dict[str, Any] = {"status": False, "generation": False}
    rbac = "rbac.authorization.k8s.io/v1"
    return [
        Kind("v1", "namespaces", "Namespace", False, short=["ns"], generation=False),
        Kind("v1", "configmaps", "ConfigMap", short=["cm"], **plain),
        Kind("v1", "secrets", "Secret", **plain),
        Kind("v1", "serviceaccounts", "ServiceAccount", short=["sa"], **plain),
        Kind("v1", "events", "Event", short=["ev"], **plain),
        Kind("v1", "limitranges", "LimitRange", short=["limits"], **plain),
        Kind("v1", "nodes", "Node", False, short=["no"], generation=False),
        Kind("v1", "services", "Service", short=["svc"], generation=False, categories=["all"]),
        Kind("v1", "pods", "Pod", short=["po"], categories=["all"]),
        Kind("v1", "persistentvolumeclaims", "PersistentVolumeClaim", short=["pvc"], generation=False),
        Kind("v1", "persistentvolumes", "PersistentVolume", False, short=["pv"], generation=False),
        Kind("v1", "resourcequotas", "ResourceQuota", short=["quota"], generation=False),
        Kind("v1", "endpoints", "Endpoints", short=["ep"], **plain),
        Kind("apps/v1", "deployments", "Deployment", short=["deploy"], categories=["all"]),
        Kind("apps/v1", "statefulsets", "StatefulSet", short=["sts"], categories=["all"]),
        Kind("apps/v1", "replicasets", "ReplicaSet", short=["rs"], categories=["all"]),
        Kind("apps/v1", "controllerrevisions", "ControllerRevision", **plain),
        Kind("autoscaling/v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", short=["hpa"]),
        Kind("batch/v1", "jobs", "Job", categories=["all"]),
        Kind("batch/v1", "cronjobs", "CronJob", short=["cj"], categories=["all"]),
        Kind("coordination.k8s.io/v1", "leases", "Lease", **plain),
        Kind("discovery.k8s.io/v1", "endpointslices", "EndpointSlice", status=False),
        Kind("events.k8s.io/v1", "events", "Event", short=["ev"], **plain),
        Kind("networking.k8s.io/v1", "ingresses", "Ingress", short=["ing"]),
        Kind("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy", short=["netpol"], status=False),
        Kind("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget", short=["pdb"]),
        Kind("storage.k8s.io/v1", "storageclasses", "StorageClass", False, short=["sc"], **plain),
        Kind("scheduling.k8s.io/v1", "priorityclasses", "PriorityClass", False, short=["pc"], status=False),
        Kind(rbac, "roles", "Role", **plain),
        Kind(rbac, "rolebindings", "RoleBinding", **plain),
        Kind(rbac, "clusterroles", "ClusterRole", False, **plain),
        Kind(rbac, "clusterrolebindings", "ClusterRoleBinding", False, **plain),
        Kind("apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition", False, short=["crd"]),
        Kind("admissionregistration.k8s.io/v1", "validatingadmissionpolicies", "ValidatingAdmissionPolicy", False),
        Kind(
            "admissionregistration.k8s.io/v1",
            "validatingadmissionpolicybindings",
            "ValidatingAdmissionPolicyBinding",
            False,
            status=False,
        ),
    ]


@dataclass
class Fault:
    """What happens to the requests that `matches(method, path)` chooses, until `left` of them or `until` are over."""

    matches: Callable[[str, str], bool]
    left: int
    until: float
    status: int = 0
    reason: str = ""
    delay: float = 0.0
    # the request is carried out, and its answer is lost
    after: bool = False
    # instead of an answer, the connection ends
    cut: bool = False


@dataclass(eq=False)
class Watch:
    kind: Kind
    path: str
    # from now on not a byte, and no end either: what a peer behind a dead network looks like
    mute: bool = False
    ended: bool = False


class Cluster:
    """`start()` it, use `url`, `stop()` it. The methods without underscore are for tests, from any thread."""

    def __init__(
        self,
        port: int = 0,
        *,
        bookmark_seconds: float = BOOKMARK_SECONDS,
        collect_seconds: float = COLLECT_SECONDS,
    ) -> None:
        self.port = port
        self.bookmark_seconds = bookmark_seconds
        self.collect_seconds = collect_seconds
        # while set, dependents of what was deleted stay
        self.collector_paused = False
        # who was refused what, by RBAC
        self.refusals: list[tuple[str, str, str]] = []
        self._user = ADMINISTRATOR
        self.requests: collections.deque[tuple[str, str, str]] = collections.deque(maxlen=REQUESTS)
        self._version = 1000
        self._kinds: dict[tuple[str, str], Kind] = {}
        # every object there is, by uid
        self._where: dict[str, tuple[Kind, Object]] = {}
        self._pages: collections.OrderedDict[str, tuple[int, list[Object]]] = collections.OrderedDict()
        self._faults: list[Fault] = []
        self._watches: set[Watch] = set()
        self._tokens: dict[str, str] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped: asyncio.Event | None = None
        self._collect_soon: asyncio.Event | None = None
        for kind in _built_in():
            kind.oldest = self._version
            self._kinds[kind.api_version, kind.plural] = kind
        for name in ("default", "kube-system", "kube-public"):
            self._create(self._kinds["v1", "namespaces"], "", {"metadata": {"name": name}}, "fake")

    # Life

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Cluster":
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve(ready)), name="cluster", daemon=True)
        self._thread.start()
        ready.result(15)
        return self

    def stop(self) -> None:
        assert self._loop is not None
        assert self._stopped is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(15)
        assert not self._thread.is_alive()

    def __enter__(self) -> "Cluster":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def serve(self, ready: "concurrent.futures.Future[None] | None" = None) -> None:
        """Serve until `stop()`, or for ever."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._collect_soon = asyncio.Event()
        application = web.Application(client_max_size=8 * 1024 * 1024)
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        collector = asyncio.create_task(self._collect_forever())
        if ready is not None:
            ready.set_result(None)
        await self._stopped.wait()
        self._end_watches()
        collector.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await collector
        await runner.cleanup()

    def kubeconfig(self, directory: Path, token: str = "") -> Path:
        """A file to reach this cluster with, as the user of `token` or as the administrator."""
        path = directory / f"kubeconfig-{uuid.uuid4().hex[:8]}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "user", "user": {"token": token} if token else {}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "user"}}],
            "current-context": "fake",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def service_account_token(self, namespace: str, name: str) -> str:
        """A bearer token that is held to the Roles bound to this service account."""
        token = secrets.token_hex(16)
        self._tokens[token] = f"system:serviceaccount:{namespace}:{name}"
        return token

    # What tests do to the cluster, as the administrator

    def find(self, kind: str, namespace: str, name: str) -> Object | None:
        """By "Secret", or "Event.events.k8s.io" where the kind alone is not enough."""
        return self._run(lambda: _copy(self._kind(kind).items.get((namespace, name))))

    def all(self, kind: str, namespace: str | None = None, labels: str = "") -> list[Object]:
        matches = label_selector(labels)
        return self._run(
            lambda: [
                _copy(item)
                for (its_namespace, _), item in sorted(self._kind(kind).items.items())
                if namespace in (None, its_namespace) and matches(item)
            ]
        )

    def peek(self, kind: str) -> list[Object]:
        """All objects of a kind as they are, not to be altered: for looking often."""
        return self._run(lambda: list(self._kind(kind).items.values()))

    def everything(self, labels: str = "") -> list[Object]:
        """Objects of every kind that match, to see what is left."""
        matches = label_selector(labels)
        return self._run(
            lambda: [_copy(item) for kind in self._kinds.values() for item in kind.items.values() if matches(item)]
        )

    def create(self, manifest: Object) -> Object:
        return self._run(lambda: self._create(self._kind_of(manifest), _namespace_of(manifest), manifest, "test"))

    def apply(self, manifest: Object, manager: str = "test", force: bool = True) -> Object:
        """Server-side apply."""

        def work() -> Object:
            kind = self._kind_of(manifest)
            key = (_namespace_of(manifest), manifest["metadata"]["name"])
            return self._apply(kind, key, manifest, manager, force, "")[0]

        return self._run(work)

    def edit(self, kind: str, namespace: str, name: str, change: Callable[[Object], object]) -> Object:
        """As by hand: `change` gets the object and alters it."""

        def work() -> Object:
            item = _copy(self._kind(kind).items[namespace, name])
            change(item)
            return self._replace(self._kind(kind), (namespace, name), item, "kubectl-edit", "")

        return self._run(work)

    def set_status(self, kind: str, namespace: str, name: str, status: Object, manager: str = "kubelet") -> Object:
        """What a controller of the cluster would report."""

        def work() -> Object:
            item = _copy(self._kind(kind).items[namespace, name])
            item["status"] = item.get("status", {}) | status
            return self._replace(self._kind(kind), (namespace, name), item, manager, "status")

        return self._run(work)

    def delete(self, kind: str, namespace: str, name: str, propagation: str = "Background") -> None:
        self._run(lambda: self._delete(self._kind(kind), (namespace, name), {"propagationPolicy": propagation}))

    # Faults

    def fail(
        self,
        status: int,
        *,
        count: int = 1_000_000,
        seconds: float = 1_000_000,
        method: str = "",
        path: str = "",
        reason: str = "",
        after: bool = False,
    ) -> None:
        """Answer `status` to requests whose method is `method` and whose path matches the expression `path`, for
        `count` requests or `seconds`. With `after`, carry them out first: the answer is lost, not the deed."""
        self._add_fault(method, path, count, seconds, status=status, reason=reason, after=after)

    def slow(self, delay: float, *, count: int = 1_000_000, seconds: float = 1_000_000, path: str = "") -> None:
        """Wait `delay` seconds before each answer."""
        self._add_fault("", path, count, seconds, delay=delay)

    def cut(self, *, count: int = 1_000_000, seconds: float = 1_000_000, method: str = "", path: str = "") -> None:
        """Close the connection instead of answering."""
        self._add_fault(method, path, count, seconds, cut=True)

    def heal(self) -> None:
        """No more faults; watches that are silent stay so."""
        self._run(self._faults.clear)

    def silence_watches(self, path: str = "") -> int:
        """Make open watches half-open: nothing comes any more, and no end. Answers how many."""

        def work() -> int:
            chosen = [watch for watch in self._watches if re.search(path, watch.path)]
            for watch in chosen:
                watch.mute = True
            return len(chosen)

        return self._run(work)

    def end_watches(self, path: str = "") -> int:
        """End open watches properly. Answers how many."""
        return self._run(lambda: self._end_watches(path))

    def forget_history(self) -> None:
        """Compact: pages that were begun and watches from before now are answered with 410; open watches end."""

        def work() -> None:
            self._version += 1
            self._pages.clear()
            for kind in self._kinds.values():
                kind.history.clear()
                kind.oldest = self._version
            self._end_watches()

        self._run(work)

    def watching(self, path: str = "") -> int:
        """How many watches are open on paths that match."""
        return self._run(lambda: sum(1 for watch in self._watches if re.search(path, watch.path)))

    def _add_fault(self, method: str, path: str, count: int, seconds: float, **what: Any) -> None:
        expression = re.compile(path)

        def matches(its_method: str, its_path: str) -> bool:
            return method in ("", its_method) and expression.search(its_path) is not None

        self._run(lambda: self._faults.append(Fault(matches, count, time.monotonic() + seconds, **what)))

    def _end_watches(self, path: str = "") -> int:
        chosen = [watch for watch in self._watches if re.search(path, watch.path)]
        for watch in chosen:
            watch.ended = True
            _wake(watch.kind)
        return len(chosen)

    def _run(self, work: Callable[[], T]) -> T:
        """`work()` on the cluster's own loop."""
        if self._loop is None or (self._thread is threading.current_thread()):
            return work()
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def call() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        return done.result(15)

    # Objects: all of this runs on the cluster's loop and never waits

    def _kind(self, name: str) -> Kind:
        """By Kind, or Kind.group."""
        wanted, _, group = name.partition(".")
        for kind in self._kinds.values():
            if kind.kind == wanted and (not group or kind.group == group):
                return kind
        raise KeyError(f"the cluster knows no {name}")

    def _kind_of(self, manifest: Object) -> Kind:
        for kind in self._kinds.values():
            if kind.api_version == manifest["apiVersion"] and kind.kind == manifest["kind"]:
                return kind
        raise KeyError(f"the cluster knows no {manifest['kind']} of {manifest['apiVersion']}")

    def _create(self, kind: Kind, namespace: str, manifest: Object, manager: str) -> Object:
        item = self._prepared(kind, namespace, manifest)
        return self._created(kind, item, fields.update({}, item, {}, (manager, "Update", ""), kind.shape))

    def _prepared(self, kind: Kind, namespace: str, manifest: Object) -> Object:
        """A new object, with all that the server adds to it."""
        item = _copy(manifest)
        metadata = item.setdefault("metadata", {})
        if not metadata.get("name"):
            if not metadata.get("generateName"):
                raise _invalid(kind, "", ["metadata.name: Required value: name or generateName is required"])
            metadata["name"] = metadata["generateName"] + secrets.token_hex(3)[:5]
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.:]*[a-z0-9])?", metadata["name"]) or len(metadata["name"]) > 253:
            value = (
                f'metadata.name: Invalid value: "{metadata["name"]}": a lowercase RFC 1123 subdomain must consist of'
            )
            raise _invalid(kind, metadata["name"], [value + " lower case alphanumeric characters, '-' or '.'"])
        if metadata.get("resourceVersion"):
            raise Refused(400, "BadRequest", "resourceVersion should not be set on objects to be created")
        if kind.namespaced:
            metadata["namespace"] = namespace
            self._check_namespace(namespace, kind, metadata["name"])
        key = (namespace if kind.namespaced else "", metadata["name"])
        if key in kind.items:
            raise Refused(409, "AlreadyExists", f'{kind.name} "{key[1]}" already exists', name=key[1], kind=kind.plural)
        item["apiVersion"], item["kind"] = kind.api_version, kind.kind
        for name in ("managedFields", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"):
            metadata.pop(name, None)
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = _now()
        if kind.generation:
            metadata["generation"] = 1
        if kind.status:
            item.pop("status", None)
        return item

    def _created(self, kind: Kind, item: Object, owners: fields.Owners) -> Object:
        item = self._admit(kind, item, None, "")
        self._store(kind, item, None, owners)
        return item

    def _check_namespace(self, namespace: str, kind: Kind, name: str) -> None:
        found = self._kinds["v1", "namespaces"].items.get(("", namespace))
        if found is None:
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found', name=namespace, kind="namespaces")
        if found["metadata"].get("deletionTimestamp"):
            raise Refused(
                403,
                "Forbidden",
                f'{kind.name} "{name}" is forbidden: unable to create new content in namespace {namespace} because it'
                " is being terminated",
                name=name,
                kind=kind.plural,
            )

    def _existing(self, kind: Kind, key: Key) -> Object:
        item = kind.items.get(key)
        if item is None:
            raise Refused(404, "NotFound", f'{kind.name} "{key[1]}" not found', name=key[1], kind=kind.plural)
        return item

    def _replace(self, kind: Kind, key: Key, manifest: Object, manager: str, subresource: str) -> Object:
        """PUT, and what every patch but apply comes to."""
        before = self._existing(kind, key)
        metadata = manifest.get("metadata", {})
        _check_precondition(kind, before, metadata.get("uid"), metadata.get("resourceVersion"))
        after = self._merged(kind, before, _copy(manifest), subresource)
        owners = fields.update(
            before, after, kind.owners.get(before["metadata"]["uid"], {}), (manager, "Update", subresource), kind.shape
        )
        return self._changed(kind, before, after, owners, subresource)

    def _merged(self, kind: Kind, before: Object, after: Object, subresource: str) -> Object:
        """`after`, as far as this subresource may change the object."""
        if subresource == "status":
            return {**before, "status": after.get("status", {})}
        metadata = after.setdefault("metadata", {})
        for name in ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds"):
            metadata.pop(name, None)
            if name in before["metadata"]:
                metadata[name] = before["metadata"][name]
        metadata["name"] = before["metadata"]["name"]
        if kind.namespaced:
            metadata["namespace"] = before["metadata"]["namespace"]
        for name in [name for name, value in metadata.items() if value in (None, {}, [])]:
            del metadata[name]
        after["apiVersion"], after["kind"] = kind.api_version, kind.kind
        if kind.status:
            after.pop("status", None)
            if "status" in before:
                after["status"] = before["status"]
        return after

    def _changed(self, kind: Kind, before: Object, after: Object, owners: fields.Owners, subresource: str) -> Object:
        after = self._admit(kind, after, before, subresource)
        if kind.generation and not subresource and _spec_of(after) != _spec_of(before):
            after["metadata"]["generation"] = before["metadata"].get("generation", 1) + 1
        if _bare(after) == _bare(before) and owners == kind.owners.get(before["metadata"]["uid"]):
            return before
        self._store(kind, after, before, owners)
        self._finish(kind, after)
        return after

    def _apply(
        self, kind: Kind, key: Key, manifest: Object, manager: str, force: bool, subresource: str
    ) -> tuple[Object, bool]:
        """(the object, whether it is new)."""
        who = (manager, "Apply", subresource)
        metadata = manifest.setdefault("metadata", {})
        if metadata.get("managedFields"):
            raise Refused(400, "BadRequest", "metadata.managedFields must be nil")
        if metadata.setdefault("name", key[1]) != key[1]:
            raise Refused(400, "BadRequest", "the name of the object does not match the name on the URL")
        before = kind.items.get(key)
        if before is None:
            if metadata.get("uid"):
                raise Refused(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {kind.name} "{key[1]}": uid mismatch: the provided object'
                    f" specified uid {metadata['uid']}, and no existing object was found",
                    name=key[1],
                    kind=kind.plural,
                )
            if subresource:
                self._existing(kind, key)
            item = self._prepared(kind, key[0], manifest)
            return self._created(kind, item, {who: fields.paths_of(manifest, kind.shape)}), True
        _check_precondition(kind, before, metadata.get("uid"), metadata.get("resourceVersion"))
        owners = kind.owners.get(before["metadata"]["uid"], {})
        after, new_owners, conflicts = fields.apply(before, manifest, owners, who, kind.shape)
        if conflicts and not force:
            count = sum(len(paths) for paths in conflicts.values())
            others = "; ".join(
                f'conflict{"s" if len(paths) > 1 else ""} with "{other[0]}"{_using(kind, other)}: '
                + ", ".join(sorted(map(_dotted, paths)))
                for other, paths in conflicts.items()
            )
            raise Refused(
                409,
                "Conflict",
                f"Apply failed with {count} conflict{'s' if count > 1 else ''}: {others}",
                causes=[
                    {
                        "reason": "FieldManagerConflict",
                        "message": f'conflict with "{other[0]}"',
                        "field": _dotted(path),
                    }
                    for other, paths in conflicts.items()
                    for path in sorted(paths)
                ],
            )
        after = self._merged(kind, before, after, subresource)
        return self._changed(kind, before, after, new_owners, subresource), False

    def _admit(self, kind: Kind, item: Object, before: Object | None, subresource: str) -> Object:
        """Defaults and checks; the last word before something is stored."""
        if kind.definition is not None:
            item = self._checked(kind, item, before)
        elif before is not None:
            _check_fixed(kind, item, before)
        if kind.kind == "Secret":
            for name, value in (item.pop("stringData", None) or {}).items():
                item.setdefault("data", {})[name] = base64.b64encode(value.encode()).decode()
            item.setdefault("type", "Opaque")
        if kind.kind == "CustomResourceDefinition":
            now = {"type": "Established", "status": "True", "reason": "InitialNamesAccepted", "message": ""}
            item.setdefault("status", {"conditions": [now], "acceptedNames": item["spec"]["names"]})
        if kind.kind == "Namespace":
            item.setdefault("spec", {"finalizers": ["kubernetes"]})
            item.setdefault("status", {"phase": "Active"})
        if kind.kind == "Service" and before is None:
            item.setdefault("spec", {}).setdefault(
                "clusterIP", f"10.0.{self._version // 250 % 250}.{self._version % 250}"
            )
        if not subresource:
            self._ask_policies("CREATE" if before is None else "UPDATE", kind, item, before)
        return item

    def _checked(self, kind: Kind, item: Object, before: Object | None) -> Object:
        """A custom object in the form that its definition gives it."""
        assert kind.definition is not None
        definition = kind.definition["schema"]["openAPIV3Schema"]
        metadata = item["metadata"]
        item = schema.pruned(item, definition, root=True)
        seen = {**item, "metadata": {"name": metadata["name"]}}
        old = schema.MISSING if before is None else {**before, "metadata": {"name": metadata["name"]}}
        if problems := schema.violations(seen, definition, old):
            raise _invalid(kind, metadata["name"], problems)
        return item

    def _ask_policies(self, operation: str, kind: Kind, item: Object | None, before: Object | None) -> None:
        """ValidatingAdmissionPolicies that are bound with the action Deny."""
        policies = self._kind("ValidatingAdmissionPolicy").items
        for binding in self._kind("ValidatingAdmissionPolicyBinding").items.values() if policies else ():
            policy = policies.get(("", binding["spec"]["policyName"]))
            if policy is None or "Deny" not in binding["spec"].get("validationActions", ()):
                continue
            if not _policy_matches(policy, operation, kind):
                continue
            metadata = ((before if item is None else item) or {})["metadata"]
            request = {
                "operation": operation,
                "name": metadata["name"],
                "namespace": metadata.get("namespace", ""),
                "userInfo": {"username": self._user, "groups": sorted(rbac.groups_of(self._user))},
            }
            names = {
                "object": celpy.json_to_cel(item),
                "oldObject": celpy.json_to_cel(before),
                "request": celpy.json_to_cel(request),
            }
            if not all(schema.evaluate(c["expression"], names) for c in policy["spec"].get("matchConditions", ())):
                continue
            for rule in policy["spec"]["validations"]:
                if not schema.evaluate(rule["expression"], names):
                    if "messageExpression" in rule:
                        why = str(schema.evaluate(rule["messageExpression"], names))
                    else:
                        why = rule.get("message") or f"failed expression: {rule['expression']}"
                    raise Refused(
                        422,
                        rule.get("reason", "Invalid"),
                        f'{kind.name} "{metadata["name"]}" is forbidden: ValidatingAdmissionPolicy'
                        f" '{policy['metadata']['name']}' with binding '{binding['metadata']['name']}' denied request:"
                        f" {why}",
                        name=metadata["name"],
                        kind=kind.plural,
                    )

    def _store(self, kind: Kind, item: Object, before: Object | None, owners: fields.Owners) -> None:
        self._version += 1
        metadata = item["metadata"] = dict(item["metadata"])
        metadata["resourceVersion"] = str(self._version)
        metadata["managedFields"] = fields.managed_fields(owners, kind.api_version, _now())
        kind.owners[metadata["uid"]] = owners
        kind.items[_key(item)] = item
        if kind.kind == "CustomResourceDefinition":
            self._define(item)
        self._where[metadata["uid"]] = (kind, item)
        self._announce(kind, item, before)
        references = metadata.get("ownerReferences")
        if references and not any(self._owner_state(kind, item, reference) == "alive" for reference in references):
            self._collect()

    def _define(self, item: Object) -> None:
        """Serve what a CustomResourceDefinition describes; what is served already keeps its objects."""
        spec = item["spec"]
        names = spec["names"]
        for version in spec["versions"]:
            at = (f"{spec['group']}/{version['name']}", names["plural"])
            kind = self._kinds.get(at)
            if kind is None:
                kind = Kind(*at, names["kind"], spec["scope"] == "Namespaced")
                kind.oldest = self._version
            schema = version["schema"]["openAPIV3Schema"]
            kind.singular = names.get("singular", names["kind"].lower())
            kind.short, kind.categories = names.get("shortNames", []), names.get("categories", [])
            kind.status = "status" in version.get("subresources", {})
            kind.scale = "scale" in version.get("subresources", {})
            kind.printer = version.get("additionalPrinterColumns", [])
            kind.definition, kind.shape = version, fields.schema_shape(schema)
            self._kinds[at] = kind

    def _undefine(self, definition: Object) -> None:
        spec = definition["spec"]
        for version in spec["versions"]:
            kind = self._kinds.pop((f"{spec['group']}/{version['name']}", spec["names"]["plural"]), None)
            if kind is None:
                continue
            for item in kind.items.values():
                del self._where[item["metadata"]["uid"]]
            for watch in self._watches:
                watch.ended = watch.ended or watch.kind is kind
            _wake(kind)

    def _announce(self, kind: Kind, item: Object, before: Object | None) -> None:
        event_kind = "ADDED" if before is None else "MODIFIED"
        if len(kind.history) == HISTORY:
            kind.oldest = kind.history[0].version
        kind.history.append(Event(self._version, event_kind, item, before))
        _wake(kind)

    def _delete(self, kind: Kind, key: Key, options: Object) -> Object:
        item = self._existing(kind, key)
        wanted = options.get("preconditions") or {}
        _check_precondition(kind, item, wanted.get("uid"), wanted.get("resourceVersion"))
        self._admit_delete(kind, item)
        metadata = dict(item["metadata"])
        finalizers = list(metadata.get("finalizers", []))
        extra = {"Foreground": "foregroundDeletion", "Orphan": "orphan"}.get(options.get("propagationPolicy", ""))
        if extra and extra not in finalizers and "deletionTimestamp" not in metadata:
            finalizers.append(extra)
            metadata["finalizers"] = finalizers
        waits = finalizers or (kind.kind == "Namespace" and item.get("spec", {}).get("finalizers"))
        if not waits:
            self._remove(kind, item)
        elif "deletionTimestamp" not in metadata:
            metadata["deletionTimestamp"] = _now()
            metadata["deletionGracePeriodSeconds"] = 0
            after = {**item, "metadata": metadata}
            if kind.kind == "Namespace":
                after["status"] = {"phase": "Terminating"}
            self._store(kind, after, item, kind.owners[metadata["uid"]])
            item = after
        self._collect()
        return item

    def _admit_delete(self, kind: Kind, item: Object) -> None:
        self._ask_policies("DELETE", kind, None, item)

    def _finish(self, kind: Kind, item: Object) -> None:
        """Remove what was asked to go and has nothing left to wait for."""
        if item["metadata"].get("deletionTimestamp") and not item["metadata"].get("finalizers"):
            if kind.kind != "Namespace" or not item.get("spec", {}).get("finalizers"):
                self._remove(kind, item)

    def _remove(self, kind: Kind, item: Object) -> None:
        del kind.items[_key(item)]
        if kind.kind == "CustomResourceDefinition":
            self._undefine(item)
        kind.owners.pop(item["metadata"]["uid"], None)
        self._where.pop(item["metadata"]["uid"], None)
        self._version += 1
        gone = {**item, "metadata": {**item["metadata"], "resourceVersion": str(self._version)}}
        kind.history.append(Event(self._version, "DELETED", gone, item))
        _wake(kind)
        self._collect()

    # The controllers

    def _collect(self) -> None:
        if self._collect_soon is not None:
            self._collect_soon.set()

    async def _collect_forever(self) -> None:
        """The collector of orphans and the controller of namespaces."""
        assert self._collect_soon is not None
        while True:
            await self._collect_soon.wait()
            self._collect_soon.clear()
            await asyncio.sleep(self.collect_seconds)
            if self.collector_paused:
                continue
            self._empty_namespaces()
            self._remove_orphans()

    def resume_collector(self) -> None:
        def work() -> None:
            self.collector_paused = False
            self._collect()

        self._run(work)

    def _remove_orphans(self) -> None:
        for kind, item in list(self._where.values()):
            if not (references := item["metadata"].get("ownerReferences")):
                continue
            state = [self._owner_state(kind, item, reference) for reference in references]
            if "alive" in state or "unknown" in state:
                continue
            orphaned = [ref for ref, its in zip(references, state, strict=True) if its == "orphans"]
            if orphaned:
                left = [reference for reference in references if reference not in orphaned]
                after = {**item, "metadata": {**item["metadata"], "ownerReferences": left}}
                if not left:
                    del after["metadata"]["ownerReferences"]
                self._store(kind, after, item, kind.owners[item["metadata"]["uid"]])
            elif not item["metadata"].get("deletionTimestamp"):
                with contextlib.suppress(Refused):
                    policy = "Foreground" if "foreground" in state else "Background"
                    self._delete(kind, _key(item), {"propagationPolicy": policy})
        self._finish_owners()

    def _finish_owners(self) -> None:
        """End the wait of those that were deleted in the foreground, or told to leave their dependents alone."""
        held: set[str] = set()
        claimed: set[str] = set()
        for kind in self._kinds.values():
            for item in kind.items.values():
                for reference in item["metadata"].get("ownerReferences", []):
                    claimed.add(reference["uid"])
                    if reference.get("blockOwnerDeletion"):
                        held.add(reference["uid"])
        for kind in list(self._kinds.values()):
            for item in list(kind.items.values()):
                metadata = item["metadata"]
                for name, waits_for in (("foregroundDeletion", held), ("orphan", claimed)):
                    if name in metadata.get("finalizers", []) and metadata["uid"] not in waits_for:
                        rest = [finalizer for finalizer in metadata["finalizers"] if finalizer != name]
                        after = {**item, "metadata": {**metadata, "finalizers": rest}}
                        if not rest:
                            del after["metadata"]["finalizers"]
                        self._store(kind, after, item, kind.owners[metadata["uid"]])
                        self._finish(kind, after)
                        break

    def _owner_state(self, kind: Kind, item: Object, reference: Object) -> str:
        owner_kind = next(
            (
                known
                for known in self._kinds.values()
                if known.kind == reference["kind"] and known.api_version == reference["apiVersion"]
            ),
            None,
        )
        if owner_kind is None or (owner_kind.namespaced and not kind.namespaced):
            return "unknown"  # cannot be resolved, so the collector leaves it alone
        found = self._where.get(reference["uid"])
        if found is None or found[0] is not owner_kind or found[1]["metadata"]["name"] != reference["name"]:
            return "absent"
        owner = found[1]["metadata"]
        if owner_kind.namespaced and owner["namespace"] != item["metadata"].get("namespace"):
            return "absent"  # an owner is looked for in the namespace of its dependent, and nowhere else
        if owner.get("deletionTimestamp") and "foregroundDeletion" in owner.get("finalizers", []):
            return "foreground"
        if owner.get("deletionTimestamp") and "orphan" in owner.get("finalizers", []):
            return "orphans"
        return "alive"

    def _empty_namespaces(self) -> None:
        namespaces = self._kinds["v1", "namespaces"]
        for (_, name), item in list(namespaces.items.items()):
            if not item["metadata"].get("deletionTimestamp"):
                continue
            left = 0
            for kind in list(self._kinds.values()):
                for key in [key for key in kind.items if key[0] == name] if kind.namespaced else []:
                    with contextlib.suppress(Refused):
                        if not kind.items[key]["metadata"].get("deletionTimestamp"):
                            self._delete(kind, key, {"propagationPolicy": "Background"})
                    left += key in kind.items
            if left == 0 and item.get("spec", {}).get("finalizers"):
                after = {**item, "spec": {"finalizers": []}}
                self._store(namespaces, after, item, namespaces.owners[item["metadata"]["uid"]])
                self._finish(namespaces, after)

    # HTTP

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = "/" + request.match_info["path"]
        self.requests.append((request.method, path, request.headers.get("User-Agent", "")))
        fault = next(
            (f for f in self._faults if f.left > 0 and f.until > time.monotonic() and f.matches(request.method, path)),
            None,
        )
        try:
            if fault is not None:
                fault.left -= 1
                if fault.delay:
                    await asyncio.sleep(fault.delay)
                if fault.cut:
                    assert request.transport is not None
                    request.transport.abort()
                    raise Refused(503, "ServiceUnavailable", "cut")
                if fault.status and not fault.after:
                    raise Refused(fault.status, fault.reason, f"a fault of the test: {fault.status}")
            answer = await self._route(request, path)
            if fault is not None and fault.status and fault.after:
                raise Refused(fault.status, fault.reason, f"a fault of the test: {fault.status}")
            return answer
        except Refused as refused:
            return _json(refused.body, refused.code)

    async def _route(self, request: web.Request, path: str) -> web.StreamResponse:
        parts = [part for part in path.split("/") if part]
        if not parts or parts[0] not in {"api", "apis"}:
            return self._other(parts)
        core = parts[0] == "api"
        if len(parts) < (2 if core else 3):
            return self._groups(parts)
        api_version = parts[1] if core else "/".join(parts[1:3])
        rest = parts[2 if core else 3 :]
        if not rest:
            return self._resources(api_version)
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2 and (api_version, rest[2]) in self._kinds:
            namespace, rest = rest[1], rest[2:]
        kind = self._kinds.get((api_version, rest[0]))
        if kind is None or len(rest) > 3:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        name = rest[1] if len(rest) > 1 else ""
        subresource = rest[2] if len(rest) > 2 else ""
        return await self._serve_kind(request, kind, namespace, name, subresource)

    async def _serve_kind(
        self, request: web.Request, kind: Kind, namespace: str, name: str, subresource: str
    ) -> web.StreamResponse:
        query = request.query
        method = request.method
        watching = method == "GET" and query.get("watch") in {"true", "1"}
        known = {"": True, "status": kind.status, "scale": kind.scale, "token": kind.kind == "ServiceAccount"}
        if not known.get(subresource):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        self._authorize(request, kind, namespace, name, subresource, watching)
        if watching:
            if name:
                raise Refused(405, "MethodNotAllowed", "watch a list with a fieldSelector of metadata.name")
            return await self._watch(request, kind, namespace)
        key = (namespace, name)
        if method == "GET":
            if subresource == "scale":
                return _json(_scale_of(kind, self._existing(kind, key)))
            found = self._existing(kind, key) if name else self._list(kind, namespace, dict(query))
            if tables.wanted(request.headers.get("Accept", "")):
                found = tables.table([found] if name else found["items"], kind.printer, found["metadata"])
            return _json(found)
        body = _decode(await request.read(), request.content_type)
        if query.get("fieldValidation") == "Strict" and kind.definition and method in {"POST", "PUT", "PATCH"}:
            if unknown := list(schema.unknown_fields(body, kind.definition["schema"]["openAPIV3Schema"])):
                why = ", ".join(f'unknown field "{name}"' for name in unknown)
                raise Refused(
                    400,
                    "BadRequest",
                    f"{kind.kind} in version {kind.version!r} cannot be handled as a {kind.kind}:"
                    f" strict decoding error: {why}",
                )
        self._user = self._user_of(request)
        try:
            return self._write(request, kind, key, body, subresource)
        finally:
            self._user = ADMINISTRATOR

    def _write(self, request: web.Request, kind: Kind, key: Key, body: Any, subresource: str) -> web.Response:
        """Whatever alters objects; without waiting, so that one request is one step."""
        query, method = request.query, request.method
        namespace, name = key
        manager = query.get("fieldManager") or request.headers.get("User-Agent", "unknown").split("/")[0]
        if method == "POST" and subresource == "token" and kind.kind == "ServiceAccount":
            self._existing(kind, key)
            token = self.service_account_token(*key)
            return _json({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "status": {"token": token}})
        if method == "POST" and not name:
            self._check_namespace_of(kind, namespace, body)
            return _json(self._create(kind, namespace, body, manager), 201)
        if subresource == "scale" and method in {"PUT", "PATCH"}:
            before = self._existing(kind, key)
            scale = body if method == "PUT" else _patched(_scale_of(kind, before), body, request.content_type)
            after = {**before, "spec": {**before["spec"], "replicas": scale["spec"]["replicas"]}}
            return _json(_scale_of(kind, self._replace(kind, key, after, manager, "")))
        if method == "PUT" and name:
            return _json(self._replace(kind, key, body, manager, subresource))
        if method == "PATCH" and name:
            if request.content_type == "application/apply-patch+yaml":
                if not query.get("fieldManager"):
                    raise Refused(422, "Invalid", "fieldManager is required for apply patch")
                if name and key not in kind.items:
                    self._authorize_create(request, kind, namespace)
                item, new = self._apply(kind, key, body, manager, query.get("force") == "true", subresource)
                return _json(item, 201 if new else 200)
            before = self._existing(kind, key)
            after = _patched(_copy(before), body, request.content_type)
            return _json(self._replace(kind, key, after, manager, subresource))
        if method == "DELETE" and name:
            options = dict(body or {})
            if "propagationPolicy" in query:
                options["propagationPolicy"] = query["propagationPolicy"]
            return _json(self._delete(kind, key, options))
        if method == "DELETE":
            chosen = self._list(kind, namespace, {k: query[k] for k in query if k.endswith("Selector")})
            for item in chosen["items"]:
                self._delete(kind, _key(item), dict(body or {}))
            return _json(chosen)
        raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _check_namespace_of(self, kind: Kind, namespace: str, body: Object) -> None:
        stated = body.get("metadata", {}).get("namespace")
        if kind.namespaced and not namespace:
            raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        if kind.namespaced and stated and stated != namespace:
            raise Refused(
                400,
                "BadRequest",
                "the namespace of the provided object does not match the namespace sent on the request",
            )

    def _authorize(
        self, request: web.Request, kind: Kind, namespace: str, name: str, subresource: str, watching: bool
    ) -> None:
        """Raises Refused when the user behind the bearer token may not do this."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not token:
            return
        if token not in self._tokens:
            raise Refused(401, "Unauthorized", "Unauthorized")
        verb = {
            "GET": "get" if name else "list",
            "HEAD": "get",
            "POST": "create",
            "PUT": "update",
            "PATCH": "patch",
            "DELETE": "delete" if name else "deletecollection",
        }[request.method]
        if watching:
            verb = "watch"
        self._require(self._tokens[token], verb, kind, namespace, name, subresource)

    def _require(self, user: str, verb: str, kind: Kind, namespace: str, name: str, subresource: str = "") -> None:
        resource = f"{kind.plural}/{subresource}" if subresource else kind.plural

        def read(of: str) -> Iterable[Object]:
            return self._kind(of).items.values()

        where = name if kind.kind == "Namespace" else namespace
        if not rbac.allowed(read, user, verb, kind.group, resource, where, name):
            self.refusals.append((user, verb, resource))
            why = rbac.refusal(user, verb, kind.group, resource, where, name)
            raise Refused(403, "Forbidden", why, name=name, kind=kind.plural)

    def _authorize_create(self, request: web.Request, kind: Kind, namespace: str) -> None:
        """An apply that makes an object needs the right to create one too."""
        user = self._user_of(request)
        if user != ADMINISTRATOR:
            self._require(user, "create", kind, namespace, "")

    def _user_of(self, request: web.Request) -> str:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        return self._tokens.get(token, ADMINISTRATOR)

    def _list(self, kind: Kind, namespace: str, query: dict[str, str]) -> Object:
        if "continue" in query:
            if query["continue"] not in self._pages:
                raise Refused(
                    410,
                    "Expired",
                    "The provided continue parameter is too old to display a consistent list result.",
                )
            version, items = self._pages.pop(query["continue"])
        else:
            matches = _matcher(namespace, query)
            version, items = self._version, [kind.items[key] for key in sorted(kind.items) if matches(kind.items[key])]
        limit = int(query.get("limit", 0)) or len(items)
        metadata: Object = {"resourceVersion": str(version)}
        if len(items) > limit:
            token = base64.urlsafe_b64encode(secrets.token_bytes(9)).decode()
            self._pages[token] = (version, items[limit:])
            while len(self._pages) > 100:
                self._pages.popitem(last=False)
            metadata |= {"continue": token, "remainingItemCount": len(items) - limit}
        return {
            "apiVersion": kind.api_version,
            "kind": kind.kind + "List",
            "metadata": metadata,
            "items": items[:limit],
        }

    async def _watch(self, request: web.Request, kind: Kind, namespace: str) -> web.StreamResponse:
        query = dict(request.query)
        matches = _matcher(namespace, query)
        columns = kind.printer if tables.wanted(request.headers.get("Accept", "")) else None
        start = query.get("resourceVersion", "")
        at = int(start) if start.isdigit() and start != "0" else self._version
        if start.isdigit() and start != "0" and at < kind.oldest:
            raise Refused(410, "Expired", f"too old resource version: {at} ({kind.oldest})")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        watch = Watch(kind, request.path)
        self._watches.add(watch)
        loop = asyncio.get_running_loop()
        end = loop.time() + float(query.get("timeoutSeconds", 1800))
        bookmarks = query.get("allowWatchBookmarks") in {"true", "1"}
        bookmark = loop.time() + self.bookmark_seconds
        pending: list[bytes] = []
        if start in {"", "0"}:
            pending = [
                Event(at, "ADDED", kind.items[key], None).line("ADDED", columns)
                for key in sorted(kind.items)
                if matches(kind.items[key])
            ]
        try:
            await response.prepare(request)
            while True:
                changed = kind.changed
                pending += self._lines_after(kind, at, matches, columns)
                at = self._version
                now = loop.time()
                if bookmarks and now >= bookmark:
                    metadata = {"resourceVersion": str(at), "creationTimestamp": None}
                    item = {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata}
                    pending.append(Event(at, "BOOKMARK", item, None).line("BOOKMARK"))
                    bookmark = now + self.bookmark_seconds
                if watch.mute:
                    pending.clear()
                    await asyncio.wait([asyncio.ensure_future(self._stopped_wait())], timeout=end - now)
                    return response
                if pending:
                    await response.write(b"".join(pending))
                    pending.clear()
                    continue
                if watch.ended or now >= end:
                    return response
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), min(bookmark if bookmarks else end, end) - now)
        except (ConnectionError, asyncio.CancelledError):
            return response
        finally:
            self._watches.discard(watch)

    async def _stopped_wait(self) -> None:
        assert self._stopped is not None
        await self._stopped.wait()

    def _lines_after(
        self, kind: Kind, version: int, matches: Callable[[Object], bool], columns: list[Object] | None
    ) -> list[bytes]:
        newer: list[Event] = []
        for event in reversed(kind.history):
            if event.version <= version:
                break
            newer.append(event)
        lines = []
        for event in reversed(newer):
            now, before = matches(event.item), event.before is not None and matches(event.before)
            if event.kind == "DELETED":
                shown = "DELETED" if before else ""
            elif now:
                shown = "MODIFIED" if before else "ADDED"
            else:  # it has left what the selector sees
                shown = "DELETED" if before else ""
            if shown:
                lines.append(event.line(shown, columns))
        return lines

    # Discovery

    def _other(self, parts: list[str]) -> web.Response:
        if parts == ["version"]:
            return _json({"major": "1", "minor": "33", "gitVersion": "v1.33.0-fake", "platform": "linux/amd64"})
        if parts and parts[0] in {"healthz", "livez", "readyz"}:
            return web.Response(text="ok")
        if parts[:2] == ["openapi", "v3"]:
            return _json(self._openapi("/".join(parts[2:])))
        raise Refused(404, "NotFound", "the server could not find the requested resource")

    def _openapi(self, group: str) -> Object:
        """As much as kubectl asks before it applies: that the server itself checks the fields."""
        if not group:
            versions = {kind.api_version for kind in self._kinds.values()}
            names = [f"apis/{version}" if "/" in version else f"api/{version}" for version in sorted(versions)]
            return {"paths": {name: {"serverRelativeURL": f"/openapi/v3/{name}"} for name in names}}
        paths: Object = {}
        schemas: Object = {}
        for kind in self._kinds.values():
            if group.partition("/")[2] != kind.api_version:
                continue
            path = f"/{group}/{'namespaces/{namespace}/' if kind.namespaced else ''}{kind.plural}/{{name}}"
            what = {"group": kind.group, "version": kind.version, "kind": kind.kind}
            parameter = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
            action = {"x-kubernetes-group-version-kind": what, "parameters": [parameter], "responses": {}}
            paths[path] = {"patch": action | {"x-kubernetes-action": "patch"}}
            schema = kind.definition["schema"]["openAPIV3Schema"] if kind.definition else {"type": "object"}
            schemas[f"{kind.version}.{kind.kind}"] = schema | {"x-kubernetes-group-version-kind": [what]}
        if not paths:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        info = {"title": "fake", "version": "v1"}
        return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}}

    def _groups(self, parts: list[str]) -> web.Response:
        if parts[0] == "api":
            return _json({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
        groups: dict[str, list[str]] = {}
        for kind in self._kinds.values():
            if kind.group and kind.version not in groups.setdefault(kind.group, []):
                groups[kind.group].append(kind.version)
        found = [
            {
                "name": group,
                "versions": [{"groupVersion": f"{group}/{v}", "version": v} for v in versions],
                "preferredVersion": {"groupVersion": f"{group}/{versions[0]}", "version": versions[0]},
            }
            for group, versions in groups.items()
        ]
        if len(parts) == 2:
            for group in found:
                if group["name"] == parts[1]:
                    return _json({"kind": "APIGroup", "apiVersion": "v1", **group})
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        return _json({"kind": "APIGroupList", "apiVersion": "v1", "groups": found})

    def _resources(self, api_version: str) -> web.Response:
        verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
        found: list[Object] = []
        for kind in self._kinds.values():
            if kind.api_version != api_version:
                continue
            found.append(
                {
                    "name": kind.plural,
                    "singularName": kind.singular,
                    "namespaced": kind.namespaced,
                    "kind": kind.kind,
                    "verbs": verbs,
                    "shortNames": kind.short,
                    "categories": kind.categories,
                }
            )
            if kind.status:
                found.append(
                    {
                        "name": kind.plural + "/status",
                        "singularName": "",
                        "namespaced": kind.namespaced,
                        "kind": kind.kind,
                        "verbs": ["get", "patch", "update"],
                    }
                )
            if kind.scale:
                found.append(
                    {
                        "name": kind.plural + "/scale",
                        "singularName": "",
                        "namespaced": kind.namespaced,
                        "group": "autoscaling",
                        "version": "v1",
                        "kind": "Scale",
                        "verbs": ["get", "patch", "update"],
                    }
                )
        if not found:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        return _json({"kind": "APIResourceList", "groupVersion": api_version, "resources": found, "apiVersion": "v1"})


def label_selector(text: str) -> Callable[[Object], bool]:
    """Of `a=b,a!=b,a in (b,c),a notin (b),a,!a`."""
    checks: list[Callable[[dict[str, str]], bool]] = []
    for part in re.split(r",(?![^(]*\))", text) if text else []:
        part = part.strip()
        among = re.fullmatch(r"(\S+)\s+(in|notin)\s+\((.*)\)", part)
        equal = re.fullmatch(r"(\S+?)\s*(!=|==|=)\s*(\S*)", part)
        if among:
            values = {value.strip() for value in among[3].split(",")}
            wanted = among[2] == "in"
            checks.append(lambda labels, n=among[1], v=values, w=wanted: (labels.get(n) in v) == w)  # type: ignore[misc]
        elif equal:
            wanted = equal[2] != "!="
            checks.append(lambda labels, n=equal[1], v=equal[3], w=wanted: (labels.get(n) == v) == w)  # type: ignore[misc]
        elif part.startswith("!"):
            checks.append(lambda labels, n=part[1:]: n not in labels)  # type: ignore[misc]
        else:
            checks.append(lambda labels, n=part: n in labels)  # type: ignore[misc]
    return lambda item: all(check(item["metadata"].get("labels") or {}) for check in checks)


def _field_selector(text: str) -> Callable[[Object], bool]:
    wanted: list[tuple[str, str, bool]] = []
    for part in text.split(",") if text else []:
        name, _, value = part.partition("!=") if "!=" in part else part.replace("==", "=").partition("=")
        wanted.append((name, value, "!=" not in part))

    def matches(item: Object) -> bool:
        for name, value, same in wanted:
            at: Any = item
            for step in name.lstrip(".").split("."):
                at = at.get(step) if isinstance(at, dict) else None
            if (("" if at is None else str(at)) == value) != same:
                return False
        return True

    return matches


def _matcher(namespace: str, query: dict[str, str]) -> Callable[[Object], bool]:
    labels = label_selector(query.get("labelSelector", ""))
    by_field = _field_selector(query.get("fieldSelector", ""))
    return lambda item: (
        (not namespace or item["metadata"].get("namespace") == namespace) and labels(item) and by_field(item)
    )


def _patched(item: Object, patch: Any, content_type: str) -> Object:
    if content_type == "application/merge-patch+json":
        return _merge_patch(item, patch)
    if content_type == "application/json-patch+json":
        for step in patch:
            _json_patch(item, step)
        return item
    if content_type == "application/strategic-merge-patch+json":
        result = _strategic(item, patch, ())
        assert isinstance(result, dict)
        return result
    raise Refused(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {content_type}")


def _merge_patch(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = _merge_patch(result.get(name), value)
    return result


def _json_patch(item: Any, step: Object) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
    at = item
    try:
        for part in parents:
            at = at[int(part) if isinstance(at, list) else part]
        key: Any = (len(at) if last == "-" else int(last)) if isinstance(at, list) else last
        if step["op"] == "test":
            if at[key] != step["value"]:
                raise Refused(422, "Invalid", f"the server rejected our request: testing {step['path']} failed")
        elif step["op"] == "remove":
            del at[key]
        elif step["op"] == "add" and isinstance(at, list):
            at.insert(key, step["value"])
        elif step["op"] in {"add", "replace"}:
            if step["op"] == "replace":
                at[key]
            at[key] = step["value"]
        else:
            raise Refused(422, "Invalid", f"operation {step['op']} of a JSON patch is unknown to this cluster")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Refused(422, "Invalid", f"the server rejected our request: {step['path']} is missing") from error


def _strategic(target: Any, patch: Any, names: fields.Names) -> Any:
    """A strategic merge patch, by the same keys of lists that apply knows."""
    if isinstance(patch, dict):
        if patch.get("$patch") == "replace":
            return {name: value for name, value in patch.items() if name != "$patch"}
        result = dict(target) if isinstance(target, dict) else {}
        for name, value in patch.items():
            if name.startswith("$deleteFromPrimitiveList/"):
                field_name = name.partition("/")[2]
                result[field_name] = [v for v in result.get(field_name, []) if v not in value]
            elif name == "$retainKeys":
                result = {k: v for k, v in result.items() if k in value}
            elif name.startswith("$"):
                continue
            elif value is None:
                result.pop(name, None)
            else:
                result[name] = _strategic(result.get(name), value, (*names, name))
        return result
    keys = fields.built_in_shape(names, patch) if isinstance(patch, list) else None
    if not isinstance(patch, list) or not isinstance(target, list) or keys is None:
        return patch
    if not keys:
        return target + [value for value in patch if value not in target]
    merged = list(target)
    for value in patch:
        step = fields.item_step(value, keys)
        index = next((i for i, old in enumerate(merged) if fields.item_step(old, keys) == step), None)
        if value.get("$patch") == "delete":
            if index is not None:
                del merged[index]
        elif index is None:
            merged.append(value)
        else:
            merged[index] = _strategic(merged[index], value, names)
    return merged


def _decode(data: bytes, content_type: str) -> Any:
    if not data:
        return {}
    if content_type == "application/vnd.kubernetes.protobuf":
        raise Refused(415, "UnsupportedMediaType", "this cluster speaks JSON and YAML")
    try:
        if "yaml" in content_type and not data.lstrip().startswith(b"{"):
            return yaml.safe_load(data)
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, yaml.YAMLError) as error:
        raise Refused(400, "BadRequest", f"the object provided is unrecognized: {error}") from error


def _check_precondition(kind: Kind, item: Object, uid: str | None, version: str | None) -> None:
    metadata = item["metadata"]
    if uid and uid != metadata["uid"]:
        why = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {metadata['uid']}"
    elif version and version != metadata["resourceVersion"]:
        why = "the object has been modified; please apply your changes to the latest version and try again"
    else:
        return
    name = metadata["name"]
    raise Refused(
        409, "Conflict", f'Operation cannot be fulfilled on {kind.name} "{name}": {why}', name=name, kind=kind.plural
    )


FIXED = {
    "StatefulSet": {
        "replicas",
        "ordinals",
        "template",
        "updateStrategy",
        "revisionHistoryLimit",
        "persistentVolumeClaimRetentionPolicy",
        "minReadySeconds",
    },
    "PersistentVolumeClaim": {"resources", "volumeAttributesClassName", "volumeName"},
    "Job": {"parallelism", "suspend", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "backoffLimit"},
}


def _check_fixed(kind: Kind, item: Object, before: Object) -> None:
    """What may never change of a built-in object."""
    name = item["metadata"]["name"]
    new, old = item.get("spec") or {}, before.get("spec") or {}
    if kind.kind in FIXED:
        rest = FIXED[kind.kind]
        if {k: v for k, v in new.items() if k not in rest} != {k: v for k, v in old.items() if k not in rest}:
            allowed = ", ".join(f"'{field_name}'" for field_name in sorted(rest))
            why = f"Forbidden: updates to {kind.kind.lower()} spec for fields other than {allowed} are forbidden"
            raise _invalid(kind, name, [f"spec: {why}"])
    if kind.kind == "PersistentVolumeClaim":
        sizes = [spec.get("resources", {}).get("requests", {}).get("storage", "0") for spec in (new, old)]
        if schema.quantity(sizes[0]) < schema.quantity(sizes[1]):
            why = "Forbidden: field can not be less than status.capacity"
            raise _invalid(kind, name, [f"spec.resources.requests.storage: {why}"])
    if kind.kind == "Deployment" and new.get("selector") != old.get("selector"):
        raise _invalid(kind, name, ["spec.selector: Invalid value: field is immutable"])
    if kind.kind == "Secret":
        if before.get("type", "Opaque") != item.get("type", "Opaque"):
            raise _invalid(kind, name, [f'type: Invalid value: "{item.get("type")}": field is immutable'])
        if before.get("immutable") and (item.get("data") != before.get("data") or not item.get("immutable")):
            raise _invalid(kind, name, ["data: Forbidden: field is immutable when `immutable` is set"])


def _policy_matches(policy: Object, operation: str, kind: Kind) -> bool:
    for rule in policy["spec"].get("matchConstraints", {}).get("resourceRules", ()):
        if (
            {operation, "*"} & set(rule["operations"])
            and {kind.group, "*"} & set(rule["apiGroups"])
            and {kind.version, "*"} & set(rule["apiVersions"])
            and {kind.plural, "*"} & set(rule["resources"])
        ):
            return True
    return False


def _invalid(kind: Kind, name: str, causes: list[str]) -> Refused:
    text = causes[0] if len(causes) == 1 else "[" + ", ".join(causes) + "]"
    return Refused(
        422,
        "Invalid",
        f'{kind.kind}.{kind.group or "core"} "{name}" is invalid: {text}',
        name=name,
        kind=kind.kind,
        causes=[
            {"reason": "FieldValueInvalid", "message": cause.partition(": ")[2], "field": cause.partition(": ")[0]}
            for cause in causes
        ],
    )


def _using(kind: Kind, manager: fields.Manager) -> str:
    return "" if manager[1] == "Apply" else f" using {kind.api_version}"


def _dotted(path: fields.Path) -> str:
    text = ""
    for step in path:
        if step.startswith("f:"):
            text += "." + step[2:]
        elif step.startswith("k:"):
            text += "[" + ",".join(f"{k}={json.dumps(v)}" for k, v in json.loads(step[2:]).items()) + "]"
        else:
            text += f"[{step[2:]}]"
    return text


def _scale_of(kind: Kind, item: Object) -> Object:
    metadata = {k: v for k, v in item["metadata"].items() if k in {"name", "namespace", "uid", "resourceVersion"}}
    status = item.get("status", {})
    return {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": metadata,
        "spec": {"replicas": item.get("spec", {}).get("replicas", 1)},
        "status": {"replicas": status.get("replicas", 0), "selector": status.get("selector", "")},
    }


def _spec_of(item: Object) -> Object:
    return {name: value for name, value in item.items() if name not in {"metadata", "status"}}


def _bare(item: Object) -> Object:
    """Without what changes at each write."""
    metadata = {k: v for k, v in item["metadata"].items() if k not in {"resourceVersion", "managedFields"}}
    return {**item, "metadata": metadata}


def _copy(item: Any) -> Any:
    """Some times faster than copy.deepcopy()."""
    return msgspec.json.decode(msgspec.json.encode(item))


def _key(item: Object) -> Key:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def _namespace_of(manifest: Object) -> str:
    return str(manifest["metadata"].get("namespace", ""))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _wake(kind: Kind) -> None:
    changed, kind.changed = kind.changed, asyncio.Event()
    changed.set()


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kubernetes.cluster", description=__doc__)
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args()
    cluster = Cluster(arguments.port)
    print(f"a fake Kubernetes API at {cluster.url}; kubectl --server {cluster.url} get namespaces", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(cluster.serve())


if __name__ == "__main__":
    main()
