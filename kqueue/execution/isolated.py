"""Isolated: a job in a child of the template, limited by the kernel, watched by pidfd, ended by SIGTERM and then SIGKILL.

Here stands what is asked of the child; `attempt.py` is with it while it runs. The supervisor decodes no argument of an isolated
job, and of its result only that it is JSON.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final

from ..codec import from_json, pack, to_json, unpack
from ..context import JobContext
from ..errors import JobCancelled, OffloadError
from ..events import Events
from ..kernel import Kernel
from ..options import JobOptions
from ..outcome import Outcome
from . import wire
from .attempt import Attempt, CheckFromChild, EnqueueFromChild
from .base import Work
from .link import Child, TemplateLink
from .sampler import Sampler

Steps = Generator[Any, Any, Any]
SETTLE_S: Final = 3.0  # beyond kill_grace, for a killed child to be reaped and reported


class IsolatedExecutionStrategy:
    """Runs jobs in children of one template.

    `identity`: of the daemon, by which the processes of its earlier runs are known; "": there were none. `kill_grace_s`: between
    SIGTERM and SIGKILL. `memory_headroom_mib`: what RLIMIT_DATA allows beyond `max_memory`, since it counts thread stacks at
    their full reserve. `cgroups`: whether a job gets one, where they may be made. `enqueue`: how the supervisor enqueues what a
    child dispatches; `check`: what it makes of a job that a child wants enqueued later, or why it refuses it.
    """

    name = "isolated"

    def __init__(
        self, kernel: Kernel, events: Events, *, enqueue: EnqueueFromChild, check: CheckFromChild,
        identity: str = "", kill_grace_s: float = 2.0, memory_headroom_mib: int = 128, cgroups: bool = True,
    ) -> None:  # fmt: skip
        self.cancel_grace_s = kill_grace_s + SETTLE_S
        self.link = TemplateLink(kernel, events, identity, cgroups)
        self.sampler = Sampler(kernel)
        self._kernel = kernel
        self._events = events
        self._enqueue = enqueue
        self._check = check
        self._kill_grace_s = kill_grace_s
        self._memory_headroom_mib = memory_headroom_mib

    def start(self) -> Steps:
        """Start the template and wait for its manifest. Raises loading.ImportFailed."""
        yield from self.link.start()

    def stop(self) -> Steps:
        self.sampler.stop()
        yield from self.link.stop()

    def execute(self, work: Work) -> Steps:
        """Run one attempt in a child of its own; returns the Outcome. Raises NotStarted when there can be no child now."""
        options = work.options
        limits = self._limits(options)
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
        limits = self._limits(JobOptions(timeout=timeout_s, max_memory=max_memory_mib))
        request = {"id": context.id, "job": f"{context.name}:offload", "attempt": 1, "limits": limits, "keep_result": True}
        outcome: Outcome = yield from self._attempt(request, wire.frame(wire.CALL, call), context)
        if outcome.ok:
            return unpack(from_json(outcome.result or b"null"))
        if outcome.cause == "cancelled":
            raise JobCancelled(f"{context.name} was stopped")
        raise _offload_error(outcome)

    def _limits(self, options: JobOptions) -> dict[str, float]:
        """What limits.apply puts on the child, and what it is held to from here."""
        return {
            "timeout": options.timeout, "max_memory": options.max_memory, "memory_headroom": self._memory_headroom_mib,
            "max_cpu": options.max_cpu, "max_files": options.max_files, "max_processes": options.max_processes,
            "max_file_size": options.max_file_size,
        }  # fmt: skip

    # -- one attempt ------------------------------------------------------------------------------------------------

    def _attempt(self, request: Mapping[str, Any], first: bytes, context: JobContext) -> Steps:
        began = self._kernel.clock.monotonic()
        try:
            child: Child = yield from self.link.fork(request)
        except JobCancelled:
            return Outcome("cancelled", "shutdown")
        attempt = Attempt(
            self._kernel, self._events, child, request, context, enqueue=self._enqueue, check=self._check,
            kill_grace_s=self._kill_grace_s, kill=self.link.kill,
        )  # fmt: skip
        if not context.inline:  # else it is a call that an inline job offloaded
            context.pid = child.pid
        limits = request["limits"]
        sampled = self.sampler.watch(attempt, request["id"], child.pid, limits["max_memory"], limits["max_processes"])
        try:
            yield from attempt.watch(first, self.link.exited)
        finally:
            context.pid = None
            self.sampler.forget(sampled)
            self.link.forget(child)
        outcome = attempt.outcome(lambda: self.sampler.oom.killer(sampled.oom_mark), self.link.roots)
        peak_mib = max(outcome.max_memory_mib, sampled.peak_mib)
        return outcome._replace(duration_s=self._kernel.clock.monotonic() - began, max_memory_mib=peak_mib)


def _reference(function: Callable[..., Any]) -> dict[str, str]:
    """How a child finds `function`. TypeError when it cannot."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not qualname or "<" in qualname or module == "__main__":
        raise TypeError(
            f"offload() needs a function that a child can import, not {function!r:.80}: move it to the top level of a module"
        )
    return {"module": module, "qualname": qualname}


def _offload_error(outcome: Outcome) -> BaseException:
    """The error of an offloaded call: of its own class where that is built in and takes a message, else OffloadError."""
    error = outcome.error or {}
    name, message = str(error.get("class", "")), str(error.get("message", ""))
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and its kind take more than that
            return OffloadError(outcome.summary())
    if outcome.cause == "timeout":
        return TimeoutError(message or "the offloaded call ran longer than its job may")
    return OffloadError(outcome.summary())
