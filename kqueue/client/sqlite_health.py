"""What should be known of an SQLite file, its mode and its disk, before it is too late. For `kqueue doctor`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Final

from ..brokers.base import Finding
from ..disk import REMOTE, file_system, free

LEAST_FREE: Final = 100 * 1024 * 1024  # bytes; a full disk stops everything
LEAST_SHARE: Final = 0.05  # of the disk
LARGE_LOG: Final = 256 * 1024 * 1024  # bytes of the write-ahead log; it is cut to 64 MiB at a checkpoint


def sqlite_health(path: str) -> list[Finding]:
    """Of the database at `path`, which may not be there yet."""
    return [*_disk(path), *_mode(path), *_log(path)]


def _disk(path: str) -> Iterator[Finding]:
    kind = file_system(path)
    if kind in REMOTE:
        yield Finding(True, f"it is on {kind}, where locks and its write-ahead log cannot be trusted: put it on a local disk")
    left, share = free(path)
    if left < LEAST_FREE or share < LEAST_SHARE:
        text = f"{left // 1048576} MiB are free on its disk ({share:.0%}): a full one stops dispatch and settling; make room"
        yield Finding(left < LEAST_FREE, text)


def _mode(path: str) -> Iterator[Finding]:
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    if mode & stat.S_IWOTH:
        yield Finding(True, f"anybody on this host may write to it (mode {mode:04o}), and so run any job: chmod o-rwx {path}")
    elif mode & stat.S_IROTH:
        yield Finding(True, f"anybody on this host may read it (mode {mode:04o}), jobs' arguments included: chmod o-rwx {path}")


def _log(path: str) -> Iterator[Finding]:
    try:
        size = os.stat(f"{path}-wal").st_size
    except FileNotFoundError:
        return
    if size > LARGE_LOG:
        text = f"its write-ahead log has {size // 1048576} MiB, since somebody keeps a transaction open: fuser {path} names who"
        yield Finding(False, text)
