"""The reference: a broker's whole semantics as plain structures. No I/O, no loop; a lock, because clients have threads.

The other brokers must behave as this one does; the conformance suite holds them to it. It has two clocks, which a test can move:
`clock` (seconds since 1970) says when jobs are due, results go and dead letters are old; `ticks`, which never jumps, says which
epochs are alive.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ...errors import QueueFull
from ..base import (
    LEASE_S,
    MAX_CERTIFICATES,
    NO_RETENTION,
    SETTLED,
    STALE,
    Counters,
    Lease,
    Mark,
    NewJob,
    Owner,
    QueueStats,
    Reserved,
    Retention,
    Row,
    Settlement,
    Swept,
    Token,
    last_of_dead,
    listed,
    lost,
    numbered,
    place,
)


class _Job:
    """A job and all that changes about it."""

    __slots__ = (
        "available_at", "certificates", "counters", "died_at", "envelope", "epoch", "expires_at", "id", "lane", "number",
        "priority", "queue", "result", "state",
    )  # fmt: skip

    def __init__(self, new: NewJob, available_at: float) -> None:
        self.id = new.id
        self.queue = new.queue
        self.lane = new.lane
        self.priority = new.priority
        self.envelope: bytes | None = new.envelope
        self.available_at = available_at
        self.state = ""
        self.counters = Counters()
        self.number = 0  # of the last reservation; raised by a settlement too, so that a token settles once
        self.epoch = ""  # that holds it
        self.certificates: list[bytes] = []
        self.result: bytes | None = None
        self.expires_at = 0.0  # when a done job's result goes
        self.died_at = 0.0  # when a dead one died

    def die(self, now: float) -> None:
        self.state, self.died_at = "dead", now

    def row(self) -> Row:
        return Row(
            self.id, self.queue, self.state, self.lane, self.priority, self.available_at, self.counters, self.envelope,
            self.result, tuple(self.certificates),
        )  # fmt: skip


class _Epoch:
    """An owner that may hold leases."""

    __slots__ = ("identity", "lapsed", "lapses_at", "lease_s")

    def __init__(self, owner: Owner, lease_s: float, lapses_at: float, lapsed: bool = False) -> None:
        self.identity = owner.identity
        self.lease_s = lease_s
        self.lapses_at = lapses_at  # by `ticks`; 0: it was given up
        self.lapsed = lapsed  # once, and its owner has not been told


class MemoryStore:
    """Jobs of all queues. Each method is atomic. Without `ticks`, `clock` is both clocks."""

    def __init__(self, clock: Callable[[], float] = time.time, ticks: Callable[[], float] | None = None) -> None:
        self.clock = clock
        self.ticks = ticks or (time.monotonic if clock is time.time else clock)
        self.bells: list[Callable[[], None]] = []  # rung after something may have become ready; called with the lock held
        self._lock = threading.RLock()
        self._documents: dict[str, bytes] = {}
        self._jobs: dict[str, _Job] = {}
        # Heaps, whose entries are skipped when the job stands elsewhere by the time they surface.
        self._ready: dict[tuple[str, str], list[tuple[float, str]]] = {}  # (queue, lane) -> (place, id)
        self._delayed: dict[str, list[tuple[float, str]]] = {}  # queue -> (available_at, id)
        self._done: list[tuple[float, str]] = []  # (expires_at, id)
        self._leased: dict[str, set[str]] = {}  # epoch -> ids
        self._epochs: dict[str, _Epoch] = {}
        self._beat_at: float | None = None  # by `ticks`: when somebody last renewed or swept

    # -- the daemon's verbs -----------------------------------------------------------------------------------------

    def open(
        self, owner: Owner, lease_s: float, unsettled: Sequence[Settlement] = (), culprit: str = ""
    ) -> tuple[dict[str, int], list[str]]:
        """What was recovered, by queue, and the answers to `unsettled`."""
        with self._lock:
            answers = self.settle(unsettled)
            dead = [epoch for epoch, of in self._epochs.items() if of.identity and of.identity == owner.identity]
            self.renew(owner, lease_s)
            return self._recover([epoch for epoch in dead if epoch != owner.epoch], culprit), answers

    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> list[bool]:
        with self._lock:
            if max_depth:
                for queue in {job.queue for job in jobs}:
                    stats = self.stats().get(queue, QueueStats())
                    if stats.ready + stats.delayed + sum(job.queue == queue for job in jobs) > max_depth:
                        raise QueueFull(f"queue {queue!r} holds {stats.ready + stats.delayed} jobs, allowed are {max_depth}")
            fresh = []
            for new in jobs:
                fresh.append(new.id not in self._jobs)
                if fresh[-1]:
                    job = _Job(new, self.clock() + new.delay_s if new.at is None else new.at)
                    self._jobs[new.id] = job
                    self._stand(job)
            self._ring()
            return fresh

    def reserve(self, owner: Owner, lease_s: float, queue: str, wants: Mapping[str, int]) -> Reserved:
        with self._lock:
            now = self.clock()
            epoch = owner.epoch
            if not self._is_alive(epoch):
                self._epochs[epoch] = _Epoch(owner, lease_s, self.ticks() + lease_s, lapsed=True)
            self._move_due(queue)
            leases = []
            for lane, want in wants.items():
                heap = self._ready.get((queue, lane), [])
                while heap and want > 0:
                    at, id = heapq.heappop(heap)
                    job = self._jobs.get(id)
                    if job is None or job.state != "ready" or job.lane != lane or at != place(job.available_at, job.priority):
                        continue  # it stands elsewhere by now
                    job.state, job.epoch, job.number = "leased", epoch, job.number + 1
                    self._leased.setdefault(epoch, set()).add(id)
                    token = Token(epoch, id, job.number)
                    leases.append(Lease(token, queue, lane, job.envelope, job.counters, job.available_at))
                    want -= 1
            return Reserved(leases, self._next_due_s(queue, now))

    def settle(self, batch: Sequence[Settlement]) -> list[str]:
        with self._lock:
            return [self._settle(item) for item in batch]

    def renew(self, owner: Owner, lease_s: float) -> bool:
        """Whether it was alive all the time since it was last asked."""
        with self._lock:
            alive = self._is_alive(owner.epoch) and not self._epochs[owner.epoch].lapsed
            self._beat(lease_s)
            self._epochs[owner.epoch] = _Epoch(owner, lease_s, self.ticks() + lease_s)
            return alive

    def sweep(self, lease_s: float = LEASE_S, queues: Sequence[str] = (), retention: Retention = NO_RETENTION) -> Swept:
        """All there is to do. `retention` holds for `queues`."""
        with self._lock:
            self._beat(lease_s)
            now = self.clock()
            for queue in list(self._delayed):
                self._move_due(queue)
            while self._done and self._done[0][0] <= now:
                at, id = heapq.heappop(self._done)
                if id in self._jobs and self._jobs[id].expires_at == at:
                    del self._jobs[id]
            holders = [*self._epochs, *(epoch for epoch in self._leased if epoch not in self._epochs)]
            recovered = self._recover([epoch for epoch in holders if not self._is_alive(epoch)])
            return Swept(recovered, self._retire(queues, retention))

    def stats(self) -> dict[str, QueueStats]:
        with self._lock:
            counts: dict[str, QueueStats] = {}
            for job in self._jobs.values():
                if job.state != "done":
                    stats = counts.get(job.queue, QueueStats())
                    counts[job.queue] = stats._replace(**{job.state: getattr(stats, job.state) + 1})
            return counts

    def publish(self, documents: Mapping[str, bytes]) -> None:
        with self._lock:
            self._documents.update(documents)

    def close(self, epoch: str) -> None:
        with self._lock:
            if epoch in self._epochs:
                self._epochs[epoch].lapses_at = 0.0

    # -- for clients ------------------------------------------------------------------------------------------------

    def show(self, id: str) -> Row | None:
        with self._lock:
            job = self._jobs.get(id)
            return None if job is None else job.row()

    def retry(self, ids: Sequence[str]) -> list[bool]:
        """Make dead jobs ready now, as if they had never run, but for their certificates; for each whether it was dead."""
        with self._lock:
            dead = []
            for id in ids:
                job = self._jobs.get(id)
                dead.append(job is not None and job.state == "dead")
                if job is not None and job.state == "dead":
                    job.counters, job.available_at = Counters(), self.clock()
                    self._stand(job)
            self._ring()
            return dead

    def forget(self, ids: Sequence[str]) -> list[bool]:
        """Delete dead jobs; for each whether it was dead."""
        with self._lock:
            dead = []
            for id in ids:
                dead.append(id in self._jobs and self._jobs[id].state == "dead")
                if dead[-1]:
                    del self._jobs[id]
            return dead

    def list(self, state: str | None, queue: str | None, limit: int) -> list[Row]:
        with self._lock:
            jobs = [j for j in self._jobs.values() if listed(j.state, state) and queue in (None, j.queue)]
            if state == "dead":
                jobs.sort(key=lambda j: (j.died_at, j.id), reverse=True)
            else:
                jobs.sort(key=lambda j: (place(j.available_at, j.priority), j.id))
            rows = [job.row() for job in jobs[:limit]]
            return [row._replace(certificates=last_of_dead(row)) for row in rows]

    def cancel(self, id: str, certificate: bytes) -> bool:
        with self._lock:
            job = self._jobs.get(id)
            if job is None or job.state not in ("ready", "delayed"):
                return False
            job.certificates = [*job.certificates, certificate][-MAX_CERTIFICATES:]
            job.number += 1
            job.die(self.clock())
            return True

    def dead(self, queue: str, after: Mark | None, until: Mark, limit: int) -> Sequence[Mark]:
        """Where dead jobs stand, as `Store.dead` has it."""
        with self._lock:
            marks = sorted(Mark(job.died_at, job.id) for job in self._jobs.values() if job.state == "dead" and job.queue == queue)
            return [mark for mark in marks if (after is None or mark > after) and mark <= until][:limit]

    def last_dead(self, queue: str) -> Mark | None:
        with self._lock:
            dead = (Mark(job.died_at, job.id) for job in self._jobs.values() if job.state == "dead" and job.queue == queue)
            return max(dead, default=None)

    def documents(self, prefix: str) -> dict[str, bytes]:
        with self._lock:
            return {key: value for key, value in self._documents.items() if key.startswith(prefix)}

    # -- inside -----------------------------------------------------------------------------------------------------

    def _stand(self, job: _Job) -> None:
        """Put `job` where its available_at says: ready, or delayed."""
        if job.available_at > self.clock():
            job.state = "delayed"
            heapq.heappush(self._delayed.setdefault(job.queue, []), (job.available_at, job.id))
        else:
            job.state = "ready"
            heap = self._ready.setdefault((job.queue, job.lane), [])
            heapq.heappush(heap, (place(job.available_at, job.priority), job.id))

    def _move_due(self, queue: str) -> None:
        delayed = self._delayed.get(queue, [])
        while delayed and delayed[0][0] <= self.clock():
            at, id = heapq.heappop(delayed)
            if self._is_delayed(id, at):
                self._stand(self._jobs[id])

    def _next_due_s(self, queue: str, now: float) -> float | None:
        delayed = self._delayed.get(queue, [])
        while delayed and not self._is_delayed(delayed[0][1], delayed[0][0]):
            heapq.heappop(delayed)
        return max(0.0, delayed[0][0] - now) if delayed else None

    def _is_delayed(self, id: str, at: float) -> bool:
        job = self._jobs.get(id)
        return job is not None and job.state == "delayed" and job.available_at == at

    def _settle(self, item: Settlement) -> str:
        job = self._jobs.get(item.token.id)
        if job is None or job.number != item.token.number or job.epoch != item.token.epoch or job.state in ("done", "dead"):
            return STALE
        if item.verb == "hold":
            job.state = "leased"  # where it stood before, its entry in a heap is skipped
            self._leased.setdefault(job.epoch, set()).add(job.id)
            return SETTLED
        self._leased.get(job.epoch, set()).discard(job.id)
        job.number += 1
        job.epoch = ""
        if item.certificate is not None:
            job.certificates = [*job.certificates, item.certificate][-MAX_CERTIFICATES:]
        if item.verb == "ack":
            self.enqueue(item.follow_ups)
            if item.keep_s > 0:
                job.state, job.result, job.expires_at = "done", item.result, self.clock() + item.keep_s
                heapq.heappush(self._done, (job.expires_at, job.id))
            else:
                del self._jobs[job.id]
        elif item.verb == "bury":
            job.counters = item.counters
            job.die(self.clock())
        else:
            job.counters = item.counters
            job.lane = item.lane or job.lane
            if item.delay_s > 0:
                job.available_at = self.clock() + item.delay_s
            self._stand(job)
            self._ring()
        return SETTLED

    def _is_alive(self, epoch: str) -> bool:
        return epoch in self._epochs and self._epochs[epoch].lapses_at > self.ticks()

    def _beat(self, lease_s: float) -> None:
        """Note that somebody renews or sweeps. When nobody could for half a lease, nobody is to blame for it: all get a lease."""
        now, last = self.ticks(), self._beat_at
        if last is not None and now - last > lease_s / 2:
            for epoch in self._epochs.values():
                if epoch.lapses_at:
                    epoch.lapses_at = max(epoch.lapses_at, now + epoch.lease_s)
        self._beat_at = now

    def _recover(self, epochs: Sequence[str], culprit: str = "") -> dict[str, int]:
        recovered: dict[str, int] = {}
        for epoch in epochs:
            for id in self._leased.pop(epoch, ()):
                job = self._jobs[id]
                counter = "crashes" if id == culprit else "recoveries"
                certificate = numbered(lost(self.clock(), id == culprit), job.counters.runs + 1)
                job.certificates = [*job.certificates, certificate][-MAX_CERTIFICATES:]
                job.counters = job.counters._replace(**{counter: getattr(job.counters, counter) + 1})
                recovered[job.queue] = recovered.get(job.queue, 0) + 1
                self._stand(job)
            self._epochs.pop(epoch, None)
        if recovered:
            self._ring()
        return recovered

    def _retire(self, queues: Sequence[str], retention: Retention) -> dict[str, int]:
        """Drop dead letters of `queues` that are too old, and the oldest of those that are too many."""
        forgotten: dict[str, int] = {}
        if not any(retention):
            return forgotten
        for queue in dict.fromkeys(queues):
            dead = [job for job in self._jobs.values() if job.queue == queue and job.state == "dead"]
            dead.sort(key=lambda job: (job.died_at, job.id))
            too_many = max(0, len(dead) - retention.max_count) if retention.max_count else 0
            for rank, job in enumerate(dead):
                too_old = bool(retention.max_age_s) and job.died_at <= self.clock() - retention.max_age_s
                if rank < too_many or too_old:
                    del self._jobs[job.id]
                    forgotten[queue] = forgotten.get(queue, 0) + 1
        return forgotten

    def _ring(self) -> None:
        for bell in self.bells:
            bell()


_stores: dict[str, MemoryStore] = {}


def shared_store(url: str) -> MemoryStore:
    """The store that everyone in this process who says `url` means."""
    return _stores.setdefault(url, MemoryStore())
