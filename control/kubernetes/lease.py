"""One of several operators works: who holds a Lease object and renews it in time.

Whoever cannot renew for DEADLINE_SECONDS stops its work at once, and before that time nobody else starts: the others
wait for DURATION_SECONDS without a change, by their own clock from the moment that they saw it, so clocks need not
agree. The work is told by cancelling it, then the lease is given back, so a successor starts within RETRY_SECONDS.
"""

import asyncio
import contextlib
import datetime
import logging
import os
import socket
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, Final

from control.kubernetes.client import (
    LEASES,
    AlreadyExists,
    Conflict,
    KubernetesClient,
    KubernetesError,
    NotFound,
    Object,
)

log = logging.getLogger(__name__)

DURATION_SECONDS: Final = 15
DEADLINE_SECONDS: Final = 10.0
RETRY_SECONDS: Final = 2.0
# to give it back when we stop; after that the others wait it out
RELEASE_SECONDS: Final = 2.0


class Lease:
    """`await run(work)`: wait for the lease, work, stop when it is lost, wait again."""

    def __init__(
        self,
        client: KubernetesClient,
        name: str,
        namespace: str,
        *,
        identity: str | None = None,
        duration: int = DURATION_SECONDS,
        deadline: float = DEADLINE_SECONDS,
        retry: float = RETRY_SECONDS,
    ) -> None:
        self.identity = identity or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.held = False
        self._client = client
        self._name = name
        self._namespace = namespace
        self._duration = duration
        self._deadline = deadline
        self._retry = retry
        # as last seen, and when that was by our clock
        self._seen: Object | None = None
        self._seen_at = 0.0
        self._lease: Object | None = None

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Until cancelled, or until `work()` ends or raises by itself; then the lease is given back."""
        while True:
            last_renewal = await self._acquire()
            self.held = True
            log.info("%s holds the lease %s/%s", self.identity, self._namespace, self._name)
            task = asyncio.create_task(work())
            renewal = asyncio.create_task(self._renew(last_renewal))
            try:
                await asyncio.wait({task, renewal}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.held = False
                await _stop(renewal)
                ended = task.done()
                await _stop(task)
                if not renewal.cancelled():
                    log.warning("the lease %s/%s is lost: the work has been stopped", self._namespace, self._name)
                else:
                    await self._release()
            if ended:
                return task.result()

    async def _acquire(self) -> float:
        """Wait until the lease is ours. Answers the time from which it counts, of the loop's clock."""
        logged = ""
        while True:
            began = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(self._deadline):
                    if await self._try_to_take():
                        return began
            except (KubernetesError, TimeoutError) as error:
                if str(error) != logged:
                    log.warning("the lease %s/%s cannot be had: %s", self._namespace, self._name, error)
                logged = str(error)
            await asyncio.sleep(self._retry)

    async def _try_to_take(self) -> bool:
        now = asyncio.get_running_loop().time()
        try:
            lease = await self._client.get(LEASES, self._name, self._namespace)
        except NotFound:
            item = {
                "apiVersion": LEASES.api_version,
                "kind": LEASES.kind,
                "metadata": {"name": self._name, "namespace": self._namespace},
                "spec": self._spec({}),
            }
            try:
                self._lease = await self._client.create(item)
            except AlreadyExists:
                return False
            return True
        spec = lease.get("spec") or {}
        if self._seen is None or spec != self._seen:
            if spec.get("holderIdentity"):
                log.info("the lease %s/%s is held by %s", self._namespace, self._name, spec["holderIdentity"])
            self._seen, self._seen_at = spec, now
        patience = float(spec.get("leaseDurationSeconds") or self._duration)
        if spec.get("holderIdentity") and now < self._seen_at + patience:
            return False
        try:
            self._lease = await self._client.replace(lease | {"spec": self._spec(spec)})
        except Conflict:  # somebody was quicker
            return False
        return True

    async def _renew(self, last: float) -> None:
        """Returns when the lease is lost: `deadline` seconds without a renewal, or taken by somebody else."""
        clock = asyncio.get_running_loop().time
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout_at(last + self._deadline):
                    await asyncio.sleep(self._retry)
                    began = clock()
                    assert self._lease is not None
                    try:
                        renewed = self._lease | {"spec": self._spec(self._lease["spec"])}
                        self._lease = await self._client.replace(renewed)
                    except (Conflict, NotFound) as error:
                        # touched by hand, or ours by an answer that got lost: see whose it is
                        log.warning("the lease %s/%s has changed: %s", self._namespace, self._name, error)
                        with contextlib.suppress(KubernetesError):
                            self._lease = await self._client.get(LEASES, self._name, self._namespace)
                            if self._lease["spec"].get("holderIdentity") != self.identity:
                                return
                        continue
                    except KubernetesError as error:
                        log.warning("the lease %s/%s could not be renewed: %s", self._namespace, self._name, error)
                        continue
                    last = began

    async def _release(self) -> None:
        """So that a successor need not wait; failing that, it waits."""
        if self._lease is None:
            return
        now = _now()
        spec = self._lease["spec"] | {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": now}
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                await self._client.replace(self._lease | {"spec": spec})
        except (KubernetesError, TimeoutError) as error:
            log.warning("the lease %s/%s could not be given back: %s", self._namespace, self._name, error)
        self._lease = None

    def _spec(self, before: Object) -> Object:
        mine = before.get("holderIdentity") == self.identity
        now = _now()
        return before | {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._duration,
            "acquireTime": before["acquireTime"] if mine else now,
            "renewTime": now,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (not mine and bool(before)),
        }


async def _stop(task: asyncio.Task[Any]) -> None:
    """Cancel it and wait for its end; what it raised stays in it."""
    task.cancel()
    await asyncio.wait({task})


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
