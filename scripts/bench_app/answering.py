"""An HTTP server that answers every GET after some time, for any number of connections: asyncio, in a process of its own.

    python answering.py SECONDS FIRST [CERTIFICATE]

With a file that has a certificate and its key, it speaks TLS.
The first FIRST requests wait for each other: their time begins when all are there, which is said then ("all"). Before that it
prints its port. It ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import resource
import ssl
import sys

BODY = b'{"answer": 42}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


class _Service:
    """When what is answered."""

    def __init__(self, seconds: float, first: int) -> None:
        self._seconds = seconds
        self._first = first
        self._held: list[asyncio.Transport] = []

    def asked(self, transport: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        if not self._first:
            loop.call_later(self._seconds, transport.write, ANSWER)
            return
        self._held.append(transport)
        if len(self._held) == self._first:
            print("all", flush=True)
            self._first = 0
            for each in self._held:
                self.asked(each)
            self._held.clear()


class _Connection(asyncio.Protocol):
    def __init__(self, service: _Service) -> None:
        self._service = service
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._head += data
        if self._head.endswith(b"\r\n\r\n"):
            self._head = b""
            self._service.asked(self._transport)


async def _main(service: _Service, certificate: str | None) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = asyncio.get_running_loop()
    tls = None
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
    server = await loop.create_server(lambda: _Connection(service), "127.0.0.1", 0, backlog=4096, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(_main(_Service(float(sys.argv[1]), int(sys.argv[2])), sys.argv[3] if len(sys.argv) > 3 else None))
