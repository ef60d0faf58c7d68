"""Isolated: a job in a child of the template, limited by the kernel, watched by pidfd, ended by SIGTERM and then SIGKILL.

    fork -> running --result frame or exit--> ended
               |-- time-out or cancel --> terminating (SIGTERM) -- kill_grace --> killed (SIGKILL) --> ended

What decides is one complete result frame, whatever the exit status; without one, the exit status does. End-of-file decides
nothing: a surviving grandchild can hold it back. The supervisor decodes no argument of an isolated job, and no result either.
"""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final

from ..codec import from_json, pack, to_json, unpack
from ..context import JobContext
from ..dispatch import NewJob
from ..errors import EnvelopeError, JobCancelled, KQueueError, OffloadError
from ..events import Events, JobOutput
from ..kernel import READ, WRITE, Kernel, Task, wait_any
from ..outcome import Outcome
from . import wire
from .base import Work
from .link import Child, NotStarted, TemplateLink
from .output import Lines, Rate, Tail

Steps = Generator[Any, Any, Any]
READ_SIZE: Final = 65536  # at most so much of one pipe per turn, so that a flood cannot keep the loop
MAX_FILES: Final = 1024  # open files of a job
SETTLE_S: Final = 3.0  # beyond kill_grace, for a killed child to be reaped and reported

# Who sends these when the supervisor did not: the kernel, for what the process did.
_FROM_KERNEL: Final = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS", "SIGXCPU", "SIGXFSZ", "SIGTRAP")

EnqueueFromChild = Callable[[Sequence[NewJob]], Steps]


class IsolatedExecutionStrategy:
    """Runs jobs in children of one template.

    `kill_grace_s`: between SIGTERM and SIGKILL. `memory_headroom_mib`: what RLIMIT_DATA allows beyond `max_memory`, since it
    counts thread stacks at their full reserve. `enqueue`: how the supervisor enqueues what a child dispatches.
    """

    name = "isolated"

    def __init__(
        self, kernel: Kernel, events: Events, *, enqueue: EnqueueFromChild,
        kill_grace_s: float = 2.0, memory_headroom_mib: int = 128,
    ) -> None:  # fmt: skip
        self.cancel_grace_s = kill_grace_s + SETTLE_S
        self.link = TemplateLink(kernel, events)
        self._kernel = kernel
        self._events = events
        self._enqueue = enqueue
        self._kill_grace_s = kill_grace_s
        self._memory_headroom_mib = memory_headroom_mib
        self.pids: dict[str, int] = {}  # id of a running job -> pid of its child

    def start(self) -> Steps:
        """Start the template and wait for its manifest. Raises loading.ImportFailed."""
        yield from self.link.start()

    def stop(self) -> Steps:
        yield from self.link.stop()

    def execute(self, work: Work) -> Steps:
        """Run one attempt in a child of its own; returns the Outcome."""
        options = work.options
        limits = {
            "timeout": options.timeout, "max_memory": options.max_memory, "memory_headroom": self._memory_headroom_mib,
            "max_cpu": options.max_cpu, "max_files": MAX_FILES,
        }  # fmt: skip
        request = {
            "id": work.envelope.id, "job": work.envelope.job, "attempt": work.attempt, "limits": limits,
            "keep_result": bool(options.keep_result),
        }  # fmt: skip
        outcome: Outcome = yield from self._attempt(request, wire.frame(wire.RUN, work.data), work.context)
        return outcome

    def offload(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, context: JobContext,
        timeout_s: float, max_memory_mib: int,
    ) -> Steps:  # fmt: skip
        """Run `function` in a child; returns its result or raises its error. TypeError when it cannot be sent there."""
        call = to_json({**_reference(function), "args": pack(list(args), "args"), "kwargs": pack(dict(kwargs), "kwargs")})
        limits = {
            "timeout": timeout_s, "max_memory": max_memory_mib, "memory_headroom": self._memory_headroom_mib, "max_cpu": 0,
            "max_files": MAX_FILES,
        }  # fmt: skip
        request = {"id": context.id, "job": f"{context.name}:offload", "attempt": 1, "limits": limits, "keep_result": True}
        outcome: Outcome = yield from self._attempt(request, wire.frame(wire.CALL, call), context, track=False)
        if outcome.ok:
            return unpack(from_json(outcome.result or b"null"))
        if outcome.cause == "cancelled":
            raise JobCancelled(f"{context.name} was stopped")
        raise _offload_error(outcome)

    # -- one attempt ------------------------------------------------------------------------------------------------

    def _attempt(self, request: Mapping[str, Any], first: bytes, context: JobContext, track: bool = True) -> Steps:
        began = self._kernel.clock.monotonic()
        try:
            child: Child = yield from self.link.fork(request)
        except NotStarted as error:
            described = {"class": "ForkError", "message": str(error), "traceback": "", "mro": []}
            return Outcome("lost", "kernel", error=described)
        except JobCancelled:
            return Outcome("cancelled", "shutdown")
        run = _Run(self, child, request, context)
        if track:
            self.pids[context.id] = child.pid
        try:
            yield from run.watch(first)
        finally:
            self.pids.pop(context.id, None)
            self.link.forget(child)
        return run.outcome()._replace(duration_s=self._kernel.clock.monotonic() - began)


class _Run:
    """One child while it runs. Everything it says ends up here."""

    def __init__(
        self, strategy: IsolatedExecutionStrategy, child: Child, request: Mapping[str, Any], context: JobContext
    ) -> None:
        self._strategy = strategy
        self._kernel = strategy._kernel
        self._child = child
        self._request = request
        self._context = context
        self._frames = wire.Frames()
        self._result: bytes | None = None
        self._failure: dict[str, Any] | None = None
        self._garbage: str | None = None  # what was wrong with its frames; None: nothing
        self._why = ""  # we are ending it because of: "timeout", "cancelled", "garbage", "lingering"; "": we are not
        self._lines = {child.stdout: ("stdout", Lines()), child.stderr: ("stderr", Lines())}
        self._tail = Tail()
        self._rate = Rate()
        self._outbox = bytearray()
        self._enqueuing: Task | None = None

    def watch(self, first: bytes) -> Steps:
        """Feed it, listen to it, and end it when it must end, until it was reaped."""
        child, clock = self._child, self._kernel.clock
        self._outbox += first
        fds = {child.pidfd: READ, child.socket.fileno(): READ | WRITE, child.stdout: READ, child.stderr: READ}
        timeout_s = self._request["limits"]["timeout"]
        deadline = clock.monotonic() + timeout_s if timeout_s else None
        while not child.lost:
            patience_s = None if deadline is None else max(0.0, deadline - clock.monotonic())
            fds[child.socket.fileno()] = self._socket_events(fds)
            try:
                ready = yield wait_any({fd: events for fd, events in fds.items() if events}, patience_s)
            except JobCancelled:
                deadline = self._end("cancelled")
                continue
            if child.pidfd in ready:
                break
            for fd in ready:
                if not self._serve(fd):
                    fds[fd] = 0
            if self._garbage is not None and not self._why:
                deadline = self._end("garbage")
            elif (self._result is not None or self._failure is not None) and not self._why:
                self._why, deadline = "lingering", clock.monotonic() + self._strategy._kill_grace_s
            elif deadline is not None and clock.monotonic() >= deadline:
                if self._why:
                    child.kill(signal.SIGKILL)  # the template kills its group when it reaps it
                    deadline = None
                else:
                    deadline = self._end("timeout")
        while True:  # it is dead, or as good as: wait for the report, through any cancellation
            try:
                yield from self._strategy.link.exited(child)
                break
            except JobCancelled:
                self._why = self._why or "cancelled"
        self._drain()
        if self._enqueuing is not None:
            self._kernel.cancel(self._enqueuing, GeneratorExit())

    def _end(self, why: str) -> float:
        """Ask it to end; when that must have happened."""
        self._why = why
        self._child.kill(signal.SIGTERM)
        return self._kernel.clock.monotonic() + self._strategy._kill_grace_s

    # -- what it says -----------------------------------------------------------------------------------------------

    def _socket_events(self, fds: Mapping[int, int]) -> int:
        events = fds[self._child.socket.fileno()]
        return 0 if not events else READ | WRITE if self._outbox else READ

    def _serve(self, fd: int) -> bool:
        """Take what is there on `fd`, a bounded amount; False when nothing more can come."""
        if fd in self._lines:
            return self._take_output(fd)
        if self._outbox:
            try:
                sent = self._child.socket.send(self._outbox)
                del self._outbox[:sent]
            except BlockingIOError:
                pass
            except OSError:
                self._outbox.clear()
        return self._take_frames()

    def _take_output(self, fd: int) -> bool:
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return True
        stream, lines = self._lines[fd]
        self._tail.add(data)
        for line in lines.feed(data) if data else lines.rest():
            if self._rate.allows(self._kernel.clock.monotonic()):
                self._log(stream, line)
        return bool(data)

    def _log(self, stream: str, line: str) -> None:
        self._strategy._events.emit(JobOutput(self._request["id"], self._request["job"], stream, line))

    def _take_frames(self) -> bool:
        try:
            data = self._child.socket.recv(READ_SIZE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        try:
            for kind, payload in self._frames.feed(data):
                self._take_frame(kind, payload)
        except (wire.WireError, EnvelopeError, ValueError, TypeError, KeyError) as error:
            self._garbage = str(error)
            return False
        return bool(data)

    def _take_frame(self, kind: int, payload: bytes) -> None:
        if kind == wire.RESULT:
            self._result = payload
        elif kind == wire.FAILURE:
            failure = from_json(payload)
            if failure["cause"] not in _CAUSES_OF_A_CHILD or not isinstance(failure["error"], dict):
                raise wire.WireError("a failure of an unknown kind")
            self._failure = failure
        elif kind == wire.PROGRESS:
            fraction, note = from_json(payload)
            self._context.fraction, self._context.note = min(1.0, max(0.0, float(fraction))), str(note)[:200]
            self._context.services.progress(self._context)
        else:
            jobs = [NewJob(**{**fields, "envelope": fields["envelope"].encode()}) for fields in from_json(payload)]
            self._enqueuing = self._kernel.spawn(self._enqueue(jobs), name=f"enqueue for {self._request['id']}")

    def _enqueue(self, jobs: Sequence[NewJob]) -> Steps:
        reply: dict[str, Any] = {}
        try:
            yield from self._strategy._enqueue(jobs)
        except (KQueueError, TypeError) as error:
            reply = {"error": str(error)}
        self._enqueuing = None
        self._outbox += wire.frame(wire.REPLY, to_json(reply))
        # The watcher may be parked without WRITE; the socket of a child that awaits a reply has room.
        try:
            sent = self._child.socket.send(self._outbox)
            del self._outbox[:sent]
        except OSError:
            self._outbox.clear()

    def _drain(self) -> None:
        """Read what was written before the end, and not a byte more than is there: a grandchild may hold the other end."""
        for _ in range(64):
            before = self._result, self._failure
            if not self._take_frames() or (self._result, self._failure) != before:
                break
        for fd in (self._child.stdout, self._child.stderr):
            for _ in range(16):  # a pipe holds 64 KiB, unless a survivor keeps writing
                try:
                    data = os.read(fd, READ_SIZE)
                except BlockingIOError:
                    break
                if not data:
                    break
                self._tail.add(data)
                for line in self._lines[fd][1].feed(data):
                    if self._rate.allows(self._kernel.clock.monotonic()):
                        self._log(self._lines[fd][0], line)
            for line in self._lines[fd][1].rest():
                self._log(self._lines[fd][0], line)
        if self._rate.held_back:
            self._log("stderr", f"… {self._rate.held_back} more lines were not logged")

    # -- what came of it --------------------------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        """What the frames and the exit status amount to."""
        exit = self._child.exit
        limits = {name: value for name, value in self._request["limits"].items() if value}
        outcome = self._verdict()._replace(pid=self._child.pid or None, limits=limits, output=self._tail.text())
        if exit is None:
            return outcome
        return outcome._replace(
            cpu_user_s=exit.cpu_user_s, cpu_system_s=exit.cpu_system_s, max_memory_mib=exit.max_memory_mib
        )

    def _verdict(self) -> Outcome:
        exit = self._child.exit
        signaled = signal.Signals(os.WTERMSIG(exit.status)).name if exit and os.WIFSIGNALED(exit.status) else None
        code = os.WEXITSTATUS(exit.status) if exit and os.WIFEXITED(exit.status) else None
        if self._result is not None:
            return Outcome("ok", result=self._result, exit_code=code, signal=signaled)
        if self._garbage is not None:
            error = {"class": "WireError", "message": f"the job wrote garbage to KQueue's socket: {self._garbage}"}
            return Outcome("exception", "supervisor", error=error, exit_code=code, signal=signaled)
        if self._failure is not None:
            cause, error = self._failure["cause"], self._failure["error"]
            ended_by = {"timeout": "supervisor", "cancelled": "shutdown", "memory": "kernel", "refused": "supervisor"}
            if self._why in ("timeout", "cancelled"):
                cause = self._why
            return Outcome(cause, ended_by.get(cause, "job"), error=error, exit_code=self._failure.get("exit_code", code))
        if self._why == "timeout":
            return Outcome("timeout", "supervisor", exit_code=code, signal=signaled)
        if self._why == "cancelled":
            return Outcome("cancelled", "shutdown", exit_code=code, signal=signaled)
        if exit is None:
            return Outcome("lost", "kernel")
        if signaled is not None:
            cause = "cpu" if signaled == "SIGXCPU" else "signal"
            ended_by_whom = "kernel" if signaled in _FROM_KERNEL else "job" if signaled == "SIGABRT" else "operator"
            return Outcome(cause, ended_by_whom, signal=signaled)
        return Outcome("exit", exit_code=code)


_CAUSES_OF_A_CHILD: Final = ("exception", "timeout", "cancelled", "memory", "exit", "refused")


def _reference(function: Callable[..., Any]) -> dict[str, str]:
    """How a child finds `function`. TypeError when it cannot."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not qualname or "<" in qualname or module == "__main__":
        raise TypeError(
            f"offload() needs a function that a child can import, not {function!r:.80}: move it to the top level of a module"
        )
    return {"module": module, "qualname": qualname}


def _offload_error(outcome: Outcome) -> BaseException:
    error = outcome.error or {}
    name, message = str(error.get("class", "")), str(error.get("message", ""))
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        return kind(message)
    if outcome.cause == "timeout":
        return TimeoutError(message or "the offloaded call ran longer than its job may")
    return OffloadError(outcome.summary())
