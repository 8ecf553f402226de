"""Redis URLs."""

import pytest

from resp.address import Address, parse_url


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", Address(host="h")),
        ("redis://h:6380/4", Address(host="h", port=6380, database=4)),
        ("redis://h?db=4", Address(host="h", database=4)),
        ("redis://:p%40ss@h", Address(host="h", password="p@ss")),
        ("redis://me:p@h", Address(host="h", username="me", password="p")),
        ("REDISS://h", Address(host="h", tls=True)),
        ("redis://[::1]:7000", Address(host="::1", port=7000)),
        ("unix:///run/redis.sock", Address(path="/run/redis.sock")),
        ("unix://me:p@/run/redis.sock?db=2", Address(path="/run/redis.sock", username="me", password="p", database=2)),
        ("redis+unix:///a%20b", Address(path="/a b")),
    ],
)
def test_understood(url: str, address: Address) -> None:
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        *["", "h:6379", "http://h", "redis://", "redis://h:x", "redis://h:99999", "redis://h/x", "redis://h/-1"],
        *["redis://h?timeout=3", "unix://", "unix:///s?db=x", "redis://h/٣"],
    ],
)
def test_refused_with_a_reason(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_url(url)


def test_text_forms_show_no_password() -> None:
    address = parse_url("rediss://me:hidden@h:1/2")
    assert address.display == str(address) == "rediss://h:1/2"
    assert "hidden" not in repr(address)
    assert parse_url("redis://:hidden@[::1]").display == "redis://[::1]:6379/0"
    assert parse_url("unix://:hidden@/s").display == "unix:///s?db=0"
