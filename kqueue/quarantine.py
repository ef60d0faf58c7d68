"""Jobs that were lost again and again are kept apart, since one of them may be what ends the daemon, or the template, each time.

The slice page names an inline job whose own code ran when the daemon died. It names nobody when a thread or a child of a job did
it, or a job that was not on the loop just then. Then all that ran are lost, and each of them is a suspect:

    recoveries   suspects of that many that run at once, whatever else runs
    0, 1         no suspect
    2            64
    3            8
    4 and more   1: if the daemon dies now it was this one, which is a crash

So of a thousand neighbours few are lost more often than four times, and the one is dead after three crashes more. Who has to
wait is put back into its queue for a second, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .instance import SlicePage
    from .settling import Held

AT_ONCE: Final = (0, 0, 64, 8, 1)  # by recoveries; the last for all that are more. 0: it is no suspect
APART_S: Final = 1.0  # until one that had to wait is looked at again


class Quarantine:
    """One for a runtime. `page` outlives the process; None: nobody will read it. `now`: the kernel's clock, seconds."""

    def __init__(self, page: SlicePage | None, now: Callable[[], float]) -> None:
        self._page = page
        self._now = now
        self._due_at = 0.0  # by when those that had to wait are certainly due again
        self._suspects: dict[Held, int] = {}  # those that run -> how many of its kind may

    def admits(self, held: Held) -> bool:
        """Whether it may run now. Then it must `leave`."""
        at_once = _at_once(held)
        if not at_once:
            return True
        if len(self._suspects) >= min([at_once, *self._suspects.values()]):
            self._due_at = self._now() + 2 * APART_S
            return False
        self._suspects[held] = at_once
        if at_once == 1 and self._page is not None:
            self._page.suspect(held.lease.token.id)
        return True

    def opens_in_s(self) -> float | None:
        """Seconds until those that had to wait are due again, at the latest; None: there are none."""
        left_s = self._due_at - self._now()
        return left_s if left_s > 0 else None

    def suspects(self, held: Held) -> bool:
        """Whether it is to share a process with no other job."""
        return held in self._suspects

    def convicts(self, held: Held) -> bool:
        """Whether nobody else can be the reason, if its run was lost."""
        return self._suspects.get(held) == 1

    def leave(self, held: Held) -> None:
        """It has ended, if it had begun."""
        if self._suspects.pop(held, 0) == 1 and self._page is not None:
            self._page.suspect("")


def _at_once(held: Held) -> int:
    return AT_ONCE[min(held.lease.counters.recoveries, len(AT_ONCE) - 1)]
