"""REST tokens of instances: made, recognized, looked up.

    rgt_ or rgr_ · 24 random bytes · the first 9 bytes of an HMAC over all of it, in base64url: 48 characters

The HMAC lets us refuse garbage without asking the database: nobody who guesses costs us SQL. It grants nothing; a
token that we made may be revoked, so the row decides, found by the token's digest. `rgr_` says "read-only" to people;
the row says it to us.
"""

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Sequence
from typing import Final

from control.tokens import derive_key

FULL: Final = b"rgt_"
READONLY: Final = b"rgr_"
TOKEN_BYTES: Final = 48
"""Length of every token."""

_PREFIX_BYTES = 4
_RANDOM_BYTES = 24
_MAC_BYTES = 9


class InstanceTokens:
    """Makes and recognizes tokens. Does no I/O."""

    __slots__ = ("_keys",)

    def __init__(self, secret_keys: Sequence[bytes]) -> None:
        """The first of `secret_keys` makes; all of them recognize."""
        if not secret_keys or not all(secret_keys):
            raise ValueError("instance tokens need a secret key")
        self._keys = [derive_key(secret, "instance token") for secret in secret_keys]

    def make(self, *, readonly: bool = False) -> bytes:
        """A new token."""
        prefix = READONLY if readonly else FULL
        random = os.urandom(_RANDOM_BYTES)
        return prefix + base64.urlsafe_b64encode(random + _mac(self._keys[0], prefix + random))

    def verify(self, token: bytes) -> bool:
        """Whether we made it; not whether it still grants anything."""
        if len(token) != TOKEN_BYTES or not token.startswith((FULL, READONLY)):
            return False
        prefix = token[:_PREFIX_BYTES]
        try:
            body = base64.b64decode(token[_PREFIX_BYTES:], altchars=b"-_", validate=True)
        except binascii.Error:
            return False
        random, mac = body[:_RANDOM_BYTES], body[_RANDOM_BYTES:]
        return any(hmac.compare_digest(mac, _mac(key, prefix + random)) for key in self._keys)


def token_digest(token: bytes) -> bytes:
    """What a token is looked up by: 32 bytes that do not tell it."""
    return hashlib.blake2b(token, digest_size=32, person=b"instance token").digest()


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")[:_MAC_BYTES]
