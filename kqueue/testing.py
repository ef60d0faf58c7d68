"""For the tests of applications: a queue that only remembers, and a runner that drives a job to its end while no time passes.

    from kqueue.testing import FakeQueue, run

    def test_signup_sends_a_mail():
        with FakeQueue() as queue:
            signup("ada@example.org")
        assert queue.jobs == [SendEmail.job("ada@example.org")]

    def test_the_mail_job():
        assert run(SendEmail.job("ada@example.org")) == "sent"     # an hour of sleep() takes no time

Everything runs in this process, isolated jobs too, so no limit is in force.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from .context import JobContext, enter
from .dispatch import NewJob, prepare
from .errors import JobTimedOut
from .job import BoundJob, JobHandle, get_dispatcher, set_dispatcher
from .kernel import Kernel, VirtualClock
from .registry import registry
from .states import JobState


class FakeQueue:
    """While it is entered, dispatches of this process end up in `jobs`, in order."""

    def __init__(self) -> None:
        self.jobs: list[BoundJob] = []
        self._before: Any = None

    def __enter__(self) -> FakeQueue:
        self._before = get_dispatcher()
        set_dispatcher(self._dispatch)
        return self

    def __exit__(self, *error: object) -> None:
        set_dispatcher(self._before)

    def run(self) -> list[Any]:
        """Run what was dispatched, and what that dispatches, until nothing is left; the results, in order. Raises its errors."""
        results = []
        while self.jobs:
            results.append(run(self.jobs.pop(0), queue=self))
        return results

    def _dispatch(self, jobs: Sequence[BoundJob]) -> list[JobHandle]:
        return [_Remembered(self._take(bound).id, self, bound) for bound in jobs]

    def _take(self, bound: BoundJob) -> NewJob:
        prepared = prepare(bound, bound.registration or registry.get(bound.name))  # refuses what a real queue would refuse
        self.jobs.append(bound)
        return prepared


class _Remembered:
    """The handle of a job in a FakeQueue."""

    def __init__(self, id: str, queue: FakeQueue, bound: BoundJob) -> None:
        self.id = id
        self._queue = queue
        self._bound = bound

    def state(self) -> JobState:
        return JobState.READY if any(each is self._bound for each in self._queue.jobs) else JobState.DONE

    def wait(self, timeout: float | None = None) -> bool:
        return self.state() is JobState.DONE

    def result(self, timeout: float | None = None) -> Any:
        raise RuntimeError("a FakeQueue keeps no results: use kqueue.testing.run(job)")

    def cancel(self) -> bool:
        before = len(self._queue.jobs)
        self._queue.jobs = [each for each in self._queue.jobs if each is not self._bound]
        return len(self._queue.jobs) < before


class _Services:
    """The surroundings of a job under test."""

    def __init__(self, queue: FakeQueue) -> None:
        self._queue = queue
        self.bound: dict[str, BoundJob] = {}  # follow-ups, by id

    def enqueue(self, jobs: Sequence[BoundJob]) -> Generator[Any, Any, list[str]]:
        yield from ()
        return [self._queue._take(bound).id for bound in jobs]

    def offload(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Generator[Any, Any, Any]:
        yield from ()
        return function(*args, **kwargs)

    def progress(self, context: JobContext) -> None:
        """Kept in the context; nobody looks."""

    def follow_up(self, job: BoundJob) -> NewJob:
        prepared = prepare(job, job.registration or registry.get(job.name))
        self.bound[prepared.id] = job
        return prepared


def run(job: BoundJob, *, queue: FakeQueue | None = None, attempt: int = 1) -> Any:
    """Run `job` to its end on a virtual clock; its result, or its error.

    A sleep takes no time, a time-out fires when it would. Arguments go through JSON and back, as they would in a queue. What the
    job dispatches lands in `queue`, and if it ends well its follow-ups do, too.
    """
    queue = queue or FakeQueue()
    registration = job.registration or registry.get(job.name)
    if registration is None or registration.target is None:
        raise LookupError(f"job {job.name!r} is not registered here: import its module")
    from .codec import decode, unpack

    envelope = decode(prepare(job, registration).envelope)
    timeout_s = envelope.options.get("timeout", registration.options.timeout)
    kernel = Kernel(clock=VirtualClock())
    services = _Services(queue)
    context = JobContext(
        id=envelope.id, name=job.name, queue=envelope.queue, attempt=attempt, deadline=timeout_s or None,
        inline=registration.lane == "inline", services=services,
    )  # fmt: skip

    def steps() -> Generator[Any, Any, Any]:
        enter(context)
        task = kernel.current
        if timeout_s and task is not None:
            error = JobTimedOut(f"{job.name} ran longer than its timeout of {timeout_s:g} s")
            kernel.throw_at(task, timeout_s, error, grace_s=1.0)
        kwargs = {key: unpack(value) for key, value in envelope.kwargs.items()}
        result = registration.call(unpack(envelope.args), kwargs)
        if isinstance(result, types.CoroutineType):
            return (yield from result.__await__())
        return (yield from result) if isinstance(result, types.GeneratorType) else result

    try:
        result = kernel.run(steps())
    finally:
        kernel.close()
    queue.jobs += [services.bound[each.id] for each in context.follow_ups]
    return result
