"""What a RedisHttpInstance may say: each rule with what it lets through and what it refuses, and how."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from control.kubernetes.commands import manifests
from control.kubernetes.spec import Spec, SpecError, quantity, read_instance, seconds
from tests.kubernetes.cluster import Cluster, Refused

S3 = {"bucket": "backups", "credentialsSecret": "s3"}
BACKUP = {"schedule": "0 3 * * *", "s3": S3}
BOOTSTRAP = {"fromBackup": "a.rdb", "s3": S3}
DISK = {"size": "1Gi"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        for manifest in yaml.safe_load_all(manifests()):
            cluster.create(manifest)
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})
        yield cluster


def resource(name: str = "cache", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "redisgate.io/v1",
        "kind": "RedisHttpInstance",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"mode": "Standalone"} | spec,
    }


@pytest.fixture
def make(cluster: Cluster) -> Iterator[Any]:
    made = []

    def create(name: str = "cache", **spec: Any) -> dict[str, Any]:
        item = cluster.create(resource(name, **spec))
        made.append(name)
        return item

    yield create
    for name in made:
        cluster.edit("RedisHttpInstance", "shop", name, lambda item: item["spec"].update(deletionProtection=False))
        cluster.delete("RedisHttpInstance", "shop", name)


GOOD: dict[str, dict[str, Any]] = {
    "nothing but the mode": {},
    "suspended": {"replicas": 0},
    "sentinel": {"mode": "Sentinel", "replicas": 3, "sentinel": {"replicas": 5}},
    "cluster": {"mode": "Cluster", "replicas": 2, "shards": 3},
    "percent of a limit": {"resources": {"limits": {"memory": "256Mi"}}, "memory": {"maxmemoryPercent": 80}},
    "numbers as quantities": {"resources": {"requests": {"cpu": 1, "memory": 1000000}}},
    "quantities": {"resources": {"requests": {"cpu": "1.5", "memory": "64Mi"}, "limits": {"memory": "1e9"}}},
    "an overlap of parts": {"auth": {"rotation": {"every": "1.5h", "overlap": "1h30m0.5s"}}},
    "settings": {"config": {"maxclients": "500", "notify-keyspace-events": "KEA"}},
    "a volume": {"persistence": {"size": "10Gi", "storageClassName": "fast", "strategy": "RDB"}},
    "rotation": {"auth": {"rotation": {"every": "720h", "overlap": "10m", "trigger": "first"}}},
    "a certificate": {"tls": {"secretName": "tls"}},
    "an issuer": {"tls": {"issuerRef": {"name": "ca", "kind": "ClusterIssuer"}}},
    "hosts": {"gateway": {"hosts": ["cart.db.example", "cart2.db.example"]}},
    "a rate": {"gateway": {"rateLimit": {"requestsPerSecond": 10, "burst": 20}}},
    "a deny list": {"gateway": {"commands": {"deny": ["flushall"]}}},
    "a backup": {"backup": BACKUP, "deletionPolicy": "BackupThenDelete"},
    "a restored one": {"bootstrap": BOOTSTRAP, "persistence": DISK},
    "a daily backup": {"backup": BACKUP | {"schedule": "@daily"}},
}

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another mode": ({"mode": "Ring"}, "spec.mode"),
    "two replicas": ({"replicas": 2}, "spec.replicas"),
    "a sentinel of one": ({"mode": "Sentinel", "replicas": 1}, "spec.replicas"),
    "even sentinels": ({"mode": "Sentinel", "replicas": 2, "sentinel": {"replicas": 4}}, "must be odd"),
    "a cluster without shards": ({"mode": "Cluster", "replicas": 2}, "shards"),
    "shards without a cluster": ({"shards": 3}, "shards"),
    "percent of nothing": ({"memory": {"maxmemoryPercent": 80}}, "memory.maxmemoryPercent"),
    "another eviction": ({"memory": {"evictionPolicy": "random"}}, "spec.memory.evictionPolicy"),
    "a setting of ours": ({"config": {"requirepass": "x"}}, "spec.config"),
    "another place for the data": ({"config": {"appendfilename": "other.aof"}}, "spec.config"),
    "another kind of data": ({"config": {"save": "1 1"}}, "spec.config"),
    "an include": ({"config": {"include": "/data/x"}}, "spec.config"),
    "an overlap of microseconds": ({"auth": {"rotation": {"overlap": "100us"}}}, "spec.auth.rotation.overlap"),
    "an overlap of a fraction": ({"auth": {"rotation": {"overlap": ".5h"}}}, "spec.auth.rotation.overlap"),
    "an overlap of less than nothing": ({"auth": {"rotation": {"overlap": "-0s"}}}, "spec.auth.rotation.overlap"),
    "an overlap without a unit": ({"auth": {"rotation": {"overlap": "0"}}}, "spec.auth.rotation.overlap"),
    "a rotation with a sign": ({"auth": {"rotation": {"every": "+2h"}}}, "spec.auth.rotation.every"),
    "a limit of abc": ({"resources": {"limits": {"memory": "abc"}}}, "spec.resources.limits"),
    "a negative request": ({"resources": {"requests": {"cpu": "-1"}}}, "spec.resources.requests"),
    "a setting in capitals": ({"config": {"REQUIREPASS": "x"}}, "spec.config"),
    "two lines in a setting": ({"config": {"maxclients": "5\nrequirepass x"}}, "one line"),
    "a key with a blank": ({"config": {"maxclients 5": "x"}}, "spec.config"),
    "no size": ({"persistence": {"size": "large"}}, "spec.persistence.size"),
    "nothing as a size": ({"persistence": {"size": "0"}}, "spec.persistence.size"),
    "rotation each minute": ({"auth": {"rotation": {"every": "1m"}}}, "at least 1h"),
    "two certificates": ({"tls": {"secretName": "a", "issuerRef": {"name": "b"}}}, "spec.tls"),
    "no certificate": ({"tls": {}}, "spec.tls"),
    "a wildcard host": ({"gateway": {"hosts": ["*.db.example"]}}, "spec.gateway.hosts"),
    "a host in capitals": ({"gateway": {"hosts": ["CART.db.example"]}}, "spec.gateway.hosts"),
    "a burst below the rate": (
        {"gateway": {"rateLimit": {"requestsPerSecond": 10, "burst": 5}}},
        "spec.gateway.rateLimit",
    ),
    "both lists": ({"gateway": {"commands": {"allow": ["get"], "deny": ["set"]}}}, "spec.gateway.commands"),
    "requests of nothing": ({"gateway": {"maxRequestBytes": 10}}, "spec.gateway.maxRequestBytes"),
    "a backup without a bucket": ({"backup": {"schedule": "@daily"}}, "spec.backup.s3"),
    "a backup at noon": ({"backup": BACKUP | {"schedule": "at noon"}}, "spec.backup.schedule"),
    "a last backup to nowhere": ({"deletionPolicy": "BackupThenDelete"}, "spec.deletionPolicy"),
    "a restored cache": ({"bootstrap": BOOTSTRAP}, "spec.bootstrap"),
    "another policy": ({"deletionPolicy": "Forget"}, "spec.deletionPolicy"),
}

# what was there, what is wanted, and what is wrong with it; None: nothing
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "a larger volume": ({"persistence": DISK}, {"persistence": {"size": "2Gi"}}, None),
    "another version": ({}, {"engine": {"type": "Valkey", "version": "8.2"}}, None),
    "suspend": ({}, {"suspend": True}, None),
    "another mode": ({"mode": "Sentinel", "replicas": 2}, {"mode": "Standalone", "replicas": 1}, "spec.mode"),
    "a smaller volume": ({"persistence": {"size": "2Gi"}}, {"persistence": DISK}, "spec.persistence.size"),
    "another class": ({"persistence": DISK}, {"persistence": DISK | {"storageClassName": "x"}}, "storageClassName"),
    "a volume later": ({}, {"persistence": DISK}, "persistence cannot be added"),
    "no volume any more": ({"persistence": DISK}, {"persistence": None}, "persistence cannot be"),
    "another engine": ({}, {"engine": {"type": "Redis", "version": "7.2"}}, "spec.engine.type"),
    "another namespace": ({}, {"placement": {"namespaceMode": "Dedicated"}}, "namespaceMode is immutable"),
    "another origin": (
        {"persistence": DISK, "bootstrap": BOOTSTRAP},
        {"bootstrap": BOOTSTRAP | {"fromBackup": "b.rdb"}},
        "spec.bootstrap",
    ),
    "an origin later": ({"persistence": DISK}, {"bootstrap": BOOTSTRAP}, "bootstrap cannot be added"),
}


@pytest.mark.parametrize("spec", GOOD.values(), ids=GOOD)
def test_what_is_right_is_taken(make: Any, spec: dict[str, Any]) -> None:
    item = make(**spec)
    assert read_instance(item).spec.mode == spec.get("mode", "Standalone")


@pytest.mark.parametrize(("spec", "field"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_refused_with_its_field(make: Any, spec: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as refused:
        make(**spec)
    assert field in str(refused.value)


@pytest.mark.parametrize(("before", "after", "field"), CHANGES.values(), ids=CHANGES)
def test_changes_are_taken_or_refused(
    make: Any, cluster: Cluster, before: dict[str, Any], after: dict[str, Any], field: str | None
) -> None:
    make(**copy.deepcopy(before))

    def change(item: dict[str, Any]) -> None:
        for key, value in copy.deepcopy(after).items():
            if value is None:
                del item["spec"][key]
            else:
                item["spec"][key] = value

    if field is None:
        cluster.edit("RedisHttpInstance", "shop", "cache", change)
    else:
        with pytest.raises(Refused) as refused:
            cluster.edit("RedisHttpInstance", "shop", "cache", change)
        assert field in str(refused.value)


@pytest.mark.parametrize("name", ["9lives", "a" * 41, "dotted.name"])
def test_a_name_is_a_label(make: Any, name: str) -> None:
    with pytest.raises(Refused, match="name must be"):
        make(name)


def test_a_protected_instance_cannot_be_deleted(make: Any, cluster: Cluster) -> None:
    make(deletionProtection=True)
    with pytest.raises(Refused, match="deletionProtection is on; set it to false first"):
        cluster.delete("RedisHttpInstance", "shop", "cache")
    assert cluster.find("RedisHttpInstance", "shop", "cache") is not None


def test_the_defaults_of_the_definition_are_those_of_the_operator(make: Any) -> None:
    full = {"persistence": DISK, "backup": BACKUP, "scheduling": {}, "monitoring": {}, "memory": {}}
    assert read_instance(make(**full)).spec == read_instance(resource(**full) | {"metadata": METADATA}).spec
    assert read_instance(make("plain")).spec == Spec()


METADATA = {"name": "cache", "namespace": "shop", "uid": "1"}


def test_the_definition_is_small_enough_for_kubectl_apply() -> None:
    definition = next(yaml.safe_load_all(manifests()))
    assert len(yaml.safe_dump(definition)) < 256 * 1024 / 4  # what an annotation may hold, with room


def test_kubectl_applies_what_redisgate_prints(cluster: Cluster) -> None:
    printed = subprocess.run([sys.executable, "-m", "redisgate", "crd"], capture_output=True, check=True)
    applied = subprocess.run(
        ["kubectl", "--server", cluster.url, "apply", "-f", "-"], input=printed.stdout, capture_output=True
    )
    assert applied.returncode == 0, applied.stderr.decode()
    assert b"customresourcedefinition.apiextensions.k8s.io/redishttpinstances.redisgate.io" in applied.stdout


@pytest.mark.parametrize(
    ("text", "value"), [("256Mi", 256 * 2**20), ("1.5G", 1.5e9), ("100m", 0.1), ("1e3", 1000), (42, 42), ("2Ei", 2**61)]
)
def test_quantities(text: str, value: float) -> None:
    assert float(quantity(text)) == value


@pytest.mark.parametrize("text", ["", "Mi", "12 Mi", "1..2", "1Zi"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(SpecError, match=r"^spec\.x: "):
        quantity(text, "spec.x")


def test_durations() -> None:
    assert seconds("1h30m") == 5400
    assert seconds("0s") == 0
    assert seconds("1.5h") == 5400
    for text in ("", "1", "h", "1d", "1h 2m"):
        with pytest.raises(SpecError):
            seconds(text)
