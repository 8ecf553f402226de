"""The HTTP gateway: Redis commands over REST, as the Upstash clients speak it."""

import importlib.util

__version__ = "0.1.0"


def build_form() -> str:
    """Which form is installed: "compiled" or "pure Python" (see setup.py)."""
    spec = importlib.util.find_spec("redisgate.gateway")
    return "pure Python" if spec is None or str(spec.origin).endswith(".py") else "compiled"
