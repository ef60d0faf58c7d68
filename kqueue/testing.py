"""For the tests of applications: a queue that only remembers, and a runner that drives a job to its end while no time passes.

    from kqueue.testing import FakeQueue, run

    def test_signup_sends_a_mail():
        with FakeQueue() as queue:
            signup("ada@example.org")
        assert queue.jobs == [SendEmail.job("ada@example.org")]

    def test_the_mail_job():
        assert run(SendEmail.job("ada@example.org")) == "sent"     # an hour of sleep() takes no time

    def test_it_gives_up_on_an_unknown_address():
        life = run_with_retries(SendEmail.job("nobody@example.org"))
        assert (life.then, len(life.runs)) == ("dead", 1)

Everything runs in this process, isolated jobs too, so no limit is in force. Real I/O takes its real time: a server that a job
asks is waited for, and only when it has said nothing for 5 s, time jumps to whatever is to happen next, such as a time-out.
While a program of `kqueue.io.run` runs, no time is jumped over.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from .brokers.base import Counters, Lease, Token
from .codec import Envelope, decode, from_json, unpack
from .context import JobContext, enter
from .dispatch import NewJob, prepare
from .errors import JobTimedOut
from .execution.base import Work
from .execution.inline import InlineExecutionStrategy
from .job import BoundJob, JobHandle, get_dispatcher, set_dispatcher
from .kernel import Kernel, VirtualClock, sleep
from .kernel.traps import run as run_task
from .program import Program, ProgramEnd
from .registry import Registration, registry
from .security import SecurityConfig, admit
from .states import JobState
from .verdict import judge

IO_PATIENCE_S: Final = 5.0  # real seconds of silence, until time jumps over I/O


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

    def __init__(self, queue: FakeQueue, clock: VirtualClock) -> None:
        self._queue = queue
        self._clock = clock
        self.bound: dict[str, BoundJob] = {}  # follow-ups, by id

    def enqueue(self, jobs: Sequence[BoundJob]) -> Generator[Any, Any, list[str]]:
        yield from ()
        return [self._queue._take(bound).id for bound in jobs]

    def offload(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Generator[Any, Any, Any]:
        yield from ()
        return function(*args, **kwargs)

    def run_program(self, program: Program) -> Generator[Any, Any, ProgramEnd]:
        """For real, and in real time, since a program that says nothing is at work all the same."""
        from .execution.direct_program import run_directly

        self._clock.held += 1
        try:
            end: ProgramEnd = yield from run_directly(program)
        finally:
            self._clock.held -= 1
        return end

    def progress(self, context: JobContext) -> None:
        """Kept in the context; nobody looks."""

    def prepare(self, job: BoundJob) -> NewJob:
        prepared = prepare(job, job.registration or registry.get(job.name))
        self.bound[prepared.id] = job
        return prepared


def run(job: BoundJob, *, queue: FakeQueue | None = None, attempt: int = 1) -> Any:
    """Run `job` to its end on a virtual clock; its result, or its error.

    A sleep takes no time, a time-out fires when it would. Arguments go through JSON and back, as they would in a queue. What the
    job dispatches lands in `queue`, and if it ends well its follow-ups do, too.
    """
    queue = queue or FakeQueue()
    registration, envelope, _ = _enveloped(job)
    timeout_s = envelope.options.get("timeout", registration.options.timeout)
    clock = VirtualClock(IO_PATIENCE_S)
    kernel = Kernel(clock=clock)
    services = _Services(queue, clock)
    context = _context(registration, envelope, attempt, timeout_s or None, services)

    def steps() -> Generator[Any, Any, Any]:
        enter(context)
        task = kernel.current
        if timeout_s and task is not None:
            error = JobTimedOut(f"{job.name} ran longer than its timeout of {timeout_s:g} s")
            kernel.throw_at(task, timeout_s, error, grace_s=1.0)
        kwargs = {key: unpack(value) for key, value in envelope.kwargs.items()}
        try:
            result = registration.call(unpack(envelope.args), kwargs)
            if isinstance(result, types.CoroutineType):
                return (yield from result.__await__())
            return (yield from result) if isinstance(result, types.GeneratorType) else result
        finally:
            context.close_all()

    try:
        result = kernel.run(steps())
    finally:
        kernel.close()
    queue.jobs += [services.bound[each.id] for each in context.follow_ups]
    return result


class Run(NamedTuple):
    """One attempt of `run_with_retries`."""

    cause: str  # "ok", "exception", "timeout", …
    error: str  # "ValueError: no such file"; "" when it ended well
    then: str  # "done", "retry" or "dead"
    delay_s: float  # until the next one
    why: str  # which rule decided that, where it needs saying
    max_memory: int  # MiB that it would have had in a child


class Life(NamedTuple):
    """What became of a job in the end. `result`: what it returned, if it keeps results."""

    then: str  # "done" or "dead"
    result: Any
    runs: list[Run]


def run_with_retries(job: BoundJob, *, queue: FakeQueue | None = None, security: SecurityConfig | None = None) -> Life:
    """Run `job` as a daemon would, again and again until it is done or dead, and tell what was decided each time.

    On a virtual clock: a backoff of an hour takes no time. Its errors are not raised. As in `run` no process is forked, so it can
    neither crash nor run out of its memory, unless it raises MemoryError.
    """
    queue = queue or FakeQueue()
    registration, envelope, data = _enveloped(job)
    clock = VirtualClock(IO_PATIENCE_S)
    kernel = Kernel(clock=clock)

    def steps() -> Generator[Any, Any, Life]:
        runs: list[Run] = []
        counters = Counters()
        strategy = InlineExecutionStrategy(kernel)
        while True:
            options = admit(security or SecurityConfig(), envelope, registration, counters.memory).options
            services = _Services(queue, clock)
            deadline = kernel.clock.monotonic() + options.timeout if options.timeout else None
            context = _context(registration, envelope, counters.runs + 1, deadline, services)
            work = Work(envelope, data, registration, options, context.attempt, context)
            # A task of its own, as in the daemon: what it enters, and what is thrown at it, ends with it.
            outcome = yield run_task(strategy.execute(work))
            lease = Lease(Token("", envelope.id, 1), envelope.queue, registration.lane, data, counters, 0.0)
            then, settlement = judge(lease, options, outcome, "inline", envelope.enqueued_at + kernel.clock.monotonic())
            counters = settlement.counters
            queue.jobs += [services.bound[each.id] for each in outcome.follow_ups]
            why = "" if settlement.certificate is None else str(from_json(settlement.certificate)["why"])
            error = "" if outcome.ok else outcome.summary()
            runs.append(Run(outcome.cause, error, then, settlement.delay_s, why, options.max_memory))
            if then != "retry":
                return Life(then, unpack(from_json(outcome.result or b"null")), runs)
            yield sleep(settlement.delay_s)

    try:
        life: Life = kernel.run(steps())
    finally:
        kernel.close()
    return life


def _enveloped(job: BoundJob) -> tuple[Registration, Envelope, bytes]:
    """`job` as it would come out of a queue."""
    registration = job.registration or registry.get(job.name)
    if registration is None or registration.target is None:
        raise LookupError(f"job {job.name!r} is not registered here: import its module")
    data = prepare(job, registration).envelope
    return registration, decode(data), data


def _context(
    registration: Registration, envelope: Envelope, attempt: int, deadline: float | None, services: _Services
) -> JobContext:
    return JobContext(
        id=envelope.id, name=envelope.job, queue=envelope.queue, attempt=attempt, deadline=deadline,
        inline=registration.lane == "inline", services=services,
    )  # fmt: skip
