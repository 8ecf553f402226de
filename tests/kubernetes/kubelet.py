"""What stands in for controllers, scheduler and kubelet: a real redis-server for each pod of an instance.

It takes the configuration and the users from the same Secret that a pod would mount, keeps the data of a volume claim
as long as the claim lives, and writes where the server listens on the client Service, which is what an operator and a
gateway that run outside of a cluster are told by.
"""

import base64
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from tests.kubernetes.cluster import Cluster
from tests.servers import free_port, redis_binary

LOOK_SECONDS = 0.02
STOP_SECONDS = 10.0
ADDRESS = "redisgate.io/address"


class Pod:
    """One redis-server."""

    def __init__(self, folder: Path, config: dict[str, str], data: Path) -> None:
        self.port = free_port()
        folder.mkdir()
        data.mkdir(exist_ok=True)
        for name, text in config.items():
            # What names a folder of the container has its place here.
            lines = [line for line in text.splitlines(keepends=True) if not line.startswith(("dir ", "aclfile "))]
            (folder / name).write_text("".join(lines))
        self.tls = "tls.crt" in config
        own = [
            "--tls-port" if self.tls else "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(data),
            "--daemonize",
            "no",
        ]
        own += ["--aclfile", str(folder / "users.acl"), "--loglevel", "warning"]
        if self.tls:
            own += ["--tls-cert-file", str(folder / "tls.crt"), "--tls-key-file", str(folder / "tls.key")]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen([redis_binary(), str(folder / "redis.conf"), *own], stdout=log, stderr=log)

    @property
    def answers(self) -> bool:
        """As a readiness probe asks."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as probe:
            probe.settimeout(1)
            with self._secured(probe) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False

    def _secured(self, probe: socket.socket) -> socket.socket:
        if not self.tls:
            return probe
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(probe)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Kubelet:
    """Use it as a context manager, beside a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._folder = Path(tempfile.mkdtemp(prefix="rgkubelet"))
        # by uid of the workload: its template, what runs, and the namespace and name of the pod
        self._pods: dict[str, tuple[str, Pod, tuple[str, str]]] = {}
        self._data: dict[str, Path] = {}  # by uid of the claim
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kubelet", daemon=True)
        self.failure: BaseException | None = None
        self.paused = False
        """Nothing starts while this is set, as on a cluster without room."""

    def __enter__(self) -> "Kubelet":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        for _, pod, _ in self._pods.values():
            pod.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
        assert self.failure is None, repr(self.failure)

    @property
    def running(self) -> int:
        """Servers."""
        return len(self._pods)

    def port(self, namespace: str, name: str) -> int:
        """Of the server of an instance."""
        workload = self._cluster.find("StatefulSet", namespace, name) or self._cluster.find(
            "Deployment", namespace, name
        )
        assert workload is not None
        return self._pods[workload["metadata"]["uid"]][1].port

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._look()
            except BaseException as error:
                self.failure = self.failure or error
                raise
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        found = {}
        for kind in ("StatefulSet", "Deployment"):
            for workload in self._cluster.all(kind):
                found[workload["metadata"]["uid"]] = workload
        self._adopt(found)
        orphans = [pod for pod in self._cluster.all("Pod") if not pod["metadata"].get("ownerReferences")]
        for uid in list(self._pods):
            template, pod, place = self._pods[uid]
            if uid not in found and place in [
                (each["metadata"]["namespace"], each["metadata"]["name"]) for each in orphans
            ]:
                continue
            workload = found.get(uid, {"spec": {"replicas": 0, "template": None}, "metadata": {}})
            wanted = json.dumps(workload["spec"]["template"], sort_keys=True)
            gone = workload["spec"]["replicas"] == 0 or "deletionTimestamp" in workload["metadata"]
            if gone or template != wanted or pod.process.poll() is not None:
                self._pods.pop(uid)
                pod.stop()
                for each in self._cluster.all("Pod"):
                    if (each["metadata"].get("ownerReferences") or [{"uid": ""}])[0]["uid"] == uid:
                        with contextlib.suppress(Exception):
                            self._cluster.delete("Pod", each["metadata"]["namespace"], each["metadata"]["name"])
        for claim_uid in list(self._data):
            if all(claim["metadata"]["uid"] != claim_uid for claim in self._cluster.all("PersistentVolumeClaim")):
                shutil.rmtree(self._data.pop(claim_uid))
        for uid, workload in found.items():
            ready = 0
            if workload["spec"]["replicas"] and "deletionTimestamp" not in workload["metadata"]:
                if uid not in self._pods and not self.paused:
                    self._start(uid, workload)
                ready = int(uid in self._pods and self._pods[uid][1].answers)
            self._tell(workload, ready)

    def _adopt(self, found: dict[str, dict[str, Any]]) -> None:
        """Give pods that their StatefulSet has left behind to the one that took its place."""
        for pod in self._cluster.all("Pod"):
            if pod["metadata"].get("ownerReferences"):
                continue
            place = (pod["metadata"]["namespace"], pod["metadata"]["name"])
            former = next((uid for uid, (_, _, its) in self._pods.items() if its == place and uid not in found), None)
            for uid, workload in found.items():
                metadata = workload["metadata"]
                if former is None or (metadata["namespace"], f"{metadata['name']}-0") != place or uid in self._pods:
                    continue
                owner = {"apiVersion": workload["apiVersion"], "kind": workload["kind"], "uid": uid, "controller": True}
                owner["name"] = metadata["name"]
                self._pods[uid] = self._pods.pop(former)
                self._cluster.edit("Pod", *place, lambda item: item["metadata"].update(ownerReferences=[owner]))  # noqa: B023
                break

    def _start(self, uid: str, workload: dict[str, Any]) -> None:
        metadata, template = workload["metadata"], workload["spec"]["template"]
        namespace, name = metadata["namespace"], metadata["name"]
        secrets = [volume["secret"]["secretName"] for volume in template["spec"]["volumes"] if "secret" in volume]
        config: dict[str, str] = {}
        for secret_name in secrets:
            secret = self._cluster.find("Secret", namespace, secret_name)
            if secret is None:
                return
            config |= {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
        if "redis.conf" not in config or self._cluster.find("Service", namespace, name) is None:
            return
        data = self._folder / uuid.uuid4().hex
        for claim in workload["spec"].get("volumeClaimTemplates", ()):
            data = self._claim(namespace, f"{claim['metadata']['name']}-{name}-0", claim)
        pod = Pod(self._folder / uuid.uuid4().hex, config, data)
        self._pods[uid] = json.dumps(template, sort_keys=True), pod, (namespace, f"{name}-0")
        owner = {"apiVersion": workload["apiVersion"], "kind": workload["kind"], "name": name, "uid": uid}
        with contextlib.suppress(Exception):  # its predecessor is about to go
            self._cluster.create(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {
                        "name": f"{name}-0",
                        "namespace": namespace,
                        "labels": template["metadata"]["labels"],
                        "ownerReferences": [owner | {"controller": True}],
                    },
                    "spec": template["spec"],
                }
            )
        self._cluster.edit(
            "Service",
            namespace,
            name,
            lambda service: (
                service["metadata"].setdefault("annotations", {}).update({ADDRESS: f"127.0.0.1:{pod.port}"})
            ),
        )

    def _claim(self, namespace: str, name: str, template: dict[str, Any]) -> Path:
        claim = self._cluster.find("PersistentVolumeClaim", namespace, name)
        if claim is None:
            claim = self._cluster.create(
                {
                    "apiVersion": "v1",
                    "kind": "PersistentVolumeClaim",
                    "metadata": {
                        "name": name,
                        "namespace": namespace,
                        "labels": template["metadata"].get("labels", {}),
                    },
                    "spec": template["spec"],
                }
            )
            capacity = template["spec"]["resources"]["requests"]
            self._cluster.set_status(
                "PersistentVolumeClaim", namespace, name, {"phase": "Bound", "capacity": dict(capacity)}
            )
        return self._data.setdefault(claim["metadata"]["uid"], self._folder / claim["metadata"]["uid"])

    def _tell(self, workload: dict[str, Any], ready: int) -> None:
        metadata = workload["metadata"]
        revision = str(hash(json.dumps(workload["spec"]["template"], sort_keys=True)))
        status = {
            "observedGeneration": metadata["generation"],
            "replicas": ready,
            "readyReplicas": ready,
            "updatedReplicas": ready,
            "availableReplicas": ready,
        }
        if workload["kind"] == "StatefulSet":
            status |= {"currentRevision": revision, "updateRevision": revision, "currentReplicas": ready}
        if workload.get("status") != status:
            with contextlib.suppress(Exception):  # it has gone meanwhile
                self._cluster.set_status(workload["kind"], metadata["namespace"], metadata["name"], status)
