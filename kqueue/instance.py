"""One daemon per host and instance: a lock on a file in `state_dir`, and the identity that it proves.

The kernel drops a flock when its holder dies, however it dies, so a lock that can be had means that no earlier daemon of this
`state_dir` lives. The identity (boot, and device and inode of the lock file) is what the broker keeps with an epoch: an epoch of
equal identity is dead, and what it held is ready again at once. A copied disk, another container or a reboot differ in it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
from types import FrameType
from typing import Final

from .errors import AlreadyRunning, ConfigError

_SUSPECT: Final = 64  # where in the page that stands; before it is the kernel's MARK
PATIENCE_S: Final = 5.0  # the old daemon of a restart may still be on its way out


class _OutOfPatience(Exception):
    """The lock did not come in time."""


class Instance:
    """Holds the lock of `instance` in `state_dir` until the process ends.

    Raises AlreadyRunning when another daemon holds it longer than `patience_s`, ConfigError for a directory that cannot be used.
    """

    def __init__(self, state_dir: str, instance: str, patience_s: float = PATIENCE_S) -> None:
        self.path = os.path.join(state_dir, f"{instance}.lock")
        try:
            os.makedirs(state_dir, mode=0o700, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            why = f"state_dir {state_dir} cannot be used: {error.strerror}; let the daemon's user write there"
            raise ConfigError(why) from None
        try:
            _lock(self._fd, patience_s)
        except _OutOfPatience:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise AlreadyRunning(
                f"another kqueued (pid {holder}) runs as instance {instance!r} in {state_dir}; "
                f"stop it, or give this one its own `instance:` and `state_dir:`"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        status = os.fstat(self._fd)
        self.outbox_path = os.path.join(state_dir, f"{instance}.outbox")
        self.slice_page = SlicePage(os.path.join(state_dir, f"{instance}.slice"))
        self.identity = f"{_boot_id()}:{status.st_dev}:{status.st_ino}:{instance}"


class SlicePage:
    """A page in a file that says which inline job's code runs just now, and which one is the only suspect of its kind that runs
    (see quarantine); and, at a start, which job that was when the last process died.

    The kernel of the host keeps it however the process dies. Raises ConfigError when the file cannot be had.
    """

    def __init__(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, mmap.PAGESIZE)  # or a full disk would end us by SIGBUS, later
                self.page = mmap.mmap(fd, mmap.PAGESIZE)
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigError(f"{path} cannot be used: {error.strerror}; free space there, or choose another state_dir") from None
        self.culprit = self._read(0) or self._read(_SUSPECT)  # id of a job; "": none

    def clear(self) -> None:
        """Forget the culprit, who has been dealt with."""
        self.page[0] = self.page[_SUSPECT] = 0
        self.culprit = ""

    def suspect(self, id: str) -> None:
        """The job that is to blame if we die, and no other job's code runs just then. "": none."""
        self.page[_SUSPECT : 2 * _SUSPECT] = id.encode().ljust(_SUSPECT, b"\0")

    def _read(self, at: int) -> str:
        return self.page[at : at + _SUSPECT].partition(b"\0")[0].decode("ascii", "replace")


def _lock(fd: int, patience_s: float) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        pass

    def expire(number: int, frame: FrameType | None) -> None:
        raise _OutOfPatience  # interrupts the flock below; PEP 475 retries it only when the handler returns

    old = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, patience_s)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
