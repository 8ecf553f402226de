"""How long the operator needs for many resources, and how much memory: `.venv/bin/python -m benchmarks.kubernetes`.

The operator is a process of its own; the API server is the tests' (tests/kubernetes/cluster.py), in this process, so
its work is on the clock too: these are upper bounds. No pods come up: what is measured is the operator's own work, from
its start until each resource has its objects and a status.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from control.kubernetes.commands import manifests
from tests.kubernetes.cluster import Cluster

WAIT_SECONDS = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kubernetes", description=__doc__)
    parser.add_argument("resources", nargs="*", type=int, default=[100, 1000], help="how many (100 and 1000)")
    options = parser.parse_args()
    print("| resources | to objects and status | API requests | memory | an edit is seen in | changed while down |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in options.resources:
        figures = measure(count)
        print(
            f"| {count:,} | {figures['seconds']:.1f} s | {figures['requests']:,} | {figures['megabytes']:.0f} MB |"
            f" {figures['edit'] * 1000:.0f} ms | {figures['restart']:.1f} s |",
            flush=True,
        )
    return 0


def measure(count: int) -> dict[str, float]:
    """`seconds` from the start of the operator, `requests`, `megabytes` at the end, `edit` the median of ten in
    seconds, `restart` the seconds from the start of a second operator until what changed meanwhile is applied."""
    with tempfile.TemporaryDirectory() as folder, Cluster() as cluster:
        for manifest in yaml.safe_load_all(manifests()):
            cluster.create(manifest)
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "redisgate"}})
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "tenant"}})
        names = [f"i{number}" for number in range(count)]
        for name in names:
            cluster.create(resource(name))
        kubeconfig = cluster.kubeconfig(Path(folder))
        requests = len(cluster.requests)
        with operator(kubeconfig, Path(folder) / "log") as process:
            began = time.monotonic()
            wait(lambda: settled(cluster) == count)
            seconds = time.monotonic() - began
            requests = len(cluster.requests) - requests
            edits = sorted(edit(cluster, names[number % count], 200 + number) for number in range(10))
            megabytes = resident(process.pid)
        for name in names:
            cluster.edit("RedisHttpInstance", "tenant", name, lambda item: set_memory(item, 300))
        with operator(kubeconfig, Path(folder) / "log"):
            began = time.monotonic()
            wait(lambda: sum(limit(item) == "300Mi" for item in stateful_sets(cluster)) == count)
            restart = time.monotonic() - began
        return {
            "seconds": seconds,
            "requests": requests,
            "megabytes": megabytes,
            "edit": edits[len(edits) // 2],
            "restart": restart,
        }


def resource(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "redisgate.io/v1",
        "kind": "RedisHttpInstance",
        "metadata": {"name": name, "namespace": "tenant"},
        "spec": {
            "resources": {"limits": {"memory": "128Mi"}},
            "memory": {"maxmemoryPercent": 75},
            "persistence": {"size": "1Gi"},
            "deletionPolicy": "Delete",
        },
    }


@contextmanager
def operator(kubeconfig: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "redisgate", "operator", "--kubeconfig", str(kubeconfig)]
    with log.open("ab") as output:
        process = subprocess.Popen([*command, "--base-domain", "redis.example.com"], stderr=output)
    try:
        yield process
        if process.poll() is not None:
            raise SystemExit(f"the operator has ended: {log.read_text()[-2000:]}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def wait(condition: Callable[[], bool], pause: float = 0.02) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the operator did not finish in time")
        time.sleep(pause)


def settled(cluster: Cluster) -> int:
    """Looks without copying, so that looking costs the server little."""
    items = cluster.peek("RedisHttpInstance")
    return sum(item.get("status", {}).get("observedGeneration") == item["metadata"]["generation"] for item in items) * (
        len(cluster.peek("StatefulSet")) == len(items)
    )


def stateful_sets(cluster: Cluster) -> list[dict[str, Any]]:
    return cluster.peek("StatefulSet")


def limit(item: dict[str, Any]) -> str:
    return str(item["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])


def set_memory(item: dict[str, Any], megabytes: int) -> None:
    item["spec"]["resources"]["limits"]["memory"] = f"{megabytes}Mi"


def edit(cluster: Cluster, name: str, megabytes: int) -> float:
    """Seconds from an edit of the resource to the changed StatefulSet."""
    began = time.monotonic()
    cluster.edit("RedisHttpInstance", "tenant", name, lambda item: set_memory(item, megabytes))

    def seen() -> bool:
        item = cluster.find("StatefulSet", "tenant", name)
        return item is not None and limit(item) == f"{megabytes}Mi"

    wait(seen, 0.001)
    return time.monotonic() - began


def resident(pid: int) -> float:
    """Megabytes of memory that the process has had at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    os.environ.pop("KUBECONFIG", None)
    sys.exit(main())
