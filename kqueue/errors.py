"""The error tree: small, each class knows its exit code, each message says what happened, to what, and the next step.

The two that end a running job derive from BaseException, so that a job's `except Exception` cannot swallow them.
"""

from __future__ import annotations

from typing import Any, ClassVar


class KQueueError(Exception):
    """Anything KQueue itself raises. `exit_code` is what a command ends with when it reaches the top."""

    exit_code: ClassVar[int] = 70


class ConfigError(KQueueError):
    """The configuration is wrong: `file:line: what is wrong, what is allowed`."""

    exit_code = 2

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(where + message)


class UsageError(KQueueError):
    """A command or a call was given something it cannot use."""

    exit_code = 2


class ArgumentsDoNotFit(UsageError):
    """The arguments of a job do not fit its handler's signature, or cannot be read. No retry can change that."""


class AlreadyRunning(KQueueError):
    """Another daemon with this host and instance holds the lock."""

    exit_code = 3


class BrokerRefused(KQueueError):
    """The broker answered, and will not serve us: credentials, permissions, version, an unwritable path. Retrying is useless."""

    exit_code = 4


class BrokerUnavailable(KQueueError):
    """The broker cannot be reached right now. Retrying is right."""

    exit_code = 4


class QueueFull(KQueueError):
    """The queue holds as many jobs as `limits.queue_depth` allows; nothing was added."""


class DuplicateJob(KQueueError):
    """Two jobs were registered under one name."""

    exit_code = 2


class JobNotFound(KQueueError):
    """No job has this id, or no registered job has this name."""

    exit_code = 2


class JobFailed(KQueueError):
    """The job whose result was asked for is dead. The message is its last error's class and message."""


class ResultNotKept(KQueueError):
    """The job is done, but its result was not kept: `keep_result` is 0 or has passed."""


class EnvelopeError(KQueueError):
    """An envelope that is not what it should be: not JSON, too large, of a wrong shape."""


class NewerEnvelope(EnvelopeError):
    """An envelope written by a later version of KQueue, as during a rolling deploy."""


class Refused(KQueueError):
    """Admission refused the job; the message is the reason kept with it in the dead letters."""


class OffloadError(KQueueError):
    """An offloaded call failed with an error whose class is not built in; the message is "class: message"."""


class Retry(Exception):
    """Raised by a job: run it again `delay` seconds (or a timedelta) from now; None: after its usual backoff.

    It counts as an attempt, so it ends at `max_attempts` or `retry_until`; `retry_on` and its kind do not stop it.
    """

    def __init__(self, delay: Any = None, message: str = "") -> None:
        super().__init__(delay, message)
        from .retries import is_wait, plain_seconds  # which knows this file

        self.delay_s: float | None = plain_seconds(delay)
        if delay is not None and not is_wait(self.delay_s):
            raise UsageError(f"Retry: delay must be seconds or a timedelta, from 0 to ten years, or None, not {delay!r:.60}")
        self.message = message

    def __str__(self) -> str:
        return str(self.message)


class Discard(Exception):
    """Raised by a job: no run can succeed, so bury it now, with `reason`."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)


class JobCancelled(BaseException):
    """Raised inside a running job that is being stopped (shutdown, cancel). Clean up and let it pass."""


class JobTimedOut(BaseException):
    """Raised inside a running job that has used up its `timeout`. Clean up and let it pass."""


class JobBlocked(JobTimedOut):
    """Raised inside an inline job, wherever it stands, that has kept the loop for `hard_slice_s` seconds. Let it pass at once."""

    def __init__(self, message: str, hard_slice_s: float = 0.0) -> None:
        super().__init__(message)
        self.hard_slice_s = hard_slice_s


class JobOutgrew(BaseException):
    """Raised inside an inline job that has grown the daemon by more than its `max_memory`. Let go of it, and let this pass."""

    def __init__(self, message: str, grown_mib: float = 0.0, max_memory_mib: float = 0.0) -> None:
        super().__init__(message)
        self.grown_mib = grown_mib
        self.max_memory_mib = max_memory_mib


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """' (did you mean "x"?)' for the known word closest to `word`, else ''."""
    from difflib import get_close_matches  # costs 1 MB, so only when something is wrong

    match = get_close_matches(word, known, n=1, cutoff=0.5)
    return f' (did you mean "{match[0]}"?)' if match else ""
