"""TLS in the gateway: which certificate a client gets, what is spoken, and what happens when the files change."""

import contextlib
import dataclasses
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from redisgate import tls
from redisgate.config import ConfigError, Settings
from tests.http import Client
from tests.servers import Gateway, RedisServer, single_instance, wait_for

NAMES = ("gate.test", "*.instances.test")
BIG = 3_000_000
"""Bytes of a value that no buffer on the way holds at once."""


def write_pair(authority: trustme.CA, folder: Path, name: str, *hosts: str, **wanted: Any) -> tls.Pair:
    """A certificate for these hosts and its key; replaces those of the same name as a careful operator does."""
    made = authority.issue_cert(*hosts, **wanted)
    pair = tls.Pair(folder / f"{name}.pem", folder / f"{name}.key")
    for path, text in (
        (pair.cert, b"".join(pem.bytes() for pem in made.cert_chain_pems)),
        (pair.key, made.private_key_pem.bytes()),
    ):
        new = path.with_suffix(".new")
        new.write_bytes(text)
        new.chmod(0o600)
        new.rename(path)
    return pair


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """A client that believes the authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


class TlsClient(Client):
    """A keep-alive connection by TLS."""

    def __init__(self, port: int, context: ssl.SSLContext, name: str | None = NAMES[0], token: str = "token") -> None:
        super().__init__(port, token)
        self.file.close()
        self.tls = context.wrap_socket(self.sock, server_hostname=name)
        self.sock = self.tls
        self.file = self.tls.makefile("rb")

    @property
    def names(self) -> set[str]:
        """Of the certificate that the server showed."""
        certificate: Any = self.tls.getpeercert()
        return {name for _, name in certificate["subjectAltName"]}

    @property
    def serial(self) -> Any:
        certificate: Any = self.tls.getpeercert()
        return certificate["serialNumber"]


class TlsGateway(Gateway):
    """A gateway whose port speaks HTTPS."""

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log()
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with contextlib.suppress(OSError), TlsClient(self.port, context) as client:
            return client.get("/health/ready").status == 200
        return False


@dataclasses.dataclass
class Served:
    gateway: TlsGateway
    folder: Path


@pytest.fixture(scope="module")
def served(
    authority: trustme.CA, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Two workers, two certificates."""
    folder = tmp_path_factory.mktemp("certificates")
    pairs = [write_pair(authority, folder, f"c{index}", name) for index, name in enumerate(NAMES)]
    environ = {
        "REDISGATE_TLS_CERT_FILE": ",".join(str(pair.cert) for pair in pairs),
        "REDISGATE_TLS_KEY_FILE": ",".join(str(pair.key) for pair in pairs),
        "REDISGATE_HEADER_TIMEOUT": "1s",
    }
    gateway = TlsGateway(single_instance(redis_server, **environ), ["--workers", "2"])
    yield Served(gateway, folder)
    gateway.stop()


def test_commands_and_big_values_pass(served: Served, trusting: ssl.SSLContext) -> None:
    with TlsClient(served.gateway.port, trusting) as client:
        for number in range(3):
            assert client.command("SET", "tls", number).result == "OK"
            assert client.get("/get/tls").result == str(number)
        assert client.command("SET", "tls-big", "x" * BIG).result == "OK"
        assert client.get("/get/tls-big").result == "x" * BIG
        assert client.command("DEL", "tls-big", "tls").result == 2
    assert "listening on https://" in served.gateway.log()


def test_pipelined_requests_stay_in_order(served: Served, trusting: ssl.SSLContext) -> None:
    with TlsClient(served.gateway.port, trusting) as client:
        for number in range(30):
            client.send("GET", f"/echo/{number}")
        assert [client.read().result for _ in range(30)] == [str(number) for number in range(30)]


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("gate.test", NAMES[0]),
        ("orders-x7k2.instances.test", NAMES[1]),
        ("ORDERS-X7K2.INSTANCES.TEST", NAMES[1]),
        ("a.b.instances.test", NAMES[0]),
        ("elsewhere.test", NAMES[0]),
        (None, NAMES[0]),
    ],
    ids=["first", "wildcard", "capitals", "two-labels", "unknown", "no-name"],
)
def test_the_name_decides_on_the_certificate(
    served: Served, authority: trustme.CA, asked: str | None, shown: str
) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.check_hostname = False
    with TlsClient(served.gateway.port, context, asked) as client:
        assert client.names == {shown}
        assert client.get("/ping").result == "PONG"


@pytest.mark.parametrize(
    ("version", "ciphers", "taken"),
    [
        (ssl.TLSVersion.TLSv1_3, None, True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE+AESGCM", True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE+CHACHA20", True),
        (ssl.TLSVersion.TLSv1_2, "AES256-GCM-SHA384", False),  # a recorded session could be read with a stolen key
        (ssl.TLSVersion.TLSv1_2, "ECDHE-RSA-AES256-SHA384:ECDHE-ECDSA-AES256-SHA384:ECDHE+AES+SHA1", False),  # CBC
        (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0", False),
    ],
    ids=["1.3", "1.2-gcm", "1.2-chacha", "static-rsa", "cbc", "1.1"],
)
def test_only_modern_tls_is_spoken(
    served: Served, authority: trustme.CA, version: ssl.TLSVersion, ciphers: str | None, taken: bool
) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with (
        pytest.warns(DeprecationWarning, match="TLSv1_1")
        if version == ssl.TLSVersion.TLSv1_1
        else contextlib.nullcontext()
    ):
        context.minimum_version = context.maximum_version = version
    if ciphers:
        context.set_ciphers(ciphers)
    if taken:
        with TlsClient(served.gateway.port, context) as client:
            assert client.tls.version() == version.name.replace("_", ".")
            assert client.get("/ping").result == "PONG"
    else:
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            TlsClient(served.gateway.port, context)


def test_every_cipher_has_ephemeral_keys_and_authenticates(authority: trustme.CA, tmp_path: Path) -> None:
    context = tls.load_context([write_pair(authority, tmp_path, "c", "gate.test")])
    ciphers = context.get_ciphers()
    assert {cipher["protocol"] for cipher in ciphers} == {"TLSv1.2", "TLSv1.3"}
    assert all(cipher["aead"] and cipher["kea"] in ("kx-ecdhe", "kx-any") for cipher in ciphers), ciphers
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_plain_http_is_told_to_use_https(served: Served) -> None:
    with Client(served.gateway.port) as client:
        response = client.get("/get/x")
        assert response.status == 400
        assert "https://" in response.error
        assert client.sock.recv(1) == b""


@pytest.mark.parametrize(
    "payload", [b"", b"\x16\x03\x01", b"\x00\x01garbage"], ids=["silent", "half-a-hello", "no-tls"]
)
def test_who_does_not_finish_the_handshake_is_cut_off(served: Served, payload: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.gateway.port), timeout=10) as sock:
        sock.sendall(payload)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(100):
                pass


def test_a_client_that_leaves_in_the_middle_leaves_no_trace(served: Served, trusting: ssl.SSLContext) -> None:
    with TlsClient(served.gateway.port, trusting) as client:
        client.send("GET", "/get/x")
        with contextlib.suppress(ssl.SSLError):  # the answer may cross what is said here
            client.tls.unwrap()  # says that nothing more comes
    with TlsClient(served.gateway.port, trusting) as other:
        assert other.get("/ping").result == "PONG"
    assert "eof_received" not in served.gateway.log()


def serials(served: Served, trusting: ssl.SSLContext, name: str = NAMES[0]) -> set[Any]:
    """What a dozen new connections are shown: of both workers."""
    found = set()
    for _ in range(12):
        with TlsClient(served.gateway.port, trusting, name) as client:
            found.add(client.serial)
    return found


def test_new_files_are_taken_up_under_traffic_and_wrong_ones_are_not(
    served: Served, authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    before = serials(served, trusting)
    assert len(before) == 1
    statuses: list[int] = []
    stop = threading.Event()

    def traffic() -> None:
        while not stop.is_set():
            with TlsClient(served.gateway.port, trusting) as client:
                statuses.append(client.get("/ping").status)

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        with TlsClient(served.gateway.port, trusting) as old:
            write_pair(authority, served.folder, "c0", NAMES[0])
            wait_for(lambda: not serials(served, trusting) & before, 10, "the new certificate in every worker")
            assert old.get("/ping").result == "PONG"
        now = serials(served, trusting)
        # A key that does not fit is said, and changes nothing.
        key = served.folder / "c0.key"
        good = key.read_bytes()
        key.write_bytes(trustme.CA().issue_cert("x.test").private_key_pem.bytes())
        wait_for(lambda: served.gateway.log().count("c0.key is not the key of") >= 2, 15, "both workers to complain")
        assert serials(served, trusting) == now
        key.write_bytes(good)
        wait_for(lambda: served.gateway.log().count("took up the changed certificates") >= 4, 10, "the key to be back")
    finally:
        stop.set()
        thread.join()
    assert set(statuses) == {200}


def test_no_request_fails_while_workers_are_replaced(served: Served, trusting: ssl.SSLContext) -> None:
    before = served.gateway.log().count(" reloaded")
    statuses: list[int] = []
    served.gateway.process.send_signal(signal.SIGHUP)
    while served.gateway.log().count(" reloaded") == before:
        with TlsClient(served.gateway.port, trusting) as client:
            statuses.append(client.get("/ping").status)
    assert set(statuses) == {200}


# What is wrong with the files, before anything is started


def broken(case: str, authority: trustme.CA, folder: Path) -> Settings:
    """Settings with something wrong about their files."""
    pair = write_pair(authority, folder, "c", "gate.test")
    certs, keys = [str(pair.cert)], [str(pair.key)]
    match case:
        case "missing":
            pair.cert.unlink()
        case "missing-key":
            pair.key.unlink()
        case "no-pem":
            pair.cert.write_text("hello")
        case "key-for-certificate":
            certs = keys
        case "not-its-key":
            pair.key.write_bytes(write_pair(authority, folder, "other", "x.test").key.read_bytes())
        case "encrypted-key":
            from cryptography.hazmat.primitives import serialization

            key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
            pair.key.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.BestAvailableEncryption(b"secret"),
                )
            )
        case "no-key":
            keys = []
    return Settings(tls_cert_file=tuple(certs), tls_key_file=tuple(keys))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("missing", r"cannot read .*c\.pem: No such file"),
        ("missing-key", r"cannot read .*c\.key: No such file"),
        ("no-pem", r"c\.pem holds no certificate in PEM"),
        ("key-for-certificate", r"c\.key holds no certificate in PEM"),
        ("not-its-key", r"c\.key is not the key of .*c\.pem"),
        ("encrypted-key", r"the key is encrypted"),
        ("no-key", r"names 1 files and tls_key_file 0"),
    ],
)
def test_what_is_wrong_with_the_files_is_said(case: str, said: str, authority: trustme.CA, tmp_path: Path) -> None:
    settings = broken(case, authority, tmp_path)
    with pytest.raises(ConfigError, match=said):
        tls.load_context(tls.pairs(settings))


def test_the_gateway_does_not_start_with_an_unusable_certificate(redis_server: RedisServer, tmp_path: Path) -> None:
    environ = {"REDISGATE_TLS_CERT_FILE": str(tmp_path / "none.pem"), "REDISGATE_TLS_KEY_FILE": "none.key"}
    with pytest.raises(AssertionError, match=r"cannot read .*none\.pem"):
        TlsGateway(single_instance(redis_server, **environ))
