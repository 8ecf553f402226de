"""The wheel that is built from the tree, in an empty environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import redisgate
from tests.http import Client
from tests.servers import Gateway, RedisServer, single_instance

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.timeout(300)  # it compiles


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git has and what lies there now, without the network."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index"]
    subprocess.run([*command, "--no-deps", "--no-build-isolation", "-w", target, source], check=True)
    (found,) = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment with the wheel; what it depends on comes from ours."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(home / "bin" / "python")]
    subprocess.run([*command, "install", "--quiet", "--no-index", "--no-deps", wheel], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    # Behind its own packages in sys.path, so that only what the wheel does not bring is taken from there.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def expected_form() -> str:
    """Of what is built here."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return "compiled" if shutil.which("gcc") and headers.exists() else "pure Python"


def test_the_wheel_claims_three_top_level_names_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    claimed = {name.split("/")[0] for name in names if ".dist-info" not in name}
    # What the compiled modules share cannot lie in a package; its name says whose it is.
    assert {name for name in claimed if not name.startswith("redisgate__mypyc.")} == {"resp", "redisgate", "control"}
    assert {"resp/commands.json", "resp/py.typed", "control/templates/__init__.py"} <= set(names)
    assert {"control/migrations/__init__.py", "control/migrations/0001_accounts.sql", "control/py.typed"} <= set(names)
    assert {"control/routes/service.py", "control/provisioners/local.py"} <= set(names)


def test_an_installed_wheel_runs(installed: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("REDISGATE_", "PYTHON"))}
    version = subprocess.run([installed / "redisgate", "version"], capture_output=True, text=True, env=clean, cwd="/")
    assert version.stdout == f"redisgate {redisgate.__version__} ({expected_form()})\n", version.stderr
    assert version.returncode == 0
    script = "import control.templates, control.migrations, redisgate; print(redisgate.__file__)"
    where = subprocess.run(
        [installed / "python", "-c", script], capture_output=True, text=True, env=clean, cwd="/", check=True
    )
    assert str(installed.parent) in where.stdout
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "executable", str(installed / "python"))
    gateway = Gateway(single_instance(redis_server), ["--workers", "1"])
    try:
        with Client(gateway.port) as client:
            assert client.get("/set/wheel/runs").result == "OK"
            assert client.get("/get/wheel").result == "runs"
    finally:
        gateway.stop()
