"""A cgroup v2 for each running job, where this process may make them: `cgroup.kill` ends all that is in one, at once.

    <our own cgroup>/kqueue-<owner>/<pid of the template>/<n>

A cgroup is the one thing that a process cannot leave without a privilege, and the kernel kills it as a whole: nothing can fork
itself out of it, and nobody need be there to remember what was in it. Where there is no cgroup v2 to write to, jobs are found by
their marks (killing.py).

Where `memory` and `pids` can be enabled for them, they limit the job, too: a backstop behind RLIMIT_DATA and the sampler, for
memory that neither sees, and for what comes between two looks. A cgroup that has processes cannot enable them for those below,
unless it is the root of the hierarchy; so ours has none where systemd has put the daemon into a subgroup (DelegateSubgroup=).
Nobody is moved for it: elsewhere there are no limits here.

The template makes them and puts its children in; the supervisor kills what a dead template's still hold.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from typing import Final, NamedTuple

from . import procfs

_DELEGATED: Final = ("user.delegate", "trusted.delegate")  # extended attributes by which systemd says so (its CGROUP_DELEGATION)
_UNITS: Final = (".service", ".scope", ".slice")  # how systemd names what it made; a subgroup has no such name
_CONTROLLERS: Final = ("memory", "pids")
_MIB: Final = 1048576
KERNEL_MIB: Final = 16  # of a job's cgroup for what the kernel has on its behalf, and pages of the template that it copied
_TASKS: Final = (16, 256)  # `pids` counts threads: so many for each process that may be, and for all of them together
_RESIDUE: Final = 1 * _MIB  # what a cgroup may hold of a job that is over, and be used again


def home() -> str | None:
    """The directory of our own cgroup, when it is ours to divide; None: it is not, or there is none.

    systemd forbids others to make cgroups below a unit's that has not `Delegate=yes`; where our cgroup is the root, as in a
    container or without systemd, there is nobody who could mind. Of a unit with DelegateSubgroup= it is the one around ours.
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
    around = os.path.dirname(found)
    if path not in ("", "/") and not path.endswith(_UNITS) and _is_delegated(around) and _is_writable(around):
        return around
    if not _is_writable(found):
        return None
    delegated = os.stat(found).st_uid == os.getuid() != 0 or _is_delegated(found)
    return found if delegated or path in ("", "/") else None


def _is_delegated(path: str) -> bool:
    return any(_attribute(path, name) == b"1" for name in _DELEGATED)


def _is_writable(path: str) -> bool:
    return os.access(f"{path}/cgroup.procs", os.W_OK)


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


def guarantees(wanted: bool = True) -> str:
    """What holds for the jobs of a daemon that is started where we are, in a line. `wanted`: isolated.cgroups."""
    base = home() if wanted else None
    if base is None or not os.path.exists(f"{base}/cgroup.procs"):
        return "killed as a whole by marks, max_memory and max_processes held by sampling"
    limited = [name for name in _CONTROLLERS if _may_enable(base, name)]
    behind = f", and behind that by cgroup ({', '.join(limited)})" if limited else ""
    return f"killed as a whole by cgroup, max_memory and max_processes held by sampling{behind}"


def _may_enable(base: str, controller: str) -> bool:
    if controller in " ".join(_lines(f"{base}/cgroup.subtree_control")).split():
        return True
    if controller not in " ".join(_lines(f"{base}/cgroup.controllers")).split():
        return False
    is_root = not os.path.exists(f"{base}/cgroup.type")
    return os.access(f"{base}/cgroup.subtree_control", os.W_OK) and (is_root or not _lines(f"{base}/cgroup.procs"))


def _enable(levels: tuple[str, ...]) -> frozenset[str]:
    """Enable what limits jobs, from the top down; which of it that was possible for."""
    enabled = set()
    for controller in _CONTROLLERS:
        with suppress(OSError):  # the kernel has it elsewhere (cgroup v1), or there are processes at a level
            for path in levels:
                _write(f"{path}/cgroup.subtree_control", f"+{controller}")
            enabled.add(controller)
    return frozenset(enabled)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


class Seen(NamedTuple):
    """What the kernel counted in the cgroup of a job that is over."""

    oom_kills: int = -1  # processes of it that were killed for want of memory; -1: nobody counts them
    over_limit: bool = False  # ... and the want was for its own limit
    memory_max_mib: int = 0  # that limit; 0: none
    refused_tasks: int = 0  # processes and threads that were not started
    tasks_max: int = 0  # by this limit; 0: none


class Cgroup:
    """One of them: made, and used by one job after the other. OSError when it cannot be made."""

    def __init__(self, path: str, controllers: frozenset[str] = frozenset()) -> None:
        self.path = path
        self._controllers = controllers
        self._values: dict[str, str] = {}  # of its files that are not as the kernel made them
        self._counted = (0, 0, 0)  # by the kernel, in earlier jobs
        self._was_killed = False
        self._memory_max_mib = self._tasks_max = 0
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

    def limit(self, limits: Mapping[str, float]) -> None:
        """Hold whatever is in it to `limits`, as limits.apply has them; without `max_memory` and `max_processes`, to nothing.

        RLIMIT_DATA and the sampler are to be first, since they leave the job its say: so it has what they let pass.
        """
        memory, processes = int(limits.get("max_memory", 0)), int(limits.get("max_processes", 0))
        self._memory_max_mib = memory and memory + int(limits.get("memory_headroom", 0)) + KERNEL_MIB
        self._tasks_max = processes and _TASKS[0] * processes + _TASKS[1]
        if "memory" in self._controllers:
            self._set("memory.max", f"{self._memory_max_mib * _MIB}" if memory else "max")
            self._set("memory.swap.max", "0" if memory else "max")
            self._set("memory.oom.group", "1" if memory else "0")
        if "pids" in self._controllers:
            self._set("pids.max", f"{self._tasks_max}" if processes else "max")

    def _set(self, name: str, value: str) -> None:
        if self._values.get(name, "0" if name == "memory.oom.group" else "max") == value:
            return
        self._values[name] = value
        with suppress(FileNotFoundError):  # a kernel without swap has no limit for it
            _write(f"{self.path}/{name}", value)

    def seen(self) -> Seen:
        """What was counted since this was asked last."""
        if not self._controllers:
            return Seen()
        memory = dict(self._counts("memory.events")) if "memory" in self._controllers else {}
        tasks = dict(self._counts("pids.events")) if "pids" in self._controllers else {}
        kills, over, refused = self._counted
        self._counted = memory.get(b"oom_kill", 0), memory.get(b"oom", 0), tasks.get(b"max", 0)
        new_kills = self._counted[0] - kills if memory else -1
        return Seen(
            new_kills, self._counted[1] > over, self._memory_max_mib, self._counted[2] - refused, self._tasks_max
        )

    def _counts(self, name: str) -> Iterator[tuple[bytes, int]]:
        with suppress(OSError):
            for line in procfs.read(f"{self.path}/{name}").splitlines():
                key, _, number = line.partition(b" ")
                yield key, int(number)

    @property
    def is_as_new(self) -> bool:
        """Whether the next job finds nothing of this one. Files in memory stay charged to it, and stand behind a limit."""
        if self._was_killed and self._controllers:
            return False  # what is counted now may have been the killed ones'
        if "memory" not in self._controllers:
            return True
        with suppress(OSError):
            return int(procfs.read(f"{self.path}/memory.current")) <= _RESIDUE
        return False

    def kill(self) -> None:
        self._was_killed = True
        kill(self.path)

    def close(self) -> None:
        os.close(self._members)
        os.close(self._events)
        with suppress(OSError):
            os.rmdir(self.path)


class Cgroups:
    """Those of one template."""

    def __init__(self, path: str, controllers: frozenset[str] = frozenset()) -> None:
        self._path = path
        self._controllers = controllers
        self._made = 0
        self._free: list[Cgroup] = []
        self._dying: list[Cgroup] = []

    @classmethod
    def of(cls, owner: str) -> Cgroups | None:
        """Of the template that this process is; None where they are not to be had, which one child has tried."""
        base = home()
        if base is None:
            return None
        ours = f"{base}/kqueue-{owner}/{os.getpid()}"
        try:
            os.makedirs(ours, exist_ok=True)
            cgroups = cls(ours, _enable((base, os.path.dirname(ours), ours)))
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
        return Cgroup(f"{self._path}/{self._made}", self._controllers)

    def give(self, cgroup: Cgroup) -> None:
        """Its job is over. What is left in it is killed."""
        if cgroup.is_empty:
            if cgroup.is_as_new:
                self._free.append(cgroup)
            else:
                cgroup.close()
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
