"""Inline: the job's generator runs on the loop, inside the supervisor. Light, and only as safe as the job is polite.

A time-out is thrown at the trap where the job waits. A job that does not yield is reported after `max_slice`, and interrupted
after `hard_slice` (guard.py). Blocking calls, children and brokers must never appear in this file.
"""

from __future__ import annotations

import types
from collections.abc import Generator
from functools import lru_cache, partial
from typing import Any, Final

from ..codec import MAX_BYTES, pack, to_json
from ..context import enter
from ..errors import ArgumentsDoNotFit, JobBlocked, JobCancelled, JobOutgrew, JobTimedOut
from ..kernel import Kernel, Task
from ..outcome import Outcome, describe_error
from ..retries import ask_backoff, asked_by, needs_backoff
from .base import Work
from .instead import asyncio_advice

GRACE_S: Final = 1.0  # for a job to clean up after it was cancelled or timed out


class InlineExecutionStrategy:
    """Runs jobs as tasks of `kernel`."""

    name = "inline"
    cancel_grace_s = GRACE_S

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def start(self) -> Generator[Any, Any, None]:
        """Nothing to get ready."""
        yield from ()

    def stop(self) -> Generator[Any, Any, None]:
        """Nothing to let go of."""
        yield from ()

    def execute(self, work: Work) -> Generator[Any, Any, Outcome]:
        """Run one attempt as part of the calling task."""
        began = self._kernel.clock.monotonic()
        timeout_s = work.options.timeout
        limits = _timeout(timeout_s) if timeout_s else {}
        enter(work.context)
        if timeout_s and self._kernel.current is not None:
            self._kernel.current.on_wait = partial(self._arm, work, began + timeout_s)  # most jobs are done by then
        try:
            try:
                args, kwargs = work.arguments()
                steps = work.registration.call(args, kwargs)
            except ArgumentsDoNotFit as error:
                return Outcome("refused", "supervisor", error=describe_error(error), limits=limits)
            if isinstance(steps, types.CoroutineType):
                value = yield from steps.__await__()
            elif isinstance(steps, types.GeneratorType):
                value = yield from steps
            else:
                value = steps  # a plain function that was declared isolated=False
            result = result_json(value) if work.options.keep_result else None
            duration_s = self._kernel.clock.monotonic() - began
            return Outcome("ok", result=result, duration_s=duration_s, limits=limits, follow_ups=work.context.follow_ups)
        except BaseException as error:
            outcome = self._with_backoff(work, error, self._failed(error))
            duration_s = self._kernel.clock.monotonic() - began
            return outcome._replace(duration_s=duration_s, limits={**limits, **outcome.limits})
        finally:
            work.context.close_all()

    def _arm(self, work: Work, when: float, task: Task) -> None:
        """The job waits for the first time: from now on it can be late."""
        error = JobTimedOut(f"{work.registration.name} ran longer than its timeout of {work.options.timeout:g} s")
        work.context.timer = self._kernel.throw_at(task, when, error, GRACE_S)

    def _failed(self, error: BaseException) -> Outcome:
        described = describe_error(error)
        if isinstance(error, JobBlocked):
            return Outcome("timeout", "supervisor", error=described, limits={"hard_slice": error.hard_slice_s})
        if isinstance(error, JobOutgrew):
            limits = {"max_memory": error.max_memory_mib}
            return Outcome("memory", "supervisor", error=described, max_memory_mib=error.grown_mib, limits=limits)
        if isinstance(error, JobTimedOut):
            return Outcome("timeout", "supervisor", error=described)
        if isinstance(error, JobCancelled) and self._was_cancelled():
            return Outcome("cancelled", "shutdown", error=described)  # else it made that itself, and would be released for ever
        if isinstance(error, MemoryError):
            return Outcome("memory", "kernel", error=described)
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            return Outcome("exit", exit_code=code, error=described)
        asked, retry_in_s = asked_by(error)
        return Outcome("exception", error=_explained(error, described), asked=asked, retry_in_s=retry_in_s)

    def _with_backoff(self, work: Work, error: BaseException, outcome: Outcome) -> Outcome:
        """With what the job's backoff function says, which is asked here, where the job ran."""
        function = work.options.backoff
        if not callable(function) or outcome.cause == "cancelled" or not needs_backoff(error):
            return outcome
        seconds, why_not = ask_backoff(function, work.attempt, error)
        return outcome._replace(backoff_s=seconds, backoff_failed=why_not)

    def _was_cancelled(self) -> bool:
        task = self._kernel.current
        return task is not None and task.grace_s is not None


@lru_cache(maxsize=64)
def _timeout(seconds: float) -> dict[str, float]:
    """As the limits of an Outcome: one for all jobs that have it, since a dict is 184 bytes."""
    return {"timeout": seconds}


def result_json(value: Any, max_bytes: int = MAX_BYTES) -> bytes:
    """A handler's result as JSON. TypeError when it cannot be carried or is larger than `max_bytes`."""
    data = to_json(pack(value, "the result"))
    if len(data) > max_bytes:
        raise TypeError(f"the result is {len(data)} bytes, allowed are {max_bytes}: store it and return a key")
    return data


def _explained(error: BaseException, described: dict[str, Any]) -> dict[str, Any]:
    """asyncio's own words do not help whoever wrote an inline job: there is no asyncio loop, on purpose."""
    advice = asyncio_advice(error, described["message"])
    if advice:
        described["message"] += f" ({advice})"
    return described
