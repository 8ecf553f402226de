"""A small HTTP/1.1 client for the tests: says exactly what it is told to, and reads whole responses."""

import json
import socket
from typing import Any


class Response:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def result(self) -> Any:
        assert self.status == 200, self.body
        return self.json()["result"]

    @property
    def error(self) -> str:
        value = self.json()
        assert list(value) == ["error"], value
        return str(value["error"])

    def __repr__(self) -> str:
        return f"<{self.status} {self.body[:200]!r}>"


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int, token: str | None = "token", timeout: float = 20) -> None:
        self.token = token
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def send(self, method: str, target: str | bytes, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        target = target.encode() if isinstance(target, str) else target
        lines = [b"%b %b HTTP/1.1" % (method.encode(), target), b"Host: localhost"]
        if self.token is not None:
            lines.append(b"Authorization: Bearer " + self.token.encode())
        lines += [f"{name}: {value}".encode() for name, value in (headers or {}).items()]
        if body or method in ("POST", "PUT"):
            lines.append(b"Content-Length: %d" % len(body))
        self.sock.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)

    def read_head(self) -> tuple[int, dict[str, str]]:
        line = self.file.readline()
        if not line:
            raise EOFError("the connection was closed")
        status = int(line.split()[1])
        headers = {}
        while (line := self.file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    def read_chunk(self) -> bytes:
        size = int(self.file.readline(), 16)
        data = self.file.read(size)
        assert self.file.read(2) == b"\r\n"
        return data

    def read(self, *, head_only: bool = False) -> Response:
        status, headers = self.read_head()
        if head_only or status == 204:
            return Response(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while chunk := self.read_chunk():
                body += chunk
        else:
            body = self.file.read(int(headers["content-length"]))
        return Response(status, headers, body)

    def request(
        self, method: str, target: str | bytes, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Response:
        self.send(method, target, body, headers)
        return self.read(head_only=method == "HEAD")

    def get(self, target: str | bytes, **headers: str) -> Response:
        return self.request("GET", target, b"", {name.replace("_", "-"): value for name, value in headers.items()})

    def command(self, *argv: Any, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", "/", json.dumps(argv).encode(), named)

    def post(self, target: str, value: Any, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", target, json.dumps(value).encode(), named)
