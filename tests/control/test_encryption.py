"""Secrets at rest open only where they belong, with the keys they were made with."""

import pytest

from control.encryption import DecryptionError, Encryption

OLD, NEW = b"o" * 32, b"n" * 32
CONTEXT = b"instances.password:1"


def test_a_secret_comes_back_and_is_never_encrypted_alike() -> None:
    encryption = Encryption([NEW])
    first, second = encryption.encrypt(b"secret", CONTEXT), encryption.encrypt(b"secret", CONTEXT)
    assert first != second
    assert b"secret" not in first
    assert encryption.decrypt(first, CONTEXT) == encryption.decrypt(second, CONTEXT) == b"secret"
    assert encryption.decrypt(encryption.encrypt(b"", CONTEXT), CONTEXT) == b""


def test_a_ciphertext_does_not_open_in_another_place() -> None:
    encryption = Encryption([NEW])
    with pytest.raises(DecryptionError, match="another place"):
        encryption.decrypt(encryption.encrypt(b"secret", CONTEXT), b"instances.password:2")


def test_every_changed_byte_is_noticed() -> None:
    encryption = Encryption([NEW])
    ciphertext = encryption.encrypt(b"secret", CONTEXT)
    for at in range(len(ciphertext)):
        changed = ciphertext[:at] + bytes([ciphertext[at] ^ 1]) + ciphertext[at + 1 :]
        with pytest.raises(DecryptionError):
            encryption.decrypt(changed, CONTEXT)
    for length in range(len(ciphertext)):
        with pytest.raises(DecryptionError):
            encryption.decrypt(ciphertext[:length], CONTEXT)


def test_keys_rotate() -> None:
    old = Encryption([OLD]).encrypt(b"secret", CONTEXT)
    both = Encryption([NEW, OLD])
    assert both.decrypt(old, CONTEXT) == b"secret"
    assert not both.is_current(old)
    again = both.encrypt(both.decrypt(old, CONTEXT), CONTEXT)
    assert both.is_current(again)
    assert again.startswith(both.current_header)
    assert Encryption([NEW]).decrypt(again, CONTEXT) == b"secret"
    with pytest.raises(DecryptionError, match="not in the list"):
        Encryption([NEW]).decrypt(old, CONTEXT)


@pytest.mark.parametrize("keys", [[], [b""], [NEW, b""]])
def test_no_key_is_an_error(keys: list[bytes]) -> None:
    with pytest.raises(ValueError, match="needs a secret key"):
        Encryption(keys)
