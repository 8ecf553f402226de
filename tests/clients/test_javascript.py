"""The official JavaScript clients, driven by node's own test runner."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.servers import Gateway, needs_redis_7

HERE = Path(__file__).parent / "js"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [pytest.param("redis", marks=needs_redis_7), "ratelimit"])
def test_javascript_client(gateway: Gateway, name: str) -> None:
    node = shutil.which("node")
    assert node, "Node.js is missing; `make test` installs it"
    assert (HERE / "node_modules").is_dir(), "the JavaScript clients are missing; `make test` installs them"
    environ = {
        **os.environ,
        "GATEWAY_URL": gateway.url,
        "GATEWAY_TOKEN": gateway.token,
        "GATEWAY_READONLY_TOKEN": gateway.readonly_token,
        "UPSTASH_DISABLE_TELEMETRY": "",
    }
    result = subprocess.run(
        [node, "--test", "--test-timeout=60000", f"{name}.test.mjs"],
        cwd=HERE,
        env=environ,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stdout + result.stderr
