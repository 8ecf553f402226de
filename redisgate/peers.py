"""Who speaks to us: the client's address, also behind proxies that are trusted.

A proxy appends to X-Forwarded-For the address that it was called from. So the
list is read from its end: each entry is believed as long as the one who wrote
it is trusted, and the first that is not trusted is the client. What a client
itself puts into the header stands further left and is never reached.
"""

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address, ip_address, ip_network

from redisgate.access import IpAddress, IpNetwork
from redisgate.http_head import Head
from redisgate.http_protocol import HttpConnection

_FORWARDED_FOR = re.compile(rb"\r\nx-forwarded-for:([^\r\n]*)", re.IGNORECASE)


def parse_address(text: str) -> IpAddress | None:
    """An address as it stands in X-Forwarded-For, also with a port or in brackets; None: it is none."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return plain(ip_address(text.partition("%")[0]))
    except ValueError:
        return None


def plain(address: IpAddress) -> IpAddress:
    """An IPv4 address that came over an IPv6 socket as what it is."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def behind_proxies(peer: IpAddress, forwarded: Sequence[str], trusted: Iterable[IpNetwork]) -> IpAddress | None:
    """The client of a request that came from `peer`; `forwarded` is the list in X-Forwarded-For.

    None: a trusted proxy wrote what is no address, so nobody knows.
    """
    trusted = tuple(trusted)
    client: IpAddress | None = peer
    for entry in reversed(forwarded):
        if client is None or not any(client in network for network in trusted):
            break
        client = parse_address(entry)
    return client


class Peers:
    """Tells the client's address of a request."""

    __slots__ = ("_trusted",)

    def __init__(self, trusted_proxies: Iterable[str]) -> None:
        """Networks in CIDR notation whose X-Forwarded-For is believed."""
        self._trusted = tuple(ip_network(network) for network in trusted_proxies)

    def trusts(self, connection: HttpConnection) -> bool:
        """Whether who speaks to us directly is a trusted proxy."""
        peer = self._peer(connection)
        return peer is not None and any(peer in network for network in self._trusted)

    @staticmethod
    def _peer(connection: HttpConnection) -> IpAddress | None:
        name = connection.transport.get_extra_info("peername")
        return parse_address(f"[{name[0]}]") if isinstance(name, tuple) and name else None

    def client(self, connection: HttpConnection, head: Head) -> IpAddress | None:
        """Who sent a request; None: it cannot be told."""
        peer = self._peer(connection)
        if peer is None or not self._trusted:
            return peer
        forwarded = b",".join(_FORWARDED_FOR.findall(head.start + b"\r\n" + head.tail)).decode("latin-1")
        return behind_proxies(peer, forwarded.split(",") if forwarded.strip() else [], self._trusted)
