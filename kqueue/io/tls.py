"""TLS over a stream's own socket, by a non-blocking SSLSocket. Loaded when somebody uses it: `ssl` alone is 4 MB.

Verification is on unless a context says otherwise, and the name that was asked for is the name that the certificate must have.

What OpenSSL has decrypted and nobody has read is not seen by select(), so reading asks it first. A stream that ends without
close_notify was cut by somebody, who need not have been the server: that is an error (Truncated), and an orderly end is b"".

An SSLSocket and not ssl.MemoryBIO, since it keeps no ciphertext of its own: OpenSSL reads and writes the socket, and gives its
buffers back while a connection is idle. A thousand idle connections would hold a thousand pairs of BIOs.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Generator
from functools import lru_cache
from typing import Any, Final

from ..errors import UsageError
from ..kernel.traps import READ, WRITE, wait_io
from .errors import CertificateRefused, ConnectionLost, TimedOut, TLSFailed, Truncated
from .gate import Gate
from .operation import operation
from .streams import Stream
from .surroundings import left

_ADVICE: Final = {  # by X509_V_ERR_*
    9: "check the clock of this host",
    10: "it has to be renewed at the server; or check the clock of this host",
    18: "trust it by tls=ssl.create_default_context(cafile=FILE)",
    62: "connect by a name that stands in the certificate",
    64: "connect by a name or an address that stands in the certificate",
}
_UNKNOWN_CA: Final = "if it is right, name its CA by tls=ssl.create_default_context(cafile=FILE)"


@lru_cache(maxsize=1)
def default_context() -> ssl.SSLContext:
    """Verifies, by the CAs of the system. Made once for each process: reading them takes 20 ms."""
    return ssl.create_default_context()


class TLSStream(Stream):
    """A stream over TLS."""

    __slots__ = ()

    _blocked = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
    _remembers_what_was_tried = True

    def _events(self, error: OSError, usual: int) -> int:
        return READ if isinstance(error, ssl.SSLWantReadError) else WRITE

    def _has_more(self, sock: socket.socket) -> bool:
        assert isinstance(sock, ssl.SSLSocket)
        return sock.pending() > 0

    def _lost(self, error: OSError) -> ConnectionLost | None:
        if isinstance(error, ssl.SSLZeroReturnError):
            return None
        if isinstance(error, ssl.SSLEOFError):
            text = f"{self.peer} ended the stream without the close_notify of TLS, so somebody may have cut it short"
            return Truncated(text, bytes(self._buffer))
        return ConnectionLost(f"{self.peer} broke the connection: {_reason(error)}")

    def _say_goodbye(self, sock: socket.socket) -> None:
        assert isinstance(sock, ssl.SSLSocket)
        try:
            sock.unwrap()
            self._ended = True  # the other side had said so, too; from here on its bytes would be taken as they are
        except (OSError, ValueError):  # said, and not answered yet; or there is nobody to hear it
            return

    @operation
    def finish(self, *, timeout: float | None = None) -> Generator[Any, Any, None]:
        """Say that no more will be written (close_notify). What the other side sends after that may be lost."""
        sock = self._open()
        yield from ()
        self._say_goodbye(sock)

    @property
    def tls(self) -> ssl.SSLSocket:
        """For what is known of the connection: `getpeercert`, `selected_alpn_protocol`, `version`."""
        sock = self._open()
        assert isinstance(sock, ssl.SSLSocket)
        return sock


def start(
    stream: Stream, host: str, tls: bool | ssl.SSLContext, deadline: float | None
) -> Generator[Any, Any, TLSStream]:
    """TLS as a client over a connected stream, which becomes the caller's only by what this returns; it is closed otherwise."""
    if isinstance(stream, TLSStream):  # the handshake would go past its TLS, to the socket itself
        raise UsageError(f"the stream to {stream.peer} speaks TLS already, and TLS within TLS is not supported")
    if stream.buffered:
        stream.close()
        raise TLSFailed(f"{stream.peer} sent something before TLS was spoken, which anybody could have put there: not trusted")
    sock, gate = stream.hand_over()
    context = default_context() if tls is True else tls
    return (yield from secure(sock, gate, stream.peer, context, host.rstrip("."), deadline))


def secure(
    sock: socket.socket, gate: Gate, peer: str, context: Any, host: str | None, deadline: float | None
) -> Generator[Any, Any, TLSStream]:
    """A handshake over `sock`, which has its place in `gate`: both are given up when it fails. `host` is None for a server."""
    try:
        if not isinstance(context, ssl.SSLContext):
            raise TypeError(f"tls= takes True, False or an ssl.SSLContext, not {type(context).__name__}")
        sock = secured = context.wrap_socket(
            sock, server_side=host is None, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        yield from _shake_hands(secured, peer, deadline)
        return TLSStream(secured, peer, gate)
    except BaseException as error:
        sock.close()
        gate.give()
        if isinstance(error, ssl.SSLCertVerificationError):
            advice = _ADVICE.get(error.verify_code, _UNKNOWN_CA)
            raise CertificateRefused(f"the certificate of {peer} does not verify: {error.verify_message}; {advice}") from None
        if isinstance(error, TimedOut):
            raise
        if isinstance(error, (OSError, ValueError)):
            raise TLSFailed(f"no TLS with {peer}: {_reason(error)}") from None
        raise


def _shake_hands(sock: ssl.SSLSocket, peer: str, deadline: float | None) -> Generator[Any, Any, None]:
    while True:
        try:
            return sock.do_handshake()
        except ssl.SSLWantReadError:
            events = READ
        except ssl.SSLWantWriteError:
            events = WRITE
        if not (yield from wait_io(sock.fileno(), events, left(deadline))):
            raise TimedOut(f"{peer} did not answer the TLS handshake in time")


_WORDS: Final = {  # of OpenSSL's reasons, which few can read
    "WRONG_VERSION_NUMBER": "what answered does not speak TLS; is it the right port?",
    "HTTP_REQUEST": "what answered does not speak TLS; is it the right port?",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no version of TLS that is allowed here",
    "UNSUPPORTED_PROTOCOL": "it speaks no version of TLS that is allowed here",
}


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLEOFError):
        return "the connection was closed in the middle of the handshake"
    reason = getattr(error, "reason", None)
    if reason:
        return _WORDS.get(reason) or str(reason).lower().replace("_", " ")
    return getattr(error, "strerror", None) or str(error)
