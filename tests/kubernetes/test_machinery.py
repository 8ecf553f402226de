"""Reflector, queue, apply and lease against a cluster that misbehaves."""

import asyncio
import contextlib
import itertools
import logging
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from control.kubernetes import lease as leases
from control.kubernetes import queue as queues
from control.kubernetes import reflector as reflectors
from control.kubernetes.apply import OWNER_LABEL, Applier, BeingDeleted, NotOwned
from control.kubernetes.client import (
    CONFIG_MAPS,
    SECRETS,
    Conflict,
    KubernetesClient,
    NotConfigured,
    Object,
    Unavailable,
)
from control.kubernetes.lease import Lease
from control.kubernetes.queue import WorkQueue
from control.kubernetes.reflector import Reflector
from tests.kubernetes.cluster import Cluster
from tests.servers import free_port

SECONDS = 10.0
# of the tests' bookmarks; a reflector that hears nothing for a few of them reconnects
BOOKMARK = 0.1
SILENCE = 0.5


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(bookmark_seconds=BOOKMARK) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _healed(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.heal()


@pytest.fixture
def namespace(cluster: Cluster) -> str:
    name = f"n-{uuid.uuid4().hex[:8]}"
    cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


@pytest.fixture
async def api(cluster: Cluster, tmp_path: Path) -> AsyncIterator[KubernetesClient]:
    client = await KubernetesClient.connect(str(cluster.kubeconfig(tmp_path)))
    yield client
    await client.close()


async def eventually(condition: Callable[[], object], what: str = "the condition", seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        await asyncio.sleep(0.005)


def config_map(namespace: str, name: str, data: dict[str, str] | None = None, **metadata: Any) -> Object:
    metadata = {"name": name, "namespace": namespace} | metadata
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data or {}}


class Heard:
    """What the handler of a reflector was told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __call__(self, kind: str, item: Object, before: Object | None) -> None:
        self.events.append((kind, item["metadata"]["name"]))


@contextlib.asynccontextmanager
async def following(api: KubernetesClient, namespace: str, **options: Any) -> AsyncIterator[tuple[Reflector, Heard]]:
    reflector = Reflector(api, CONFIG_MAPS, namespace=namespace, **({"silence": SILENCE} | options))
    heard = Heard()
    reflector.subscribe(heard)
    async with running(reflector.run()):
        async with asyncio.timeout(SECONDS):
            await reflector.synced.wait()
        yield reflector, heard


@contextlib.asynccontextmanager
async def running(work: Any) -> AsyncIterator[asyncio.Task[Any]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


def lists(cluster: Cluster, namespace: str) -> int:
    """Requests for the list or a watch of the namespace's ConfigMaps."""
    return sum(
        1 for method, path, _ in cluster.requests if method == "GET" and path.endswith(f"{namespace}/configmaps")
    )


# Client


async def test_without_a_kubeconfig_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotConfigured, match="no way to a Kubernetes cluster"):
        await KubernetesClient.connect(str(tmp_path / "missing"))


async def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    cluster = Cluster(free_port())
    client = await KubernetesClient.connect(str(cluster.kubeconfig(tmp_path)))
    with pytest.raises(Unavailable, match="cannot be reached"):
        await client.get(CONFIG_MAPS, "a", "default")
    await client.close()


async def test_every_call_has_an_end(cluster: Cluster, api: KubernetesClient) -> None:
    cluster.slow(30, path="/configmaps/slow")
    with pytest.raises(Unavailable, match="did not answer in time"):
        await api.call("GET", CONFIG_MAPS.path("default", "slow"), seconds=0.1)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_server_that_is_unwell_is_unavailable(cluster: Cluster, api: KubernetesClient, status: int) -> None:
    cluster.fail(status, path="/configmaps/unwell")
    with pytest.raises(Unavailable, match="unwell"):
        await api.get(CONFIG_MAPS, "unwell", "default")


# Reflector


async def test_a_reflector_tells_of_what_is_there_and_of_each_change(
    cluster: Cluster, api: KubernetesClient, namespace: str
) -> None:
    cluster.create(config_map(namespace, "a"))
    async with following(api, namespace) as (reflector, heard):
        assert heard.events == [("ADDED", "a")]
        cluster.create(config_map(namespace, "b"))
        cluster.edit("ConfigMap", namespace, "a", lambda item: item["data"].update(x="1"))
        cluster.delete("ConfigMap", namespace, "b")
        await eventually(lambda: len(heard.events) == 4)
        assert heard.events[1:] == [("ADDED", "b"), ("MODIFIED", "a"), ("DELETED", "b")]
        assert list(reflector.store) == [(namespace, "a")]
        assert reflector.store[namespace, "a"]["data"] == {"x": "1"}
        assert "managedFields" not in reflector.store[namespace, "a"]["metadata"]


async def test_after_410_the_gap_is_told_and_nothing_else(
    cluster: Cluster, api: KubernetesClient, namespace: str
) -> None:
    for name in ("same", "changed", "deleted", "replaced"):
        cluster.create(config_map(namespace, name))
    async with following(api, namespace) as (reflector, heard):
        heard.events.clear()
        cluster.fail(503, path=f"{namespace}/configmaps")
        cluster.end_watches()
        cluster.edit("ConfigMap", namespace, "changed", lambda item: item["data"].update(x="1"))
        for name in ("deleted", "replaced"):
            cluster.delete("ConfigMap", namespace, name)
        for name in ("replaced", "new"):
            cluster.create(config_map(namespace, name))
        cluster.forget_history()
        cluster.heal()
        await eventually(lambda: len(heard.events) >= 5)
        assert sorted(heard.events) == sorted(
            [
                ("MODIFIED", "changed"),
                ("DELETED", "deleted"),
                ("DELETED", "replaced"),
                ("ADDED", "replaced"),
                ("ADDED", "new"),
            ]
        )
        assert heard.events.index(("DELETED", "replaced")) < heard.events.index(("ADDED", "replaced"))
        assert sorted(name for _, name in reflector.store) == ["changed", "new", "replaced", "same"]


async def test_a_watch_that_ends_goes_on_without_a_list(
    cluster: Cluster, api: KubernetesClient, namespace: str
) -> None:
    cluster.create(config_map(namespace, "a"))
    async with following(api, namespace) as (_, heard):
        await eventually(lambda: cluster.watching(namespace) == 1)
        before = lists(cluster, namespace)
        assert cluster.end_watches(namespace) == 1
        cluster.create(config_map(namespace, "b"))
        await eventually(lambda: ("ADDED", "b") in heard.events)
        assert heard.events == [("ADDED", "a"), ("ADDED", "b")]
        assert lists(cluster, namespace) == before + 1  # the watch alone


async def test_a_half_open_watch_is_noticed_by_its_silence(
    cluster: Cluster, api: KubernetesClient, namespace: str
) -> None:
    async with following(api, namespace) as (reflector, heard):
        await eventually(lambda: cluster.watching(namespace) == 1)
        assert cluster.silence_watches(namespace) == 1
        cluster.create(config_map(namespace, "a"))
        await eventually(lambda: heard.events == [("ADDED", "a")], seconds=SILENCE * 4)
        assert reflector.trouble is None


async def test_bookmarks_alone_keep_a_watch_open(cluster: Cluster, api: KubernetesClient, namespace: str) -> None:
    async with following(api, namespace, silence=SILENCE) as (reflector, _):
        await eventually(lambda: cluster.watching(namespace) == 1)
        before, began = lists(cluster, namespace), reflector.heard
        await eventually(lambda: reflector.heard > began + 2 * SILENCE)
        assert lists(cluster, namespace) == before


async def test_a_server_away_is_told_once_and_caught_up_with(
    cluster: Cluster, api: KubernetesClient, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with following(api, namespace) as (reflector, heard):
        await eventually(lambda: cluster.watching(namespace) == 1)
        caplog.set_level(logging.INFO, reflectors.log.name)
        cluster.cut(path=namespace)
        cluster.end_watches(namespace)
        before = lists(cluster, namespace)
        await eventually(lambda: lists(cluster, namespace) >= before + 4)
        assert reflector.trouble is not None
        cluster.create(config_map(namespace, "a"))
        cluster.heal()
        await eventually(lambda: heard.events == [("ADDED", "a")])
        assert reflector.trouble is None
        messages = [record.getMessage() for record in caplog.records]
        assert sum("trying again" in message for message in messages) == 1
        assert messages[-1] == "configmaps: followed again"


async def test_a_large_collection_is_read_in_pages_that_may_expire(
    cluster: Cluster, api: KubernetesClient, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control.kubernetes.client.PAGE", 2)
    for index in range(7):
        cluster.create(config_map(namespace, f"c{index}"))
    cluster.fail(410, count=1, path=f"{namespace}/configmaps")
    async with following(api, namespace) as (reflector, heard):
        assert len(reflector.store) == 7
        assert len(heard.events) == 7


async def test_a_handler_that_fails_is_our_bug_and_stops_nobody(
    cluster: Cluster, api: KubernetesClient, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.create(config_map(namespace, "a"))
    reflector = Reflector(api, CONFIG_MAPS, namespace=namespace)
    heard = Heard()

    def broken(kind: str, item: Object, before: Object | None) -> None:
        raise ZeroDivisionError

    reflector.subscribe(broken)
    reflector.subscribe(heard)
    async with running(reflector.run()):
        await eventually(lambda: heard.events)
    assert "a handler of configmaps failed" in caplog.text


async def test_a_definition_that_comes_later_is_followed_then(
    cluster: Cluster, api: KubernetesClient, namespace: str
) -> None:
    from control.kubernetes.client import Resource

    group = f"g{uuid.uuid4().hex[:6]}.example.com"
    reflector = Reflector(api, Resource(f"{group}/v1", "things", "Thing"))
    async with running(reflector.run()):
        await eventually(lambda: reflector.trouble != "not read yet")
        assert not reflector.synced.is_set()
        version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": {"type": "object"}}}
        spec = {"group": group, "scope": "Namespaced", "names": {"plural": "things", "kind": "Thing"}}
        cluster.create(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": f"things.{group}"},
                "spec": spec | {"versions": [version]},
            }
        )
        await asyncio.wait_for(reflector.synced.wait(), SECONDS)


# Queue


async def test_a_key_is_worked_on_once_at_a_time_and_again_for_what_came_meanwhile() -> None:
    began: list[str] = []
    active: set[str] = set()
    gate = asyncio.Event()

    async def work(key: str) -> None:
        assert key not in active
        active.add(key)
        began.append(key)
        await gate.wait()
        active.discard(key)

    queue = WorkQueue(work, workers=4)
    async with running(queue.run()):
        for _ in range(3):
            queue.add("a")
        queue.add("b")
        await eventually(lambda: len(began) == 2)
        for _ in range(3):
            queue.add("a")
        assert len(queue) == 2
        gate.set()
        await eventually(lambda: len(queue) == 0)
        assert sorted(began) == ["a", "a", "b"]


async def test_a_failure_is_tried_again_with_growing_pauses_up_to_the_cap(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(queues, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(queues, "BACKOFF_SECONDS_MOST", 0.04)
    times: list[float] = []

    async def work(key: str) -> None:
        times.append(time.monotonic())
        if len(times) < 9:
            raise Unavailable("away")

    queue = WorkQueue(work)
    async with running(queue.run()):
        queue.add("a")
        await eventually(lambda: len(times) == 9)
        await eventually(lambda: queue.failures("a") == 0)
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert pauses[0] >= 0.0075
    assert all(pause >= 0.03 for pause in pauses[2:])
    assert sum("away" in record.getMessage() for record in caplog.records) == 2


async def test_a_change_does_not_wait_for_the_pause_of_a_failure() -> None:
    runs = 0

    async def work(key: str) -> float | None:
        nonlocal runs
        runs += 1
        return 60.0

    queue = WorkQueue(work)
    async with running(queue.run()):
        queue.add("a")
        await eventually(lambda: runs == 1)
        queue.add("a")
        await eventually(lambda: runs == 2)


async def test_of_two_times_the_earlier_one_counts() -> None:
    runs: list[float] = []

    async def work(key: str) -> None:
        runs.append(time.monotonic())

    queue = WorkQueue(work)
    began = time.monotonic()
    async with running(queue.run()):
        queue.add("a", 0.05)
        queue.add("a", 30)
        queue.add("b", 30)
        queue.add("b", 0.05)
        await eventually(lambda: len(runs) == 2)
    assert 0.045 <= runs[0] - began < 5


async def test_a_bug_in_the_work_on_one_key_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    done: set[str] = set()

    async def work(key: str) -> None:
        if key == "bad":
            raise ZeroDivisionError
        done.add(key)

    queue = WorkQueue(work, workers=1)
    async with running(queue.run()):
        queue.add("bad")
        queue.add("good")
        await eventually(lambda: done)
    assert "a bug of ours" in caplog.text


# Apply


def owned(namespace: str, name: str, owner: str, data: dict[str, str]) -> Object:
    return config_map(namespace, name, data, labels={OWNER_LABEL: owner})


def patches(cluster: Cluster, namespace: str) -> int:
    return sum(1 for method, path, _ in cluster.requests if method == "PATCH" and f"/{namespace}/" in path)


async def test_what_has_not_changed_is_not_sent(cluster: Cluster, api: KubernetesClient, namespace: str) -> None:
    async with following(api, namespace) as (reflector, heard):
        applier = Applier(api, "operator")
        applier.watch(reflector)
        manifest = owned(namespace, "a", "u1", {"x": "1"})
        for _ in range(3):
            await applier.apply(manifest, "u1")
        assert patches(cluster, namespace) == 1
        await eventually(lambda: heard.events)
        await applier.apply(manifest, "u1")
        assert patches(cluster, namespace) == 1
        # by hand: repaired with the next look
        cluster.edit("ConfigMap", namespace, "a", lambda item: item["data"].update(x="2"))
        await eventually(lambda: len(heard.events) == 2)
        result = await applier.apply(manifest, "u1")
        assert result["data"] == {"x": "1"}
        # a changed wish
        await applier.apply(owned(namespace, "a", "u1", {"y": "1"}), "u1")
        live = cluster.find("ConfigMap", namespace, "a")
        assert live is not None
        assert live["data"] == {"y": "1"}
        assert patches(cluster, namespace) == 3


async def test_what_was_deleted_is_made_again(cluster: Cluster, api: KubernetesClient, namespace: str) -> None:
    async with following(api, namespace) as (reflector, heard):
        applier = Applier(api, "operator")
        applier.watch(reflector)
        manifest = owned(namespace, "a", "u1", {"x": "1"})
        await applier.apply(manifest, "u1")
        cluster.delete("ConfigMap", namespace, "a")
        await eventually(lambda: ("DELETED", "a") in heard.events)
        await applier.apply(manifest, "u1")
        assert cluster.find("ConfigMap", namespace, "a") is not None


@pytest.mark.parametrize("look", ["copy", "server"])
async def test_an_object_of_another_owner_is_left_alone(
    cluster: Cluster, api: KubernetesClient, namespace: str, look: str
) -> None:
    theirs = cluster.create(owned(namespace, "a", "u0", {"x": "0"}))
    async with following(api, namespace) as (reflector, _):
        applier = Applier(api, "operator")
        if look == "copy":
            applier.watch(reflector)
        with pytest.raises(NotOwned, match=f"ConfigMap {namespace}/a exists and belongs to the instance with uid u0"):
            await applier.apply(owned(namespace, "a", "u1", {"x": "1"}), "u1")
        with pytest.raises(NotOwned):
            await applier.create(owned(namespace, "a", "u1", {"x": "1"}), "u1")
        assert await applier.delete(CONFIG_MAPS, "a", namespace, "u1") is True
    assert cluster.find("ConfigMap", namespace, "a") == theirs


async def test_who_takes_the_name_between_look_and_write_is_not_overwritten(
    cluster: Cluster, api: KubernetesClient, namespace: str
) -> None:
    cluster.create(owned(namespace, "a", "u1", {"x": "0"}))
    async with following(api, namespace) as (reflector, _):
        applier = Applier(api, "operator")
        applier.watch(reflector)
        cluster.silence_watches(namespace)  # the copy is old now
        cluster.delete("ConfigMap", namespace, "a")
        theirs = cluster.create(owned(namespace, "a", "u2", {"x": "2"}))
        with pytest.raises(Conflict):
            await applier.apply(owned(namespace, "a", "u1", {"x": "1"}), "u1")
        assert cluster.find("ConfigMap", namespace, "a") == theirs


async def test_the_successor_waits_until_the_old_object_is_gone(
    cluster: Cluster, api: KubernetesClient, namespace: str
) -> None:
    cluster.create(config_map(namespace, "a", labels={OWNER_LABEL: "u1"}, finalizers=["redisgate.io/test"]))
    cluster.delete("ConfigMap", namespace, "a")
    applier = Applier(api, "operator")
    with pytest.raises(BeingDeleted):
        await applier.apply(owned(namespace, "a", "u1", {}), "u1")
    assert await applier.delete(CONFIG_MAPS, "a", namespace, "u1") is False
    cluster.edit("ConfigMap", namespace, "a", lambda item: item["metadata"].pop("finalizers"))
    assert await applier.delete(CONFIG_MAPS, "a", namespace, "u1") is True
    await applier.apply(owned(namespace, "a", "u1", {}), "u1")


async def test_two_that_create_at_once_get_one_secret(cluster: Cluster, api: KubernetesClient, namespace: str) -> None:
    def secret(password: str) -> Object:
        metadata = {"name": "s", "namespace": namespace, "labels": {OWNER_LABEL: "u1"}}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"password": password}}

    appliers = [Applier(api, "operator") for _ in range(8)]
    made = await asyncio.gather(*(applier.create(secret(f"p{n}"), "u1") for n, applier in enumerate(appliers)))
    assert len({item["data"]["password"] for item in made}) == 1
    assert (await api.get(SECRETS, "s", namespace))["data"] == made[0]["data"]


async def test_an_apply_whose_answer_is_lost_is_safe_to_repeat(
    cluster: Cluster, api: KubernetesClient, namespace: str
) -> None:
    applier = Applier(api, "operator")
    manifest = owned(namespace, "a", "u1", {"x": "1"})
    cluster.fail(503, count=1, method="PATCH", path=namespace, after=True)
    with pytest.raises(Unavailable):
        await applier.apply(manifest, "u1")
    made = cluster.find("ConfigMap", namespace, "a")
    result = await applier.apply(manifest, "u1")
    assert made is not None
    assert result["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


# Lease

FAST = {"duration": 2, "deadline": 1.0, "retry": 0.05}


class Worker:
    """Work that says when it runs, and a lease for it."""

    def __init__(self, api: KubernetesClient, namespace: str, identity: str) -> None:
        self.lease = Lease(api, "operator", namespace, identity=identity, **FAST)  # type: ignore[arg-type]
        self.active = False
        self.spans: list[tuple[float, float]] = []

    async def work(self) -> None:
        began = time.monotonic()
        self.active = True
        try:
            await asyncio.Event().wait()
        finally:
            self.active = False
            self.spans.append((began, time.monotonic()))


async def looked(cluster: Cluster, namespace: str) -> None:
    """Until whoever waits for the lease has looked at it some times more."""

    def looks() -> int:
        return sum(1 for method, path, _ in cluster.requests if method == "GET" and f"{namespace}/leases" in path)

    before = looks()
    await eventually(lambda: looks() >= before + 4)


async def test_one_of_two_works_and_the_other_follows_at_once_when_it_stops(
    cluster: Cluster, api: KubernetesClient, namespace: str
) -> None:
    first, second = Worker(api, namespace, "first"), Worker(api, namespace, "second")
    async with running(first.lease.run(first.work)) as task:
        await eventually(lambda: first.active)
        async with running(second.lease.run(second.work)):
            await looked(cluster, namespace)
            assert not second.active
            task.cancel()
            await eventually(lambda: second.active, seconds=1.0)
            assert not first.active
            held = cluster.find("Lease", namespace, "operator")
            assert held is not None
            assert held["spec"]["holderIdentity"] == "second"
            assert held["spec"]["leaseTransitions"] == 1
    given_back = cluster.find("Lease", namespace, "operator")
    assert given_back is not None
    assert given_back["spec"]["holderIdentity"] == ""


async def test_work_stops_before_anybody_else_may_start_when_the_server_is_away(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    """The first is cut off alone; the second sees the server all the time."""
    clients = [await KubernetesClient.connect(str(cluster.kubeconfig(tmp_path))) for _ in range(2)]
    first, second = Worker(clients[0], namespace, "first"), Worker(clients[1], namespace, "second")
    async with running(first.lease.run(first.work)):
        await eventually(lambda: first.active)
        async with running(second.lease.run(second.work)):

            async def away(*_: Any, **__: Any) -> Object:
                await asyncio.Event().wait()
                raise AssertionError

            with pytest.MonkeyPatch.context() as patch:
                cut = time.monotonic()
                patch.setattr(clients[0], "call", away)
                await eventually(lambda: not first.active)
                assert time.monotonic() - cut <= FAST["deadline"] + 0.3
                assert not second.active
                assert not first.lease.held
                await eventually(lambda: second.active, seconds=5)
                assert second.lease.held
    assert first.spans[0][1] < second.spans[0][0]
    for client in clients:
        await client.close()


async def test_a_lease_taken_by_hand_stops_the_work(cluster: Cluster, api: KubernetesClient, namespace: str) -> None:
    worker = Worker(api, namespace, "first")
    async with running(worker.lease.run(worker.work)):
        await eventually(lambda: worker.active)
        cluster.edit("Lease", namespace, "operator", lambda item: item["spec"].update(holderIdentity="somebody"))
        await eventually(lambda: not worker.active, seconds=1)
        held = cluster.find("Lease", namespace, "operator")
        assert held is not None
        assert held["spec"]["holderIdentity"] == "somebody"


async def test_a_lease_touched_by_hand_is_kept(cluster: Cluster, api: KubernetesClient, namespace: str) -> None:
    worker = Worker(api, namespace, "first")
    async with running(worker.lease.run(worker.work)):
        await eventually(lambda: worker.active)
        touched = cluster.edit("Lease", namespace, "operator", lambda i: i["metadata"].update(labels={"a": "b"}))
        version = int(touched["metadata"]["resourceVersion"])

        def renewed() -> bool:
            held = cluster.find("Lease", namespace, "operator")
            return held is not None and int(held["metadata"]["resourceVersion"]) > version + 1

        await eventually(renewed)
        assert worker.active
        assert worker.spans == []


async def test_work_that_fails_gives_the_lease_back_and_is_told(
    cluster: Cluster, api: KubernetesClient, namespace: str
) -> None:
    async def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Lease(api, "operator", namespace).run(work)
    held = cluster.find("Lease", namespace, "operator")
    assert held is not None
    assert held["spec"]["holderIdentity"] == ""


HOLDER = """
import asyncio, sys
from control.kubernetes.client import KubernetesClient
from control.kubernetes.lease import Lease

async def work():
    print("working", flush=True)
    await asyncio.Event().wait()

async def main():
    api = await KubernetesClient.connect(sys.argv[1])
    await Lease(api, "operator", sys.argv[2], duration=2, deadline=1.0, retry=0.05).run(work)

asyncio.run(main())
"""


async def test_after_sigkill_the_other_takes_over_when_the_lease_has_run_out(
    cluster: Cluster, api: KubernetesClient, namespace: str, tmp_path: Path
) -> None:
    process = subprocess.Popen(  # noqa: ASYNC220  starting it takes no time
        [sys.executable, "-c", HOLDER, str(cluster.kubeconfig(tmp_path)), namespace], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), SECONDS)
        assert line == b"working\n"
        worker = Worker(api, namespace, "second")
        async with running(worker.lease.run(worker.work)):
            await looked(cluster, namespace)
            assert not worker.active
            process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            await eventually(lambda: worker.active, seconds=20)
            # The holder renews each 0.05 s, and gives up when it could not for its deadline.
            assert time.monotonic() - killed >= FAST["duration"] - FAST["deadline"]
    finally:
        process.kill()
        process.wait(SECONDS)
        process.stdout.close()


def test_the_holder_stops_well_before_others_start() -> None:
    assert leases.DEADLINE_SECONDS + leases.RETRY_SECONDS < leases.DURATION_SECONDS
