"""Accounting by job class: how its runs ended, what they took, and what that says of its limits. For `kqueue status` and `show`.

It hears of every job that ends, so that costs less than a microsecond; and there may be any number of them, so of numbers only
a histogram is kept, whose buckets grow by a fifth: what is read off it is up to a fifth too high, and never too low. All of it
is of this daemon, since its start.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log2
from typing import Any, Final

from ..events import Events, JobEnded
from ..outcome import Outcome
from ..registry import registry

MAX_CLASSES: Final = 500  # a class takes up to some 10 KB
STEPS: Final = 4  # buckets to the power of two
_FLOOR: Final = 40 * STEPS  # 2**-40 is the least that a bucket can tell from 0
_RAN: Final = frozenset(("ok", "exception", "timeout", "memory", "cpu", "signal", "exit"))  # those that say something of the job

MIN_RUNS: Final = 100  # before advice
MIN_SAVED: Final = 0.5  # a limit is left alone when less than this share of it would be saved
SMALL_MIB: Final = 96
SHORT_S: Final = 60.0
HIT_SHARE: Final = 0.01  # of the runs that a limit ended: more of them are worth a word


class Histogram:
    """How often numbers of a size came. 0 and less count as the least there is."""

    __slots__ = ("buckets", "count", "largest")

    def __init__(self) -> None:
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.largest = 0.0

    def add(self, number: float) -> None:
        bucket = int(log2(number) * STEPS + _FLOOR) if number > 1e-12 else 0
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        if number > self.largest:
            self.largest = number

    def quantile(self, share: float) -> float:
        """No less than `share` of the numbers are at most this. 0.0: there are none."""
        left = share * self.count
        for bucket in sorted(self.buckets):
            left -= self.buckets[bucket]
            if left <= 0:
                edge: float = 2.0 ** ((bucket + 1 - _FLOOR) / STEPS)
                return min(edge, self.largest)
        return 0.0

    def describe(self, digits: int) -> dict[str, float]:
        numbers = {"p50": self.quantile(0.5), "p99": self.quantile(0.99), "max": self.largest}
        return {name: round(number, digits) for name, number in numbers.items()}


class JobClass:
    """What is known of one."""

    __slots__ = ("causes", "cpu_s", "duration_s", "limits", "memory_mib")

    def __init__(self) -> None:
        self.causes: dict[str, int] = {}
        self.duration_s = Histogram()
        self.cpu_s: Histogram | None = None  # of isolated runs; None: there were none
        self.memory_mib: Histogram | None = None
        self.limits: Mapping[str, float] = {}  # of the last run that had any

    def add(self, outcome: Outcome) -> None:
        cause = outcome.cause
        self.causes[cause] = self.causes.get(cause, 0) + 1
        if cause not in _RAN:
            return
        self.duration_s.add(outcome.duration_s)
        if outcome.limits:
            self.limits = outcome.limits
        if outcome.pid is not None:
            if self.cpu_s is None or self.memory_mib is None:
                self.cpu_s, self.memory_mib = Histogram(), Histogram()
            self.cpu_s.add(outcome.cpu_user_s + outcome.cpu_system_s)
            if outcome.max_memory_mib:
                self.memory_mib.add(outcome.max_memory_mib)

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "ended": sum(self.causes.values()),
            "causes": dict(sorted(self.causes.items())),
            "duration_s": self.duration_s.describe(6),
            "cpu_s": None if self.cpu_s is None else self.cpu_s.describe(4),
            "memory_mib": None if not self.memory_mib or not self.memory_mib.count else self.memory_mib.describe(1),
            "advice": [text for text in (self._of_memory(), self._of_timeout()) if text],
        }

    # -- advice -----------------------------------------------------------------------------------------------------

    def _of_memory(self) -> str:
        limit, seen = self.limits.get("max_memory", 0), self.memory_mib
        if limit and self._hits("memory"):
            return f"max_memory: {self._hits('memory')} of {self.duration_s.count} runs needed more than {limit:g} MiB"
        if not limit or seen is None or seen.count < MIN_RUNS or limit <= SMALL_MIB:
            return ""
        p99 = seen.quantile(0.99)
        enough = _round_mib(max(1.25 * p99, seen.largest))
        if enough > (1 - MIN_SAVED) * limit:
            return ""
        return f"max_memory: p99 {p99:.0f} MiB of {limit:g}: {enough:g} would do"

    def _of_timeout(self) -> str:
        limit, seen = self.limits.get("timeout", 0), self.duration_s
        if limit and self._hits("timeout"):
            return f"timeout: {self._hits('timeout')} of {seen.count} runs took longer than {limit:g} s"
        if seen.count < MIN_RUNS or (limit and limit <= SHORT_S):
            return ""
        p99 = seen.quantile(0.99)
        enough = _round_s(max(4 * p99, 1.5 * seen.largest))
        if not limit:
            return f"timeout: there is none, and p99 is {p99:.3g} s: {enough:g} s would do"
        return f"timeout: p99 {p99:.3g} s of {limit:g}: {enough:g} s would do" if enough <= (1 - MIN_SAVED) * limit else ""

    def _hits(self, cause: str) -> int:
        """How many runs that limit ended; 0: so few that nobody need hear of it."""
        hits = self.causes.get(cause, 0)
        return hits if hits > 2 and hits > HIT_SHARE * self.duration_s.count else 0


class JobClasses:
    """Those of which a job has ended, by name. Only what is registered gets a place, so that no payload can fill the memory."""

    def __init__(self, events: Events) -> None:
        self._classes: dict[str, JobClass] = {}
        events.subscribe(JobEnded, self._count)

    def _count(self, fact: JobEnded) -> None:
        known = self._classes.get(fact.job)
        if known is None:
            if len(self._classes) >= MAX_CLASSES or registry.get(fact.job) is None:
                return
            known = self._classes[fact.job] = JobClass()
        known.add(fact.outcome)

    @property
    def names(self) -> list[str]:
        return sorted(self._classes)

    def describe(self, name: str) -> dict[str, Any]:
        """One class, as JSON values; some 50 µs. One of which no job has ended is described as that."""
        return (self._classes.get(name) or JobClass()).describe()


def _round_mib(size: float) -> float:
    """Up to 32, 48, 64, 96, 128, 192, 256 …"""
    step = 32.0
    while size > step:
        if size <= 1.5 * step:
            return 1.5 * step
        step *= 2
    return step


def _round_s(seconds: float) -> float:
    """Up to 5, 10, 15, 20, 30, 45 s, 1, 1.5, 2, 3, 5, 10, 15, 20, 30 min, and whole hours."""
    for step in (5.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 900.0, 1200.0, 1800.0):
        if seconds <= step:
            return step
    return 3600.0 * -(-seconds // 3600.0)
