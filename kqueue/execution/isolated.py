"""Isolated: a job in a child of the template, limited by the kernel, watched by pidfd, ended by SIGTERM and then SIGKILL.

Here stands what is asked of the child; `attempt.py` is with it while it runs. The supervisor decodes no argument of an isolated
job, and of its result only that it is JSON.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from .. import environment
from ..codec import from_json, pack, to_json, unpack
from ..commands import Command
from ..context import JobContext
from ..errors import JobCancelled
from ..events import Events, TemplateDied, Warned
from ..kernel import Kernel
from ..loading import ImportFailed
from ..options import JobOptions
from ..outcome import Outcome
from ..program import NOT_STARTED, Capture, Program, ProgramEnd
from ..registry import Registration
from . import wire
from .attempt import Attempt, CheckFromChild, EnqueueFromChild
from .base import NotStarted, Work
from .call_errors import error_of
from .handle import Child, memory_file
from .oom import NOTHING_SEEN
from .pool import Pool
from .privileges import DEFAULT, Privileges
from .sampler import Sampler
from .templates import Templates
from .workers import DEFAULTS, PoolSettings, Worker

Steps = Generator[Any, Any, Any]
POOL_TRIES: Final = 3  # processes that are tried when one after another is dead before it reads what it is to do
SETTLE_S: Final = 3.0  # beyond kill_grace, for a killed child to be reaped and reported


class _General(NamedTuple):
    """Of the requests for one job, what does not differ from run to run."""

    options: JobOptions
    request: Mapping[str, Any]
    json: bytes


class IsolatedExecutionStrategy:
    """Runs jobs in children of a template.

    `identity`: of the daemon, by which the processes of its earlier runs are known; "": there were none. `kill_grace_s`: between
    SIGTERM and SIGKILL. `memory_headroom_mib`: what RLIMIT_DATA allows beyond `max_memory`, since it counts thread stacks at
    their full reserve. `cgroups`: whether a job gets one, where they may be made. `enqueue`: how the supervisor enqueues what a
    child dispatches; `check`: what it makes of a job that a child wants enqueued later, or why it refuses it.
    """

    name = "isolated"

    def __init__(
        self, kernel: Kernel, events: Events, *, enqueue: EnqueueFromChild, check: CheckFromChild,
        identity: str = "", kill_grace_s: float = 2.0, memory_headroom_mib: int = 128, cgroups: bool = True,
        default_start: str = "fork", pool: PoolSettings = DEFAULTS, commands: Sequence[Command] = (),
        privileges: Privileges = DEFAULT,
    ) -> None:  # fmt: skip
        self.cancel_grace_s = kill_grace_s + SETTLE_S
        self.link = Templates(kernel, events, identity, cgroups, privileges)
        self._privileges = privileges
        self.pool = Pool(kernel, events, self.link, pool)
        self.link.on_replaced = self.pool.renew
        events.subscribe(TemplateDied, lambda fact: self.pool.forget_lost())
        self._default_start = default_start
        self._general: dict[str, _General] = {}  # by job
        self._commands = {command.name: command for command in commands}
        self.sampler = Sampler(kernel)
        self._tokens = _tokens()
        self._hinted: set[str] = set()  # what was said of variables that jobs miss
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
        self.pool.retire_idle()
        yield from self.link.stop()

    def execute(self, work: Work) -> Steps:
        """Run one attempt in a child; returns the Outcome. Raises NotStarted when there can be no child now."""
        general = self._general_of(work.registration, work.options)
        request = {**general.request, "id": work.envelope.id, "attempt": work.attempt}
        start = self._start_of(work)
        if start == "pool":
            outcome: Outcome = yield from self._pooled(request, general.json, work.data, work.context)
            return outcome
        if start == "exec":
            request["start"] = start
        if work.registration.parameters is not None and (command := self._commands.get(work.envelope.job)) is not None:
            request["command"] = command._asdict()
        request["asked_at"] = time.monotonic()
        outcome = yield from self._attempt(request, wire.frame(wire.RUN, work.data), work.context)
        return outcome

    def _general_of(self, registration: Registration, options: JobOptions) -> _General:
        """What holds for every run of a job with `options`. Most have the same ones as the run before."""
        name = registration.name
        known = self._general.get(name)
        if known is None or known.options is not options:
            limits = self._limits(options)
            request: dict[str, Any] = {"job": name, "keep_result": bool(options.keep_result), "limits": limits}
            by_operator = registration.parameters is not None
            request |= self._privileges.of_job(registration.options, options.max_memory, by_operator=by_operator)
            known = self._general[name] = _General(options, request, to_json(request))
        return known

    def may_start(self, work: Work, running: int, slots: int) -> bool:
        """Whether it keeps to `slots` jobs at once to start `work` as well, which is one of `running`.

        Those that wait in the pool do not count: they begin only when another of its jobs has ended. See `Pool.ahead`.
        """
        held, size = self.pool.held, self.pool.size
        return running <= slots or self._start_of(work) == "pool" or running - held + min(held, size) <= slots

    def _start_of(self, work: Work) -> str:
        start = work.options.start or self._default_start
        return "fork" if start == "pool" and work.alone else start

    def offload(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, context: JobContext,
        timeout_s: float, max_memory_mib: int,
    ) -> Steps:  # fmt: skip
        """Run `function` in a process of the pool; returns its result or raises its error.

        TypeError when it cannot be sent there.
        """
        call = to_json({**_reference(function), "args": pack(list(args), "args"), "kwargs": pack(dict(kwargs), "kwargs")})
        if len(call) > wire.MAX_CALL:
            raise TypeError(f"the arguments of an offloaded call are {len(call)} bytes, allowed are {wire.MAX_CALL}: pass a path")
        options = JobOptions(timeout=timeout_s, max_memory=max_memory_mib)
        lasting = self._privileges.of_job(options, max_memory_mib, by_operator=True)
        limits = self._limits(options)
        general = {"job": f"{context.name}:offload", "keep_result": True, "call": True, "limits": limits, **lasting}
        request = {**general, "id": context.id, "attempt": 1}
        outcome: Outcome = yield from self._pooled(request, to_json(general), call, context, in_line=False)
        if outcome.ok:
            return unpack(from_json(outcome.result or b"null"))
        if outcome.cause == "cancelled":
            raise JobCancelled(f"{context.name} was stopped")
        raise error_of(outcome)

    def run_program(self, program: Program, *, context: JobContext, timeout_s: float, max_memory_mib: int) -> Steps:
        """Run it in a child that becomes it; returns its ProgramEnd. `timeout_s` 0: no limit."""
        options = JobOptions(timeout=timeout_s, max_memory=max_memory_mib)
        request = {
            "id": context.id, "job": f"{context.name}:{program.name:.40}", "attempt": 1, "limits": self._limits(options),
            "keep_result": False, "start": "exec", "has_input": bool(program.input),
            **self._privileges.of_job(options, max_memory_mib, by_operator=True),
        }  # fmt: skip
        began = self._kernel.clock.monotonic()
        stdin = (yield from memory_file(program.input)) if program.input else -1
        try:
            child: Child = yield from self.link.fork(request)
            child.give(stdin)
        except (NotStarted, ImportFailed) as error:
            return ProgramEnd(NOT_STARTED, b"", b"", "lost", str(error))
        finally:
            if stdin >= 0:
                os.close(stdin)
        capture = Capture(program.max_output)
        attempt = self._attempt_in(child, request, context, capture=capture)
        try:
            first = wire.frame(wire.EXECUTE, _execute(program))
            outcome: Outcome = yield from self._watched(attempt, request, first, child, context, began)
        finally:
            self.link.forget(child)
        if outcome.cause == "cancelled":
            raise JobCancelled(f"{context.name} was stopped")
        code = NOT_STARTED if child.exit is None else os.waitstatus_to_exitcode(child.exit.status)
        return capture.end(code, *_why_ended(outcome))

    def _limits(self, options: JobOptions) -> dict[str, float]:
        """What limits.apply puts on the child, and what it is held to from here."""
        return {
            "timeout": options.timeout, "max_memory": options.max_memory, "memory_headroom": self._memory_headroom_mib,
            "max_cpu": options.max_cpu, "max_files": options.max_files, "max_processes": options.max_processes,
            "max_file_size": options.max_file_size,
        }  # fmt: skip

    # -- one attempt ------------------------------------------------------------------------------------------------

    def _attempt(self, request: Mapping[str, Any], first: bytes, context: JobContext) -> Steps:
        """In a process of its own."""
        began = self._kernel.clock.monotonic()
        try:
            child: Child = yield from self.link.fork(request, first)
        except JobCancelled:
            return Outcome("cancelled", "shutdown")
        attempt = self._attempt_in(child, request, context)
        try:
            outcome: Outcome = yield from self._watched(attempt, request, child.unsent, child, context, began)
        finally:
            self.link.forget(child)
        return outcome

    def _pooled(
        self, request: Mapping[str, Any], general: bytes, data: bytes, context: JobContext, in_line: bool = True
    ) -> Steps:
        """In a process of the pool; in another one when that was dead already."""
        token = next(self._tokens)
        message = wire.Take(token, request["attempt"], request["id"], general, data).frame()
        for _ in range(POOL_TRIES):
            try:
                worker: Worker = yield from self.pool.take(request, message, token, in_line)
            except JobCancelled:
                return Outcome("cancelled", "shutdown")
            began = self._kernel.clock.monotonic()
            attempt = self._attempt_in(worker.child, request, context, token, partial(self.pool.hold, worker))
            try:
                outcome: Outcome = yield from self._watched(attempt, request, message, worker.child, context, began, worker)
            finally:
                self.pool.give_back(worker, attempt, request["job"])
            if not attempt.is_unread or attempt.is_ending:
                return outcome
        raise NotStarted(f"{POOL_TRIES} processes of the pool died before they began")

    def _attempt_in(
        self, child: Child, request: Mapping[str, Any], context: JobContext, token: bytes = b"",
        hold: Callable[[], bool] = lambda: True, capture: Capture | None = None,
    ) -> Attempt:  # fmt: skip
        return Attempt(
            self._kernel, self._events, child, request, context, enqueue=self._enqueue, check=self._check,
            kill_grace_s=self._kill_grace_s, kill=self.link.kill, token=token, hold=hold, capture=capture,
        )  # fmt: skip

    def _watched(
        self, attempt: Attempt, request: Mapping[str, Any], first: bytes, child: Child, context: JobContext, began: float,
        worker: Worker | None = None,
    ) -> Steps:  # fmt: skip
        """The Outcome of `attempt`. `first`: what to tell its process. `began`: by the clock. `worker`: that is of the pool."""
        if not context.inline:  # else it is a call that an inline job offloaded
            context.pid = child.pid
        limits = request["limits"]
        turn, kept_mib = (worker.turn, worker.retained_mib) if worker is not None else (None, 0.0)
        sampled = self.sampler.watch(
            attempt, request["id"], child.pid, limits["max_memory"], limits["max_processes"], kept_mib
        )
        try:
            if turn is not None and turn.has_begun:
                yield from attempt.watch(b"", self.link.exited, turn.is_unwanted)
            else:
                yield from attempt.watch(first, self.link.exited)
        finally:
            context.pid = None
            self.sampler.forget(sampled)
        seen = NOTHING_SEEN if child.exit is None else child.exit.seen
        killer = partial(self.sampler.oom.killer, sampled.oom_mark, seen)
        duration_s = self._kernel.clock.monotonic() - began
        outcome: Outcome = attempt.outcome(killer, child.link.roots, duration_s, sampled.peak_mib)
        if outcome.error is not None:
            self._hint_at_environment(request["job"], outcome.error)
        return outcome

    def _hint_at_environment(self, job: str, error: Mapping[str, Any]) -> None:
        """Say so, once, when a job missed a variable that the daemon has."""
        if error.get("class") not in ("KeyError", "ImportFailed"):
            return
        hint = environment.hint(str(error.get("message")), os.environ, self._privileges.environment)
        if hint and hint not in self._hinted:
            self._hinted.add(hint)
            self._events.emit(Warned(f"{job} failed with {error['class']}: {hint}"))


def _tokens() -> Iterator[bytes]:
    """Those of runs: each 16 digits that nobody can guess. One system call for many of them."""
    while True:
        digits = os.urandom(4096).hex().encode()
        yield from (digits[at : at + 16] for at in range(0, len(digits), 16))


def _reference(function: Callable[..., Any]) -> dict[str, str]:
    """How a child finds `function`. TypeError when it cannot."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not qualname or "<" in qualname or module == "__main__":
        raise TypeError(
            f"offload() needs a function that a child can import, not {function!r:.80}: move it to the top level of a module"
        )
    return {"module": module, "qualname": qualname}


def _execute(program: Program) -> bytes:
    """What an EXECUTE says. JSON knows no bytes, but the first 256 characters."""
    environment = program.environment
    told = {
        "argv": [part.decode("latin-1") for part in program.argv],
        "env": None if environment is None else {k.decode("latin-1"): v.decode("latin-1") for k, v in environment.items()},
        "cwd": program.directory.decode("latin-1"),
    }
    return to_json(told)


def _why_ended(outcome: Outcome) -> tuple[str, str]:
    """`why` and `message` of a ProgramEnd."""
    if outcome.cause in ("timeout", "lost"):
        return outcome.cause, "the process that starts programs died" if outcome.cause == "lost" else ""
    if outcome.cause == "refused" or (outcome.cause == "exit" and outcome.error is not None):
        return "refused", str((outcome.error or {}).get("message"))
    if outcome.cause in ("memory", "cpu") or outcome.error is not None:
        return "limit", outcome.summary()
    return "", ""
