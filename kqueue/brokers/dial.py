"""From a host's name to a connected non-blocking socket, TLS included, without ever blocking the loop. Knows no protocol.

Only getaddrinfo cannot be had without blocking, so a name is looked up in a forked child that writes the addresses to a pipe
and ends. Literal addresses and "localhost" need none. (A thread would do as well, but the supervisor has none, and forks.)
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import BrokerRefused, BrokerUnavailable
from ..kernel.traps import READ, WRITE, wait_io, wait_process

if TYPE_CHECKING:
    import ssl

Address = tuple[int, Any]  # family, and what connect() takes
Clock = Callable[[], float]

_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY)
_IPPROTO_TCP: Final = socket.IPPROTO_TCP
# A connection that we close, or die with, is reset: else the kernel goes on sending, for minutes after a network came back, what
# somebody has long asked for again. (Of a struct linger: it is on, for 0 seconds.)
_ABORT: Final = (1).to_bytes(4, sys.byteorder) + (0).to_bytes(4, sys.byteorder)
_TCP_OPTIONS: Final[tuple[tuple[int, int, int | bytes], ...]] = (
    (socket.SOL_SOCKET, socket.SO_LINGER, _ABORT),
    (_IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (_IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),  # seconds
    (_IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),  # seconds
    (_IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


def dial(
    host: str, port: int, path: str, context: ssl.SSLContext | None, timeout_s: float, clock: Clock
) -> Generator[Any, Any, socket.socket]:
    """A connected socket. `path`: of a Unix socket, which is taken instead of host and port unless it is "".

    Raises BrokerUnavailable (nobody answers, within `timeout_s` seconds for all of it), or BrokerRefused (the certificate).
    """
    deadline = clock() + timeout_s
    addresses = [(socket.AF_UNIX, path)] if path else (yield from resolve(host, port, timeout_s))
    sock = yield from _connect(addresses, path or f"{host}:{port}", deadline, clock)
    return sock if context is None else (yield from _encrypt(sock, context, host, deadline, clock))


def _connect(addresses: Sequence[Address], where: str, deadline: float, clock: Clock) -> Generator[Any, Any, socket.socket]:
    """The first of `addresses` that answers; each has an equal share of the time that is left."""
    reason = "it has no address"
    for position, (family, address) in enumerate(addresses):
        share_s = max(0.0, deadline - clock()) / (len(addresses) - position)
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if family != socket.AF_UNIX:
                for level, option, value in _TCP_OPTIONS:
                    sock.setsockopt(level, option, value)
            error = sock.connect_ex(address)
            if error in _UNDER_WAY:
                ready = yield wait_io(sock.fileno(), WRITE, share_s)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if ready else errno.ETIMEDOUT
        except OSError as refusal:  # a path too long, no such family
            error = refusal.errno or errno.EINVAL
        except BaseException:
            sock.close()
            raise
        if error == 0:
            return sock
        sock.close()
        reason = os.strerror(error)
    raise BrokerUnavailable(f"cannot connect to {where}: {reason}")


# -- TLS --------------------------------------------------------------------------------------------------------------


def tls_context(ca_certs: str, certfile: str, keyfile: str, cert_reqs: str, check_host: bool) -> ssl.SSLContext:
    """Files in PEM; "" for none, or for the system's CAs. `cert_reqs`: "required", "optional" or "none"."""
    import ssl  # 4 MB, so only where TLS is used

    try:
        context = ssl.create_default_context(cafile=ca_certs or None)
        if certfile:
            context.load_cert_chain(certfile, keyfile or None)
    except OSError as error:
        files = ", ".join(filter(None, (ca_certs, certfile, keyfile)))
        raise BrokerRefused(f"cannot use the TLS files {files}: {error.strerror or error}; check what they are") from None
    context.check_hostname = check_host
    context.verify_mode = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}[cert_reqs]
    return context


def _encrypt(
    sock: socket.socket, context: ssl.SSLContext, host: str, deadline: float, clock: Clock
) -> Generator[Any, Any, socket.socket]:
    import ssl

    try:
        sock = secured = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        while True:
            try:
                secured.do_handshake()
                return secured
            except ssl.SSLWantReadError:
                events = READ
            except ssl.SSLWantWriteError:
                events = WRITE
            if not (yield wait_io(secured.fileno(), events, max(0.0, deadline - clock()))):
                raise BrokerUnavailable(f"{host} did not answer the TLS handshake in time")
    except BaseException as error:
        sock.close()
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = f"the certificate of {host} does not verify: {error.verify_message}; name its CA by ssl_ca_certs=FILE"
            raise BrokerRefused(reason) from None
        if isinstance(error, OSError):
            raise BrokerUnavailable(f"no TLS with {host}: {getattr(error, 'reason', None) or error.strerror or error}") from None
        raise


# -- names ------------------------------------------------------------------------------------------------------------


def resolve(host: str, port: int, timeout_s: float) -> Generator[Any, Any, list[Address]]:
    """The addresses of `host`. Raises BrokerUnavailable when there are none, or when the answer takes `timeout_s` seconds."""
    if host == "localhost":
        return [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("::1", port))]
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return [(family, (host, port))]
    answer = yield from _ask_child(host, port, timeout_s)
    status, _, text = answer.partition("\n")
    if status != "ok":
        raise BrokerUnavailable(f"cannot resolve {host}: {text or f'no answer in {timeout_s:g} s'}")
    return [_address(line, port) for line in text.splitlines()]


def _address(line: str, port: int) -> Address:
    family, host, scope = line.split()
    return (socket.AF_INET, (host, port)) if family == "4" else (socket.AF_INET6, (host, port, 0, int(scope)))


def _ask_child(host: str, port: int, timeout_s: float) -> Generator[Any, Any, str]:
    """What the child wrote; "" when it wrote nothing in time. The child is gone when this ends, however it ends."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    pid = os.fork()
    if pid == 0:
        _look_up(host, port, timeout_s, write_fd)
    os.close(write_fd)
    try:
        answer = b""
        while (yield wait_io(read_fd, READ, timeout_s)):
            data = os.read(read_fd, 65536)
            if not data:
                break
            answer += data
        else:
            os.kill(pid, signal.SIGKILL)
        yield wait_process(pid)
        return answer.decode()
    finally:
        os.close(read_fd)
        _bury(pid)


def _bury(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # somebody else has waited for it


def _look_up(host: str, port: int, timeout_s: float, write_fd: int) -> None:
    """The child: never returns."""
    try:
        signal.set_wakeup_fd(-1)  # the pipe is the supervisor's: what reaches us must not look as if it had reached it
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        os.closerange(3, write_fd)  # the lock of the instance among them, which must not outlive the supervisor
        os.closerange(write_fd + 1, os.sysconf("SC_OPEN_MAX"))
        signal.alarm(int(timeout_s) + 2)  # should the supervisor die meanwhile
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            lines = [
                f"{4 if family == socket.AF_INET else 6} {at[0]} {at[3] if len(at) == 4 else 0}" for family, _, _, _, at in found
            ]
            text = "\n".join(["ok", *lines])
        except OSError as error:
            text = f"failed\n{error.strerror or error}"
        os.write(write_fd, text.encode()[:65536])
    finally:
        os._exit(0)
