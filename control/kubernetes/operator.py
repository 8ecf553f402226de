"""The operator: lets the cluster have what each RedisHttpInstance asks for, and says in its status how far that is.

One reconciliation reads the newest state, plans (plan.py), applies what differs and looks at the result. It remembers
nothing that it could not find again: it may be killed between any two calls, and the next one finishes. What must not
happen twice (a password, an API key) is a Secret that is created and never written over; a new password is a Secret of
its own, the next generation.

What lies in another namespace than its resource is found by labels and removed by our finalizer, which also sees that
pods are gone before their volume claims, and claims before the resource.
"""

import asyncio
import contextlib
import hashlib
import logging
import re
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final
from urllib.parse import urlsplit

import msgspec

import redisgate
from control.kubernetes import plan as planning
from control.kubernetes.apply import OWNER_LABEL, Applier, BeingDeleted, NotOwned, lean
from control.kubernetes.client import (
    CERTIFICATES,
    CRON_JOBS,
    DEPLOYMENTS,
    DISRUPTION_BUDGETS,
    INGRESSES,
    INSTANCES,
    JOBS,
    NAMESPACES,
    NETWORK_POLICIES,
    POD_MONITORS,
    PODS,
    RESOURCE_QUOTAS,
    SECRETS,
    SERVICES,
    STATEFUL_SETS,
    VOLUME_CLAIMS,
    Forbidden,
    Invalid,
    KubernetesClient,
    KubernetesError,
    NotFound,
    Object,
    Resource,
    key_of,
    resource_of,
)
from control.kubernetes.lease import Lease
from control.kubernetes.plan import (
    ADDRESS_ANNOTATION,
    FINALIZER,
    MANAGER,
    NAME_LABEL,
    NAMESPACE_LABEL,
    PORT,
    Login,
    Observed,
    OperatorSettings,
    Plan,
    Problem,
    decode,
    home,
    make_plan,
)
from control.kubernetes.queue import WorkQueue
from control.kubernetes.redis import LoginLost, Running, Unreachable, adjust, is_written
from control.kubernetes.reflector import DELETED, SILENCE_SECONDS, Reflector
from control.kubernetes.spec import MANAGED_LABEL, Instance, SpecError, read_instance, seconds
from control.kubernetes.status import (
    Condition,
    Health,
    backups_of,
    conditions_of,
    rendered,
    size,
    stamp,
    storage_of,
)
from control.provisioners import ADMIN_USER
from resp.address import Address

log = logging.getLogger(__name__)

Key = tuple[str, str]
Adjust = Callable[[Sequence[Address], Mapping[str, list[str]], Mapping[str, str]], Awaitable[Running]]

LEASE: Final = "redisgate-operator"
FOREIGN_SECONDS: Final = 60.0
"""Between two looks at Secrets that others made (certificates, passwords, keys to a bucket): they tell us nothing."""
WAIT_SECONDS: Final = 0.5
"""Between two looks at something that is to go, where no watch tells."""
REACH_SECONDS: Final = 2.0
"""Between two attempts to reach a Redis that is ready and does not answer."""
TOKEN_BYTES: Final = 32
"""Of passwords and API keys."""
CHILDREN: Final = (
    SECRETS,
    SERVICES,
    STATEFUL_SETS,
    DEPLOYMENTS,
    NETWORK_POLICIES,
    DISRUPTION_BUDGETS,
    VOLUME_CLAIMS,
    CRON_JOBS,
    JOBS,
    INGRESSES,
)
"""What is watched. Namespaces are too, where the operator serves all."""
READ: Final = {"StatefulSet": ("volumeClaimTemplates", "podManagementPolicy"), "PersistentVolumeClaim": ("resources",)}
"""By kind: the fields of a specification that matter here."""
WITH_THE_GATEWAY: Final = (SECRETS, INGRESSES)
WHAT_LIES_APART: Final = (CRON_JOBS, JOBS, SERVICES, NETWORK_POLICIES, DISRUPTION_BUDGETS, SECRETS)
"""Of an instance in a namespace of its own, where no owner reference does it."""


class SecretRefused(Exception):
    """A resource names a Secret that is not for it. The text names the field."""


class ComeAgain(Exception):
    """Something has to be gone before the work goes on; nothing is wrong. The text is for people."""


class Operator:
    """`run()` it. `namespace` is the only one served, None: all. With `lease`, one of several replicas works."""

    def __init__(
        self,
        client: KubernetesClient,
        settings: OperatorSettings,
        *,
        namespace: str | None = None,
        lease: Lease | None = None,
        adjust: Adjust = adjust,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        self._client = client
        self._settings = settings
        self._namespace = namespace
        self._lease = lease
        self._adjust = adjust
        self._applier = Applier(client, MANAGER)
        self._queue: WorkQueue[Key] = WorkQueue(self._reconcile)
        self._instances = Reflector(client, INSTANCES, namespace=namespace, silence=silence)
        ours = f"{MANAGED_LABEL}={MANAGER}"
        self._children = [
            Reflector(client, resource, namespace=namespace, labels=ours, keep=_keep, silence=silence)
            for resource in CHILDREN
        ]
        if namespace is None:
            self._children.append(Reflector(client, NAMESPACES, labels=ours, keep=_keep, silence=silence))
        elif namespace != settings.gateway_namespace:
            self._children += [
                Reflector(
                    client, resource, namespace=settings.gateway_namespace, labels=ours, keep=_keep, silence=silence
                )
                for resource in WITH_THE_GATEWAY
            ]
        self._instances.subscribe(self._heard_of_instance)
        self._applier.watch(*self._children)
        for reflector in self._children:
            reflector.subscribe(self._heard_of_child)
        # by uid of the resource: what there is of it, as the reflectors keep it
        self._owned: dict[str, dict[tuple[Resource, Key], Object]] = {}
        # by host: who claims it
        self._claims: dict[str, dict[str, tuple[planning.Precedence, Key]]] = {}
        self._claimed: dict[Key, list[str]] = {}
        # by uid: what the running Redis was told, and what it said
        self._told: dict[str, tuple[str, Running]] = {}
        # by uid: the strategy and the settings that we have written last, where the reflector may lag behind
        self._starts: dict[str, tuple[str, Mapping[str, str]]] = {}
        # by uid: since when it has waited for its data to be written in another form
        self._switches: dict[str, float] = {}

    @property
    def synced(self) -> bool:
        """Whether everything has been read once."""
        return all(reflector.synced.is_set() for reflector in (self._instances, *self._children))

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for reflector in (self._instances, *self._children):
                group.create_task(reflector.run())
            if self._lease is None:
                await self._work()
            else:
                await self._lease.run(self._work)

    async def _work(self) -> None:
        for reflector in (self._instances, *self._children):
            await reflector.synced.wait()
        self._starts.clear()
        log.info("%d instances are looked after", len(self._instances.store))
        for key in self._instances.store:
            self._queue.add(key)
        await self._queue.run()

    # What is heard

    def _heard_of_instance(self, kind: str, item: Object, before: Object | None) -> None:
        key, uid = key_of(item), item["metadata"]["uid"]
        self._queue.add(key)
        hosts: list[str] = []
        if kind == DELETED:
            self._told.pop(uid, None)
            self._starts.pop(uid, None)
            self._switches.pop(uid, None)
        else:
            with contextlib.suppress(SpecError):
                instance = read_instance(item)
                own = f"{instance.label}.{self._settings.base_domain}"
                hosts = list(dict.fromkeys((*instance.spec.gateway.hosts, own)))
        former = self._claimed.pop(key, [])
        for host in former:
            claims = self._claims[host]
            claims.pop(uid, None)
            if not claims:
                del self._claims[host]
        for host in hosts:
            self._claims.setdefault(host, {})[uid] = (planning.claim_of(instance, host, own), key)
        if hosts:
            self._claimed[key] = hosts
        for host in set(former) ^ set(hosts):
            for _, other in self._claims.get(host, {}).values():
                self._queue.add(other)

    def _heard_of_child(self, kind: str, item: Object, before: Object | None) -> None:
        labels = item["metadata"].get("labels") or {}
        uid, resource = labels.get(OWNER_LABEL, ""), resource_of(item)
        owned = self._owned.setdefault(uid, {})
        if kind == DELETED:
            owned.pop((resource, key_of(item)), None)
        else:
            owned[resource, key_of(item)] = item
        if not owned:
            del self._owned[uid]
        if NAME_LABEL in labels:
            self._queue.add((labels.get(NAMESPACE_LABEL, ""), labels[NAME_LABEL]))

    def _all_of(self, instance: Instance, resource: Resource) -> list[Object]:
        """What there is of an instance. Anybody can write its labels on an object of their own: ours have their place
        and name too."""
        return [
            item
            for (kind, _), item in self._owned.get(instance.uid, {}).items()
            if kind == resource and planning.is_made_for(instance, item)
        ]

    def _known_logins(self, instance: Instance) -> list[Login]:
        """The newest first."""
        found = [_login_of(secret) for secret in self._all_of(instance, SECRETS) if _is_login(secret)]
        return sorted((login for login in found if login is not None), key=lambda login: -login.generation)

    # One reconciliation

    async def _reconcile(self, key: Key) -> float | None:
        item = self._instances.store.get(key)
        if item is None:
            return None
        try:
            instance = read_instance(item)
        except SpecError as error:
            problem = Problem("Ready", "InvalidSpec", str(error))
            await self._write_refusal(item, problem)
            return None
        if instance.deleting:
            return await self._finalize(item, instance)
        if FINALIZER not in instance.finalizers:
            item = await self._set_finalizers(item, (*instance.finalizers, FINALIZER))
            instance = read_instance(item)
        try:
            return await self._bring_about(item, instance)
        except SpecError as error:
            await self._write_refusal(item, Problem("Ready", "InvalidSpec", str(error)))
            return None
        except SecretRefused as error:
            await self._write_refusal(item, Problem("Ready", "SecretRefused", str(error)))
            return FOREIGN_SECONDS
        except ComeAgain as error:
            await self._write_progress(item, str(error))
            return WAIT_SECONDS
        except (NotOwned, BeingDeleted) as error:
            reason = "NameTaken" if isinstance(error, NotOwned) else "WaitingForDeletion"
            await self._write_refusal(item, Problem("Ready", reason, str(error)))
            raise
        except (Invalid, Forbidden) as error:
            await self._write_refusal(item, Problem("Ready", "RefusedByCluster", str(error)))
            raise
        except NotFound as error:
            await self._write_refusal(item, Problem("Ready", "MissingInCluster", str(error)))
            raise

    async def _set_finalizers(self, item: Object, finalizers: tuple[str, ...]) -> Object:
        """Only if nobody has changed the object meanwhile."""
        namespace, name = key_of(item)
        version = item["metadata"]["resourceVersion"]
        patch = {"metadata": {"finalizers": list(finalizers), "resourceVersion": version}}
        return await self._client.merge(INSTANCES, name, namespace, patch, field_manager=MANAGER)

    async def _bring_about(self, item: Object, instance: Instance) -> float | None:
        if self._namespace is not None and home(instance) != instance.namespace:
            problem = Problem("Ready", "NamespaceRefused", "this operator serves one namespace: it makes no others")
            await self._write_refusal(item, problem)
            return None
        # In a namespace of its own it would use what the quota of this one does not count.
        if home(instance) != instance.namespace and await self._client.list_all(RESOURCE_QUOTAS, instance.namespace):
            text = f"{instance.namespace} has a ResourceQuota, which namespaceMode Dedicated escapes: use Same"
            await self._write_refusal(item, Problem("Ready", "NamespaceRefused", text))
            return FOREIGN_SECONDS
        refused = make_plan(instance, self._settings, Observed()).refusal
        if refused is not None:
            await self._write_refusal(item, refused)
            return None
        problems: list[Problem] = []
        foreign = await self._read_foreign(instance, problems)
        if home(instance) != instance.namespace:
            await self._apply(make_plan(instance, self._settings, Observed()).objects[:1], instance)
        hosts, refused_hosts = self._hosts(instance)
        logins, former, next_time = await self._logins(instance, problems)
        if not logins:  # a Redis that starts without a password would be out of our reach for ever
            missing = next(problem for problem in problems if problem.condition == "CredentialsReady")
            await self._write_refusal(item, replace(missing, condition="Ready"))
            return FOREIGN_SECONDS
        tokens = await self._keys(instance, hosts)
        tls = foreign.get(planning.tls_secret_name(instance) or "", {})
        strategy, accepted = self._start_of(instance)
        observed = Observed(
            logins=logins,
            strategy=strategy,
            accepted=accepted,
            token=tokens.get("token", ""),
            readonly_token=tokens.get("readonly-token", ""),
            hosts=hosts,
            refused_hosts=refused_hosts,
            copies=foreign if home(instance) != instance.namespace else {},
            tls_digest=_digest_of(tls),
            tls_ca=decode(tls).get("ca.crt"),
            images=self._images(instance),
            address=self._address(instance),
        )
        plan = make_plan(instance, self._settings, observed)
        if plan.refusal is not None:
            await self._write_refusal(item, plan.refusal)
            return None
        problems += plan.problems
        plan = await self._grow(instance, plan, problems)
        for resource, namespace, name in plan.absent:
            if self._applier.find(resource, name, namespace) is not None or self._was_made(instance, resource):
                await self._applier.delete(resource, name, namespace, instance.uid)
        routes = [child for child in plan.objects if child.get("type") == planning.ROUTE_TYPE]
        await self._apply([child for child in plan.objects if child not in routes], instance)
        health = self._health(instance)
        running, trouble = await self._tell(instance, observed, former, health)
        learned = await self._learn(instance, observed, health, running, problems)
        self._starts[instance.uid] = (learned.strategy, learned.accepted)
        secret = planning.config_secret(instance, learned)
        if secret != planning.config_secret(instance, observed):
            await self._applier.apply(secret, instance.uid)
        # The last way into a Redis that has not heard of newer passwords is kept.
        for login in former if running is not None or instance.spec.pods == 0 else ():
            await self._applier.delete(SECRETS, login.secret_name, home(instance), instance.uid)
        if trouble is not None:
            problems.append(trouble)
        # A new password is used when Redis knows it: until then the gateway goes on with the former one.
        for route in routes:
            namespace, name = key_of(route)
            if running is not None or self._applier.find(SECRETS, name, namespace) is None:
                await self._applier.apply(route, instance.uid)
        await self._write_status(item, instance, observed, health, running, problems)
        waits = [next_time] if next_time is not None else []
        spec = instance.spec
        if spec.auth.existing_secret or any(part is not None for part in (spec.tls, spec.backup, spec.bootstrap)):
            waits.append(FOREIGN_SECONDS)
        if trouble is not None or (running is not None and planning.is_switching(instance, learned)):
            waits.append(REACH_SECONDS)
        return min(waits, default=None)

    async def _apply(self, children: list[Object], instance: Instance) -> None:
        """All together; the namespace that the others need comes first."""
        first = [child for child in children if child["kind"] == "Namespace"]
        for child in first:
            await self._applier.apply(child, instance.uid)
        rest = [child for child in children if child["kind"] != "Namespace"]
        results = await asyncio.gather(
            *(self._applier.apply(child, instance.uid) for child in rest), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _hosts(self, instance: Instance) -> tuple[tuple[str, ...], dict[str, str]]:
        others = {
            host: [(precedence, uid) for uid, (precedence, _) in self._claims.get(host, {}).items()]
            for host in instance.spec.gateway.hosts
        }
        dashboard = urlsplit(self._settings.public_url).hostname or ""
        return planning.claim_hosts(instance, others, self._settings.base_domain, dashboard)

    def _address(self, instance: Instance) -> tuple[str, int] | None:
        """Where it is, if we are outside of the cluster and somebody has opened a way."""
        service = (
            self._applier.find(SERVICES, instance.name, home(instance)) if self._settings.outside_cluster else None
        )
        text = ((service or {}).get("metadata", {}).get("annotations") or {}).get(ADDRESS_ANNOTATION, "")
        host, _, port = text.rpartition(":")
        return (host, int(port)) if host and port.isdecimal() else None

    def _images(self, instance: Instance) -> dict[str, str]:
        kind = STATEFUL_SETS if instance.spec.persistence is not None else DEPLOYMENTS
        live = self._applier.find(kind, instance.name, home(instance)) or {}
        annotations: Object = live.get("metadata", {}).get("annotations") or {}
        beginning = planning.IMAGE_ANNOTATION
        return {key.removeprefix(beginning): text for key, text in annotations.items() if key.startswith(beginning)}

    # Secrets

    async def _read_foreign(self, instance: Instance, problems: list[Problem]) -> dict[str, Object]:
        """Secrets beside the resource that it names, by name; those that are not there are problems."""
        spec, found = instance.spec, {}
        wanted: dict[str, tuple[str, str]] = {}
        if spec.tls is not None and spec.tls.secret_name is not None:
            wanted[spec.tls.secret_name] = ("TLSReady", "spec.tls.secretName")
        if spec.backup is not None:
            wanted[spec.backup.s3.credentials_secret] = ("BackupHealthy", "spec.backup.s3.credentialsSecret")
        if spec.bootstrap is not None and not instance.status.get("version"):  # it has never answered
            wanted[spec.bootstrap.s3.credentials_secret] = ("Degraded", "spec.bootstrap.s3.credentialsSecret")
        for name, (condition, field) in wanted.items():
            try:
                secret = await self._client.get(SECRETS, name, instance.namespace)
            except NotFound:
                text = f"{field}: there is no Secret {name} in namespace {instance.namespace}"
                problems.append(Problem(condition, "SecretMissing", text))
                continue
            _check_foreign(secret, field)
            found[name] = secret
        if spec.tls is not None and spec.tls.secret_name is None:
            name = planning.tls_secret_name(instance) or ""
            try:
                found[name] = await self._client.get(SECRETS, name, home(instance))
            except NotFound:
                problems.append(
                    Problem("TLSReady", "CertificatePending", f"cert-manager has not made Secret {name} yet")
                )
        return found

    async def _logins(
        self, instance: Instance, problems: list[Problem]
    ) -> tuple[tuple[Login, ...], list[Login], float | None]:
        """The passwords that are good now, the newest first; those that were; in how many seconds that changes."""
        auth = instance.spec.auth
        given = await self._given_password(instance, problems)
        given_missing = auth.existing_secret is not None and given is None
        known = self._known_logins(instance)
        if not known:
            if given_missing:
                return (), [], None
            first = await self._new_login(instance, 1, given, problems)
            if first is None:
                return (), [], None
            known = [first]
        current, age = known[0], _age(known[0].created)
        trigger = auth.rotation.trigger or ""
        every = seconds(auth.rotation.every, "spec.auth.rotation.every") if auth.rotation.every else None
        if (
            (given is not None and given != current.password)
            or (auth.existing_secret is None and every is not None and age >= every)
            or (auth.existing_secret is None and trigger and trigger != self._trigger(instance, current))
        ):
            newer = await self._new_login(instance, current.generation + 1, given, problems)
            if newer is not None:
                current, age = newer, 0.0
                known.insert(0, newer)
                text = f"generation {newer.generation} is in use"
                await self._event(instance, "Normal", "CredentialsRotated", text)
        overlap = seconds(auth.rotation.overlap, "spec.auth.rotation.overlap")
        good = known[:2] if age < overlap else known[:1]
        waits = []
        if len(good) > 1:
            waits.append(overlap - age)
        if every is not None and auth.existing_secret is None:
            waits.append(every - age)
        return tuple(good), known[len(good) :], max(min(waits), 0.05) if waits else None

    async def _given_password(self, instance: Instance, problems: list[Problem]) -> str | None:
        name = instance.spec.auth.existing_secret
        if name is None:
            return None
        try:
            secret = await self._client.get(SECRETS, name, instance.namespace)
            _check_foreign(secret, "spec.auth.existingSecret")
            password = decode(secret).get("password", "")
        except NotFound:
            password = ""
        if not password or any(character.isspace() for character in password):
            text = f"spec.auth.existingSecret: Secret {name} has no key `password`, or one with blanks"
            problems.append(Problem("CredentialsReady", "SecretMissing", text))
            return None
        return password

    def _trigger(self, instance: Instance, login: Login) -> str:
        secret = self._applier.find(SECRETS, login.secret_name, home(instance)) or {}
        annotations = secret.get("metadata", {}).get("annotations") or {}
        return str(annotations.get("redisgate.io/trigger", instance.spec.auth.rotation.trigger or ""))

    async def _new_login(
        self, instance: Instance, generation: int, given: str | None, problems: list[Problem]
    ) -> Login | None:
        """Made by POST alone: of two operators, or one that was killed, the first one's stays. None, and a problem:
        what is there in its place is no login."""
        secret = planning.login_secret(
            instance,
            generation,
            given or secrets.token_urlsafe(TOKEN_BYTES),
            secrets.token_urlsafe(TOKEN_BYTES),
            instance.spec.auth.rotation.trigger or "",
        )
        made = await self._applier.create(secret, instance.uid)
        login = _login_of(made) if planning.is_made_for(instance, made) else None
        if login is None:
            name = planning.login_name(instance, generation)
            text = f"Secret {name} is not as the operator makes it: its two passwords, and its owner. Delete it"
            problems.append(Problem("CredentialsReady", "LoginBroken", text))
        return login

    async def _keys(self, instance: Instance, hosts: tuple[str, ...]) -> dict[str, str]:
        """The API keys: made once, then whatever stands in the Secret. Only its address follows the resource."""
        url = planning.url_of(instance, self._settings, hosts)
        secret = await self._applier.create(
            planning.key_secret(instance, secrets.token_urlsafe(TOKEN_BYTES), secrets.token_urlsafe(TOKEN_BYTES), url),
            instance.uid,
        )
        data = decode(secret)
        if data.get("url") != url:
            patch = {"metadata": {"uid": secret["metadata"]["uid"]}, "data": planning.encode({"url": url})}
            name = planning.key_name(instance)
            await self._client.merge(SECRETS, name, instance.namespace, patch, field_manager=MANAGER)
        return data

    # Volumes

    async def _grow(self, instance: Instance, plan: Plan, problems: list[Problem]) -> Plan:
        """Claims first, then the StatefulSet without its pods, whose templates of claims cannot change. Before anything
        looks at the health of the pods: a full volume makes them unhealthy, and must be allowed to grow."""
        live = self._applier.find(STATEFUL_SETS, instance.name, home(instance))
        wanted = next((child for child in plan.objects if child["kind"] == "StatefulSet"), None)
        persistence = instance.spec.persistence
        if live is None or wanted is None or persistence is None:
            return plan
        live_claim, claim = live["spec"]["volumeClaimTemplates"][0], wanted["spec"]["volumeClaimTemplates"][0]
        same = (
            size(live_claim) == size(claim)
            and live_claim["metadata"].get("labels") == claim["metadata"].get("labels")
            and live["spec"].get("podManagementPolicy", "OrderedReady") == wanted["spec"]["podManagementPolicy"]
        )
        if same:
            return plan
        keep = replace(plan, objects=[_as_it_is(child, live) for child in plan.objects])
        if size(live_claim) < size(claim) and persistence.resize_policy == "Manual":
            text = f"resizePolicy is Manual: grow the volume claims of {instance.name} to {persistence.size} yourself"
            if any(size(each) < size(claim) for each in self._all_of(instance, VOLUME_CLAIMS)):
                problems.append(Problem("StorageReady", "ResizeIsManual", text))
                return keep
        for name in planning.claim_names(instance):
            found = await self._get(VOLUME_CLAIMS, name, home(instance))
            if found is None or size(found) >= size(claim):
                continue
            patch = {
                "metadata": {"uid": found["metadata"]["uid"]},
                "spec": {"resources": {"requests": {"storage": persistence.size}}},
            }
            try:
                await self._client.merge(VOLUME_CLAIMS, name, home(instance), patch, field_manager=MANAGER)
            except (Invalid, Forbidden) as error:
                problems.append(Problem("StorageReady", "ResizeRefused", str(error)))
                return keep
            await self._event(instance, "Normal", "Resizing", f"{name} grows to {persistence.size}")
        if not await self._applier.delete(STATEFUL_SETS, instance.name, home(instance), instance.uid, "Orphan"):
            raise ComeAgain(f"StatefulSet {instance.name} is being replaced; its pods stay")
        return plan

    async def _get(self, resource: Resource, name: str, namespace: str) -> Object | None:
        try:
            return await self._client.get(resource, name, namespace or None)
        except NotFound:
            return None

    # The running server

    def _health(self, instance: Instance) -> Health:
        kind = STATEFUL_SETS if instance.spec.persistence is not None else DEPLOYMENTS
        live = self._applier.find(kind, instance.name, home(instance)) or {}
        status = live.get("status") or {}
        ready = int(status.get("readyReplicas") or 0)
        current = status.get("observedGeneration", 0) >= live.get("metadata", {}).get("generation", 1)
        updated = status.get("updatedReplicas", ready if not status.get("updateRevision") else 0)
        settled = current and ready == instance.spec.pods and (updated or 0) >= instance.spec.pods
        marks = [
            live.get("metadata", {}).get("uid"),
            *(status.get(name) for name in ("currentRevision", "updateRevision")),
        ]
        return Health(ready, current, settled, str(marks))

    async def _tell(
        self, instance: Instance, observed: Observed, former: list[Login], health: Health
    ) -> tuple[Running | None, Problem | None]:
        """Let the running Redis have the users and settings of its files; what it is, None if it does not run."""
        if health.ready == 0 or instance.spec.pods == 0:
            self._told.pop(instance.uid, None)
            return None, None
        users = planning.users_of(observed.logins)
        config = planning.running_config(instance, observed)
        host, port = observed.address or (planning.service_host(instance, self._settings), PORT)
        mark = _digest([users, config, health.state, host, port])
        known = self._told.get(instance.uid)
        if known is not None and known[0] == mark:
            return known[1], _refused_settings(known[1])
        try:
            running = await self._adjust(self._addresses(instance, observed, former), users, config)
        except LoginLost as error:
            text = f"{error}: its Secret was lost. Delete pod {instance.name}-0, so that it starts with the new ones"
            return None, Problem("CredentialsReady", "LoginLost", text)
        except Unreachable as error:
            return None, Problem("Degraded", "Unreachable", str(error))
        self._told[instance.uid] = (mark, running)
        return running, _refused_settings(running)

    def _addresses(self, instance: Instance, observed: Observed, former: Sequence[Login] = ()) -> list[Address]:
        host, port = observed.address or (planning.service_host(instance, self._settings), PORT)
        return [
            Address(
                host=host,
                port=port,
                tls=instance.spec.tls is not None,
                username=ADMIN_USER,
                password=login.admin_password,
                ca=observed.tls_ca,
                delegated=True,
            )
            for login in (*observed.logins, *former)
        ]

    def _config_annotations(self, instance: Instance) -> Object:
        live = self._applier.find(SECRETS, planning.config_name(instance), home(instance)) or {}
        annotations: Object = live.get("metadata", {}).get("annotations") or {}
        return annotations

    def _start_of(self, instance: Instance) -> tuple[str, Mapping[str, str]]:
        """The strategy that the data is in, and the settings that Redis has accepted."""
        if instance.uid in self._starts:
            return self._starts[instance.uid]
        annotations = self._config_annotations(instance)
        try:
            accepted = msgspec.json.decode(annotations.get(planning.SETTINGS_ANNOTATION, "{}"), type=dict[str, str])
        except msgspec.DecodeError:  # edited by hand: they are accepted anew
            accepted = {}
        return annotations.get(planning.STRATEGY_ANNOTATION, ""), accepted

    def _was_made(self, instance: Instance, resource: Resource) -> bool:
        made: str = self._config_annotations(instance).get(planning.MADE_ANNOTATION, "")
        return resource.kind in made.split(",")

    async def _learn(
        self,
        instance: Instance,
        observed: Observed,
        health: Health,
        running: Running | None,
        problems: list[Problem],
    ) -> Observed:
        """What the running Redis has made true of its next start."""
        if planning.is_switching(instance, observed):
            wanted = planning.strategy_of(instance)
            text = (
                f"spec.persistence.strategy: its data is kept as {observed.strategy} until a running Redis has written"
            )
            problem = Problem("Degraded", "StrategyWaits", f"{text} all of it as {wanted}")
            written = False
            # A Redis that writes its first append-only file does not stop: none that is about to be replaced, which we
            # may not have heard yet.
            waited = time.monotonic() - self._switches.setdefault(instance.uid, time.monotonic())
            if running is not None and health.settled and waited >= REACH_SECONDS:
                try:
                    append_only = planning.is_append_only(wanted)
                    written = await is_written(self._addresses(instance, observed), append_only=append_only)
                except Unreachable as error:
                    problem = replace(problem, message=f"{problem.message}: {error}")
            if written:
                observed = replace(observed, strategy=wanted)
            else:
                problems.append(problem)
        else:
            self._switches.pop(instance.uid, None)
            observed = replace(observed, strategy=planning.strategy_of(instance))
        if running is None or not health.settled:
            return observed
        accepted = {
            key: planning.setting_mark(instance, value)
            for key, value in instance.spec.config.items()
            if key not in planning.START_ONLY and key not in running.refused
        }
        return replace(observed, accepted=accepted)

    # The end

    async def _finalize(self, item: Object, instance: Instance) -> float | None:
        if FINALIZER not in instance.finalizers:
            return None
        uid, policy = instance.uid, instance.spec.deletion_policy
        for resource in WITH_THE_GATEWAY:  # nobody is let in from now on
            name = planning.route_name(instance)
            await self._applier.delete(resource, name, self._settings.gateway_namespace, uid)
        if policy == "BackupThenDelete" and not await self._is_backed_up(item, instance):
            return WAIT_SECONDS
        for resource in (STATEFUL_SETS, DEPLOYMENTS):
            if not await self._applier.delete(resource, instance.name, home(instance), uid):
                return WAIT_SECONDS
        pods = await self._client.list_all(PODS, home(instance), labels=f"{OWNER_LABEL}={uid}")
        if any((pod["metadata"].get("labels") or {}).get(planning.COMPONENT_LABEL) == "redis" for pod in pods):
            return WAIT_SECONDS
        apart = home(instance) != instance.namespace
        claims = await self._client.list_all(VOLUME_CLAIMS, home(instance), labels=f"{OWNER_LABEL}={uid}")
        if policy != "Retain":
            gone = [
                await self._applier.delete(VOLUME_CLAIMS, claim["metadata"]["name"], home(instance), uid)
                for claim in claims
            ]
            if not all(gone):
                return WAIT_SECONDS
        if apart and (policy != "Retain" or not claims):
            if not await self._applier.delete(NAMESPACES, home(instance), "", uid):
                return WAIT_SECONDS
        elif apart:
            for resource, name in (
                (CERTIFICATES, planning.certificate_name(instance)),
                (POD_MONITORS, instance.name),
            ):
                if self._was_made(instance, resource):
                    await self._applier.delete(resource, name, home(instance), uid)
            for resource in WHAT_LIES_APART:
                for child in await self._client.list_all(resource, home(instance), labels=f"{OWNER_LABEL}={uid}"):
                    await self._applier.delete(resource, child["metadata"]["name"], home(instance), uid)
        rest = tuple(name for name in instance.finalizers if name != FINALIZER)
        with contextlib.suppress(NotFound):
            await self._set_finalizers(item, rest)
        self._told.pop(uid, None)
        return None

    async def _is_backed_up(self, item: Object, instance: Instance) -> bool:
        name = f"{instance.name}-final-backup"
        job = await self._get(JOBS, name, home(instance))
        if job is None:
            if self._health(instance).ready == 0:
                text = "BackupThenDelete needs a running Redis: resume it, or set deletionPolicy to Delete or Retain"
                await self._write_refusal(item, Problem("Ready", "FinalBackupImpossible", text))
                return False
            logins = self._known_logins(instance)
            if not logins:
                text = "there is no password for it: set deletionPolicy to Delete or Retain"
                await self._write_refusal(item, Problem("Ready", "FinalBackupImpossible", text))
                return False
            tls = await self._get(SECRETS, planning.tls_secret_name(instance) or "-", home(instance)) or {}
            observed = Observed(logins=tuple(logins), tls_ca=decode(tls).get("ca.crt"), address=self._address(instance))
            await self._applier.create(planning.final_backup(instance, self._settings, observed), instance.uid)
            return False
        conditions = {each["type"]: each for each in (job.get("status") or {}).get("conditions") or ()}
        if (conditions.get("Complete") or {}).get("status") == "True":
            return True
        if (conditions.get("Failed") or {}).get("status") == "True":
            text = f"Job {name}: {conditions['Failed'].get('message') or 'it failed'}; delete the Job to try again,"
            text += " or set deletionPolicy to Delete or Retain"
            await self._write_refusal(item, Problem("Ready", "FinalBackupFailed", text))
        else:
            await self._write_refusal(item, Problem("Ready", "FinalBackup", f"Job {name} makes the last backup"))
        return False

    # Status

    async def _write_refusal(self, item: Object, problem: Problem) -> None:
        """Of something that stands in the way of everything; what was observed before stays as it is told."""
        instance_generation = item["metadata"].get("generation", 1)
        before = {each["type"]: each for each in (item.get("status") or {}).get("conditions") or ()}
        conditions = {"Ready": Condition(False, problem.reason, problem.message)}
        waiting = problem.reason in ("WaitingForDeletion", "FinalBackup")
        conditions["Progressing"] = Condition(waiting, problem.reason, problem.message)
        if not waiting:
            conditions["Degraded"] = Condition(True, problem.reason, problem.message)
        # the others as they are: an apply that leaves them out would remove them
        kept = [each for kind, each in before.items() if kind not in conditions and kind != "RouteProgrammed"]
        status = {key: value for key, value in (item.get("status") or {}).items() if key != "conditions"}
        status |= {
            "observedGeneration": instance_generation,
            "operatorVersion": redisgate.__version__,
            "conditions": [*rendered(conditions, before, instance_generation), *kept],
        }
        await self._put_status(item, status)

    async def _write_progress(self, item: Object, text: str) -> None:
        """Of something that is under way; whatever else is told of the instance stays so."""
        status = dict(item.get("status") or {})
        before = {each["type"]: each for each in status.get("conditions") or ()}
        progress = rendered({"Progressing": Condition(True, "Replacing", text)}, before, item["metadata"]["generation"])
        kept = [each for kind, each in before.items() if kind not in ("Progressing", "RouteProgrammed")]
        await self._put_status(item, status | {"conditions": [*progress, *kept]})

    async def _write_status(
        self,
        item: Object,
        instance: Instance,
        observed: Observed,
        health: Health,
        running: Running | None,
        problems: list[Problem],
    ) -> None:
        spec, pods, children = instance.spec, instance.spec.pods, partial(self._all_of, instance)
        by_condition: dict[str, list[Problem]] = {}
        for problem in problems:
            by_condition.setdefault(problem.condition, []).append(problem)
        before = {each["type"]: each for each in (item.get("status") or {}).get("conditions") or ()}
        was_ready = before.get("Ready", {}).get("status") == "True"
        conditions = conditions_of(instance, observed, health, running, by_condition, children, was_ready)
        host, port = observed.address or (planning.service_host(instance, self._settings), PORT)
        status: Object = {
            "observedGeneration": instance.generation,
            "operatorVersion": redisgate.__version__,
            "replicas": pods,
            "readyReplicas": health.ready,
            "pods": f"{health.ready}/{pods}",
            "selector": ",".join(f"{key}={value}" for key, value in planning.selector_of(instance).items()),
            "namespace": home(instance),
            "endpoints": {
                "http": planning.url_of(instance, self._settings, observed.hosts),
                "redis": f"{'rediss' if spec.tls is not None else 'redis'}://{host}:{port}",
            },
            "hosts": planning.granted_hosts(instance, observed.hosts, stamp(datetime.now(UTC))),
            "conditions": rendered(conditions, before, instance.generation),
        }
        if health.ready and spec.persistence is not None:
            status["primary"] = f"{instance.name}-0"
        if running is not None and running.version:
            status["version"] = running.version
        elif version := (item.get("status") or {}).get("version"):
            status["version"] = version
        if observed.logins:
            current = observed.logins[0]
            status["credentials"] = {
                "secretName": current.secret_name,
                "generation": current.generation,
                "rotatedAt": current.created,
            }
            if len(observed.logins) > 1:
                overlap = timedelta(seconds=seconds(spec.auth.rotation.overlap))
                status["credentials"]["previousValidUntil"] = stamp(_moment(current.created) + overlap)
        if spec.persistence is not None:
            status["storage"] = storage_of(instance, children)
        if spec.backup is not None:
            status["backup"] = backups_of(children)
        await self._put_status(item, status)

    async def _put_status(self, item: Object, status: Object) -> None:
        before = item.get("status") or {}
        ours = {key: value for key, value in before.items() if key != "conditions"}
        conditions = [each for each in before.get("conditions") or () if each["type"] != "RouteProgrammed"]
        wanted = sorted(status["conditions"], key=lambda each: str(each["type"]))
        if ours == {key: value for key, value in status.items() if key != "conditions"} and wanted == sorted(
            conditions, key=lambda each: str(each["type"])
        ):
            return
        with contextlib.suppress(NotFound):
            await self._applier.apply_status(INSTANCES, item, status)
        await self._tell_changes(item, {each["type"]: each for each in conditions}, wanted)

    async def _tell_changes(self, item: Object, before: Mapping[str, Object], after: list[Object]) -> None:
        """An event for each condition that has changed, as far as somebody should know."""
        for condition in after:
            kind, status = condition["type"], condition["status"]
            known = before.get(kind, {})
            if (known.get("status"), known.get("reason")) == (status, condition["reason"]):
                continue
            good = (status == "True") != (kind in ("Degraded", "Suspended", "Progressing"))
            if kind in ("Ready", "BackupHealthy", "StorageReady", "TLSReady", "CredentialsReady"):
                if good and not known and kind != "Ready":
                    continue  # well from the beginning
                warning = not good and condition["reason"] not in (
                    "PodsNotReady",
                    "Suspended",
                    "ClaimPending",
                    "Resizing",
                    "WaitingForDeletion",
                    "FinalBackup",
                )
                if not good and not warning and not known:
                    continue  # as everything begins
                await self._event_of(
                    item, "Warning" if warning else "Normal", condition["reason"], condition["message"]
                )
            elif kind == "Degraded" and not good:
                await self._event_of(item, "Warning", condition["reason"], condition["message"])

    async def _event(self, instance: Instance, kind: str, reason: str, message: str) -> None:
        item = self._instances.store.get(instance.key)
        if item is not None:
            await self._event_of(item, kind, reason, message)

    async def _event_of(self, item: Object, kind: str, reason: str, message: str) -> None:
        """For people who look at the resource; one that cannot be written is no reason to stop."""
        namespace, name = key_of(item)
        now = stamp(datetime.now(UTC))
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{name}.{uuid.uuid4().hex[:16]}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": INSTANCES.api_version,
                "kind": INSTANCES.kind,
                "name": name,
                "namespace": namespace,
                "uid": item["metadata"]["uid"],
                "resourceVersion": item["metadata"]["resourceVersion"],
            },
            "type": kind,
            "reason": reason,
            "message": message[:1024],
            "source": {"component": MANAGER},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._client.create(event, field_manager=MANAGER)
        except KubernetesError as error:
            log.warning("%s/%s: an event could not be written: %s", namespace, name, error)


def _keep(item: Object) -> Object:
    """What we read of our own objects."""
    if item["kind"] == "Secret":
        component = (item["metadata"].get("labels") or {}).get(planning.COMPONENT_LABEL)
        return item if component in ("login", "api-key") else lean(item)
    return lean(item, *READ.get(item["kind"], ()))


def _check_foreign(secret: Object, field: str) -> None:
    """Who may make a resource may not therefore read every Secret beside it. Raises SecretRefused."""
    metadata = secret["metadata"]
    if (metadata.get("labels") or {}).get(MANAGED_LABEL) == MANAGER:
        raise SecretRefused(f"{field}: Secret {metadata['name']} is the operator's own, of an instance")
    if field == "spec.tls.secretName" and secret.get("type") != "kubernetes.io/tls":
        raise SecretRefused(f"{field}: Secret {metadata['name']} is not of type kubernetes.io/tls")


def _is_login(secret: Object) -> bool:
    return (secret["metadata"].get("labels") or {}).get(planning.COMPONENT_LABEL) == "login"


def _login_of(secret: Object) -> Login | None:
    """None: people have changed it, and it is none any more."""
    metadata, data = secret["metadata"], decode(secret)
    generation = (metadata.get("labels") or {}).get("redisgate.io/generation", "")
    if not re.fullmatch("[0-9]{1,9}", generation) or not data.get("password") or not data.get("admin-password"):
        return None
    return Login(
        generation=int(generation),
        secret_name=metadata["name"],
        created=metadata["creationTimestamp"],
        password=data["password"],
        admin_password=data["admin-password"],
    )


def _refused_settings(running: Running) -> Problem | None:
    if not running.refused:
        return None
    text = "; ".join(f"spec.config.{key}: {why}" for key, why in running.refused.items())
    return Problem("Degraded", "SettingRefused", f"Redis goes on without: {text}")


def _as_it_is(child: Object, live: Object) -> Object:
    """A StatefulSet with what cannot change as it is in the one that there is."""
    if child["kind"] != "StatefulSet":
        return child
    claim, wanted = live["spec"]["volumeClaimTemplates"][0], child["spec"]["volumeClaimTemplates"][0]
    kept = wanted | {"spec": wanted["spec"] | {"resources": claim["spec"]["resources"]}}
    kept["metadata"] = {key: claim["metadata"][key] for key in ("name", "labels") if key in claim["metadata"]}
    policy = live["spec"].get("podManagementPolicy", "OrderedReady")
    return child | {"spec": child["spec"] | {"volumeClaimTemplates": [kept], "podManagementPolicy": policy}}


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _digest_of(secret: Object) -> str:
    data = secret.get("data") or {}
    return _digest(sorted(data.items()))[:16] if data else ""


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _age(text: str) -> float:
    return (datetime.now(UTC) - _moment(text)).total_seconds()
