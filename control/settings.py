"""The control plane's settings: their table is in `redisgate.config`; here is what follows from them."""

from pathlib import Path
from urllib.parse import urlsplit

from redisgate.config import ConfigError, ControlSettings, Settings

__all__ = ["ControlSettings", "audit_keys", "check", "encryption_keys", "instances_dir", "public_url", "secret_keys"]

MIN_SECRET_CHARACTERS = 32
"""Of `secret_key` in production mode."""
MIN_DISTINCT_CHARACTERS = 10
"""A secret with fewer was typed, not generated."""
_KNOWN_SECRETS = (
    "changeme",
    "change-me",
    "change_me",
    "secret",
    "password",
    "example",
    "your-",
    "default",
    "redisgate",
)


def check(settings: Settings) -> None:
    """Refuse what must not go into production.

    Raises:
        ConfigError: the secret key is weak, or nobody chose it.
    """
    control = settings.control
    if not control.enabled or control.mode != "production":
        return
    hint = "; `openssl rand -hex 32` makes a good one, and REDISGATE_MODE=dev is for machines where nothing is at stake"
    if settings.secret_key_is_default:
        raise ConfigError(
            "with a database, production mode needs a secret key that every replica knows: set REDISGATE_SECRET_KEY"
            + hint
        )
    for name, secret in [
        ("REDISGATE_SECRET_KEY", settings.secret_key.decode(errors="replace")),
        *[("REDISGATE_ENCRYPTION_KEYS", key) for key in control.encryption_keys],
        *([("REDISGATE_AUDIT_KEY", control.audit_key)] if control.audit_key else []),
    ]:
        if _is_weak(secret):
            raise ConfigError(
                f"{name} is weak: it needs at least {MIN_SECRET_CHARACTERS} characters that nobody guesses{hint}"
            )


def _is_weak(secret: str) -> bool:
    lowered = secret.lower()
    return (
        len(secret) < MIN_SECRET_CHARACTERS
        or len(set(secret)) < MIN_DISTINCT_CHARACTERS
        or any(word in lowered for word in _KNOWN_SECRETS)
    )


def secret_keys(settings: Settings) -> list[bytes]:
    """The secret key, and the older ones whose tokens are still taken; the newest first."""
    return [settings.secret_key, *(key.encode() for key in settings.control.previous_secret_keys)]


def encryption_keys(settings: Settings) -> list[bytes]:
    """What secrets in the database are encrypted under, the newest first."""
    return [key.encode() for key in settings.control.encryption_keys] + secret_keys(settings)


def audit_keys(settings: Settings) -> list[bytes]:
    """What the audit log's chain is made under, the newest first."""
    own = [settings.control.audit_key.encode()] if settings.control.audit_key else []
    return own + secret_keys(settings)


def public_url(settings: Settings) -> str:
    """Where people and programs reach this service, without a slash at the end."""
    if settings.control.public_url:
        return settings.control.public_url.rstrip("/")
    host = "localhost" if settings.host in ("0.0.0.0", "::", "") else settings.host
    scheme = "https" if settings.tls_cert_file else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"


def is_secure(settings: Settings) -> bool:
    """Whether people reach this service by TLS."""
    return urlsplit(public_url(settings)).scheme == "https"


def instances_dir(settings: Settings) -> Path:
    """Where local instances keep their data."""
    own = settings.control.instances_dir
    return settings.state_dir / own if own else settings.state_dir / "instances"
