"""What becomes of a job after an attempt: ack, release or bury. One pure function and the tables it follows.

    counter     counts                                                      limit, then dead
    attempts    runs that ended by the job's own doing                      max_attempts, unless there is a retry_until
    crashes     deaths of its process                                       3
    recoveries  lost through no fault of its own                            10
    deferrals   nobody here knew the job, or its version (a rolling deploy)  20, every 30 s: ten minutes

A shutdown counts nothing. (Source: DELIVERY in the design.) What a job's options say of a run that failed by its own doing, or
whose process died, is asked in this order, and the first that has something to say decides:

    dead?   kqueue.Discard; "bury" in causes; dont_retry_on; retry_on      (kqueue.Retry passes the last three)
            the limits above, or the max_attempts that causes has for this cause
    when?   kqueue.Retry(delay); the backoff that causes has; the job's own: its function's answer, else what it declares
    dead?   retry_until, when it would be due only after that
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from .brokers.base import Counters, Lease, Settlement
from .codec import decode, to_json
from .options import JobOptions
from .outcome import Outcome
from .quarantine import APART_S
from .retries import BURY, COMPUTED, MAX_CRASHES
from .signing import unsigned

MAX_RECOVERIES: Final = 10
MAX_DEFERRALS: Final = 20
DEFERRAL_S: Final = 30.0
POSTPONE_S: Final = 5.0
RECOVERY_CAP_S: Final = 60.0  # the longest wait of a job that was lost again and again
BACKOFF: Final[Mapping[str, Any]] = {"base": 2.0, "factor": 2.0, "cap": 3600.0, "jitter": True}  # the default

# cause -> the counter it raises. "cancelled" raises none: it is a shutdown's doing, not the job's.
COUNTER_OF: Final[Mapping[str, str]] = {
    "exception": "attempts",
    "timeout": "attempts",
    "memory": "attempts",
    "cpu": "attempts",
    "exit": "attempts",
    "signal": "crashes",
    "lost": "recoveries",
}


# What a cause other than "exception" is an error of, for retry_on and dont_retry_on. The others are no error, but a death.
CLASSES_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "timeout": ("JobTimedOut", "BaseException"),
    "memory": ("MemoryError", "Exception", "BaseException"),
    "exit": ("SystemExit", "BaseException"),
}


class Verdict(NamedTuple):
    """`then`: "done", "retry", "released" or "dead", for people; `settlement`: for the broker."""

    then: str
    settlement: Settlement


def judge(
    lease: Lease, options: JobOptions, outcome: Outcome, strategy: str, now: float | None = None, *, convicted: bool = False
) -> Verdict:
    """What `outcome` of this attempt means for the job. `now`: seconds since 1970; None: by the clock.

    `convicted`: if it was lost, with its template, then by its own doing (see quarantine).
    """
    if now is None:
        now = time.time()
    counters, verb, delay_s, certificate = lease.counters, "ack", 0.0, None
    then, why, ok = "done", "", outcome.ok
    if not ok:
        then, counters, delay_s, why = _decide(lease, options, outcome, now, convicted)
        verb = "bury" if then == "dead" else "release"
    if not ok or options.keep_result:
        attempt = lease.counters.runs + 1
        certificate = to_json(outcome.certificate(attempt=attempt, strategy=strategy, ended_at=now, then=then, why=why))
    settlement = Settlement(
        lease.token, lease.queue, verb, counters, delay_s, None, certificate, outcome.result if ok else None,
        options.keep_result if ok else 0.0, outcome.follow_ups if ok else (),
    )  # fmt: skip
    return Verdict(then, settlement)


class _Decided(NamedTuple):
    then: str
    counters: Counters
    delay_s: float = 0.0
    why: str = ""  # for the certificate; "": it needs no saying


def _decide(lease: Lease, options: JobOptions, outcome: Outcome, now: float, convicted: bool) -> _Decided:
    """Of a run that did not end well."""
    if outcome.cause == "cancelled":
        return _Decided("released", lease.counters)
    counter = COUNTER_OF.get(outcome.cause)
    if outcome.cause == "exit" and outcome.error is None:
        counter = "crashes"  # os._exit, or an interpreter that died with a status: nobody raised SystemExit
    if outcome.cause == "lost" and convicted:
        counter = "crashes"
    if counter is None:  # refused
        return _Decided("dead", lease.counters)
    counters = lease.counters._replace(**{counter: getattr(lease.counters, counter) + 1})
    if outcome.cause == "memory":
        counters = counters._replace(memory=counters.memory + 1)
    if counter == "recoveries":
        return _lost(counters)
    policy = options.causes.get(outcome.cause, {})
    enqueued_at = _enqueued_at(lease) if options.retry_until is not None else 0.0
    until = enqueued_at + (options.retry_until or 0.0) if enqueued_at else None
    why = _unwanted(options, outcome, counter) or _spent(options, outcome.cause, counters, counter, timed=until is not None)
    if why:
        return _Decided("dead", counters, why=why)
    delay_s, note = _delay(options, policy, outcome, counters)
    if until is not None and now + delay_s > until:
        return _Decided("dead", counters, why=f"the retry would be due {now + delay_s - until:.3g} s after retry_until")
    return _Decided("retry", counters, delay_s, note)


def _lost(counters: Counters) -> _Decided:
    """At once the first time; what ends its template each time must not do so in a row."""
    if counters.recoveries >= MAX_RECOVERIES:
        return _Decided("dead", counters, why=f"it was lost {counters.recoveries} times")
    again = counters.recoveries - 1
    return _Decided("released", counters, min(RECOVERY_CAP_S, 2.0**again) if again else 0.0)


def _unwanted(options: JobOptions, outcome: Outcome, counter: str) -> str:
    """Why the job is not to be retried, however few attempts it has had; "": it may be."""
    cause = outcome.cause
    if outcome.asked == "discard":
        return "the job discarded itself"
    if outcome.asked == "retry":
        return ""
    if options.causes.get(cause) == BURY:
        return f"causes says to bury it after {cause}"
    if (cause in options.causes and cause != "exception") or counter == "crashes":
        return ""
    names = _classes(outcome)
    if not names:
        return ""
    unwanted = [name for name in names if name in (options.dont_retry_on or ())]
    if unwanted:
        return f"{names[0]} is not retried: {unwanted[0]} is in dont_retry_on"
    if options.retry_on is not None and not any(name in options.retry_on for name in names):
        return f"{names[0]} is not retried: it is none of retry_on ({', '.join(options.retry_on)})"
    return ""


def _classes(outcome: Outcome) -> Sequence[str]:
    """The names of the error's class and of its bases, nearest first; none where a run ended without an error."""
    if outcome.cause != "exception":
        return CLASSES_OF.get(outcome.cause, ())
    error = outcome.error or {}
    return error.get("mro") or [str(error.get("class", ""))]


def _spent(options: JobOptions, cause: str, counters: Counters, counter: str, *, timed: bool) -> str:
    """Why there is no attempt left; "": there is. `timed`: retry_until ends it, not max_attempts."""
    policy = options.causes.get(cause, {})
    own = policy.get("max_attempts") if isinstance(policy, Mapping) else None
    had = getattr(counters, counter)
    limit = own or (None if timed else options.max_attempts)
    if counter == "crashes":
        limit = min(MAX_CRASHES, own or MAX_CRASHES)
    if limit is None or had < limit:
        return ""
    what = "its process has died" if counter == "crashes" else "it has failed"
    rule = f"max_attempts in causes: {cause}" if own == limit else "the limit" if counter == "crashes" else "max_attempts"
    return f"{what} {'once' if had == 1 else f'{had} times'}, and {rule} is {limit}"


def _delay(options: JobOptions, policy: Any, outcome: Outcome, counters: Counters) -> tuple[float, str]:
    """Seconds until the retry, and what there is to say of them."""
    if outcome.asked == "retry" and outcome.retry_in_s is not None:
        return outcome.retry_in_s, ""
    failures = counters.attempts + counters.crashes
    if isinstance(policy, Mapping) and "backoff" in policy:
        return backoff_s(options._replace(backoff=policy["backoff"]), failures), ""
    declared: Any = options.backoff
    if not callable(declared) and declared != COMPUTED:
        return backoff_s(options, failures), ""
    if outcome.backoff_s is not None:
        return outcome.backoff_s, ""
    why = outcome.backoff_failed or "it was not asked, or did not answer"
    return backoff_s(options._replace(backoff=None), failures), f"the default backoff, since the job's own gave none: {why}"


def _enqueued_at(lease: Lease) -> float:
    """Seconds since 1970, by its dispatcher's clock; 0: whoever wrote the envelope did not say."""
    return decode(unsigned(lease.envelope), len(lease.envelope)).enqueued_at if lease.envelope is not None else 0.0


def exhausted(lease: Lease) -> tuple[Outcome, Verdict] | None:
    """What becomes of a job that has taken too many supervisors with it, or was lost with too many; None: it may run."""
    counters = lease.counters
    if counters.crashes >= MAX_CRASHES:
        why = f"its process died {counters.crashes} times while this job's own code ran"
    elif counters.recoveries >= MAX_RECOVERIES:
        why = f"it was lost {counters.recoveries} times, with the supervisor that had it"
    else:
        return None
    outcome = Outcome("lost", "supervisor", error={"class": "SupervisorLost", "message": why})
    certificate = outcome.certificate(attempt=counters.runs, strategy="none", ended_at=time.time(), then="dead", why=why)
    return outcome, Verdict("dead", Settlement(lease.token, lease.queue, "bury", counters, certificate=to_json(certificate)))


def defer(lease: Lease, reason: Outcome, *, bury: bool = False) -> Verdict:
    """For a job that nobody here can run yet: again in 30 s, dead after ten minutes (or at once)."""
    counters = lease.counters._replace(deferrals=lease.counters.deferrals + 1)
    base = Settlement(lease.token, lease.queue, "release", counters, delay_s=DEFERRAL_S)
    if bury or counters.deferrals > MAX_DEFERRALS:
        certificate = reason.certificate(attempt=counters.attempts + 1, strategy="none", ended_at=time.time())
        return Verdict("dead", base._replace(verb="bury", certificate=to_json(certificate), delay_s=0.0))
    return Verdict("released", base)


def postpone(lease: Lease) -> Verdict:
    """For a job whose attempt could not begin, since this host is short of something: again soon, at no cost."""
    return Verdict("released", Settlement(lease.token, lease.queue, "release", lease.counters, delay_s=POSTPONE_S))


def keep_apart(lease: Lease) -> Verdict:
    """For a suspect (see quarantine) that may not run beside those that do: again soon, at no cost."""
    return Verdict("released", Settlement(lease.token, lease.queue, "release", lease.counters, delay_s=APART_S))


def move(lease: Lease, lane: str) -> Verdict:
    """For a job that stood in the wrong lane: into the right one, at its old place, at no cost."""
    return Verdict("released", Settlement(lease.token, lease.queue, "release", lease.counters, lane=lane))


def put_back(lease: Lease) -> Verdict:
    """For a job that there is no memory for just now: at its old place in its lane, at no cost."""
    return move(lease, lease.lane)


def backoff_s(options: JobOptions, failures: int, uniform: float | None = None) -> float:
    """Seconds until the retry after `failures` failed runs (1 for the first).

    A list or number is taken as it is, the last entry for ever; the default is 2 s * 2**(failures - 1), at most an hour, times
    `uniform` in (0, 1] (None: a random one), which is full jitter: aws.amazon.com/builders-library, "Timeouts, retries and
    backoff with jitter". A dict sets base, factor, cap and jitter of that.
    """
    declared: Any = options.backoff
    if isinstance(declared, (int, float)):
        return float(declared)
    if declared is not None and not isinstance(declared, Mapping):
        return float(declared[min(failures, len(declared)) - 1])
    shape: dict[str, Any] = {**BACKOFF, **(declared or {})}
    try:
        ceiling: float = min(float(shape["cap"]), shape["base"] * float(shape["factor"]) ** (failures - 1))
    except OverflowError:  # beyond any cap
        ceiling = float(shape["cap"]) if shape["base"] else 0.0
    if not shape["jitter"]:
        return ceiling
    if uniform is None:
        uniform = (int.from_bytes(os.urandom(4), "big") + 1) / 2**32  # `random` would import hashlib
    return ceiling * uniform
