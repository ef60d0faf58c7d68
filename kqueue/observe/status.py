"""Status: what the supervisor is doing now, as the one document that `kqueue status --json` prints (see INTERFACES).

    {"pid", "version", "uptime_s", "state", "memory_mib", "processed", "failed", "retried", "killed",
     "forgotten", "leases_lost",
     "running": [{"id", "job", "strategy", "pid", "elapsed_s", "memory_mib", "progress"}],
     "queues": {NAME: {"ready", "delayed", "leased", "dead"}},
     "loop": {"lag_ms_p50", "lag_ms_p99", "turns_per_s"},
     "memory_budget": {"total_mib", "used_mib", "waiting": {"id", "queue", "max_memory"} or null} or null,
     "jobs": {NAME: {"lane", "why", "blocked": {"seconds", "where", "at", "by"} | null, "ended", "causes": {CAUSE: N},
                     "duration_s": {"p50", "p99", "max"}, "cpu_s": the same | null, "memory_mib": the same | null,
                     "advice": [TEXT]}}}

It looks, and never touches. Whoever asks, however often, costs the broker one count a second; while the broker is away, the
counts are the last ones known.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final

from .. import __version__
from .. import events as facts
from ..brokers.base import QueueStats
from ..context import JobContext
from ..kernel import Park, Task
from ..process import resident_mib
from ..registry import registry
from ..runtime import KQueueRuntime
from ..settling import Held
from .classes import JobClasses

Steps = Generator[Any, Any, Any]

COUNTS_AGE_S: Final = 1.0  # counts of the queues are not asked for again before
COUNTS_RARITY: Final = 20  # nor before so many times what they took: SQLite needs 0.15 s for a million jobs
COUNTS_PATIENCE_S: Final = 1.0  # with a broker that does not answer
SLICE: Final = 500  # running jobs described in one turn of the loop
SLICE_CLASSES: Final = 20  # job classes


class Status:
    """Counts what `runtime` tells, and describes it on request. `command` is for the control socket."""

    def __init__(self, runtime: KQueueRuntime) -> None:
        self._runtime = runtime
        self._began = runtime.kernel.clock.monotonic()
        self._retried = 0
        self._killed = 0
        self._forgotten = 0
        self._leases_lost = 0
        self._counts: dict[str, QueueStats] = {}
        self._count_again_at = 0.0  # by the kernel's clock
        self._counting: Task | None = None
        self._marks = ((self._began, 0), (self._began, 0))  # (when, turns of the loop) at the last two heartbeats
        self._classes = JobClasses(runtime.events)
        runtime.events.subscribe(facts.JobEnded, self._count_job)
        runtime.events.subscribe(facts.DeadForgotten, self._count_forgotten)
        runtime.events.subscribe(facts.LeaseLost, self._count_lost)
        runtime.events.subscribe(facts.DaemonReady, self._name_queues)
        runtime.events.subscribe(facts.Heartbeat, self._mark)

    def command(self, request: Mapping[str, Any]) -> Steps:
        """The document."""
        runtime = self._runtime
        queues = yield from self._queues()
        running = yield from self._running()
        jobs = yield from self._jobs()
        return {
            "pid": os.getpid(),
            "version": __version__,
            "uptime_s": round(self._now() - self._began, 1),
            "state": runtime.state,
            "memory_mib": round(resident_mib(), 1),
            "processed": runtime.processed,
            "failed": runtime.failed,
            "retried": self._retried,
            "killed": self._killed,
            "forgotten": self._forgotten,
            "leases_lost": self._leases_lost,
            "running": running,
            "queues": {name: counts._asdict() for name, counts in sorted(queues.items())},
            "loop": self._loop(),
            "memory_budget": runtime.memory.status(),
            "jobs": jobs,
        }

    def _now(self) -> float:
        return self._runtime.kernel.clock.monotonic()

    # -- what facts tell --------------------------------------------------------------------------------------------

    def _count_job(self, fact: facts.JobEnded) -> None:
        outcome = fact.outcome
        self._retried += fact.then == "retry"
        self._killed += outcome.pid is not None and outcome.cause not in ("ok", "refused") and outcome.ended_by != "job"

    def _count_lost(self, fact: facts.LeaseLost) -> None:
        self._leases_lost += 1

    def _count_forgotten(self, fact: facts.DeadForgotten) -> None:
        self._forgotten += fact.jobs

    def _name_queues(self, fact: facts.DaemonReady) -> None:
        self._counts.update(dict.fromkeys(fact.queues, QueueStats()))  # a queue that nobody used is worth a line of zeros

    def _mark(self, fact: facts.Heartbeat) -> None:
        self._marks = (self._marks[1], (self._now(), self._runtime.kernel.turns))

    # -- what is looked up ------------------------------------------------------------------------------------------

    def _running(self) -> Steps:
        rows = []
        waiting = self._runtime.isolated.pool.waiting()  # which have not begun
        for position, held in enumerate(sorted(self._runtime.held, key=lambda held: held.started), 1):
            if held.context is not None and not held.task.ended and held.task not in waiting:
                rows.append(self._row(held, held.context))
            if position % SLICE == 0:
                yield
        return rows

    def _row(self, held: Held, context: JobContext) -> dict[str, Any]:
        id = held.lease.token.id
        pid = held.context.pid if held.context is not None else None  # None: in the supervisor, or not forked yet
        return {
            "id": id,
            "job": held.job,
            "strategy": held.strategy,
            "pid": pid,
            "elapsed_s": round(self._now() - held.started, 3),
            "memory_mib": None if pid is None else round(resident_mib(pid), 1),
            "progress": context.fraction,
        }

    def _queues(self) -> Steps:
        if self._now() >= self._count_again_at and self._runtime.state not in ("starting", "stopped"):
            if self._counting is None or self._counting.ended:
                self._counting = self._runtime.kernel.spawn(self._count(), name="queue counts")
            yield Park(self._counting.joiners, COUNTS_PATIENCE_S)
        return self._counts

    def _count(self) -> Steps:
        began = self._now()
        try:
            counts = yield from self._runtime.broker.stats()
        except Exception:  # whatever is wrong with the broker, those who work with it say so; a look must not end the daemon
            return
        self._counts = {**dict.fromkeys(self._counts, QueueStats()), **counts}
        self._count_again_at = self._now() + max(COUNTS_AGE_S, COUNTS_RARITY * (self._now() - began))

    def _jobs(self) -> Steps:
        found = {}
        for position, name in enumerate(sorted({*self._classes.names, *self._runtime.promotions.names}), 1):
            found[name] = {**self._where(name), **self._classes.describe(name)}
            if position % SLICE_CLASSES == 0:
                yield
        return found

    def _where(self, name: str) -> dict[str, Any]:
        """Where jobs of a class run, and why."""
        registration, promotions = registry.get(name), self._runtime.promotions
        if registration is None:
            return {"lane": None, "why": None, "blocked": None}
        return {"lane": registration.lane, "why": promotions.why(registration), "blocked": promotions.details(name)}

    def _loop(self) -> dict[str, float]:
        since, turns = self._marks[0]
        lags_s = self._runtime.kernel.lag_s()
        seconds = self._now() - since
        return {
            "lag_ms_p50": round(_quantile(lags_s, 0.5) * 1000, 3),
            "lag_ms_p99": round(_quantile(lags_s, 0.99) * 1000, 3),
            "turns_per_s": round((self._runtime.kernel.turns - turns) / seconds, 1) if seconds > 0 else 0.0,
        }


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0
