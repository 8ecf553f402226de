"""Tokens that carry a Redis user: `ACL RESTTOKEN <user> <password>`.

Such a token is the pair itself under authenticated encryption, so nothing is
stored. The key is derived from the gateway's secret key; whoever changes that
ends every token.
"""

import base64
import binascii
import hashlib
import json
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from redisgate.access import AccessTable, Grant
from redisgate.policy import Scope

PREFIX = b"rgu_"
_NONCE_BYTES = 12
MAX_TOKEN_BYTES = 4096


class RestTokens:
    """Makes and opens tokens for one secret key."""

    __slots__ = ("_cipher",)

    def __init__(self, secret_key: bytes) -> None:
        self._cipher = AESGCM(hashlib.blake2b(secret_key, digest_size=32, person=b"resttoken").digest())

    def make(self, instance: str, user: str, password: str) -> bytes:
        """A token for this user of this instance."""
        nonce = os.urandom(_NONCE_BYTES)
        plain = json.dumps([instance, user, password]).encode()
        return PREFIX + base64.urlsafe_b64encode(nonce + self._cipher.encrypt(nonce, plain, PREFIX)).rstrip(b"=")

    def open(self, token: bytes) -> tuple[str, str, str] | None:
        """Instance id, user and password; None if the token is not one of ours."""
        if not token.startswith(PREFIX) or len(token) > MAX_TOKEN_BYTES:
            return None
        text = token[len(PREFIX) :]
        try:
            sealed = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
            plain = self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], PREFIX)
        except (binascii.Error, InvalidTag, ValueError):
            return None
        instance, user, password = json.loads(plain)
        return instance, user, password

    def grant(self, token: bytes, access: AccessTable) -> Grant | None:
        """What a token grants: all that Redis lets its user do. None if it is not one of ours."""
        opened = self.open(token)
        if opened is None:
            return None
        instance_id, user, password = opened
        instance = access.instances.get(instance_id)
        if instance is None:
            return None
        return Grant(instance, Scope(own_user=True), name=f"user {user}", user=(user, password))
