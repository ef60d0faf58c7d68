"""The sampler: what the processes of a job have together, looked at four times a second, where no limit of the kernel holds.

RLIMIT_DATA holds for one process, and not for shared mappings; RLIMIT_NPROC holds for a user. So `max_memory` and `max_processes`
of a job and all that it started are held to here. What is looked at first is cheap, and mostly enough:

    every tick       resident pages, page faults, and children of each process: /proc/PID/stat and task/PID/children, 10 µs each;
                     of a job of one process that is far from its limit only statm and children, 4 µs
    near a limit     smaps_rollup, which costs 0.1 ms and 7-10 ms a GiB: when the pages that came since it was last looked at
                     (resident ones, and one for each fault, since a copy on write adds none) may have brought the job over
    on a suspicion   open memfds, which nobody need have mapped: when the host's shared memory grew by half of max_memory, and
                     every two seconds where it is that large

What counts against `max_memory` is what the job has of its own: private pages, and its share of pages that several processes
have, without what it shares with the template it was forked from. What the template itself has of such a share says how large
that is, however many other jobs there are. A job younger than YOUNG_S is not looked at at all.

A process that left the tree, since its parent died, is found among the children of the template, which is a subreaper: by its
session, by having been seen before, or by KQUEUE_JOB_ID in its environment.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, Protocol

from ..kernel import Kernel, Park, Task, sleep
from ..process import PAGE
from .killing import JOB_ID, environ_of
from .oom import OomKills
from .procfs import MAY_BE_MORE, read, stat_fields

Steps = Generator[Any, Any, Any]

TICK_S: Final = 0.25
YOUNG_S: Final = 0.05
MOST: Final = 2000  # processes of one job that are looked at
SLICE_S: Final = 0.002  # after which others get their turn
PATIENCE_S: Final = 0.025  # of each tick for what is not cheap; who is not reached then comes first in the next one
FULLY_EVERY: Final = 4  # ticks: whether a job of one process has threads by now; children of threads other than the first
MEMFDS_EVERY: Final = 8  # ticks, where the host has much shared memory anyway
MIB: Final = 1048576


class Sampled(Protocol):
    """What is watched: an attempt."""

    def exceeds(self, limit: str, numbers: str) -> None:
        """It is over `limit`, "memory" or "processes"."""


class Job:
    """What the sampler knows of one job. Memory in bytes."""

    # As long as nobody has looked at it, which is never for most.
    peak_mib = 0.0  # the most it was seen to have, all its processes together; 0: that was not looked at
    oom_mark: Any = None  # of oom.OomKills
    template = 0  # its parent's pid; 0: not looked up yet
    stat_fd = statm_fd = children_fd = -1
    is_simple = False  # one process of one thread, far from its limit, when it was last looked at fully
    faults: Mapping[int, int] = MappingProxyType({})  # pid -> minor faults, of all processes that were seen at the last tick
    orphans: Sequence[int] = ()
    resident = 0
    faulted = 0  # bytes that faults may have brought since `known`
    known = 0  # what counts, and what was resident, when smaps_rollup was last looked at; 0: it never was
    known_resident = 0
    shared_before = 0  # the least shared memory that the host had since it began

    def __init__(
        self, attempt: Sampled, id: str, pid: int, max_memory_mib: float, max_processes: float, kept_mib: float, began: float
    ) -> None:  # fmt: skip
        self.attempt = attempt
        self.id = id
        self.pid = pid  # the first process of it
        self.began = began
        self.kept = int(kept_mib) * MIB  # of earlier jobs of its process: that is not its own
        self.max_memory = int(max_memory_mib) * MIB  # 0: no limit
        self.ceiling = self.max_memory and self.max_memory + self.kept  # 0: there is none
        self.max_processes = int(max_processes)  # 0: no limit

    @cached_property
    def by_thread(self) -> dict[int, list[int]]:
        """pid -> children of its threads but the first."""
        return {}

    def open(self) -> None:
        """Keep its files open: reading them again is half as dear, and they can never be another process's."""
        self.stat_fd = os.open(f"/proc/{self.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        self.statm_fd = os.open(f"/proc/{self.pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
        self.children_fd = os.open(f"/proc/{self.pid}/task/{self.pid}/children", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self.stat_fd < 0:
            return
        for fd in (self.stat_fd, self.statm_fd, self.children_fd):
            if fd >= 0:
                os.close(fd)
        self.stat_fd = self.statm_fd = self.children_fd = -1

    @property
    def most(self) -> int:
        """What may count at most, by all that is known without smaps_rollup."""
        if not self.known_resident:
            return self.resident
        return min(self.resident, self.known + max(0, self.resident - self.known_resident) + self.faulted)


class Sampler:
    """One for all jobs in children. It sleeps as long as there are none."""

    def __init__(self, kernel: Kernel) -> None:
        self.oom = OomKills()
        self._kernel = kernel
        self._jobs: dict[int, Job] = {}  # by pid, those that wait the longest for a close look first
        self._strays: dict[int, Job | None] = {}  # children of a template that are no job's first process; None: nobody's
        self._idle: deque[Task] = deque()
        self._task: Task | None = None
        self._tick = 0
        self._spent_s = 0.0  # of PATIENCE_S

    def watch(
        self, attempt: Sampled, id: str, pid: int, max_memory_mib: float, max_processes: float, kept_mib: float = 0.0
    ) -> Job:
        """Look at the job whose first process is `pid`, which kept `kept_mib` of earlier jobs, until it is forgotten."""
        job = self._jobs[pid] = Job(attempt, id, pid, max_memory_mib, max_processes, kept_mib, self._kernel.clock.monotonic())
        if self._task is None:
            self._task = self._kernel.spawn(self._run(), name="sampler", context=Context())  # no job's
        if self._idle or not self._tick:
            self.oom.look(job.began)
            self._kernel.unpark(self._idle)
        job.oom_mark, job.shared_before = self.oom.mark(), self.oom.shared_memory
        return job

    def forget(self, job: Job) -> None:
        if self._jobs.get(job.pid) is job:
            del self._jobs[job.pid]
        job.close()

    def stop(self) -> None:
        if self._task is not None:
            self._kernel.cancel(self._task, GeneratorExit())
            self._task = None

    def _run(self) -> Steps:
        while True:
            if not self._jobs:
                self._strays.clear()
                yield Park(self._idle)
            yield sleep(TICK_S)
            self._tick += 1
            yield from self._look()

    def _look(self) -> Steps:
        """One tick."""
        clock = self._kernel.clock
        now = slice_began = clock.monotonic()
        self.oom.look(now)
        self._spent_s = 0.0
        jobs = [job for job in self._jobs.values() if now - job.began >= YOUNG_S]
        if jobs:
            self._find_strays(jobs)
        for job in jobs:
            if self._jobs.get(job.pid) is not job:  # it ended while others had their turn
                continue
            with suppress(OSError, IndexError, ValueError):  # it is just ending, and its files read as nothing
                self._sample(job)
            if clock.monotonic() - slice_began > SLICE_S:
                yield
                slice_began = clock.monotonic()

    def _sample(self, job: Job) -> None:
        pids = self._walk(job)
        if job.max_processes and len(pids) > job.max_processes:
            many = f"{len(pids)}" if len(pids) < MOST else f"at least {MOST}"
            job.attempt.exceeds("processes", f"it has {many} processes at once, and its max_processes is {job.max_processes}")
            return
        hidden = self._may_hide(job)
        if len(pids) == 1:
            job.peak_mib = max(job.peak_mib, job.resident / MIB)
        if not job.max_memory or (job.most <= job.ceiling and not hidden):
            return
        began = self._kernel.clock.monotonic()
        if self._spent_s > PATIENCE_S:
            self._jobs = {job.pid: job, **self._jobs}
            return
        counted = self._count(job, pids, hidden)
        self._spent_s += self._kernel.clock.monotonic() - began
        job.known, job.known_resident, job.faulted = counted, job.resident, 0
        job.peak_mib = max(job.peak_mib, counted / MIB)
        if counted > job.ceiling:
            has = "it has" if len(pids) == 1 else f"its {len(pids)} processes have"
            age_s = self._kernel.clock.monotonic() - job.began
            own_mib, may_mib = (counted - job.kept) / MIB, job.max_memory // MIB
            text = f"{has} {own_mib:.0f} MiB, and its max_memory is {may_mib} MiB (seen after {age_s:.2f} s)"
            job.attempt.exceeds("memory", text)

    def _may_hide(self, job: Job) -> bool:
        """Whether it may have memory that nobody has mapped: the host's grew by so much, or is so much (now and then)."""
        shared, enough = self.oom.shared_memory, job.max_memory // 2
        job.shared_before = min(job.shared_before, shared)
        return shared - job.shared_before > enough or (shared > enough and (self._tick + job.pid) % MEMFDS_EVERY == 0)

    # -- the cheap look ---------------------------------------------------------------------------------------------

    def _walk(self, job: Job) -> list[int]:
        """The job's processes. Writes down what they have resident, and how much faults may have brought."""
        if job.stat_fd < 0:
            job.open()
        full = job.orphans or not job.is_simple or self._tick % FULLY_EVERY == job.pid % FULLY_EVERY
        if not full and not os.pread(job.children_fd, 4096, 0):
            job.resident = int(os.pread(job.statm_fd, 128, 0).split(b" ", 2)[1]) * PAGE
            return [job.pid]
        before, resident = job.faults, 0
        faults: dict[int, int] = {}
        waiting = [job.pid, *job.orphans]
        while waiting and len(faults) < MOST:
            pid = waiting.pop()
            if pid in faults:
                continue
            try:
                first = pid == job.pid
                stat = os.pread(job.stat_fd, 1024, 0) if first else read(f"/proc/{pid}/stat")
                fields = stat_fields(stat)
                waiting += self._children(job, pid, int(fields[17]))
            except (OSError, ValueError, IndexError):
                if pid == job.pid:
                    raise OSError("it is gone") from None
                continue
            faults[pid] = int(fields[7])
            resident += int(fields[21])
            if first:
                job.template = int(fields[1])
        job.faults, job.resident = faults, resident * PAGE
        job.is_simple = len(faults) == 1 and not job.by_thread and not job.orphans and not job.known_resident
        job.faulted += sum(max(0, count - before.get(pid, 0)) for pid, count in faults.items()) * PAGE
        return list(faults)

    def _children(self, job: Job, pid: int, threads: int) -> list[int]:
        listed = os.pread(job.children_fd, MAY_BE_MORE, 0) if pid == job.pid else b""
        if pid != job.pid or len(listed) == MAY_BE_MORE:
            listed = read(f"/proc/{pid}/task/{pid}/children")
        children = [int(child) for child in listed.split()]
        if threads > 1:
            if self._tick % FULLY_EVERY == 0 or pid not in job.by_thread:
                job.by_thread[pid] = list(_of_threads(pid))
            children += job.by_thread[pid]
        return children

    def _find_strays(self, jobs: list[Job]) -> None:
        """Give each job the processes whose parents died, and that its template has now."""
        for job in jobs:
            job.orphans = ()
        by_id = {job.id: job for job in jobs}
        strays: dict[int, Job | None] = {}
        for template in {job.template for job in jobs if job.template}:
            try:
                listed = read(f"/proc/{template}/task/{template}/children").split()
            except OSError:
                continue
            for pid in map(int, listed[: 2 * MOST]):
                if pid not in self._jobs:
                    owner = strays[pid] = self._strays[pid] if pid in self._strays else self._owner(pid, jobs, by_id)
                    if owner is not None and self._jobs.get(owner.pid) is owner:
                        owner.orphans = (*owner.orphans, pid)
        self._strays = strays

    def _owner(self, pid: int, jobs: list[Job], by_id: dict[str, Job]) -> Job | None:
        try:
            stat = read(f"/proc/{pid}/stat")
            session = int(stat_fields(stat)[3])
            if session in self._jobs:
                return self._jobs[session]
            for job in jobs:
                if pid in job.faults:
                    return job
            return by_id.get(environ_of(pid).get(JOB_ID.encode(), b"").decode())
        except (OSError, ValueError, IndexError):
            pass
        return None

    # -- the close look ---------------------------------------------------------------------------------------------

    def _count(self, job: Job, pids: list[int], hidden: bool) -> int:
        """What of it counts against max_memory."""
        own = shares = shared_memory = looked_at = 0
        for pid in pids:
            try:
                rollup = _rollup(pid)
            except OSError:  # just gone, or another user's: then what is resident has to do
                continue
            looked_at += 1
            private = rollup.get(b"Private_Clean", 0) + rollup.get(b"Private_Dirty", 0)
            own += private
            shares += rollup.get(b"Pss", 0) - private
            shared_memory += rollup.get(b"Pss_Shmem", 0)
        if not looked_at:
            return max(0, job.resident - len(pids) * _resident(job.template))
        counted = own + max(0, shares - looked_at * _share(job.template))
        return counted + max(0, _memfds(pids) - shared_memory) if hidden else counted


def _of_threads(pid: int) -> Iterator[int]:
    """Children that threads of `pid` other than the first have started."""
    for thread in os.listdir(f"/proc/{pid}/task")[:MOST]:
        if thread != str(pid):
            try:
                yield from map(int, read(f"/proc/{pid}/task/{thread}/children").split())
            except OSError:
                continue


def _rollup(pid: int) -> dict[bytes, int]:
    """Bytes by the names of proc_pid_smaps_rollup(5)."""
    lines = [line.split() for line in read(f"/proc/{pid}/smaps_rollup").split(b"\n")[1:]]
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if len(line) == 3}


def _share(template: int) -> int:
    """What each process that was forked from `template`, and changed nothing, has of the pages that all of them share."""
    try:
        rollup = _rollup(template)
    except OSError:
        return 0
    return rollup.get(b"Pss", 0) - rollup.get(b"Private_Clean", 0) - rollup.get(b"Private_Dirty", 0)


def _resident(pid: int) -> int:
    try:
        return int(read(f"/proc/{pid}/statm").split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def _memfds(pids: list[int]) -> int:
    """Bytes in files in memory that `pids` have open, each of them once."""
    seen: dict[tuple[int, int], int] = {}
    for pid in pids[:MOST]:
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{fd}"
                if os.readlink(path).startswith(("/memfd:", "/dev/shm/")):
                    status = os.stat(path)
                    seen[status.st_dev, status.st_ino] = status.st_blocks * 512
        except OSError:
            continue
    return sum(seen.values())
