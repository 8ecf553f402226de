"""What we rely on of a Kubernetes API server: the same expectations of the tests' own cluster and of a real one.

    KUBECONFIG=~/.kube/config .venv/bin/pytest tests/kubernetes/test_conformance.py

runs them against a real one, which needs a user who may make namespaces, definitions and admission policies; all of
them carry names that begin with redisgate-conformance, and are removed at the end. Without KUBECONFIG they show that
tests/kubernetes/cluster.py tells the other tests no lies.
"""

import asyncio
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from control.kubernetes import client as kubernetes
from control.kubernetes.client import (
    ADMISSION_BINDINGS,
    ADMISSION_POLICIES,
    CONFIG_MAPS,
    CUSTOM_RESOURCES,
    NAMESPACES,
    PODS,
    ROLE_BINDINGS,
    ROLES,
    SECRETS,
    SERVICE_ACCOUNTS,
    STATEFUL_SETS,
    AlreadyExists,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    KubernetesClient,
    NotFound,
    Object,
    Resource,
)
from tests.kubernetes.cluster import Cluster

REAL = os.environ.get("KUBECONFIG")
GROUP = "redisgate-conformance.example.com"
WIDGETS = Resource(f"{GROUP}/v1", "widgets", "Widget")
# a real server needs a moment for its controllers; the fake one none
SECONDS = 60.0 if REAL else 5.0

DEFINITION: Object = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": f"widgets.{GROUP}"},
    "spec": {
        "group": GROUP,
        "scope": "Namespaced",
        "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "shortNames": ["rgw"]},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {
                    "status": {},
                    "scale": {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"},
                },
                "additionalPrinterColumns": [
                    {"name": "Color", "type": "string", "jsonPath": ".spec.color"},
                    {"name": "Ready", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].status'},
                ],
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "required": ["spec"],
                        "properties": {
                            "spec": {
                                "type": "object",
                                "x-kubernetes-validations": [
                                    {
                                        "rule": "self.color != 'red' || self.replicas <= 1",
                                        "message": "red comes alone",
                                        "fieldPath": ".replicas",
                                    },
                                    {"rule": "self.color == oldSelf.color", "message": "color is immutable"},
                                ],
                                "properties": {
                                    "color": {"type": "string", "enum": ["red", "green"], "default": "green"},
                                    "replicas": {"type": "integer", "minimum": 0, "default": 1},
                                    "size": {
                                        "type": "string",
                                        "maxLength": 16,
                                        "x-kubernetes-validations": [
                                            {"rule": "isQuantity(self)", "message": "must be a quantity"}
                                        ],
                                    },
                                    "hosts": {
                                        "type": "array",
                                        "maxItems": 4,
                                        "x-kubernetes-list-type": "set",
                                        "items": {"type": "string", "maxLength": 64, "pattern": "^[a-z.]+$"},
                                    },
                                },
                            },
                            "status": {
                                "type": "object",
                                "properties": {
                                    "replicas": {"type": "integer"},
                                    "conditions": {
                                        "type": "array",
                                        "x-kubernetes-list-type": "map",
                                        "x-kubernetes-list-map-keys": ["type"],
                                        "items": {
                                            "type": "object",
                                            "required": ["type", "status"],
                                            "properties": {
                                                "type": {"type": "string"},
                                                "status": {"type": "string"},
                                            },
                                        },
                                    },
                                },
                            },
                        },
                    }
                },
            }
        ],
    },
}


@pytest.fixture(scope="module")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if REAL:
        yield Path(REAL)
        return
    with Cluster(bookmark_seconds=0.1) as cluster:
        yield cluster.kubeconfig(tmp_path_factory.mktemp("cluster"))


@pytest.fixture
async def api(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KubernetesClient]:
    # resource_of() knows what we use, and here a Widget too
    monkeypatch.setitem(kubernetes._KNOWN, (WIDGETS.api_version, WIDGETS.kind), WIDGETS)
    client = await KubernetesClient.connect(str(kubeconfig))
    yield client
    await client.close()


@pytest.fixture
async def namespace(api: KubernetesClient) -> AsyncIterator[str]:
    name = f"redisgate-conformance-{uuid.uuid4().hex[:8]}"
    await api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    await api.delete(NAMESPACES, name)


@pytest.fixture
async def widgets(api: KubernetesClient, namespace: str) -> AsyncIterator[Resource]:
    await api.apply(DEFINITION, field_manager="test", force=True)

    async def served() -> bool:
        try:
            await api.list_all(WIDGETS, namespace)
        except NotFound:
            return False
        return True

    await eventually(served)
    yield WIDGETS
    for item in await api.list_all(WIDGETS, namespace):
        await api.delete(WIDGETS, item["metadata"]["name"], namespace)
    if REAL:
        await api.delete(CUSTOM_RESOURCES, DEFINITION["metadata"]["name"])
        await eventually(lambda: missing(api, CUSTOM_RESOURCES, DEFINITION["metadata"]["name"]))


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await condition():  # noqa: ASYNC110  there is nothing to be told by
            await asyncio.sleep(0.02)


async def missing(api: KubernetesClient, resource: Resource, name: str, namespace: str | None = None) -> bool:
    try:
        await api.get(resource, name, namespace)
    except NotFound:
        return True
    return False


def config_map(namespace: str, name: str, data: dict[str, str] | None = None, **metadata: Any) -> Object:
    metadata = {"name": name, "namespace": namespace} | metadata
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data or {}}


def widget(namespace: str, name: str, spec: Object | None = None, **metadata: Any) -> Object:
    metadata = {"name": name, "namespace": namespace} | metadata
    return {"apiVersion": WIDGETS.api_version, "kind": "Widget", "metadata": metadata, "spec": spec or {}}


def owned_by(owner: Object, **more: Any) -> list[Object]:
    metadata = owner["metadata"]
    reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"]}
    return [reference | {"name": metadata["name"], "uid": metadata["uid"]} | more]


# Reading


async def test_pages_of_a_list_show_one_moment(
    api: KubernetesClient, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(5):
        await api.create(config_map(namespace, f"page-{index}", labels={"of": "pages"}))
    monkeypatch.setattr(kubernetes, "PAGE", 2)
    names, versions = [], set()
    async for items, version in api.pages(CONFIG_MAPS, namespace, labels="of=pages"):
        if not names:
            await api.create(config_map(namespace, "page-3a", labels={"of": "pages"}))
            await api.delete(CONFIG_MAPS, "page-4", namespace)
        assert len(items) <= 2
        names += [item["metadata"]["name"] for item in items]
        versions.add(version)
    assert names == [f"page-{index}" for index in range(5)]
    assert len(versions) == 1


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ("color=red", ["a"]),
        ("color==red", ["a"]),
        ("color!=red", ["b", "c"]),
        ("color in (red,blue)", ["a", "b"]),
        ("color notin (red,blue),kind=x", ["c"]),
        ("color", ["a", "b"]),
        ("!color,kind=x", ["c"]),
        ("color,size=1", ["b"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_label_selectors(api: KubernetesClient, namespace: str, labels: str, names: list[str]) -> None:
    for name, its in {
        "a": {"color": "red", "kind": "x"},
        "b": {"color": "blue", "size": "1", "kind": "x"},
        "c": {"kind": "x"},
    }.items():
        await api.create(config_map(namespace, name, labels=its))
    found = [item["metadata"]["name"] for item in await api.list_all(CONFIG_MAPS, namespace, labels=labels)]
    assert [name for name in found if name != "kube-root-ca.crt"] == names


async def test_a_field_selector_finds_one_by_name(api: KubernetesClient, namespace: str) -> None:
    for name in ("a", "b"):
        await api.create(config_map(namespace, name))
    found = await api.list_all(CONFIG_MAPS, namespace, fields="metadata.name=b")
    assert [item["metadata"]["name"] for item in found] == ["b"]


async def test_a_watch_goes_on_from_a_version_and_ends_an_object_that_leaves_its_selector(
    api: KubernetesClient, namespace: str
) -> None:
    first = await api.create(config_map(namespace, "a", labels={"seen": "yes"}))
    version = first["metadata"]["resourceVersion"]
    await api.create(config_map(namespace, "b", labels={"seen": "yes"}))
    await api.merge(CONFIG_MAPS, "b", namespace, {"data": {"x": "1"}})
    await api.merge(CONFIG_MAPS, "b", namespace, {"metadata": {"labels": {"seen": "no"}}})
    await api.merge(CONFIG_MAPS, "b", namespace, {"metadata": {"labels": {"seen": "yes"}}})
    await api.delete(CONFIG_MAPS, "a", namespace)
    seen: list[tuple[str, str]] = []
    async with asyncio.timeout(SECONDS):
        async for kind, item in api.watch(
            CONFIG_MAPS, namespace, version, labels="seen=yes", seconds=30, silence=SECONDS
        ):
            if kind != "BOOKMARK":
                seen.append((kind, item["metadata"]["name"]))
            if len(seen) == 5:
                break
    assert seen == [("ADDED", "b"), ("MODIFIED", "b"), ("DELETED", "b"), ("ADDED", "b"), ("DELETED", "a")]


async def test_a_watch_brings_bookmarks_with_the_newest_version(api: KubernetesClient, namespace: str) -> None:
    made = await api.create(config_map(namespace, "a"))
    version = made["metadata"]["resourceVersion"]
    async with asyncio.timeout(120 if REAL else 5):
        async for kind, item in api.watch(CONFIG_MAPS, namespace, version, seconds=110, silence=115):
            if kind == "BOOKMARK":
                assert int(item["metadata"]["resourceVersion"]) >= int(version)
                return
    raise AssertionError("the watch ended without a bookmark")


async def test_a_watch_from_the_distant_past_is_gone(api: KubernetesClient, namespace: str) -> None:
    with pytest.raises(Gone):
        async for _ in api.watch(CONFIG_MAPS, namespace, "1", seconds=5, silence=10):
            pass


async def test_a_watch_ends_after_the_time_that_was_asked_for(api: KubernetesClient, namespace: str) -> None:
    made = await api.create(config_map(namespace, "a"))
    async with asyncio.timeout(SECONDS):
        async for _ in api.watch(CONFIG_MAPS, namespace, made["metadata"]["resourceVersion"], seconds=1, silence=30):
            pass


# Writing


async def test_what_is_not_there_and_what_is_there_already(api: KubernetesClient, namespace: str) -> None:
    with pytest.raises(NotFound, match='configmaps "a" not found'):
        await api.get(CONFIG_MAPS, "a", namespace)
    await api.create(config_map(namespace, "a"))
    with pytest.raises(AlreadyExists, match='configmaps "a" already exists'):
        await api.create(config_map(namespace, "a"))
    with pytest.raises(NotFound, match="namespaces"):
        await api.create(config_map("redisgate-conformance-nowhere", "a"))


async def test_a_stale_version_is_a_conflict(api: KubernetesClient, namespace: str) -> None:
    old = await api.create(config_map(namespace, "a", {"x": "1"}))
    await api.replace(old | {"data": {"x": "2"}})
    with pytest.raises(Conflict, match="modified"):
        await api.replace(old | {"data": {"x": "3"}})
    assert (await api.get(CONFIG_MAPS, "a", namespace))["data"] == {"x": "2"}


async def test_a_merge_patch_removes_with_null_and_replaces_lists(
    api: KubernetesClient, namespace: str, widgets: Resource
) -> None:
    await api.create(widget(namespace, "a", {"hosts": ["a", "b"], "size": "1Gi"}))
    after = await api.merge(widgets, "a", namespace, {"spec": {"hosts": ["c"], "size": None}})
    assert after["spec"] == {"color": "green", "replicas": 1, "hosts": ["c"]}


async def test_a_json_patch_tests_before_it_writes(api: KubernetesClient, namespace: str) -> None:
    await api.create(config_map(namespace, "a", {"x": "1"}))
    path = CONFIG_MAPS.path(namespace, "a")

    async def patch(wanted: str) -> Object:
        steps = [
            {"op": "test", "path": "/data/x", "value": wanted},
            {"op": "replace", "path": "/data/x", "value": "2"},
        ]
        return await api.call("PATCH", path, body=steps, content_type="application/json-patch+json")

    with pytest.raises(Invalid):
        await patch("9")
    assert (await patch("1"))["data"] == {"x": "2"}


async def test_secrets_take_text_and_keep_their_type(api: KubernetesClient, namespace: str) -> None:
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s", "namespace": namespace},
        "stringData": {"password": "öl"},
    }
    made = await api.create(secret)
    assert made["data"] == {"password": "w7Zs"}
    assert "stringData" not in made
    with pytest.raises(Invalid, match="immutable"):
        await api.merge(SECRETS, "s", namespace, {"type": "redisgate.io/route"})


async def test_generation_counts_changes_of_the_spec_only(
    api: KubernetesClient, namespace: str, widgets: Resource
) -> None:
    made = await api.create(widget(namespace, "a") | {"status": {"replicas": 7}})
    assert made["metadata"]["generation"] == 1
    assert "status" not in made
    path = widgets.path(namespace, "a", "status")
    body = {"spec": {"replicas": 5}, "status": {"replicas": 1}}
    after = await api.call("PATCH", path, body=body, content_type="application/merge-patch+json")
    assert (after["spec"]["replicas"], after["status"]["replicas"]) == (1, 1)
    after = await api.merge(widgets, "a", namespace, {"metadata": {"labels": {"x": "y"}}, "status": {"replicas": 9}})
    assert (after["metadata"]["generation"], after["status"]["replicas"]) == (1, 1)
    after = await api.merge(widgets, "a", namespace, {"spec": {"replicas": 2}})
    assert after["metadata"]["generation"] == 2


async def test_scale_is_a_subresource(api: KubernetesClient, namespace: str, widgets: Resource) -> None:
    await api.create(widget(namespace, "a"))
    path = widgets.path(namespace, "a", "scale")
    scale = await api.call("PATCH", path, body={"spec": {"replicas": 3}}, content_type="application/merge-patch+json")
    assert scale["kind"] == "Scale"
    assert (await api.get(widgets, "a", namespace))["spec"]["replicas"] == 3


async def test_a_change_that_changes_nothing_is_no_event(api: KubernetesClient, namespace: str) -> None:
    manifest = config_map(namespace, "a", {"x": "1"})
    first = await api.apply(manifest, field_manager="one")
    second = await api.apply(manifest, field_manager="one")
    third = await api.merge(CONFIG_MAPS, "a", namespace, {"data": {"x": "1"}}, field_manager="two")
    versions = {item["metadata"]["resourceVersion"] for item in (first, second, third)}
    assert len(versions) == 1


# Server-side apply


async def test_apply_makes_merges_and_removes_what_it_no_longer_states(api: KubernetesClient, namespace: str) -> None:
    await api.apply(config_map(namespace, "a", {"x": "1", "y": "1"}), field_manager="one")
    await api.apply(config_map(namespace, "a", {"z": "1"}), field_manager="two")
    after = await api.apply(config_map(namespace, "a", {"x": "2"}), field_manager="one")
    assert after["data"] == {"x": "2", "z": "1"}


async def test_apply_on_a_field_of_another_manager_is_a_conflict_that_names_both(
    api: KubernetesClient, namespace: str
) -> None:
    await api.apply(config_map(namespace, "a", {"x": "1"}), field_manager="one")
    with pytest.raises(Conflict, match=r'conflict with "one".*\.data\.x') as refused:
        await api.apply(config_map(namespace, "a", {"x": "2"}), field_manager="two")
    assert [cause["field"] for cause in refused.value.details["causes"]] == [".data.x"]
    after = await api.apply(config_map(namespace, "a", {"x": "2"}), field_manager="two", force=True)
    assert after["data"] == {"x": "2"}
    # it is two's now: that one leaves it out removes nothing
    after = await api.apply(config_map(namespace, "a"), field_manager="one")
    assert after["data"] == {"x": "2"}


async def test_a_field_that_two_state_alike_stays_until_both_let_go(api: KubernetesClient, namespace: str) -> None:
    for manager in ("one", "two"):
        await api.apply(config_map(namespace, "a", {"x": "1", manager: "1"}), field_manager=manager)
    after = await api.apply(config_map(namespace, "a", {"one": "1"}), field_manager="one")
    assert after["data"] == {"x": "1", "one": "1", "two": "1"}
    after = await api.apply(config_map(namespace, "a", {"two": "1"}), field_manager="two")
    assert after["data"] == {"one": "1", "two": "1"}


async def test_an_edit_takes_a_field_over_from_who_applied_it(api: KubernetesClient, namespace: str) -> None:
    await api.apply(config_map(namespace, "a", {"x": "1"}), field_manager="one")
    await api.merge(CONFIG_MAPS, "a", namespace, {"data": {"x": "2"}}, field_manager="by-hand")
    with pytest.raises(Conflict, match="by-hand"):
        await api.apply(config_map(namespace, "a", {"x": "1"}), field_manager="one")


async def test_conditions_of_two_managers_stand_side_by_side(
    api: KubernetesClient, namespace: str, widgets: Resource
) -> None:
    await api.create(widget(namespace, "a"))

    async def state(manager: str, **conditions: str) -> list[Object]:
        listed = [{"type": kind, "status": status} for kind, status in conditions.items()]
        manifest = widget(namespace, "a") | {"status": {"conditions": listed}}
        del manifest["spec"]
        after = await api.apply(manifest, field_manager=manager, subresource="status")
        return sorted(after["status"]["conditions"], key=lambda condition: str(condition["type"]))

    await state("operator", Ready="False", Old="True")
    await state("gateway", Routed="True")
    assert await state("operator", Ready="True") == [
        {"type": "Ready", "status": "True"},
        {"type": "Routed", "status": "True"},
    ]


async def test_containers_are_merged_by_their_name(api: KubernetesClient, namespace: str) -> None:
    def stateful_set(container: Object, **spec: Any) -> Object:
        labels = {"app": "a"}
        return {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": "a", "namespace": namespace},
            "spec": {
                "replicas": 0,
                "serviceName": "a",
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
            }
            | spec,
        }

    await api.apply(stateful_set({"name": "redis", "image": "redis:7"}), field_manager="one")
    after = await api.apply(stateful_set({"name": "exporter", "image": "exporter:1"}), field_manager="two")
    assert {c["name"] for c in after["spec"]["template"]["spec"]["containers"]} == {"redis", "exporter"}
    claim = {
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    with pytest.raises(Invalid, match="updates to statefulset spec for fields other than"):
        await api.apply(
            stateful_set({"name": "redis", "image": "redis:7"}, volumeClaimTemplates=[claim]), field_manager="one"
        )


async def test_apply_is_held_to_the_uid_that_it_names(api: KubernetesClient, namespace: str) -> None:
    wrong = config_map(namespace, "a", {"x": "1"}, uid="11111111-2222-3333-4444-555555555555")
    with pytest.raises(Conflict, match="uid mismatch"):
        await api.apply(wrong, field_manager="one", force=True)
    assert await missing(api, CONFIG_MAPS, "a", namespace)
    made = await api.apply(config_map(namespace, "a", {"x": "0"}), field_manager="one")
    with pytest.raises(Conflict):
        await api.apply(wrong, field_manager="one", force=True)
    right = config_map(namespace, "a", {"x": "1"}, uid=made["metadata"]["uid"])
    assert (await api.apply(right, field_manager="one"))["data"] == {"x": "1"}


# Deleting


async def test_a_finalizer_holds_what_is_deleted(api: KubernetesClient, namespace: str) -> None:
    await api.create(config_map(namespace, "a", finalizers=["redisgate.io/test"]))
    await api.delete(CONFIG_MAPS, "a", namespace)
    held = await api.get(CONFIG_MAPS, "a", namespace)
    assert held["metadata"]["deletionTimestamp"]
    await api.merge(CONFIG_MAPS, "a", namespace, {"metadata": {"finalizers": None}})
    assert await missing(api, CONFIG_MAPS, "a", namespace)


async def test_delete_is_held_to_the_uid_that_it_names(api: KubernetesClient, namespace: str) -> None:
    made = await api.create(config_map(namespace, "a"))
    with pytest.raises(Conflict, match=r"[Pp]recondition"):
        await api.delete(CONFIG_MAPS, "a", namespace, uid="11111111-2222-3333-4444-555555555555")
    await api.delete(CONFIG_MAPS, "a", namespace, uid=made["metadata"]["uid"])
    assert await missing(api, CONFIG_MAPS, "a", namespace)


async def test_dependents_go_with_the_last_of_their_owners(api: KubernetesClient, namespace: str) -> None:
    owners = [await api.create(config_map(namespace, name)) for name in ("owner", "other")]
    await api.create(config_map(namespace, "child", ownerReferences=owned_by(owners[0])))
    both = owned_by(owners[0]) + owned_by(owners[1])
    await api.create(config_map(namespace, "shared", ownerReferences=both))
    await api.delete(CONFIG_MAPS, "owner", namespace)
    await eventually(lambda: missing(api, CONFIG_MAPS, "child", namespace))
    assert not await missing(api, CONFIG_MAPS, "shared", namespace)
    await api.delete(CONFIG_MAPS, "other", namespace)
    await eventually(lambda: missing(api, CONFIG_MAPS, "shared", namespace))


async def test_an_owner_in_another_namespace_does_not_count(api: KubernetesClient, namespace: str) -> None:
    """The dependent is collected while its owner lives: what lives elsewhere needs labels and a finalizer."""
    other = await api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace + "-b"}})
    try:
        owner = await api.create(config_map(namespace, "owner"))
        await api.create(config_map(other["metadata"]["name"], "child", ownerReferences=owned_by(owner)))
        await eventually(lambda: missing(api, CONFIG_MAPS, "child", other["metadata"]["name"]))
        assert not await missing(api, CONFIG_MAPS, "owner", namespace)
    finally:
        await api.delete(NAMESPACES, other["metadata"]["name"])


async def test_an_owner_of_an_earlier_life_does_not_count(api: KubernetesClient, namespace: str) -> None:
    first = await api.create(config_map(namespace, "owner"))
    await api.delete(CONFIG_MAPS, "owner", namespace)
    await api.create(config_map(namespace, "owner"))
    await api.create(config_map(namespace, "child", ownerReferences=owned_by(first)))
    await eventually(lambda: missing(api, CONFIG_MAPS, "child", namespace))


async def test_dependents_that_are_orphaned_stay_without_an_owner(api: KubernetesClient, namespace: str) -> None:
    owner = await api.create(config_map(namespace, "owner"))
    await api.create(config_map(namespace, "child", ownerReferences=owned_by(owner)))
    await api.delete(CONFIG_MAPS, "owner", namespace, propagation="Orphan")
    await eventually(lambda: missing(api, CONFIG_MAPS, "owner", namespace))
    child = await api.get(CONFIG_MAPS, "child", namespace)
    assert "ownerReferences" not in child["metadata"]


async def test_in_the_foreground_an_owner_waits_for_its_dependents(api: KubernetesClient, namespace: str) -> None:
    owner = await api.create(config_map(namespace, "owner"))
    references = owned_by(owner, blockOwnerDeletion=True)
    await api.create(config_map(namespace, "child", ownerReferences=references, finalizers=["redisgate.io/test"]))
    await api.delete(CONFIG_MAPS, "owner", namespace, propagation="Foreground")

    async def child_is_asked_to_go() -> bool:
        child = await api.get(CONFIG_MAPS, "child", namespace)
        return "deletionTimestamp" in child["metadata"]

    await eventually(child_is_asked_to_go)
    assert not await missing(api, CONFIG_MAPS, "owner", namespace)
    await api.merge(CONFIG_MAPS, "child", namespace, {"metadata": {"finalizers": None}})
    await eventually(lambda: missing(api, CONFIG_MAPS, "owner", namespace))


async def test_a_namespace_takes_everything_with_it(api: KubernetesClient, namespace: str) -> None:
    name = namespace + "-b"
    await api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    await api.create(config_map(name, "held", finalizers=["redisgate.io/test"]))
    await api.create(config_map(name, "free"))
    await api.delete(NAMESPACES, name)
    await eventually(lambda: missing(api, CONFIG_MAPS, "free", name))
    assert (await api.get(NAMESPACES, name))["status"]["phase"] == "Terminating"
    with pytest.raises(Forbidden, match="is being terminated"):
        await api.create(config_map(name, "late"))
    await api.merge(CONFIG_MAPS, "held", name, {"metadata": {"finalizers": None}})
    await eventually(lambda: missing(api, NAMESPACES, name))


# Custom resources


async def test_defaults_are_filled_in_and_unknown_fields_are_dropped(
    api: KubernetesClient, namespace: str, widgets: Resource
) -> None:
    made = await api.create(widget(namespace, "a", {"unknown": 1, "replicas": 2}))
    assert made["spec"] == {"color": "green", "replicas": 2}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"color": "blue"}, r'spec\.color: Unsupported value: "blue": supported values: "red", "green"'),
        ({"replicas": -1}, r"spec\.replicas: Invalid value: -1: .* should be greater than or equal to 0"),
        ({"replicas": "2"}, r"spec\.replicas: Invalid value: .*must be of type integer"),
        ({"size": "much"}, r'spec\.size: Invalid value: "?\w+"?: must be a quantity'),
        ({"size": "1" * 17}, r"spec\.size: Too long"),
        ({"hosts": ["A"]}, r"spec\.hosts\[0\]: Invalid value: .* should match"),
        ({"hosts": ["a", "a"]}, r"spec\.hosts\[1\]: Duplicate value"),
        ({"hosts": ["a", "b", "c", "d", "e"]}, r"spec\.hosts: Too many: 5: must have at most 4 items"),
        ({"color": "red", "replicas": 2}, r"spec\.replicas: Invalid value: .*: red comes alone"),
    ],
    ids=["enum", "minimum", "type", "rule", "length", "pattern", "set", "items", "rule-of-the-whole"],
)
async def test_what_a_schema_refuses_names_the_field(
    api: KubernetesClient, namespace: str, widgets: Resource, spec: Object, message: str
) -> None:
    with pytest.raises(Invalid, match=message):
        await api.create(widget(namespace, "a", spec))


async def test_a_rule_about_changes_holds_for_each_way_to_write(
    api: KubernetesClient, namespace: str, widgets: Resource
) -> None:
    made = await api.create(widget(namespace, "a"))
    changed = widget(namespace, "a", {"color": "red"})
    with pytest.raises(Invalid, match="color is immutable"):
        await api.merge(widgets, "a", namespace, {"spec": {"color": "red"}})
    with pytest.raises(Invalid, match="color is immutable"):
        await api.apply(changed, field_manager="one", force=True)
    with pytest.raises(Invalid, match="color is immutable"):
        await api.replace(made | {"spec": {"color": "red"}})


async def test_a_policy_can_refuse_to_delete(api: KubernetesClient, namespace: str, widgets: Resource) -> None:
    name = namespace
    rule = {"apiGroups": [GROUP], "apiVersions": ["*"], "operations": ["DELETE"], "resources": ["widgets"]}
    policy = {
        "apiVersion": ADMISSION_POLICIES.api_version,
        "kind": ADMISSION_POLICIES.kind,
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [
                {
                    "expression": "!has(oldObject.metadata.labels) || !('keep' in oldObject.metadata.labels)",
                    "message": "remove the label keep first",
                }
            ],
        },
    }
    binding = {
        "apiVersion": ADMISSION_BINDINGS.api_version,
        "kind": ADMISSION_BINDINGS.kind,
        "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"]},
    }
    await api.create(policy)
    await api.create(binding)
    try:

        async def refused() -> bool:  # a real server takes a second to notice a policy
            await api.apply(widget(namespace, "a", labels={"keep": "yes"}), field_manager="one")
            try:
                await api.delete(widgets, "a", namespace)
            except Invalid as error:
                return "remove the label keep first" in str(error)
            return False

        await eventually(refused)
        await api.merge(widgets, "a", namespace, {"metadata": {"labels": {"keep": None}}})
        await api.delete(widgets, "a", namespace)
    finally:
        await api.delete(ADMISSION_BINDINGS, name)
        await api.delete(ADMISSION_POLICIES, name)


# Who may do what


async def as_service_account(
    api: KubernetesClient, kubeconfig: Path, directory: Path, namespace: str, name: str
) -> KubernetesClient:
    await api.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}})
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    answer = await api.call("POST", SERVICE_ACCOUNTS.path(namespace, name, "token"), body=request)
    config = yaml.safe_load(await asyncio.to_thread(kubeconfig.read_text))
    context = next(c["context"] for c in config["contexts"] if c["name"] == config["current-context"])
    cluster = next(c for c in config["clusters"] if c["name"] == context["cluster"])
    config |= {
        "clusters": [cluster],
        "users": [{"name": name, "user": {"token": answer["status"]["token"]}}],
        "contexts": [{"name": name, "context": {"cluster": cluster["name"], "user": name}}],
        "current-context": name,
    }
    path = directory / name
    await asyncio.to_thread(path.write_text, yaml.safe_dump(config))
    return await KubernetesClient.connect(str(path))


async def test_a_service_account_may_do_what_its_role_says_and_no_more(
    api: KubernetesClient, kubeconfig: Path, tmp_path: Path, namespace: str
) -> None:
    rules = [
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "patch"]},
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"], "resourceNames": ["mine"]},
        {"apiGroups": ["apps"], "resources": ["statefulsets/status"], "verbs": ["patch"]},
    ]
    metadata = {"name": "reader", "namespace": namespace}
    await api.create({"apiVersion": ROLES.api_version, "kind": "Role", "metadata": metadata, "rules": rules})
    await api.create(
        {
            "apiVersion": ROLE_BINDINGS.api_version,
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
            "subjects": [{"kind": "ServiceAccount", "name": "reader", "namespace": namespace}],
        }
    )
    await api.create(config_map(namespace, "a", {"x": "1"}))
    reader = await as_service_account(api, kubeconfig, tmp_path, namespace, "reader")
    try:

        async def bound() -> bool:
            try:
                await reader.get(CONFIG_MAPS, "a", namespace)
            except Forbidden:
                return False
            return True

        await eventually(bound)
        await reader.list_all(CONFIG_MAPS, namespace)
        await reader.apply(config_map(namespace, "a", {"y": "1"}), field_manager="reader")
        with pytest.raises(Forbidden, match='cannot create resource "configmaps"'):  # an apply that would make it
            await reader.apply(config_map(namespace, "b"), field_manager="reader")
        with pytest.raises(Forbidden, match="cannot delete"):
            await reader.delete(CONFIG_MAPS, "a", namespace)
        with pytest.raises(Forbidden, match="cannot watch"):
            async for _ in reader.watch(CONFIG_MAPS, namespace, "", seconds=1, silence=5):
                pass
        with pytest.raises(NotFound):
            await reader.get(SECRETS, "mine", namespace)
        with pytest.raises(Forbidden, match=f'cannot get resource "secrets" .*in the namespace "{namespace}"'):
            await reader.get(SECRETS, "other", namespace)
        with pytest.raises(Forbidden, match="cannot list"):
            await reader.list_all(SECRETS, namespace)
        with pytest.raises(Forbidden, match="at the cluster scope"):
            await reader.list_all(CONFIG_MAPS)
        with pytest.raises(NotFound):
            await reader.merge(STATEFUL_SETS, "a", namespace, {"status": {}}, subresource="status")
        with pytest.raises(Forbidden):
            await reader.merge(STATEFUL_SETS, "a", namespace, {"spec": {}})
        with pytest.raises(Forbidden):
            await reader.list_all(PODS, namespace)
    finally:
        await reader.close()


# kubectl


async def test_kubectl_applies_shows_and_deletes(
    api: KubernetesClient, kubeconfig: Path, tmp_path: Path, namespace: str, widgets: Resource
) -> None:
    if shutil.which("kubectl") is None:
        pytest.fail("kubectl is not installed; Debian, Ubuntu: apt-get install kubernetes-client")

    async def kubectl(*arguments: str, expect: int = 0, stdin: str = "") -> str:
        done = await asyncio.to_thread(
            subprocess.run,
            ["kubectl", "--kubeconfig", str(kubeconfig), "--cache-dir", str(tmp_path / "cache"), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=SECONDS + 15,
            check=False,
        )
        assert done.returncode == expect, done.stderr
        return done.stdout + done.stderr

    manifest = yaml.safe_dump(widget(namespace, "a", {"replicas": 2}))
    assert "created" in await kubectl("apply", "-f", "-", stdin=manifest)
    assert "unchanged" in await kubectl("apply", "-f", "-", stdin=manifest)
    changed = yaml.safe_dump(widget(namespace, "a", {"color": "green"}))
    assert "configured" in await kubectl("apply", "-f", "-", stdin=changed)
    assert (await api.get(widgets, "a", namespace))["spec"]["replicas"] == 1
    header, row = (await kubectl("get", "rgw", "-n", namespace)).splitlines()
    assert header.split() == ["NAME", "COLOR", "READY"]
    assert row.split() == ["a", "green"]
    typo = yaml.safe_dump(widget(namespace, "b", {"colour": "red"}))
    assert 'unknown field "spec.colour"' in await kubectl("apply", "-f", "-", stdin=typo, expect=1)
    await kubectl("scale", "widget/a", "--replicas=3", "-n", namespace)
    shown = json.loads(await kubectl("get", "widget", "a", "-n", namespace, "-o", "json"))
    assert shown["spec"]["replicas"] == 3
    assert "deleted" in await kubectl("delete", "widget", "a", "-n", namespace)
    assert await missing(api, widgets, "a", namespace)
