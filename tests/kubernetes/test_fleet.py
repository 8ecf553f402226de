"""The control plane's instances in the cluster: what is written, what is taken over from it, who grows."""

import dataclasses
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import yaml

from control.app import make_context
from control.http import Context
from control.instances import spec_of
from control.kubernetes.client import NAMESPACES, KubernetesClient, KubernetesError
from control.kubernetes.fleet import Fleet, changes_in
from control.provisioners import ProvisionError, Spec
from control.provisioners import kubernetes as provisioner
from control.provisioners.kubernetes import (
    KubernetesProvisioner,
    manifest,
    max_memory_of,
    memory_of,
    place_of,
    quota_objects,
    volume_of,
)
from control.quotas import GIB, MIB, PLANS, Limits
from redisgate.config import ClusterSettings
from tests.control.conftest import Urls, make_settings, migrated, postgres_server  # noqa: F401
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.test_routes import start_cluster
from tests.servers import wait_for

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = Path(__file__).parents[2] / "k8s"
RBAC = Path(__file__).parents[2] / "deploy" / "rbac"
ORGANIZATION = UUID("11111111-2222-4333-8444-555555555555")


def make_spec(**changes: Any) -> Spec:
    spec = Spec(
        id=uuid4(),
        max_memory=96 * MIB,
        redis_version=None,
        persistence=True,
        backup=False,
        eviction="noeviction",
        user="gateway",
        password="pass-1",
        organization_id=ORGANIZATION,
        slug="cart",
        label="cart-abc234",
    )
    return dataclasses.replace(spec, **changes)


def written(spec: Spec, live: dict[str, Any] | None = None) -> dict[str, Any]:
    return manifest(spec, suspend=False, base_domain="redis.test", max_request_bytes=MIB, live=live)


@pytest.mark.parametrize("max_memory", [MIB, 3 * MIB + 1, 7 * MIB, 48 * MIB, 96 * MIB, 1000 * MIB + 17, 16 * GIB])
def test_the_share_of_the_pods_memory_is_the_data_that_was_asked_for(max_memory: int) -> None:
    pod, percent = memory_of(max_memory)
    assert 10 <= percent <= 75
    assert max_memory <= pod * percent // 100 <= max_memory + 1
    assert max_memory_of(written(make_spec(max_memory=max_memory))) in (max_memory, max_memory + 1)
    assert volume_of(max_memory) >= 3 * max_memory


@pytest.mark.parametrize("slug", ["cart", "1st", "a" * 50, "a-" * 20 + "b", "7" * 50])
def test_a_resources_name_follows_from_the_row_and_is_a_name(slug: str) -> None:
    spec = make_spec(slug=slug)
    name = place_of(spec).name
    assert name == place_of(spec).name
    assert len(name) <= 40
    assert name[0].isalpha()
    assert "--" not in name.removesuffix(spec.id.hex[:8])[-2:]
    assert name != place_of(make_spec(slug=slug)).name


def test_the_trigger_of_a_rotation_changes_with_the_password_and_tells_nothing_of_it() -> None:
    spec = make_spec()
    before = written(spec)["spec"]["auth"]["rotation"]["trigger"]
    rotating = dataclasses.replace(spec, next_password="pass-2")
    asked = written(rotating)["spec"]["auth"]["rotation"]["trigger"]
    done = written(dataclasses.replace(spec, password="pass-2"))["spec"]["auth"]["rotation"]["trigger"]
    assert before != asked == done
    assert "pass" not in str(written(rotating))


def test_a_volume_never_shrinks() -> None:
    live = written(make_spec(max_memory=GIB))
    live["metadata"]["uid"] = "u"
    smaller = written(make_spec(max_memory=96 * MIB), live)
    assert smaller["spec"]["persistence"] == {"size": str(3 * GIB)}
    assert smaller["metadata"]["uid"] == "u"


def row_of(spec: Spec, **changes: Any) -> dict[str, Any]:
    return {
        "max_memory": spec.max_memory,
        "eviction": spec.eviction,
        "redis_version_wanted": spec.redis_version,
        "desired_state": "running",
        **changes,
    }


def test_what_the_cluster_says_otherwise_is_taken_over_and_rounding_is_not() -> None:
    for max_memory in (MIB, 7 * MIB, 96 * MIB, 1000 * MIB + 17):
        spec = make_spec(max_memory=max_memory, redis_version="7.4")
        assert changes_in(written(spec), row_of(spec)) == {}  # type: ignore[arg-type]
    spec = make_spec(redis_version="7.4")
    live = written(spec)
    live["spec"]["resources"]["limits"]["memory"] = "256Mi"
    live["spec"]["memory"]["evictionPolicy"] = "allkeys-lru"
    live["spec"]["engine"]["version"] = "7.4.1"
    live["spec"]["suspend"] = True
    assert changes_in(live, row_of(spec)) == {  # type: ignore[arg-type]
        "max_memory": 192 * MIB,
        "eviction": "allkeys-lru",
        "redis_version_wanted": "7.4.1",
        "desired_state": "stopped",
    }


def test_a_namespaces_quota_has_room_for_what_the_plan_allows() -> None:
    for limits in PLANS.values():
        quota, defaults = quota_objects(ORGANIZATION, limits)
        hard = quota["spec"]["hard"]
        assert hard["count/redishttpinstances.redisgate.io"] == str(limits.max_instances)
        pod, _ = memory_of(limits.max_memory)
        assert int(hard["limits.memory"]) > 2 * pod
        assert int(hard["requests.storage"]) >= volume_of(limits.max_memory)
        assert defaults["kind"] == "LimitRange"


# With the cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = start_cluster()
    yield cluster
    cluster.stop()


@pytest.fixture
async def client(cluster: Cluster, tmp_path: Path) -> AsyncIterator[KubernetesClient]:
    client = await KubernetesClient.connect(str(cluster.kubeconfig(tmp_path)))
    yield client
    await client.close()


@pytest.fixture
def maker(client: KubernetesClient, monkeypatch: pytest.MonkeyPatch) -> KubernetesProvisioner:
    monkeypatch.setattr(provisioner, "READY_SECONDS", 0.3)
    monkeypatch.setattr(provisioner, "ROUTE_SECONDS", 0.1)

    async def limits(organization_id: UUID) -> Limits:
        return PLANS["free"]

    return KubernetesProvisioner(client, limits, base_domain="redis.test")


def set_conditions(cluster: Cluster, spec: Spec, **conditions: tuple[str, str, str]) -> None:
    place = place_of(spec)
    live = cluster.find("RedisHttpInstance", place.namespace, place.name)
    assert live is not None
    cluster.set_status(
        "RedisHttpInstance",
        place.namespace,
        place.name,
        {
            "version": "7.4.2",
            "conditions": [
                {
                    "type": name,
                    "status": status,
                    "reason": reason,
                    "message": message,
                    "observedGeneration": live["metadata"]["generation"],
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
                for name, (status, reason, message) in conditions.items()
            ],
        },
    )


async def test_without_an_operator_the_attempt_fails_and_says_so(
    cluster: Cluster, maker: KubernetesProvisioner
) -> None:
    spec = make_spec()
    with pytest.raises(ProvisionError, match="no operator has looked at it"):
        await maker.ensure(spec)
    await maker.destroy(spec)
    await maker.destroy(spec)  # again, as after a crash
    # At once another one: it waits until the namespace of the one before is gone.
    with pytest.raises(ProvisionError, match="no operator has looked at it"):
        await maker.ensure(make_spec())
    assert len(cluster.all("RedisHttpInstance", place_of(spec).namespace)) == 1


async def test_what_the_operator_says_is_what_the_owner_hears(cluster: Cluster, maker: KubernetesProvisioner) -> None:
    spec = make_spec(organization_id=uuid4())
    with pytest.raises(ProvisionError):
        await maker.ensure(spec)
    set_conditions(cluster, spec, Ready=("False", "ModeNotBuilt", "not built"))
    with pytest.raises(ProvisionError, match="ModeNotBuilt: not built") as refused:
        await maker.ensure(spec)
    assert refused.value.permanent
    set_conditions(cluster, spec, Ready=("True", "Ready", "."), Progressing=("False", "Settled", "."))
    found = await maker.ensure(spec)
    assert found.redis_version == "7.4.2"
    assert found.warning == "no gateway has said yet that it routes there"
    recorded = dataclasses.replace(spec, endpoint=found.endpoint)
    assert await maker.alive(recorded) is None
    set_conditions(cluster, spec, Ready=("False", "PodsNotReady", "0 of 1"))
    assert await maker.alive(recorded) == "PodsNotReady: 0 of 1"
    cluster.cut()
    assert await maker.alive(recorded) is None
    with pytest.raises(ProvisionError, match="the Kubernetes API"):
        await maker.ensure(recorded)
    cluster.heal()
    place = place_of(spec)
    cluster.delete("RedisHttpInstance", place.namespace, place.name)
    assert "no longer in the cluster" in str(await maker.alive(recorded))
    with pytest.raises(ProvisionError, match="deleted in the cluster"):
        await maker.ensure(recorded)
    await maker.destroy(recorded)


async def test_what_is_somebody_elses_is_neither_changed_nor_deleted(
    cluster: Cluster, maker: KubernetesProvisioner
) -> None:
    spec = make_spec(organization_id=uuid4())
    place = place_of(spec)
    cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": place.namespace}})
    with pytest.raises(ProvisionError, match="somebody else's") as refused:
        await maker.ensure(spec)
    assert refused.value.permanent
    theirs = written(make_spec())
    theirs["metadata"] = {"name": place.name, "namespace": place.namespace}
    cluster.create(theirs)
    for act in (maker.ensure, maker.alive):
        with pytest.raises(ProvisionError, match="somebody else's"):
            await act(spec)
    await maker.stop(spec)
    await maker.destroy(spec)
    live = cluster.find("RedisHttpInstance", place.namespace, place.name)
    assert live is not None
    assert not live["spec"]["suspend"]
    assert cluster.find("Namespace", "", place.namespace) is not None


async def test_a_protected_instance_is_not_deleted(cluster: Cluster, maker: KubernetesProvisioner) -> None:
    spec = make_spec(organization_id=uuid4())
    with pytest.raises(ProvisionError):
        await maker.ensure(spec)
    place = place_of(spec)
    for protected in (True, False):
        cluster.edit(
            "RedisHttpInstance",
            place.namespace,
            place.name,
            lambda item, value=protected: item["spec"].update(deletionProtection=value),
        )
        if protected:
            with pytest.raises(ProvisionError, match="deletionProtection"):
                await maker.destroy(spec)
    await maker.destroy(spec)
    assert cluster.find("RedisHttpInstance", place.namespace, place.name) is None


@pytest.mark.parametrize(
    "item",
    [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "data-retained", "labels": {"app.kubernetes.io/managed-by": "redisgate-operator"}},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "theirs"}, "data": {}},
    ],
    ids=["a retained volume", "a thing of others"],
)
async def test_a_namespace_with_more_in_it_than_its_last_instance_is_kept_and_says_why(
    cluster: Cluster, maker: KubernetesProvisioner, item: dict[str, Any]
) -> None:
    spec = make_spec(organization_id=uuid4())
    home = place_of(spec).namespace
    with pytest.raises(ProvisionError):
        await maker.ensure(spec)
    item = item | {"metadata": {"namespace": home, **item["metadata"]}}
    automatic = {"name": "kube-root-ca.crt", "namespace": home}
    for each in (item, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": automatic}):
        cluster.create(each)
    await maker.destroy(spec)
    assert cluster.all("RedisHttpInstance", home) == []
    assert cluster.find(item["kind"], home, item["metadata"]["name"]) is not None
    kept = cluster.find("Namespace", "", home)
    assert kept is not None
    assert kept["metadata"]["annotations"] == {"redisgate.io/kept-for": f"{item['kind']} {item['metadata']['name']}"}
    # With another instance it is a namespace like all others, and goes once there is nothing more in it.
    another = make_spec(organization_id=spec.organization_id)
    with pytest.raises(ProvisionError):
        await maker.ensure(another)
    used = cluster.find("Namespace", "", home)
    assert used is not None
    assert not used["metadata"].get("annotations")
    cluster.delete(item["kind"], home, item["metadata"]["name"])
    await maker.destroy(another)
    wait_for(lambda: cluster.find("Namespace", "", home) is None, what="the end of the namespace")


async def test_the_control_plane_changes_no_namespace_but_those_of_organizations(
    cluster: Cluster, tmp_path: Path
) -> None:
    for text in ("gateway", "control-plane"):
        for item in yaml.safe_load_all((RBAC / f"{text}.yaml").read_text()):
            cluster.create(item)
    token = cluster.service_account_token("redisgate", "redisgate-control-plane")
    client = await KubernetesClient.connect(str(cluster.kubeconfig(tmp_path, token)))

    def named(name: str) -> dict[str, Any]:
        return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"a": "b"}}}

    try:
        for name in ("shop", "redisgate", "redisgate-system", f"redisgate-{uuid4()}-more"):
            with pytest.raises(KubernetesError, match="namespaces of organizations only"):
                await client.apply(named(name), field_manager="theirs", force=True)
        for name in ("shop", "redisgate"):
            with pytest.raises(KubernetesError, match="namespaces of organizations only"):
                await client.delete(NAMESPACES, name)
        name = f"redisgate-{uuid4()}"
        await client.apply(named(name), field_manager="ours")
        await client.delete(NAMESPACES, name)
        assert cluster.find("Namespace", "", "shop") is not None
    finally:
        await client.close()


# With the database


@pytest.fixture(scope="module")
def database_urls(postgres_server: Any, migrated: str) -> Iterator[Urls]:  # noqa: F811
    name = postgres_server.create(template=migrated)
    yield postgres_server.urls(name)
    postgres_server.drop(name)


@pytest.fixture
async def context(database_urls: Urls, tmp_path: Path) -> AsyncIterator[Context]:
    settings = make_settings(database_urls, tmp_path)
    cluster = ClusterSettings(kubernetes="on", scale_memory_above=80, scale_memory_after=120.0)
    context = make_context(dataclasses.replace(settings, cluster=cluster), name="tests")
    yield context
    await context.close()


async def insert_instance(connection: Any, organization: UUID, instance: UUID, memory: int, room: int) -> None:
    """A running instance in an organization whose quota has `room` bytes."""
    await connection.execute(
        "INSERT INTO organizations (id, name, slug) VALUES ($1, 'n', $2)", organization, organization.hex
    )
    await connection.execute(
        "INSERT INTO quotas (organization_id, max_instances, max_memory, max_api_keys) VALUES ($1, 5, $2, 1)",
        organization,
        room,
    )
    await connection.execute(
        "INSERT INTO instances (id, organization_id, name, slug, label, provisioner, max_memory, status,"
        " observed_generation, provisioned_at, updated_at, token_digest, token_encrypted, readonly_token_digest,"
        " readonly_token_encrypted) VALUES ($1, $2, 'n', 'n', $3, 'kubernetes', $4, 'running', 1, now(),"
        " now() - interval '1 hour', $5, $5, $6, $6)",
        instance,
        organization,
        instance.hex,
        memory,
        instance.bytes * 2,
        uuid4().bytes * 2,
    )


@pytest.mark.parametrize(
    ("room", "more", "expected"),
    [
        (1024, {}, {"max_memory": 192 * MIB, "eviction": "noeviction", "generation": 2}),
        (100, {}, {"max_memory": 64 * MIB, "eviction": "noeviction", "generation": 1}),
        (100, {"evictionPolicy": "allkeys-lru"}, {"max_memory": 64 * MIB, "eviction": "allkeys-lru", "generation": 2}),
    ],
    ids=["with room", "without room", "without room, and another change"],
)
async def test_memory_that_was_changed_in_the_cluster_is_taken_over_as_far_as_the_quota_goes(
    context: Context,
    cluster: Cluster,
    maker: KubernetesProvisioner,
    room: int,
    more: dict[str, str],
    expected: dict[str, Any],
) -> None:
    organization, instance = uuid4(), uuid4()
    async with context.database.transaction() as connection:
        await insert_instance(connection, organization, instance, 64 * MIB, room * MIB)
    row = await context.database.fetchrow("SELECT * FROM instances WHERE id = $1", instance)
    assert row is not None
    spec = spec_of(row, context.encryption)
    with pytest.raises(ProvisionError):
        await maker.ensure(spec)
    place = place_of(spec)

    def change(item: dict[str, Any]) -> None:
        item["spec"]["resources"]["limits"]["memory"] = "256Mi"
        item["spec"]["memory"].update(more)

    cluster.edit("RedisHttpInstance", place.namespace, place.name, change)
    fleet = Fleet(context, lambda instance_id: None)
    fleet._provisioner = maker
    await fleet._compare(instance)
    row = await context.database.fetchrow("SELECT * FROM instances WHERE id = $1", instance)
    assert row is not None
    assert {name: row[name] for name in expected} == expected
    if room == 100:
        assert "is put back, over the quota: 0 MiB of 100 MiB" in row["status_reason"]
    if expected["generation"] == 1:
        live = cluster.find("RedisHttpInstance", place.namespace, place.name)
        assert live is not None
        assert max_memory_of(live) in (64 * MIB, 64 * MIB + 1)


@pytest.mark.parametrize(
    ("samples", "room", "grown"),
    [([81, 90, 95], 1024, True), ([81, 79, 95], 1024, False), ([95], 1024, False), ([81, 90, 95], 100, False)],
    ids=["stays full", "once below", "too few samples", "no room in the quota"],
)
async def test_an_instance_that_stays_nearly_full_grows_where_its_quota_has_room(
    context: Context, samples: list[int], room: int, grown: bool
) -> None:
    organization, instance = uuid4(), uuid4()
    memory = 64 * MIB
    async with context.database.transaction() as connection:
        await insert_instance(connection, organization, instance, memory, room * MIB if room > 100 else memory)
        now = datetime.now(UTC).replace(second=0, microsecond=0)
        context.clock = (now + timedelta(seconds=30)).timestamp
        for minutes, percent in enumerate(samples):
            await connection.execute(
                "INSERT INTO instance_samples (instance_id, at, keys, memory, connections) VALUES ($1, $2, 1, $3, 1)",
                instance,
                now - timedelta(minutes=minutes),
                memory * percent // 100,
            )
    await Fleet(context, lambda instance_id: None)._scale()
    row = await context.database.fetchrow("SELECT * FROM instances WHERE id = $1", instance)
    assert row is not None
    assert row["max_memory"] == (96 * MIB if grown else memory)
    assert (row["status"], row["generation"]) == (("updating", 2) if grown else ("running", 1))
    if room == 100:
        assert "no room to grow" in row["status_reason"]


# What is in k8s/


def test_the_autoscaler_the_service_and_the_operator_name_what_there_is() -> None:
    documents = [
        document for path in sorted(MANIFESTS.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
    ]
    found = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    scaler = found["HorizontalPodAutoscaler", "redisgate-gateway"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == "redisgate-gateway"
    gateway = found["Deployment", "redisgate-gateway"]["spec"]
    assert "replicas" not in gateway  # it is the autoscaler's
    service = found["Service", "redisgate-gateway"]["spec"]
    assert service["selector"].items() <= gateway["template"]["metadata"]["labels"].items()
    deployments = [name for kind, name in found if kind == "Deployment"]
    assert sorted(deployments) == ["redisgate-gateway", "redisgate-operator"]
    for name in deployments:
        account = found["Deployment", name]["spec"]["template"]["spec"]["serviceAccountName"]
        assert ("ServiceAccount", account) in found


def test_no_secret_is_in_what_is_deployed() -> None:
    for path in MANIFESTS.glob("*.yaml"):
        assert "kind: Secret\n" not in path.read_text(), path
