"""Poller: which task waits for which fd, over one `selectors` selector.

A registration lasts for one wait. Keeping it longer would save two epoll_ctl calls, and cost a hang: an fd that a
job closes and the next socket() hands out again looks registered here while epoll has forgotten it.
"""

from __future__ import annotations

import selectors
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .loop import Task

Answer = Callable[[dict[int, int]], Any]  # of {fd: ready events}, what the task is woken with


class _Waiter(NamedTuple):
    """One task that waits for one direction or both of one fd."""

    task: Task
    answer: Answer


class Poller:
    """fds and pidfds, and who waits for them. One waiter per fd and direction."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waiters: dict[int, dict[int, _Waiter]] = {}  # fd -> {READ and/or WRITE: waiter}

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, fd: int, events: int, task: Task, answer: Answer) -> None:
        """Let `task` wait for `events` of `fd`. RuntimeError when another task does; OSError when `fd` cannot be polled."""
        if type(fd) is not int:
            raise TypeError(f"a task waits for the number of an fd, not for {type(fd).__name__}: write .fileno()")
        if events not in (1, 2, 3):
            raise ValueError(f"a task waits for READ, WRITE or both, not for {events!r}")
        directions = self._waiters.get(fd, {})
        bits = [bit for bit in (1, 2) if events & bit]
        for bit in bits:
            if bit in directions:
                raise RuntimeError(
                    f"fd {fd} is already waited for by task {directions[bit].task.name!r}; "
                    "only one task may read, and one write, an fd"
                )
        if directions:
            self._modify(fd, events | sum(directions))
        else:
            self._selector.register(fd, events)
        self._waiters[fd] = {**directions, **dict.fromkeys(bits, _Waiter(task, answer))}

    def remove(self, fd: int, task: Task) -> None:
        """End what `task` waits for of `fd`, if anything. The fd may have been closed meanwhile."""
        directions = self._waiters.pop(fd, {})
        left = {bit: waiter for bit, waiter in directions.items() if waiter.task is not task}
        try:
            if left:
                self._waiters[fd] = left
                self._modify(fd, sum(left))
            elif directions:
                self._selector.unregister(fd)
        except (KeyError, OSError):
            return  # closed: who still waits for it has only his time-out

    def waiting(self, fd: int) -> list[Task]:
        """Who waits for `fd`: to be woken by who closes it, since epoll tells nobody."""
        return [waiter.task for waiter in self._waiters.get(fd, {}).values()]

    def _modify(self, fd: int, events: int) -> None:
        try:
            self._selector.modify(fd, events)
        except (KeyError, OSError):  # closed behind our back; its number may be another fd's by now
            self._selector.register(fd, events)

    def select(self, timeout_s: float | None) -> list[tuple[Any, int]]:
        """Wait for events up to `timeout_s` seconds (None: without end)."""
        return self._selector.select(timeout_s)

    def ready(self, events: list[tuple[Any, int]]) -> list[tuple[Task, Any]]:
        """The (task, value) pairs that these events wake, a task once."""
        found: dict[Task, tuple[Answer, dict[int, int]]] = {}
        for key, mask in events:
            for bit, waiter in self._waiters.get(key.fd, {}).items():
                if mask & bit:
                    fds = found.setdefault(waiter.task, (waiter.answer, {}))[1]
                    fds[key.fd] = fds.get(key.fd, 0) | bit
        return [(task, answer(fds)) for task, (answer, fds) in found.items()]

    def close(self) -> None:
        """Close the selector. Who waits stays noted, so that its generator is not collected."""
        self._selector.close()
