"""A cgroup v2 for each running job, where this process may make them: `cgroup.kill` ends all that is in one, at once.

    <our own cgroup>/kqueue-<owner>/<pid of the template>/<n>

A cgroup is the one thing that a process cannot leave without a privilege, and the kernel kills it as a whole: nothing can fork
itself out of it, and nobody need be there to remember what was in it. No controller is enabled, so there is no limit here, and no
need to empty our own cgroup. Where there is no cgroup v2 to write to, jobs are found by their marks (killing.py).

The template makes them and puts its children in; the supervisor kills what a dead template's still hold.
"""

from __future__ import annotations

import os
from collections.abc import Container
from contextlib import suppress
from typing import Final

_DELEGATED: Final = ("user.delegate", "trusted.delegate")  # extended attributes by which systemd says so (its CGROUP_DELEGATION)


def home() -> str | None:
    """The directory of our own cgroup, when it is ours to divide; None: it is not, or there is none.

    systemd forbids others to make cgroups below a unit's that has not `Delegate=yes`; where our cgroup is the root, as in a
    container or without systemd, there is nobody who could mind.
    """
    path = next((line[3:].rstrip("\n") for line in _lines("/proc/self/cgroup") if line.startswith("0::")), None)
    mount = next((fields for fields in map(str.split, _lines("/proc/self/mountinfo")) if _is_cgroup2(fields)), None)
    if path is None or mount is None or ".." in path:
        return None
    root, directory = mount[3], mount[4]
    if root != "/":
        if path != root and not path.startswith(root + "/"):
            return None
        path = path[len(root) :]
    found = os.path.normpath(f"{directory}/{path}")
    if not os.access(f"{found}/cgroup.procs", os.W_OK):
        return None
    delegated = os.stat(found).st_uid == os.getuid() != 0 or any(_attribute(found, name) == b"1" for name in _DELEGATED)
    return found if delegated or path in ("", "/") else None


def _is_cgroup2(fields: list[str]) -> bool:
    """Of a line of proc_pid_mountinfo(5)."""
    return "-" in fields and fields[fields.index("-") + 1] == "cgroup2"


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.readlines()
    except OSError:
        return []


def _attribute(path: str, name: str) -> bytes:
    try:
        return os.getxattr(path, name)
    except OSError:
        return b""


class Cgroup:
    """One of them: made, and used by one job after the other. OSError when it cannot be made."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.makedirs(path, exist_ok=True)
        self._members = os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        self._events = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)

    def enter(self) -> None:
        """Put this process in, and so whatever it will start."""
        os.write(self._members, b"0")

    @property
    def is_empty(self) -> bool:
        """Whether no process is left; a zombie is none."""
        return b"populated 0" in os.pread(self._events, 256, 0)

    def kill(self) -> None:
        kill(self.path)

    def close(self) -> None:
        os.close(self._members)
        os.close(self._events)
        with suppress(OSError):
            os.rmdir(self.path)


class Cgroups:
    """Those of one template."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._made = 0
        self._free: list[Cgroup] = []
        self._dying: list[Cgroup] = []

    @classmethod
    def of(cls, owner: str) -> Cgroups | None:
        """Of the template that this process is; None where they are not to be had, which one child has tried."""
        base = home()
        if base is None:
            return None
        cgroups = cls(f"{base}/kqueue-{owner}/{os.getpid()}")
        try:
            first = cgroups.take()
        except OSError:
            return None
        if os.path.exists(f"{first.path}/cgroup.kill") and _can_enter(first):  # since Linux 5.14
            cgroups.give(first)
            return cgroups
        first.close()
        cgroups.close()
        return None

    def take(self) -> Cgroup:
        """An empty one. OSError when there can be no more."""
        if self._free:
            return self._free.pop()
        self._made += 1
        return Cgroup(f"{self._path}/{self._made}")

    def give(self, cgroup: Cgroup) -> None:
        """Its job is over. What is left in it is killed."""
        if cgroup.is_empty:
            self._free.append(cgroup)
        else:
            cgroup.kill()
            self._dying.append(cgroup)

    def tidy(self) -> bool:
        """Take back what has become empty; whether all has."""
        dying, self._dying = self._dying, []
        for cgroup in dying:
            self.give(cgroup)
        return not self._dying

    def kill(self) -> None:
        """All of them."""
        kill(self._path)

    def close(self) -> None:
        for cgroup in self._free:
            cgroup.close()
        with suppress(OSError):  # the last one removes the parent, too
            os.rmdir(self._path)
            os.rmdir(os.path.dirname(self._path))


def _can_enter(cgroup: Cgroup) -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            cgroup.enter()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def kill(path: str) -> None:
    """SIGKILL whatever is in the cgroup or below."""
    with suppress(OSError), open(f"{path}/cgroup.kill", "w") as file:
        file.write("1")


def members(path: str) -> list[int]:
    """The processes in the cgroup or below."""
    found = []
    for directory, _, _ in os.walk(path):
        found += [int(line) for line in _lines(f"{directory}/cgroup.procs")]
    return found


def of_dead_templates(owner: str, living: Container[int]) -> list[str]:
    """The cgroups of templates of `owner` other than `living`."""
    base = home()
    parent = f"{base}/kqueue-{owner}"
    if base is None or not os.path.isdir(parent):
        return []
    with os.scandir(parent) as entries:
        return [entry.path for entry in entries if entry.name.isdigit() and int(entry.name) not in living]


def remove(path: str) -> None:
    """The empty cgroup `path` of a template, and those below. What is not empty stays."""
    for directory, _, _ in os.walk(path, topdown=False):
        with suppress(OSError):
            os.rmdir(directory)
    with suppress(OSError):
        os.rmdir(os.path.dirname(path))
