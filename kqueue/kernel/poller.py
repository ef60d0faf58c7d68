"""Poller: which task waits for which fd, over one `selectors` selector.

A registration lasts for one wait. Keeping it longer would save two epoll_ctl calls, and cost a hang: an fd that a
job closes and the next socket() hands out again looks registered here while epoll has forgotten it.
"""

from __future__ import annotations

import selectors
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .loop import Task

_EVENTS: Final = object()  # the waiter wants the ready events themselves


class _Waiter:
    """One task that waits for one direction or both of one fd."""

    __slots__ = ("as_mapping", "task", "value")

    def __init__(self, task: Task, value: Any, as_mapping: bool) -> None:
        self.task = task
        self.value = value
        self.as_mapping = as_mapping


class Poller:
    """fds and pidfds, and who waits for them. One waiter per fd and direction."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waiters: dict[int, dict[int, _Waiter]] = {}  # fd -> {READ and/or WRITE: waiter}

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, fd: int, events: int, task: Task, *, value: Any = _EVENTS, as_mapping: bool = False) -> None:
        """Let `task` wait for `events` of `fd`. RuntimeError when another task does; OSError when `fd` cannot be polled."""
        directions = self._waiters.get(fd)
        waiter = _Waiter(task, value, as_mapping)
        if directions is None:
            self._selector.register(fd, events)
            self._waiters[fd] = {bit: waiter for bit in (1, 2) if events & bit}
            return
        taken = next((directions[bit] for bit in (1, 2) if events & bit and bit in directions), None)
        if taken is not None:
            raise RuntimeError(
                f"fd {fd} is already waited for by task {taken.task.name!r}; only one task may read, and one write, an fd"
            )
        self._selector.modify(fd, events | sum(directions))
        directions.update({bit: waiter for bit in (1, 2) if events & bit})

    def remove(self, fd: int, events: int) -> None:
        """End a wait. The fd may have been closed meanwhile."""
        directions = self._waiters.get(fd)
        if directions is None:
            return
        for bit in (1, 2):
            if events & bit:
                directions.pop(bit, None)
        if directions:
            self._selector.modify(fd, sum(directions))
        else:
            del self._waiters[fd]
            self._selector.unregister(fd)

    def select(self, timeout_s: float | None) -> list[tuple[Any, int]]:
        """Wait for events up to `timeout_s` seconds (None: without end)."""
        return self._selector.select(timeout_s)

    def ready(self, events: list[tuple[Any, int]]) -> Iterator[tuple[Task, Any]]:
        """The (task, value) pairs that these events wake, a task once."""
        mappings: dict[Task, dict[int, int]] = {}
        for key, mask in events:
            directions = self._waiters.get(key.fd)
            if directions is None:
                continue
            seen: dict[Task, int] = {}
            for bit, waiter in directions.items():
                if mask & bit:
                    seen[waiter.task] = seen.get(waiter.task, 0) | bit
            for task, bits in seen.items():
                waiter = next(w for w in directions.values() if w.task is task)
                if waiter.as_mapping:
                    mappings.setdefault(task, {})[key.fd] = bits
                else:
                    yield task, bits if waiter.value is _EVENTS else waiter.value
        yield from mappings.items()

    def close(self) -> None:
        self._selector.close()
        self._waiters.clear()
