"""`redisgate operator`, `crd`, `backup` and `restore`: their flags, and what runs."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import uvloop


def add_flags(command: str, parser: argparse.ArgumentParser) -> None:
    """The flags of one of them."""
    if command == "operator":
        _add_operator_flags(parser)
    elif command == "crd":
        parser.description = "Print the definition and the policy against deletion: redisgate crd | kubectl apply -f -"
    else:
        parser.add_argument("--bucket", required=True)
        parser.add_argument("--endpoint", help="URL of the storage, if it is not Amazon's")
        parser.add_argument("--region", help="of the bucket (us-east-1)")
        parser.epilog = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY open the bucket"
    if command == "backup":
        parser.add_argument("--host", required=True, help="of the Redis")
        parser.add_argument("--port", type=int, default=6379, help="of the Redis (6379)")
        parser.add_argument("--user", default="", help="of the Redis; its password is REDISGATE_BACKUP_PASSWORD")
        parser.add_argument("--tls", action="store_true", help="speak TLS to the Redis")
        parser.add_argument("--ca", help="file with the authorities to trust instead of the system's")
        parser.add_argument("--prefix", default="", help="of the keys of its backups")
        parser.add_argument("--keep", type=int, default=7, help="how many backups to keep (7)")
    elif command == "restore":
        parser.add_argument("--key", required=True, help="of the backup")
        parser.add_argument("--into", required=True, type=Path, help="the new Redis's folder, without data yet")
        parser.add_argument("--as", dest="form", choices=["aof", "rdb"], default="aof", help="how it keeps its data")


def _add_operator_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = "Follow all RedisHttpInstances of a cluster and let it have what they ask for."
    add = parser.add_argument
    add("--namespace", help="serve this namespace only; by default all")
    add("--leader-elect", action="store_true", help="one of several replicas works, the others stand by")
    add("--kubeconfig", help="how to reach the cluster; by default the pod's service account, else ~/.kube/config")
    add("--context", help="of the kubeconfig; by default its current one")
    add("--operator-namespace", help="where this operator is; by default the pod's, else redisgate")
    add("--gateway-namespace", help="where the gateway is and gets its routes; by default the operator's")
    add("--gateway-service", default="redisgate-gateway", help="of the gateway (redisgate-gateway)")
    add("--gateway-port", type=int, default=80, help="of that Service (80)")
    add("--base-domain", default=os.environ.get("REDISGATE_BASE_DOMAIN", ""), help="hosts of instances lie under it")
    add("--public-url", default="", help="of the gateway, told to people where there is no base domain")
    add("--url-scheme", choices=["https", "http"], default="https", help="of hosts under the base domain (https)")
    add("--cluster-domain", default="cluster.local", help="of the cluster's DNS (cluster.local)")
    add("--ingress-class", help="of Ingresses that name none")
    add(
        "--ingress-annotation",
        metavar="KEY",
        type=_annotation,
        action="append",
        default=[],
        help="that a resource may give its Ingress in the gateway's namespace; as often as there are",
    )
    add(
        "--ingress-tls-secret",
        metavar="NAME",
        action="append",
        default=[],
        help="in the gateway's namespace, that a resource may name for its Ingress; as often as there are",
    )
    add(
        "--engine-image",
        metavar="BEGINNING",
        action="append",
        default=[],
        help="of images that a resource may name in spec.engine.image, as often as there are; by default the official"
        " ones. Such an image gets Secrets that whoever made the resource may not read",
    )
    add("--no-open-networks", action="store_true", help="refuse spec.networkPolicy.mode: Disabled")
    add("--monitoring-namespace", help="from where exporters may be asked; by default from nowhere")
    add("--image", default="", help="of redisgate, for backups; by default redisgate/redisgate of this version")
    add("--exporter-image", default="", help="of the exporter")
    add("--max-request-bytes", type=int, help="the gateway's own limit")
    add(
        "--outside-cluster",
        action="store_true",
        help="believe the annotation redisgate.io/address of Services (host:port), for an operator and a gateway that"
        " run elsewhere; whoever may write Services can then lead the gateway anywhere",
    )


def _annotation(key: str) -> str:
    from control.kubernetes.plan import NEVER_ANNOTATIONS

    if key in NEVER_ANNOTATIONS:
        raise argparse.ArgumentTypeError(f"{key} is never a resource's to say: it reaches beyond its own hosts")
    return key


def run(command: str, options: dict[str, Any]) -> int:
    """The exit status."""
    if command == "crd":
        return print_crd()
    if command == "operator":
        return run_operator(options)
    from control.kubernetes.backups import BackupError, Bucket, Server, back_up, restore

    bucket = Bucket(options["bucket"], options["endpoint"], options["region"])
    try:
        if command == "backup":
            password = os.environ.get("REDISGATE_BACKUP_PASSWORD", "")
            server = Server(options["host"], options["port"], options["user"], password, options["tls"], options["ca"])
            if options["keep"] < 1:
                raise BackupError("--keep: at least one")
            print(f"made {back_up(server, bucket, options['prefix'], options['keep'])}")
        elif restore(bucket, options["key"], options["into"], options["form"]):
            print(f"restored {options['key']}")
        else:
            print(f"{options['into']} has data already; it is left as it is")
    except BackupError as error:
        print(f"redisgate {command}: {error}", file=sys.stderr)
        return 1
    return 0


def manifests() -> str:
    """What has to be in a cluster before an operator can work, as YAML."""
    folder = resources.files("control.kubernetes") / "crd"
    return "---\n".join((folder / name).read_text() for name in ("redishttpinstances.yaml", "protection.yaml"))


def print_crd() -> int:
    """For `kubectl apply -f -`."""
    with contextlib.suppress(BrokenPipeError):
        print(manifests(), end="", flush=True)
    return 0


def run_operator(options: dict[str, Any]) -> int:
    """Until SIGTERM or SIGINT."""
    try:
        import kubernetes_asyncio  # noqa: F401
    except ModuleNotFoundError:
        print("redisgate: the operator needs kubernetes-asyncio: pip install 'redisgate[kubernetes]'", file=sys.stderr)
        return 2
    from control.kubernetes.client import NotConfigured

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        uvloop.run(_operate(options))
    except NotConfigured as error:
        print(f"redisgate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


async def _operate(options: dict[str, Any]) -> None:
    from control.kubernetes.client import KubernetesClient
    from control.kubernetes.lease import Lease
    from control.kubernetes.operator import LEASE, Operator

    client = await KubernetesClient.connect(options["kubeconfig"], options["context"])
    settings = operator_settings(options, client.namespace)
    lease = Lease(client, LEASE, settings.operator_namespace) if options["leader_elect"] else None
    task = asyncio.create_task(Operator(client, settings, namespace=options["namespace"], lease=lease).run())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    logging.getLogger(__name__).info("following %s at %s", options["namespace"] or "all namespaces", client.host)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        await client.close()


def operator_settings(options: dict[str, Any], own_namespace: str | None) -> Any:
    """From the flags; `own_namespace` is the pod's."""
    import redisgate
    from control.kubernetes.plan import OFFICIAL_IMAGES, OperatorSettings

    namespace = options["operator_namespace"] or own_namespace or "redisgate"
    plain = (
        "gateway_service gateway_port public_url url_scheme cluster_domain ingress_class monitoring_namespace"
        " outside_cluster"
    ).split()
    chosen = {name: options[name] for name in plain}
    chosen |= {name: options[name] for name in ("exporter_image", "max_request_bytes") if options[name]}
    return OperatorSettings(
        base_domain=options["base_domain"].lower().strip("."),
        operator_namespace=namespace,
        gateway_namespace=options["gateway_namespace"] or namespace,
        ingress_annotations=frozenset(options["ingress_annotation"]),
        ingress_tls_secrets=frozenset(options["ingress_tls_secret"]),
        engine_images=tuple(options["engine_image"]) or OFFICIAL_IMAGES,
        open_networks=not options["no_open_networks"],
        image=options["image"] or f"redisgate/redisgate:{redisgate.__version__}",
        **chosen,
    )
