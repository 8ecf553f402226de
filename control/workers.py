"""Which workers there are and how they are: each writes a row every few seconds, for administrators to look at."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import redisgate
from control.database import Connection, DatabaseAway
from control.duties import duty
from control.http import Context
from redisgate.access import AccessTable

REPORT_SECONDS: Final = 5.0
"""Between two reports of a worker."""
SILENT_SECONDS: Final = 20.0
"""A worker that has not been heard of for so long counts as silent."""
FORGOTTEN: Final = timedelta(hours=1)
"""After which a silent worker is no longer listed."""
TICK_SECONDS: Final = 0.5
"""How often a worker looks how late its event loop is."""
QUERY_SECONDS: Final = 5.0

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

log = logging.getLogger(__name__)


class WorkerReport:
    """What one worker says of itself."""

    def __init__(self, context: Context, access: AccessTable, host_id: UUID, number: int) -> None:
        self._context = context
        self._access = access
        self._host_id = host_id
        self._number = number
        self._id = uuid4()
        self._lag = 0.0
        self._cpu = time.process_time()
        self._at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to report."""
        self._task = asyncio.get_running_loop().create_task(self._report())

    async def stop(self) -> None:
        """End, and be no longer listed, if PostgreSQL is there."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(DatabaseAway, TimeoutError):
            async with asyncio.timeout(QUERY_SECONDS):
                await self._context.database.execute("DELETE FROM workers WHERE id = $1", self._id)

    async def _report(self) -> None:
        while True:
            try:
                async with asyncio.timeout(QUERY_SECONDS):
                    await self._write()
            except (DatabaseAway, TimeoutError):
                pass  # who needs PostgreSQL now says so
            except Exception:
                log.exception("this worker's state cannot be written")
            until = time.monotonic() + REPORT_SECONDS
            while (now := time.monotonic()) < until:
                await asyncio.sleep(TICK_SECONDS)
                self._lag = max(self._lag, time.monotonic() - now - TICK_SECONDS)

    async def _write(self) -> None:
        await self._context.database.execute(
            "INSERT INTO workers (id, host_id, host_name, number, pid, version, state) VALUES ($1, $2, $3, $4, $5, $6,"
            " $7) ON CONFLICT (id) DO UPDATE SET seen_at = now(), state = excluded.state",
            self._id,
            self._host_id,
            socket.gethostname(),
            self._number,
            os.getpid(),
            redisgate.__version__,
            self._state(),
        )

    def _state(self) -> dict[str, Any]:
        now, cpu = time.monotonic(), time.process_time()
        share = (cpu - self._cpu) / (now - self._at) if now > self._at else 0.0
        lag, self._lag, self._cpu, self._at = self._lag, 0.0, cpu, now
        http = self._context.extra.get("http")
        return {
            "connections": None if http is None else len(http.connections),
            "streams": len(self._access.streams),
            "instances": len(self._access.instances),
            "memory": _resident_bytes(),
            "cpu_percent": round(100 * share, 1),
            "lag_ms": round(1000 * lag, 1),
        }


def _resident_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None  # no Linux


async def list_workers(connection: Connection) -> list[dict[str, Any]]:
    """The workers that have been heard of in the last hour; `silent`: not lately."""
    rows = await connection.fetch(
        "SELECT id, host_id, host_name, number, pid, version, started_at, seen_at, state,"
        " seen_at < now() - $1::interval AS silent FROM workers WHERE seen_at > now() - $2::interval"
        " ORDER BY host_name, number, started_at",
        timedelta(seconds=SILENT_SECONDS),
        FORGOTTEN,
    )
    return [dict(row) for row in rows]


@duty("purge of workers", every=3600)
async def purge(context: Context) -> None:
    """Forget the workers that have not been heard of."""
    await context.database.execute("DELETE FROM workers WHERE seen_at < now() - $1::interval", FORGOTTEN)
