"""The seam between the runtime and the ways to run a job.

Rule 1. `execute` is a generator of traps that returns an Outcome, whatever the job does.
        It raises only NotStarted, and ImportFailed where there can be no child.
Rule 2. Only the runtime settles a lease: a strategy cannot lose a job, and knows no broker.
Rule 3. Cancelling is `kernel.cancel(task, JobCancelled(...))`; a strategy then ends the job and returns "cancelled".
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..codec import Envelope, unpack
from ..context import JobContext
from ..errors import ArgumentsDoNotFit, EnvelopeError, KQueueError
from ..options import JobOptions
from ..outcome import Outcome
from ..registry import Registration


class Work(NamedTuple):
    """One attempt to make."""

    envelope: Envelope
    data: bytes  # the envelope as it stands in the queue
    registration: Registration
    options: JobOptions  # effective: declared, overridden at dispatch, clamped
    attempt: int  # 1 for the first run
    context: JobContext
    alone: bool = False  # it was lost with others too often to share a process with any

    def arguments(self) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """args and kwargs as the handler gets them. Raises ArgumentsDoNotFit for a tag that cannot be read."""
        if not self.envelope.tagged:
            return self.envelope.args, self.envelope.kwargs
        return unpacked(self.envelope)


def unpacked(envelope: Envelope) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """args and kwargs of `envelope` without their tags. Raises ArgumentsDoNotFit."""
    try:
        return unpack(envelope.args), {key: unpack(value) for key, value in envelope.kwargs.items()}
    except EnvelopeError as error:
        raise ArgumentsDoNotFit(str(error)) from None


class ExecutionStrategy(Protocol):
    """A way to run jobs. `name` is also the lane it serves."""

    name: str
    cancel_grace_s: float  # what it needs to end a cancelled job, seconds

    def start(self) -> Generator[Any, Any, None]:
        """Get ready; ConfigError when that is the operator's to mend."""

    def execute(self, work: Work) -> Generator[Any, Any, Outcome]:
        """Run one attempt to its end. Raises NotStarted when it could not begin."""

    def stop(self) -> Generator[Any, Any, None]:
        """Let go of everything. No job runs any more."""


class NotStarted(KQueueError):
    """The attempt was not made: this host is short of processes, memory or fds just now. It counts nothing."""
