"""One attempt in a child: feed it, listen to it, end it when it must end, and say what came of it.

    running --result or failure, exit--> ended           (a pool process does not exit: it says that it is done)
       |-- time-out, cancel, garbage --> terminating (SIGTERM) -- kill_grace --> asked where it stands (at most 0.5 s)
       |-- over a limit that we watch -------------------------------------------> asked (at most 0.1 s) ---> killed --> ended

What decides is the first complete result or failure, whatever the exit status; without one, the exit status does. End-of-file
decides nothing: a surviving grandchild can hold it back. What the child says is parsed by `child_frames.py` and trusted after.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from ..codec import MAX_BYTES, to_json
from ..context import JobContext
from ..dispatch import NewJob
from ..errors import JobCancelled, KQueueError
from ..events import Events, JobOutput
from ..kernel import READ, Kernel, Task, wait_io
from ..outcome import Outcome
from ..program import Capture
from . import stack, wire
from .child_frames import Backoff, Done, Failure, Progress, Result, Said, Then, parse
from .ending import Ending, Killer
from .handle import Child
from .output import Lines, Rate, Tail
from .tray import DOUBT_S

Steps = Generator[Any, Any, Any]
EnqueueFromChild = Callable[[Sequence[NewJob]], Steps]
CheckFromChild = Callable[[NewJob], NewJob]
READ_SIZE: Final = 16384  # at most so much of one pipe per turn, so that a flood cannot keep the loop
PROGRESS_AT_ONCE: Final = 8  # that is passed on, of what comes with one read
LAST_WORDS: Final = 100
DOUBT_ENDS_S: Final = DOUBT_S + 0.1  # after which `hold` knows whether its process has gone on to another run
DRAIN_SIZE: Final = 2 * 1024 * 1024  # after its end: a result of 1 MiB, and what a socket holds before it


class Attempt:
    """A child while it runs. `request` is what the template was asked.

    `enqueue` takes what the child dispatches, `check` says what of it may stand in a queue, and how.
    `kill`: it and all that it started. `token`: see wire.TAKE. `capture`: where its output goes; None: to the log. `hold`: have
    its process go on to no other run; False: it has, as it is about to say. Who asks again after DOUBT_ENDS_S and hears True has
    a process before him whose job has taken what was to follow it.
    """

    def __init__(
        self, kernel: Kernel, events: Events, child: Child, request: Mapping[str, Any], context: JobContext, *,
        enqueue: EnqueueFromChild, check: CheckFromChild, kill_grace_s: float, kill: Callable[[Child], None], token: bytes = b"",
        capture: Capture | None = None,
        hold: Callable[[], bool] = lambda: True,
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
        self._capture = capture
        self._hold = hold
        self._token = token  # what a pool process says when it is through with this run; b"": the process is for this run alone
        self._frames = child.frames
        command = request.get("command")  # None: it is no command, and speaks frames
        self._printed = bytearray() if command is not None and command["result"] == "json" else None  # what its result is made of
        self._outbox = bytearray()

    # How it stands at first.
    _done: Done | None = None  # that it did
    _is_drained = False  # of a pool process that is done: nothing more came out of it
    is_unread = False  # the process died before it read what it was to do
    _awaits_reading = False  # it has been sent that
    _heard = 0  # frames of this run
    _listens = READ  # which events of the socket `ears` wait for
    _is_deaf = False  # nothing more can come from the socket
    _said: Result | Failure | None = None  # the first of either, which decides
    _backoff = Backoff(None, "")  # what its backoff function said after a failure, if it has one
    _garbage: str | None = None  # what was wrong with its frames, or with what it read; None: nothing
    # We are ending it because of: "timeout", "cancelled", "garbage", "lingering", or one of WATCHED_LIMITS; "": we are not.
    _why = ""
    _why_later = ""  # as _why, when its process has gone on to no other run by `_doubt_ends`
    _doubt_ends: float | None = None  # None: there is no doubt
    _too_much = ""  # one of WATCHED_LIMITS: it is over that, and to be killed; "": it is not
    _numbers = ""  # what there is to say of that
    _asked = False  # it was asked where it stands; the next step is SIGKILL
    _has_printed = False
    _enqueuing: Task | None = None  # what it dispatched is on its way; until then it is not listened to
    _watcher: Task | None = None
    _last_words: int | None = None  # how much more progress is heard, once the child has ended; None: it has not

    # Most runs in a pool print nothing, and are not asked where they stand.

    @cached_property
    def _lines(self) -> dict[int, tuple[str, Lines]]:
        return {self._child.stdout: ("stdout", Lines()), self._child.stderr: ("stderr", Lines())}

    @cached_property
    def _tail(self) -> Tail:
        return Tail()

    @cached_property
    def _rate(self) -> Rate:
        return Rate()

    @cached_property
    def _stack(self) -> stack.Stack:
        return stack.Stack()

    def watch(self, first: bytes, exited: Callable[[Child], Steps], is_unwanted: bool = False) -> Steps:
        """Send it `first` (b"": it has begun) and stay with it to its end. `exited`: waits until the template has reported that.

        `is_unwanted`: it was cancelled while it began.
        """
        child, clock = self._child, self._kernel.clock
        self._watcher = self._kernel.current
        self._awaits_reading = bool(first)
        child.unmute()
        if first:
            self._outbox += first
            self._send()
        elif self._frames.is_whole:
            self._take_heard(b"")
        timeout_s = self._request["limits"]["timeout"]
        deadline = clock.monotonic() + timeout_s if timeout_s else None
        if is_unwanted and self._done is None:
            deadline = self._end("cancelled")
        while not child.lost and self._done is None:  # first what was heard, also of one whose first words came with others' last
            if self._asked and self._stack.came and deadline is not None:
                deadline = min(deadline, clock.monotonic() + stack.QUIET_S)
            if self._too_much and not self._asked:
                if self._is_last(self._too_much):  # else it is the next one's memory
                    self._why = self._why or self._too_much
                    deadline = self._ask_where()
            elif self._garbage is not None and not self._why:
                deadline = self._end("garbage")
            elif self._said is not None and not self._why:
                self._hold()  # it is killed if it has nothing more to say by then
                self._why, deadline = "lingering", clock.monotonic() + self._kill_grace_s
            elif self._why_later and not self._why:
                if self._left_s(None) == 0.0:
                    deadline = self._end(self._why_later)
            elif deadline is not None and clock.monotonic() >= deadline:
                if self._asked or self._said is not None:  # who has said what came of it need not say where it lingers
                    self._kill(child)
                    deadline = None
                elif self._why:
                    deadline = self._ask_where()
                else:
                    deadline = self._end("timeout")
            self._listen()
            try:
                yield wait_io(child.ears.fileno(), READ, self._left_s(deadline))
            except JobCancelled:
                if not self._asked and self._why != "timeout":  # which is counted, whatever comes after it
                    deadline = self._end("cancelled")
                continue
            if child.lost or self._serve(child.ears.poll(0)):
                break
        if self._done is not None:
            if not self._done.next:
                self._take_rest()
        else:
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
        """Ask it to end; when that must have happened. One that has gone on to another run has ended, and is about to say so."""
        if self._is_last(why):
            self._why = why
            if why == "garbage" and self._garbage is None:
                self._garbage = "the job has read what its process was to run next"
            self._child.unmute()
            self._child.kill(signal.SIGTERM)
        return self._kernel.clock.monotonic() + self._kill_grace_s

    def _is_last(self, why: str) -> bool:
        """Whether its process has gone on to no other run. `why`: as _why, if it should have said so and has not."""
        if self._hold():
            return True
        if self._doubt_ends is None:
            self._doubt_ends = self._kernel.clock.monotonic() + DOUBT_ENDS_S
        self._why_later = self._why_later or why
        return False

    def _left_s(self, deadline: float | None) -> float | None:
        """Seconds until `deadline`, or until the doubt ends; None: there is neither."""
        ends = [each for each in (deadline, None if self._why else self._doubt_ends) if each is not None]
        return max(0.0, min(ends) - self._kernel.clock.monotonic()) if ends else None

    def _ask_where(self) -> float:
        """Ask it where it stands, for the certificate; when it is to be killed, whatever it answered."""
        self._asked = True
        if not stack.can_answer(self._child.pid):
            return self._kernel.clock.monotonic()
        self._child.ears.register(self._child.stack, READ)  # until now nobody had to look: its pipe keeps 64 KiB
        self._child.kill(stack.SIGNAL)
        return self._kernel.clock.monotonic() + (stack.SHORT_S if self._too_much else stack.PATIENCE_S)

    def exceeds(self, limit: str, numbers: str) -> None:
        """It is over `limit`, "memory" or "processes": kill it now. For who watches it while it runs."""
        if not self._too_much and self._child.exit is None:
            self._too_much, self._numbers = limit, numbers
            if self._watcher is not None:
                self._kernel.wake(self._watcher, 0)

    # -- what it says -----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Hear its socket but while something is enqueued for it, and wait for room in it while there is something to send."""
        wanted = 0 if self._is_deaf else (READ if self._enqueuing is None else 0) | (select.EPOLLOUT if self._outbox else 0)
        if wanted == self._listens:
            return
        fd, ears = self._child.socket.fileno(), self._child.ears
        if not wanted:  # an fd that waits for nothing would still report a hang-up, without end
            ears.unregister(fd)
        elif not self._listens:
            ears.register(fd, wanted)
        else:
            ears.modify(fd, wanted)
        self._listens = wanted

    def _serve(self, ready: Sequence[tuple[int, int]]) -> bool:
        """Take what is there, a bounded amount of each; whether the process has died, so that the rest is `_drain`'s."""
        child = self._child
        died = any(fd == child.pidfd for fd, _ in ready)
        for fd, events in ready:
            if fd == child.pidfd or (died and not self._token and fd != child.socket.fileno()):
                continue
            elif fd in (child.stdout, child.stderr):
                if not self._is_last("garbage"):  # it is the output of the run that it has gone on to
                    child.mute()
                elif not self._take_output(fd):
                    child.ears.unregister(fd)
            elif fd == child.stack:
                if not self._stack.read(fd):
                    child.ears.unregister(fd)
            else:
                if events & select.EPOLLOUT:
                    self._send()
                if events & ~select.EPOLLOUT and not self._take_frames():
                    self._is_deaf = True
        return died

    def _send(self) -> None:
        try:
            sent = self._child.socket.send(self._outbox)
            del self._outbox[:sent]
        except BlockingIOError:
            return
        except OSError:
            self._outbox.clear()  # it has closed its end; its exit will tell
            self._note_unread()

    def _note_unread(self) -> None:
        """Something that we sent did not arrive. That was its job, if it has said nothing; else it was an answer."""
        self.is_unread = self.is_unread or (self._awaits_reading and not self._heard)

    def _take_output(self, fd: int) -> bool:
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return True
        self._has_printed = True
        stream, lines = self._lines[fd]
        if self._capture is not None:
            if not self._capture.add(stream, data):
                self.exceeds("output", "")
            return bool(data)
        self._tail.add(data)
        if self._printed is not None and stream == "stdout":
            self._printed += data[: MAX_BYTES + 1 - len(self._printed)]
            return bool(data)
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
        except ConnectionResetError:
            self._note_unread()  # it died with what it was sent unread in its socket
            return False
        except OSError:
            return False
        return self._take_heard(data) and bool(data)

    def _take_heard(self, data: bytes) -> bool:
        """The frames of this run that are whole with `data`, of a flood of progress the last; False for garbage."""
        progress, heard = None, 0
        try:
            for kind, payload in self._frames.feed(data):
                self._heard += 1
                if kind == wire.PROGRESS and (heard := heard + 1) > PROGRESS_AT_ONCE:
                    progress = payload
                    continue
                self._hear(parse(kind, payload))
                if self._done is not None:
                    break  # what follows is the next run's
            if progress is not None:
                self._hear(parse(wire.PROGRESS, progress))
        except wire.WireError as error:
            self._garbage = f"the job wrote garbage to KQueue's socket: {error}"
            return False
        return True

    def _hear(self, said: Said) -> None:
        if isinstance(said, (Result, Failure)):
            if not self._asked:  # else it is too late: the question may have woken it
                self._said = self._said or said
        elif isinstance(said, Backoff):
            self._backoff = said
        elif isinstance(said, Done):
            if not self._token or said.token != self._token or self._said is None:
                raise wire.WireError("the end of a run that is not this one")
            self._done = said
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
            self._kernel.wake(self._watcher, 0)

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

    def _take_rest(self) -> None:
        """Of a process that will run other jobs: what this one wrote is all there, since it flushed before it was done."""
        self._child.unmute()
        for _ in range(2 * 65536 // READ_SIZE):
            ready = self._child.ears.poll(0)
            self._is_drained = not ready  # whatever else there is, such as its death, has to be seen by somebody
            output = [event for event in ready if event[0] in (self._child.stdout, self._child.stderr)]
            if not output:
                break
            self._serve(output)
        self._end_lines()

    def _drain(self) -> None:
        """Read what was written before the end, and not a byte more than is there: a grandchild may hold the other end."""
        self._last_words = LAST_WORDS
        for _ in range(DRAIN_SIZE // READ_SIZE):
            if isinstance(self._said, Result) or not self._take_frames() or not _readable(self._child.socket.fileno()):
                break
        for fd in self._lines:
            for _ in range(2 * 65536 // READ_SIZE):  # a pipe holds 64 KiB, unless a survivor keeps writing
                if not self._take_output(fd) or not _readable(fd):
                    break
        self._end_lines()

    def _end_lines(self) -> None:
        if self._has_printed:
            for stream, lines in self._lines.values():
                for line in lines.rest():
                    self._log(stream, line)
            if self._rate.held_back:
                self._log("stderr", f"… {self._rate.held_back} more lines were not logged")
        for _ in range(8):
            if not self._stack.read(self._child.stack) or not _readable(self._child.stack):
                break

    @property
    def is_reusable(self) -> bool:
        """Whether its process may run another job: all went as it should, and left nothing behind.

        Not one that was interrupted, since an exception out of nowhere may have left a lock held or a library half-way.
        """
        done = self._done
        if done is None or done.changed or self._why not in ("", "lingering") or self._garbage is not None:
            return False
        if isinstance(self._said, Failure) and self._said.cause == "memory":
            return False
        heard_out = bool(done.next) or (self._is_drained and self._frames.is_empty)
        return heard_out and self._listens == READ and not self._outbox

    @property
    def done(self) -> Done | None:
        """What a pool process said when it was through with it; None: it did not, or is none."""
        return self._done

    @property
    def is_ending(self) -> bool:
        """Whether the supervisor has asked it to end."""
        return self._why not in ("", "lingering")

    # -- what came of it --------------------------------------------------------------------------------------------

    def outcome(self, killer: Killer, roots: Sequence[str], duration_s: float, seen_mib: float) -> Outcome:
        """What it said and how it exited amount to this.

        `killer` says who sent a SIGKILL that was not ours. `roots`: where the job's modules are found, so how files are named.
        `duration_s`: that we waited for it. `seen_mib`: what it was seen to have.
        """
        done, exit, printed = self._done, self._done or self._child.exit, self._tail.text() if self._has_printed else ""
        limits = {name: value for name, value in self._request["limits"].items() if value}
        if done is not None and isinstance(self._said, Result):
            return Outcome(
                "ok", result=self._said.json, pid=self._child.pid, duration_s=done.duration_s, cpu_user_s=done.cpu_user_s,
                cpu_system_s=done.cpu_system_s, max_memory_mib=max(seen_mib, done.max_memory_mib), limits=limits, output=printed,
                follow_ups=() if self._context.inline else self._context.follow_ups,
            )  # fmt: skip
        ending = Ending(
            self._request, self._said, self._why, self._numbers, self._garbage, self._child.exit, self._backoff,
            () if self._context.inline else self._context.follow_ups, self._printed, printed, self._kill_grace_s,
        )  # fmt: skip
        verdict = ending.verdict(killer)
        return verdict._replace(
            pid=self._child.pid or None,
            limits=limits,
            output=printed,
            stack=self._stack.text(roots) if not verdict.ok and self._stack.came else "",
            duration_s=duration_s if done is None else done.duration_s,
            cpu_user_s=0.0 if exit is None else exit.cpu_user_s,
            cpu_system_s=0.0 if exit is None else exit.cpu_system_s,
            max_memory_mib=seen_mib if exit is None else max(seen_mib, exit.max_memory_mib),
        )


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
