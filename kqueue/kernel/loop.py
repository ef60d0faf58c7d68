"""The loop: tasks are ready, parked or ended; the kernel steps the ready ones and sleeps until a parked one may go on.

    spawn -> ready -> (step) -> parked -> wake -> ready -> ... -> ended | abandoned

A turn of the loop is: wait for events, wake whom they concern, wake whose timer is due, then step every task that was ready
at that moment, once. A task that a step makes ready has its turn next time, so nobody starves. Within a step, a
trap that answers at once resumes the task directly, at most MAX_IMMEDIATE times.

Cancelling is one `throw`. The task may still use traps while it cleans up, for its grace; after that it is abandoned: the
kernel never resumes it, and keeps a reference, because letting a generator that yields in a `finally` be collected
raises in a place nobody can catch. Whoever owns the work learns of it by `on_end`.
"""

from __future__ import annotations

import sys
import types
from _thread import _local as ThreadLocal  # not of threading, which nothing else here needs
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from math import inf
from mmap import mmap
from struct import Struct
from typing import Any, Final

from .clock import Clock
from .poller import Poller
from .timers import ANY_WAIT, Timer, Timers
from .traps import PARKED, Trap

MAX_IMMEDIATE: Final = 64
MARK: Final = Struct("64s")
LAG_SAMPLES: Final = 512  # turns that lag_s() looks back on

_turning: Final = ThreadLocal()  # .kernel: the one whose turn it is in this thread

Steps = Generator[Any, Any, Any] | Coroutine[Any, Any, Any]


class Abandoned(Exception):
    """A cancelled task did not end within its grace, and will never be resumed."""


class Task:
    """One generator or coroutine that the kernel drives."""

    __slots__ = (
        "_joiners", "context", "ended", "error", "generator", "grace_s", "mark", "name", "on_end", "on_wait", "parked", "undo",
        "value", "wait_number",
    )  # fmt: skip

    def __init__(self, generator: Steps, name: str, context: Context) -> None:
        self.generator = generator
        self.name = name
        self.context = context  # every step runs in it, so context variables never leak into another task
        self.value: Any = None  # what the next step sends; once ended, what it returned
        self.error: BaseException | None = None  # what the next step throws; once ended, what it raised
        self.mark = ""  # foreign code runs in it: what `Kernel.page` says meanwhile, at most as long as a MARK. Empty: none does
        self.parked = False  # False: in the ready queue, being stepped, or ended
        self.ended = False
        self.wait_number = 0  # rises with every wake, so that timers of earlier waits are stale
        self.undo: Callable[[], None] | None = None  # takes back what the trap registered; None: nothing
        self._joiners: deque[Task] | None = None
        self.on_end: Callable[[Task], None] | None = None  # called once, whatever the end; None: nobody cares
        self.on_wait: Callable[[Task], None] | None = None  # called once, after the first step that does not end it
        self.grace_s: float | None = None  # set by the first cancel; None: never cancelled

    @property
    def joiners(self) -> deque[Task]:
        """Who waits for its end. Made when it is first asked for: an empty deque is 700 bytes, and few tasks are joined."""
        if self._joiners is None:
            self._joiners = deque()
        return self._joiners

    def __repr__(self) -> str:
        state = "ended" if self.ended else "parked" if self.parked else "ready"
        return f"<Task {self.name!r} {state}>"

    def where(self) -> str:
        """The innermost line at which it stands, as "file:line in function"; empty when it has ended."""
        inner: Any = self.generator
        place = ""
        while inner is not None:
            frame = getattr(inner, "gi_frame", None) or getattr(inner, "cr_frame", None)
            if frame is not None and frame.f_code is not Trap.__await__.__code__:  # `await trap` stands in there
                place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
            inner = getattr(inner, "gi_yieldfrom", None) or getattr(inner, "cr_await", None)
        return place


class Kernel:
    """Drives tasks until `run`'s own task has ended.

    `max_slice_s` (seconds): a step longer than that is reported to `on_slow(task, seconds)`; 0 turns it off, and
    less than 0 reports every step.
    `on_crash(task)` hears of a task that raised and that nobody joined; the default prints the traceback.
    """

    def __init__(self, *, clock: Clock | None = None, max_slice_s: float = 0.0) -> None:
        self.clock = clock or Clock()
        self.poller = Poller()
        self.timers = Timers()
        self.current: Task | None = None
        self.abandoned: list[Task] = []
        self.max_slice_s = max_slice_s
        self.on_slow: Callable[[Task, float], None] = lambda task, seconds: None
        self.on_crash: Callable[[Task], None] = _print_crash
        self.turns = 0
        self.page: mmap | None = None  # says which task runs, for whoever looks when this process has died; None: nobody will
        self.slice_began = 0.0  # by the clock: the step of a marked task that runs now, or ran last
        self.resumed_at = -inf  # by the clock: when the process last went on after it had been stopped (SIGCONT)
        self.look_at = inf  # by the clock: `on_look(now)` is called at the end of the first turn after that, or of the next
        self._puts_off = False  # that look for one turn: something has just come, and should not wait for it
        self.on_look: Callable[[float], None] = lambda now: None
        self.unwatched = False  # `watch` is to be called before the next step of a marked task
        self.watch: Callable[[], None] = lambda: None
        self.locals: dict[Any, Any] = {}  # what others keep with this kernel, by keys of their own; see `close`
        self._ready: deque[Task] = deque()
        self._turn_s: deque[float] = deque(maxlen=LAG_SAMPLES)

    # -- what traps and owners call ---------------------------------------------------------------------------------

    def spawn(self, generator: Steps, *, name: str = "", context: Context | None = None) -> Task:
        """Make `generator` a task and put it at the back of the ready queue."""
        if not hasattr(generator, "send"):
            raise TypeError(f"spawn() takes a generator or a coroutine, not {type(generator).__name__}")
        context = copy_context() if context is None else context  # an empty one is falsy
        task = Task(generator, name or getattr(generator, "__name__", "task"), context)
        self._ready.append(task)
        return task

    def wake(self, task: Task, value: Any = None, error: BaseException | None = None) -> None:
        """Resume a parked task with `value`, or by raising `error` at its trap. Does nothing for one that is not parked."""
        if not task.parked:
            return
        task.parked = False
        task.wait_number += 1
        task.value, task.error = value, error
        try:
            self._take_back(task)
        finally:  # the undo of `run` may cancel the very task that is calling us
            self._ready.append(task)

    def wake_at(self, task: Task, when: float, value: Any = None) -> None:
        """Wake `task` from the wait it is about to begin with `value` at `when` (clock seconds), unless something else does."""
        self.timers.add(when, Timer(task, task.wait_number, value, None))

    def unpark(
        self, queue: deque[Task], value: Any = None, *, error: BaseException | None = None, count: int | None = None
    ) -> int:
        """Wake up to `count` tasks (None: all) that stand in `queue`, the longest waiting first. Returns how many."""
        woken = 0
        while queue and woken != count:
            task = queue[0]
            self.wake(task, value, error)
            if queue and queue[0] is task:  # its undo did not take it out
                queue.popleft()
            woken += 1
        return woken

    def throw_at(self, task: Task, when: float, error: BaseException, grace_s: float) -> Timer:
        """Cancel `task` with `error` and `grace_s` at `when`, whatever it waits for then. `Timer.cancel` takes it back."""
        timer = Timer(task, ANY_WAIT, grace_s, error)
        self.timers.add(when, timer)
        return timer

    def cancel(self, task: Task, error: BaseException, grace_s: float = 1.0) -> None:
        """Raise `error` at the trap where `task` stands; if it has not ended `grace_s` seconds later, abandon it.

        A value that was already on its way to the task is dropped. A second cancel of the same task throws again,
        but does not prolong its grace.
        """
        if task.ended:
            return
        self.condemn(task, grace_s)
        if task.parked:
            self.wake(task, error=error)
        elif task is self.current:
            raise error
        else:
            task.value, task.error = None, error

    def interrupt_at(self, task: Task, when: float, error: BaseException) -> Timer:
        """Raise `error` at the trap where `task` stands at `when`, unless it is being cancelled. `Timer.cancel` takes it back.

        Unlike a cancel it condemns nobody: the task may catch it and go on. And it drops no value that is on its way.
        """
        timer = Timer(task, ANY_WAIT, None, error, interrupts=True)
        self.timers.add(when, timer)
        return timer

    def interrupt(self, task: Task, error: BaseException) -> None:
        """The same at once, or as soon as the task waits again."""
        self._interrupt(Timer(task, ANY_WAIT, None, error, interrupts=True))

    def condemn(self, task: Task, grace_s: float) -> None:
        """Abandon `task` if it has not ended in `grace_s` seconds. For `cancel`, and for who throws into it by other means."""
        if task.grace_s is None:
            task.grace_s = grace_s
            why = Abandoned(f"{task.name} ignored its cancellation for {grace_s:g} s")
            self.timers.add(self.clock.monotonic() + grace_s, Timer(task, ANY_WAIT, None, why))

    def lag_s(self) -> list[float]:
        """How long the last turns kept everybody else waiting, in seconds, sorted."""
        return sorted(self._turn_s)

    # -- driving ----------------------------------------------------------------------------------------------------

    def run(self, main: Steps) -> Any:
        """Drive everything until `main` has ended; returns its value or raises its error. Other tasks stay as they are."""
        task = self.spawn(main)
        task.on_end = lambda ended: None  # its error is raised here, so it is not a crash
        while not task.ended:
            self.turn()
        if task.error is not None:
            raise task.error
        return task.value

    def turn(self) -> None:
        """One turn of the loop."""
        before, _turning.kernel = running(), self
        try:
            self._turn()
        finally:
            _turning.kernel = before

    def _turn(self) -> None:
        clock = self.clock
        events = clock.select(self.poller, self._patience_s())
        began = clock.monotonic()
        if events:
            for task, value in self.poller.ready(events):
                self.wake(task, value)
        for timer in self.timers.pop_due(began):
            if not timer.stale:
                self._fire(timer)
        for _ in range(len(self._ready)):
            self._step(self._ready.popleft())
        self.turns += 1
        now = clock.monotonic()
        self._turn_s.append(now - began)
        if now >= self.look_at:
            self._puts_off = bool(self._ready) and not self._puts_off
            if not self._puts_off:
                self.on_look(now)

    def close(self) -> None:
        """Release the selector, and what is in `locals`. Tasks that have not ended are kept referenced, never closed."""
        close_locals(self.locals)
        self.poller.close()

    def _patience_s(self) -> float | None:
        if self._ready:
            return 0
        deadline = self.timers.next_deadline()
        if deadline is None:
            return None
        return max(0.0, deadline - self.clock.monotonic())

    def _fire(self, timer: Timer) -> None:
        task = timer.task
        if task is None:
            return
        if isinstance(timer.error, Abandoned):
            if task.parked or timer.value:
                self._abandon(task, timer.error)
            else:  # it is about to run, since the loop was late perhaps: once more it may
                timer.value = True
                self.timers.add(self.clock.monotonic(), timer)
        elif timer.interrupts:
            self._interrupt(timer)
        elif timer.error is not None:
            if task.grace_s is None:  # else it is cleaning up already, and its end is in sight
                self.cancel(task, timer.error, grace_s=timer.value)
        else:
            self.wake(task, timer.value)

    def _interrupt(self, timer: Timer) -> None:
        task = timer.task
        if task is None or task.ended or task.grace_s is not None:
            return
        if task.parked:
            self.wake(task, error=timer.error)
        elif task.value is None and task.error is None and task is not self.current:
            task.error = timer.error
        else:  # it is about to run, with what it has been given
            self.timers.add(self.clock.monotonic(), timer)

    def _step(self, task: Task) -> None:
        """Run `task` until it parks, gives way or ends."""
        if task.ended:
            return
        began = self.clock.monotonic() if self.max_slice_s else 0.0
        ended, value, error = True, None, None
        page = None
        if task.mark:
            page = self.page
            if page is not None:
                MARK.pack_into(page, 0, task.mark.encode("utf-8", "surrogateescape"))
            self.slice_began = began
            if self.unwatched:
                self.watch()
        self.current = task
        try:
            self._advance(task)
            ended = False
        except StopIteration as end:
            value = end.value
        except BaseException as failure:
            error = failure
        if page is not None:
            page[0] = 0
        self.current = None
        if self.max_slice_s and (took := self.clock.monotonic() - began) > self.max_slice_s:
            self.on_slow(task, took)
        if ended:
            self._end(task, value, error)
        elif task.on_wait is not None:
            on_wait, task.on_wait = task.on_wait, None
            on_wait(task)

    def _advance(self, task: Task) -> None:
        """Resume `task` until it is parked or at the back of the ready queue. Raises what its generator raises."""
        run = task.context.run
        value, error = task.value, task.error
        task.value = task.error = None
        for _ in range(MAX_IMMEDIATE):
            if error is None:
                trap = run(task.generator.send, value)
            else:
                thrown, error = error, None
                trap = run(task.generator.throw, thrown)
            if trap is None:
                value = None
                break
            if not isinstance(trap, Trap):
                error = TypeError(_instead(trap))
                continue
            try:
                value = trap.arm(self, task)
            except BaseException as refusal:  # raised at the line that yielded the trap
                self._take_back(task)
                task.wait_number += 1
                error = refusal
                continue
            if value is PARKED:
                task.parked = True
                return
        task.value, task.error = value, error
        self._ready.append(task)

    def _end(self, task: Task, value: Any, error: BaseException | None) -> None:
        task.ended = True
        task.parked = False
        task.value, task.error = value, error
        heard = self.unpark(task._joiners, value, error=error) if task._joiners else 0
        task.on_wait = None
        on_end, task.on_end = task.on_end, None  # its owner most often holds the task: a circle for the collector
        task.context = _ENDED  # stale timers keep the task for a while, and it would keep all that its job had
        if on_end is not None:
            try:
                on_end(task)
            except Exception as failure:  # the owner's own fault, and no reason to stop everybody else
                task.error = failure
                self.on_crash(task)
        elif error is not None and not heard and task.grace_s is None:
            self.on_crash(task)

    def _abandon(self, task: Task, why: Abandoned) -> None:
        self._take_back(task)
        self.abandoned.append(task)
        self._end(task, None, why)

    def _take_back(self, task: Task) -> None:
        undo, task.undo = task.undo, None
        if undo is not None:
            undo()


_ENDED: Final = Context()  # of every task that has ended


def running() -> Kernel | None:
    """The kernel that steps a task in this thread just now; None: none does."""
    return getattr(_turning, "kernel", None)


def close_locals(locals: dict[Any, Any]) -> None:
    """Close what is kept there and can be closed, the newest first."""
    while locals:
        close = getattr(locals.popitem()[1], "close", None)
        if close is not None:
            close()


def _print_crash(task: Task) -> None:
    from traceback import print_exception  # only when something is wrong already

    print(f"kernel: task {task.name!r} crashed", file=sys.stderr)
    if task.error is not None:
        print_exception(task.error)


_OF_ASYNCIO: Final = {  # what one awaits, and what to write instead
    "_GatheringFuture": ("asyncio.gather(…)", "`await kqueue.io.gather(…)`"),
    "Task": ("a Task of asyncio", "`await kqueue.io.gather(…)`"),
}


def _instead(thing: Any) -> str:
    """What to write instead of yielding `thing`."""
    kind = type(thing).__name__
    if isinstance(thing, types.GeneratorType):
        return f"a job yielded a generator; write `yield from {thing.__name__}(...)`"
    if isinstance(thing, types.CoroutineType):
        return f"a job yielded a coroutine; write `await {thing.__name__}(...)` in an `async def` job"
    if isinstance(thing, (int, float)) and not isinstance(thing, bool):
        return f"a job yielded {thing!r}; to wait that long write `yield sleep({thing!r})`"
    if type(thing).__module__.startswith(("asyncio", "_asyncio", "concurrent.futures")):
        what, instead = _OF_ASYNCIO.get(kind, (f"{kind} of asyncio", "kqueue.sleep, kqueue.io, kqueue.offload"))
        return f"an inline job awaited {what}, which does not run here; use {instead}, or declare the job isolated=True"
    return (
        f"a job yielded {kind}; it may yield kqueue.sleep(...), kqueue.offload(...), another trap, "
        f"or nothing at all (a bare `yield` lets the others run)"
    )
