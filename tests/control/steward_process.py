"""Stewards as processes of their own that end by SIGKILL at a chosen step, or after a chosen time.

Run as a module it reads one JSON object per line, the settings with "kill_at" and "seconds", and forks a steward for
each, which is what saves importing everything anew. It answers with the steps that were taken and how the steward
ended.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from redisgate.config import ControlSettings, Settings

PATIENCE = 20
"""Seconds after which a steward that was not killed is ended by SIGALRM."""


class Stewards:
    """Whoever forks them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.control.steward_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, settings: Settings, kill_at: str) -> list[str]:
        """Have a steward run until it has taken the step; the steps it took. Fails if it ended in another way."""
        return self._run(settings, signal.SIGKILL, kill_at=kill_at, seconds=PATIENCE)

    def run_for(self, settings: Settings, seconds: float) -> list[str]:
        """Have a steward run for so long, wherever it is then; the steps it took. Fails if it ended in another way."""
        return self._run(settings, signal.SIGALRM, kill_at=None, seconds=seconds)

    def _run(self, settings: Settings, end: signal.Signals, *, kill_at: str | None, seconds: float) -> list[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {
            "state_dir": str(settings.state_dir),
            "secret_key": settings.secret_key.decode(),
            "control": dataclasses.asdict(settings.control),
            "kill_at": kill_at,
            "seconds": seconds,
        }
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert answer["status"] == -end, answer
        return list(answer["steps"])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


def _steward(asked: dict[str, Any], steps: int) -> None:
    from control import steward
    from control.app import make_context

    # Without a handler the alarm ends it as a SIGKILL would.
    signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
    control = {name: tuple(value) if isinstance(value, list) else value for name, value in asked["control"].items()}
    settings = Settings(
        state_dir=Path(asked["state_dir"]),
        secret_key=asked["secret_key"].encode(),
        secret_key_is_default=False,
        control=ControlSettings(**control),
    )

    def on_step(step: str) -> None:
        os.write(steps, step.encode() + b"\n")
        if step == asked["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    async def run() -> None:
        await steward.run(make_context(settings, name="steward to be killed"), asyncio.Event(), on_step=on_step)

    asyncio.run(run())


def main() -> None:
    """See the module."""
    from control import app, steward  # noqa: F401

    for line in sys.stdin:
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                os.close(receive)
                _steward(json.loads(line), send)
                status = 0
            os._exit(status)
        os.close(send)
        with open(receive) as file:
            steps = file.read().split("\n")[:-1]
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"steps": steps, "status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
