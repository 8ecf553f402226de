"""TLS in the gateway itself: certificates by name, taken anew when their files change, and connections that use them.

The port speaks TLS 1.2 with ephemeral keys and authenticated ciphers, and TLS 1.3; nothing older. The first certificate
is for whoever names no host; each of the others is for the names it carries: so instances' domains get theirs.

Connections are accepted here and not by the event loop's server: so those whose handshake is not done count against
`max_connections` too, and who speaks plain HTTP to this port is told so.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509

from redisgate.config import ConfigError, Settings
from redisgate.http_protocol import HttpServer

CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2, in OpenSSL's words; those of TLS 1.3 are all good."""
RELOAD_SECONDS: Final = 1.0
"""Between two looks at the files of certificates and keys."""
ACCEPTS_PER_TURN: Final = 64
"""Connections that are accepted before others have their turn."""
ACCEPT_RETRY_SECONDS: Final = 0.5
"""Nothing is accepted for so long after the process has run out of file descriptors."""
SHUTDOWN_SECONDS: Final = 2.0
"""A client has to answer that the connection ends."""
DRAIN_SECONDS: Final = 0.5
"""Handshakes under way have to finish when a worker stops."""

_HANDSHAKE = 0x16
"""The first byte that a TLS client sends."""
_PLAIN_BODY = b'{"error":"ERR this port speaks HTTPS: begin the address with https://"}'
_PLAIN_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
    % (len(_PLAIN_BODY), _PLAIN_BODY)
)
_PLAIN_REQUEST_BYTES = 64 * 1024
# What a process has too many of; as asyncio's own servers have it.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """A certificate (with its chain) and its key, as files in PEM."""

    cert: Path
    key: Path


def pairs(settings: Settings) -> list[Pair]:
    """Those that the settings name. Raises ConfigError."""
    certs, keys = settings.tls_cert_file, settings.tls_key_file
    if len(certs) != len(keys):
        raise ConfigError(
            f"tls_cert_file names {len(certs)} files and tls_key_file {len(keys)}; each certificate has its own key,"
            " in the same order"
        )
    return [Pair(Path(cert), Path(key)) for cert, key in zip(certs, keys, strict=True)]


def read_certificate(path: Path) -> list[x509.Certificate]:
    """A server's certificate and, behind it, what certifies it. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"tls_cert_file: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"tls_cert_file: {path} holds no certificate in PEM (-----BEGIN CERTIFICATE-----)") from error


def names_of(certificate: x509.Certificate) -> list[str]:
    """The host names and addresses that a certificate is good for, in lower case; wildcards as `*.example.com`."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    found = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    return found + [str(address) for address in names.get_values_for_type(x509.IPAddress)]


def covers(names: Sequence[str], host: str) -> bool:
    """Whether a certificate with these names is good for `host`; a wildcard stands for one label (RFC 9525)."""
    host = host.lower().rstrip(".")
    return host in names or f"*.{host.partition('.')[2]}" in names


def load_context(files: Sequence[Pair]) -> ssl.SSLContext:
    """What connections are made with: the first certificate, and the others for clients that name their hosts.

    Raises:
        ConfigError: a file cannot be used.
    """
    contexts = [_context(pair) for pair in files]
    by_name: dict[str, ssl.SSLContext] = {}
    for pair, context in zip(files, contexts, strict=True):
        for name in names_of(read_certificate(pair.cert)[0]):
            by_name.setdefault(name, context)
    first = contexts[0]

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        if name is not None:
            name = name.lower()
            found = by_name.get(name) or by_name.get(f"*.{name.partition('.')[2]}")
            if found is not None and found is not first:
                connection.context = found

    if len(contexts) > 1:
        first.sni_callback = choose
    return first


def _context(pair: Pair) -> ssl.SSLContext:
    read_certificate(pair.cert)  # which says better what is wrong with it
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(pair.cert, pair.key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"tls_key_file: {pair.key} is not the key of {pair.cert}") from error
        if error.reason in ("EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
            raise ConfigError(
                f"tls_cert_file: {pair.cert} is too weak for TLS today; have one made with a key of 2,048 bits or more"
            ) from error
        raise ConfigError(f"tls_key_file: {pair.key} holds no private key in PEM") from error
    except OSError as error:
        raise ConfigError(f"tls_key_file: cannot read {pair.key}: {error.strerror}") from error
    return context


def _no_password() -> str:
    # Without this OpenSSL would ask at the terminal, and the gateway would wait there.
    raise ConfigError("tls_key_file: the key is encrypted, and there is nobody to type a password: decrypt it first")


class Certificates:
    """The context for new connections; a changed file is taken up within `RELOAD_SECONDS`, one that is wrong is not."""

    def __init__(self, files: Sequence[Pair]) -> None:
        """Raises ConfigError."""
        self._files = files
        self._signature = self._look()
        self._suspect: object = None
        self.context = load_context(files)
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Begin to look at the files."""
        self._timer = asyncio.get_running_loop().call_later(RELOAD_SECONDS, self._check)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        self.watch()
        signature = self._look()
        if signature == self._signature:
            return
        try:
            self.context = load_context(self._files)
        except ConfigError as error:
            # Between two looks: whoever replaces both files may have replaced one so far.
            if signature == self._suspect:
                self._signature = signature
                log.error("the changed certificate is not taken, the one of before stays: %s", error)
            self._suspect = signature
        else:
            self._signature = signature
            log.info("took up the changed certificates")

    def _look(self) -> list[tuple[int, int, int] | None]:
        found: list[tuple[int, int, int] | None] = []
        for path in [path for pair in self._files for path in (pair.cert, pair.key)]:
            try:
                stat = os.stat(path)
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return found


class TlsListener:
    """Accepts the connections of one socket, does their handshakes, and hands them to the HTTP server."""

    def __init__(self, sock: socket.socket, certificates: Certificates, http: HttpServer) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._certificates = certificates
        self._http = http
        self._handshakes: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to accept."""
        self._loop.add_reader(self._socket.fileno(), self._accept)

    async def stop(self) -> None:
        """Accept no more; what is in the middle of its handshake may finish it, `DRAIN_SECONDS` long."""
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        if self._handshakes:
            _, late = await asyncio.wait(self._handshakes, timeout=DRAIN_SECONDS)
            for task in late:
                task.cancel()

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                log.error("cannot accept connections: %s", error.strerror)
                self._loop.remove_reader(self._socket.fileno())
                self._loop.call_later(ACCEPT_RETRY_SECONDS, self._start_again)
                return
            connection.setblocking(False)
            if len(self._handshakes) + len(self._http.connections) >= self._http.limits.max_connections:
                self._http.counters.refused_connections += 1
                connection.close()
                continue
            task = self._loop.create_task(self._serve(connection))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    def _start_again(self) -> None:
        if self._socket.fileno() >= 0:
            self.start()

    async def _serve(self, connection: socket.socket) -> None:
        """The handshake; from its end on the HTTP connection lives by itself."""
        until = time.monotonic() + self._http.limits.header_timeout
        try:
            async with asyncio.timeout(until - time.monotonic()):
                first = await self._first_byte(connection)
            if first != _HANDSHAKE:
                if 0x41 <= first <= 0x5A:  # the method of a request
                    _answer_plainly(connection)
                connection.close()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                self._http.protocol,
                connection,
                ssl=self._certificates.context,
                ssl_handshake_timeout=max(0.1, until - time.monotonic()),
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            log.debug("a TLS handshake failed: %s", error)
            connection.close()
        except BaseException:
            connection.close()
            raise

    async def _first_byte(self, connection: socket.socket) -> int:
        """What the client begins with, left where it is; -1 if it leaves."""
        while True:
            try:
                data = connection.recv(1, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                await _readable(self._loop, connection)
            else:
                return data[0] if data else -1


def _answer_plainly(connection: socket.socket) -> None:
    """Say to a client of plain HTTP what it should do."""
    with contextlib.suppress(OSError):
        connection.send(_PLAIN_ANSWER)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(_PLAIN_REQUEST_BYTES)  # what is left unread would reset the connection, and lose the answer


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection.fileno(), _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())


def _wake(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
