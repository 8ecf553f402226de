"""`redisgate doctor` on a cluster: what the gateway lacks there, each with its cure."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from control.kubernetes.doctor import examine
from redisgate.config import Settings, load
from redisgate.findings import FAIL, OK, Finding
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.test_routes import NAMESPACE, declare, start_cluster
from tests.servers import free_port

RBAC = Path(__file__).parents[2] / "deploy" / "rbac" / "gateway.yaml"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = start_cluster()
    yield cluster
    cluster.stop()


def settings(kubeconfig: Path, directory: Path) -> Settings:
    environ = {
        "REDISGATE_KUBERNETES": "on",
        "REDISGATE_KUBECONFIG": str(kubeconfig),
        "REDISGATE_KUBERNETES_NAMESPACE": NAMESPACE,
    }
    return load({}, environ, directory)


def said(findings: list[Finding], level: str) -> str:
    return "\n".join(f"{each.subject}: {each.text} -> {each.cure}" for each in findings if each.level == level)


def test_a_cluster_that_is_fine(cluster: Cluster, tmp_path: Path) -> None:
    declare(cluster, "orders")
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Ready",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    cluster.set_status("RedisHttpInstance", "shop", "orders", {"conditions": [ready]})
    found = examine(settings(cluster.kubeconfig(tmp_path), tmp_path))
    assert said(found, FAIL) == ""
    assert "1 of 1 instances are ready" in said(found, OK)
    assert f"0 routes are in {NAMESPACE}" in said(found, OK)


def test_instances_that_are_not_ready(cluster: Cluster, tmp_path: Path) -> None:
    declare(cluster, "fresh")
    declare(cluster, "broken")
    not_ready = {"type": "Ready", "status": "False", "reason": "Failed", "message": "no node has room"}
    cluster.set_status(
        "RedisHttpInstance",
        "shop",
        "broken",
        {"conditions": [not_ready | {"lastTransitionTime": "2026-01-01T00:00:00Z"}]},
    )
    failed = said(examine(settings(cluster.kubeconfig(tmp_path), tmp_path)), FAIL)
    assert "instance shop/fresh (Kubernetes): no operator has looked at it -> see whether the operator runs" in failed
    assert "instance shop/broken (Kubernetes): it is not ready: no node has room -> kubectl describe" in failed


def test_rights_that_were_not_given_and_those_of_the_file(cluster: Cluster, tmp_path: Path) -> None:
    cluster.create(
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "redisgate-gateway", "namespace": NAMESPACE},
        }
    )
    token = cluster.service_account_token(NAMESPACE, "redisgate-gateway")
    asked = settings(cluster.kubeconfig(tmp_path, token), tmp_path)
    failed = said(examine(asked), FAIL)
    assert f"Secrets in {NAMESPACE} may not be listed, so no route is learned -> kubectl apply -f deploy/rbac" in failed
    assert "RedisHttpInstances may not be listed -> kubectl apply -f deploy/rbac/gateway.yaml" in failed
    text = RBAC.read_text().replace("namespace: redisgate", f"namespace: {NAMESPACE}")
    for manifest in yaml.safe_load_all(text):
        cluster.apply(manifest)
    assert said(examine(asked), FAIL) == ""


def test_no_definition(tmp_path: Path) -> None:
    cluster = Cluster().start()
    try:
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        failed = said(examine(settings(cluster.kubeconfig(tmp_path), tmp_path)), FAIL)
    finally:
        cluster.stop()
    assert "the cluster does not know of RedisHttpInstances -> redisgate crd | kubectl apply -f -" in failed


def test_no_way_to_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    failed = said(examine(settings(tmp_path / "none", tmp_path)), FAIL)
    assert "no way to a Kubernetes cluster" in failed
    assert "set REDISGATE_KUBECONFIG" in failed
    (tmp_path / "odd").write_text("- a list\n")
    assert "no way to a Kubernetes cluster" in said(examine(settings(tmp_path / "odd", tmp_path)), FAIL)
    (tmp_path / "odd").write_text("a text")
    assert "no way to a Kubernetes cluster" in said(examine(settings(tmp_path / "odd", tmp_path)), FAIL)
    (tmp_path / "odd").write_text("{[")
    assert "no way to a Kubernetes cluster" in said(examine(settings(tmp_path / "odd", tmp_path)), FAIL)
    config = cluster.kubeconfig(tmp_path)
    config.write_text(config.read_text().replace(str(cluster.port), str(free_port())))
    failed = said(examine(settings(config, tmp_path)), FAIL)
    assert "cannot be reached" in failed
    assert "check the address in the kubeconfig" in failed


def test_nothing_is_asked_where_no_cluster_is_followed(tmp_path: Path) -> None:
    assert examine(load({}, {}, tmp_path)) == []
