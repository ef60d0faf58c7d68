"""What the slices of inline jobs cost everybody: time, which is reported, and memory, which is charged to the job that took it.

The process has one heap, so whose memory it is can only be seen by watching it grow: resident pages after a slice, less those
before. Reading them costs a microsecond, which is too much for each of 20,000 slices a second. So they are read

    after each slice longer than LONG_S, and otherwise every LOOK_S, while there is something to do at all;
    after each slice, once they have grown by SUSPICIOUS_MIB, until they grow by less than GROWING_MIB in a WINDOW_S.

What is freed in its own slices is taken off a job's account. It is cancelled when that exceeds its max_memory, and what a full
garbage collection sets free does not bring it down again. What this cannot see: memory that was taken and given back within a
slice; pages that were resident and free; growth that is slower than that, which is for `runtime.memory_limit`.

A slice is also long when the process did not get a CPU, or was stopped: that time is not held against the job (see promotion.py).
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Final

from . import events as facts
from .context import JobContext, job_in
from .errors import JobOutgrew
from .execution.inline import GRACE_S
from .process import PAGE, OwnStat

if TYPE_CHECKING:
    from collections.abc import Callable

    from .execution.instead import Standing
    from .kernel import Kernel, Task
    from .promotion import Promotions

MIB: Final = 1048576
LONG_S: Final = 0.001
LOOK_S: Final = 0.05
SUSPICIOUS_MIB: Final = 8.0
WINDOW_S: Final = 1.0
GROWING_MIB: Final = 0.25
LEAST_MIB: Final = 1.0  # no max_memory is smaller
EVERY_SLICE: Final = -1.0  # as max_slice_s of the kernel


class Slices:
    """Looks at the slices of `kernel`. `max_slice_s` (seconds): longer ones are reported."""

    def __init__(self, kernel: Kernel, events: facts.Events, promotions: Promotions, max_slice_s: float) -> None:
        self._kernel = kernel
        self._events = events
        self._promotions = promotions
        self._max_slice_s = max_slice_s
        self.standing: Callable[[], Standing | None] = lambda: None  # where the slice that ended just now stood while it was long
        self._own: OwnStat | None = None  # None: not started, or closed
        self._charged_mib: dict[Task, float] = {}
        self._seen_mib = 0.0  # at the last look
        self._calm_mib = 0.0  # at the last look that nothing was suspicious at
        self._close_until = 0.0  # by the clock: every slice is looked at until then; 0: it is not
        self._window_mib = 0.0  # where this window began
        self._waited_s = 0.0  # for a CPU, up to the last look

    def start(self) -> None:
        self._own = OwnStat()
        self._seen_mib = self._calm_mib = self._resident_mib()
        self._waited_s = self._own.waited_s()
        self._kernel.on_slow = self._look_after
        self._kernel.max_slice_s = LONG_S
        self._kernel.on_look, self._kernel.look_at = self._look, 0.0

    def close(self) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None

    def charged_mib(self, task: Task) -> float:
        """What `task` is charged with; 0: nothing was noticed."""
        return self._charged_mib.get(task, 0.0)

    def _resident_mib(self) -> float:
        return 0.0 if self._own is None else self._own.resident_pages() * PAGE / MIB

    # -- now and then -----------------------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        """A turn of the loop is over, and the last look was LOOK_S ago."""
        self._kernel.look_at = now + LOOK_S
        if self._own is None:
            return
        self._waited_s = self._own.waited_s()
        self._seen_mib = seen_mib = self._resident_mib()
        if self._charged_mib:
            self._charged_mib = {task: mib for task, mib in self._charged_mib.items() if not task.ended}
        if self._close_until:
            if now >= self._close_until:
                if seen_mib - self._window_mib >= GROWING_MIB:
                    self._watch_closely(now)
                else:
                    self._close_until, self._calm_mib = 0.0, seen_mib
                    self._kernel.max_slice_s = LONG_S
        elif seen_mib - self._calm_mib > SUSPICIOUS_MIB:
            self._watch_closely(now)
        elif seen_mib < self._calm_mib:
            self._calm_mib = seen_mib

    def _watch_closely(self, now: float) -> None:
        self._close_until, self._window_mib = now + WINDOW_S, self._seen_mib
        self._kernel.max_slice_s = EVERY_SLICE

    # -- after a slice ----------------------------------------------------------------------------------------------

    def _look_after(self, task: Task, seconds: float) -> None:
        """A slice of `task` was long, or each one is looked at."""
        if self._own is None:
            return
        seen_mib = self._resident_mib()
        grown_mib = seen_mib - self._seen_mib
        self._seen_mib = seen_mib
        if task.mark:
            if grown_mib:
                self._charge(task, grown_mib)
            if seconds > self._max_slice_s:
                self._report(task, seconds)

    def _charge(self, task: Task, grown_mib: float) -> None:
        charged_mib = self._charged_mib.get(task, 0.0) + grown_mib
        if charged_mib <= 0.0:
            self._charged_mib.pop(task, None)
            return
        self._charged_mib[task] = charged_mib
        if grown_mib < 0.0 or charged_mib < LEAST_MIB or task.grace_s is not None:
            return
        job = job_in(task.context)
        if job is None or not 0 < job.max_memory_mib < charged_mib or not task.where():  # nowhere: that was its last slice
            return
        gc.collect()
        seen_mib = self._resident_mib()
        charged_mib -= max(0.0, self._seen_mib - seen_mib)
        self._seen_mib, self._charged_mib[task] = seen_mib, charged_mib
        if charged_mib > job.max_memory_mib:
            self._cancel(task, job, charged_mib)

    def _cancel(self, task: Task, job: JobContext, charged_mib: float) -> None:
        why = (
            f"{job.name} has grown the daemon by {charged_mib:.0f} MiB, and its max_memory is {job.max_memory_mib:g} MiB: "
            "run it isolated=True, where that is its own, or raise max_memory"
        )
        self._kernel.cancel(task, JobOutgrew(why, charged_mib, job.max_memory_mib), GRACE_S)

    def _report(self, task: Task, seconds: float) -> None:
        job = job_in(task.context)
        if job is None or self._own is None:
            return
        standing = self.standing()
        is_ours = standing is not None and standing.is_ours
        where, instead = (task.where(), "") if standing is None else (str(standing), standing.instead)
        self._events.emit(facts.SlowSlice(job.id, job.name, seconds, where, instead))
        waited_s, self._waited_s = self._waited_s, self._own.waited_s()
        was_stopped = self._kernel.resumed_at > self._kernel.clock.monotonic() - seconds
        if not was_stopped and not is_ours and seconds - (self._waited_s - waited_s) > self._max_slice_s:
            self._promotions.blocked(job.name, seconds, where, instead)
