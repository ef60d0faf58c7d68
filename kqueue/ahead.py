"""Jobs that are reserved before their turn: those that wait for a process of the pool, beyond the slots that isolated jobs have.

While the pool's runs are short, this keeps its processes from waiting for the queue. While they are long, those that wait here
must keep neither another daemon from running them, nor jobs that are not for the pool from their slots. So whoever has waited too
long goes back to its queue as if it had not been reserved: what has not begun costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator
from typing import Any, Final

from .budget import MemoryBudget
from .execution.pool import Pool
from .kernel import Task, sleep

PATIENCE_S: Final = 1.0  # how long a job beyond the slots waits for its turn here,
SLOW_PATIENCE_S: Final = 5.0  # and where all are slow, so that those that are not for the pool can be found behind them
ELSEWHERE_S: Final = 1.0  # for which another daemon may have it then


class Ahead:
    """One for a runtime. `excess`: isolated jobs that are beyond their slots. `put_back`: end one that has not begun."""

    def __init__(self, pool: Pool, memory: MemoryBudget, excess: Callable[[], int], put_back: Callable[[Task], None]) -> None:
        self._pool = pool
        self._memory = memory
        self._excess = excess
        self._put_back = put_back
        self._is_watched = False

    def most(self) -> int:
        """How many may be reserved beyond the slots.

        Who only waits has memory booked all the same, of which most is for those that run.
        """
        return 0 if self._pool.is_slow and self._memory.is_half_used else self._pool.ahead

    @property
    def has_to_be_watched(self) -> bool:
        """Whether there is reason for `watch`, and nobody at it."""
        return not self._is_watched and self._excess() > 0

    def watch(self, nudge: Callable[[], None]) -> Generator[Any, Any, None]:
        """While there are jobs beyond the slots, give back those that do not have their turn soon. `nudge`: look for others."""
        self._is_watched = True
        while self._excess():
            waited = self._pool.waiting()
            yield sleep(SLOW_PATIENCE_S if self._pool.is_slow else PATIENCE_S)
            if waited & self._pool.waiting():
                self._pool.slow_down(ELSEWHERE_S)
                self._give_back(waited, self._excess())
                yield sleep(ELSEWHERE_S)
                nudge()
        self._is_watched = False

    def give_all_back(self) -> None:
        """Nothing more is to begin here."""
        self._give_back(self._pool.waiting())

    def _give_back(self, tasks: Container[Task], most: int | None = None) -> None:
        for task in self._pool.dismiss(tasks, most):
            self._put_back(task)
