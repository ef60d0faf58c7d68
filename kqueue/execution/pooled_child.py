"""A pool process: warm, forked from the template, runs many jobs one after another. What each of them does is `child.Run`'s.

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
from typing import Any, Final

from setproctitle import setproctitle

from .. import codec
from . import limits, wire
from .child import Run
from .process_state import CHILDREN, Changes, ProcessState

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
        request, _, job = payload.partition(b"\n")
        pool.run(codec.from_json(request), job)


class _Pooled:
    def __init__(self, supervisor: socket.socket) -> None:
        self._socket = supervisor
        self._memory, self._data = limits.statm()  # bytes, after the last run
        self._state = ProcessState()

    def run(self, request: Mapping[str, Any], job: bytes) -> None:
        """One job, from its limits to its last frame."""
        state = self._state
        os.environ["KQUEUE_JOB_ID"] = request["id"]
        state.expect_environment("KQUEUE_JOB_ID", request["id"])
        setproctitle(f"kqueued: job {request['job']} {request['id']}")
        run = Run(request, self._socket)
        state.expect_handler(SIGTERM, SIG_IGN)
        state.expect_rlimits(limits.apply_to_run(request["limits"], self._data))
        before = _used()

        def farewell() -> bytes:
            changes = state.changes() + ([] if run.kept_sigterm else [("the handler of SIGTERM", "")])
            limits.lift_memory()
            if any(what == CHILDREN for what, _ in changes):
                _end_children()
            return wire.frame(wire.DONE, codec.to_json(self._done(request["token"], before, changes)))

        copy_context().run(run.attempt, wire.RUN, job, farewell)

    def _done(self, token: str, before: tuple[float, float, int], changes: Changes) -> list[Any]:
        """See child_frames.Done. `ru_maxrss` is the peak of a life: it is this run's where it has risen."""
        after = _used()
        self._memory, self._data = limits.statm()
        peak_mib = after[2] / 1024 if after[2] > before[2] else self._memory / limits.MIB
        used = [max(0.0, round(after[n] - before[n], 6)) for n in (0, 1)]
        return [token, *used, round(peak_mib, 3), round(self._memory / limits.MIB, 3), changes]


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


def _used() -> tuple[float, float, int]:
    """CPU seconds in user and system mode, of this process and of the children it waited for; its peak memory, KiB."""
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + others.ru_utime, own.ru_stime + others.ru_stime, own.ru_maxrss
