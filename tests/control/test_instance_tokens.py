"""REST tokens of instances are told from garbage without a look into the database."""

import secrets

import pytest

from control.instance_tokens import FULL, READONLY, TOKEN_BYTES, InstanceTokens, token_digest

OLD, NEW = b"o" * 32, b"n" * 32


def test_tokens_are_recognized_by_whoever_has_the_key() -> None:
    tokens = InstanceTokens([NEW])
    full, readonly = tokens.make(), tokens.make(readonly=True)
    assert full.startswith(FULL)
    assert readonly.startswith(READONLY)
    assert len(full) == len(readonly) == TOKEN_BYTES
    assert tokens.verify(full)
    assert tokens.verify(readonly)
    assert not InstanceTokens([OLD]).verify(full)


def test_a_readonly_token_does_not_become_a_full_one() -> None:
    tokens = InstanceTokens([NEW])
    assert not tokens.verify(FULL + tokens.make(readonly=True)[len(READONLY) :])


def test_every_changed_character_is_noticed() -> None:
    tokens = InstanceTokens([NEW])
    token = tokens.make()
    for at in range(len(token)):
        other = b"A" if token[at : at + 1] != b"A" else b"B"
        assert not tokens.verify(token[:at] + other + token[at + 1 :])
        assert not tokens.verify(token[:at])


@pytest.mark.parametrize("garbage", [b"", b"rgt_", b"rgt_" + b"!" * 44, b"\xff" * 48, b"eyJhbGciOi.x.y"])
def test_garbage_is_refused(garbage: bytes) -> None:
    assert not InstanceTokens([NEW]).verify(garbage)


def test_keys_rotate() -> None:
    token = InstanceTokens([OLD]).make()
    assert InstanceTokens([NEW, OLD]).verify(token)
    assert InstanceTokens([NEW]).verify(InstanceTokens([NEW, OLD]).make())


def test_digests_differ_and_do_not_tell_the_token() -> None:
    tokens = [InstanceTokens([NEW]).make() for _ in range(100)]
    digests = {token_digest(token) for token in tokens}
    assert len(digests) == 100
    assert all(len(digest) == 32 for digest in digests)
    assert secrets.compare_digest(token_digest(tokens[0]), token_digest(bytes(tokens[0])))
