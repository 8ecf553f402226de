"""The process that answers scrapes: `/metrics`, and `/status` for `redisgate top`, on a port of its own.

It reads what the others have published (`redisgate.board`) and asks nobody: a
scrape costs the workers nothing, and is answered while they are stuck.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import time

import uvloop

from redisgate import metrics
from redisgate.board import Board
from redisgate.config import Limits, Settings
from redisgate.counters import Counters
from redisgate.exchange import Exchange
from redisgate.http_head import Head, header_fields
from redisgate.http_protocol import HttpConnection, HttpServer
from redisgate.http_response import ResponseHeads
from redisgate.replies import JSON
from redisgate.status import status

BACKLOG = 16
"""Scrapes that wait to be accepted."""
MAX_CONNECTIONS = 64
"""Whoever reads metrics, at a time."""

log = logging.getLogger(__name__)


class Exporter:
    """Answers whoever asks; see `redisgate.http_protocol.Handler`."""

    def __init__(self, board: Board, instances: int) -> None:
        """`instances`: how many are named at most."""
        self._board = board
        before = board.own()
        self._shown = metrics.Shown(instances, metrics.decoded(before)[0].state if before is not None else None)
        self.scrapes = 0

    def prepare(self, head: Head) -> None:
        """Everything here is one rendering."""
        head.rendering = JSON

    def handle(self, connection: HttpConnection, method: bytes, target: bytes, head: Head, body: bytes) -> None:
        """Answer one request."""
        exchange = Exchange(connection, head, method)
        try:
            self._answer(exchange, method, target.partition(b"?")[0], head)
        except Exception as error:
            exchange.bug(error)

    def _answer(self, exchange: Exchange, method: bytes, path: bytes, head: Head) -> None:
        if method not in (b"GET", b"HEAD"):
            exchange.error(405, b"ERR method not allowed, use GET", b"Allow: GET, HEAD\r\n")
        elif path == b"/metrics":
            openmetrics = _wants_openmetrics(head)
            content_type = metrics.OPENMETRICS if openmetrics else metrics.PROMETHEUS
            exchange.respond(200, self.scrape(openmetrics=openmetrics), content_type)
        elif path == b"/status":
            exchange.respond(200, json.dumps(status(self._board)).encode(), b"application/json")
        elif path == b"/health":
            exchange.respond(200, b'{"status":"ok"}', b"application/json")
        else:
            exchange.error(404, b"ERR here are /metrics, /status and /health")

    def collect(self, document: metrics.Document) -> None:
        """For `redisgate.metrics`: what this process counts, and what the next one has to know."""
        document.count("redisgate_scrapes_total", self.scrapes)
        document.state = self._shown.state

    def scrape(self, *, openmetrics: bool) -> bytes:
        """All metrics, as text."""
        self.scrapes += 1
        document = metrics.gathered(self._board)
        metrics.name_instances(document, self._shown.choose(document.instances))
        return metrics.render(document, openmetrics=openmetrics)


def _wants_openmetrics(head: Head) -> bool:
    """Whether the Accept header names it, and not with a weight of zero or below that of the older format."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for name, value in header_fields(head):
        if name == b"accept":
            for item in value.decode("latin-1").split(","):
                kind, *parameters = (part.strip().lower() for part in item.split(";"))
                weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
                if kind in weights:
                    weights[kind] = max(weights[kind], float(weight) if weight.replace(".", "", 1).isdecimal() else 0.0)
    return weights["application/openmetrics-text"] > 0.0 and (
        weights["application/openmetrics-text"] >= weights["text/plain"]
    )


def run(settings: Settings, sock: socket.socket, board: Board, ready_fd: int) -> None:
    """Answer scrapes in this process until SIGTERM; writes one byte to `ready_fd` when it does."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, sock, board, ready_fd))


async def _serve(settings: Settings, sock: socket.socket, board: Board, ready_fd: int) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, stop.set)
    limits = Limits(max_body_bytes=1, max_connections=MAX_CONNECTIONS, max_pipelined_requests=1)
    heads = ResponseHeads(b"metrics%x" % int(time.time()))
    exporter = Exporter(board, settings.metrics_instances)
    http = HttpServer(exporter, limits, heads)
    http.counters = Counters()  # scrapes are no traffic
    http.start()
    publisher = metrics.Publisher(board, "metrics", [exporter.collect])
    publisher.start()
    server = await loop.create_server(http.protocol, sock=sock, backlog=BACKLOG)
    os.write(ready_fd, b"1")
    os.close(ready_fd)
    await stop.wait()
    server.close()
    await http.drain(1.0)
    publisher.stop()
