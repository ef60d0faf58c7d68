"""A proxy that makes a server on this machine as far away as one elsewhere: what it reads, it passes on after some time.

    python delaying.py PORT SECONDS

PORT: of the server, on 127.0.0.1. SECONDS: of delay in each direction, so that a round trip is twice as long; 0: the same work
without it. Nothing is held back for its size: there may be any number of bytes under way. It prints its port, and ends when its
stdin does. select(2), since its timeout is in microseconds and that of epoll in milliseconds; and without the 50 µs by which
the kernel lets sleepers oversleep.
"""

from __future__ import annotations

import ctypes
import select
import socket
import sys
import time
from collections import deque

AT_ONCE = 1 << 18  # bytes of a read
PR_SET_TIMERSLACK = 29


class Direction:
    """What goes from one socket to the other."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.due: deque[tuple[float, memoryview]] = deque()  # when to pass it on

    def read(self, at: float) -> bool:
        """Whether there will be more."""
        try:
            data = self.source.recv(AT_ONCE)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        if data:
            self.due.append((at, memoryview(data)))
        return bool(data)

    def write(self, now: float) -> None:
        """Pass on what is due; what the other end does not take now is tried in the next turn."""
        while self.due and self.due[0][0] <= now:
            at, data = self.due.popleft()
            try:
                sent = self.target.send(data)
            except BlockingIOError:
                sent = 0
            except ConnectionError:
                return
            if sent < len(data):
                self.due.appendleft((at, data[sent:]))
                return


def serve(listener: socket.socket, port: int, delay_s: float) -> None:
    directions: dict[socket.socket, Direction] = {}  # by source
    while True:
        now = time.monotonic()
        next_at = min((each.due[0][0] for each in directions.values() if each.due), default=None)
        stuck = [each.target for each in directions.values() if each.due and each.due[0][0] <= now]
        patience_s = None if next_at is None or stuck else next_at - now
        readable, _, _ = select.select([sys.stdin, listener, *directions], stuck, [], patience_s)
        now = time.monotonic()
        for source in readable:
            if source is sys.stdin:
                return
            if source is listener:
                directions.update(_connected(listener, port))
            elif source in directions and not directions[source].read(now + delay_s):
                target = directions[source].target
                for end in (source, target):
                    directions.pop(end, None)
                    end.close()
        now = time.monotonic()
        for direction in directions.values():
            direction.write(now)


def _connected(listener: socket.socket, port: int) -> dict[socket.socket, Direction]:
    """Both directions of the connection that came."""
    client, _ = listener.accept()
    server = socket.create_connection(("127.0.0.1", port))
    for end in (client, server):
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return {client: Direction(client, server), server: Direction(server, client)}


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    serve(listener, int(sys.argv[1]), float(sys.argv[2]))
