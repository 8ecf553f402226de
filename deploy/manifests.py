"""Plain manifests from the chart, for `kubectl apply -f`: `make manifests` writes k8s/, and for a cluster of your own

    python deploy/manifests.py build/k8s --image ghcr.io/yourusername/redisgate:0.1.0

They need no database and no Secret: a gateway that serves what the cluster declares, and the operator. With
`--control-plane` the gateway has accounts and a dashboard, the rights that they need, and a Secret `redisgate-secrets`
without which it does not start (deploy/helm/redisgate/values.yaml names its keys).
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import helm_python as helm

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "redisgate"
SOURCES = [*(ROOT / "control" / "kubernetes" / "crd").glob("*.yaml"), ROOT / "deploy" / "prometheus" / "alerts.yml"]
"""Of the copies in the chart's files/."""
NAMESPACE = """\
apiVersion: v1
kind: Namespace
metadata:
  name: redisgate
  labels:
    pod-security.kubernetes.io/enforce: restricted
"""
FILES = {"crds": "10", "rbac": "20", "serviceaccounts": "30", "gateway": "40", "operator": "50"}
"""Templates of the chart and the numbers that put them in order."""
HEAD = "# Made from the chart by `make manifests`; change deploy/helm/redisgate instead.\n"


class Refused(Exception):
    """Why nothing was written."""


def values(image: str | None, *, control_plane: bool) -> dict[str, Any]:
    """What the chart is rendered with."""
    chosen: dict[str, Any] = {
        "controlPlane": {"enabled": control_plane},
        "secret": {"existingSecret": "redisgate-secrets", "optional": not control_plane},
        "migrations": {"job": False},  # which Helm alone knows when to run; the gateway migrates when it starts
    }
    if image:
        name, _, digest = image.partition("@")
        slash, colon = name.rfind("/"), name.rfind(":")
        repository, tag = (name[:colon], name[colon + 1 :]) if colon > slash else (name, "")
        chosen["image"] = {"repository": repository, "tag": tag, "digest": digest}
    return chosen


def empty(folder: Path) -> None:
    """Take away what was made before; nothing else may be there. Raises Refused."""
    if folder.exists() and not folder.is_dir():
        raise Refused(f"{folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    files = list(folder.iterdir())
    for file in files:
        if not file.is_file() or file.suffix != ".yaml" or not file.read_text().startswith(HEAD):
            raise Refused(f"{folder} holds {file.name}, which was not made from the chart; name an empty folder")
    for file in files:
        file.unlink()


def write(folder: Path, chosen: dict[str, Any]) -> None:
    """All manifests; those that were there go. Raises Refused."""
    empty(folder)
    (folder / "00-namespace.yaml").write_text(HEAD + NAMESPACE)
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(chosen, name="redisgate", namespace="redisgate")
    for template, text in rendered.items():
        name = Path(template).stem
        if name in FILES and text.strip():
            (folder / f"{FILES[name]}-{name}.yaml").write_text(HEAD + text.strip() + "\n")


def copy_files() -> None:
    """The definitions of resources are the package's own, the alerts Prometheus's; the chart holds copies."""
    for source in SOURCES:
        shutil.copy(source, CHART / "files" / source.name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write plain manifests, rendered from the Helm chart.")
    parser.add_argument("folder", nargs="?", type=Path, help="new, empty or of an earlier run; by default k8s/")
    parser.add_argument("--image", help="by default redisgate with the chart's appVersion, which no registry has")
    parser.add_argument("--control-plane", action="store_true", help="with accounts and a dashboard, over a database")
    parser.add_argument("--copy-files", action="store_true", help="before, copy definitions and alerts into the chart")
    options = parser.parse_args()
    if options.copy_files:
        copy_files()
    try:
        write(options.folder or ROOT / "k8s", values(options.image, control_plane=options.control_plane))
    except Refused as error:
        print(f"manifests.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
