"""What a job declares about itself, and what one dispatch may set besides: names, defaults, and what each may be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from time import time
from typing import Any, Final, NamedTuple

from .errors import UsageError, nearest
from .ids import PATTERN as ID_PATTERN

PRIORITY_MIN: Final = -100
PRIORITY_MAX: Final = 100
QUEUE_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")  # no braces: they are the hash tag of a Redis key
LONGEST_DELAY_S: Final = 10 * 366 * 86400.0  # longer is a slip of the pen
STARTS: Final = ("fork", "pool", "exec")


class JobOptions(NamedTuple):
    """What a job declares about itself. Class attributes of the same names mean the same."""

    timeout: float = 30  # seconds of wall time; 0: no limit
    max_memory: int = 64  # MiB
    isolated: bool | None = None  # None: a generator or coroutine runs inline, a plain function in a child
    priority: int = 0  # -100..100; each point is a head start of one hour in the queue
    queue: str = "default"
    max_attempts: int = 3
    backoff: float | Sequence[float] | None = None  # seconds before each retry; None: 2, 4, 8 … up to an hour, jittered
    start: str = "fork"
    max_cpu: float = 0  # seconds of CPU time; 0: no limit
    keep_result: float = 0  # seconds that the result is kept; 0: not at all


class DispatchOptions(NamedTuple):
    """What one dispatch sets besides the job's own options. See `Dispatch.options`."""

    delay_s: float = 0
    at: float | None = None  # seconds since 1970; wins over delay_s
    id: str | None = None
    overrides: Mapping[str, Any] = {}  # of JobOptions


def _number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _wait(value: Any) -> bool:
    return _number(value) and bool(value >= 0)


_CHECKS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "timeout": (_wait, "seconds, 0 for no limit"),
    "max_memory": (lambda v: type(v) is int and v > 0, "a positive number of MiB"),
    "isolated": (lambda v: v is None or type(v) is bool, "True, False or None"),
    "priority": (lambda v: type(v) is int and PRIORITY_MIN <= v <= PRIORITY_MAX, "an integer from -100 to 100"),
    "queue": (lambda v: isinstance(v, str) and bool(QUEUE_NAME.fullmatch(v)), "1 to 64 of letters, digits and _ . : -"),
    "max_attempts": (lambda v: type(v) is int and v >= 1, "an integer of at least 1"),
    "backoff": (
        lambda v: v is None or _wait(v) or (isinstance(v, (list, tuple)) and len(v) > 0 and all(map(_wait, v))),
        "seconds, or a list of seconds",
    ),
    "start": (lambda v: v == "fork", '"fork": this version has no "pool" and no "exec"'),
    "max_cpu": (_wait, "seconds, 0 for no limit"),
    "keep_result": (_wait, "seconds, 0 for not at all"),
}


def check_option(name: str, value: Any) -> None:
    """Raise UsageError unless `value` may stand for the option `name`."""
    if name not in _CHECKS:
        raise UsageError(f"a job has no option {name!r}{nearest(name, list(_CHECKS))}")
    valid, wanted = _CHECKS[name]
    if not valid(value):
        raise UsageError(f"{name} must be {wanted}, not {value!r:.60}")


def checked_options(values: Mapping[str, Any]) -> JobOptions:
    """JobOptions of `values`, each checked. Raises UsageError."""
    for name, value in values.items():
        check_option(name, value)
    return JobOptions(**values)


def dispatch_options(*, delay: Any = 0, at: Any = None, id: str | None = None, **overrides: Any) -> DispatchOptions:
    """Check what `.options(...)` was given: `delay` (seconds or timedelta), `at` (datetime), `id`, and any of JobOptions.

    An id makes the dispatch idempotent: while a job of that id exists, another one is not added. A naive `at` is local time.
    Raises UsageError.
    """
    if hasattr(delay, "total_seconds"):
        delay = delay.total_seconds()
    if not _number(delay) or not 0 <= delay <= LONGEST_DELAY_S:
        raise UsageError(f"delay must be seconds or a timedelta, from 0 to ten years, not {delay!r:.60}")
    if at is not None and not hasattr(at, "timestamp"):
        raise UsageError(f"at must be a datetime, not {at!r:.60}")
    if at is not None and delay:
        raise UsageError("delay and at both say when the job is due; give one of them")
    try:
        due = None if at is None else at.timestamp()
    except (ValueError, OverflowError, OSError) as error:  # a naive one that is before any time zone's year 1
        raise UsageError(f"at is out of range: {error}") from None
    if due is not None and due > time() + LONGEST_DELAY_S:
        raise UsageError(f"at is more than ten years from now: {at}")
    if id is not None and not (isinstance(id, str) and ID_PATTERN.fullmatch(id)):
        raise UsageError(f"an id is 1 to 64 letters, digits, - and _, not {id!r:.60}")
    for name, value in overrides.items():
        check_option(name, value)
        if name in ("isolated", "start"):
            raise UsageError(f"{name} is decided where the job is declared, not at dispatch")
    return DispatchOptions(delay, due, id, overrides)
