"""The floor: what uvloop and httptools cost with nothing in between. A constant reply of the gateway's size.

`python -m benchmarks.floor PORT`
"""

import asyncio
import sys

import httptools
import uvloop

BODY = b'{"result":"0123456789"}'
REPLY = (
    b"HTTP/1.1 200 OK\r\nDate: Mon, 23 Nov 2026 08:07:12 GMT\r\nContent-Type: application/json\r\n"
    b"Upstash-Sync-Token: 0123456789ab00000001000\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


class Floor(asyncio.Protocol):
    """Parses as any httptools server does, and answers the same to everything."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        pass

    def on_message_complete(self) -> None:
        self.transport.write(REPLY)  # type: ignore[attr-defined]


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Floor, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
