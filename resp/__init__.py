"""The Redis protocol: bytes in, replies out."""
