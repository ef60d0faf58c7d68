"""The options that say whether, when and how a failed job is retried: what each may be, and what a job may ask for itself.

What they amount to for one run is `verdict.judge`. Here is what a declaration, a dispatch and a child need of it, so nothing here
knows a broker, a clock or a job. What comes back from a check is plain JSON values, but for a backoff function, which stays with
its job's code: a manifest has COMPUTED in its place, and no envelope can carry it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, Final

from .errors import Discard, Retry, UsageError, nearest

LONGEST_DELAY_S: Final = 10 * 366 * 86400.0  # longer is a slip of the pen
COMPUTED: Final = "computed"  # stands for a backoff function where its code is not
BURY: Final = "bury"
CAUSES: Final = ("exception", "timeout", "memory", "cpu", "signal", "exit")  # those that may have a policy of their own
MAX_CRASHES: Final = 3  # deaths of a job's process, then it is dead, whatever its options say
MAX_GROW: Final = 100

_SHAPE: Final = {"base": "seconds", "factor": "a number of at least 1", "cap": "seconds", "jitter": "True or False"}
_POLICY: Final = ("max_attempts", "backoff", "grow")
_ASYNC: Final = 0x20 | 0x80 | 0x200  # inspect.CO_GENERATOR, CO_COROUTINE and CO_ASYNC_GENERATOR, without inspect


def is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def is_wait(value: Any) -> bool:
    """Whether it is a number of seconds that somebody can mean."""
    return is_number(value) and bool(0 <= value <= LONGEST_DELAY_S)


def plain_seconds(value: Any) -> Any:
    """A timedelta as seconds; anything else as it is."""
    return value.total_seconds() if hasattr(value, "total_seconds") else value


# -- checks: each returns what to keep, or raises UsageError ------------------------------------------------------------------


def check_backoff(value: Any) -> Any:
    """None, seconds, a list of seconds, a dict with the keys of _SHAPE, or a function (attempt, error) -> seconds."""
    if value is None or is_wait(value):
        return value
    if isinstance(value, (list, tuple)) and value and all(map(is_wait, value)):
        return value
    if isinstance(value, Mapping):
        return _check_shape(value)
    if callable(value) and not isinstance(value, type):
        _check_function(value)
        return value
    raise UsageError(
        f"backoff must be seconds, a list of seconds, a dict of {', '.join(_SHAPE)}, or a function (attempt, error) -> seconds, "
        f"not {value!r:.60}"
    )


def _check_shape(value: Mapping[Any, Any]) -> dict[str, Any]:
    for key, given in value.items():
        if key not in _SHAPE:
            raise UsageError(f"backoff has no {key!r:.40}{_near(key, _SHAPE)}; it has {', '.join(_SHAPE)}")
        fits = type(given) is bool if key == "jitter" else is_number(given) and given >= 1 if key == "factor" else is_wait(given)
        if not fits:
            raise UsageError(f"backoff: {key} must be {_SHAPE[key]}, not {given!r:.60}")
    return dict(value)


def _check_function(function: Callable[..., Any]) -> None:
    """As far as it can be seen without calling it: `inspect` would see more, and cost the supervisor 1.2 MB."""
    bound = hasattr(function, "__func__")
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return
    if code.co_flags & _ASYNC:
        raise UsageError("backoff must be a plain function: it is called when the job has failed, and cannot wait")
    takes = code.co_argcount - bound
    varies = bool(code.co_flags & 0x04)  # *args
    required = takes - len(getattr(function, "__defaults__", None) or ())
    if required > 2 or (takes < 2 and not varies):
        names = ", ".join(code.co_varnames[: code.co_argcount])
        hint = "; there is no instance when it is called: make it a @staticmethod" if names.startswith("self") else ""
        raise UsageError(f"backoff is called as backoff(attempt, error), and this one is {function.__name__}({names}){hint}")


def check_names(option: str, value: Any) -> tuple[str, ...] | None:
    """Names of exception classes, of one or a list of classes and names. None, or an empty list: it says nothing."""
    if value is None:
        return None
    listed = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    names = []
    for each in listed:
        if isinstance(each, type) and issubclass(each, BaseException):
            each = each.__name__
        if isinstance(each, str) and "." in each:
            bare = each.rpartition(".")[2]
            raise UsageError(f"{option}: classes are told apart by their bare name, so write {bare!r}, not {each!r:.80}")
        if not (isinstance(each, str) and each.isidentifier()):
            raise UsageError(f"{option} must be exception classes or their names, not {each!r:.60}")
        names.append(each)
    if option == "retry_on" and not names:
        raise UsageError("retry_on is empty, which would retry nothing: write max_attempts=1 for that")
    return tuple(dict.fromkeys(names)) or None


def check_retry_until(value: Any) -> float | None:
    """None, or seconds after the enqueueing."""
    seconds = plain_seconds(value)
    if hasattr(value, "timestamp"):
        raise UsageError("retry_until of a declaration is seconds or a timedelta after the enqueueing; a dispatch has dates")
    if value is not None and not (is_wait(seconds) and seconds > 0):
        raise UsageError(f"retry_until must be seconds or a timedelta after the enqueueing, above 0, not {value!r:.60}")
    return None if value is None else seconds


def check_causes(value: Any) -> dict[str, Any]:
    """By cause: "bury", or a dict with keys of _POLICY."""
    if not isinstance(value, Mapping):
        raise UsageError(f'causes must be a dict by cause, as in {{"timeout": "bury"}}, not {value!r:.60}')
    return {cause: _check_policy(cause, policy) for cause, policy in value.items()}


def _check_policy(cause: Any, policy: Any) -> Any:
    if cause not in CAUSES:
        raise UsageError(f"causes: there is no policy for {cause!r:.40}{_near(cause, CAUSES)}; there is for {', '.join(CAUSES)}")
    if policy == BURY:
        return policy
    where = f"causes: {cause}"
    if not isinstance(policy, Mapping):
        raise UsageError(f'{where} must be "bury" or a dict of {", ".join(_POLICY)}, not {policy!r:.60}')
    for key in policy:
        if key not in _POLICY:
            raise UsageError(f"{where} has no {key!r:.40}{_near(key, _POLICY)}; it has {', '.join(_POLICY)}")
        if key == "grow" and cause != "memory":
            raise UsageError(f"{where} cannot grow: that is how much more max_memory the next run gets, and for memory only")
    attempts, grow = policy.get("max_attempts", 1), policy.get("grow", 1)
    if type(attempts) is not int or attempts < 1:
        raise UsageError(f"{where}: max_attempts must be an integer of at least 1, not {attempts!r:.60}")
    if cause == "signal" and attempts > MAX_CRASHES:
        raise UsageError(f"{where}: max_attempts is at most {MAX_CRASHES}, since a job whose process died so often is dead")
    if not (is_number(grow) and 1 <= grow <= MAX_GROW):
        raise UsageError(f"{where}: grow must be a number from 1 to {MAX_GROW}, not {grow!r:.60}")
    try:
        kept = {**policy, "backoff": check_backoff(policy["backoff"])} if "backoff" in policy else dict(policy)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if callable(kept.get("backoff")):
        raise UsageError(f"{where}: backoff cannot be a function; the job's own backoff may be one")
    return kept


def _near(word: Any, known: Any) -> str:
    return nearest(word, list(known)) if isinstance(word, str) else ""


# -- what a job asks for when it fails --------------------------------------------------------------------------------------


def asked_by(error: BaseException) -> tuple[str, float | None]:
    """("retry", seconds or None), ("discard", None), or ("", None) for an error that asks for nothing."""
    if isinstance(error, Discard):
        return "discard", None
    if isinstance(error, Retry):
        return "retry", error.delay_s if is_wait(error.delay_s) else None
    return "", None


def needs_backoff(error: BaseException) -> bool:
    """Whether a retry after `error` would wait for as long as the job's backoff says."""
    asked, delay_s = asked_by(error)
    return asked != "discard" and delay_s is None


def ask_backoff(function: Callable[..., Any], attempt: int, error: BaseException) -> tuple[float | None, str]:
    """What a backoff function says: (seconds, ""), or (None, why it said nothing of use). Never raises."""
    try:
        value = plain_seconds(function(attempt, error))
        if is_wait(value):
            return float(value), ""
        return None, f"it returned {value!r:.80}, which is no number of seconds"
    except BaseException as failure:  # whatever it is, it must not hide the error that the job failed with
        try:
            return None, f"it raised {type(failure).__name__}: {failure}"[:200]
        except BaseException:
            return None, f"it raised {type(failure).__name__}"


def grown(max_memory: int, causes: Mapping[str, Any], deaths: int) -> int:
    """MiB for the next run of a job that ran out of memory `deaths` times."""
    policy = causes.get("memory")
    grow = policy.get("grow", 1) if isinstance(policy, Mapping) else 1
    return min(_LARGEST_MIB, int(max_memory * float(grow) ** min(deaths, 64))) if deaths > 0 else max_memory


_LARGEST_MIB: Final = 1 << 30  # a PiB, which an rlimit still holds
