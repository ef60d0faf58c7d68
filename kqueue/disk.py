"""What the system says of the disk under a path: what kind of file system it is, and what is free there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

# Of statfs(2) and mount(8): what other hosts write to as well, or where locks and mmap are not what they are on a local disk.
_FUSE: Final = ("sshfs", "glusterfs", "ceph", "s3fs", "rclone", "gcsfuse")
REMOTE: Final = frozenset((
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gfs2", "ocfs2", "gpfs",
    *(f"fuse.{name}" for name in _FUSE),
))  # fmt: skip
FLEETING: Final = frozenset(("tmpfs", "ramfs"))  # gone at the next boot


def nearest_directory(path: str) -> str:
    """`path`, or the nearest directory above it that exists."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def file_system(path: str, mounts: str | None = None) -> str:
    """Its kind, such as "ext4" or "nfs4"; "": nobody knows. `mounts`: proc_pid_mountinfo(5), None: our own."""
    if mounts is None:
        try:
            with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
                mounts = file.read()
        except OSError:
            return ""
    path = os.path.realpath(nearest_directory(path))
    points: Mapping[str, str] = dict(map(_mounted, filter(None, mounts.split("\n"))))  # of two at one point the later covers
    while path not in points and path != "/":
        path = os.path.dirname(path)
    return points.get(path, "")


def _mounted(line: str) -> tuple[str, str]:
    """Where, and what."""
    fields, _, rest = line.partition(" - ")
    point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split(" ")[4])
    return point, rest.split(" ")[0]


def free(path: str) -> tuple[int, float]:
    """Bytes that this user may still write under `path`, and what share of the whole disk that is."""
    status = os.statvfs(nearest_directory(path))
    return status.f_bavail * status.f_frsize, status.f_bavail / max(1, status.f_blocks)
