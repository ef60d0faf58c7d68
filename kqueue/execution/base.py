"""The seam between the runtime and the ways to run a job.

Rule 1. `execute` is a generator of traps that returns an Outcome, whatever the job does. It raises only what cancels it.
Rule 2. Only the runtime settles a lease: a strategy cannot lose a job, and knows no broker.
Rule 3. Cancelling is `kernel.cancel(task, JobCancelled(...))`; a strategy then ends the job and returns "cancelled".
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..codec import Envelope, unpack
from ..context import JobContext, Services
from ..job import JobOptions, Registration
from ..outcome import Outcome


class Work(NamedTuple):
    """One attempt to make."""

    envelope: Envelope
    data: bytes  # the envelope as it stands in the queue
    registration: Registration
    options: JobOptions  # effective: declared, overridden at dispatch, clamped
    attempt: int  # 1 for the first run
    context: JobContext

    def arguments(self) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """args and kwargs as the handler gets them. EnvelopeError for a tag that cannot be read."""
        envelope = self.envelope
        if not envelope.tagged:
            return envelope.args, envelope.kwargs
        return unpack(envelope.args), {key: unpack(value) for key, value in envelope.kwargs.items()}


class ExecutionStrategy(Protocol):
    """A way to run jobs. `name` is also the lane it serves."""

    name: str
    cancel_grace_s: float  # what it needs to end a cancelled job, seconds

    def start(self) -> Generator[Any, Any, None]:
        """Get ready; ConfigError when that is the operator's to mend."""

    def execute(self, work: Work) -> Generator[Any, Any, Outcome]:
        """Run one attempt to its end."""

    def stop(self) -> Generator[Any, Any, None]:
        """Let go of everything. No job runs any more."""


class Offloading(Protocol):
    """A strategy that can also run a plain function elsewhere."""

    def offload(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], timeout_s: float
    ) -> Generator[Any, Any, Any]:
        """The function's result, or its error. TypeError when it cannot be sent."""


__all__ = ["ExecutionStrategy", "JobContext", "Offloading", "Outcome", "Services", "Work"]
