"""`redisgate healthcheck`: whether the gateway with these settings is ready; what watches a container runs it."""

import http.client
import json
import ssl
import sys
from typing import Final

from redisgate.config import Settings

TIMEOUT: Final = 2.0
"""Seconds for an answer; what asks waits three."""
MAX_ANSWER_BYTES: Final = 65536
"""Of the body; more is not read."""
_HERE: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where somebody who listens everywhere is asked."""


def run_healthcheck(settings: Settings) -> int:
    """Ask for /health/ready; the exit status: 0 if the gateway answers that it is, else 1 with the reason on stderr."""
    host = _HERE.get(settings.host, settings.host)
    connection = http.client.HTTPConnection(host, settings.port, timeout=TIMEOUT)
    if settings.tls_cert_file:
        connection = http.client.HTTPSConnection(host, settings.port, timeout=TIMEOUT, context=_any_certificate())
    try:
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        return _not_ready(f"{host} port {settings.port}: {error or type(error).__name__}")
    finally:
        connection.close()
    return 0 if answer.status == 200 else _not_ready(f"{answer.status} {_text(body)}")


def _any_certificate() -> ssl.SSLContext:
    """The certificate is for the names that clients use, and what is asked is on this machine."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _text(body: bytes) -> str:
    """On one line, whatever it is."""
    try:
        return json.dumps(json.loads(body))
    except ValueError:
        return repr(body)


def _not_ready(why: str) -> int:
    print(f"redisgate: not ready: {why}", file=sys.stderr)
    return 1
