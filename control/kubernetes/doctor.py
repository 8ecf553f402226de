"""The cluster's part of `redisgate doctor`: whether the gateway may follow it, and how its instances are."""

import asyncio
from typing import Final

from control.kubernetes.client import INSTANCES, SECRETS, Forbidden, KubernetesClient, KubernetesError, NotFound
from control.kubernetes.routes import DEFAULT_NAMESPACE, ROUTE_LABEL
from redisgate.config import Settings
from redisgate.findings import Finding, Report

MAX_NAMED: Final = 20
"""Instances that are not ready and are named one by one."""

_RIGHTS: Final = "kubectl apply -f deploy/rbac/gateway.yaml, with the namespace and the account that the gateway has"


def examine(settings: Settings) -> list[Finding]:
    """All that is to be known; nothing where no cluster is followed."""
    report = Report()
    if settings.cluster.enabled:
        asyncio.run(_examine(settings, report))
    return report.findings


async def _examine(settings: Settings, report: Report) -> None:
    cluster = settings.cluster
    report.about("Kubernetes")
    try:
        client = await KubernetesClient.connect(cluster.kubeconfig or None, cluster.kubernetes_context or None)
    except KubernetesError as error:
        report.wrong(str(error), "set REDISGATE_KUBECONFIG, or run it in a pod with a service account")
        return
    try:
        report.ok(f"{client.host} answers, {await _version(client)}")
        await _look_at_routes(client, cluster.kubernetes_namespace or client.namespace or DEFAULT_NAMESPACE, report)
        await _look_at_instances(client, cluster.kubernetes_watch or None, report)
    except Forbidden as error:
        report.wrong(f"it does not know us: {error}", "renew the credentials in the kubeconfig")
    except KubernetesError as error:
        report.wrong(str(error), "check the address in the kubeconfig, and that nothing on the way closes it")
    finally:
        await client.close()


async def _version(client: KubernetesClient) -> str:
    try:
        found = await client.call("GET", "/version")
    except (NotFound, Forbidden):  # it may be hidden from some, and what matters is asked for below
        return "and does not tell its version"
    return f"version {str(found.get('gitVersion', 'unknown')).removeprefix('v')}"


async def _look_at_routes(client: KubernetesClient, namespace: str, report: Report) -> None:
    """The operator leaves them in Secrets of this namespace."""
    try:
        routes = await client.list_all(SECRETS, namespace, labels=f"{ROUTE_LABEL}=true")
    except Forbidden:
        report.wrong(f"Secrets in {namespace} may not be listed, so no route is learned", _RIGHTS)
    else:
        report.ok(f"{len(routes)} routes are in {namespace}, where the operator leaves them")


async def _look_at_instances(client: KubernetesClient, namespace: str | None, report: Report) -> None:
    try:
        items = await client.list_all(INSTANCES, namespace)
    except NotFound:
        report.wrong("the cluster does not know of RedisHttpInstances", "redisgate crd | kubectl apply -f -")
        return
    except Forbidden:
        report.wrong("RedisHttpInstances may not be listed", _RIGHTS)
        return
    not_ready = []
    for item in items:
        conditions = item.get("status", {}).get("conditions", [])
        ready = next((each for each in conditions if each["type"] == "Ready"), None)
        name = f"{item['metadata']['namespace']}/{item['metadata']['name']}"
        if ready is None:
            not_ready.append((name, "no operator has looked at it", "see whether the operator runs: kubectl get pods"))
        elif ready["status"] != "True":
            said = ready.get("message") or ready.get("reason") or "no reason is given"
            not_ready.append((name, f"it is not ready: {said}", "kubectl describe redishttpinstance shows its events"))
    report.ok(f"{len(items) - len(not_ready)} of {len(items)} instances are ready")
    for name, text, cure in not_ready[:MAX_NAMED]:
        report.about(f"instance {name} (Kubernetes)")
        report.wrong(text, cure)
    if len(not_ready) > MAX_NAMED:
        report.about("Kubernetes")
        report.note(f"{len(not_ready) - MAX_NAMED} more instances are not ready")
