"""A pool process: warm, forked from the template, runs many jobs one after another, and calls that inline jobs offload. What
each of them does is `child.Run`'s.

    TAKE -> limits -> run -> flush, look around -> RESULT or FAILURE, and DONE, in one piece -> TAKE …

DONE says what the run has cost, and what it left changed for the next; whether there is a next one is the supervisor's decision,
who kills this process when there is not. Jobs of one pool share a process and trust each other: one could lie for the next.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping
from contextlib import suppress
from contextvars import copy_context
from signal import SIG_IGN, SIGKILL, SIGTERM
from typing import Any, Final, NamedTuple

from .. import codec
from . import limits, wire
from .child import Run
from .killing import JOB_ID
from .process_state import CHILDREN, Changes, ProcessState
from .settling_in import name_process

KNOWN: Final = 100  # kinds of runs that are remembered
PASSES: Final = 100  # over the processes that a job has left; then the supervisor's kill has to do


def serve(supervisor: socket.socket) -> int:
    """Run what it is given until the supervisor is gone. Returns the exit status."""
    limits.prctl(limits.PR_SET_CHILD_SUBREAPER, 1)  # what a job leaves behind, at whatever depth, is to be seen here
    pool = _Pooled(supervisor)
    while True:
        try:
            _, payload = wire.read_frame(supervisor, (wire.TAKE,))
        except (EOFError, ConnectionError):
            return 0
        particular, general, job = payload.split(b"\n", 2)
        pool.run({**pool.general(general), **codec.from_json(particular)}, job)


class _Used(NamedTuple):
    """What this process has used until now. CPU in seconds, with the children that it waited for; memory in KiB."""

    user_s: float
    system_s: float
    peak_kib: int


class _Pooled:
    def __init__(self, supervisor: socket.socket) -> None:
        self._socket = supervisor
        self._limits = limits.RunLimits()
        self._used = _used()  # until the end of the last run
        self._statm_fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)  # a fifth of the price of opening it each time
        self._memory, self._data = limits.statm()  # bytes
        self._known: dict[bytes, Mapping[str, Any]] = {}
        self._state = ProcessState()

    def general(self, data: bytes) -> Mapping[str, Any]:
        """What `data` says, read once."""
        known = self._known.get(data)
        if known is None:
            if len(self._known) >= KNOWN:
                self._known.clear()
            known = self._known[data] = codec.from_json(data)
        return known

    def run(self, request: Mapping[str, Any], job: bytes) -> None:
        """One job, from its limits to its last frame."""
        state = self._state
        os.environ[JOB_ID] = request["id"]
        state.expect_environment(JOB_ID, request["id"])
        name_process(request)
        run = Run(request, self._socket)
        state.expect_handler(SIGTERM, SIG_IGN)
        state.expect_rlimits(self._limits.apply(request["limits"], self._data))

        def farewell() -> bytes:
            try:
                changes = state.changes() + ([] if run.kept_sigterm else [("the handler of SIGTERM", "")])
            except (OSError, MemoryError) as error:  # the job has left nothing to look with, and its result is one all the same
                self._limits.lift_files()
                changes = [("all that it may have", f"{error.__class__.__name__} afterwards")]
            self._limits.lift_memory()
            if any(what == CHILDREN for what, _ in changes):
                _end_children()
            return wire.frame(wire.DONE, self._done(request["token"].encode(), changes))

        copy_context().run(run.attempt, wire.CALL if request.get("call") else wire.RUN, job, farewell)

    def _measured(self) -> tuple[int, int]:
        """See limits.statm."""
        try:
            return limits.parse_statm(os.pread(self._statm_fd, 200, 0))
        except (OSError, ValueError, IndexError):  # the job has closed it, or put something else there; that is told as a change
            return limits.statm()

    def _done(self, token: bytes, changes: Changes) -> bytes:
        """See child_frames.Done. The peak is that of a life: it is this run's where it has risen.

        What a job keeps counts for RLIMIT_DATA although it was never touched, so it is looked at after each: the next one has its
        own `max_memory` above that.
        """
        before, after = self._used, _used()
        self._used = after
        rose = after.peak_kib > before.peak_kib
        self._memory, self._data = self._measured()
        peak_mib = after.peak_kib / 1024 if rose else self._memory / limits.MIB
        used = (max(0.0, after.user_s - before.user_s), max(0.0, after.system_s - before.system_s))
        head = wire.DONE_HEAD.pack(token, *used, peak_mib, self._memory / limits.MIB)
        return head + codec.to_json(changes) if changes else head


def _end_children() -> None:
    """All that the job has left running, while they are still our descendants: orphans have become our children."""
    for _ in range(PASSES):  # they may fork between the look and the kill
        pids = _descendants(os.getpid())
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, SIGKILL)
        try:
            while pids and os.waitpid(-1, 0):
                continue
        except ChildProcessError:
            return


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # it has ended meanwhile
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                children = [int(word) for word in file.read().split()]
            found += children
            for child in children:
                found += _descendants(child)
    return found


def _used() -> _Used:
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return _Used(own.ru_utime + others.ru_utime, own.ru_stime + others.ru_stime, own.ru_maxrss)
