"""The memory broker for clients: the same process only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..brokers.base import Finding, Mark, NewJob, QueueStats, Row
from ..brokers.commands.memory import MemoryStore


class MemoryClient:
    """A MemoryStore behind the blocking protocol (`brokers.base.Store`)."""

    def __init__(self, store: MemoryStore, address: str = "memory://") -> None:
        self.address = address
        self._store = store

    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> list[bool]:
        return self._store.enqueue(jobs, max_depth)

    def show(self, id: str, queue: str | None = None) -> Row | None:
        return self._store.show(id)

    def list(self, state: str | None, queue: str | None, limit: int) -> list[Row]:
        return self._store.list(state, queue, limit)

    def stats(self) -> dict[str, QueueStats]:
        return self._store.stats()

    def cancel(self, id: str, certificate: bytes, queue: str | None = None) -> bool:
        return self._store.cancel(id, certificate)

    def retry(self, ids: Sequence[str], queue: str | None = None) -> Sequence[bool]:
        return self._store.retry(ids)

    def forget(self, ids: Sequence[str], queue: str | None = None) -> Sequence[bool]:
        return self._store.forget(ids)

    def dead(self, queue: str, after: Mark | None, until: Mark, limit: int) -> Sequence[Mark]:
        return self._store.dead(queue, after, until, limit)

    def last_dead(self, queue: str) -> Mark | None:
        return self._store.last_dead(queue)

    def documents(self, prefix: str) -> dict[str, bytes]:
        return self._store.documents(prefix)

    def publish(self, documents: Mapping[str, bytes]) -> None:
        self._store.publish(documents)

    def health(self) -> Sequence[Finding]:
        return []

    def version(self) -> str:
        return "memory of this process"

    def close(self) -> None:
        """Nothing to close."""
