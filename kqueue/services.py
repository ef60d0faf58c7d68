"""What running jobs ask of the runtime: to enqueue, to run a blocking call elsewhere, to report progress (`context.Services`).

What a job has running in a process of its own has a task of its own, too. A job that is cancelled or timed out is thrown out of
its wait at once, while that task asks the process to end, gives it its grace, and kills it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, Final

from . import events as facts
from .codec import decode
from .context import JobContext, current
from .dispatch import NewJob, prepare
from .errors import JobCancelled, JobTimedOut
from .job import BoundJob
from .kernel import Abandoned, Park, Slots, Task, join
from .options import check_option
from .program import Program
from .registry import registry
from .upkeep import EXIT_RESTART

if TYPE_CHECKING:
    from .runtime import KQueueRuntime

Steps = Generator[Any, Any, Any]
LATE_S: Final = 1.0


class RuntimeServices:
    """One for all jobs of a runtime.

    `offload_slots`: calls that run at once, and as many programs; `offload_memory_mib`: what each may have.
    """

    def __init__(self, runtime: KQueueRuntime, offload_slots: int, offload_memory_mib: int) -> None:
        self._runtime = runtime
        self._slots = Slots(offload_slots)
        self._program_slots = Slots(offload_slots)
        self._memory_mib = offload_memory_mib
        self._apart: set[Task] = set()  # what runs in processes for inline jobs
        self._stopping: deque[Task] = deque()

    def enqueue(self, jobs: Sequence[BoundJob]) -> Steps:
        runtime = self._runtime
        prepared = [self.prepare(bound) for bound in jobs]
        yield from runtime.broker.enqueue(prepared, runtime.security.queue_depth)
        return [job.id for job in prepared]

    def prepare(self, job: BoundJob) -> NewJob:
        security = self._runtime.security
        registration = registry.get(job.name) or job.registration  # the registry knows more: which lane was chosen
        return prepare(
            job, registration, check=self._runtime.check, arguments_too=False, max_bytes=security.max_envelope_bytes,
            keys=self._runtime.keys,
        )  # fmt: skip

    def offload(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Steps:
        """In a process of the pool, a few at a time; the others wait their turn within their own time-outs."""
        return (yield from self._run_apart(self._offload(current(), function, args, kwargs)))

    def _offload(
        self, context: JobContext, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Steps:
        runtime = self._runtime
        yield from self._slots.take()
        try:
            left_s = self._left_s(context)
            runtime.isolated.link.configure(runtime.template())
            result = yield from runtime.isolated.offload(
                function, args, kwargs, context=context, timeout_s=left_s, max_memory_mib=self._memory_mib
            )
            return result
        finally:
            self._slots.give()

    def run_program(self, program: Program) -> Steps:
        """In a child of the template, as few at a time as calls."""
        return (yield from self._run_apart(self._run_program(current(), program)))

    def _run_program(self, context: JobContext, program: Program) -> Steps:
        runtime = self._runtime
        yield from self._program_slots.take()
        try:
            left_s = self._left_s(context)
            # The job's own deadline is told to the job, and then to us; here it is only for the case that nobody tells.
            timeout_s = min(program.timeout_s or inf, left_s + LATE_S if left_s else inf)
            runtime.isolated.link.configure(runtime.template())
            max_memory_mib = program.max_memory_mib or self._memory_mib
            limit_mib = runtime.security.max_memory_mib
            end = yield from runtime.isolated.run_program(
                program, context=context, timeout_s=0.0 if timeout_s == inf else timeout_s,
                max_memory_mib=min(max_memory_mib, limit_mib) if limit_mib else max_memory_mib,
            )  # fmt: skip
            return end
        finally:
            self._program_slots.give()

    def _left_s(self, context: JobContext) -> float:
        """What is left of the job's time, in seconds; 0: it has no end. Raises JobTimedOut when it is over."""
        if context.deadline is None:
            return 0.0
        left_s = context.deadline - self._runtime.kernel.clock.monotonic()
        if left_s <= 0:
            raise JobTimedOut(f"{context.name} had no time left when its turn came")
        return left_s

    def _run_apart(self, steps: Steps) -> Steps:
        """What `steps` return or raise, run as a task that outlives whoever waits for it by as long as it takes to end it."""
        kernel = self._runtime.kernel
        task = kernel.spawn(steps)
        self._apart.add(task)
        task.on_end = self._ended
        try:
            return (yield join(task))
        except BaseException:
            if not task.ended:
                kernel.cancel(task, JobCancelled("nobody waits for it any more"), self._runtime.isolated.cancel_grace_s)
            raise

    def _ended(self, task: Task) -> None:
        self._apart.discard(task)
        self._runtime.kernel.unpark(self._stopping)
        if isinstance(task.error, Abandoned):  # its place is lost, and its process lives
            self._runtime.events.emit(facts.Warned(f"a call or a program would not end; restarting to end it ({task.error})"))
            self._runtime.stop("a call that would not end", exit_code=EXIT_RESTART)

    def stop(self) -> Steps:
        """Wait for what is being ended. No job waits for any of it any more."""
        while self._apart:
            yield Park(self._stopping)

    def progress(self, context: JobContext) -> None:
        self._runtime.events.emit(facts.JobProgress(context.id, context.name, context.fraction or 0.0, context.note))

    def enqueue_from_child(self, jobs: Sequence[NewJob]) -> Steps:
        """What a child dispatches, within the limits that hold for every dispatch. Raises what `Client.dispatch` would."""
        checked = [self.check_from_child(job) for job in jobs]
        yield from self._runtime.broker.enqueue(checked, self._runtime.security.queue_depth)

    def check_from_child(self, job: NewJob) -> NewJob:
        """`job`, which a child prepared, as it may stand in a queue: checked, and signed here, since a child has no key."""
        envelope = decode(job.envelope, self._runtime.security.max_envelope_bytes)
        registration = registry.get(envelope.job)
        if registration is not None:
            for name, value in envelope.options.items():
                check_option(name, value)
            self._runtime.check(registration.options._replace(**envelope.options), envelope.job)
            job = job._replace(lane=registration.lane)
        keys = self._runtime.keys
        return job if keys is None else job._replace(envelope=keys.sign(job.envelope))
