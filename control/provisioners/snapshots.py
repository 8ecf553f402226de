"""Snapshots (RDB files) of local instances: taken over the replication protocol, received in parts, checked.

A snapshot is taken as a replica takes it, and `redis-cli --rdb` too: SYNC, and the file comes over the connection. No
file is written on the way, and what is sent is one moment's data.

An upload lies beside the instance's data until it is loaded:

    <instances_dir>/<id>/upload.<uploader>.<bytes>.part   what has arrived, of so many bytes altogether
                         upload-<id>.rdb                  whole; `LocalProvisioner.load` takes it from here
"""

import asyncio
import math
import os
import re
import subprocess
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from control.provisioners import ProvisionError
from resp.address import Address
from resp.encoder import encode_command

CHUNK_BYTES: Final = 64 * 1024
"""Of a snapshot that is passed on at a time."""
SNAPSHOT_SECONDS: Final = 60.0
"""For redis-server to begin with a snapshot, and between two parts of it."""
CHECK_SECONDS: Final = 120.0
"""To look through an uploaded snapshot."""
UPLOAD_SECONDS: Final = 60.0
"""Between two parts of an upload; then another one may take its place."""
ABANDONED_SECONDS: Final = 3600.0
"""After its last part an upload is removed."""
MAGIC: Final = b"REDIS"
"""How every snapshot begins."""
_END: Final = re.compile(r"^\[offset (\d+)\] \S+ RDB looks OK!", re.MULTILINE)
_DELIMITER_BYTES: Final = 40
_MAX_LINE: Final = 1024


async def take(address: Address) -> AsyncGenerator[bytes, None]:
    """The data of an instance as an RDB file, in chunks. The address is its Unix socket, with an administrator's login.

    Raises:
        ProvisionError: it cannot be had, or not to the end.
    """
    assert address.path is not None, "snapshots are for instances on this host"
    try:
        async with asyncio.timeout(SNAPSHOT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(address.path, limit=CHUNK_BYTES)
    except (OSError, TimeoutError) as error:
        raise ProvisionError("redis-server cannot be reached") from error
    try:
        await _prepare(reader, writer, address)
        writer.write(encode_command([b"SYNC"]))
        async for chunk in _file(reader):
            yield chunk
    except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError) as error:
        raise ProvisionError("redis-server did not send its data to the end") from error
    finally:
        writer.transport.abort()


async def _prepare(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: Address) -> None:
    """Log in, and have the snapshot sent at once and straight from memory."""
    login = [word.encode() for word in (address.username or "default", address.password or "")]
    for argv in (
        [b"AUTH", *login],
        [b"CONFIG", b"SET", b"repl-diskless-sync", b"yes"],
        [b"CONFIG", b"SET", b"repl-diskless-sync-delay", b"0"],
        [b"REPLCONF", b"capa", b"eof"],
        [b"REPLCONF", b"rdb-only", b"1"],
    ):
        writer.write(encode_command(argv))
        line = await _line(reader)
        # A server before 7.0 does not know rdb-only: it keeps what is written meanwhile for us, and drops it with us.
        if line.startswith(b"-") and argv[0] != b"REPLCONF":
            raise ProvisionError(f"redis-server refused {argv[0].decode()}")


async def _line(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(SNAPSHOT_SECONDS):
        line = await reader.readuntil(b"\n")
    if len(line) > _MAX_LINE:
        raise EOFError
    return line.strip()


async def _file(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """`$<length>` and so many bytes, or `$EOF:<delimiter>`, and the bytes up to the delimiter."""
    line = b""
    while not line:  # line ends alone: it is still at work
        line = await _line(reader)
    if line.startswith(b"-"):
        raise ProvisionError(f"redis-server refused a snapshot: {line[1:].decode('utf-8', 'replace')[:200]}")
    if line.startswith(b"$EOF:"):
        delimiter = line[5:]
        if len(delimiter) != _DELIMITER_BYTES:
            raise EOFError
        kept = b""
        while True:
            kept += await _some(reader)
            if kept.endswith(delimiter):
                yield kept[:-_DELIMITER_BYTES]
                return
            # The delimiter is the last that comes; a part of it may be what has come last.
            if len(kept) > _DELIMITER_BYTES:
                yield kept[:-_DELIMITER_BYTES]
                kept = kept[-_DELIMITER_BYTES:]
    left = int(line[1:]) if line[1:].isdigit() else -1
    if left < 0:
        raise EOFError
    while left:
        chunk = await _some(reader, left)
        left -= len(chunk)
        yield chunk


async def _some(reader: asyncio.StreamReader, most: int = CHUNK_BYTES) -> bytes:
    async with asyncio.timeout(SNAPSHOT_SECONDS):
        chunk = await reader.read(min(most, CHUNK_BYTES))
    if not chunk:
        raise EOFError
    return chunk


# Uploads


class WrongPart(Exception):
    """A part does not follow what has arrived: `arrived` bytes."""

    def __init__(self, arrived: int) -> None:
        super().__init__(f"{arrived} bytes have arrived")
        self.arrived = arrived


class Occupied(Exception):
    """Somebody else's upload is under way."""


def receive(home: Path, uploader: str, start: int, content: bytes, total: int) -> UUID | None:
    """Take a part of an upload that begins at `start`; the upload's id once all `total` bytes are there, else None.

    An instance takes one upload at a time; it belongs to who began it, and all its parts name the same total. A part at
    0 begins anew. Blocks.

    Raises:
        WrongPart: it begins where nothing is missing.
        Occupied: it is another's turn.
        OSError: the instance's folder is not on this host, or the disk is full; nothing is kept.
    """
    part = home / f"upload.{uploader}.{total}.part"
    arrived = part.stat().st_size if start and part.exists() else 0
    if start != arrived:
        raise WrongPart(arrived)
    if not start:
        _make_room(home, uploader)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if start else os.O_TRUNC), 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:  # a descriptor is not cut off, whatever the mode says
            file.seek(start)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    if start + len(content) < total:
        return None
    upload = uuid4()
    part.rename(upload_path(home, upload))
    return upload


def _make_room(home: Path, uploader: str) -> None:
    for other in home.glob("upload.*.part"):
        if not other.name.startswith(f"upload.{uploader}.") and _age(other) < UPLOAD_SECONDS:
            raise Occupied
        other.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Seconds since it was written to; one that is gone is as old as can be."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def keep_only(home: Path, upload: UUID) -> None:
    """Remove whole uploads but this one, which is wanted now: nobody waits for them. Blocks."""
    for other in home.glob("upload-*.rdb"):
        if other != upload_path(home, upload):
            other.unlink(missing_ok=True)


def sweep(home: Path) -> None:
    """Remove what has arrived of uploads that nobody goes on with. Blocks."""
    for part in home.glob("upload.*part"):
        if _age(part) > ABANDONED_SECONDS:
            part.unlink(missing_ok=True)


def upload_path(home: Path, upload: UUID) -> Path:
    """Where a whole upload lies."""
    return home / f"upload-{upload}.rdb"


def examine(server: str, folder: Path, name: str, identity: tuple[int, int] | None) -> None:
    """Have redis-server look through a file as redis-check-rdb, as the user that it will be loaded by. Blocks.

    It looks into every value, as it does with a RESTORE that is not trusted; it does not look behind the end.

    Raises:
        ProvisionError: it is no snapshot that this version can load, or more than a snapshot.
    """
    uid, gid = identity if identity is not None else (None, None)
    try:
        done = subprocess.run(
            ["redis-check-rdb", name],  # the same program as redis-server: its name says which it is to be
            executable=server,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHECK_SECONDS,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            user=uid,
            group=gid,
            extra_groups=[] if identity is not None else None,
        )
    except subprocess.TimeoutExpired as error:
        raise ProvisionError(f"the snapshot could not be checked within {CHECK_SECONDS:g} s", permanent=True) from error
    text = (done.stdout + done.stderr).decode("utf-8", "replace")
    if done.returncode != 0:
        raise ProvisionError(f"this is no snapshot that can be loaded here: {_reason(text)}", permanent=True)
    end = _END.search(text)
    if end is None or int(end[1]) != (folder / name).stat().st_size:
        raise ProvisionError("this is no snapshot alone: something follows its end", permanent=True)


def _reason(output: str) -> str:
    """What redis-check-rdb found: what stands under its heading, without the offset."""
    _, found, rest = output.partition("RDB ERROR DETECTED ---\n")
    return rest.partition("\n")[0].partition("] ")[2][:200] if found else "redis-check-rdb refused it"
