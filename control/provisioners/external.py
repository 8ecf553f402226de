"""Instances that are somebody else's Redis: looked at when they are registered, and again and again.

The address that was checked is the one that is used (`control.addresses`). When it no longer answers, the name is
resolved anew, since hosted services move, and the new address is checked before it counts.
"""

import asyncio
import dataclasses
import re
import secrets
from typing import Any, Final

from control.addresses import AddressPolicy, AddressRefused
from control.provisioners import Found, ProvisionError, Spec, version_matches
from resp.address import Address, parse_url
from resp.connection import Connection, connect
from resp.errors import ConnectFailed, ReplyLost, RespError
from resp.info import ask, parse_info, server_version
from resp.parser import ErrorReply

_VERSION = re.compile(r"\d{1,4}(?:\.\d{1,6}){0,3}", re.ASCII)
CONNECT_SECONDS: Final = 3.0
ANSWER_SECONDS: Final = 3.0
EXAMINE_SECONDS: Final = 10.0
"""For all the addresses of a name together."""
MAX_URL: Final = 2000
"""Characters of a URL."""
MAX_EXAMINED_AT_ONCE: Final = 8
"""External servers that one process looks at side by side; more wait."""


@dataclasses.dataclass(frozen=True)
class Login:
    """What a URL says beside the address."""

    user: str | None
    password: str | None = dataclasses.field(repr=False)


class ExternalProvisioner:
    """Looks at servers that are not ours; starts and stops nothing."""

    def __init__(self, policy: AddressPolicy) -> None:
        self._policy = policy
        self._turns = asyncio.Semaphore(MAX_EXAMINED_AT_ONCE)

    async def register(self, url: str, redis_version: str | None) -> tuple[Found, Login]:
        """Look at the server that a URL names, as somebody registers it.

        Raises:
            ProvisionError: the URL is wrong, its address must not be reached, or it is no usable Redis.
        """
        address = parse(url)
        found = await self._examine(address, redis_version)
        return found, Login(address.username, address.password)

    async def ensure(self, spec: Spec) -> Found:
        """See `Provisioner.ensure`: it answers at the address that is recorded, or at one that its name has now."""
        address = self._recorded(spec)
        name = str((spec.endpoint or {}).get("name", address.host))
        try:
            async with self._turns:
                return await self._look(address, name, spec.redis_version)
        except ProvisionError as gone:
            if gone.permanent:
                raise
        return await self._examine(dataclasses.replace(address, host=name, server_name=None), spec.redis_version)

    async def alive(self, spec: Spec) -> str | None:
        """See `Provisioner.alive`."""
        try:
            async with self._turns:
                connection = await connect(self._recorded(spec), timeout=CONNECT_SECONDS)
        except ConnectFailed as error:
            return _public(error)
        connection.close(ReplyLost("done"))
        return None

    async def stop(self, spec: Spec) -> None:
        """Nothing of it is ours to stop: the gateways stop using it."""

    async def destroy(self, spec: Spec) -> None:
        """Nothing of it is ours to remove."""

    def _recorded(self, spec: Spec) -> Address:
        if spec.endpoint is None:
            raise ProvisionError("nothing is known of where it is", permanent=True)
        return endpoint_address(spec.endpoint, spec.user, spec.password)

    async def _examine(self, address: Address, redis_version: str | None) -> Found:
        """Look at each address that a name has, until one answers."""
        async with self._turns:
            try:
                async with asyncio.timeout(EXAMINE_SECONDS):
                    return await self._examine_each(address, redis_version)
            except TimeoutError:
                raise ProvisionError(f"it cannot be reached: no answer within {EXAMINE_SECONDS:g} s") from None

    async def _examine_each(self, address: Address, redis_version: str | None) -> Found:
        name = address.host
        failed: ProvisionError | None = None
        try:
            checked = await self._policy.check(name, address.port)
        except AddressRefused as error:
            raise ProvisionError(str(error), permanent=True) from error
        for each in checked:
            server_name = name if address.tls else None
            pinned = dataclasses.replace(address, host=each.address, server_name=server_name)
            try:
                return await self._look(pinned, name, redis_version)
            except ProvisionError as error:
                if error.permanent:
                    raise
                failed = error
        assert failed is not None
        raise failed

    async def _look(self, address: Address, name: str, redis_version: str | None) -> Found:
        """Whether a Redis answers at this very address, and which."""
        try:
            connection = await connect(address, timeout=CONNECT_SECONDS)
        except ConnectFailed as error:
            raise ProvisionError(_public(error), permanent="was refused" in error.detail) from error
        try:
            facts, notes = await _examine_connection(connection)
        finally:
            connection.close(ReplyLost("done"))
        said = _VERSION.match(server_version(facts) or "")
        version = said[0] if said is not None else None
        if version is not None and not version_matches(redis_version, version):
            raise ProvisionError(f"it runs Redis {version}, not {redis_version}", permanent=True)
        endpoint: dict[str, Any] = {
            "host": address.host,
            "port": address.port,
            "tls": address.tls,
            "server_name": address.server_name,
            "db": address.database,
            "name": name,
        }
        return Found(endpoint, version, warning="; ".join(notes) or None)


def parse(url: str) -> Address:
    """The address that a URL names.

    Raises:
        ProvisionError: it names none that an external instance may have.
    """
    if len(url) > MAX_URL:
        raise ProvisionError(f"a URL has at most {MAX_URL} characters", permanent=True)
    try:
        address = parse_url(url)
        (address.username or "").encode(), (address.password or "").encode()
    except ValueError as error:
        # Python's own messages repeat what stands before the "@".
        text = "the URL cannot be read" if isinstance(error, UnicodeError) or "netloc" in str(error) else str(error)
        raise ProvisionError(text, permanent=True) from None
    if address.path is not None:
        raise ProvisionError("an external Redis is reached by redis:// or rediss://, not by a socket", permanent=True)
    if address.username is not None and address.password is None:
        raise ProvisionError("the URL names a user without a password", permanent=True)
    return address


def endpoint_address(endpoint: Any, user: str | None, password: str | None) -> Address:
    """An instance's `endpoint` as an address to connect to, for every provisioner."""
    if "unix" in endpoint:
        return Address(path=str(endpoint["unix"]), username=user, password=password)
    return Address(
        host=str(endpoint["host"]),
        port=int(endpoint["port"]),
        tls=bool(endpoint.get("tls")),
        server_name=endpoint.get("server_name"),
        username=user,
        password=password,
        database=int(endpoint.get("db") or 0),
    )


async def _examine_connection(connection: Connection) -> tuple[dict[str, str], list[str]]:
    """What INFO says, and what the owner should know of what this user may do there."""
    # Nothing is written: there is no such key, and XX sets only what exists.
    key = f"redisgate:{secrets.token_hex(8)}"
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            info, read, written = await ask(connection, ["INFO"], ["GET", key], ["SET", key, "1", "XX"])
    except (TimeoutError, RespError) as error:
        raise ProvisionError("it accepts the login but does not answer") from error
    facts = parse_info(info)
    if facts.get("cluster_enabled") == "1":
        raise ProvisionError(
            "it is a node of a Redis Cluster, and the gateway does not follow slots to other nodes; register a Redis"
            " that is not clustered",
            permanent=True,
        )
    if facts.get("redis_mode") == "sentinel":
        raise ProvisionError("it is a Sentinel, which keeps no data; register the Redis it watches", permanent=True)
    notes = []
    if not facts:
        notes.append("this user may not run INFO, so its version is not known")
    if isinstance(read, ErrorReply):
        notes.append(f"this user may not read every key: {_error(read)}")
    if facts.get("role") == "slave" or (isinstance(written, ErrorReply) and written.startswith("READONLY")):
        notes.append("it is a replica: writes will be refused")
    elif isinstance(written, ErrorReply):
        notes.append(f"this user may not write every key: {_error(written)}")
    if not connection.transactions:
        notes.append("this user may not run MULTI and EXEC: transactions will be refused")
    return facts, notes


def _error(reply: str) -> str:
    return "".join(character for character in reply[:100] if character.isprintable())


def _public(error: ConnectFailed) -> str:
    """Why a connection failed, without the address it was pinned to."""
    detail = error.detail
    for word in ("AUTH", "SELECT"):
        if f"{word} was refused: " in detail:
            return f"{word} was refused: {_error(detail.partition(' was refused: ')[2])}"
    if "NOAUTH" in detail:
        return "it wants a password: redis://user:password@host:port"
    if "LOADING" in detail:
        return "it is loading its data; try again in a moment"
    cause = error.cause
    if type(cause).__name__ in ("SSLError", "SSLCertVerificationError", "CertificateError"):
        return (
            f"TLS failed: {getattr(cause, 'verify_message', None) or getattr(cause, 'reason', None) or 'no agreement'}"
        )
    return "it cannot be reached: no Redis answers at this host and port"


def displayed(url: str) -> str:
    """A URL without its credentials. Raises ProvisionError."""
    return parse(url).display
