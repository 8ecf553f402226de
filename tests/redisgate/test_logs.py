"""Log lines: what they show, and that nobody waits for them."""

import json
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from redisgate import logs

SECRET = "AXsecretTOKEN0123456789"


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Logs go to a pipe; its read end."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    receive, send = os.pipe()
    monkeypatch.setattr(logs._Handler, "worker", None)
    logs.configure("info", "text", fd=send)
    yield receive
    root.setLevel(level)
    os.close(receive)
    os.close(send)


def handler() -> logs._Handler:
    return next(found for found in logging.getLogger().handlers if isinstance(found, logs._Handler))


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/get/key", "/get/…"),
        ("/GET/key?_token=" + SECRET, "/GET/…?…"),
        ("/ping?%5Ftoken=" + SECRET, "/ping?…"),
        ("/ping?%5ftoken=" + SECRET, "/ping?…"),
        ("/ping?%5f%74oken=" + SECRET + "&a=b", "/ping?…"),
        ("/ping?a=b&_token=" + SECRET + "&_token=" + SECRET, "/ping?…"),
        ("/auth/" + SECRET, "/auth/…"),
        ("/" + SECRET + "%00/x", "/…/…"),
        ("/" + SECRET * 2, "/…"),
        ("/redis/main/set/a/" + SECRET, "/redis/main/set/…"),
        ("/redis/main", "/redis/main"),
        ("/redis/main/?_token=" + SECRET, "/redis/main/?…"),
        ("/json.get/a", "/json.get/…"),
        ("/%70ing", "/ping"),
        ("/a%0d%0ab", "/…"),
        ("/", "/"),
        ("/?_token=" + SECRET, "/?…"),
        ("http://host/get/" + SECRET, "…"),
        ("", "…"),
    ],
)
def test_a_target_is_shown_without_arguments_and_query(target: str, shown: str) -> None:
    assert logs.safe_target(target.encode()) == shown
    assert SECRET not in logs.safe_target(target.encode())


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("/get/key", "/get/key"),
        ("/SET/key/value", "/SET/key/…"),
        ("/mget/one/two", "/mget/one/…"),
        ("/redis/main/hset/key/field/value", "/redis/main/hset/key/…"),
        ("/AUTH/hunter2", "/AUTH/…"),
        ("/auth/user/hunter2", "/auth/…"),
        ("/echo/topsecret", "/echo/…"),
        ("/config/set/requirepass/hunter2", "/config/…"),
        ("/config%20set/requirepass", "/…/…"),
        ("/publish/channel/message", "/publish/…"),
        ("/eval/return/1/key", "/eval/…"),
        ("/nosuch/key", "/nosuch/…"),
        ("/pipeline/key", "/pipeline/…"),
        ("/get/rgt_" + SECRET, "/get/…"),
        ("/get/rg%74_" + SECRET, "/get/…"),
        ("/get/rgr_" + SECRET, "/get/…"),
        ("/get/rgu_" + SECRET, "/get/…"),
        ("/get/eyJ" + SECRET, "/get/…"),
        ("/get/Bearer%20rgt_" + SECRET, "/get/…"),
        ("/get/" + "k" * 200, "/get/" + "k" * 128 + "…"),
        ("/get/a\x1b[31m", "/get/a…[31m"),
    ],
)
def test_a_key_is_shown_where_it_is_one(target: str, shown: str) -> None:
    assert logs.safe_target(target.encode(), keys=True) == shown


def test_json_lines_carry_process_and_worker(pipe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logs.configure("info", "json")
    logs.enter_worker(3)
    try:
        raise ValueError("the reason")
    except ValueError:
        logging.getLogger("redisgate.test").exception("it %s", "failed")
    entry = json.loads(os.read(pipe, 65536))
    assert entry["message"] == "it failed"
    assert (entry["pid"], entry["worker"], entry["level"]) == (os.getpid(), 3, "error")
    assert "the reason" in entry["traceback"]


def test_text_lines_say_who_speaks(pipe: int) -> None:
    logging.getLogger("redisgate.test").warning("low on %s", "tea")
    logging.getLogger("redisgate.test").debug("not shown")
    assert os.read(pipe, 65536).endswith(b"Z warning [%d] low on tea\n" % os.getpid())


def test_a_worker_never_waits_for_a_reader_that_stalls_and_says_what_it_dropped(
    pipe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_WAITING_LINES", 10)
    logs.enter_worker(0)
    log = logging.getLogger("redisgate.test")
    while handler().dropped < 5:  # the pipe takes 64 KiB, the queue ten lines
        log.info("x" * 1000)
    received = b""
    reader = threading.Thread(target=lambda: log.info("the end"))
    while b"lines dropped" not in received:
        received += os.read(pipe, 65536)
    reader.start()
    reader.join()
    while b"the end" not in received:
        received += os.read(pipe, 65536)


def test_the_supervisor_drops_lines_rather_than_wait_for_a_reader_that_stalls(
    pipe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PATIENCE", 0.001)
    log = logging.getLogger("redisgate.test")
    while handler().dropped < 3:
        log.info("x" * 1000)
    os.read(pipe, 65536)
    log.info("the end")
    received = b""
    while b"the end" not in received:
        received += os.read(pipe, 65536)
    assert b"3 log lines dropped" in received
