"""Plain manifests from the chart: `python deploy/manifests.py` writes k8s/, for `kubectl apply -f k8s/`.

They need no database and no Secret to begin with: a gateway that serves what the cluster declares, and the operator.
With a Secret `redisgate-secrets` (deploy/helm/redisgate/values.yaml names its keys) the same pods have accounts and a
dashboard.
"""

import shutil
import sys
from pathlib import Path

import helm_python as helm

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "redisgate"
VALUES = {
    "secret": {"existingSecret": "redisgate-secrets", "optional": True},
    "migrations": {"job": False},  # which Helm alone knows when to run; the gateway migrates when it starts
}
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


def write(folder: Path) -> None:
    """All manifests; what was there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # The definitions of resources are the package's own.
    for source in (ROOT / "control" / "kubernetes" / "crd").glob("*.yaml"):
        shutil.copy(source, CHART / "files" / source.name)
    (folder / "00-namespace.yaml").write_text(HEAD + NAMESPACE)
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(VALUES, name="redisgate", namespace="redisgate")
    for template, text in rendered.items():
        name = Path(template).stem
        if name in FILES and text.strip():
            (folder / f"{FILES[name]}-{name}.yaml").write_text(HEAD + text.strip() + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "k8s")
