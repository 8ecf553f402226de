"""Which addresses an external Redis may have: resolve, check, pin.

Whoever registers an external instance makes the gateway connect to an address of their choice. So a name is resolved
once, every address that it has must be one that may be reached, and the address that was checked is the one that is
connected to from then on; another answer of the name server is checked again before it counts. The same goes for the
address in a MOVED or ASK reply.

What surprised us: IPv6 can carry an IPv4 address inside (mapped, 6to4, NAT64, Teredo), and inet_aton's spellings such
as 0x7f.1 or 2130706433 are resolved like any other name. So it is the address that is judged, never its spelling.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeAlias

RESOLVE_SECONDS: Final = 3.0
"""For a name server to answer."""
MAX_ADDRESSES: Final = 16
"""Addresses of one name that are looked at; a name with more is refused."""

IPAddress: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
IPNetwork: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"

# Where clouds tell a machine its secrets. Some of them are not link-local.
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in ("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
)
_NAT64 = tuple(ipaddress.IPv6Network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48"))
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_SITE_LOCAL = ipaddress.IPv6Network("fec0::/10")
_REDIRECT = re.compile(rb"-?(?:MOVED|ASK) \d{1,5} (\S*):(\d{1,5})(?:\r\n)?")

# Name servers may be slow; they must not hold up what else the loop's own executor does.
_resolvers = ThreadPoolExecutor(32, "resolve")


class AddressRefused(Exception):
    """An address that must not be reached, or a name that has none. The text is for whoever asked for it."""


@dataclass(frozen=True)
class Checked:
    """An address that may be connected to: as it was checked, not as it was named."""

    address: str
    port: int


class AddressPolicy:
    """What external instances may reach."""

    __slots__ = ("_allow_private", "_allowed", "_own")

    def __init__(
        self, *, allow_private: bool = False, allowed: Sequence[str] = (), own: Iterable[tuple[str, int]] = ()
    ) -> None:
        """Set the rules.

        Args:
            allow_private: whether private addresses may be reached (never loopback, link-local or metadata).
            allowed: networks in CIDR notation that may be reached though they are private or loopback.
            own: hosts and ports of the gateway's own services, which may not be reached however they are named.
        """
        self._allow_private = allow_private
        self._allowed: tuple[IPNetwork, ...] = tuple(ipaddress.ip_network(text) for text in allowed)
        self._own = tuple(own)

    async def check(self, host: str, port: int) -> list[Checked]:
        """The addresses of a host, every one of them allowed; at least one.

        Raises:
            AddressRefused: one of them is not, or there is none.
        """
        found = await resolve(host, port)
        for address in found:
            problem = self.problem(address)
            if problem is not None:
                what = "is" if _is_literal(host) else "has"
                raise AddressRefused(f"{host} {what} {problem}, which external instances may not have")
        if await self._is_own(found, port):
            raise AddressRefused(f"{host}:{port} is one of the gateway's own services")
        return [Checked(str(address), port) for address in found]

    async def check_redirect(self, reply: bytes, origin: Checked) -> list[Checked]:
        """Where a MOVED or ASK error reply of `origin` points to, if that may be reached.

        Raises:
            AddressRefused: it may not, or the reply is neither.
        """
        match = _REDIRECT.fullmatch(reply)
        if match is None:
            raise AddressRefused("this reply points to no other server")
        host = match[1].decode("ascii", "replace").strip("[]") or origin.address
        return await self.check(host, int(match[2]))

    def problem(self, address: IPAddress) -> str | None:
        """What is wrong with an address, as "a private address"; None if it may be reached."""
        for inner in _embedded(address):
            problem = self.problem(inner)
            if problem is not None:
                return problem
        if address in _METADATA:
            return "the address of a cloud's metadata service"
        if address.is_unspecified:
            return "the unspecified address"
        if address.is_link_local:
            return "a link-local address"
        if address.is_multicast:
            return "a multicast address"
        if any(address in network for network in self._allowed):
            return None
        if address.is_loopback:
            return "a loopback address"
        if isinstance(address, ipaddress.IPv6Address) and any(address in network for network in _NAT64):
            return None  # what it carries has been judged
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            return None
        if _is_private(address):
            return None if self._allow_private else "a private address"
        if not address.is_global or address.is_reserved:
            return "a reserved address"
        return None

    async def _is_own(self, addresses: Sequence[IPAddress], port: int) -> bool:
        for own_host, own_port in self._own:
            if own_port != port:
                continue
            if not own_host or own_host in ("0.0.0.0", "::"):
                own: list[IPAddress] = []
                everywhere = True
            else:
                try:
                    own = await resolve(own_host, own_port)
                except AddressRefused as error:
                    raise AddressRefused("it cannot be told now whether this is one of the gateway's own") from error
                everywhere = any(_is_of_this_machine(address) for address in own)
            for address in addresses:
                plain = _plain(address)
                if plain in [_plain(other) for other in own] or (everywhere and _is_of_this_machine(plain)):
                    return True
        return False


async def resolve(host: str, port: int) -> list[IPAddress]:
    """The addresses of a host, in the order in which they should be tried.

    Raises:
        AddressRefused: it has none, too many, or no name server answers in time.
    """
    loop = asyncio.get_running_loop()
    try:
        name = host.encode("idna").decode() if not host.isascii() else host
        async with asyncio.timeout(RESOLVE_SECONDS):
            found = await loop.run_in_executor(
                _resolvers, lambda: socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            )
    except TimeoutError:
        raise AddressRefused(f"no name server told the address of {host} within {RESOLVE_SECONDS:g} s") from None
    except (OSError, UnicodeError, ValueError):
        raise AddressRefused(f"there is no host {host}") from None
    addresses = list(dict.fromkeys(ipaddress.ip_address(info[4][0]) for info in found))
    if not addresses:
        raise AddressRefused(f"there is no host {host}")
    if len(addresses) > MAX_ADDRESSES:
        raise AddressRefused(f"{host} has more than {MAX_ADDRESSES} addresses")
    return addresses


def _embedded(address: IPAddress) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if (address in _COMPATIBLE and int(address) > 1) or any(address in network for network in _NAT64):
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in inner if each is not None]


def _is_private(address: IPAddress) -> bool:
    # Shared address space (100.64.0.0/10) is neither private nor global to `ipaddress`.
    shared = isinstance(address, ipaddress.IPv4Address) and address in ipaddress.IPv4Network("100.64.0.0/10")
    site_local = isinstance(address, ipaddress.IPv6Address) and address in _SITE_LOCAL
    return (address.is_private and not address.is_reserved) or shared or site_local


def _plain(address: IPAddress) -> IPAddress:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_of_this_machine(address: IPAddress) -> bool:
    """Whether an interface of this machine has the address: only then can a socket be bound to it."""
    if address.is_loopback:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((str(address), 0))
        return True
    return False


def _is_literal(host: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False
