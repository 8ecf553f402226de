"""Backups of a real Redis into a real S3 API (moto's server), and what a new Redis makes of them."""

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from moto.server import ThreadedMotoServer

from control.kubernetes.backups import BackupError, Bucket, Server, back_up, list_backups, restore, snapshot_of
from tests.servers import RedisServer, free_port

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(f"b{uuid.uuid4().hex}", endpoint)
    bucket.client().create_bucket(Bucket=bucket.name)
    return bucket


@contextlib.contextmanager
def redis_server(*arguments: str) -> Iterator[RedisServer]:
    server = RedisServer("--repl-diskless-sync-delay", "0", *arguments)  # for other replicas, which do not come
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server("--requirepass", "secret") as server:
        client(server, "secret").mset({"a": "1", "b": "2"})
        yield server


def client(server: RedisServer, password: str | None = None) -> Any:
    return redis_py.Redis(port=server.port, password=password, decode_responses=True)


def server_of(redis: RedisServer, password: str = "secret") -> Server:
    return Server("127.0.0.1", redis.port, "default", password)


@pytest.mark.parametrize("form", ["aof", "rdb"])
def test_a_backup_comes_back_in_a_new_redis(bucket: Bucket, redis: RedisServer, tmp_path: Path, form: Any) -> None:
    key = back_up(server_of(redis), bucket, "shop/cache/", keep=3)
    assert restore(bucket, key, tmp_path, form)
    keep = ["--appendonly", "yes"] if form == "aof" else ["--save", "3600 1"]
    with redis_server("--dir", str(tmp_path), *keep) as new, client(new) as connection:
        assert connection.mget("a", "b") == ["1", "2"]
        connection.set("c", "3")
        connection.delete("a")
        if form == "rdb":
            connection.save()
    assert not restore(bucket, key, tmp_path, form), "a pod that starts again keeps its data"
    with redis_server("--dir", str(tmp_path), *keep) as again, client(again) as connection:
        assert connection.mget("a", "b", "c") == [None, "2", "3"]


def test_the_newest_backups_are_kept(bucket: Bucket, redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    others = ["shop/cache/notes.txt", "shop/cache2/20200101T000000Z.rdb"]
    for key in [*others, *(f"shop/cache/2020010{day}T000000Z.rdb" for day in range(1, 5))]:
        bucket.client().put_object(Bucket=bucket.name, Key=key, Body=b"REDIS0011")
    new = back_up(server_of(redis), bucket, "shop/cache/", keep=2)
    assert list_backups(bucket, "shop/cache/") == ["shop/cache/20200104T000000Z.rdb", new]
    left = {item["Key"] for item in bucket.client().list_objects_v2(Bucket=bucket.name)["Contents"]}
    assert left == {*others, "shop/cache/20200104T000000Z.rdb", new}


def test_a_backup_in_parts_is_whole(bucket: Bucket, tmp_path: Path) -> None:
    with redis_server("--repl-diskless-sync", "no") as server, client(server) as connection:
        value = os.urandom(1024 * 1024)
        for number in range(20):  # more than one part of an upload
            connection.set(f"k{number}", value)
        with snapshot_of(server_of(server, "")) as snapshot:
            size = sum(map(len, iter(lambda: snapshot.read(65_537), b"")))
        assert size == snapshot.bytes > 20 * len(value)
        key = back_up(server_of(server, ""), bucket, "", keep=1)
    assert restore(bucket, key, tmp_path, "rdb")
    with redis_server("--dir", str(tmp_path)) as new, client(new) as connection:
        assert connection.dbsize() == 20


def test_a_redis_that_dies_in_the_middle_leaves_no_backup(bucket: Bucket) -> None:
    with redis_server() as server, client(server) as connection:
        for number in range(20):
            connection.set(f"k{number}", os.urandom(1024 * 1024))
        with snapshot_of(server_of(server, "")) as snapshot:
            snapshot.read(65_536)
            server.kill()
            with pytest.raises(BackupError, match="middle of its snapshot"):
                snapshot.read()
    with pytest.raises(BackupError, match="cannot be reached"):
        back_up(server_of(server, ""), bucket, "", keep=1)
    assert list_backups(bucket, "") == []


def test_what_goes_wrong_is_said(bucket: Bucket, redis: RedisServer, tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="WRONGPASS"):
        back_up(server_of(redis, "wrong"), bucket, "", keep=1)
    with pytest.raises(BackupError, match="NOAUTH"):
        back_up(server_of(redis, ""), bucket, "", keep=1)
    with pytest.raises(BackupError, match=r"the bucket: .*NoSuchBucket"):
        back_up(server_of(redis), Bucket("nobodys", bucket.endpoint), "", keep=1)
    with pytest.raises(BackupError, match="404"):
        restore(bucket, "nothing.rdb", tmp_path, "aof")
    bucket.client().put_object(Bucket=bucket.name, Key="letter.rdb", Body=b"Dear Sir or Madam")
    with pytest.raises(BackupError, match=r"letter\.rdb is no backup of a Redis"):
        restore(bucket, "letter.rdb", tmp_path, "aof")
    assert list(tmp_path.iterdir()) == []


def test_the_commands_of_the_jobs(bucket: Bucket, redis: RedisServer, tmp_path: Path) -> None:
    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "redisgate", arguments[0], "--bucket", bucket.name]
        command += ["--endpoint", str(bucket.endpoint), *arguments[1:]]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)

    where = ["--host", "127.0.0.1", "--port", str(redis.port), "--user", "default", "--prefix", "x/"]
    made = run("backup", *where, REDISGATE_BACKUP_PASSWORD="secret")
    (key,) = list_backups(bucket, "x/")
    assert (made.returncode, made.stdout) == (0, f"made {key}\n")
    refused = run("backup", *where, REDISGATE_BACKUP_PASSWORD="wrong")
    assert refused.returncode == 1
    assert refused.stderr.startswith("redisgate backup: Redis does not let us in: -WRONGPASS")
    assert run("restore", "--key", key, "--into", str(tmp_path)).stdout == f"restored {key}\n"
    assert "has data already" in run("restore", "--key", key, "--into", str(tmp_path)).stdout
