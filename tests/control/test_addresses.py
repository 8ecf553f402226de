"""External instances reach only addresses that were checked, however they are spelled."""

import ipaddress
import socket

import pytest

from control.addresses import AddressPolicy, AddressRefused, Checked

STRICT = AddressPolicy()


@pytest.mark.parametrize(
    ("host", "what"),
    [
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("localhost", "loopback"),
        ("0x7f.1", "loopback"),
        ("2130706433", "loopback"),
        ("127.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::7f00:1", "loopback"),
        ("2002:7f00:1::", "loopback"),
        ("::127.0.0.1", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("::", "unspecified"),
        ("10.1.2.3", "private"),
        ("172.16.0.1", "private"),
        ("192.168.1.1", "private"),
        ("100.64.1.1", "private"),
        ("fd12:3456::1", "private"),
        ("fec0::1", "private"),
        ("::ffff:10.0.0.1", "private"),
        ("64:ff9b::a00:1", "private"),
        ("169.254.1.1", "link-local"),
        ("fe80::1", "link-local"),
        ("169.254.169.254", "metadata"),
        ("100.100.100.200", "metadata"),
        ("168.63.129.16", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("::ffff:169.254.169.254", "metadata"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
    ],
)
async def test_an_address_that_must_not_be_reached_is_refused(host: str, what: str) -> None:
    with pytest.raises(AddressRefused, match=what):
        await STRICT.check(host, 6379)


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
async def test_a_public_address_is_pinned(host: str) -> None:
    (checked,) = await STRICT.check(host, 6379)
    assert ipaddress.ip_address(checked.address) == ipaddress.ip_address(host)
    assert checked.port == 6379


async def test_private_addresses_can_be_allowed_but_nothing_worse() -> None:
    policy = AddressPolicy(allow_private=True)
    assert await policy.check("10.1.2.3", 6379) == [Checked("10.1.2.3", 6379)]
    for host in ("127.0.0.1", "169.254.1.1", "169.254.169.254", "fd00:ec2::254", "100.100.100.200"):
        with pytest.raises(AddressRefused):
            await policy.check(host, 6379)


async def test_networks_can_be_allowed_but_never_the_metadata_service() -> None:
    policy = AddressPolicy(allowed=("127.0.0.0/8", "169.254.0.0/16"))
    assert await policy.check("127.0.0.1", 6379) == [Checked("127.0.0.1", 6379)]
    for host in ("10.0.0.1", "169.254.1.1", "169.254.169.254"):
        with pytest.raises(AddressRefused):
            await policy.check(host, 6379)


@pytest.mark.parametrize("own", ["127.0.0.1", "localhost", "0.0.0.0", ""])
@pytest.mark.parametrize("named", ["127.0.0.1", "127.0.0.2", "localhost"])
async def test_the_gateway_itself_is_refused_even_where_its_network_is_allowed(own: str, named: str) -> None:
    policy = AddressPolicy(allowed=("127.0.0.0/8", "::1/128"), own=((own, 3000),))
    with pytest.raises(AddressRefused, match="own services"):
        await policy.check(named, 3000)
    assert await policy.check(named, 3001)


async def test_one_bad_address_among_good_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(host: str, port: int, **options: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    with pytest.raises(AddressRefused, match=r"redis\.example\.com has a private address"):
        await STRICT.check("redis.example.com", 6379)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 300, "", "bad\0host", "\ud800"])
async def test_a_host_that_does_not_exist_is_refused(host: str) -> None:
    with pytest.raises(AddressRefused):
        await STRICT.check(host, 6379)


ORIGIN = Checked("8.8.8.8", 6379)


async def test_a_redirect_is_checked_like_any_address() -> None:
    assert await STRICT.check_redirect(b"MOVED 3999 8.8.4.4:6381", ORIGIN) == [Checked("8.8.4.4", 6381)]
    assert await STRICT.check_redirect(b"-ASK 3999 8.8.4.4:6381\r\n", ORIGIN) == [Checked("8.8.4.4", 6381)]
    # An empty host means the server that answered.
    assert await STRICT.check_redirect(b"MOVED 3999 :6381", ORIGIN) == [Checked("8.8.8.8", 6381)]
    for reply in (
        b"MOVED 3999 127.0.0.1:6379",
        b"MOVED 3999 169.254.169.254:80",
        b"MOVED 3999 [::1]:6379",
        b"MOVED 3999 ::ffff:10.0.0.1:6379",
        b"ERR something else",
        b"MOVED 3999",
    ):
        with pytest.raises(AddressRefused):
            await STRICT.check_redirect(reply, ORIGIN)
