"""The control plane behind the gateway's own TLS: people are known to come by https."""

import json
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.control.conftest import Service, Urls
from tests.redisgate.test_tls import NAMES, TlsClient, TlsGateway, write_pair


class HttpsService(TlsGateway, Service):
    """A service whose port speaks HTTPS."""


@pytest.fixture
def https(database_urls: Urls, tmp_path: Path) -> Iterator[tuple[HttpsService, trustme.CA]]:
    authority = trustme.CA()
    pair = write_pair(authority, tmp_path, "c", NAMES[0])
    environ = {"REDISGATE_TLS_CERT_FILE": str(pair.cert), "REDISGATE_TLS_KEY_FILE": str(pair.key)}
    service = HttpsService(database_urls, tmp_path / "state", "--workers", "1", **environ)
    yield service, authority
    service.stop()


def test_cookies_are_secure_and_addresses_begin_with_https(https: tuple[HttpsService, trustme.CA]) -> None:
    service, authority = https
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with TlsClient(service.port, context) as client:
        client.token = None
        person = {"email": "tls@example.com", "username": "tls", "password": "correct horse 1!"}
        assert client.post("/auth/register", person).status == 201
        signed_in = client.post("/auth/login", person)
        assert signed_in.status == 200, signed_in
        assert "; Secure" in signed_in.headers["set-cookie"]
        data = signed_in.json()["data"]
        client.token = data["token"]
        path = f"/api/organizations/{data['organization_id']}/redis-instances"
        created = client.request("POST", path, json.dumps({"name": "n", "slug": "n", "max_memory": 1 << 23}).encode())
        assert created.status == 201, created
        assert f"https://127.0.0.1:{service.port}" in json.dumps(created.json())
