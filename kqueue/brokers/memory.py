"""The memory broker: for tests, and for scripts that embed a runtime. Nothing survives the process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from ..kernel.traps import READ, wait_io
from .base import (
    LEASE_S,
    NO_RETENTION,
    Capabilities,
    NewJob,
    Opened,
    Owner,
    QueueStats,
    Reserved,
    Retention,
    Settlement,
    Swept,
    Take,
    Verb,
    nobody,
)
from .commands.memory import MemoryStore, shared_store

P = ParamSpec("P")
T = TypeVar("T")

def at_once(method: Callable[P, T]) -> Callable[P, Verb[T]]:
    """Make a verb of a method that never waits."""

    @wraps(method)
    def verb(*args: P.args, **kwargs: P.kwargs) -> Verb[T]:
        yield from ()
        return method(*args, **kwargs)

    return verb


class MemoryBroker:
    """A MemoryStore behind the ten verbs."""

    capabilities = Capabilities(durable=False)

    def __init__(self, store: MemoryStore | None = None, address: str = "memory://") -> None:
        self.address = address
        self.store = store or shared_store(address)
        self._owner = Owner("", "")
        self._lease_s = LEASE_S
        self._queues: Sequence[str] = ()
        self._retention = NO_RETENTION
        self._bell_fd = -1  # an eventfd: rung from any thread, even between two looks at the store

    @at_once
    def open(
        self, owner: Owner, queues: Sequence[str], lease_s: float, *, unsettled: Sequence[Settlement] = (), culprit: str = "",
        retention: Retention = NO_RETENTION, take: Take = nobody,
    ) -> Opened:  # fmt: skip
        self._owner, self._lease_s = owner, lease_s
        self._bell_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.store.bells.append(self._ring)
        self._queues, self._retention = queues, retention
        return Opened(*self.store.open(owner, lease_s, unsettled, culprit))

    @at_once
    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> list[bool]:
        return self.store.enqueue(jobs, max_depth)

    @at_once
    def reserve(self, queue: str, wants: Mapping[str, int]) -> Reserved:
        return self.store.reserve(self._owner, self._lease_s, queue, wants)

    @at_once
    def withdraw(self, queue: str) -> None:
        pass  # nobody is handed anything

    @at_once
    def settle(self, batch: Sequence[Settlement]) -> list[str]:
        return self.store.settle(batch)

    @at_once
    def renew(self) -> bool:
        return self.store.renew(self._owner, self._lease_s)

    @at_once
    def sweep(self) -> Swept:
        return self.store.sweep(self._lease_s, self._queues, self._retention)

    def wait(self, timeout_s: float | None) -> Verb[bool]:
        rang = yield wait_io(self._bell_fd, READ, timeout_s)
        if rang:
            os.eventfd_read(self._bell_fd)
        return bool(rang)

    @at_once
    def stats(self) -> dict[str, QueueStats]:
        return self.store.stats()

    @at_once
    def publish(self, documents: Mapping[str, bytes]) -> None:
        self.store.publish(documents)

    @at_once
    def documents(self, prefix: str) -> dict[str, bytes]:
        return self.store.documents(prefix)

    @at_once
    def close(self, *, give_up: bool = True) -> None:
        if give_up:
            self.store.close(self._owner.epoch)
        if self._bell_fd >= 0:
            self.store.bells.remove(self._ring)
            os.close(self._bell_fd)
            self._bell_fd = -1

    def _ring(self) -> None:
        os.eventfd_write(self._bell_fd, 1)
