"""What a running job knows of itself: `kqueue.current()`.

One context variable holds it, in the supervisor and in a child alike. `services` is what the job's surroundings do for
it: the runtime for an inline job, frames to the supervisor for a child. The traps and helpers users type (`enqueue`, `offload`,
`progress`) only forward to it, so a job does not know where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import ref

from .errors import UsageError

if TYPE_CHECKING:
    import logging

    from .dispatch import NewJob
    from .job import BoundJob
    from .program import Program

MAX_FOLLOW_UPS: Final = 500  # of one run: they have to fit one command of a broker, and the supervisor holds them meanwhile
MAX_FOLLOW_UP_BYTES: Final = 4 * 1024 * 1024  # of all of them together


class Services(Protocol):
    """What surrounds a running job. Each returns a generator of traps (inline) that a trap wraps for the job."""

    def enqueue(self, jobs: Sequence[BoundJob]) -> Any:
        """Enqueue `jobs`; the generator returns their ids."""

    def offload(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a blocking call elsewhere; the generator returns its result."""

    def run_program(self, program: Program) -> Any:
        """Run it and end it with the job; the generator returns a ProgramEnd."""

    def progress(self, context: JobContext) -> None:
        """`context.fraction` and `context.note` have changed."""

    def prepare(self, job: BoundJob) -> NewJob:
        """`job` as it may stand in a queue: checked at once, without waiting. Raises what dispatching it would.

        `then` keeps it as a follow-up; where the supervisor has to know of that, it does when this returns.
        """


class Closeable(Protocol):
    """Something that a job opens: a stream, a helper."""

    def close(self) -> None:
        """At once, and without waiting."""


class Cancellable(Protocol):
    """A timer."""

    def cancel(self) -> None:
        """It does not fire any more."""


class JobContext:
    """The running job, as it sees itself."""

    __slots__ = (
        "_opened", "attempt", "deadline", "follow_ups", "fraction", "id", "inline", "max_memory_mib", "name", "note", "pid",
        "queue", "services", "timer",
    )  # fmt: skip

    def __init__(
        self, *, id: str, name: str, queue: str, attempt: int, deadline: float | None, inline: bool, services: Services,
        max_memory_mib: float = 0,
    ) -> None:  # fmt: skip
        self.id = id
        self.name = name
        self.queue = queue
        self.attempt = attempt  # 1 for the first run
        self.deadline = deadline  # time.monotonic() at which its timeout ends it; None: it has none
        self.max_memory_mib = max_memory_mib  # 0: no limit
        self.inline = inline  # it runs inside the supervisor, so it must not block
        self.services = services
        self.fraction: float | None = None  # what it last reported by progress(); None: nothing yet
        self.note = ""
        self.follow_ups: tuple[NewJob, ...] = ()  # what is enqueued when this run ends well, in the same step as its ack
        self.timer: Cancellable | None = None  # what ends it when its deadline has come; None: it need not be taken back
        self._opened: dict[int, ref[Closeable]] | None = None  # by id(): what is closed when this run ends; None: nothing yet
        self.pid: int | None = None  # of its child, while it has one; None: it runs in this process

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger named after the job, whose records carry its id."""
        import logging

        return logging.LoggerAdapter(logging.getLogger(self.name), {"job_id": self.id, "job": self.name})

    def then(self, job: BoundJob) -> str:
        """Have `job` enqueued when this run ends well, in the same step that ends it; its id.

        So it is there exactly once when the run counts, and not at all when it fails. Nothing is waited for, in no kind of job.
        Raises what dispatching `job` would, and UsageError over MAX_FOLLOW_UPS or MAX_FOLLOW_UP_BYTES.
        """
        from .job import BoundJob  # which knows this file

        if not isinstance(job, BoundJob):
            raise TypeError(f"then() takes a bound job such as SendEmail.job(...), not {type(job).__name__}")
        self.check_room(0)
        prepared = self.services.prepare(job)
        self.add_follow_up(prepared)
        return prepared.id

    def add_follow_up(self, prepared: NewJob) -> None:
        """Keep it with this run. Raises UsageError when there is no room."""
        self.check_room(len(prepared.envelope))
        self.follow_ups = (*self.follow_ups, prepared)

    def keep(self, thing: Closeable) -> None:
        """Close `thing` when this run ends, however it ends. Nothing else is kept alive by it."""
        if self._opened is None:
            self._opened = {}
        self._opened[id(thing)] = ref(thing)

    def forget(self, thing: Closeable) -> None:
        """Do not: it was closed, or others see to it."""
        if self._opened is not None:
            self._opened.pop(id(thing), None)

    def close_all(self) -> None:
        """This run has ended: take its timer back, and close what it opened and left open."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        while self._opened:
            thing = self._opened.popitem()[1]()
            if thing is not None:
                thing.close()

    def check_room(self, size: int) -> None:
        """Raise UsageError when another follow-up of `size` bytes is more than one run may have."""
        if len(self.follow_ups) >= MAX_FOLLOW_UPS:
            raise UsageError(
                f"{self.name} has {MAX_FOLLOW_UPS} follow-ups already, as many as a run may have; "
                "let one of them dispatch the rest"
            )
        if size + sum(len(each.envelope) for each in self.follow_ups) > MAX_FOLLOW_UP_BYTES:
            raise UsageError(
                f"the follow-ups of {self.name} are over {MAX_FOLLOW_UP_BYTES} bytes, which is what those of one run may be "
                "together; put the data somewhere else and pass a key"
            )


_current: ContextVar[JobContext | None] = ContextVar("kqueue_job", default=None)


def current() -> JobContext:
    """The job that is running here: id, name, queue, attempt, deadline, logger. RuntimeError outside of a job."""
    context = _current.get()
    if context is None:
        raise RuntimeError("kqueue.current() is only there inside a running job")
    return context


def current_or_none() -> JobContext | None:
    """The job that is running here; None: no job is."""
    return _current.get()


def enter(context: JobContext | None) -> None:
    """Make `context` the current one for this task (or this process, in a child)."""
    _current.set(context)


def job_in(context: Context) -> JobContext | None:
    """The job that runs in `context`, which is a task's; None: none has begun there."""
    return context.get(_current)


def keep(thing: Closeable) -> None:
    """Close `thing` when the job that runs here, if any, ends."""
    context = _current.get()
    if context is not None:
        context.keep(thing)


def forget(thing: Closeable) -> None:
    """The job that runs here, if any, is not to close `thing`."""
    context = _current.get()
    if context is not None:
        context.forget(thing)


def close_all() -> None:
    """The job that runs here, if any, has ended: close what it left open."""
    context = _current.get()
    if context is not None:
        context.close_all()
