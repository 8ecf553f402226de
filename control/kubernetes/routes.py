"""The gateway follows the cluster: routes that the operator publishes, into the access table of one worker.

A route is a Secret in the gateway's own namespace: where an instance is, how to log in there, and which API keys are
good for it, by their SHA-256. So a gateway never holds a key, and may read the Secrets of no tenant. A route counts
while its RedisHttpInstance exists and is not being deleted; a key stops working at that moment, whether or not an
operator is there to tidy up.

With the API server away what is known goes on working. A gateway that has not yet read all routes answers 503 instead
of 401 to credentials that it does not know.
"""

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from control.kubernetes.client import (
    INSTANCES,
    SECRETS,
    Conflict,
    KubernetesClient,
    KubernetesError,
    NotConfigured,
    NotFound,
    Object,
)
from control.kubernetes.lease import Lease
from control.kubernetes.queue import WorkQueue
from control.kubernetes.reflector import DELETED, Reflector
from redisgate.access import UNAUTHORIZED, AccessTable, Grant, Instance, Refusal, Source
from redisgate.config import ClusterSettings, InstanceConfig, Settings
from redisgate.exchange import RETRY_AFTER
from redisgate.limits import Limit, Meter
from redisgate.metering import UsageCell
from redisgate.policy import Scope, validate_names
from redisgate.scripts import ScriptCache
from redisgate.shared import SharedState, SharedStateError, subject_digest
from resp.address import Address
from resp.commands import bundled_table

__all__ = ["NotConfigured", "Route", "RouteError", "RouteFollower", "RouteTable", "check", "connect", "read_route"]

log = logging.getLogger(__name__)

ROUTE_LABEL: Final = "redisgate.io/route"
ROUTE_TYPE: Final = "redisgate.io/route"
UID_LABEL: Final = "redisgate.io/instance-uid"
INSTANCE_ID_LABEL: Final = "redisgate.io/instance-id"
"""On a RedisHttpInstance that the control plane made: the id of its row."""
DEFAULT_NAMESPACE: Final = "redisgate"
"""Of the gateway, where it is neither in a pod nor told."""
FIELD_MANAGER: Final = "redisgate-gateway"
LEASE: Final = "redisgate-gateway"
CONDITION: Final = "RouteProgrammed"
SYNC_SECONDS: Final = 3.0
"""For all routes to be read before a worker serves; then it begins without, and answers 503 to unknown keys."""
MAX_ROUTE_BYTES: Final = 64 * 1024
"""Of one route; a larger one is refused."""
MAX_TOKENS: Final = 64
"""Keys of one instance, older ones that still work included."""
PROBE_SECONDS: Final = 3.0
"""For the API server to show that it is there, before something is asked of it."""
EXPIRY_SECONDS: Final = 1.0
"""Between two looks for streams whose key's time is over."""

_NOT_READ = Refusal(503, b"ERR the routes of the cluster are not read yet; try again", RETRY_AFTER)


class RouteError(Exception):
    """A route cannot be used. The text is for whoever reads the condition of the instance."""


class KeyTaken(RouteError):
    """Another instance has an API key of it, and had it first."""


class Token(msgspec.Struct, frozen=True):
    """An API key, by what the gateway may know of it."""

    sha256: str
    scopes: tuple[str, ...] = ("read", "write")
    expires: str | None = None


class RateLimit(msgspec.Struct, frozen=True, rename="camel"):
    """As in the resource."""

    requests_per_second: int
    burst: int | None = None


class Commands(msgspec.Struct, frozen=True):
    """As in the resource."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


class RouteLimits(msgspec.Struct, frozen=True, rename="camel"):
    """`spec.gateway` of the resource, as far as it concerns the gateway."""

    rate_limit: RateLimit | None = None
    max_request_bytes: int | None = None
    commands: Commands = Commands()


class Route(msgspec.Struct, frozen=True):
    """What the operator tells of one instance: `instance.json` of the Secret."""

    id: str
    namespace: str
    name: str
    host: str
    port: int
    tokens: tuple[Token, ...]
    hosts: tuple[str, ...] = ()
    tls: bool = False
    ca: str | None = None
    user: str = ""
    password: str = ""
    previous_password: str | None = None
    limits: RouteLimits = RouteLimits()
    generation: int = 0

    @property
    def address(self) -> Address:
        """How to reach the instance and log in."""
        return Address(
            host=self.host,
            port=self.port,
            tls=self.tls,
            ca=self.ca,
            username=self.user or None,
            password=self.password or None,
        )

    def __repr__(self) -> str:
        return f"Route({self.namespace}/{self.name})"  # its password is nobody's business


def routed_uid(secret: Object) -> str | None:
    """Of the instance whose route a Secret is; None: it only looks like one.

    Others may write Secrets of other types and names beside the gateway (cert-manager does, with labels that a tenant
    chose): they neither make a route nor take one away.
    """
    uid: str | None = (secret["metadata"].get("labels") or {}).get(UID_LABEL)
    genuine = secret.get("type") == ROUTE_TYPE and secret["metadata"]["name"] == f"route-{uid}"
    return uid if genuine else None


def read_route(secret: Object) -> Route:
    """The route in a Secret. Raises RouteError."""
    encoded = (secret.get("data") or {}).get("instance.json")
    if not isinstance(encoded, str):
        raise RouteError("the operator's Secret has no instance.json")
    if len(encoded) > MAX_ROUTE_BYTES:
        raise RouteError(f"the operator's Secret is larger than {MAX_ROUTE_BYTES} bytes")
    try:
        route = msgspec.json.decode(base64.b64decode(encoded, validate=True), type=Route)
        for token in route.tokens:
            if len(bytes.fromhex(token.sha256)) != 32:
                raise ValueError("a key's sha256 has 64 hexadecimal digits")
            _expiry(token)
    except (ValueError, msgspec.MsgspecError) as error:
        raise RouteError(f"the operator's Secret cannot be read: {error}") from error
    if len(route.tokens) > MAX_TOKENS:
        raise RouteError(f"it has more than {MAX_TOKENS} API keys")
    uid = secret["metadata"].get("labels", {}).get(UID_LABEL)
    if route.id != uid:
        raise RouteError("the operator's Secret is labelled with the uid of another instance")
    return route


def _expiry(token: Token) -> float | None:
    """Unix seconds."""
    if token.expires is None:
        return None
    moment = datetime.fromisoformat(token.expires)
    if moment.tzinfo is None:
        raise ValueError("the end of a key's life has no time zone")
    return moment.timestamp()


class RouteTable:
    """Routes in the access table of one worker."""

    def __init__(
        self, access: AccessTable, shared: SharedState, index: int, *, base_domain: str = "", max_body_bytes: int = 0
    ) -> None:
        """`index` is the worker's; `max_body_bytes` the gateway's own limit, 0: not to be mentioned."""
        self._access = access
        self._shared = shared
        self._index = index
        self._suffix = "." + base_domain.lower().strip(".") if base_domain else ""
        self._max_body_bytes = max_body_bytes
        self._scripts = ScriptCache(shared)
        self._routes: dict[str, tuple[Route, str | None]] = {}  # by uid, with the id of its row
        self._grants: dict[str, dict[bytes, Grant]] = {}  # by uid: by SHA-256 of the key
        self._made_from: dict[str, tuple[object, ...]] = {}  # by uid: what its Instance was made from
        self._limits: dict[str, tuple[int, Limit]] = {}  # by uid: the rate and who counts it
        self.freed = 0
        """How many keys have been given up, so that others may have them."""

    def __contains__(self, uid: object) -> bool:
        return uid in self._routes

    def uids(self) -> list[str]:
        """Of the instances that are routed."""
        return list(self._routes)

    def address(self, uid: str) -> Address | None:
        """How to reach an instance; None: it has no route now."""
        found = self._routes.get(uid)
        return found[0].address if found is not None else None

    def put(self, route: Route, row_id: str | None = None) -> list[str]:
        """Route what asks for an instance as its route says; what people should know of it.

        Raises:
            RouteError: it cannot be; then nothing is routed there.
            KeyTaken: not while another instance has one of its keys.
        """
        if self._routes.get(route.id) == (route, row_id):
            return self._notes(route)
        try:
            self._see_that_keys_are_its_own(route)
            scopes = [self._scope(route, token) for token in route.tokens]
            limiter = self._limiter(route)
        except RouteError:
            self.remove(route.id)
            raise
        instance = self._instance(route, row_id)
        before = self._grants.get(route.id, {})
        grants = {
            bytes.fromhex(token.sha256): Grant(
                instance,
                scope,
                name=f"{route.namespace}/{route.name}{' (readonly)' if scope.readonly else ''}",
                expires=_expiry(token),
                limiter=limiter(instance),
            )
            for token, scope in zip(route.tokens, scopes, strict=True)
        }
        self._give_up(before.keys() - grants.keys())
        for digest, grant in grants.items():
            self._access.put_digest(digest, grant)
        self._grants[route.id] = grants
        self._routes[route.id] = (route, row_id)
        self._look_after_streams(before, grants)
        return self._notes(route)

    def remove(self, uid: str) -> None:
        """Refuse what asks for an instance, from now on."""
        before = self._grants.pop(uid, {})
        self._give_up(before.keys())
        self._routes.pop(uid, None)
        if self._made_from.pop(uid, None) is not None:
            self._access.remove_instance(uid)
        _, limit = self._limits.pop(uid, (0, None))
        if limit is not None:
            limit.flush(time.time())
        self._look_after_streams(before, {})

    def _see_that_keys_are_its_own(self, route: Route) -> None:
        """A key opens one instance: whoever learns one and writes it down as theirs would get the other's requests."""
        for token in route.tokens:
            held = self._access.find_digest(bytes.fromhex(token.sha256))
            if held is not None and held.instance_id != route.id:
                raise KeyTaken("another instance has one of its API keys, and had it first: give it a key of its own")

    def _give_up(self, digests: Iterable[bytes]) -> None:
        for digest in digests:
            self._access.remove_digest(digest)
            self.freed += 1

    def _instance(self, route: Route, row_id: str | None) -> Instance:
        labels = tuple(host.removesuffix(self._suffix) for host in route.hosts if host.endswith(self._suffix or "\0"))
        # The row's id too, so that /redis/<id>/ works with the keys of both.
        made_from = (route.address, labels, route.name, row_id)
        known = self._access.instances.get(route.id)
        if known is not None and self._made_from.get(route.id) == made_from:
            return known
        if known is not None:
            self._access.remove_instance(route.id)
        config = InstanceConfig(id=route.id, address=route.address, slug=route.name)
        instance = Instance(config, self._scripts, label=labels[0] if labels else None)
        instance.names |= {*labels, *([row_id] if row_id is not None else [])}
        self._access.add_instance(instance)
        self._made_from[route.id] = made_from
        return instance

    @staticmethod
    def _scope(route: Route, token: Token) -> Scope:
        commands = route.limits.commands
        scope = Scope(
            readonly="write" not in token.scopes,
            allow=frozenset(name.lower() for name in commands.allow),
            deny=frozenset(name.lower() for name in commands.deny),
        )
        problems = validate_names(scope, bundled_table())
        if problems:
            raise RouteError(f"spec.gateway.commands: {problems[0]}")
        return scope

    def _limiter(self, route: Route) -> Callable[[Instance], Meter | None]:
        wanted, size = route.limits.rate_limit, route.limits.max_request_bytes
        limits = []
        if wanted is not None:
            known = self._limits.get(route.id)
            if known is None or known[0] != wanted.requests_per_second:
                try:
                    counter = self._shared.claim(subject_digest(route.id.encode()), self._index)
                except SharedStateError as error:
                    raise RouteError(f"spec.gateway.rateLimit cannot be counted: {error}") from error
                limit = Limit(counter, wanted.requests_per_second, None, workers=self._shared.workers)
                known = self._limits[route.id] = (wanted.requests_per_second, limit)
            limits.append(known[1])
        else:
            self._limits.pop(route.id, None)
        if not limits and size is None:
            return lambda instance: None
        return lambda instance: Meter(limits, cell=UsageCell(instance.table), max_bytes=size)

    def _notes(self, route: Route) -> list[str]:
        """What the gateway does otherwise than the resource seems to say."""
        notes = []
        rate, size = route.limits.rate_limit, route.limits.max_request_bytes
        if rate is not None and rate.burst is not None and rate.burst != rate.requests_per_second:
            notes.append("rateLimit.burst has no effect: requests are counted over the last second")
        if size is not None and 0 < self._max_body_bytes < size:
            notes.append(f"maxRequestBytes is above the gateway's own limit, {self._max_body_bytes} bytes")
        if route.hosts and not self._suffix:
            notes.append("the gateway has no base domain, so no host leads there: use the path /redis/<uid>/")
        else:
            strange = [host for host in route.hosts if not host.endswith(self._suffix)]
            if strange:
                notes.append(f"not under the gateway's base domain: {', '.join(strange)}")
        return notes

    def _look_after_streams(self, before: dict[bytes, Grant], after: dict[bytes, Grant]) -> None:
        """A subscription goes on for hours: it ends with the right to it, and only with that."""
        digests = {id(grant): digest for digest, grant in before.items()}
        for stream in list(self._access.streams):
            digest = digests.get(id(stream.grant)) if stream.grant is not None else None
            if digest is None:
                continue
            grant = after.get(digest)
            if grant is not None and stream.may_go_on(grant):
                stream.grant = grant
            else:
                stream.revoke()

    def end_expired_streams(self) -> None:
        """Of keys whose time is over."""
        now = time.time()
        ours = {id(grant) for grants in self._grants.values() for grant in grants.values() if grant.expires is not None}
        for stream in list(self._access.streams):
            grant = stream.grant
            if grant is not None and id(grant) in ours and grant.expires is not None and now >= grant.expires:
                stream.revoke()


class RouteFollower:
    """Of one worker. Make it after whatever else answers for the access table, which it then stands in front of."""

    def __init__(self, settings: Settings, access: AccessTable, shared: SharedState, index: int) -> None:
        self._settings = settings
        self._access = access
        self._index = index
        self.routes = RouteTable(
            access, shared, index, base_domain=settings.base_domain, max_body_bytes=settings.limits.max_body_bytes
        )
        self._next: Source | None = None
        self._secrets: dict[str, Object] = {}  # by uid of the instance
        self._instances: dict[str, Object] = {}  # by uid
        self._problems: dict[str, str] = {}  # by uid: why it is not routed
        self._in_line: dict[str, None] = {}  # uids of those that wait for a key of another
        self._routes_read = False
        self._notes: dict[str, list[str]] = {}
        self._queue: WorkQueue[str] = WorkQueue(self._report)
        self._leading = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self.on_change: Callable[[str], None] = lambda instance_id: None
        """Told of the id of a row of the control plane whose route has changed."""
        self.client: KubernetesClient | None = None
        self.namespace = DEFAULT_NAMESPACE
        self.synced = False
        """Whether all routes have been read once."""

    async def start(self) -> None:
        """Begin to follow; waits `SYNC_SECONDS` at most for all routes to be read.

        Raises:
            NotConfigured: nothing says where the cluster is.
        """
        cluster = self._settings.cluster
        self.client = client = await connect(cluster)
        self.namespace = gateway_namespace(cluster, client)
        routes = Reflector(client, SECRETS, namespace=self.namespace, labels=f"{ROUTE_LABEL}=true")
        instances = Reflector(client, INSTANCES, namespace=cluster.kubernetes_watch or None, keep=_essence)
        routes.subscribe(self._heard_of_secret)
        instances.subscribe(self._heard_of_instance)
        self._next, self._access.source = self._access.source, self
        self._begin(routes.run())
        self._begin(instances.run())
        settled = self._begin(self._settle_when_read(routes, instances))
        self._begin(self._end_streams())
        if self._index == 0:
            # One worker of each gateway stands for election, and one of all writes what they all do.
            self._begin(Lease(client, LEASE, self.namespace).run(self._write_conditions))
        await asyncio.wait([settled], timeout=SYNC_SECONDS)
        if not self.synced:
            trouble = routes.trouble or instances.trouble
            log.warning("the routes of the cluster are not read yet: %s", trouble)

    async def problem(self) -> str | None:
        """Why the cluster cannot be used now, in words; None if it can."""
        if self.client is None:
            return "the gateway is starting"
        try:
            await self.client.call("GET", "/version", seconds=PROBE_SECONDS)
        except KubernetesError as error:
            return str(error)
        return None

    async def stop(self) -> None:
        """End; what is known stays."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.client is not None:
            await self.client.close()

    def _begin(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a part of the follower has ended", exc_info=task.exception())

    # What the gateway asks: see redisgate.access.Source

    def refusal(self, credential: bytes) -> Refusal | None:
        """Whether it is known without asking anybody that a credential grants nothing."""
        found = self._next.refusal(credential) if self._next is not None else UNAUTHORIZED
        return _NOT_READ if found is UNAUTHORIZED and not self.synced else found

    async def load(self, credential: bytes, reference: str | None) -> Refusal | None:
        """Put into the table what a credential grants, or tell that it grants nothing."""
        if self._next is None:
            return self.refusal(credential)
        return await self._next.load(credential, reference)

    # What the cluster says

    def _heard_of_secret(self, kind: str, secret: Object, before: Object | None) -> None:
        uid = routed_uid(secret)
        old = routed_uid(before) if before is not None else None
        if old is not None and old != uid:
            self._secrets.pop(old, None)
            self._settle(old)
        if uid is None:
            return
        if kind == DELETED:
            self._secrets.pop(uid, None)
        else:
            self._secrets[uid] = secret
        self._settle(uid)

    def _heard_of_instance(self, kind: str, instance: Object, before: Object | None) -> None:
        uid = instance["metadata"]["uid"]
        if kind == DELETED:
            self._instances.pop(uid, None)
        else:
            self._instances[uid] = instance
        self._settle(uid)

    async def _settle_when_read(self, routes: Reflector, instances: Reflector) -> None:
        await routes.synced.wait()
        self._routes_read = True
        self._settle_all()
        await instances.synced.wait()
        self.synced = True
        self._settle_all()

    def _settle_all(self) -> None:
        """The oldest routes first, so that every worker lets the same one have a key that two claim."""

        def age(uid: str) -> tuple[str, str]:
            return (self._secrets.get(uid) or {"metadata": {}})["metadata"].get("creationTimestamp", ""), uid

        for uid in sorted({*self._secrets, *self._instances}, key=age):
            self._settle(uid)

    def _settle(self, uid: str) -> None:
        """Let the access table say of an instance what the cluster says, and of those that waited for its keys."""
        if not self._routes_read:
            return  # in the order of the list it would be chance who gets a key that two claim
        freed = self.routes.freed
        self._settle_one(uid)
        if self.routes.freed != freed:
            for other in [other for other in self._in_line if other != uid]:
                self._settle_one(other)

    def _settle_one(self, uid: str) -> None:
        secret, instance = self._secrets.get(uid), self._instances.get(uid)
        row_id = instance["metadata"].get("labels", {}).get(INSTANCE_ID_LABEL) if instance is not None else None
        before = self.routes.address(uid)
        self._problems.pop(uid, None)
        self._notes.pop(uid, None)
        self._in_line.pop(uid, None)
        gone = instance is None or "deletionTimestamp" in instance["metadata"]
        if secret is None or (gone and self.synced):
            self.routes.remove(uid)
        else:
            try:
                self._notes[uid] = self.routes.put(read_route(secret), row_id)
            except RouteError as error:
                self.routes.remove(uid)
                self._problems[uid] = str(error)
                if isinstance(error, KeyTaken):
                    self._in_line[uid] = None
                log.warning("%s cannot be served: %s", secret["metadata"]["name"], error)
        if row_id is not None and self.routes.address(uid) != before:
            self.on_change(row_id)
        if self._leading:
            self._queue.add(uid)

    async def _end_streams(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_SECONDS)
            self.routes.end_expired_streams()

    # What we say: the condition RouteProgrammed, once per deployment

    async def _write_conditions(self) -> None:
        """While the lease is ours."""
        self._leading = True
        try:
            for uid in self._instances:
                self._queue.add(uid)
            await self._queue.run()
        finally:
            self._leading = False

    async def _report(self, uid: str) -> float | None:
        instance = self._instances.get(uid)
        if instance is None or "deletionTimestamp" in instance["metadata"] or not self.synced:
            return None
        known: Object = next(iter(instance["status"]["conditions"]), {})
        wanted = self._condition(uid, instance)
        if {name: known.get(name) for name in wanted} == wanted:
            return None
        same = known.get("status") == wanted["status"]
        moment = known["lastTransitionTime"] if same else datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        metadata = {name: instance["metadata"][name] for name in ("name", "namespace", "uid")}
        assert self.client is not None
        with contextlib.suppress(
            NotFound, Conflict
        ):  # it is gone, or another one has its name: that one will be heard of
            written = await self.client.apply(
                {
                    "apiVersion": INSTANCES.api_version,
                    "kind": INSTANCES.kind,
                    "metadata": metadata,
                    "status": {"conditions": [wanted | {"lastTransitionTime": moment}]},
                },
                field_manager=FIELD_MANAGER,
                force=True,
                subresource="status",
            )
            if uid in self._instances:  # not to be written again before it is heard of
                self._instances[uid] = _essence(written)
        return None

    def _condition(self, uid: str, instance: Object) -> Object:
        status, reason, message = "False", "NoRoute", "the operator has not published a route yet"
        if uid in self.routes:
            status, reason, message = "True", "Programmed", "; ".join(["requests reach it", *self._notes.get(uid, ())])
        elif uid in self._problems:
            reason, message = "RouteInvalid", self._problems[uid]
        elif instance["spec"]["suspend"]:
            reason, message = "Suspended", "it is suspended, so nothing is sent there"
        return {
            "type": CONDITION,
            "status": status,
            "reason": reason,
            "message": message,
            "observedGeneration": instance["metadata"].get("generation", 0),
        }


async def connect(cluster: ClusterSettings) -> KubernetesClient:
    """To the cluster of the settings. Raises NotConfigured."""
    return await KubernetesClient.connect(cluster.kubeconfig or None, cluster.kubernetes_context or None)


def check(settings: Settings) -> None:
    """See that the settings lead to a cluster, which need not answer now. Raises NotConfigured."""

    async def look() -> None:
        await (await connect(settings.cluster)).close()

    with asyncio.Runner() as runner:
        runner.run(look())


def gateway_namespace(cluster: ClusterSettings, client: KubernetesClient) -> str:
    """Where the gateway is, and its routes are."""
    return cluster.kubernetes_namespace or client.namespace or DEFAULT_NAMESPACE


def _essence(instance: Object) -> Object:
    """What a gateway has to know of a resource, of which a worker keeps all."""
    conditions: Iterable[Object] = (instance.get("status") or {}).get("conditions") or ()
    metadata = {name: value for name, value in instance["metadata"].items() if name != "annotations"}
    return {
        "metadata": metadata,
        "spec": {"suspend": bool((instance.get("spec") or {}).get("suspend"))},
        "status": {"conditions": [condition for condition in conditions if condition["type"] == CONDITION]},
    }
