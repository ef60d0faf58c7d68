"""What the application's imports left in the template that a fork of it does not have, or must not have, by name.

A fork has one thread, and a job's process closes every fd that is not its own: whatever relies on either fails in the job, far
from the import that made it. So it is said once, when the template is ready.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Container, Iterator
from typing import Final

MOST: Final = 20  # warnings; who leaves more has understood by then
_HARMLESS: Final = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def warnings(allowed: Container[int]) -> list[str]:
    """What to tell the operator. `allowed`: the fds that are there by right."""
    return [*_threads(), *_files(allowed)][:MOST]


def _threads() -> Iterator[str]:
    known = set()
    for thread in threading.enumerate():
        known.add(thread.native_id)
        if thread is not threading.main_thread():
            yield (
                f"a job module started thread {thread.name!r} at import; a fork has only one thread, so it is missing in every "
                f"job: start it in the job"
            )
    own_name = _comm("self", os.getpid())
    for id in map(int, os.listdir("/proc/self/task")):
        # A library's own, as OpenBLAS has, which sees to it itself; one that bothers to name its threads more often does not.
        if id not in known and id != os.getpid() and (name := _comm("self", id)) not in ("", own_name):
            yield (
                f"a library started thread {name!r} when a job module was imported; a fork has only one thread, so it is missing "
                f"in every job: import it, or begin to use it, in the job"
            )


def _comm(process: str, thread: int) -> str:
    try:
        with open(f"/proc/{process}/task/{thread}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""


def _files(allowed: Container[int]) -> Iterator[str]:
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        if fd in allowed:
            continue
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # the one that listed them
            continue
        if target not in _HARMLESS:
            what = _socket(fd) if target.startswith("socket:") else target
            waits = "" if os.get_blocking(fd) else ", non-blocking"
            yield f"a job module left fd {fd} open at import ({what}{waits}); a job's process closes it: open it in the job"


def _socket(fd: int) -> str:
    """Family, type, where it is bound and to whom it leads."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        kind = f"{_name(sock.family)} {_name(sock.type)} socket".replace("AF_", "").replace("SOCK_", "")
        try:
            peer = f" to {_address(sock.getpeername())}"
        except OSError:
            peer = ""
        try:
            here = _address(sock.getsockname())
        except OSError:
            here = ""
    return f"{kind}{' at ' + here if here else ''}{peer}"


def _name(number: int) -> str:
    return getattr(number, "name", str(number))


def _address(address: object) -> str:
    if isinstance(address, bytes):  # of Unix's abstract names
        return "@" + address[1:].decode("utf-8", "backslashreplace")
    if isinstance(address, tuple) and len(address) >= 2:
        return f"{address[0]}:{address[1]}"
    return str(address or "")
