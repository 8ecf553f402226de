"""A copy of one collection of the cluster, kept up to date, and who wants to hear of changes.

List, then watch from there. Three things make it stay right: after 410 the list is read again and compared with what is
known, so that what was deleted in the gap is told as well; a watch that is silent for longer than the server's
bookmarks is dead and opened anew; an object that was made again under its name is a deletion and an addition.
"""

import asyncio
import logging
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from control.kubernetes.client import (
    Gone,
    KubernetesClient,
    KubernetesError,
    NotFound,
    Object,
    Resource,
    key_of,
)

log = logging.getLogger(__name__)

Key = tuple[str, str]
# what happened (ADDED, MODIFIED, DELETED), the object as it is or last was, and as it was before
Handler = Callable[[str, Object, Object | None], None]

ADDED: Final = "ADDED"
MODIFIED: Final = "MODIFIED"
DELETED: Final = "DELETED"

# the server ends a watch after about this long; it goes on from the same version, without a list
WATCH_SECONDS: Final = 300
# bookmarks come about every minute; longer without a byte, and the connection is half-open
SILENCE_SECONDS: Final = 75.0
# before trying again, doubled from the first to the second
RETRY_SECONDS: Final = 0.05
RETRY_SECONDS_MOST: Final = 3.0


class Reflector:
    """`run()` it in a task. `store` holds the objects by (namespace, name), without managedFields, as plain
    dictionaries that nobody may alter; what bounds it is the collection itself, cut down by selectors and `keep`."""

    def __init__(
        self,
        client: KubernetesClient,
        resource: Resource,
        *,
        namespace: str | None = None,
        labels: str = "",
        fields: str = "",
        keep: Callable[[Object], Object] | None = None,
        silence: float = SILENCE_SECONDS,
    ) -> None:
        self.resource = resource
        self.namespace = namespace
        self.store: dict[Key, Object] = {}
        # set when the first list has been told to all handlers
        self.synced = asyncio.Event()
        # why the copy may be old, for people; None while the watch is well
        self.trouble: str | None = "not read yet"
        # of the monotonic clock: when the server was last heard
        self.heard = 0.0
        self._client = client
        self._labels = labels
        self._fields = fields
        self._keep = keep
        self._silence = silence
        self._handlers: list[Handler] = []
        self._version = ""

    def subscribe(self, handler: Handler) -> None:
        """Call `handler` for each change from now on. It must not wait, and what it raises is logged as our bug."""
        self._handlers.append(handler)

    async def run(self) -> None:
        """Follow the collection until cancelled."""
        wait = RETRY_SECONDS
        while True:
            began = time.monotonic()
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                wait = RETRY_SECONDS
                continue  # the server ended the watch, as it does
            except Gone as error:
                log.info("%s: %s; reading the list again", self.resource.plural, error)
                self._version = ""
            except KubernetesError as error:
                if self.trouble is None:
                    log.warning("%s: %s; trying again", self.resource.plural, error)
                self.trouble = str(error)
                if isinstance(error, NotFound):  # the definition is not there, or has been replaced
                    self._version = ""
            if self.heard > began:  # it answered since: start small again
                wait = RETRY_SECONDS
            await asyncio.sleep(wait * random.uniform(0.75, 1.25))
            wait = min(wait * 2, RETRY_SECONDS_MOST)

    async def _list(self) -> None:
        found: dict[Key, Object] = {}
        version = ""
        pages = self._client.pages(self.resource, self.namespace, labels=self._labels, fields=self._fields)
        async for items, version in pages:  # noqa: B007
            for item in items:
                found[key_of(item)] = self._kept(item)
        self._heard()
        for key, item in list(self.store.items()):
            if key not in found:
                self._remove(key, item)
        for key, item in found.items():
            self._put(key, item)
        self._version = version
        self.synced.set()

    async def _watch(self) -> None:
        events = self._client.watch(
            self.resource,
            self.namespace,
            self._version,
            labels=self._labels,
            fields=self._fields,
            seconds=int(WATCH_SECONDS * random.uniform(0.9, 1.1)),
            silence=self._silence,
        )
        async for kind, item in events:
            self._heard()
            if kind != "BOOKMARK":
                key = key_of(item)
                if kind == DELETED:
                    self._remove(key, self._kept(item))
                else:
                    self._put(key, self._kept(item))
            # after the handlers: what they were not told is not behind us
            self._version = item["metadata"]["resourceVersion"]

    def _heard(self) -> None:
        self.heard = time.monotonic()
        if self.trouble is not None:
            if self.synced.is_set():
                log.info("%s: followed again", self.resource.plural)
            self.trouble = None

    def _kept(self, item: Object) -> Object:
        item["metadata"].pop("managedFields", None)
        if self._keep is not None:
            item = self._keep(item)
        for part in ("metadata", "status"):
            if part in item:
                item[part] = _shared(item[part])
        return item

    def _put(self, key: Key, item: Object) -> None:
        before = self.store.get(key)
        if before is not None and before["metadata"]["uid"] != item["metadata"]["uid"]:
            self._remove(key, before)
            before = None
        elif before is not None and before["metadata"]["resourceVersion"] == item["metadata"]["resourceVersion"]:
            return
        self.store[key] = item
        self._tell(ADDED if before is None else MODIFIED, item, before)

    def _remove(self, key: Key, item: Object) -> None:
        before = self.store.pop(key, None)
        if before is not None:
            self._tell(DELETED, item, before)

    def _tell(self, kind: str, item: Object, before: Object | None) -> None:
        for handler in self._handlers:
            try:
                handler(kind, item, before)
            except Exception:
                log.exception("a handler of %s failed for %s", self.resource.plural, "/".join(key_of(item)))


def _shared(value: Any) -> Any:
    """With one string for all that are equal: the objects of an instance have their labels and their owner in common,
    and the conditions of all instances read alike. That is a third of what would be kept."""
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, dict):
        return {sys.intern(name): _shared(inner) for name, inner in value.items()}
    return [_shared(inner) for inner in value] if isinstance(value, list) else value
