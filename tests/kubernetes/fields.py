"""Who owns which field: server-side apply, as structured-merge-diff does it for the kinds that the tests use.

A field is a tuple of steps from the root: "f:name" into a map, 'k:{"name":"redis"}' to an item of a list with keys,
"v:redis" to a member of a set. What is atomic is one field. The notation is that of managedFields.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

Object = dict[str, Any]
Path = tuple[str, ...]
# of a manager, an operation (Apply or Update) and a subresource ("" for none)
Manager = tuple[str, str, str]
Owners = dict[Manager, set[Path]]

# names on the way to a field, without list items: ("spec", "containers", "ports")
Names = tuple[str, ...]
# the keys of a list with keys, () for a set, None for what is atomic
Shape = Callable[[Names, object], tuple[str, ...] | None]

SERVER_SET = {
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "managedFields",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "selfLink",
}
DEFAULT_KEYS = {"protocol": "TCP"}
BUILT_IN_KEYS = {
    "conditions": ("type",),
    "containers": ("name",),
    "env": ("name",),
    "ephemeralContainers": ("name",),
    "finalizers": (),
    "hostAliases": ("ip",),
    "imagePullSecrets": ("name",),
    "initContainers": ("name",),
    "ownerReferences": ("uid",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
ATOMIC_MAPS = {
    "configMapKeyRef",
    "fieldRef",
    "labelSelector",
    "namespaceSelector",
    "nodeSelector",
    "podSelector",
    "resourceFieldRef",
    "secretKeyRef",
    "selector",
}


def built_in_shape(names: Names, value: object) -> tuple[str, ...] | None:
    """Of the kinds that come with Kubernetes, by the names of their fields; a map that is not atomic answers ()."""
    name = names[-1] if names else ""
    if isinstance(value, dict):
        return None if name in ATOMIC_MAPS else ()
    if name == "ports":
        if names[-2:-1] in {("containers",), ("initContainers",)}:
            return ("containerPort", "protocol")
        return ("port", "protocol") if names == ("spec", "ports") else None
    return BUILT_IN_KEYS.get(name)


def schema_shape(schema: Object) -> Shape:
    """Of a custom resource, by the x-kubernetes-* words of its schema; metadata is as for every kind."""

    def shape(names: Names, value: object) -> tuple[str, ...] | None:
        if names[:1] == ("metadata",):
            return built_in_shape(names, value)
        at: Object = schema
        for name in names:
            while at.get("type") == "array":
                at = at.get("items") or {}
            known = (at.get("properties") or {}).get(name)
            extra = at.get("additionalProperties")
            at = known if known is not None else extra if isinstance(extra, dict) else {}
        if isinstance(value, dict):
            return None if at.get("x-kubernetes-map-type") == "atomic" else ()
        kind = at.get("x-kubernetes-list-type")
        if kind == "map":
            return tuple(at["x-kubernetes-list-map-keys"])
        return () if kind == "set" else None

    return shape


def item_step(item: Object, keys: tuple[str, ...]) -> str:
    chosen = {key: item.get(key, DEFAULT_KEYS.get(key)) for key in keys}
    return "k:" + json.dumps(chosen, sort_keys=True, separators=(",", ":"))


def paths_of(item: Object, shape: Shape, subresource: str = "") -> set[Path]:
    """Every field that `item` states, without what only the server sets. Through a subresource only that part counts,
    and the main resource never states the status."""
    found: set[Path] = set()
    for name, value in item.items():
        if name in {"apiVersion", "kind"} or (name == "status") != (subresource == "status"):
            continue
        if name == "metadata":
            for field, inner in value.items():
                if field not in SERVER_SET and subresource == "":
                    found.update(_walk(inner, ("f:metadata", "f:" + field), ("metadata", field), shape))
        else:
            found.update(_walk(value, ("f:" + name,), (name,), shape))
    return found


def _walk(value: object, path: Path, names: Names, shape: Shape) -> Iterator[Path]:
    if isinstance(value, dict) and value and shape(names, value) is not None:
        for name, inner in value.items():
            yield from _walk(inner, (*path, "f:" + name), (*names, name), shape)
    elif isinstance(value, list) and value and (keys := shape(names, value)) is not None:
        for item in value:
            if keys:
                at = (*path, item_step(item, keys))
                yield at
                for name, inner in item.items():
                    yield from _walk(inner, (*at, "f:" + name), (*names, name), shape)
            else:
                yield (*path, "v:" + json.dumps(item))
    else:
        yield path


MISSING = object()


def value_at(item: object, path: Path) -> object:
    """What stands at `path`, or MISSING."""
    for step in path:
        if step.startswith("f:"):
            if not isinstance(item, dict) or step[2:] not in item:
                return MISSING
            item = item[step[2:]]
        else:
            index = _index(item, step)
            if index is None:
                return MISSING
            item = item[index]  # type: ignore[index]
    return item


def _index(items: object, step: str) -> int | None:
    if not isinstance(items, list):
        return None
    wanted = json.loads(step[2:])
    for index, item in enumerate(items):
        if step.startswith("v:"):
            if item == wanted:
                return index
        elif isinstance(item, dict) and all(item.get(k, DEFAULT_KEYS.get(k)) == v for k, v in wanted.items()):
            return index
    return None


def remove(item: Object, path: Path) -> None:
    """Take the field out, and each map or list that is empty without it."""
    parents: list[tuple[Any, Any]] = []
    at: Any = item
    for step in path:
        key: Any = step[2:] if step.startswith("f:") else _index(at, step)
        if key is None or (isinstance(at, dict) and key not in at) or not isinstance(at, dict | list):
            return
        parents.append((at, key))
        at = at[key]
    for container, key in reversed(parents):
        del container[key]
        if container:
            return


def merge(live: object, applied: object, names: Names, shape: Shape) -> object:
    """`live` with what `applied` states."""
    if isinstance(live, dict) and isinstance(applied, dict) and shape(names, applied) is not None:
        result = dict(live)
        for name, value in applied.items():
            result[name] = merge(live[name], value, (*names, name), shape) if name in live else value
        return result
    if isinstance(live, list) and isinstance(applied, list) and (keys := shape(names, applied)) is not None:
        merged = list(live)
        for item in applied:
            step = item_step(item, keys) if keys else "v:" + json.dumps(item)
            index = _index(merged, step)
            if index is None:
                merged.append(item)
            elif keys:
                result = dict(merged[index])
                for name, value in item.items():
                    known = name in result
                    result[name] = merge(result[name], value, (*names, name), shape) if known else value
                merged[index] = result
        return merged
    return applied


def apply(
    live: Object, applied: Object, owners: Owners, manager: Manager, shape: Shape
) -> tuple[Object, Owners, dict[Manager, set[Path]]]:
    """(the object, its owners, the fields that belong to others): the last is empty unless there is a conflict."""
    stated = paths_of(applied, shape, manager[2])
    mine = owners.get(manager, set())
    conflicts: Owners = {}
    for path in stated:
        if path[-1].startswith(("k:", "v:")) or value_at(live, path) == value_at(applied, path):
            continue
        for other, theirs in owners.items():
            if other != manager and path in theirs:
                conflicts.setdefault(other, set()).add(path)
    result = merge(live, _settable(applied, manager[2]), (), shape)
    assert isinstance(result, dict)
    result = json.loads(json.dumps(result))
    kept = {path for other, theirs in owners.items() if other != manager for path in theirs}
    kept |= stated
    # an item of a list goes before its fields, and with what nobody owns in it
    for path in sorted(mine - stated, key=len):
        if not any(other[: len(path)] == path for other in kept):
            remove(result, path)
    after = {other: theirs - conflicts.get(other, set()) for other, theirs in owners.items()}
    after[manager] = stated
    return result, {who: theirs for who, theirs in after.items() if theirs}, conflicts


def _settable(applied: Object, subresource: str) -> Object:
    if subresource == "status":
        return {"status": applied.get("status", {})}
    result = {name: value for name, value in applied.items() if name != "status"}
    metadata = applied.get("metadata", {})
    result["metadata"] = {name: value for name, value in metadata.items() if name not in SERVER_SET}
    return result


def update(before: Object, after: Object, owners: Owners, manager: Manager, shape: Shape) -> Owners:
    """Owners after a PUT or a patch: who changes a field owns it."""
    old, new = paths_of(before, shape, manager[2]), paths_of(after, shape, manager[2])
    changed = {
        path
        for path in new
        if path not in old or (not path[-1].startswith("k:") and value_at(before, path) != value_at(after, path))
    }
    gone = old - new
    result = {who: theirs - gone - (set() if who == manager else changed) for who, theirs in owners.items()}
    result[manager] = result.get(manager, set()) | changed
    return {who: theirs for who, theirs in result.items() if theirs}


def managed_fields(owners: Owners, api_version: str, time: str) -> list[Object]:
    """As metadata.managedFields shows them."""
    entries = []
    for (name, operation, subresource), paths in sorted(owners.items()):
        tree: Object = {}
        for path in sorted(paths):
            at = tree
            for step in path:
                at = at.setdefault(step, {})
            if path[-1].startswith("k:"):
                at["."] = {}
        entry = {
            "manager": name,
            "operation": operation,
            "apiVersion": api_version,
            "time": time,
            "fieldsType": "FieldsV1",
            "fieldsV1": tree,
        }
        entries.append(entry | ({"subresource": subresource} if subresource else {}))
    return entries
