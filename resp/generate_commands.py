"""Writes the command table's data from a live server's COMMAND output.

    python -m resp.generate_commands redis://127.0.0.1:6379 > resp/commands.json

One command a line, sorted, so that the next server version shows as a readable diff. Wants Redis 7 without modules:
older servers give no key specs. The address is redis://host:port or unix:///path, of a server without a password.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any
from urllib.parse import urlsplit

import hiredis

from resp.commands import CommandTable, to_json
from resp.info import parse_info, server_version

TIMEOUT = 10.0  # seconds


def main(url: str) -> None:
    with _connect(url) as sock:
        info = _ask(sock, b"INFO server")
        entries = _ask(sock, b"COMMAND")
    fields = parse_info(info)
    name = "valkey" if "valkey_version" in fields else "redis"
    version = server_version(fields)

    table = CommandTable({})
    for entry in entries:
        if table.learn(entry) is None:
            raise SystemExit(f"cannot read this entry of COMMAND: {entry!r}")
    lines = [
        f"{json.dumps(command.name.decode())}: {json.dumps(to_json(command), separators=(',', ':'))}"
        for command in sorted(table, key=lambda command: command.name)
    ]
    print(f'{{"server": "{name}", "version": "{version}", "commands": {{')
    print(",\n".join(lines))
    print("}}")


def _connect(url: str) -> socket.socket:
    address = urlsplit(url)
    if address.scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT)
        sock.connect(address.path)
        return sock
    return socket.create_connection((address.hostname or "127.0.0.1", address.port or 6379), TIMEOUT)


def _ask(sock: socket.socket, command: bytes) -> Any:
    sock.sendall(command + b"\r\n")
    reader = hiredis.Reader()
    while (reply := reader.gets()) is False:
        data = sock.recv(65536)
        if not data:
            raise SystemExit("the server closed the connection")
        reader.feed(data)
    if isinstance(reply, hiredis.HiredisError):
        raise SystemExit(f"the server says: {reply}")
    return reply


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
