"""What production refuses, and which keys follow from the settings."""

import dataclasses
import secrets

import pytest

from control.settings import audit_keys, check, encryption_keys, public_url, secret_keys
from redisgate.config import ConfigError, ControlSettings, Settings

GOOD = secrets.token_hex(32).encode()
PRODUCTION = Settings(
    secret_key=GOOD, secret_key_is_default=False, control=ControlSettings(database_url="postgresql://a@b/c")
)


def with_control(**changes: object) -> Settings:
    return dataclasses.replace(PRODUCTION, control=dataclasses.replace(PRODUCTION.control, **changes))


def test_a_good_secret_is_taken() -> None:
    check(PRODUCTION)
    check(with_control(encryption_keys=(GOOD.decode(),), audit_key=GOOD.decode()))


@pytest.mark.parametrize(
    "secret", [b"short", b"a" * 64, b"changeme" * 8, b"my-secret-key-of-production-0123456789", b"0123" * 16]
)
def test_weak_secrets_are_refused(secret: bytes) -> None:
    with pytest.raises(ConfigError, match="REDISGATE_SECRET_KEY is weak") as caught:
        check(dataclasses.replace(PRODUCTION, secret_key=secret))
    assert secret.decode() not in str(caught.value)


def test_a_secret_that_nobody_chose_is_refused() -> None:
    with pytest.raises(ConfigError, match="set REDISGATE_SECRET_KEY"):
        check(dataclasses.replace(PRODUCTION, secret_key_is_default=True))


@pytest.mark.parametrize("changes", [{"encryption_keys": ("weak",)}, {"audit_key": "weak"}])
def test_other_keys_must_be_good_too(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="is weak"):
        check(with_control(**changes))


def test_dev_mode_and_a_gateway_alone_take_anything() -> None:
    check(dataclasses.replace(with_control(mode="dev"), secret_key=b"short"))
    check(dataclasses.replace(with_control(database_url=""), secret_key=b"short"))


def test_keys_in_their_order() -> None:
    settings = with_control(previous_secret_keys=("old",), encryption_keys=("e",), audit_key="a")
    assert secret_keys(settings) == [GOOD, b"old"]
    assert encryption_keys(settings) == [b"e", GOOD, b"old"]
    assert audit_keys(settings) == [b"a", GOOD, b"old"]


@pytest.mark.parametrize(
    ("host", "public", "expected"),
    [
        ("127.0.0.1", "", "http://127.0.0.1:3000"),
        ("0.0.0.0", "", "http://localhost:3000"),
        ("::1", "", "http://[::1]:3000"),
        ("0.0.0.0", "https://r.example/", "https://r.example"),
    ],
)
def test_where_people_reach_us(host: str, public: str, expected: str) -> None:
    assert public_url(dataclasses.replace(with_control(public_url=public), host=host)) == expected
