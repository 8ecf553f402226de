"""Log lines to standard error, as text or JSON, that never stop an event loop for long.

Standard error is often a pipe, and whoever reads it may stall (a paused
terminal, a full log driver). A worker therefore hands its lines to a thread
through a bounded queue; what does not fit is dropped and counted. The
supervisor has no thread, because it forks: it waits a little for room and
drops as well.

Tokens get into no line because nobody passes them here; a request target,
the one text that may carry one, goes through `safe_target`.
"""

import atexit
import collections
import contextlib
import json
import logging
import os
import re
import select
import threading
import time
from functools import cache
from urllib.parse import unquote_to_bytes

from resp.commands import bundled_table

MAX_WAITING_LINES = 10_000
"""Lines of a worker that wait for standard error."""
MAX_LINE_BYTES = 16_384
"""Bytes of one line; the rest is cut off."""
MAX_KEY_BYTES = 128
"""Of a key that a line shows, where keys are shown."""
PATIENCE = 0.1
"""Seconds the supervisor waits for room in the pipe before it drops a line."""
EXIT_PATIENCE = 1.0
"""Seconds a process that ends waits for its last lines to be taken."""

FIELDS = "redisgate_fields"
"""What a JSON line has beside its message, as `extra={FIELDS: {...}}`."""
_configured = "info"
_asked = ""  # while the process runs; instead of the configured level
_PIPE_BUF = select.PIPE_BUF if hasattr(select, "PIPE_BUF") else 512
_COMMAND = re.compile(rb"[A-Za-z][A-Za-z0-9._-]{0,31}")
_INSTANCE_PREFIX = b"redis"
_commands = cache(bundled_table)
_SECRET = re.compile(rb"rg[tru]_|eyJ")  # what our tokens begin with, and JSON Web Tokens


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        worker = _Handler.worker
        name = "" if worker is None else f" worker {worker}" if isinstance(worker, int) else f" {worker}"
        who = f"{record.process}{name}"
        line = f"{stamp}.{int(record.msecs):03d}Z {record.levelname.lower()} [{who}] {record.getMessage()}"
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
            **getattr(record, FIELDS, {}),
        }
        if _Handler.worker is not None:
            fields["worker"] = _Handler.worker
        if record.exc_info is not None:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class _Handler(logging.Handler):
    """Writes lines to a descriptor: itself in the supervisor, by a thread in a worker."""

    worker: int | str | None = None  # of this process; None: the supervisor

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._waiting: collections.deque[bytes] = collections.deque()
        self._wake = threading.Event()
        self._writing = False
        self._thread: threading.Thread | None = None
        self.dropped = 0  # not yet said
        self.lost = 0  # ever

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", "backslashreplace")[:MAX_LINE_BYTES] + b"\n"
        except Exception:
            self.handleError(record)
            return
        if _Handler.worker is None:
            if not select.select([], [self._fd], [], PATIENCE)[1]:
                self.dropped += 1
                return
            self._write(self._take_dropped() + line)
            return
        if len(self._waiting) >= MAX_WAITING_LINES:
            self.dropped += 1
            return
        self._waiting.append(line)
        if self._thread is None:
            # Here, not when made: a thread does not live through the fork that makes a worker.
            self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
            self._thread.start()
            atexit.register(self.flush)
        self._wake.set()

    def _take_dropped(self) -> bytes:
        dropped, self.dropped = self.dropped, 0
        self.lost += dropped
        return b"%d log lines dropped: nobody took them from standard error\n" % dropped if dropped else b""

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._writing = True
            self._wake.clear()
            while self._waiting:
                batch = self._take_dropped() + self._waiting.popleft()
                # A write of at most PIPE_BUF bytes is never mixed with another worker's.
                while self._waiting and len(batch) + len(self._waiting[0]) <= _PIPE_BUF:
                    batch += self._waiting.popleft()
                self._write(batch)
            self._writing = False

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody reads standard error any more: nothing is left to tell it to
            while data:
                data = data[os.write(self._fd, data) :]

    def flush(self) -> None:
        """Wait for the thread to write what waits, `EXIT_PATIENCE` seconds at most."""
        deadline = time.monotonic() + EXIT_PATIENCE
        while self._thread is not None and (self._waiting or self._writing) and time.monotonic() < deadline:
            time.sleep(0.001)


def configure(level: str, format: str, *, fd: int = 2) -> None:
    """Log from `level` ("debug" … "error") up to standard error, as "text" or "json" lines. May be called again."""
    root = logging.getLogger()
    handler = next((handler for handler in root.handlers if isinstance(handler, _Handler)), None)
    if handler is None:
        handler = _Handler(fd)
        root.addHandler(handler)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    global _configured
    _configured = level
    set_level(_asked)
    # asyncio's own chatter is for people who debug the loop.
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def set_level(name: str) -> None:
    """Log from another level up while the process runs; empty: from the configured one."""
    global _asked
    _asked = name
    logging.getLogger().setLevel((name or _configured).upper())


def dropped_lines() -> int:
    """How many lines of this process nobody took from standard error."""
    return sum(handler.lost for handler in logging.getLogger().handlers if isinstance(handler, _Handler))


def enter_worker(index: int | str) -> None:
    """Say in a process that was just forked which worker it is, or what: its lines carry it and never block it."""
    _Handler.worker = index


def flush() -> None:
    """Write what waits, `EXIT_PATIENCE` seconds at most: before `os._exit`, which runs no exit handlers."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def safe_target(raw_target: bytes, *, keys: bool = False) -> str:
    """A request target as a log may show it: the command's name, and that something follows.

    Arguments are the callers' data, and the query can carry a token under any spelling (`_token`, `%5Ftoken`, or as a
    path segment by mistake); so neither is shown at all, and a first segment that cannot be a command's name is
    not either. With `keys` the segment behind the command is, up to `MAX_KEY_BYTES`, if the command's first argument is
    a key and the segment does not look like a token.
    """
    path, question, _ = raw_target.partition(b"?")
    if not path.startswith(b"/"):
        return "…"
    shown = ""
    segments = path[1:].split(b"/")
    if segments[0] == _INSTANCE_PREFIX and len(segments) > 1:
        shown = "/redis" + _safe_segment(segments[1])
        segments = segments[2:]
    if segments:
        shown += _safe_segment(segments[0])
    if len(segments) > 1:
        if keys and _is_key(segments):
            shown += "/" + _printable(segments[1])
            del segments[1]
        if len(segments) > 1:
            shown += "/…"
    return shown + ("?…" if question else "")


def _is_key(segments: list[bytes]) -> bool:
    """Whether the segment behind the command is one: of what is known to nobody, it is not."""
    argv = [unquote_to_bytes(segment) for segment in segments]
    command = _commands().find(argv)
    if command is None or _SECRET.search(argv[1]) is not None:
        return False
    return any(begin == ("index", 1) and "not_key" not in flags for flags, begin, _ in command.specs)


def _printable(segment: bytes) -> str:
    """A segment as it came, without what could end or colour a line."""
    key = segment[:MAX_KEY_BYTES].decode("ascii", "replace")
    return "".join([character if character.isprintable() else "…" for character in key]) + (
        "…" if len(segment) > MAX_KEY_BYTES else ""
    )


def _safe_segment(segment: bytes) -> str:
    name = unquote_to_bytes(segment)
    return "/" + (name.decode("ascii") if not name or _COMMAND.fullmatch(name) else "…")
