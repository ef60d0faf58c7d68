"""The states of a job, and what leads from one to another: a table. Imports nothing of KQueue; docs/states.md prints it."""

from __future__ import annotations

import enum
from typing import Final


class JobState(enum.Enum):
    """Where a job stands. What may follow what is TRANSITIONS, and docs/states.md prints that table."""

    DELAYED = "delayed"  # due in the future
    READY = "ready"  # may be reserved
    LEASED = "leased"  # one supervisor holds it, by token
    DONE = "done"  # gone, or kept with its result while `keep_result` lasts
    DEAD = "dead"  # gave up; kept with its certificates until someone retries or forgets it


TRANSITIONS: Final[tuple[tuple[JobState | None, str, JobState | None], ...]] = (
    (None, "enqueue", JobState.READY),
    (None, "enqueue with a delay", JobState.DELAYED),
    (JobState.DELAYED, "due", JobState.READY),
    (JobState.READY, "reserve", JobState.LEASED),
    (JobState.LEASED, "ack", JobState.DONE),
    (JobState.LEASED, "release", JobState.READY),
    (JobState.LEASED, "release with a delay", JobState.DELAYED),
    (JobState.LEASED, "bury", JobState.DEAD),
    (JobState.LEASED, "its owner's expiry or death", JobState.READY),
    (JobState.READY, "cancel", JobState.DEAD),
    (JobState.DELAYED, "cancel", JobState.DEAD),
    (JobState.DEAD, "retry", JobState.READY),
    (JobState.DEAD, "forget", None),
    (JobState.DEAD, "retention", None),
    (JobState.DONE, "expiry of its result", None),
)
"""(from, by what, to); None: the job does not exist."""
