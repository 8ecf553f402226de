"""What we want of the cluster, written so that nothing foreign is touched and nothing is written twice.

Server-side apply with force takes over whatever has the name, an object of another owner or of an earlier resource of
the same name included. So the owner's uid is looked at first, and the object's own uid goes along, which the server
compares. An apply that would change nothing is not sent: each object's last manifest and what became of it are
remembered, and compared with the copy that a reflector keeps.
"""

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from control.kubernetes.client import (
    AlreadyExists,
    KubernetesClient,
    KubernetesError,
    NotFound,
    Object,
    Resource,
    key_of,
    resource_of,
)
from control.kubernetes.reflector import DELETED, Reflector

# the uid of the resource that an object was made for; an owner reference says the same where there can be one
OWNER_LABEL: Final = "redisgate.io/instance-uid"
# of an object that `lean()` made: the digest of what it was
STATE: Final = "redisgate.io/state"
# how far the copy of a reflector may be behind what we have just written
LAG_SECONDS: Final = 5.0

_Key = tuple[str, str, str, str]


class NotOwned(KubernetesError):
    """The name is taken by an object that is not ours; it is left alone."""


class BeingDeleted(KubernetesError):
    """The object is ours and about to go; its successor has to wait until it is gone."""


@dataclass(slots=True)
class _Memory:
    """Of one object: what was last applied, and the state that came of it."""

    manifest: bytes
    state: bytes
    uid: str
    # of the copy at that moment, None when it had nothing: while it still says so, it has not caught up
    version_before: str | None
    at: float


class Applier:
    """`watch(reflector)` each collection that is written to: what its copy lacks costs a GET before each apply."""

    def __init__(self, client: KubernetesClient, field_manager: str) -> None:
        self._client = client
        self._field_manager = field_manager
        self._stores: dict[Resource, list[Reflector]] = {}
        # forgotten with the object: never more than there are objects in the stores
        self._memory: dict[_Key, _Memory] = {}

    def watch(self, *reflectors: Reflector) -> None:
        """Look objects up in what these keep."""
        for reflector in reflectors:
            self._stores.setdefault(reflector.resource, []).append(reflector)
            reflector.subscribe(self._on_event)

    def find(self, resource: Resource, name: str, namespace: str = "") -> Object | None:
        """The newest copy that we have, without asking the server."""
        for reflector in self._stores.get(resource, []):
            found = reflector.store.get((namespace, name))
            if found is not None:
                return found
        return None

    async def apply(self, manifest: Object, owner: str) -> Object:
        """Make the object as `manifest` says; answers what it is now, without asking when nothing has changed.

        `owner` is a uid: the object must name it in an owner reference or in OWNER_LABEL, or not exist. Raises
        NotOwned and BeingDeleted, and the client's errors.
        """
        resource = resource_of(manifest)
        namespace, name = key_of(manifest)
        live = self.find(resource, name, namespace)
        key = (resource.api_version, resource.plural, namespace, name)
        digest = _digest(manifest)
        if live is None:
            live = await self._get(resource, name, namespace)
        if live is not None and self._is_done(key, digest, live):
            return live
        if live is not None:
            _check_owner(live, owner)
            manifest = manifest | {"metadata": manifest["metadata"] | {"uid": live["metadata"]["uid"]}}
        # what is new is not forced: it would fall on somebody who was quicker
        result = await self._client.apply(manifest, field_manager=self._field_manager, force=live is not None)
        self._remember(key, digest, live, result, "")
        return result

    async def apply_status(self, resource: Resource, live: Object, status: Object) -> Object:
        """Write our part of the status of `live`, a copy of the object; other managers keep theirs."""
        namespace, name = key_of(live)
        metadata = {"name": name, "namespace": namespace, "uid": live["metadata"]["uid"]}
        manifest = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata, "status": status}
        key = (resource.api_version, resource.plural + "/status", namespace, name)
        digest = _digest(manifest)
        if self._is_done(key, digest, live, "status"):
            return live
        result = await self._client.apply(manifest, field_manager=self._field_manager, force=True, subresource="status")
        self._remember(key, digest, live, result, "status")
        return result

    async def create(self, manifest: Object, owner: str) -> Object:
        """Make the object if there is none; answers the one that is there, whatever is in it. For what must never be
        written over: two operators at once make one password. Raises as `apply()` does."""
        resource = resource_of(manifest)
        namespace, name = key_of(manifest)
        live = self.find(resource, name, namespace)
        if live is None:
            try:
                return await self._client.create(manifest, field_manager=self._field_manager)
            except AlreadyExists:
                live = await self._client.get(resource, name, namespace or None)
        _check_owner(live, owner)
        return live

    async def delete(
        self, resource: Resource, name: str, namespace: str, owner: str, propagation: str = "Background"
    ) -> bool:
        """See that the object goes, if it belongs to `owner`; another one of this name is left alone. Answers whether
        it is gone: while finalizers or dependents hold it, it is not."""
        live = await self._get(resource, name, namespace)
        if live is None or not is_owned(live, owner):
            return True
        if "deletionTimestamp" not in live["metadata"]:
            uid = live["metadata"]["uid"]
            try:
                await self._client.delete(resource, name, namespace or None, uid=uid, propagation=propagation)
            except NotFound:
                return True
            live = await self._get(resource, name, namespace)
        return live is None or not is_owned(live, owner)

    async def _get(self, resource: Resource, name: str, namespace: str) -> Object | None:
        try:
            return await self._client.get(resource, name, namespace or None)
        except NotFound:
            return None

    def _is_done(self, key: _Key, digest: bytes, live: Object, part: str = "") -> bool:
        memory = self._memory.get(key)
        if memory is None or memory.manifest != digest or memory.uid != live["metadata"]["uid"]:
            return False
        if memory.state == _state(live, part):
            return True
        behind = live["metadata"]["resourceVersion"] == memory.version_before
        return behind and time.monotonic() - memory.at < LAG_SECONDS

    def _remember(self, key: _Key, digest: bytes, live: Object | None, result: Object, part: str) -> None:
        metadata = result["metadata"]
        before = None if live is None else live["metadata"]["resourceVersion"]
        self._memory[key] = _Memory(digest, _state(result, part), metadata["uid"], before, time.monotonic())

    def _on_event(self, kind: str, item: Object, before: Object | None) -> None:
        if kind != DELETED:
            return
        namespace, name = key_of(item)
        for plural in (resource_of(item).plural, resource_of(item).plural + "/status"):
            key = (item["apiVersion"], plural, namespace, name)
            memory = self._memory.get(key)
            if memory is not None and memory.uid == item["metadata"]["uid"]:
                del self._memory[key]


def lean(item: Object, *fields: str) -> Object:
    """For a reflector that feeds an Applier (`keep`): instead of all that an object says, a digest of it, its metadata,
    its status and those `fields` of its spec that somebody wants to read. A thousand instances have ten thousand."""
    kept = {"apiVersion": item["apiVersion"], "kind": item["kind"], "metadata": item["metadata"]}
    if "status" in item:
        kept["status"] = item["status"]
    if fields:
        spec = item.get("spec") or {}
        kept["spec"] = {name: spec[name] for name in fields if name in spec}
    return kept | {STATE: _state(item, "")}


def is_owned(live: Object, owner: str) -> bool:
    """Whether the object says that it was made for the resource with this uid."""
    metadata = live["metadata"]
    return (metadata.get("labels") or {}).get(OWNER_LABEL) == owner or any(
        reference["uid"] == owner for reference in metadata.get("ownerReferences") or ()
    )


def _check_owner(live: Object, owner: str) -> None:
    namespace, name = key_of(live)
    what = f"{live['kind']} {namespace + '/' if namespace else ''}{name}"
    if not is_owned(live, owner):
        owners = ", ".join(_owners_of(live)) or "nobody that it names"
        raise NotOwned(f"{what} exists and belongs to {owners}; it is left alone. Rename one of the two")
    if "deletionTimestamp" in live["metadata"]:
        raise BeingDeleted(f"{what} is being deleted; waiting until it is gone")


def _owners_of(live: Object) -> Iterable[str]:
    metadata = live["metadata"]
    for reference in metadata.get("ownerReferences") or ():
        yield f"{reference['kind']} {reference['name']} (uid {reference['uid']})"
    if label := (metadata.get("labels") or {}).get(OWNER_LABEL):
        yield f"the instance with uid {label}"


def _digest(value: object) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(value, order="deterministic"), digest_size=16).digest()


def _state(live: Object, part: str) -> bytes:
    """Of all that an apply could have a word on: not the status, which controllers write all the time, unless it is
    the status that we apply."""
    if part == "status":
        return _digest(live.get("status"))
    if STATE in live:
        state: bytes = live[STATE]
        return state
    metadata = {k: v for k, v in live["metadata"].items() if k not in {"resourceVersion", "managedFields"}}
    return _digest({k: v for k, v in live.items() if k not in {"status", "metadata"}} | {"metadata": metadata})
