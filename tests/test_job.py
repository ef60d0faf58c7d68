"""Declaring jobs, binding them to arguments, and what is refused on the way."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

import kqueue
from kqueue.context import JobContext, current, enter
from kqueue.dispatch import describe, prepare, undescribe
from kqueue.errors import DuplicateJob, JobNotFound, UsageError
from kqueue.job import (
    BoundJob,
    JobFunction,
    JobHandle,
    KQueueJob,
    KQueueJobInterface,
    dispatch_many,
    get_dispatcher,
    job,
    set_dispatcher,
)
from kqueue.kernel import sleep
from kqueue.options import DispatchOptions, JobOptions, check_option, dispatch_options
from kqueue.registry import Registration, registry
from kqueue.states import TRANSITIONS, JobState


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_jobs", {})


@pytest.fixture
def dispatched() -> Iterator[list[BoundJob]]:
    """What was dispatched meanwhile."""
    jobs: list[BoundJob] = []

    def dispatcher(bound: Sequence[BoundJob]) -> Any:
        jobs.extend(bound)
        return [f"handle {len(jobs) - len(bound) + index}" for index in range(len(bound))]

    before = get_dispatcher()
    set_dispatcher(dispatcher)
    yield jobs
    set_dispatcher(before)


def registered(name: str) -> Registration:
    found = registry.get(name)
    assert found is not None
    return found


# -- forms of declaration -----------------------------------------------------------------------------------------------------


def test_a_function_under_job_is_registered_and_still_is_that_function() -> None:
    @job
    def add(a: int, b: int = 1) -> int:
        """Adds."""
        return a + b

    assert add(2) == 3
    assert add(2, b=5) == 7
    assert (add.__name__, add.__doc__, add.__module__) == ("add", "Adds.", __name__)
    assert add.__wrapped__(1) == 2
    assert repr(add) == f"<job {add.__qualname__!r}>"
    assert registered(add.__qualname__).options == JobOptions()


def test_options_stand_in_the_decorator() -> None:
    @job(name="video", isolated=True, timeout=300, max_memory=512, max_attempts=5, backoff=[2, 10, 60], queue="heavy")
    def process_video(path: str) -> None: ...

    assert registered("video").options == JobOptions(
        timeout=300, max_memory=512, isolated=True, max_attempts=5, backoff=[2, 10, 60], queue="heavy"
    )


def test_a_class_is_registered_when_it_is_defined() -> None:
    class SendEmail(KQueueJob):
        name = "send_email"
        timeout = 10
        isolated = False
        priority = 7

        def __init__(self, to: str) -> None:
            self.to = to

        def handle(self) -> Any:
            yield sleep(0)

    registration = registered("send_email")
    assert registration.target is SendEmail
    assert registration.options == JobOptions(timeout=10, isolated=False, priority=7)
    email = SendEmail("a@b.c")
    assert (email.get_timeout(), email.get_max_memory(), email.is_isolated(), email.get_priority()) == (10, 64, False, 7)
    assert isinstance(email, KQueueJobInterface)


def test_without_a_name_a_job_goes_by_its_qualified_name() -> None:
    class Mail:
        class Send(KQueueJob):
            def handle(self) -> None: ...

    here = "test_without_a_name_a_job_goes_by_its_qualified_name.<locals>"
    assert registry.names() == [f"{here}.Mail.Send"]
    assert Mail.Send.registration.module == __name__


def test_options_may_stand_apart_from_what_the_job_calls_its_own() -> None:
    class Export(KQueueJob):
        name = "export"
        options = JobOptions(timeout=10, queue="slow")
        start = "2026-01-01"  # its own business, and no way to start a process
        priority = "urgent"

        def handle(self) -> None: ...

    assert Export.registration.options == JobOptions(timeout=10, queue="slow")
    assert Export.start == "2026-01-01"
    assert Export.options(delay=5).job().options == DispatchOptions(delay_s=5), "options() still sets those of one dispatch"


def test_options_are_read_from_the_class_and_never_from_an_instance() -> None:
    class Import(KQueueJob):
        name = "import"

        def __init__(self) -> None:
            self.queue = ["rows", "to", "import"]
            self.timeout = -1

        def handle(self) -> None: ...

    assert Import.registration.options == JobOptions()
    assert Import().get_timeout() == 30


def test_a_base_is_no_job_and_passes_its_options_on() -> None:
    class Base(KQueueJob):
        queue = "mail"
        timeout = 5

    class Apart(KQueueJob):
        options = JobOptions(queue="slow", timeout=7)

    class One(Base):
        name = "one"
        timeout = 6

        def handle(self) -> None: ...

    class Two(Apart):
        name = "two"

        def handle(self) -> None: ...

    class Three(Two):
        name = "three"
        options = JobOptions(queue="other")

    assert registry.names() == ["one", "three", "two"]
    assert registered("one").options == JobOptions(queue="mail", timeout=6)
    assert registered("two").options == JobOptions(queue="slow", timeout=7)
    assert registered("three").options == JobOptions(queue="other")
    for base in (Base, Apart, KQueueJob):
        with pytest.raises(UsageError, match=r"is no job: it does not define handle\(\)"):
            base.job()
        with pytest.raises(UsageError, match=r"is no job: it does not define handle\(\)"):
            base.options(delay=1)


def test_a_subclass_of_a_job_is_a_job_of_its_own() -> None:
    class Send(KQueueJob):
        name = "send"

        def handle(self) -> Any:
            yield

    class SendLater(Send):
        priority = -5

    assert len(registry) == 2
    assert registered("send").options.priority == 0
    assert SendLater.registration.name.endswith("SendLater"), "a name is not inherited: two jobs cannot have it"
    assert SendLater.registration.options.priority == -5
    assert not SendLater.registration.isolated, "it inherited a handler that yields"


T = TypeVar("T")


def test_what_else_a_job_inherits_does_not_matter() -> None:
    class Mixin:
        def handle(self) -> str:
            return "of the mixin"

    class GenericBase(KQueueJob, Generic[T]): ...

    class BehindBase(KQueueJob, Mixin): ...

    class InFront(Mixin, KQueueJob):
        name = "in front"

    class Concrete(GenericBase[int]):
        name = "concrete"

        def handle(self) -> None: ...

    assert registry.names() == ["concrete", "in front"]
    assert registered("in front").call([], {}) == "of the mixin"


def test_a_dataclass_may_be_a_job() -> None:
    @dataclass
    class Send(KQueueJob):
        to: str
        subject: str = ""

        def handle(self) -> Any:
            return f"{self.to}: {self.subject}"

    assert Send.registration.call(["a@b.c"], {"subject": "hi"}) == "a@b.c: hi"


def test_a_class_that_a_decorator_makes_once_more_is_one_job() -> None:
    def remade(cls: Any) -> Any:  # as dataclass(slots=True) does
        return type(cls)(cls.__name__, cls.__bases__, {**vars(cls), "__qualname__": cls.__qualname__})

    @remade
    class Send(KQueueJob):
        def handle(self) -> None: ...

    assert [registration.target for registration in registry] == [Send]


# -- where a job runs ---------------------------------------------------------------------------------------------------------


def test_a_handler_that_can_wait_runs_inline_and_a_plain_one_in_a_child() -> None:
    def plain() -> None: ...

    def generator() -> Any:
        yield

    async def coroutine() -> None: ...

    kinds = {"plain": plain, "generator": generator, "coroutine": coroutine}
    lanes = {name: JobFunction(function, name, {}).registration.lane for name, function in kinds.items()}
    assert lanes == {"plain": "isolated", "generator": "inline", "coroutine": "inline"}
    for isolated, lane in [(True, "isolated"), (False, "inline")]:
        for function in kinds.values():
            assert JobFunction(function, f"{function.__name__} {lane}", {"isolated": isolated}).registration.lane == lane


def test_the_kind_is_seen_through_partials_and_methods() -> None:
    class Service:
        def method(self, a: int) -> Any:
            yield a

        @classmethod
        async def of_the_class(cls) -> None: ...

        @staticmethod
        def static() -> Any:
            yield

    def generator(a: int, b: int) -> Any:
        yield a + b

    for number, target in enumerate(
        [functools.partial(generator, 1), functools.partial(functools.partial(generator, 1), b=2), Service().method,
         Service.of_the_class, Service.static]
    ):  # fmt: skip
        assert job(name=f"job {number}")(target).registration.cooperative

    assert not job(name="plain")(functools.partial(print, "a")).registration.cooperative
    assert not job(name="in C")(len).registration.cooperative


def test_a_job_known_from_the_manifest_only_runs_in_a_child_whatever_its_kind() -> None:
    async def coroutine(a: int) -> None: ...

    described = describe(JobFunction(coroutine, "elsewhere", {"timeout": 5}).registration)
    registry._jobs.clear()
    registry.learn([undescribe(described)])
    learned = registered("elsewhere")
    assert (learned.lane, learned.options.timeout, learned.target) == ("isolated", 5, None)
    with pytest.raises(JobNotFound, match="known from the manifest only"):
        learned.call([], {})


def test_code_that_is_here_goes_before_the_manifest() -> None:
    async def coroutine() -> None: ...

    here = JobFunction(coroutine, "both", {}).registration
    registry.learn([here._replace(target=None, signature="()", options=JobOptions(timeout=99))])
    assert registered("both") == here._replace(signature="()")


# -- what is refused ----------------------------------------------------------------------------------------------------------

WRONG = [
    ("timeout", [-1, "10", None, True, float("nan"), float("inf"), 10**400, [1]], "timeout must be seconds, 0 for no limit"),
    ("max_memory", [0, -1, 1.5, "64", True, None], "max_memory must be a positive number of MiB"),
    ("isolated", [0, 1, "yes"], "isolated must be True, False or None"),
    ("priority", [-101, 101, 1.0, True, "high", 10**400], "priority must be an integer from -100 to 100"),
    ("queue", ["", "a b", "a{b}", "x" * 65, "naïve", "a\n", None, 5], "queue must be 1 to 64 of letters, digits"),
    ("max_attempts", [0, -1, 1.5, True, None], "max_attempts must be an integer of at least 1"),
    ("backoff", [[], [1, -1], "fast", [1, "2"], float("nan"), [float("inf")], -1, 10**400, 1e300], "backoff must be seconds"),
    ("start", ["Fork", "thread", 1, ["fork"], ""], 'start must be "fork", "pool", "exec" or None'),
    ("max_cpu", [-1, True, float("inf")], "max_cpu must be seconds"),
    ("max_files", [0, 15, 20.0, True, 1 << 31], "max_files must be an integer of at least 16"),
    ("max_processes", [-1, 1.5, True, 1 << 31], "max_processes must be an integer of at least 1, or 0 for no limit"),
    ("max_file_size", [-1, 0.5, True, 1 << 31], "max_file_size must be a positive number of MiB, or 0 for no limit"),
    ("keep_result", [-0.1, True, None], "keep_result must be seconds"),
    ("user", ["", "a b", "-x", 0, 33, True, "a:b", "a\n"], "user must be the name of a user, or None"),
    ("group", ["", "a b", 0], "group must be the name of a group, or None"),
    ("network", [None, 0, "no"], "network must be True or False"),
    ("private_tmp", [None, 1], "private_tmp must be True or False"),
    ("retry_until", [0, -1, True, "1h", float("nan"), 1e300, [5]], "retry_until must be seconds or a timedelta after the enq"),
    ("retry_on", [5, [5], int, [""], ["a b"], ["OSError", None], {"OSError": 1}], "retry_on must be exception classes or their"),
    ("retry_on", [[], ()], "retry_on is empty, which would retry nothing: write max_attempts=1 for that"),
    ("retry_on", ["requests.exceptions.ConnectionError"], "retry_on: classes are told apart by their bare name, so write 'Conn"),
    ("dont_retry_on", [5, [int], ["two words"]], "dont_retry_on must be exception classes or their names"),
    ("backoff", [{1: 2}, {"bse": 2}], "backoff has no"),
    ("backoff", [{"base": -1}, {"base": None}], "backoff: base must be seconds"),
    ("backoff", [{"factor": 0.5}, {"factor": True}, {"factor": float("inf")}], "backoff: factor must be a number of at least 1"),
    ("backoff", [{"jitter": 1}], "backoff: jitter must be True or False"),
    ("causes", [None, "bury", ["timeout"]], "causes must be a dict by cause"),
    ("causes", [{"lost": "bury"}, {"cancelled": {}}, {"refused": {}}, {5: {}}, {"ok": {}}], "causes: there is no policy for"),
    ("causes", [{"timeout": "burry"}, {"timeout": None}, {"timeout": [1]}], 'causes: timeout must be "bury" or a dict of'),
    ("causes", [{"timeout": {"retries": 1}}, {"timeout": {7: 1}}], "causes: timeout has no"),
    ("causes", [{"timeout": {"grow": 2}}], "causes: timeout cannot grow"),
    ("causes", [{"cpu": {"max_attempts": n}} for n in (0, True, 1.5, None)], "causes: cpu: max_attempts must be an integer"),
    ("causes", [{"signal": {"max_attempts": 4}}], "causes: signal: max_attempts is at most 3"),
    ("causes", [{"memory": {"grow": n}} for n in (0.5, 101, True, "2", float("nan"))], "causes: memory: grow must be a number"),
    ("causes", [{"exit": {"backoff": -1}}, {"exit": {"backoff": "soon"}}], "causes: exit: backoff must be seconds"),
    ("causes", [{"exit": {"backoff": lambda attempt, error: 1}}], "causes: exit: backoff cannot be a function"),
]  # fmt: skip
RIGHT = [
    ("timeout", [0, 0.5, 30, 86400]), ("max_memory", [1, 4096]), ("isolated", [None, True, False]), ("priority", [-100, 0, 100]),
    ("queue", ["default", "a.b:c-d_e", "x" * 64]), ("max_attempts", [1, 100]), ("backoff", [None, 0, 1.5, [0], (1, 2.5, 3600)]),
    ("start", ["fork", "pool", "exec", None]), ("max_cpu", [0, 10]), ("keep_result", [0, 3600]),
    ("retry_until", [None, 0.5, 3600]),
    ("max_files", [16, 4096]), ("max_processes", [0, 1]), ("max_file_size", [0, 100]),
    ("user", [None, "nobody", "svc-a.b_c$"]), ("group", [None, "www-data"]),
    ("network", [True, False]), ("private_tmp", [False, True]),
    ("retry_on", [None, ("OSError",)]), ("dont_retry_on", [None, ("OSError", "ValueError")]),
    ("causes", [{}, {"timeout": "bury"}, {"memory": {"grow": 2, "max_attempts": 5, "backoff": [1, 2]}, "exit": {}}]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_an_option_that_makes_no_sense_is_refused_wherever_it_is_given(name: str, values: list[Any], message: str) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{message}") as refusal:
            check_option(name, value)
        assert len(str(refusal.value)) < 200
        with pytest.raises(UsageError, match=f"job 'wrong': {message}"):
            job(name="wrong", **{name: value})(lambda: None)
        with pytest.raises(UsageError, match=message):
            type("Wrong", (KQueueJob,), {name: value, "handle": lambda self: None})
        with pytest.raises(UsageError, match=message):
            dispatch_options(**{name: value})
    assert len(registry) == 0, "what is refused is not registered"


@pytest.mark.parametrize(("name", "values"), RIGHT, ids=lambda value: value if isinstance(value, str) else "")
def test_an_option_that_makes_sense_is_taken(name: str, values: list[Any]) -> None:
    for number, value in enumerate(values):
        declared = job(name=f"right {number}", **{name: value})(lambda: None)
        assert getattr(declared.registration.options, name) == value
    assert {checked for checked, _ in RIGHT} == set(JobOptions._fields)


def test_a_misspelt_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"""job 'a': a job has no option 'timeut' \(did you mean "timeout"\?\)"""):
        job(name="a", timeut=5)(lambda: None)
    with pytest.raises(UsageError, match=r"""no option 'max_mem' \(did you mean "max_memory"\?\)"""):
        dispatch_options(max_mem=5)
    with pytest.raises(UsageError, match=r"no option 'zzz'$"):
        dispatch_options(zzz=5)


@pytest.mark.parametrize("name", ["", "x" * 256, 5, b"bytes", "two\nlines", "nul\0", "half \ud800"])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    with pytest.raises(UsageError, match="a job's name is a printable text of 1 to 255 characters"):
        job(name=name)(lambda: None)
    with pytest.raises(UsageError, match="a job's name is a printable text of 1 to 255 characters"):
        type("Wrong", (KQueueJob,), {"name": name, "handle": lambda self: None})


def test_a_name_may_have_255_characters_and_be_in_any_language() -> None:
    for name in ("x" * 255, "Rechnung verschicken", "发票", "a/b:c{d}"):
        assert job(name=name)(lambda: None).registration.name == name


def test_what_has_no_name_must_be_given_one() -> None:
    with pytest.raises(UsageError, match="give it a name="):
        job(functools.partial(print, "a"))
    assert job(name="greet")(functools.partial(int, "7"))() == 7


def test_a_lambda_is_a_job_if_it_must_be() -> None:
    assert job(name="double")(lambda a: 2 * a)(4) == 8
    assert registered("double").call([4], {}) == 8


@pytest.mark.parametrize("thing", ["send_email", 5, None.__class__, KQueueJob, type("Plain", (), {})])
def test_only_functions_go_under_job(thing: Any) -> None:
    with pytest.raises(UsageError, match=r"@job takes a function, or options as in @job\(timeout=10\), not"):
        job(thing)


def test_async_generators_are_refused() -> None:
    with pytest.raises(UsageError, match=r"job 'both' is an async generator.*use `async def` without yield"):

        @job(name="both")
        async def both() -> Any:
            yield 1

    with pytest.raises(UsageError, match="is an async generator"):

        class Both(KQueueJob):
            async def handle(self) -> Any:
                yield 1

    assert len(registry) == 0


def test_two_jobs_of_one_name_are_an_error_at_registration() -> None:
    @job(name="send")
    def one() -> None: ...

    with pytest.raises(DuplicateJob, match=r"two jobs are named 'send', in \S+ and in \S+; give one a name="):

        @job(name="send")
        def two() -> None: ...

    with pytest.raises(DuplicateJob):

        class Send(KQueueJob):
            name = "send"

            def handle(self) -> None: ...

    assert registered("send").target is one.__wrapped__


def test_two_classes_that_inherit_one_handler_are_still_two() -> None:
    class Base(KQueueJob):
        def handle(self) -> None: ...

    class One(Base):
        name = "same"

    with pytest.raises(DuplicateJob):

        class Two(Base):
            name = "same"


def test_the_same_code_imported_twice_is_one_job(tmp_path: Path) -> None:
    """`python app.py` has it as __main__, and a job module that imports app has it as app."""
    path = tmp_path / "app.py"
    path.write_text("from kqueue import *\n@job\ndef ping(): ...\nclass Pong(KQueueJob):\n    def handle(self): ...\n")
    for name in ("__main__", "app"):
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": name})
    assert registry.names() == ["Pong", "ping"]
    assert registered("ping").module == "app"


# -- calling ------------------------------------------------------------------------------------------------------------------


def takes(a: int, *, b: int = 0) -> int:
    return a + b


class Takes(KQueueJob):
    name = "the class Takes"

    def __init__(self, a: int, *, b: int = 0) -> None:
        self.sum = a + b

    def handle(self) -> int:
        return self.sum


TARGETS = [Registration("takes", JobOptions(), takes, False, ""), Takes.registration]


@pytest.mark.parametrize("registration", TARGETS, ids=["function", "class"])
def test_arguments_that_do_not_fit_are_told_from_errors_of_the_job(registration: Registration) -> None:
    assert registration.call([1], {"b": 2}) == 3
    for args, kwargs in [([], {}), ([1, 2], {}), ([1], {"c": 3}), ([], {"a": 1, "z": 2})]:
        with pytest.raises(UsageError, match=f"the arguments do not fit job {registration.name!r}: "):
            registration.call(args, kwargs)
    with pytest.raises(TypeError) as error:  # raised by a + b
        registration.call([1], {"b": "2"})
    assert not isinstance(error.value, UsageError)


def test_the_instance_is_made_anew_for_each_call() -> None:
    assert Takes.registration.call([1], {}) == 1
    assert Takes.registration.call([5], {"b": 5}) == 10


# -- dispatching --------------------------------------------------------------------------------------------------------------


def test_binding_runs_nothing_and_dispatching_hands_it_over(dispatched: list[BoundJob]) -> None:
    @job(name="add")
    def add(a: int, b: int) -> None:
        raise AssertionError("it was called")

    class Sub(KQueueJob):
        name = "sub"

        def __init__(self, a: int, b: int) -> None:
            raise AssertionError("it was made")

        def handle(self) -> None: ...

    bound = add.job(1, b=2)
    assert (bound.name, bound.args, bound.kwargs, bound.options) == ("add", (1,), {"b": 2}, DispatchOptions())
    assert dispatched == []
    assert bound.dispatch() == "handle 0"
    assert add.dispatch(1, b=2) == "handle 1"
    assert Sub.dispatch(3, 4) == "handle 2"
    assert Sub.options(delay=5).dispatch(3, b=4) == "handle 3"
    assert [(each.name, each.args, each.kwargs) for each in dispatched] == [
        ("add", (1,), {"b": 2}), ("add", (1,), {"b": 2}), ("sub", (3, 4), {}), ("sub", (3,), {"b": 4})
    ]  # fmt: skip
    assert dispatched[3].options.delay_s == 5


def test_many_are_dispatched_at_once_and_none_is_nothing(dispatched: list[BoundJob]) -> None:
    one = job(name="one")(lambda number: None)
    assert dispatch_many([one.job(number) for number in range(3)]) == ["handle 0", "handle 1", "handle 2"]
    assert dispatch_many([]) == []
    assert [bound.args for bound in dispatched] == [(0,), (1,), (2,)]


def test_the_options_of_one_dispatch() -> None:
    due = datetime(2026, 11, 24, 8, 0, tzinfo=timezone.utc)
    assert dispatch_options() == DispatchOptions()
    assert dispatch_options(delay=10).delay_s == 10
    assert dispatch_options(delay=timedelta(minutes=2, milliseconds=500)).delay_s == 120.5
    assert dispatch_options(at=due).at == due.timestamp()
    assert dispatch_options(at=due.astimezone(timezone(timedelta(hours=9)))).at == due.timestamp()
    assert dispatch_options(at=datetime(2026, 11, 24)).at == datetime(2026, 11, 24).astimezone().timestamp(), "naive is local"
    assert dispatch_options(id="order-7_x").id == "order-7_x"
    assert dispatch_options(priority=5, queue="mail").overrides == {"priority": 5, "queue": "mail"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": -1}, "delay must be seconds or a timedelta, from 0 to ten years"),
        ({"delay": timedelta(seconds=-1)}, "delay must be"),
        ({"delay": "10"}, "delay must be"),
        ({"delay": None}, "delay must be"),
        ({"delay": True}, "delay must be"),
        ({"delay": float("nan")}, "delay must be"),
        ({"delay": 10**400}, "delay must be"),
        ({"at": 1790000000}, "at must be a datetime"),
        ({"at": "tomorrow"}, "at must be a datetime"),
        ({"at": date(2026, 1, 1)}, "at must be a datetime"),
        ({"at": datetime.min}, "at is out of range"),
        ({"id": ""}, "an id is 1 to 64 letters, digits, - and _"),
        ({"id": "a" * 65}, "an id is"),
        ({"id": "a b"}, "an id is"),
        ({"id": "a\n"}, "an id is"),
        ({"id": 7}, "an id is"),
        ({"delay": 1e300}, "from 0 to ten years"),
        ({"delay": 3, "at": datetime(2030, 1, 1)}, "give one of them"),
        ({"isolated": True}, "isolated is decided where the job is declared, not at dispatch"),
        ({"start": "fork"}, "start is decided where the job is declared"),
        ({"name": "other"}, "a job has no option 'name'"),
    ],
)
def test_what_a_dispatch_cannot_be_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dispatch_options(**options)


def test_what_a_dispatch_says_stands_in_its_envelope_and_nothing_else() -> None:
    declared = job(name="declared", timeout=99, priority=3, queue="slow")(lambda a: None)
    plain = prepare(declared.job(1), declared.registration)
    assert (plain.queue, plain.priority, plain.delay_s, plain.at) == ("slow", 3, 0, None)
    assert b"timeout" not in plain.envelope
    bound = declared.options(timeout=5, queue="fast", priority=-1, delay=7, id="mine").job(1)
    told = prepare(bound, declared.registration)
    assert (told.id, told.queue, told.priority, told.delay_s) == ("mine", "fast", -1, 7)
    assert b'"timeout":5' in told.envelope
    with pytest.raises(UsageError, match=r"the arguments do not fit job 'declared'\(a\)"):
        prepare(declared.job(1, 2), declared.registration)


def in_a_job(inline: bool, function: Callable[[], Any]) -> Any:
    """What `function` returns inside of a running job."""

    def inside() -> Any:
        enter(JobContext(id="1", name="outer", queue="q", attempt=1, deadline=None, inline=inline, services=None))  # type: ignore
        return function()

    return copy_context().run(inside)


def test_a_blocking_dispatch_in_an_inline_job_is_refused_and_says_what_to_write(dispatched: list[BoundJob]) -> None:
    send = job(name="send_email")(lambda to: None)
    advice = r"'outer' runs inline.*write `yield enqueue\(send_email\.job\(\.\.\.\)\)` \(or `await enqueue"
    for dispatch in (
        lambda: send.dispatch("a"),
        lambda: send.job("a").dispatch(),
        lambda: send.options(delay=1).dispatch("a"),
        lambda: dispatch_many([send.job("a")]),
        lambda: send.adispatch("a").send(None),
    ):
        with pytest.raises(RuntimeError, match=advice):
            in_a_job(True, dispatch)
    assert dispatched == []
    assert in_a_job(False, lambda: send.dispatch("a")) == "handle 0", "in a child it may block"


def test_without_a_dispatcher_the_error_says_what_is_missing() -> None:
    before = get_dispatcher()
    set_dispatcher(None)
    try:
        with pytest.raises(RuntimeError, match="nothing to dispatch to: import kqueue"):
            job(name="a")(lambda: None).dispatch()
    finally:
        set_dispatcher(before)


def test_an_asyncio_application_awaits_its_dispatch(dispatched: list[BoundJob]) -> None:
    class Send(KQueueJob):
        name = "send"

        def handle(self) -> None: ...

    ping = job(name="ping")(lambda: None)

    async def application() -> list[Any]:
        return [await Send.adispatch(), await ping.adispatch(), await ping.options(priority=5).adispatch()]

    assert asyncio.run(application()) == ["handle 0", "handle 1", "handle 2"]
    assert [bound.name for bound in dispatched] == ["send", "ping", "ping"]


def test_outside_of_a_job_there_is_no_current_one() -> None:
    with pytest.raises(RuntimeError, match="only there inside a running job"):
        current()
    assert in_a_job(True, lambda: current().name) == "outer"


# -- the states ---------------------------------------------------------------------------------------------------------------


def test_every_state_can_be_reached_and_left() -> None:
    assert {after for _, _, after in TRANSITIONS} >= set(JobState)
    assert {before for before, _, _ in TRANSITIONS} >= set(JobState) - {JobState.DEAD}
    assert len({(before, why) for before, why, _ in TRANSITIONS}) == len(TRANSITIONS), "what follows is no matter of luck"


def test_what_the_package_exports_is_there() -> None:
    for name in kqueue.__all__:
        assert getattr(kqueue, name) is not None
    assert set(kqueue.__all__) <= set(dir(kqueue))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        kqueue.nonsense  # noqa: B018
    assert JobHandle is kqueue.JobHandle


# -- types --------------------------------------------------------------------------------------------------------------------

GOOD = """
    from datetime import timedelta
    from kqueue import BoundJob, JobHandle, KQueueJob, dispatch_many, enqueue, job, sleep

    class SendEmail(KQueueJob):
        timeout = 10
        def __init__(self, to: str, *, copies: int = 1) -> None:
            self.to = to
        def handle(self):  # type: ignore[no-untyped-def]
            yield sleep(0.5)

    @job
    def plain(path: str, retries: int = 3) -> dict[str, int]:
        return {path: retries}

    @job(isolated=True, timeout=300)
    def heavy(path: str) -> None: ...

    @job
    async def ping(url: str) -> bool:
        await sleep(0.1)
        await enqueue(SendEmail.job("a@b.c"))
        return True

    reveal_type(plain("x"))
    reveal_type(plain.dispatch("x", retries=1))
    reveal_type(plain.job("x"))
    reveal_type(heavy.options(delay=timedelta(seconds=1)).job("x"))
    reveal_type(SendEmail.dispatch("x", copies=2))
    reveal_type(SendEmail.job("x"))
    reveal_type(SendEmail.options(priority=5).dispatch("x"))
    reveal_type(ping)
    reveal_type(dispatch_many([SendEmail.job("a"), plain.job("b")]))
"""
REVEALED = [
    "dict[str, int]", "JobHandle", "BoundJob", "BoundJob", "JobHandle", "BoundJob", "JobHandle", "Coroutine[Any, Any, bool]",
    "list[kqueue.job.JobHandle]",
]  # fmt: skip
BAD = """
    plain(5)
    plain.dispatch(5)
    plain.dispatch("x", retry=1)
    plain.job()
    heavy.dispatch("x", "y")
    heavy.options(delay=1).dispatch(5)
    ping.dispatch(url=5)
    SendEmail.dispatch(5)
    SendEmail.dispatch("x", 2)
    SendEmail.job()
    SendEmail.options(priority=5).dispatch(to=5)
    SendEmail.dispatch("x").status()
"""


def test_types_carry_through_from_the_declaration_to_the_dispatch(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """ParamSpec for functions under @job and for KQueueJob classes alike, as an application's `mypy --strict` sees it."""
    good, bad = textwrap.dedent(GOOD), textwrap.dedent(BAD)
    sample = tmp_path / "application.py"
    sample.write_text(good + bad)
    kept = getattr(request.config, "cache", None)  # None: pytest was told to keep nothing
    root, cache = str(Path(kqueue.__file__).parent.parent), kept.mkdir("mypy") if kept else tmp_path / "mypy"
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", str(sample)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path, env={"MYPYPATH": root})
    lines = [line for line in done.stdout.splitlines() if line.startswith(sample.name)]
    revealed = [line.split('"')[1] for line in lines if "Revealed type" in line]
    assert [wanted in seen for seen, wanted in zip(revealed, REVEALED, strict=True)] == [True] * len(REVEALED), revealed
    first_bad = good.count("\n") + 2
    in_error = {int(line.split(":")[1]) for line in lines if ": error:" in line}
    assert in_error == set(range(first_bad, first_bad + len(bad.split("\n")) - 2)), done.stdout + done.stderr
