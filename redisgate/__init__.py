"""The HTTP gateway: Redis commands over REST, as the Upstash clients speak it."""

__version__ = "0.1.0"
