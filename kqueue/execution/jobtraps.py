"""What a job may ask for besides waiting: `enqueue`, `offload`, `progress`. They forward to the services of its surroundings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..context import current
from ..job import BoundJob
from ..kernel.traps import Trap, run

if TYPE_CHECKING:
    from ..kernel.loop import Kernel, Task


class _Request(Trap):
    """Runs a generator made by `make` when it is yielded."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def arm(self, kernel: Kernel, task: Task) -> Any:
        return run(task.context.run(self._make)).arm(kernel, task)


class _Nothing(Trap):
    """Answers None at once."""

    __slots__ = ()

    def arm(self, kernel: Kernel, task: Task) -> None:
        return None


def enqueue(*jobs: BoundJob) -> Trap:
    """Dispatch from an inline job without blocking it: `id = yield enqueue(SendEmail.job("a"))`. Several jobs: a list of ids."""
    for bound in jobs:
        if not isinstance(bound, BoundJob):
            raise TypeError(f"enqueue() takes bound jobs such as SendEmail.job(...), not {type(bound).__name__}")
    return _Request(lambda: _ids(jobs))


def _ids(jobs: tuple[BoundJob, ...]) -> Any:
    ids = yield from current().services.enqueue(jobs)
    return ids[0] if len(jobs) == 1 else ids


def offload(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Trap:
    """Run a blocking call in a child and get its result: `page = yield offload(fetch, url)`.

    `function` must be importable there (no lambda, no closure), arguments and result what JSON can carry, with the same tags as a
    job's. Its error is raised here: of its own class where that is a built-in one, else as `OffloadError`, which names it.
    """
    return _Request(lambda: current().services.offload(function, args, kwargs))


def progress(fraction: float, note: str = "") -> Trap:
    """Report how far the job is: 0.0 to 1.0, and a short note. Takes effect when called, so plain functions can too."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"progress() takes a fraction from 0 to 1, not {fraction!r}")
    context = current()
    context.fraction, context.note = float(fraction), str(note)[:200]
    context.services.progress(context)
    return _Nothing()
