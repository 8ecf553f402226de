"""Operators for tests, in a thread each: real ones, that can be killed at any call."""

import asyncio
import threading
from pathlib import Path
from typing import Any

from control.kubernetes.client import KubernetesClient
from control.kubernetes.lease import Lease
from control.kubernetes.operator import LEASE, Operator
from control.kubernetes.plan import OperatorSettings
from tests.kubernetes.cluster import Cluster

SETTINGS = OperatorSettings(base_domain="db.example", outside_cluster=True)
SECONDS = 20.0


class Killed(BaseException):
    """As by SIGKILL: nothing catches it."""


class MortalClient(KubernetesClient):
    """Dies at a write: with `lives` writes left, and at that one before the server hears of it or `after`."""

    lives = -1
    after = False
    writes = 0
    dead = False

    async def call(self, method: str, path: str, **more: Any) -> Any:
        if self.dead:
            raise Killed
        if method == "GET":
            return await super().call(method, path, **more)
        self.writes += 1
        last = self.writes == self.lives + 1
        if last and not self.after:
            self.dead = True
            raise Killed
        answer = await super().call(method, path, **more)
        if last:
            self.dead = True
            raise Killed
        return answer


class RunningOperator:
    """Use it as a context manager; `ended` is set when it has died of itself."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *,
        settings: OperatorSettings = SETTINGS,
        lives: int = -1,
        after: bool = False,
        lease: bool = False,
        **more: Any,
    ) -> None:
        self._kubeconfig = str(cluster.kubeconfig(folder))
        self._settings = settings
        self._lives, self._after, self._lease, self._more = lives, after, lease, more
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        self.died = False

    def __enter__(self) -> "RunningOperator":
        self._thread.start()
        assert self._started.wait(SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        assert self._loop is not None
        assert self._task is not None
        if not self.ended.is_set():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        client = await MortalClient.connect(self._kubeconfig)
        assert isinstance(client, MortalClient)
        client.lives, client.after = self._lives, self._after
        lease = Lease(client, LEASE, "redisgate", duration=1, deadline=0.6, retry=0.1) if self._lease else None
        operator = Operator(client, self._settings, lease=lease, **self._more)
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(operator.run())
        self._started.set()
        try:
            await self._task
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            if not client.dead:
                self.failure = error
        finally:
            self.died = client.dead
            self.ended.set()
            await client.close()
