"""One attempt in a child: feed it, listen to it, end it when it must end, and say what came of it.

    running --result or failure, exit--> ended
       |-- time-out, cancel, garbage --> terminating (SIGTERM) -- kill_grace --> killed (SIGKILL) --> ended

What decides is the first complete result or failure, whatever the exit status; without one, the exit status does. End-of-file
decides nothing: a surviving grandchild can hold it back. What the child says is parsed by `child_frames.py` and trusted after.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final

from ..codec import to_json
from ..context import JobContext
from ..dispatch import NewJob
from ..errors import JobCancelled, KQueueError
from ..events import Events, JobOutput
from ..kernel import READ, WRITE, Kernel, Task, wait_any
from ..outcome import Outcome
from ..process import signal_name
from . import wire
from .child_frames import Backoff, Failure, Progress, Result, Said, Then, parse
from .link import Child
from .output import Lines, Rate, Tail

Steps = Generator[Any, Any, Any]
EnqueueFromChild = Callable[[Sequence[NewJob]], Steps]
CheckFromChild = Callable[[NewJob], NewJob]

READ_SIZE: Final = 16384  # at most so much of one pipe per turn, so that a flood cannot keep the loop
LAST_WORDS: Final = 100
DRAIN_SIZE: Final = 2 * 1024 * 1024  # after its end: a result of 1 MiB, and what a socket holds before it

# Who sends these when the supervisor did not: the kernel, for what the process did.
_FROM_KERNEL: Final = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS", "SIGXCPU", "SIGXFSZ", "SIGTRAP")
_ENDED_BY: Final = {"timeout": "supervisor", "cancelled": "shutdown", "memory": "kernel", "refused": "supervisor"}


class Attempt:
    """A child while it runs. `request` is what the template was asked.

    `enqueue` takes what the child dispatches, `check` says what of it may stand in a queue, and how.
    `kill`: it and all that it started.
    """

    def __init__(
        self, kernel: Kernel, events: Events, child: Child, request: Mapping[str, Any], context: JobContext, *,
        enqueue: EnqueueFromChild, check: CheckFromChild, kill_grace_s: float, kill: Callable[[Child], None],
    ) -> None:  # fmt: skip
        self._kernel = kernel
        self._events = events
        self._child = child
        self._request = request
        self._context = context
        self._enqueue = enqueue
        self._check = check
        self._kill_grace_s = kill_grace_s
        self._kill = kill
        self._frames = wire.Frames()
        self._said: Result | Failure | None = None  # the first of either, which decides
        self._backoff = Backoff(None, "")  # what its backoff function said after a failure, if it has one
        self._garbage: str | None = None  # what was wrong with its frames; None: nothing
        self._why = ""  # we are ending it because of: "timeout", "cancelled", "garbage", "lingering"; "": we are not
        self._lines = {child.stdout: ("stdout", Lines()), child.stderr: ("stderr", Lines())}
        self._tail = Tail()
        self._rate = Rate()
        self._outbox = bytearray()
        self._enqueuing: Task | None = None  # what it dispatched is on its way; until then it is not listened to
        self._watcher: Task | None = None
        self._last_words: int | None = None  # how much more progress is heard, once the child has ended; None: it has not

    def watch(self, first: bytes, exited: Callable[[Child], Steps]) -> Steps:
        """Send it `first` and stay with it to its end. `exited`: waits until the template has reported that."""
        child, clock = self._child, self._kernel.clock
        self._watcher = self._kernel.current
        self._outbox += first
        socket_fd = child.socket.fileno()
        open_fds = {socket_fd, child.stdout, child.stderr}
        timeout_s = self._request["limits"]["timeout"]
        deadline = clock.monotonic() + timeout_s if timeout_s else None
        while not child.lost:
            fds = {child.pidfd: READ, **{fd: READ for fd in open_fds if fd != socket_fd or self._enqueuing is None}}
            if self._outbox and socket_fd in open_fds:
                fds[socket_fd] = fds.get(socket_fd, 0) | WRITE
            try:
                ready = yield wait_any(fds, None if deadline is None else max(0.0, deadline - clock.monotonic()))
            except JobCancelled:
                if self._why != "timeout":  # which is counted, whatever comes after it
                    deadline = self._end("cancelled")
                continue
            if child.pidfd in ready:
                break
            open_fds -= {fd for fd, events in ready.items() if not self._serve(fd, events)}
            if self._garbage is not None and not self._why:
                deadline = self._end("garbage")
            elif self._said is not None and not self._why:
                self._why, deadline = "lingering", clock.monotonic() + self._kill_grace_s
            elif deadline is not None and clock.monotonic() >= deadline:
                if self._why:
                    self._kill(child)
                    deadline = None
                else:
                    deadline = self._end("timeout")
        yield from self._await_report(exited)
        self._drain()
        if self._enqueuing is not None:
            self._kernel.cancel(self._enqueuing, GeneratorExit())

    def _await_report(self, exited: Callable[[Child], Steps]) -> Steps:
        """It is dead, or as good as: wait for the template's report, through any cancellation."""
        while self._child.exit is None and not self._child.lost:
            try:
                yield from exited(self._child)
            except JobCancelled:
                self._why = self._why or "cancelled"

    def _end(self, why: str) -> float:
        """Ask it to end; when that must have happened."""
        self._why = why
        self._child.kill(signal.SIGTERM)
        return self._kernel.clock.monotonic() + self._kill_grace_s

    # -- what it says -----------------------------------------------------------------------------------------------

    def _serve(self, fd: int, events: int) -> bool:
        """Take what is there on `fd`, a bounded amount; False when nothing more can come."""
        if fd in self._lines:
            return self._take_output(fd)
        if events & WRITE:
            self._send()
        return self._take_frames() if events & READ else True

    def _send(self) -> None:
        try:
            sent = self._child.socket.send(self._outbox)
            del self._outbox[:sent]
        except BlockingIOError:
            return
        except OSError:
            self._outbox.clear()  # it has closed its end; its exit will tell

    def _take_output(self, fd: int) -> bool:
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return True
        stream, lines = self._lines[fd]
        self._tail.add(data)
        now = self._kernel.clock.monotonic()
        for line in lines.feed(data, self._rate.left(now)) if data else lines.rest():
            self._log(stream, line)
        self._rate.held_back += lines.take_skipped()
        return bool(data)

    def _log(self, stream: str, line: str) -> None:
        self._rate.spend()
        self._events.emit(JobOutput(self._request["id"], self._request["job"], stream, line))

    def _take_frames(self) -> bool:
        if self._garbage is not None:
            return False  # whatever follows is no better
        try:
            data = self._child.socket.recv(READ_SIZE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        try:
            for kind, payload in self._frames.feed(data):
                self._hear(parse(kind, payload))
        except wire.WireError as error:
            self._garbage = str(error)
            return False
        return bool(data)

    def _hear(self, said: Said) -> None:
        if isinstance(said, (Result, Failure)):
            self._said = self._said or said
        elif isinstance(said, Backoff):
            self._backoff = said
        elif self._last_words == 0 or (self._last_words is not None and not isinstance(said, Progress)):
            return  # a process that ended waits for no answer; and who still talks now is none of ours
        elif isinstance(said, Progress):
            self._last_words = self._last_words and self._last_words - 1
            self._context.fraction, self._context.note = said
            self._context.services.progress(self._context)
        elif self._enqueuing is not None or self._outbox:
            raise wire.WireError("a second dispatch before the first was answered")
        elif isinstance(said, Then):
            self._answer(self._follow_up(said.job))
        else:
            self._enqueuing = self._kernel.spawn(self._dispatch(said.jobs), name=f"dispatch by {self._request['id']}")

    def _dispatch(self, jobs: Sequence[NewJob]) -> Steps:
        """Enqueue for the child, and have the watcher send the answer and listen again."""
        reply: dict[str, Any] = {}
        try:
            yield from self._enqueue(jobs)
        except Exception as error:  # whatever it is, it is the child's dispatch that failed
            reply = {"error": str(error) or type(error).__name__}
        self._enqueuing = None
        self._answer(reply)
        if self._watcher is not None:
            self._kernel.wake(self._watcher, {})

    def _follow_up(self, job: NewJob) -> dict[str, Any]:
        """Keep `job` for the ack; the answer to the child."""
        try:
            if self._context.inline:
                raise KQueueError("an offloaded call has no follow-ups; its job has")
            if self._said is not None:
                raise KQueueError("the job has ended")
            self._context.add_follow_up(self._check(job))
        except Exception as error:  # whatever it is, it is the child's follow-up that is refused
            return {"error": str(error) or type(error).__name__}
        return {}

    def _answer(self, reply: Mapping[str, Any]) -> None:
        self._outbox += wire.frame(wire.REPLY, to_json(reply))

    def _drain(self) -> None:
        """Read what was written before the end, and not a byte more than is there: a grandchild may hold the other end."""
        self._last_words = LAST_WORDS
        for _ in range(DRAIN_SIZE // READ_SIZE):
            if isinstance(self._said, Result) or not self._take_frames() or not _readable(self._child.socket.fileno()):
                break
        for fd, (stream, lines) in self._lines.items():
            for _ in range(2 * 65536 // READ_SIZE):  # a pipe holds 64 KiB, unless a survivor keeps writing
                if not self._take_output(fd) or not _readable(fd):
                    break
            for line in lines.rest():
                self._log(stream, line)
        if self._rate.held_back:
            self._log("stderr", f"… {self._rate.held_back} more lines were not logged")

    # -- what came of it --------------------------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        """What it said and how it exited amount to this."""
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
        signaled = signal_name(os.WTERMSIG(exit.status)) if exit and os.WIFSIGNALED(exit.status) else None
        code = os.WEXITSTATUS(exit.status) if exit and os.WIFEXITED(exit.status) else None
        if isinstance(self._said, Result):
            follow_ups = () if self._context.inline else self._context.follow_ups
            return Outcome("ok", result=self._said.json, exit_code=code, signal=signaled, follow_ups=follow_ups)
        if isinstance(self._said, Failure):
            cause = self._why if self._why in ("timeout", "cancelled") else self._said.cause
            if cause in ("timeout", "cancelled") and cause != self._why:
                cause = "exception"  # the job raised it itself; to release it for that would run it for ever
            exit_code = self._said.exit_code if self._said.exit_code is not None else code
            return Outcome(
                cause, _ENDED_BY.get(cause, "job"), error=self._said.error, exit_code=exit_code, backoff_s=self._backoff.seconds,
                backoff_failed=self._backoff.why_not, asked=self._said.asked if cause == "exception" else "",
                retry_in_s=self._said.retry_in_s,
            )  # fmt: skip
        if self._garbage is not None:
            error = {"class": "WireError", "message": f"the job wrote garbage to KQueue's socket: {self._garbage}"}
            return Outcome("exception", "supervisor", error=error, exit_code=code, signal=signaled)
        if self._why in ("timeout", "cancelled"):
            return Outcome(self._why, _ENDED_BY[self._why], exit_code=code, signal=signaled)
        if exit is None:
            return Outcome("lost", "kernel")
        if signaled is None:
            return Outcome("exit", exit_code=code)
        ended_by = "kernel" if signaled in _FROM_KERNEL else "job" if signaled == "SIGABRT" else "operator"
        return Outcome("cpu" if signaled == "SIGXCPU" else "signal", ended_by, signal=signaled)


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
