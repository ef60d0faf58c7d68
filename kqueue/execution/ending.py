"""How an attempt in a child ended: what the child said, how it exited and why we ended it, and what that amounts to.

The first complete result or failure decides, whatever the exit status; without one, the exit status does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from ..dispatch import NewJob
from ..outcome import Outcome, command_outcome
from ..process import signal_name
from . import wire
from .child_frames import Backoff, Failure, Result
from .handle import ChildExit

Killer = Callable[[], tuple[str, str]]  # who sent a SIGKILL that we did not: one of outcome.ENDED_BY, and how we know

WATCHED_LIMITS: Final = {  # what its error says over one of them, and the cause
    "memory": ("MemoryError", "memory"), "processes": ("TooManyProcesses", "signal"), "output": ("TooMuchOutput", "signal"),
}  # fmt: skip

# Who sends these when the supervisor did not: the kernel, for what the process did.
_FROM_KERNEL: Final = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS", "SIGXCPU", "SIGXFSZ", "SIGTRAP")
_ENDED_BY: Final = {"timeout": "supervisor", "cancelled": "shutdown", "memory": "kernel", "refused": "supervisor"}


class Ending(NamedTuple):
    """What is known when it is over."""

    request: Mapping[str, Any]  # what the template was asked
    said: Result | Failure | None  # the first of either
    why: str  # we ended it: "timeout", "cancelled", "garbage", "lingering", or one of WATCHED_LIMITS; "": we did not
    numbers: str  # what there is to say of the limit
    garbage: str | None  # what was wrong with its frames, or with what it read; None: nothing
    exit: ChildExit | None  # None: its template died first, or it is a process that will run others
    backoff: Backoff
    follow_ups: tuple[NewJob, ...]
    printed: bytearray | None  # by a command whose result that is; None: it is no such
    output: str  # the last of what it printed
    kill_grace_s: float

    def verdict(self, killer: Killer) -> Outcome:
        """The outcome, as far as this tells it. `killer` says who sent a SIGKILL that was not ours."""
        outcome = self._verdict(killer)
        refused = self.exit.seen.refused_tasks if self.exit is not None else 0
        if outcome.error is None or not refused:
            return outcome
        assert self.exit is not None
        allowed = f"its cgroup allows {self.exit.seen.tasks_max} processes and threads, for its max_processes"
        text = f"{outcome.error['message']} ({allowed}; the kernel refused it {refused} more)"
        return outcome._replace(error={**outcome.error, "message": text})

    def _verdict(self, killer: Killer) -> Outcome:
        exit = self.exit
        signaled = signal_name(os.WTERMSIG(exit.status)) if exit and os.WIFSIGNALED(exit.status) else None
        code = os.WEXITSTATUS(exit.status) if exit and os.WIFEXITED(exit.status) else None
        if isinstance(self.said, Result):
            return Outcome("ok", result=self.said.json, exit_code=code, signal=signaled, follow_ups=self.follow_ups)
        if isinstance(self.said, Failure):
            return self._failed(self.said, code)
        if self.why in WATCHED_LIMITS:
            kind, cause = WATCHED_LIMITS[self.why]
            error = {"class": kind, "message": self.numbers}
            return Outcome(cause, "supervisor", error=error, exit_code=code, signal=signaled)
        if self.garbage is not None:
            return Outcome("exception", "supervisor", error=_error("WireError", self.garbage), exit_code=code, signal=signaled)
        if self.why in ("timeout", "cancelled"):
            late = _error(signaled or "JobTimedOut", self._how_late(signaled)) if self.why == "timeout" else None
            return Outcome(self.why, _ENDED_BY[self.why], error=late, exit_code=code, signal=signaled)
        if exit is None:
            return Outcome("lost", "kernel", error=_error("TemplateDied", "the template that it was forked from has died"))
        if code is not None and "command" in self.request:
            return command_outcome(self.request["job"], code, self.printed, self.output)
        if signaled is None:
            closed = code == wire.NO_WAY_TO_SAY and wire.SOCKET_CLOSED in self.output
            return Outcome("exit", exit_code=code, error=_error("WireError", wire.SOCKET_CLOSED) if closed else None)
        return self._signaled(signaled, exit, killer)

    def _how_late(self, signaled: str | None) -> str:
        deaf = f", and {self.kill_grace_s:g} s after SIGTERM" if signaled == "SIGKILL" else ""
        return f"it ran longer than its timeout of {self.request['limits']['timeout']:g} s{deaf}"

    def _failed(self, said: Failure, code: int | None) -> Outcome:
        """It said so itself."""
        cause = self.why if self.why in ("timeout", "cancelled") else said.cause
        if cause in ("timeout", "cancelled") and cause != self.why:
            cause = "exception"  # the job raised it itself; to release it for that would run it for ever
        return Outcome(
            cause, _ENDED_BY.get(cause, "job"), error=said.error, backoff_s=self.backoff.seconds,
            exit_code=said.exit_code if said.exit_code is not None else code, backoff_failed=self.backoff.why_not,
            asked=said.asked if cause == "exception" else "", retry_in_s=said.retry_in_s, error_args=said.args,
        )  # fmt: skip

    def _signaled(self, name: str, exit: ChildExit, killer: Killer) -> Outcome:
        """A signal ended it that we did not send, or not as its time-out or for a limit."""
        limits = self.request["limits"]
        cpu_s, max_cpu_s, size_mib = exit.cpu_user_s + exit.cpu_system_s, limits["max_cpu"], limits["max_file_size"]
        # Who ignores SIGXCPU gets a SIGKILL a second later; the kernel counts by ticks then, and not quite as we are told.
        if name == "SIGXCPU" or (name == "SIGKILL" and max_cpu_s and cpu_s > 0.95 * max(1, int(max_cpu_s)) + 0.5):
            text = f"its max_cpu is {max_cpu_s:g} s" if max_cpu_s else "its host's RLIMIT_CPU is less"
            return Outcome("cpu", "kernel", signal=name, error=_error(name, f"it used {cpu_s:.3g} s of CPU, and {text}"))
        if name == "SIGXFSZ":
            text = f"its max_file_size, {size_mib:g} MiB" if size_mib else "its host's RLIMIT_FSIZE"
            return Outcome("signal", "kernel", signal=name, error=_error(name, f"it made a file larger than {text}"))
        if name == "SIGKILL":
            by, text = killer()
            return Outcome("memory" if by == "kernel" else "signal", by, signal=name, error=_error(name, text))
        ended_by = "kernel" if name in _FROM_KERNEL else "job" if name == "SIGABRT" else "operator"
        return Outcome("signal", ended_by, signal=name)


def _error(name: str, message: str) -> dict[str, str]:
    return {"class": name, "message": message}
