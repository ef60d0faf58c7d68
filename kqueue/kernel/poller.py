"""Poller: which task waits for which fd, over one epoll. (`selectors` would cost as much again for each wait as epoll itself.)

A registration lasts for one wait. Keeping it longer would save two epoll_ctl calls, and cost a hang: an fd that a
job closes and the next socket() hands out again looks registered here while epoll has forgotten it.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from .loop import Task

AT_ONCE: Final = 32  # events of one turn: epoll has the others ready for the next one, and no turn is as long as all of them
_MASK: Final = (0, select.EPOLLIN, select.EPOLLOUT, select.EPOLLIN | select.EPOLLOUT)  # by READ and WRITE
_NOT_READ: Final = ~select.EPOLLIN
_NOT_WRITE: Final = ~select.EPOLLOUT

Answer = Callable[[dict[int, int]], Any]  # of {fd: ready events}, what the task is woken with


class _Waiter(NamedTuple):
    """One task that waits for `events` of one fd."""

    events: int
    task: Task
    answer: Answer


class Poller:
    """fds and pidfds, and who waits for them. One waiter per fd and direction."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._waiters: dict[int, tuple[_Waiter, ...]] = {}  # by fd; one, or one that reads and one that writes

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, fd: int, events: int, task: Task, answer: Answer) -> None:
        """Let `task` wait for `events` of `fd`. RuntimeError when another task does; OSError when `fd` cannot be polled."""
        if type(fd) is not int:
            raise TypeError(f"a task waits for the number of an fd, not for {type(fd).__name__}: write .fileno()")
        if events not in (1, 2, 3):
            raise ValueError(f"a task waits for READ, WRITE or both, not for {events!r}")
        waiters = self._waiters.get(fd)
        new = _Waiter(events, task, answer)
        if waiters is None:
            self._register(fd, events)
            self._waiters[fd] = (new,)
            return
        for waiter in waiters:
            if waiter.events & events:
                raise RuntimeError(
                    f"fd {fd} is already waited for by task {waiter.task.name!r}; only one task may read, and one write, an fd"
                )
        self._modify(fd, events | sum(waiter.events for waiter in waiters))
        self._waiters[fd] = (*waiters, new)

    def remove(self, fd: int, task: Task) -> None:
        """End what `task` waits for of `fd`, if anything. The fd may have been closed meanwhile."""
        waiters = self._waiters.pop(fd, None)
        if waiters is None:
            return
        left = tuple(waiter for waiter in waiters if waiter.task is not task)
        try:
            if left:
                self._waiters[fd] = left
                self._modify(fd, sum(waiter.events for waiter in left))
            else:
                self._epoll.unregister(fd)
        except (OSError, ValueError):  # ValueError: this poller itself was closed
            return  # closed: who still waits for it has only his time-out

    def waiting(self, fd: int) -> list[Task]:
        """Who waits for `fd`: to be woken by who closes it, since epoll tells nobody."""
        return [waiter.task for waiter in self._waiters.get(fd, ())]

    def _register(self, fd: int, events: int) -> None:
        try:
            self._epoll.register(fd, _MASK[events])
        except FileExistsError:  # somebody was woken by its close, and it was not closed after all
            self._epoll.modify(fd, _MASK[events])

    def _modify(self, fd: int, events: int) -> None:
        try:
            self._epoll.modify(fd, _MASK[events])
        except FileNotFoundError:  # closed behind our back; its number is another fd's by now
            self._epoll.register(fd, _MASK[events])

    def select(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Wait for events up to `timeout_s` seconds (None: without end): (fd, what epoll says of it)."""
        # poll() itself rounds up to milliseconds, so the loop does not spin through the last part of one.
        return self._epoll.poll(timeout_s, AT_ONCE)

    def ready(self, events: list[tuple[int, int]]) -> list[tuple[Task, Any]]:
        """The (task, value) pairs that these events wake, a task once."""
        found: dict[Task, tuple[Answer, dict[int, int]]] = {}
        for fd, mask in events:
            ready = (1 if mask & _NOT_WRITE else 0) | (2 if mask & _NOT_READ else 0)  # an error wakes who waits for either
            for waiter in self._waiters.get(fd, ()):
                bits = ready & waiter.events
                if bits:
                    fds = found.setdefault(waiter.task, (waiter.answer, {}))[1]
                    fds[fd] = fds.get(fd, 0) | bits
        return [(task, answer(fds)) for task, (answer, fds) in found.items()]

    def close(self) -> None:
        """Close the epoll. Who waits stays noted, so that its generator is not collected."""
        self._epoll.close()
