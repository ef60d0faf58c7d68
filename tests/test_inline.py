"""Inline jobs: whatever one does, its strategy returns an Outcome that says so, and the kernel goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from kqueue.codec import MAX_BYTES, decode
from kqueue.context import MAX_FOLLOW_UP_BYTES, MAX_FOLLOW_UPS, JobContext, current, current_or_none
from kqueue.dispatch import NewJob, prepare
from kqueue.errors import Discard, JobCancelled, JobTimedOut, Retry
from kqueue.execution.base import Work
from kqueue.execution.inline import GRACE_S, InlineExecutionStrategy
from kqueue.execution.jobtraps import enqueue, offload, progress
from kqueue.job import BoundJob
from kqueue.kernel import Abandoned, Kernel, Task, VirtualClock, join, sleep
from kqueue.options import JobOptions
from kqueue.outcome import CAUSES, ENDED_BY, Outcome
from kqueue.registry import Registration, _is_cooperative


class Services:
    """What a runtime does for a job, written down."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def enqueue(self, jobs: Any) -> Any:
        yield sleep(1)
        self.asked += [bound.name for bound in jobs]
        return [f"id of {bound.name}" for bound in jobs]

    def offload(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        yield sleep(2)
        self.asked.append(current().name)
        return function(*args, **kwargs)

    def progress(self, context: JobContext) -> None:
        self.asked.append((context.fraction, context.note))

    def prepare(self, job: BoundJob) -> NewJob:
        return prepare(job, None)


class Stage:
    """A kernel on a virtual clock with the strategy on it."""

    def __init__(self) -> None:
        self.kernel = Kernel(clock=VirtualClock())
        self.strategy = InlineExecutionStrategy(self.kernel)
        self.services = Services()

    def work(self, function: Callable[..., Any], *args: Any, options: Any = None, **kwargs: Any) -> Work:
        declared = JobOptions(**(options or {}))
        registration = Registration("the_job", declared, function, _is_cooperative(function, "the_job"), __name__)
        data = prepare(BoundJob("the_job", args, kwargs), registration, arguments_too=False).envelope
        envelope = decode(data)
        context = JobContext(
            id=envelope.id, name="the_job", queue="default", attempt=2, deadline=None, inline=True, services=self.services
        )
        return Work(envelope, data, registration, declared, 2, context)

    def start(self, function: Callable[..., Any], *args: Any, **how: Any) -> Task:
        return self.kernel.spawn(self.strategy.execute(self.work(function, *args, **how)))

    def run(self, function: Callable[..., Any], *args: Any, **how: Any) -> Outcome:
        task = self.start(function, *args, **how)
        outcome: Outcome = self.kernel.run(_join(task))
        assert outcome.cause in CAUSES
        assert outcome.ended_by in ENDED_BY
        outcome.certificate(attempt=1, strategy="inline", ended_at=0.0)
        return outcome


def _join(task: Task) -> Any:
    return (yield join(task))


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.kernel.close()


def message(outcome: Outcome) -> str:
    assert outcome.error is not None
    return f"{outcome.error['class']}: {outcome.error['message']}"


# -- jobs that end well -------------------------------------------------------------------------------------------------------


def generator_job(a: int, b: int = 0) -> Any:
    yield sleep(0.5)
    yield
    return a + b


async def coroutine_job(a: int, b: int = 0) -> int:
    await sleep(0.5)
    return a + b


def plain_job(a: int, b: int = 0) -> int:
    return a + b


class ClassJob:
    def __init__(self, a: int, b: int = 0) -> None:
        self.sum = a + b

    def handle(self) -> Any:
        yield sleep(0.5)
        return self.sum


@pytest.mark.parametrize("job", [generator_job, coroutine_job, plain_job, ClassJob])
def test_every_form_of_job_runs_and_its_result_is_kept_when_asked_for(stage: Stage, job: Callable[..., Any]) -> None:
    outcome = stage.run(job, 1, b=2, options={"keep_result": 60})
    assert (outcome.cause, outcome.ended_by, outcome.result, outcome.error) == ("ok", "job", b"3", None)
    assert outcome.duration_s == (0 if job is plain_job else 0.5)
    assert outcome.pid is None
    assert outcome.limits == {"timeout": 30}
    assert stage.run(job, 1).result is None, "without keep_result there is none"


def test_a_result_is_carried_like_an_argument(stage: Stage) -> None:
    outcome = stage.run(lambda: datetime(2026, 11, 24), options={"keep_result": 60})
    assert json.loads(outcome.result or b"") == {"$kq": "datetime", "v": "2026-11-24T00:00:00"}
    outcome = stage.run(lambda: None, options={"keep_result": 60})
    assert outcome.result == b"null"


def test_arguments_arrive_as_they_were_dispatched(stage: Stage) -> None:
    seen: list[Any] = []

    def job(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        yield

    stage.run(job, 1, [None], datetime.max, to={b"x"})
    assert seen == [((1, [None], datetime.max), {"to": {b"x"}})]


def test_a_job_knows_itself_and_its_neighbours_do_not(stage: Stage) -> None:
    def job() -> Any:
        before = current()
        yield sleep(1)
        assert current() is before
        return [before.name, before.attempt, before.queue]

    def other() -> Any:
        yield sleep(0.5)
        return current_or_none() is None

    neighbour = stage.kernel.spawn(other())
    outcome = stage.run(job, options={"keep_result": 1})
    assert json.loads(outcome.result or b"") == ["the_job", 2, "default"]
    assert neighbour.value is True
    assert current_or_none() is None


# -- jobs that fail -----------------------------------------------------------------------------------------------------------


def test_an_exception_is_described_with_the_line_of_the_job(stage: Stage) -> None:
    def job() -> Any:
        yield sleep(1)
        raise ValueError("no such user")

    outcome = stage.run(job)
    assert (outcome.cause, outcome.ended_by, outcome.duration_s) == ("exception", "job", 1)
    assert outcome.error is not None
    assert message(outcome) == "ValueError: no such user"
    assert outcome.error["mro"] == ["ValueError", "Exception", "BaseException"]
    assert 'raise ValueError("no such user")' in outcome.error["traceback"]
    assert "execution/inline.py" not in outcome.error["traceback"], "KQueue's own frames are of no use to anybody"


class Odd(BaseException):
    """An exception outside of Exception."""


@pytest.mark.parametrize("error", [Odd("odd"), KeyboardInterrupt("odd"), StopIteration("odd"), asyncio.CancelledError("odd")])
@pytest.mark.parametrize("kind", ["plain", "generator", "coroutine"])
def test_no_exception_of_a_job_reaches_the_kernel(stage: Stage, error: BaseException, kind: str) -> None:
    def plain() -> Any:
        raise error

    def generator() -> Any:
        yield
        raise error

    async def coroutine() -> Any:
        raise error

    outcome = stage.run({"plain": plain, "generator": generator, "coroutine": coroutine}[kind])
    assert (outcome.cause, outcome.ended_by) == ("exception", "job")
    if not isinstance(error, StopIteration):  # which a generator turns into a RuntimeError
        assert message(outcome) == f"{type(error).__name__}: odd"


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 3), (None, 0), ("a message", 1), (2.5, 1)])
def test_sys_exit_ends_the_job_and_not_the_supervisor(stage: Stage, code: Any, status: int) -> None:
    def job() -> Any:
        yield
        raise SystemExit(code)

    outcome = stage.run(job)
    assert (outcome.cause, outcome.ended_by, outcome.exit_code) == ("exit", "job", status)


def test_running_out_of_memory_has_a_cause_of_its_own(stage: Stage) -> None:
    def job() -> Any:
        yield
        raise MemoryError

    assert stage.run(job).cause == "memory"


def test_a_job_that_makes_its_own_cancellation_is_not_released_for_ever(stage: Stage) -> None:
    """Nobody has cancelled it. What is released counts nothing, so it would run again, and again."""

    def job() -> Any:
        yield
        raise JobCancelled("I do not feel like it")

    outcome = stage.run(job)
    assert (outcome.cause, message(outcome)) == ("exception", "JobCancelled: I do not feel like it")


def test_an_error_that_cannot_be_printed_harms_nobody(stage: Stage) -> None:
    class Evil(Exception):
        def __str__(self) -> str:
            raise SystemExit

    def job() -> Any:
        yield
        raise Evil

    assert message(stage.run(job)) == "Evil: (its __str__ raised SystemExit)"


@pytest.mark.parametrize("thing", [5, "text", [sleep(1)]])
def test_yielding_nonsense_fails_with_advice(stage: Stage, thing: Any) -> None:
    def job() -> Any:
        yield thing

    outcome = stage.run(job)
    assert outcome.cause == "exception"
    assert message(outcome).startswith("TypeError: a job yielded")
    assert outcome.error is not None
    assert "yield thing" in outcome.error["traceback"]


# -- arguments and results that are refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [generator_job, coroutine_job, plain_job, ClassJob])
@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"c": 1}), ((1,), {"a": 1})])
def test_arguments_that_do_not_fit_are_refused_and_not_tried_again(stage: Stage, job: Any, args: Any, kwargs: Any) -> None:
    outcome = stage.run(job, *args, **kwargs)
    assert (outcome.cause, outcome.ended_by) == ("refused", "supervisor")
    assert message(outcome).startswith("ArgumentsDoNotFit: the arguments do not fit job 'the_job': ")


@pytest.mark.parametrize(
    "data",
    [b'{"$kq":"pickle","v":"gASV"}', b'{"$kq":"datetime","v":"yesterday"}', b"[" * 120 + b'{"$kq":"set","v":[]}' + b"]" * 120],
)
def test_arguments_that_cannot_be_read_are_refused(stage: Stage, data: bytes) -> None:
    work = stage.work(plain_job, 1)
    raw = b'{"v":1,"id":"a","job":"the_job","args":[' + data + b"]}"
    outcome = stage.kernel.run(stage.strategy.execute(work._replace(envelope=decode(raw), data=raw)))
    assert (outcome.cause, outcome.ended_by) == ("refused", "supervisor")
    assert message(outcome).startswith("ArgumentsDoNotFit: a value ")


def test_a_type_error_of_the_job_itself_is_no_refusal(stage: Stage) -> None:
    assert stage.run(lambda a: a + 1, "text").cause == "exception"


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (object(), "the result is of type object, which a job cannot carry"),
        ({"a": float("nan")}, r"the result['a'] is nan"),
        ("x" * (MAX_BYTES + 1), "store it and return a key"),
        ("\ud800", "not valid Unicode"),
    ],
    ids=["object", "nan", "too large", "surrogate"],
)
def test_a_result_that_cannot_be_kept_is_the_job_s_error(stage: Stage, result: Any, words: str) -> None:
    outcome = stage.run(lambda: result, options={"keep_result": 60})
    assert outcome.cause == "exception"
    assert words in message(outcome)
    assert stage.run(lambda: result).cause == "ok", "and nobody minds where it is not kept"


# -- time-outs and cancelling -------------------------------------------------------------------------------------------------


def test_a_time_out_is_thrown_where_the_job_waits(stage: Stage) -> None:
    cleaned = []

    def job() -> Any:
        try:
            yield sleep(3600)
        finally:
            yield sleep(0.5)
            cleaned.append(stage.kernel.clock.monotonic())

    outcome = stage.run(job, options={"timeout": 10})
    assert (outcome.cause, outcome.ended_by, outcome.limits) == ("timeout", "supervisor", {"timeout": 10})
    assert message(outcome) == "JobTimedOut: the_job ran longer than its timeout of 10 s"
    assert outcome.error is not None
    assert "yield sleep(3600)" in outcome.error["traceback"]
    assert outcome.duration_s == 10.5
    assert cleaned == [10.5]


def test_except_exception_does_not_swallow_a_time_out(stage: Stage) -> None:
    async def job() -> None:
        while True:
            try:
                await sleep(3600)
            except Exception:
                continue

    assert stage.run(job, options={"timeout": 10}).cause == "timeout"


def test_a_job_that_only_gives_way_is_late_as_well(stage: Stage) -> None:
    def job() -> Any:
        while True:
            stage.kernel.clock.now += 1.0
            yield

    outcome = stage.run(job, options={"timeout": 10})
    assert (outcome.cause, outcome.duration_s) == ("timeout", pytest.approx(10, abs=2))


def test_one_that_is_late_in_its_first_slice_is_told_where_it_waits_then(stage: Stage) -> None:
    def job() -> Any:
        stage.kernel.clock.now += 11.0
        yield sleep(3600)

    outcome = stage.run(job, options={"timeout": 10})
    assert (outcome.cause, outcome.duration_s) == ("timeout", 11)


def test_a_job_that_never_waits_has_no_timer(stage: Stage) -> None:
    async def job() -> int:
        assert stage.kernel.timers.next_deadline() is None
        return 1

    assert stage.run(job, options={"timeout": 10}).cause == "ok"
    assert len(stage.kernel.timers) == 0


def test_a_job_that_ends_in_time_hears_nothing(stage: Stage) -> None:
    assert stage.run(generator_job, 1, options={"timeout": 1}).cause == "ok"
    stage.kernel.run(generator_job(1))
    assert stage.kernel.timers.next_deadline() is None


def test_a_time_out_that_was_not_needed_hits_nobody_later(stage: Stage) -> None:
    """Not even a task that goes on, with a second job or something else."""

    def both() -> Any:
        first = yield from stage.strategy.execute(stage.work(generator_job, 1, options={"timeout": 5}))
        second = yield from stage.strategy.execute(stage.work(generator_job, 2, options={"timeout": 0}))
        yield sleep(3600)
        return first.cause, second.cause, second.duration_s

    assert stage.kernel.run(both()) == ("ok", "ok", 0.5)


def test_timeout_zero_is_no_limit(stage: Stage) -> None:
    def job() -> Any:
        yield sleep(1e6)

    outcome = stage.run(job, options={"timeout": 0})
    assert (outcome.cause, outcome.limits, outcome.duration_s) == ("ok", {}, 1e6)


def test_a_cancelled_job_may_clean_up_and_is_released(stage: Stage) -> None:
    def job() -> Any:
        try:
            yield sleep(3600)
        finally:
            yield sleep(0.5)

    task = stage.start(job)
    stage.kernel.turn()
    stage.kernel.cancel(task, JobCancelled("KQueue is shutting down"), GRACE_S)
    outcome = stage.kernel.run(_join(task))
    assert (outcome.cause, outcome.ended_by, outcome.duration_s) == ("cancelled", "shutdown", 0.5)


def test_a_time_out_during_the_clean_up_of_a_shutdown_changes_nothing(stage: Stage) -> None:
    def job() -> Any:
        try:
            yield sleep(3600)
        finally:
            yield sleep(0.75)

    task = stage.start(job, options={"timeout": 10})
    stage.kernel.run(_sleeping(9.5))
    stage.kernel.cancel(task, JobCancelled("KQueue is shutting down"), GRACE_S)
    assert stage.kernel.run(_join(task)).cause == "cancelled"


def _sleeping(seconds: float) -> Any:
    yield sleep(seconds)


def test_a_cancelled_job_that_finishes_all_the_same_has_finished(stage: Stage) -> None:
    def job() -> Any:
        try:
            yield sleep(3600)
        except JobCancelled:
            yield sleep(0.5)

    task = stage.start(job)
    stage.kernel.turn()
    stage.kernel.cancel(task, JobCancelled(), GRACE_S)
    assert stage.kernel.run(_join(task)).cause == "ok"


@pytest.mark.parametrize("error", [JobCancelled(), JobTimedOut()])
def test_a_job_that_ignores_its_end_is_abandoned(stage: Stage, error: BaseException) -> None:
    def job() -> Any:
        while True:
            try:
                yield sleep(3600)
            except (JobCancelled, JobTimedOut):
                continue

    task = stage.start(job)
    stage.kernel.turn()
    stage.kernel.cancel(task, error, GRACE_S)
    with pytest.raises(Abandoned):
        stage.kernel.run(_join(task))
    assert stage.kernel.clock.monotonic() == GRACE_S


# -- asyncio does not run here ------------------------------------------------------------------------------------------------


async def sleeps() -> None:
    await asyncio.sleep(1)


async def waits_for() -> None:
    await asyncio.wait_for(asyncio.sleep(1), 2)


async def makes_a_task() -> None:
    asyncio.create_task(forever())  # noqa: RUF006


async def gathers() -> None:
    await asyncio.gather(forever())


async def to_thread() -> None:
    await asyncio.to_thread(print)


async def opens_a_connection() -> None:
    await asyncio.open_connection("127.0.0.1", 1)


async def runs_a_program() -> None:
    await asyncio.create_subprocess_exec("true")


async def waits_in_a_queue() -> None:
    await asyncio.Queue().get()  # type: ignore[var-annotated]


async def waits_for_a_lock() -> None:
    lock = asyncio.Lock()
    await lock.acquire()
    await lock.acquire()


async def waits_for_an_event() -> None:
    await asyncio.Event().wait()


async def waits_for_several() -> None:
    loop = asyncio.new_event_loop()
    try:
        await asyncio.wait([loop.create_future()])
    finally:
        loop.close()


async def asks_for_the_loop() -> None:
    await asyncio.get_running_loop().run_in_executor(None, print)


async def by_way_of_a_library() -> None:
    names: dict[str, Any] = {"__name__": "aiohttp.client", "asyncio": asyncio}
    exec(compile("def session():\n    asyncio.get_running_loop()", "/usr/lib/site-packages/aiohttp/client.py", "exec"), names)
    names["session"]()


async def forever() -> None:
    await sleep(1e9)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:There is no current event loop:DeprecationWarning")
@pytest.mark.parametrize(
    ("job", "called", "instead"),
    [
        (sleeps, "asyncio.sleep", "`await kqueue.sleep(…)`"),
        (waits_for, "asyncio.wait_for", "`with kqueue.io.timeout(…)`"),
        (makes_a_task, "asyncio.create_task", "kqueue.io.gather"),
        (to_thread, "asyncio.to_thread", "`await kqueue.offload(function, …)`"),
        (opens_a_connection, "asyncio.open_connection", "`await kqueue.io.connect(…)`"),
        (runs_a_program, "asyncio.create_subprocess_exec", "`await kqueue.io.run([…])`"),
        (waits_in_a_queue, "asyncio.Queue", "kqueue.io.Queue"),
        (waits_for_a_lock, "asyncio.Lock", "kqueue.io.Semaphore"),
        (waits_for_an_event, "asyncio.Event", "kqueue.io.Queue"),
        (waits_for_several, "asyncio.wait", "kqueue.io.gather or kqueue.io.race"),
        (by_way_of_a_library, "aiohttp", "kqueue.io.http"),
        (asks_for_the_loop, "asyncio.get_running_loop", "kqueue.io"),
    ],
)
def test_asyncio_in_an_inline_job_says_what_to_use_instead(
    stage: Stage, job: Callable[..., Any], called: str, instead: str
) -> None:
    outcome = stage.run(job)
    assert outcome.cause == "exception"
    assert f"({called} needs asyncio, and an inline job does not run under that: use " in message(outcome)
    assert instead in message(outcome)
    assert "isolated=True" in message(outcome)


@pytest.mark.parametrize(
    "error", [RuntimeError("something else"), ValueError("no running event loop"), AttributeError("'None' has no attribute 'x'")]
)
def test_other_errors_are_told_as_they_are(stage: Stage, error: Exception) -> None:
    def job() -> Any:
        yield
        raise error

    assert message(stage.run(job)) == f"{type(error).__name__}: {error}"


def test_a_future_of_another_loop_says_so_too(stage: Stage) -> None:
    loop = asyncio.new_event_loop()

    async def job() -> None:
        await loop.create_future()

    outcome = stage.run(job)
    loop.close()
    for words in ("TypeError", "awaited Future of asyncio", "kqueue.sleep", "kqueue.io", "isolated=True"):
        assert words in message(outcome)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
def test_what_asyncio_made_without_a_running_loop_names_its_replacement(stage: Stage) -> None:
    """As asyncio.gather does where the thread has a loop that nobody runs, as Python before 3.14 makes one."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)

    async def gathers() -> None:
        await asyncio.gather(forever(), forever())

    async def awaits_a_task() -> None:
        await loop.create_task(forever())

    try:
        for job, what in ((gathers, "asyncio.gather(…)"), (awaits_a_task, "a Task of asyncio")):
            said = message(stage.run(job))
            assert f"an inline job awaited {what}, which does not run here; use `await kqueue.io.gather(…)`" in said
            assert "isolated=True" in said
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        asyncio.set_event_loop(None)
        loop.close()


def test_a_bare_turn_of_asyncio_is_a_bare_yield(stage: Stage) -> None:
    async def job() -> None:
        await asyncio.sleep(0)

    assert stage.run(job).cause == "ok"


# -- what a job may ask for ---------------------------------------------------------------------------------------------------


def test_enqueue_and_offload_are_answered_by_the_surroundings(stage: Stage) -> None:
    def generator() -> Any:
        first = yield enqueue(BoundJob("a", (), {}))
        both = yield enqueue(BoundJob("b", (), {}), BoundJob("c", (), {}))
        none = yield enqueue()
        length = yield offload(len, "four")
        return [first, both, none, length]

    async def coroutine() -> Any:
        first = await enqueue(BoundJob("a", (), {}))
        both = await enqueue(BoundJob("b", (), {}), BoundJob("c", (), {}))
        none = await enqueue()
        return [first, both, none, await offload(len, "four")]

    for job in (generator, coroutine):
        stage.services.asked.clear()
        outcome = stage.run(job, options={"keep_result": 1})
        assert json.loads(outcome.result or b"null") == ["id of a", ["id of b", "id of c"], [], 4], outcome
        assert stage.services.asked == ["a", "b", "c", "the_job"]


def test_progress_takes_effect_when_called_and_may_be_yielded_or_not(stage: Stage) -> None:
    def job() -> Any:
        progress(0.25)
        yield progress(0.5, "half")
        assert (yield progress(1, "x" * 1000)) is None
        return current().fraction

    assert stage.run(job, options={"keep_result": 1}).result == b"1.0"
    assert stage.services.asked == [(0.25, ""), (0.5, "half"), (1.0, "x" * 200)]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf"), "half", None])
def test_progress_goes_from_nought_to_one(stage: Stage, fraction: Any) -> None:
    def job() -> Any:
        yield progress(fraction)

    outcome = stage.run(job)
    assert outcome.cause == "exception"
    assert message(outcome).startswith(("ValueError: progress() takes a fraction from 0 to 1", "TypeError"))
    assert stage.services.asked == []


@pytest.mark.parametrize("thing", ["send_email", None, BoundJob, len])
def test_enqueue_takes_bound_jobs_and_says_so(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"enqueue\(\) takes bound jobs such as SendEmail\.job\(\.\.\.\), not"):
        enqueue(thing)


def test_outside_of_a_job_they_say_that_there_is_none(stage: Stage) -> None:
    def task(trap: Any) -> Any:
        yield trap

    for trap in (enqueue(BoundJob("a", (), {})), offload(len, "")):
        with pytest.raises(RuntimeError, match="only there inside a running job"):
            stage.kernel.run(task(trap))
    with pytest.raises(RuntimeError, match="only there inside a running job"):
        progress(0.5)


def test_a_job_that_is_cancelled_while_it_enqueues_takes_the_request_along(stage: Stage) -> None:
    def job() -> Any:
        yield enqueue(BoundJob("a", (), {}))

    task = stage.start(job)
    stage.kernel.turn()
    stage.kernel.turn()
    stage.kernel.cancel(task, JobCancelled(), GRACE_S)
    assert stage.kernel.run(_join(task)).cause == "cancelled"
    stage.kernel.run(_sleeping(10))
    assert stage.services.asked == []


def test_the_strategy_needs_no_start_and_no_stop(stage: Stage) -> None:
    assert stage.kernel.run(stage.strategy.start()) is None
    assert stage.kernel.run(stage.strategy.stop()) is None
    assert (stage.strategy.name, stage.strategy.cancel_grace_s) == ("inline", GRACE_S)


# -- follow-ups -------------------------------------------------------------------------------------------------------


def follows(*, fails: bool = False) -> Any:
    ids = [current().then(BoundJob("next", [1], {}))]
    yield sleep(1)
    ids.append(current().then(BoundJob("next", [2], {})))
    if fails:
        raise LookupError
    return ids


async def afollows(*, fails: bool = False) -> Any:
    ids = [current().then(BoundJob("next", [1], {}))]
    await sleep(1)
    ids.append(current().then(BoundJob("next", [2], {})))
    if fails:
        raise LookupError
    return ids


@pytest.mark.parametrize("handler", [follows, afollows])
def test_follow_ups_come_with_an_outcome_that_is_ok(stage: Stage, handler: Any) -> None:
    outcome = stage.run(handler, options={"keep_result": 60})
    assert [job.id for job in outcome.follow_ups] == json.loads(outcome.result or b"")
    assert [decode(job.envelope).args for job in outcome.follow_ups] == [[1], [2]]


@pytest.mark.parametrize("handler", [follows, afollows])
def test_and_vanish_with_any_other(stage: Stage, handler: Any) -> None:
    assert stage.run(handler, fails=True).follow_ups == ()
    assert stage.run(handler, options={"timeout": 0.5}).follow_ups == ()
    task = stage.start(handler)
    stage.kernel.spawn(_after(0.5, lambda: stage.kernel.cancel(task, JobCancelled("stopped"))))
    assert stage.kernel.run(_join(task)).follow_ups == ()


def test_two_jobs_that_run_at_once_do_not_mix_their_follow_ups(stage: Stage) -> None:
    tasks = [stage.start(follows, options={"keep_result": 60}) for _ in range(2)]
    first, second = [stage.kernel.run(_join(task)) for task in tasks]
    assert len({job.id for job in (*first.follow_ups, *second.follow_ups)}) == 4
    assert [job.id for job in first.follow_ups] == json.loads(first.result)


@pytest.mark.parametrize("wrong", [None, "next", follows, ("next", [], {})])
def test_then_takes_bound_jobs_only(stage: Stage, wrong: Any) -> None:
    def asks() -> Any:
        yield
        current().then(wrong)

    outcome = stage.run(asks)
    assert outcome.summary().startswith("TypeError: then() takes a bound job such as")


def test_an_inline_job_is_held_to_the_bounds_too(stage: Stage) -> None:
    def asks(size: int) -> Any:
        yield
        for _ in range(MAX_FOLLOW_UPS + 1):
            current().then(BoundJob("next", ["x" * size], {}))

    assert f"has {MAX_FOLLOW_UPS} follow-ups already" in stage.run(asks, 1).summary()
    assert f"over {MAX_FOLLOW_UP_BYTES} bytes" in stage.run(asks, 900_000).summary()


def _after(seconds: float, action: Callable[[], None]) -> Any:
    yield sleep(seconds)
    action()


# -- the retry policy -------------------------------------------------------------------------------------------------


def asked_where(log: list[Any]) -> Callable[..., float]:
    def backoff(attempt: int, error: BaseException) -> float:
        log.append((attempt, type(error).__name__, current().name))
        return 30.0

    return backoff


@pytest.mark.parametrize("error", [LookupError, MemoryError, SystemExit, JobTimedOut, Retry])
def test_a_backoff_function_is_asked_where_the_job_ran(stage: Stage, error: Any) -> None:
    def fails() -> Any:
        yield
        raise error

    log: list[Any] = []
    outcome = stage.run(fails, options={"backoff": asked_where(log)})
    assert (outcome.backoff_s, outcome.backoff_failed) == (30, "")
    assert log == [(2, error.__name__, "the_job")]


def test_and_not_asked_for_what_no_backoff_follows(stage: Stage) -> None:
    def discards() -> Any:
        yield
        raise Discard("gone")

    log: list[Any] = []
    options = {"backoff": asked_where(log)}
    assert stage.run(discards, options=options).asked == "discard"
    assert stage.run(follows, options=options).ok
    assert stage.run(follows, 1, 2, 3, options=options).cause == "refused"
    task = stage.start(follows, options=options)
    stage.kernel.spawn(_after(0.5, lambda: stage.kernel.cancel(task, JobCancelled("stopped"))))
    assert stage.kernel.run(_join(task)).cause == "cancelled"
    assert log == []


@pytest.mark.parametrize(
    ("backoff", "why"),
    [(lambda a, e: 1 / 0, "it raised ZeroDivisionError"), (lambda a, e: sleep(5), "which is no number of seconds"),
     (lambda a, e: exec("raise SystemExit"), "it raised SystemExit")],
)  # fmt: skip
def test_one_that_fails_hides_nothing_and_ends_nobody(stage: Stage, backoff: Any, why: str) -> None:
    outcome = stage.run(follows, fails=True, options={"backoff": backoff})
    assert (outcome.cause, (outcome.error or {})["class"], outcome.backoff_s) == ("exception", "LookupError", None)
    assert why in outcome.backoff_failed


def test_retry_and_discard_are_told_apart_from_errors(stage: Stage) -> None:
    def asks(error: str) -> Any:
        yield
        raise {"retry": Retry(delay=5, message="later"), "discard": Discard("never"), "error": LookupError()}[error]

    outcomes = [stage.run(asks, error) for error in ("retry", "discard", "error")]
    told = [(outcome.cause, outcome.asked, outcome.retry_in_s, outcome.summary()) for outcome in outcomes]
    assert told == [
        ("exception", "retry", 5, "Retry: later"), ("exception", "discard", None, "Discard: never"),
        ("exception", "", None, "LookupError"),
    ]  # fmt: skip


def test_a_class_that_is_only_named_so_asks_for_nothing(stage: Stage) -> None:
    def raises() -> Any:
        yield
        raise type("Discard", (Exception,), {})

    assert stage.run(raises).asked == ""
