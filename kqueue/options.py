"""What a job declares about itself, and what one dispatch may set besides: names, defaults, and what each may be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from time import time
from typing import Any, Final, NamedTuple

from .errors import UsageError, nearest
from .ids import PATTERN as ID_PATTERN
from .retries import (
    LONGEST_DELAY_S,
    check_backoff,
    check_causes,
    check_names,
    check_retry_until,
    is_number,
    is_wait,
    plain_seconds,
)

PRIORITY_MIN: Final = -100
PRIORITY_MAX: Final = 100
QUEUE_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")  # no braces: they are the hash tag of a Redis key
ACCOUNT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,62}\$?")  # of a user or group; directory services allow that
STARTS: Final = ("fork", "pool", "exec")
MIN_FILES: Final = 16  # a child has five, and an import or a traceback needs some more
DECLARED_ONLY: Final = ("isolated", "start", "user", "group", "network", "private_tmp")  # no dispatch sets them
PRIVILEGES: Final = ("user", "group", "network", "private_tmp")  # which only a process of its own can have
_MOST: Final = 1 << 30  # more is a slip of the pen, and in MiB what an rlimit still holds


Backoff = float | Sequence[float] | Mapping[str, Any] | Callable[[int, BaseException], float] | None


class JobOptions(NamedTuple):
    """What a job declares about itself. Class attributes of the same names mean the same."""

    timeout: float = 30  # seconds of wall time; 0: no limit
    max_memory: int = 64  # MiB
    isolated: bool | None = None  # None: a generator or coroutine runs inline, a plain function in a child
    priority: int = 0  # -100..100; each point is a head start of one hour in the queue
    queue: str = "default"
    max_attempts: int = 3
    backoff: Backoff = None  # seconds before each retry; None: 2, 4, 8 … up to an hour, jittered
    start: str | None = None  # how an isolated job gets its process: "fork", "pool", "exec"; None: as isolated.start has it
    max_cpu: float = 0  # seconds of CPU time; 0: no limit
    max_files: int = 1024  # open files of each of its processes
    max_processes: int = 256  # at once, its own included; 0: no limit
    max_file_size: int = 0  # MiB that a file may have which it writes to; 0: no limit
    keep_result: float = 0  # seconds that the result is kept; 0: not at all
    retry_until: float | None = None  # seconds after its enqueueing; replaces max_attempts. None: there is no such time
    retry_on: Sequence[str] | None = None  # names of exception classes that are retried; None: all
    dont_retry_on: Sequence[str] | None = None  # names of those that are not, whatever retry_on says; None: none
    causes: Mapping[str, Any] = {}  # what goes before the above for one cause of death: "bury", or max_attempts, backoff, grow
    user: str | None = None  # whom an isolated job runs as; None: as isolated.user has it. For this, the daemon has to be root
    group: str | None = None  # None: the user's own
    network: bool = True  # False: it has none
    private_tmp: bool = False  # True: it has a /tmp of its own, which ends with it


class DispatchOptions(NamedTuple):
    """What one dispatch sets besides the job's own options. See `Dispatch.options`."""

    delay_s: float = 0
    at: float | None = None  # seconds since 1970; wins over delay_s
    id: str | None = None
    overrides: Mapping[str, Any] = {}  # of JobOptions
    retry_until: float | None = None  # seconds since 1970, where a datetime was given


def _wait(value: Any) -> bool:
    return is_number(value) and bool(value >= 0)


def _is_account(value: Any) -> bool:
    return isinstance(value, str) and bool(ACCOUNT.fullmatch(value))


_CHECKS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "timeout": (_wait, "seconds, 0 for no limit"),
    "max_memory": (lambda v: type(v) is int and v > 0, "a positive number of MiB"),
    "isolated": (lambda v: v is None or type(v) is bool, "True, False or None"),
    "priority": (lambda v: type(v) is int and PRIORITY_MIN <= v <= PRIORITY_MAX, "an integer from -100 to 100"),
    "queue": (lambda v: isinstance(v, str) and bool(QUEUE_NAME.fullmatch(v)), "1 to 64 of letters, digits and _ . : -"),
    "max_attempts": (lambda v: type(v) is int and v >= 1, "an integer of at least 1"),
    "start": (lambda v: v is None or (isinstance(v, str) and v in STARTS), '"fork", "pool", "exec" or None'),
    "max_cpu": (_wait, "seconds, 0 for no limit"),
    "max_files": (lambda v: type(v) is int and MIN_FILES <= v <= _MOST, f"an integer of at least {MIN_FILES}"),
    "max_processes": (lambda v: type(v) is int and 0 <= v <= _MOST, "an integer of at least 1, or 0 for no limit"),
    "max_file_size": (lambda v: type(v) is int and 0 <= v <= _MOST, "a positive number of MiB, or 0 for no limit"),
    "keep_result": (_wait, "seconds, 0 for not at all"),
    "user": (lambda v: v is None or _is_account(v), "the name of a user, or None"),
    "group": (lambda v: v is None or _is_account(v), "the name of a group, or None"),
    "network": (lambda v: type(v) is bool, "True or False"),
    "private_tmp": (lambda v: type(v) is bool, "True or False"),
}


_RETRIES: Final[dict[str, Callable[[Any], Any]]] = {  # these have more to say than "must be", and may keep another value
    "backoff": check_backoff,
    "retry_until": check_retry_until,
    "retry_on": lambda v: check_names("retry_on", v),
    "dont_retry_on": lambda v: check_names("dont_retry_on", v),
    "causes": check_causes,
}


def check_option(name: str, value: Any) -> Any:
    """What to keep of `value` for the option `name`: classes become names, a timedelta seconds. Raises UsageError."""
    if name in _RETRIES:
        return _RETRIES[name](value)
    if name not in _CHECKS:
        raise UsageError(f"a job has no option {name!r}{nearest(name, [*_CHECKS, *_RETRIES])}")
    valid, wanted = _CHECKS[name]
    if not valid(value):
        raise UsageError(f"{name} must be {wanted}, not {value!r:.60}")
    return value


def checked_options(values: Mapping[str, Any]) -> JobOptions:
    """JobOptions of `values`, each checked. Raises UsageError."""
    return JobOptions(**{name: check_option(name, value) for name, value in values.items()})


def dispatch_options(*, delay: Any = 0, at: Any = None, id: str | None = None, **overrides: Any) -> DispatchOptions:
    """Check what `.options(...)` was given: `delay` (seconds or timedelta), `at` (datetime), `id`, and any of JobOptions.

    `retry_until` may be a datetime, too. An id makes the dispatch idempotent: while a job of that id exists, another one is not
    added. A naive datetime is local time. Raises UsageError.
    """
    delay = plain_seconds(delay)
    if not is_wait(delay):
        raise UsageError(f"delay must be seconds or a timedelta, from 0 to ten years, not {delay!r:.60}")
    if at is not None and not hasattr(at, "timestamp"):
        raise UsageError(f"at must be a datetime, not {at!r:.60}")
    if at is not None and delay:
        raise UsageError("delay and at both say when the job is due; give one of them")
    due = None if at is None else _moment("at", at)
    if id is not None and not (isinstance(id, str) and ID_PATTERN.fullmatch(id)):
        raise UsageError(f"an id is 1 to 64 letters, digits, - and _, not {id!r:.60}")
    until = None
    if hasattr(overrides.get("retry_until"), "timestamp"):
        until = _moment("retry_until", overrides.pop("retry_until"))
        if until <= time():
            raise UsageError("retry_until has passed already; for no retry at all write max_attempts=1")
    checked = {}
    for name, value in overrides.items():
        checked[name] = check_option(name, value)
        if name in DECLARED_ONLY:
            raise UsageError(f"{name} is decided where the job is declared, not at dispatch")
        if name == "backoff" and callable(value):
            raise UsageError("backoff is a function, which no queue can carry: declare it with the job, or give seconds here")
    return DispatchOptions(delay, due, id, checked, until)


def _moment(name: str, value: Any) -> float:
    """Seconds since 1970 of a datetime."""
    try:
        moment = float(value.timestamp())
    except (ValueError, OverflowError, OSError) as error:  # a naive one that is before any time zone's year 1
        raise UsageError(f"{name} is out of range: {error}") from None
    if moment > time() + LONGEST_DELAY_S:
        raise UsageError(f"{name} is more than ten years from now: {value}")
    return moment
