"""What goes wrong between a job and the world: one small tree. Each message says what happened, to whom, and the next step.

    IOFailed
     ├─ NameNotFound        the name has no address, or nobody could be asked
     ├─ ConnectFailed       no address answered
     ├─ ConnectionLost      it was there, and broke
     │   └─ IncompleteRead  it ended before what was asked for had come; `.partial` is what came
     │       └─ Truncated   and nobody had said that it would: a TLS stream that was cut
     ├─ TLSFailed           no TLS could be had
     │   └─ CertificateRefused
     ├─ StreamLimit         more came than was allowed
     ├─ TimedOut            its time, or that of a `timeout` scope, was up
     └─ Closed              we closed it ourselves

All are OSErrors, as those of the standard library for the same things are. Not among them are JobTimedOut and JobCancelled, which
end a job whatever it waits for.
"""

from __future__ import annotations

from ..errors import KQueueError


class IOFailed(KQueueError, OSError):
    """Anything that `kqueue.io` raises because of the world outside."""


class NameNotFound(IOFailed):
    """A name has no address, or nobody could be asked for it."""


class ConnectFailed(IOFailed, ConnectionError):
    """Nobody answered at any address."""


class ConnectionLost(IOFailed, ConnectionError):
    """The other side broke the connection."""


class IncompleteRead(ConnectionLost):
    """The other side ended the stream before what was asked for had come. `partial`: the bytes that had."""

    def __init__(self, message: str, partial: bytes = b"") -> None:
        super().__init__(message)
        self.partial = partial


class Truncated(IncompleteRead):
    """A TLS stream ended without close_notify: somebody cut it, and more may have been to come."""


class TLSFailed(IOFailed):
    """There is no TLS with this server."""


class CertificateRefused(TLSFailed):
    """The server's certificate does not verify: not signed by whom we trust, expired, or another host's."""


class StreamLimit(IOFailed):
    """More came than was allowed."""


class TimedOut(IOFailed, TimeoutError):
    """The time that an operation was given, or that of the `timeout` scope around it, was up."""


class NoDescriptor(TimedOut):
    """Because all file descriptors that jobs may have were in use until then."""


class Closed(IOFailed):
    """It was used after it was closed, or closed while somebody waited for it."""
