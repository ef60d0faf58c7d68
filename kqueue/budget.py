"""The memory budget: which isolated job may start, so that what all that run may use stays within what there is. Arithmetic only.

A job that does not fit just now goes back to its place in the broker, at no cost, and waits there. Until it fits no other
isolated job is reserved: those would take what is freed for it, one small piece after the other, for ever. Then its queue is
asked first. Inline jobs are no matter of this.

    fits -> booked -> given back at its end
    does not fit -> waiting -> its release is settled -> so much is free -> asked for
    never fits -> buried
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from .hostmemory import Budget
from .registry import registry


class Waiting(NamedTuple):
    """The job that is next, and the only one that may be."""

    key: Hashable
    queue: str
    id: str
    need_mib: int
    released: bool = False  # the broker has it again


class MemoryBudget:
    """`most_mib`: what no job may have more of, 0: anything. Where there is no budget (0), everything fits."""

    def __init__(self, budget: Budget, most_mib: int) -> None:
        self.budget = budget
        self.total_mib = budget.total_mib
        self.used_mib = 0
        self.waiting: Waiting | None = None
        self._most_mib = most_mib
        self._booked: dict[Hashable, int] = {}

    def capped(self, need_mib: int) -> int:
        return min(need_mib, self.total_mib or need_mib)

    def why_never(self, need_mib: int) -> str:
        """Why a job of so much can never run here; "": it can."""
        if not self.total_mib or need_mib <= self.total_mib:
            return ""
        basis = f" ({self.budget.basis})" if self.budget.basis else ""
        return (
            f"its max_memory is {need_mib} MiB, and isolated.memory_budget is {self.total_mib} MiB{basis}: it can never run here"
        )

    def take(self, key: Hashable, queue: str, id: str, need_mib: int) -> bool:
        """Book it; False when it has to wait. What came along with one that waits has to, as well."""
        if self.total_mib and (self.waiting is not None or self.used_mib + need_mib > self.total_mib):
            if self.waiting is None:
                self.waiting = Waiting(key, queue, id, need_mib)
            return False
        self._booked[key] = need_mib
        self.used_mib += need_mib
        return True

    def give(self, key: Hashable) -> None:
        """It has ended; or it never began."""
        self.used_mib -= self._booked.pop(key, 0)

    def released(self, key: Hashable) -> None:
        """The broker has a job again that did not fit, or somebody else has it."""
        if self.waiting is not None and self.waiting.key == key:
            self.waiting = self.waiting._replace(released=True)

    def next_up(self) -> str | None:
        """The queue of the job that waited, once it fits. It is not waited for any longer: whoever is first there now, is."""
        waiting = self.waiting
        if waiting is None or not waiting.released or self.used_mib + waiting.need_mib > self.total_mib:
            return None
        self.waiting = None
        return waiting.queue

    @property
    def is_half_used(self) -> bool:
        return bool(self.total_mib) and 2 * self.used_mib > self.total_mib

    def room(self, running: int) -> int | None:
        """How many more isolated jobs may be asked for, while `running` are; None: any number."""
        if not self.total_mib:
            return None
        if self.waiting is not None:
            return 0
        least_mib = max(1, self._least_mib())
        unknown = max(0, running - len(self._booked))  # those that were reserved, and not looked into yet
        room = (self.total_mib - self.used_mib) // least_mib - unknown
        return max(room, 0 if running else 1)  # one that never fits has to come, to be buried

    def _least_mib(self) -> int:
        """What the smallest isolated job declares; a dispatch may ask for less, and then waits for that much."""
        declared = [registration.options.max_memory for registration in registry if registration.isolated]
        least = min(declared, default=1)
        return min(least, self._most_mib or least)

    def status(self) -> dict[str, Any] | None:
        """For `kqueue status --json`; None: there is no budget."""
        if not self.total_mib:
            return None
        waiting = self.waiting
        told = None if waiting is None else {"id": waiting.id, "queue": waiting.queue, "max_memory": waiting.need_mib}
        return {"total_mib": self.total_mib, "used_mib": self.used_mib, "waiting": told}
