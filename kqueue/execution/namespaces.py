"""What of the host a job does not see: its network, and the files of others in /tmp. In the template and its children.

A network namespace takes a millisecond to make and more to take down, so a template makes one, which has nothing in it but a
loopback interface that is down, and its children enter that. A /tmp has to be each one's own: two mounts in a mount namespace,
which the kernel takes down with the last process in it.

Killing does not depend on either: processes, their marks and pidfds are in no namespace that is left here.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

from ..errors import Refused
from . import limits

_NETWORK: Final = "/proc/thread-self/ns/net"
CLONE_NEWNS: Final = 0x00020000  # linux/sched.h
CLONE_NEWNET: Final = 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_SLAVE = 0x2, 0x4, 0x1000, 0x4000, 0x80000  # linux/mount.h
ROOT_ONLY: Final = "the daemon needs root (CAP_SYS_ADMIN) for it, and a kernel and a container that permit it"


class NoNetwork:
    """The namespace of processes without a network, made when it is first needed."""

    def __init__(self) -> None:
        self._fd = -1

    def fd(self) -> int:
        """Of it. Raises Refused. For a process of one thread, which is in its own namespace again afterwards."""
        if self._fd >= 0:
            return self._fd
        here = os.open(_NETWORK, os.O_RDONLY | os.O_CLOEXEC)
        try:
            limits.unshare(CLONE_NEWNET)
            self._fd = os.open(_NETWORK, os.O_RDONLY | os.O_CLOEXEC)
            limits.setns(here, CLONE_NEWNET)
        except OSError as error:
            raise Refused(f"a job without network is not possible here ({error.strerror}): {ROOT_ONLY}") from None
        finally:
            os.close(here)
        return self._fd


def enter_network(fd: int) -> None:
    """Have the network of `fd`, and no other. Raises OSError."""
    limits.setns(fd, CLONE_NEWNET)


def make_private_tmp(max_mib: int) -> None:
    """An empty /tmp, and as /var/tmp the same, for this process and what it starts. Raises Refused.

    `max_mib`: what it can hold, in memory; 0: half of that which the host has.
    """
    size = f",size={max_mib}m" if max_mib else ""
    try:
        limits.unshare(CLONE_NEWNS)
        limits.mount("none", "/", None, MS_REC | MS_SLAVE)  # what is mounted on the host still arrives, and nothing goes back
        limits.mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777{size}")
        with suppress(FileNotFoundError):
            limits.mount("/tmp", "/var/tmp", None, MS_BIND)
    except OSError as error:
        raise Refused(f"a private /tmp is not possible here ({error}): {ROOT_ONLY}") from None
    os.environ.pop("TMPDIR", None)
    try:
        os.chdir(os.getcwd())  # or "." might still be in the /tmp of the host
    except OSError:
        os.chdir("/tmp")
