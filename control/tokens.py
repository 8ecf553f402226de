"""Signed tokens: sessions of people and API keys.

Both are JWTs with HS256, the one algorithm that is accepted. Each kind has a key of its own, derived from the secret
key, and an audience of its own, so that neither passes for the other. The header's `kid` names the secret that
signed: while `secret_keys` lists an old secret after the new one, its tokens stay valid.

Claims never grant anything. A token that verifies is one that we issued; what it may do stands in the database.
"""

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import jwt

ALGORITHM: Final = "HS256"
ISSUER: Final = "redisgate"
SESSION_AUDIENCE: Final = "redisgate:session"
API_KEY_AUDIENCE: Final = "redisgate:api-key"
MAX_TOKEN_BYTES: Final = 8192
"""Longer credentials are not looked at."""
LEEWAY: Final = 5
"""Seconds that the clocks of two replicas may differ."""


class InvalidToken(Exception):
    """A credential that is none of ours, or is none any more. `reason` is for the log, never for the caller."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SessionClaims:
    """What a session token says; times in unix seconds."""

    session_id: UUID
    user_id: UUID
    issued_at: int
    expires_at: int


@dataclass(frozen=True, slots=True)
class ApiKeyClaims:
    """What an API key says; times in unix seconds."""

    api_key_id: UUID
    user_id: UUID
    organization_id: UUID
    scopes: tuple[str, ...]
    key_prefix: str
    issued_at: int
    expires_at: int


def derive_key(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose; knowing it tells nothing about the secret or about other purposes."""
    return hmac.digest(secret, b"redisgate/" + purpose.encode(), "sha256")


def key_id(key: bytes) -> str:
    """A short public name of a derived key."""
    return hashlib.sha256(b"key id\0" + key).hexdigest()[:12]


class Tokens:
    """Issues and verifies tokens. Does no I/O."""

    __slots__ = ("_api_keys", "_clock", "_current", "_sessions")

    def __init__(self, secret_keys: Sequence[bytes], *, clock: Callable[[], float] = time.time) -> None:
        """The first of `secret_keys` signs; all of them verify."""
        if not secret_keys or not all(secret_keys):
            raise ValueError("tokens need a secret key")
        self._sessions = {key_id(key): key for key in (derive_key(secret, "session") for secret in secret_keys)}
        self._api_keys = {key_id(key): key for key in (derive_key(secret, "api-key") for secret in secret_keys)}
        self._current = (next(iter(self._sessions)), next(iter(self._api_keys)))
        self._clock = clock

    def issue_session(self, *, session_id: UUID, user_id: UUID, expires_at: datetime) -> str:
        """A token for one session of one person."""
        claims = {"sub": str(user_id), "sid": str(session_id)}
        return self._issue(claims, SESSION_AUDIENCE, self._sessions, self._current[0], self._clock(), expires_at)

    def verify_session(self, token: str | bytes) -> SessionClaims:
        """The claims of a session token that we issued and that has not expired.

        Raises:
            InvalidToken: it is nothing of the kind.
        """
        claims = self._verify(token, SESSION_AUDIENCE, self._sessions, ("sub", "sid"))
        return SessionClaims(
            _uuid(claims, "sid"), _uuid(claims, "sub"), _seconds(claims, "iat"), _seconds(claims, "exp")
        )

    def issue_api_key(
        self,
        *,
        api_key_id: UUID,
        user_id: UUID,
        organization_id: UUID,
        scopes: Sequence[str],
        key_prefix: str,
        expires_at: datetime,
        issued_at: datetime | None = None,
    ) -> str:
        """An API key as the original made it: `api_key_id`, `user_id`, `organization_id`, `scopes`, `key_prefix`."""
        claims = {
            "api_key_id": str(api_key_id),
            "user_id": str(user_id),
            "organization_id": str(organization_id),
            "scopes": list(scopes),
            "key_prefix": key_prefix,
        }
        issued = self._clock() if issued_at is None else issued_at.timestamp()
        return self._issue(claims, API_KEY_AUDIENCE, self._api_keys, self._current[1], issued, expires_at)

    def verify_api_key(self, token: str | bytes) -> ApiKeyClaims:
        """The claims of an API key that we issued and that has not expired.

        Raises:
            InvalidToken: it is nothing of the kind.
        """
        claims = self._verify(
            token,
            API_KEY_AUDIENCE,
            self._api_keys,
            ("api_key_id", "user_id", "organization_id", "scopes", "key_prefix"),
        )
        scopes, prefix = claims["scopes"], claims["key_prefix"]
        if not isinstance(scopes, list) or not isinstance(prefix, str) or not all(isinstance(s, str) for s in scopes):
            raise InvalidToken("malformed claims")
        return ApiKeyClaims(
            _uuid(claims, "api_key_id"),
            _uuid(claims, "user_id"),
            _uuid(claims, "organization_id"),
            tuple(scopes),
            prefix,
            _seconds(claims, "iat"),
            _seconds(claims, "exp"),
        )

    @staticmethod
    def _issue(
        claims: dict[str, Any], audience: str, keys: dict[str, bytes], kid: str, issued: float, expires_at: datetime
    ) -> str:
        if expires_at.tzinfo is None:
            raise ValueError("expires_at needs a time zone")
        times = {"iat": int(issued), "exp": int(expires_at.astimezone(UTC).timestamp())}
        payload = claims | {"iss": ISSUER, "aud": audience} | times
        return jwt.encode(payload, keys[kid], algorithm=ALGORITHM, headers={"kid": kid})

    def _verify(
        self, token: str | bytes, audience: str, keys: dict[str, bytes], required: tuple[str, ...]
    ) -> dict[str, Any]:
        if len(token) > MAX_TOKEN_BYTES:
            raise InvalidToken("too long")
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            key = keys.get(kid) if isinstance(kid, str) else None
            if key is None:
                raise InvalidToken("unknown key id")
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=audience,
                issuer=ISSUER,
                # The times are checked below, against our own clock.
                options={
                    "require": ["exp", "iat", "iss", "aud", *required],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                    "strict_aud": True,
                },
            )
        except (jwt.InvalidTokenError, UnicodeError, ValueError) as error:
            raise InvalidToken(str(error)) from error
        now = self._clock()
        if _seconds(claims, "exp") <= now:
            raise InvalidToken("expired")
        if _seconds(claims, "iat") > now + LEEWAY:
            raise InvalidToken("issued in the future")
        return claims


def _uuid(claims: dict[str, Any], name: str) -> UUID:
    try:
        return UUID(claims[name])
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidToken(f"malformed claim {name}") from error


def _seconds(claims: dict[str, Any], name: str) -> int:
    value = claims[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidToken(f"malformed claim {name}")
    return value
