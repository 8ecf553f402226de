"""One MONITOR connection for any number of viewers.

MONITOR shows what the whole server runs; lines of other databases than the
instance's are left out, since they are another instance's.
"""

import re
from typing import Any

from resp.address import Address
from resp.encoder import encode_command
from resp.errors import ReplyLost, RespError, Unavailable
from resp.parser import ErrorReply
from resp.subscriptions import Message, PushConnection, PushHub, Subscriber

_LINE = re.compile(rb"[0-9.]+ \[([0-9]+) ")


class MonitorHub(PushHub):
    """MONITOR, shared; opened for the first viewer and closed after the last."""

    def __init__(self, address: Address, *, connect_timeout: float) -> None:
        super().__init__(address, connect_timeout=connect_timeout)
        self._viewers: dict[Subscriber, None] = {}
        self._confirmed = False
        self._database = b"%d" % address.database

    def watch(self, viewer: Subscriber) -> None:
        """Begin to deliver lines to `viewer`, after its `subscribed` was called."""
        self._viewers[viewer] = None
        if self._confirmed:
            viewer.subscribed(b"", False)
        self._open()

    def leave(self, viewer: Subscriber) -> None:
        """Stop; the connection is closed with the last viewer."""
        self._viewers.pop(viewer, None)
        if not self._viewers:
            self.close()

    def _wanted(self) -> bool:
        return bool(self._viewers)

    def _connected(self, connection: PushConnection) -> None:
        connection.write(encode_command([b"MONITOR"]))

    def _ping(self, connection: PushConnection) -> None:
        # A connection in MONITOR answers PING on servers of version 7 and later; the kernel finds dead peers on others.
        connection.write(encode_command([b"PING"]))

    def _received(self, reply: Any) -> None:
        assert self._connection is not None
        if isinstance(reply, ErrorReply):
            self._connection.close(Unavailable(str(reply)))
        elif not isinstance(reply, bytes):
            self._connection.close(ReplyLost("the instance broke the protocol: not a MONITOR line"))
        elif not self._confirmed:
            self._confirmed = True
            for viewer in list(self._viewers):
                viewer.subscribed(b"", False)
        else:
            match = _LINE.match(reply)
            if match is not None and match[1] == self._database:
                message = Message(b"", reply)
                for viewer in list(self._viewers):
                    viewer.deliver(message)

    def _all_lost(self, error: RespError) -> None:
        self._confirmed = False
        viewers, self._viewers = self._viewers, {}
        for viewer in viewers:
            viewer.lost(error)
