"""The first minutes with the service, as its first description shows them, by curl and to the letter."""

import json
import shutil
import subprocess
from typing import Any

import pytest

from tests.control.conftest import Service
from tests.http import Client

REGISTER = """\
curl -X POST http://localhost:3000/auth/register \\
  -H "Content-Type: application/json" \\
  -d '{
    "email": "user@example.com",
    "username": "myuser",
    "password": "SecurePass123!",
    "first_name": "John",
    "last_name": "Doe"
  }'
"""
LOGIN = """\
curl -X POST http://localhost:3000/auth/login \\
  -H "Content-Type: application/json" \\
  -d '{
    "email": "user@example.com",
    "password": "SecurePass123!"
  }'
"""
CREATE = """\
curl -X POST http://localhost:3000/api/organizations/{org_id}/redis-instances \\
  -H "Authorization: Bearer YOUR_JWT_TOKEN" \\
  -H "Content-Type: application/json" \\
  -d '{
    "name": "My Redis",
    "slug": "my-redis-001",
    "organization_id": "{org_id}",
    "max_memory": 536870912,
    "redis_version": "7.0"
  }'
"""
PING = """\
curl http://localhost:3000/redis/{instance_id}/ping \\
  -H "Authorization: Bearer YOUR_JWT_TOKEN"
"""
SET = """\
curl http://localhost:3000/redis/{instance_id}/set/mykey/myvalue \\
  -H "Authorization: Bearer YOUR_JWT_TOKEN"
"""
GET = """\
curl http://localhost:3000/redis/{instance_id}/get/mykey \\
  -H "Authorization: Bearer YOUR_JWT_TOKEN"
"""


class Shell:
    """Runs lines as somebody pastes them, who replaces what is to be replaced."""

    def __init__(self, port: int) -> None:
        self.values = {"http://localhost:3000": f"http://127.0.0.1:{port}"}

    def paste(self, line: str) -> Any:
        for name, value in self.values.items():
            line = line.replace(name, value)
        done = subprocess.run(["sh", "-c", line.replace("curl ", "curl -sS ", 1)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_register_sign_in_create_ping_set_get(service: Service) -> None:
    shell = Shell(service.port)
    registered = shell.paste(REGISTER)
    assert registered["success"] is True
    assert registered["data"]["user"]["email"] == "user@example.com"
    signed_in = shell.paste(LOGIN)
    data = signed_in["data"]
    assert (signed_in["success"], data["user"]["username"], data["api_key"]) == (True, "myuser", None)
    shell.values |= {"YOUR_JWT_TOKEN": data["token"], "{org_id}": data["organization_id"]}
    created = shell.paste(CREATE)
    assert created["success"] is True, created
    instance = created["data"]
    assert (instance["slug"], instance["max_memory"]) == ("my-redis-001", 536870912)
    assert {"id", "domain", "status", "redis_version"} <= set(instance)
    shell.values["{instance_id}"] = instance["id"]
    assert shell.paste(PING) == {"result": "PONG"}
    assert shell.paste(SET) == {"result": "OK"}
    assert shell.paste(GET) == {"result": "myvalue"}

    # The instance's own token is a complete configuration for the official clients.
    instances = f"/api/organizations/{data['organization_id']}/redis-instances"
    with Client(service.port, token=data["token"]) as client:
        tokens = client.get(f"{instances}/{instance['id']}/credentials").json()["data"]
    with Client(service.port, token=tokens["token"]) as client:
        assert client.command("GET", "mykey").result == "myvalue"
    with Client(service.port, token=tokens["readonly_token"]) as client:
        assert client.command("GET", "mykey").result == "myvalue"
        assert "NOPERM" in client.command("SET", "mykey", "x").error

    # What happened is on the record.
    with Client(service.port, token=data["token"]) as client:
        log = client.get(f"/api/organizations/{data['organization_id']}/audit-logs").json()["data"]["items"]
    assert {"users.register", "instances.create"} <= {event["action"] for event in log}
