"""Backups in S3-compatible storage: `redisgate backup` and `redisgate restore`, which jobs in the cluster run.

A backup is an RDB file as Redis sends it to a new replica (SYNC): a snapshot of one moment that touches no disk of
the instance, streamed through to the bucket. Its key is named after that moment, so the newest sorts last.

A restore happens once, before the first start of Redis: into an empty folder, whole or not at all. Where an append-only
file is kept, the snapshot becomes its beginning: Redis reads no dump.rdb then.
"""

import contextlib
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

CONNECT_SECONDS: Final = 10.0
SILENCE_SECONDS: Final = 300.0
"""Without a byte from Redis, while it makes its snapshot too: it sends a newline each second or so."""
CHUNK_BYTES: Final = 1024 * 1024
LINE_BYTES: Final = 512
MAGIC: Final = (b"REDIS", b"VALKEY")
"""What a snapshot begins with."""
ATTEMPTS: Final = 5
"""Of each request to the bucket."""

_NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z\.rdb")


class BackupError(Exception):
    """It did not work. The text is for the owner of the instance."""


@dataclass(frozen=True)
class Bucket:
    """Where backups lie; the keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""

    name: str
    endpoint: str | None = None
    region: str | None = None

    def client(self) -> Any:
        """Of boto3. Raises BackupError."""
        try:
            import boto3
            from botocore.config import Config
        except ModuleNotFoundError as error:
            raise BackupError("backups need boto3: pip install 'redisgate[s3]'") from error
        addressing = "path" if self.endpoint else "auto"  # most stores of one's own have no host per bucket
        config = Config(retries={"max_attempts": ATTEMPTS, "mode": "standard"}, s3={"addressing_style": addressing})
        return boto3.client("s3", endpoint_url=self.endpoint, region_name=self.region or "us-east-1", config=config)


@dataclass(frozen=True)
class Server:
    """The Redis that is backed up."""

    host: str
    port: int
    user: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    ca: str | None = None


class Snapshot:
    """A file-like object: the bytes of one RDB file, from a Redis that takes us for a replica.

    `read()` raises BackupError unless it comes whole.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._left = 0
        self._mark = b""
        self._ended = False
        self.bytes = 0

    def begin(self, user: str, password: str) -> None:
        """Log in, and ask for everything."""
        if password:
            login = [b"AUTH", *([user.encode()] if user else []), password.encode()]
            self._send(login)
            answer = self._line()
            if answer != b"+OK":
                raise BackupError(f"Redis does not let us in: {answer.decode(errors='replace')}")
        self._send([b"REPLCONF", b"capa", b"eof"])
        if not (answer := self._line()).startswith(b"+"):
            raise BackupError(f"Redis refused to be copied: {answer.decode(errors='replace')}")
        self._send([b"SYNC"])
        while not (answer := self._line()):
            pass  # a newline: it is at work
        if answer.startswith(b"$EOF:"):
            self._mark = answer[5:]
        elif answer.startswith(b"$"):
            self._left = int(answer[1:])
        else:
            raise BackupError(f"Redis refused to be copied: {answer.decode(errors='replace')}")
        if not self._mark and self._left == 0:
            raise BackupError("Redis sent an empty snapshot")
        while len(self._buffer) < 9:
            self._more()
        if not self._buffer.startswith(MAGIC):
            raise BackupError("Redis sent something that is no snapshot")

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; nothing after the end."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(CHUNK_BYTES), b""))
        result = bytearray()
        while len(result) < size and not self._ended:
            part = self._marked(size - len(result)) if self._mark else self._counted(size - len(result))
            result += part
        self.bytes += len(result)
        return bytes(result)

    def _counted(self, size: int) -> bytes:
        if not self._buffer:
            self._more()
        part = bytes(self._buffer[: min(size, self._left)])
        del self._buffer[: len(part)]
        self._left -= len(part)
        self._ended = self._left == 0
        return part

    def _marked(self, size: int) -> bytes:
        """The file ends where the stream ends with the mark: the last bytes are kept back until more come."""
        length = len(self._mark)
        while len(self._buffer) <= length:
            if self._buffer.endswith(self._mark):
                self._ended = True
                return b""
            self._more()
        # Redis sends nothing after the mark until we acknowledge, so it can only be at the end of what has come.
        at_end = self._buffer.endswith(self._mark)
        part = bytes(self._buffer[: min(size, len(self._buffer) - length)])
        del self._buffer[: len(part)]
        self._ended = at_end and len(self._buffer) == length
        return part

    def _more(self) -> None:
        try:
            data = self._connection.recv(CHUNK_BYTES)
        except OSError as error:
            raise BackupError(f"Redis stopped in the middle of its snapshot: {error}") from error
        if not data:
            raise BackupError("Redis closed the connection in the middle of its snapshot")
        self._buffer += data

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) > LINE_BYTES:
                raise BackupError("what answers there is no Redis")
            self._more()
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line.rstrip(b"\r")

    def _send(self, argv: list[bytes]) -> None:
        words = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in argv)
        try:
            self._connection.sendall(b"*%d\r\n%b" % (len(argv), words))
        except OSError as error:
            raise BackupError(f"Redis closed the connection: {error}") from error


@contextlib.contextmanager
def snapshot_of(server: Server) -> Iterator[Snapshot]:
    """All data of one moment. Raises BackupError."""
    try:
        connection = socket.create_connection((server.host, server.port), CONNECT_SECONDS)
    except OSError as error:
        raise BackupError(f"Redis at {server.host}:{server.port} cannot be reached: {error}") from error
    with contextlib.closing(connection):
        if server.tls:
            try:
                context = ssl.create_default_context(cafile=server.ca)
                connection = context.wrap_socket(connection, server_hostname=server.host)
            except OSError as error:
                raise BackupError(f"no TLS with {server.host}:{server.port}: {error}") from error
        with contextlib.closing(connection):
            connection.settimeout(SILENCE_SECONDS)
            snapshot = Snapshot(connection)
            snapshot.begin(server.user, server.password)
            yield snapshot


def back_up(server: Server, bucket: Bucket, prefix: str, keep: int) -> str:
    """Make a backup, then delete all but the newest `keep` under `prefix`; the key of the new one.

    Raises:
        BackupError: there is no new backup; the old ones are all there.
    """
    client = bucket.client()
    key = f"{prefix}{datetime.now(UTC):%Y%m%dT%H%M%SZ}.rdb"
    with snapshot_of(server) as snapshot:
        _at_the_bucket(lambda: client.upload_fileobj(snapshot, bucket.name, key))
        sent = snapshot.bytes
    found = _at_the_bucket(lambda: client.head_object(Bucket=bucket.name, Key=key))
    if found["ContentLength"] != sent:
        raise BackupError(f"{key} has {found['ContentLength']} bytes in the bucket, and Redis sent {sent}")
    for old in list_backups(bucket, prefix)[:-keep]:
        _at_the_bucket(partial(client.delete_object, Bucket=bucket.name, Key=old))
    return key


def list_backups(bucket: Bucket, prefix: str) -> list[str]:
    """The keys of the backups under `prefix`, the oldest first; other things that lie there are left out."""
    client = bucket.client()

    def ask() -> list[str]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    return sorted(key for key in _at_the_bucket(ask) if _NAME.fullmatch(key.removeprefix(prefix)))


def restore(bucket: Bucket, key: str, folder: Path, form: Literal["aof", "rdb"]) -> bool:
    """Put a backup where Redis finds it at its first start; False: there is data already, and nothing was done.

    Raises:
        BackupError: nothing is restored; the folder is as it was.
    """
    names = ("dump.rdb", "appendonly.aof", "appendonlydir")
    if any((folder / name).exists() for name in names):
        return False
    client = bucket.client()
    part = folder / "restore.part"
    try:
        with part.open("wb") as file:
            _at_the_bucket(lambda: client.download_fileobj(bucket.name, key, file))
            file.flush()
            os.fsync(file.fileno())
        with part.open("rb") as file:
            _check(file, key)
        part.rename(folder / ("dump.rdb" if form == "rdb" else "appendonly.aof"))
    except OSError as error:
        raise BackupError(f"the volume cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return True


def _check(file: BinaryIO, key: str) -> None:
    if not file.read(9).startswith(MAGIC):
        raise BackupError(f"{key} is no backup of a Redis")


def _at_the_bucket(work: Callable[[], Any]) -> Any:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return work()
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise BackupError(f"the bucket: {error}") from error
