"""What a running job knows of itself: `kqueue.current()`.

One context variable holds it, in the supervisor and in a child alike. `services` is what the job's surroundings do for
it: the runtime for an inline job, frames to the supervisor for a child. The traps and helpers users type (`enqueue`, `offload`,
`progress`) only forward to it, so a job does not know where it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import logging

    from .job import BoundJob


class Services(Protocol):
    """What surrounds a running job. Each returns a generator of traps (inline) that a trap wraps for the job."""

    def enqueue(self, jobs: Sequence[BoundJob]) -> Any:
        """Enqueue `jobs`; the generator returns their ids."""

    def offload(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a blocking call elsewhere; the generator returns its result."""

    def progress(self, context: JobContext) -> None:
        """`context.fraction` and `context.note` have changed."""


class JobContext:
    """The running job, as it sees itself."""

    __slots__ = ("attempt", "deadline", "fraction", "id", "inline", "name", "note", "pid", "queue", "services")

    def __init__(
        self, *, id: str, name: str, queue: str, attempt: int, deadline: float | None, inline: bool, services: Services
    ) -> None:
        self.id = id
        self.name = name
        self.queue = queue
        self.attempt = attempt  # 1 for the first run
        self.deadline = deadline  # time.monotonic() at which its timeout ends it; None: it has none
        self.inline = inline  # it runs inside the supervisor, so it must not block
        self.services = services
        self.fraction: float | None = None  # what it last reported by progress(); None: nothing yet
        self.note = ""
        self.pid: int | None = None  # of its child, while it has one; None: it runs in this process

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger named after the job, whose records carry its id."""
        import logging

        return logging.LoggerAdapter(logging.getLogger(self.name), {"job_id": self.id, "job": self.name})


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
