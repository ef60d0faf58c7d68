"""What becomes of a job after an attempt: ack, release or bury. One pure function and the table it follows.

    counter     counts                                                      limit, then dead
    attempts    runs that ended by the job's own doing                      max_attempts
    crashes     deaths of its process                                       3
    recoveries  lost through no fault of its own                            10
    deferrals   nobody here knew the job, or its version (a rolling deploy)  20, every 30 s: ten minutes

A shutdown counts nothing. (Source: DELIVERY in the design.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

from .brokers.base import Lease, Settlement
from .codec import to_json
from .options import JobOptions
from .outcome import Outcome

MAX_CRASHES: Final = 3
MAX_RECOVERIES: Final = 10
MAX_DEFERRALS: Final = 20
DEFERRAL_S: Final = 30.0
POSTPONE_S: Final = 5.0
RECOVERY_CAP_S: Final = 60.0  # the longest wait of a job that was lost again and again
BACKOFF_BASE_S: Final = 2.0
BACKOFF_CAP_S: Final = 3600.0

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


class Verdict(NamedTuple):
    """`then`: "done", "retry", "released" or "dead", for people; `settlement`: for the broker."""

    then: str
    settlement: Settlement


def judge(lease: Lease, options: JobOptions, outcome: Outcome, strategy: str) -> Verdict:
    """What `outcome` of this attempt means for the job."""
    counters = lease.counters
    attempt = counters.attempts + counters.crashes + counters.recoveries + 1
    certificate = None
    if not outcome.ok or options.keep_result:
        certificate = to_json(outcome.certificate(attempt=attempt, strategy=strategy, ended_at=time.time()))
    if outcome.ok:
        settlement = Settlement(
            lease.token, lease.queue, "ack", counters, certificate=certificate, result=outcome.result, keep_s=options.keep_result,
            follow_ups=outcome.follow_ups,
        )  # fmt: skip
        return Verdict("done", settlement)
    base = Settlement(lease.token, lease.queue, "release", counters, certificate=certificate)
    if outcome.cause == "cancelled":
        return Verdict("released", base)
    counter = COUNTER_OF.get(outcome.cause)
    if outcome.cause == "exit" and outcome.error is None:
        counter = "crashes"  # os._exit, or an interpreter that died with a status: nobody raised SystemExit
    if counter is None:  # refused
        return Verdict("dead", base._replace(verb="bury"))
    counters = counters._replace(**{counter: getattr(counters, counter) + 1})
    base = base._replace(counters=counters)
    limits = {"attempts": options.max_attempts, "crashes": MAX_CRASHES, "recoveries": MAX_RECOVERIES}
    if getattr(counters, counter) >= limits[counter]:
        return Verdict("dead", base._replace(verb="bury"))
    if counter == "recoveries":  # at once the first time; what kills its template each time must not do so in a row
        again = counters.recoveries - 1
        return Verdict("released", base._replace(delay_s=min(RECOVERY_CAP_S, 2.0**again) if again else 0.0))
    return Verdict("retry", base._replace(delay_s=backoff_s(options, counters.attempts + counters.crashes)))


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


def move(lease: Lease, lane: str) -> Verdict:
    """For a job that stood in the wrong lane: into the right one, at its old place, at no cost."""
    return Verdict("released", Settlement(lease.token, lease.queue, "release", lease.counters, lane=lane))


def backoff_s(options: JobOptions, failures: int, uniform: float | None = None) -> float:
    """Seconds until the retry after `failures` failed runs (1 for the first).

    A list or number is taken as it is, the last entry for ever; the default is 2 s * 2**(failures - 1), at most an hour, times
    `uniform` in (0, 1] (None: a random one), which is full jitter: aws.amazon.com/builders-library, "Timeouts, retries and
    backoff with jitter".
    """
    declared = options.backoff
    if declared is not None:
        return float(declared) if isinstance(declared, (int, float)) else float(declared[min(failures, len(declared)) - 1])
    ceiling = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(failures - 1, 20))
    if uniform is None:
        uniform = (int.from_bytes(os.urandom(4), "big") + 1) / 2**32  # `random` would import hashlib
    return ceiling * uniform
