"""A pool process: warm, forked from the template, runs many jobs one after another, and calls that inline jobs offload. What
each of them does is `child.Run`'s.

    TAKE -> limits -> run -> flush, look around -> take the next from the tray -> RESULT or FAILURE, and DONE, in one piece -> …

DONE says what the run has cost, what it left changed for the next, and which one is next. This process goes on by itself only
where nothing is to be decided (`_may_go_on`); else it waits for another TAKE, or to be killed, as the supervisor sees fit. Jobs
of one pool share a process and trust each other: one could lie for the next.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from contextvars import copy_context
from signal import SIG_IGN, SIGTERM
from typing import Any, Final, NamedTuple

from .. import codec
from . import limits, tray, wire
from .child import Run
from .killing import JOB_ID, children_of, kill_trees
from .process_state import CHILDREN, ProcessState
from .settling_in import name_process

KNOWN: Final = 100  # kinds of runs that are remembered
PASSES: Final = 100  # over the processes that a job has left; then the supervisor's kill has to do
PASS_S: Final = 0.002


def serve(supervisor: socket.socket, until: tray.Until) -> int:
    """Run what it is given until the supervisor is gone, by itself as long as its life is not over. Returns the exit status."""
    limits.prctl(limits.PR_SET_CHILD_SUBREAPER, 1)  # what a job leaves behind, at whatever depth, is to be seen here
    try:
        pool = _Pooled(supervisor, _receive_tray(supervisor), until)
        while True:
            _, payload = wire.read_frame(supervisor, (wire.TAKE,))
            following: wire.Take | None = wire.read_take(payload)
            while following is not None:
                following = pool.run(following)
    except (EOFError, ConnectionError):
        return 0


def _receive_tray(supervisor: socket.socket) -> socket.socket:
    _, fds, _, _ = socket.recv_fds(supervisor, 1, 1)
    if not fds:
        raise EOFError("the supervisor is gone")
    if fds[0] != wire.TRAY_FD:
        os.dup2(fds[0], wire.TRAY_FD)
        os.close(fds[0])
    os.set_inheritable(wire.TRAY_FD, False)
    return socket.socket(fileno=wire.TRAY_FD)


class _Used(NamedTuple):
    """What this process has used until now. CPU in seconds, with the children that it waited for; memory in KiB."""

    user_s: float
    system_s: float
    peak_kib: int


class _Pooled:
    def __init__(self, supervisor: socket.socket, its_tray: socket.socket, until: tray.Until) -> None:
        self._socket = supervisor
        self._tray = its_tray
        self._until = until
        self._began = time.monotonic()
        self._runs = 0
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

    def run(self, take: wire.Take) -> wire.Take | None:
        """One job, from its limits to its last frame. Returns the next; None: that is to be waited for."""
        began = time.monotonic()
        request = {**self.general(take.general), "id": take.id, "attempt": take.attempt}
        following: wire.Take | None = None
        state = self._state
        os.environ[JOB_ID] = take.id
        state.expect_environment(JOB_ID, take.id)
        name_process(request)
        run = Run(request, self._socket)
        state.expect_handler(SIGTERM, SIG_IGN)
        state.expect_rlimits(self._limits.apply(request["limits"], self._data))

        def farewell() -> bytes:
            nonlocal following
            try:
                changes = state.changes() + ([] if run.kept_sigterm else [("the handler of SIGTERM", "")])
            except (OSError, MemoryError) as error:  # the job has left nothing to look with, and its result is one all the same
                self._limits.lift_files()
                changes = [("all that it may have", f"{error.__class__.__name__} afterwards")]
            self._limits.lift_memory()
            if changes and any(what == CHILDREN for what, _ in changes):
                _end_children()
            used = self._look_at_use()
            now = time.monotonic()
            if not changes and self._may_go_on(run, now):
                following = self._take_next()
            next_token = wire.NO_TOKEN if following is None else following.token
            head = wire.DONE_HEAD.pack(take.token, next_token, now - began, *used)
            return wire.frame(wire.DONE, head + codec.to_json(changes) if changes else head)

        copy_context().run(run.attempt, wire.CALL if request.get("call") else wire.RUN, take.envelope, farewell)
        return following

    def _measured(self) -> tuple[int, int]:
        """See limits.statm."""
        try:
            return limits.parse_statm(os.pread(self._statm_fd, 200, 0))
        except (OSError, ValueError, IndexError):  # the job has closed it, or put something else there; that is told as a change
            return limits.statm()

    def _take_next(self) -> wire.Take | None:
        message = tray.take(self._tray)
        return wire.read_take(wire.payload_of(message)) if message else None

    def _may_go_on(self, run: Run, now: float) -> bool:
        """Whether there is nothing for the supervisor to decide. What it reads while this run lasts, it takes for this run's."""
        if run.was_interrupted or run.ran_out_of_memory:
            return False
        if self._until.is_over(self._runs, self._memory / limits.MIB, now - self._began):
            return False
        try:
            return not tray.has_unread(1) and not tray.has_unread(2)
        except OSError:
            return False

    def _look_at_use(self) -> tuple[float, float, float, float]:
        """See child_frames.Done. The peak is that of a life: it is this run's where it has risen.

        What a job keeps counts for RLIMIT_DATA although it was never touched, so it is looked at after each: the next one has its
        own `max_memory` above that.
        """
        before, after = self._used, _used()
        self._used = after
        self._runs += 1
        rose = after.peak_kib > before.peak_kib
        self._memory, self._data = self._measured()
        peak_mib = after.peak_kib / 1024 if rose else self._memory / limits.MIB
        used = (max(0.0, after.user_s - before.user_s), max(0.0, after.system_s - before.system_s))
        return *used, peak_mib, self._memory / limits.MIB


def _end_children() -> None:
    """All that the job has left running, while they are still our descendants: orphans have become our children."""
    for _ in range(PASSES):  # they may fork between the look and the kill
        children = children_of(os.getpid())
        if not children:
            return
        kill_trees(children)
        for pid in children:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(PASS_S)


def _used() -> _Used:
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return _Used(own.ru_utime + others.ru_utime, own.ru_stime + others.ru_stime, own.ru_maxrss)
