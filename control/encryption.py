"""Secrets at rest: authenticated encryption with a list of keys.

What is encrypted is bound to a context, the name of the place where it is kept ("instances.password:<id>"): moved to
another row or column it no longer opens. The ciphertext names its key, so that the first key of the list encrypts
while the others still open what is older; `is_current` finds what a change of keys has left behind.

    version (1 byte, 1) · key id (6 bytes) · nonce (12 bytes) · AES-256-GCM of the plaintext with its tag (16 bytes)
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from control.tokens import derive_key

VERSION: Final = b"\x01"
KEY_ID_BYTES: Final = 6
NONCE_BYTES: Final = 12
_TAG_BYTES = 16
_HEADER_BYTES = len(VERSION) + KEY_ID_BYTES


class DecryptionError(Exception):
    """A ciphertext that none of our keys opens here: an old key is missing, or it was changed or moved."""


class Encryption:
    """Encrypts with the first of a list of keys, decrypts with any. Does no I/O."""

    __slots__ = ("_ciphers", "_current")

    def __init__(self, secret_keys: Sequence[bytes]) -> None:
        """The keys are derived from `secret_keys`, the newest first."""
        if not secret_keys or not all(secret_keys):
            raise ValueError("encryption needs a secret key")
        self._ciphers: dict[bytes, AESGCM] = {}
        for secret in secret_keys:
            key = derive_key(secret, "encryption at rest")
            self._ciphers[hashlib.sha256(b"key id\0" + key).digest()[:KEY_ID_BYTES]] = AESGCM(key)
        self._current = next(iter(self._ciphers))

    def encrypt(self, plaintext: bytes, context: bytes) -> bytes:
        """`plaintext` for this context; no two ciphertexts are alike."""
        header = VERSION + self._current
        nonce = os.urandom(NONCE_BYTES)
        return header + nonce + self._ciphers[self._current].encrypt(nonce, plaintext, header + context)

    def decrypt(self, ciphertext: bytes, context: bytes) -> bytes:
        """What was encrypted for this context.

        Raises:
            DecryptionError: no key of ours, another context, or damaged.
        """
        header, nonce = ciphertext[:_HEADER_BYTES], ciphertext[_HEADER_BYTES : _HEADER_BYTES + NONCE_BYTES]
        if len(ciphertext) < _HEADER_BYTES + NONCE_BYTES + _TAG_BYTES or not header.startswith(VERSION):
            raise DecryptionError("this is no ciphertext of ours")
        cipher = self._ciphers.get(header[len(VERSION) :])
        if cipher is None:
            raise DecryptionError("it was encrypted under a secret key that is not in the list any more")
        try:
            return cipher.decrypt(nonce, ciphertext[_HEADER_BYTES + NONCE_BYTES :], header + context)
        except InvalidTag:
            raise DecryptionError("it was changed, or belongs to another place") from None

    def is_current(self, ciphertext: bytes) -> bool:
        """Whether it is encrypted under the newest key."""
        return ciphertext[:_HEADER_BYTES] == VERSION + self._current

    @property
    def current_header(self) -> bytes:
        """What a ciphertext under the newest key begins with: for finding the others by SQL."""
        return VERSION + self._current
