"""Time limits around several steps: `with timeout(seconds):`.

    with io.timeout(10):
        page = yield get(url)
        yield store(page)

Whatever the task waits for when the time is up, is interrupted, and TimedOut is raised at the end of the scope, so that nothing
within it mistakes that for an error of its own. Scopes nest: each ends by its own time, whichever is up first. What ends the
job, JobTimedOut and JobCancelled, passes through.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..kernel import traps
from ..kernel.loop import running
from .errors import TimedOut

if TYPE_CHECKING:
    from ..kernel.timers import Timer


class ScopeEnded(BaseException):
    """The time of a scope is up. Only that scope catches it: clean up, and let it pass."""


class timeout:
    """A scope of at most `seconds`, to be entered once. `expired` says whether its time ended it."""

    def __init__(self, seconds: float) -> None:
        if not seconds >= 0:
            raise UsageError(f"timeout() takes seconds, not {seconds!r}")
        self.seconds = seconds
        self.expired = False
        self._over: ScopeEnded | None = None  # what is raised in the task; None: it is not in the scope
        self._was_entered = False
        self._timer: Timer | None = None
        self._foreign: Any = None  # asyncio's own

    def __enter__(self) -> timeout:
        if self._was_entered:
            raise UsageError("a timeout scope is entered once: write io.timeout(...) where it begins")
        self._was_entered = True
        self._over = ScopeEnded(f"{self.seconds:g} s are over")
        kernel = running()
        if kernel is not None and kernel.current is not None:
            self._timer = kernel.interrupt_at(kernel.current, kernel.clock.monotonic() + self.seconds, self._over)
        elif traps.foreign_loop is not None:
            self._foreign = traps.foreign_loop.interrupt_in(self.seconds)
        else:
            raise UsageError("io.timeout() works in a running job only")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self.expired = error is not None and error is self._over
        elif self._foreign is not None:
            self.expired = self._foreign.ends(error)
        self._over = None  # its traceback knows this scope: a circle for the collector
        if self.expired:
            raise TimedOut(f"this took longer than the {self.seconds:g} s of its timeout scope") from None

    async def __aenter__(self) -> timeout:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)
