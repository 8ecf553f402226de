"""External instances: an existing Redis, looked at over TCP and TLS, pinned to the address that was checked."""

import asyncio
import contextlib
import dataclasses
import datetime
import ipaddress
import ssl
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from control import addresses
from control.addresses import AddressPolicy
from control.provisioners import Found, ProvisionError, Spec
from control.provisioners.external import ExternalProvisioner, Login, displayed, endpoint_address
from tests.servers import RedisServer, free_port, needs_redis_7

LOOPBACK = AddressPolicy(allowed=("127.0.0.0/8", "::1/128"))


@pytest.fixture
def external() -> ExternalProvisioner:
    return ExternalProvisioner(LOOPBACK)


@pytest.fixture(scope="module")
def guarded() -> Iterator[RedisServer]:
    """A Redis with a password and users of different rights."""
    server = RedisServer("--requirepass", "secret", "--databases", "4")
    for rules in (
        "reader on >pw ~* &* +@all -@write",
        "narrow on >pw ~app:* &* +@all",
        "blind on >pw ~* &* +@all -info -multi -exec",
    ):
        answer = server.raw(f"AUTH secret\r\nACL SETUSER {rules}\r\n".encode(), 10)
        assert answer == b"+OK\r\n+OK\r\n", answer
    yield server
    server.stop()


def spec_of(found: Found, login: Login, **changes: Any) -> Spec:
    spec = Spec(
        id=uuid.uuid4(),
        max_memory=0,
        redis_version=None,
        persistence=True,
        backup=False,
        eviction="noeviction",
        user=login.user,
        password=login.password,
        endpoint=found.endpoint,
    )
    return dataclasses.replace(spec, **changes)


async def test_a_redis_is_registered_with_its_version_and_its_login(
    external: ExternalProvisioner, guarded: RedisServer
) -> None:
    found, login = await external.register(f"redis://:secret@localhost:{guarded.port}/3", None)
    assert (login.user, login.password) == (None, "secret")
    assert found.redis_version
    assert found.warning is None
    assert found.endpoint == {
        "host": "127.0.0.1",
        "port": guarded.port,
        "tls": False,
        "server_name": None,
        "db": 3,
        "name": "localhost",
    }
    spec = spec_of(found, login)
    assert await external.alive(spec) is None
    assert (await external.ensure(spec)).endpoint == found.endpoint
    assert "secret" not in displayed(f"redis://:secret@localhost:{guarded.port}/3")
    assert "secret" not in repr((found, login, spec))


@pytest.mark.parametrize(
    ("user", "note"),
    [("reader", "may not write"), ("narrow", "may not read every key"), ("blind", "may not run INFO")],
)
async def test_what_a_user_may_not_do_is_said(
    external: ExternalProvisioner, guarded: RedisServer, user: str, note: str
) -> None:
    found, login = await external.register(f"redis://{user}:pw@localhost:{guarded.port}", None)
    assert login.user == user
    assert found.warning is not None
    assert note in found.warning
    if user == "blind":
        assert found.redis_version is None
        assert "transactions will be refused" in found.warning


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://localhost:{port}", "wants a password"),
        ("redis://:wrong@localhost:{port}", "AUTH was refused: WRONGPASS"),
        ("redis://nobody:pw@localhost:{port}", "AUTH was refused: WRONGPASS"),
        ("redis://:secret@localhost:{port}/4", "SELECT was refused"),
        ("redis://:secret@localhost:{closed}", "cannot be reached"),
        ("rediss://:secret@localhost:{port}", "TLS failed|cannot be reached"),
        ("redis://:secret@no-such-host.invalid:{port}", "there is no host"),
        ("redis://:secret@exa\u2100mple.com", "this is no URL such as redis:"),
        ("redis://:secret@[::1", "this is no URL such as redis:"),
        ("redis://:secret@localhost:99999", "port is not a number"),
        ("redis://:secret@localhost/x", "database is a number"),
    ],
)
async def test_a_redis_that_cannot_be_used_is_refused_with_the_reason(
    external: ExternalProvisioner, guarded: RedisServer, url: str, reason: str
) -> None:
    with pytest.raises(ProvisionError, match=reason) as refused:
        await external.register(url.format(port=guarded.port, closed=free_port()), None)
    assert "secret" not in str(refused.value)
    assert "127.0.0.1" not in str(refused.value)


async def test_loopback_is_refused_unless_it_is_allowed(guarded: RedisServer) -> None:
    for policy in (AddressPolicy(), AddressPolicy(allow_private=True)):
        with pytest.raises(ProvisionError, match="loopback"):
            await ExternalProvisioner(policy).register(f"redis://:secret@localhost:{guarded.port}", None)
    own = AddressPolicy(allowed=("127.0.0.0/8",), own=(("127.0.0.1", guarded.port),))
    with pytest.raises(ProvisionError, match="own services"):
        await ExternalProvisioner(own).register(f"redis://:secret@127.0.0.1:{guarded.port}", None)


async def test_another_version_than_asked_for_is_refused(external: ExternalProvisioner, guarded: RedisServer) -> None:
    url = f"redis://:secret@localhost:{guarded.port}"
    found, _ = await external.register(url, None)
    assert found.redis_version is not None
    await external.register(url, ".".join(found.redis_version.split(".")[:2]))
    with pytest.raises(ProvisionError, match=r"not 5\.9"):
        await external.register(url, "5.9")


async def test_something_that_is_no_redis_is_refused(external: ExternalProvisioner) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(ProvisionError, match="cannot be reached"):
            await external.register(f"redis://localhost:{port}", None)


@needs_redis_7
async def test_a_cluster_node_is_refused_since_slots_are_not_followed(external: ExternalProvisioner) -> None:
    node = RedisServer("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    try:
        with pytest.raises(ProvisionError, match="Redis Cluster"):
            await external.register(node.url, None)
    finally:
        node.stop()


async def test_a_name_that_moves_is_checked_again_before_it_is_followed(
    external: ExternalProvisioner, guarded: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a name server of the attacker's would do it: first one address, then another."""
    answers = {"redis.example.com": "127.0.0.1"}

    async def resolve(host: str, port: int) -> list[addresses.IPAddress]:
        return [ipaddress.ip_address(answers.get(host, host))]

    monkeypatch.setattr(addresses, "resolve", resolve)
    found, login = await external.register(f"redis://:secret@redis.example.com:{guarded.port}", None)
    assert found.endpoint["host"] == "127.0.0.1"
    # As long as the checked address answers, nobody asks where the name leads.
    answers["redis.example.com"] = "169.254.169.254"
    spec = spec_of(found, login)
    assert (await external.ensure(spec)).endpoint == found.endpoint
    gone = dict(found.endpoint, host="127.0.0.99", port=free_port())
    with pytest.raises(ProvisionError, match="metadata"):
        await external.ensure(dataclasses.replace(spec, endpoint=gone))
    moved = dict(found.endpoint, host="127.0.0.99")
    answers["redis.example.com"] = "127.0.0.1"
    assert (await external.ensure(dataclasses.replace(spec, endpoint=moved))).endpoint["host"] == "127.0.0.1"


async def test_one_that_is_away_says_so_and_is_well_when_it_is_back(external: ExternalProvisioner) -> None:
    server = RedisServer()
    found, login = await external.register(server.url, None)
    spec = spec_of(found, login)
    server.kill()
    assert await external.alive(spec) == "it cannot be reached: no Redis answers at this host and port"
    with pytest.raises(ProvisionError, match="cannot be reached") as away:
        await external.ensure(spec)
    assert not away.value.permanent
    server.start()
    assert await external.alive(spec) is None
    server.stop()


# TLS


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for a host name, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / f"{name}.crt", folder / f"{name}.key"
    certificate_file.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file


async def test_tls_verifies_the_name_although_the_address_is_pinned(
    external: ExternalProvisioner, guarded: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate_file, key_file = certificate(tmp_path, "localhost")
    port = free_port()
    server = RedisServer(
        *("--tls-port", str(port), "--tls-cert-file", str(certificate_file), "--tls-key-file", str(key_file)),
        *("--tls-ca-cert-file", str(certificate_file), "--tls-auth-clients", "no"),
    )
    try:
        with pytest.raises(ProvisionError, match="TLS failed"):
            await external.register(f"rediss://localhost:{port}", None)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate_file))
        assert ssl.get_default_verify_paths().cafile == str(certificate_file)
        found, login = await external.register(f"rediss://localhost:{port}", None)
        assert (found.endpoint["host"], found.endpoint["server_name"]) == ("127.0.0.1", "localhost")
        address = endpoint_address(found.endpoint, login.user, login.password)
        assert (address.host, address.server_name, address.tls) == ("127.0.0.1", "localhost", True)
        with pytest.raises(ProvisionError, match="TLS failed"):
            await external.register(f"rediss://127.0.0.1:{port}", None)
    finally:
        server.stop()
