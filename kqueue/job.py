"""Jobs: how they are declared, registered by name and bound to arguments, and the states they go through.

A job is a `KQueueJob` class or a function under `@job`. Registration gives it a name and validated `JobOptions`; nothing but
a registered name ever runs. `SendEmail.job("a")` binds arguments without running anything; dispatching hands that to the
dispatcher that the package injects (the client in an application, the supervisor's frames in a child). Brokers and loops must
never appear here.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from time import time
from typing import Any, ClassVar, Final, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

from .context import current_or_none
from .errors import ArgumentsDoNotFit, DuplicateJob, JobNotFound, UsageError, nearest
from .ids import PATTERN as ID_PATTERN

P = ParamSpec("P")
R = TypeVar("R")

PRIORITY_MIN: Final = -100
PRIORITY_MAX: Final = 100
QUEUE_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")  # no braces: they are the hash tag of a Redis key
LONGEST_DELAY_S: Final = 10 * 366 * 86400.0  # longer is a slip of the pen
STARTS: Final = ("fork", "pool", "exec")


class JobState(enum.Enum):
    """Where a job stands. What may follow what is TRANSITIONS, and docs/states.md prints that table."""

    DELAYED = "delayed"  # due in the future
    READY = "ready"  # may be reserved
    LEASED = "leased"  # one supervisor holds it, by token
    DONE = "done"  # gone, or kept with its result while `keep_result` lasts
    DEAD = "dead"  # gave up; kept with its certificates until someone retries or forgets it


TRANSITIONS: Final[tuple[tuple[JobState | None, str, JobState | None], ...]] = (
    (None, "enqueue", JobState.READY),
    (None, "enqueue with a delay", JobState.DELAYED),
    (JobState.DELAYED, "due", JobState.READY),
    (JobState.READY, "reserve", JobState.LEASED),
    (JobState.LEASED, "ack", JobState.DONE),
    (JobState.LEASED, "release", JobState.READY),
    (JobState.LEASED, "release with a delay", JobState.DELAYED),
    (JobState.LEASED, "bury", JobState.DEAD),
    (JobState.LEASED, "its owner's expiry or death", JobState.READY),
    (JobState.READY, "cancel", JobState.DEAD),
    (JobState.DELAYED, "cancel", JobState.DEAD),
    (JobState.DONE, "expiry of its result", None),
)
"""(from, by what, to); None: the job does not exist."""


class JobOptions(NamedTuple):
    """What a job declares about itself. Class attributes of the same names mean the same."""

    timeout: float = 30  # seconds of wall time; 0: no limit
    max_memory: int = 64  # MiB
    isolated: bool | None = None  # None: a generator or coroutine runs inline, a plain function in a child
    priority: int = 0  # -100..100; each point is a head start of one hour in the queue
    queue: str = "default"
    max_attempts: int = 3
    backoff: float | Sequence[float] | None = None  # seconds before each retry; None: 2, 4, 8 … up to an hour, jittered
    start: str = "fork"
    max_cpu: float = 0  # seconds of CPU time; 0: no limit
    keep_result: float = 0  # seconds that the result is kept; 0: not at all


class DispatchOptions(NamedTuple):
    """What one dispatch sets besides the job's own options. See `Dispatch.options`."""

    delay_s: float = 0
    at: float | None = None  # seconds since 1970; wins over delay_s
    id: str | None = None
    overrides: Mapping[str, Any] = {}  # of JobOptions


def _number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _wait(value: Any) -> bool:
    return _number(value) and bool(value >= 0)


_CHECKS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "timeout": (_wait, "seconds, 0 for no limit"),
    "max_memory": (lambda v: type(v) is int and v > 0, "a positive number of MiB"),
    "isolated": (lambda v: v is None or type(v) is bool, "True, False or None"),
    "priority": (lambda v: type(v) is int and PRIORITY_MIN <= v <= PRIORITY_MAX, "an integer from -100 to 100"),
    "queue": (lambda v: isinstance(v, str) and bool(QUEUE_NAME.fullmatch(v)), "1 to 64 of letters, digits and _ . : -"),
    "max_attempts": (lambda v: type(v) is int and v >= 1, "an integer of at least 1"),
    "backoff": (
        lambda v: v is None or _wait(v) or (isinstance(v, (list, tuple)) and len(v) > 0 and all(map(_wait, v))),
        "seconds, or a list of seconds",
    ),
    "start": (lambda v: v == "fork", '"fork": this version has no "pool" and no "exec"'),
    "max_cpu": (_wait, "seconds, 0 for no limit"),
    "keep_result": (_wait, "seconds, 0 for not at all"),
}


def check_option(name: str, value: Any) -> None:
    """Raise UsageError unless `value` may stand for the option `name`."""
    if name not in _CHECKS:
        raise UsageError(f"a job has no option {name!r}{nearest(name, list(_CHECKS))}")
    valid, wanted = _CHECKS[name]
    if not valid(value):
        raise UsageError(f"{name} must be {wanted}, not {value!r:.60}")


def checked_options(values: Mapping[str, Any]) -> JobOptions:
    """JobOptions of `values`, each checked. Raises UsageError."""
    for name, value in values.items():
        check_option(name, value)
    return JobOptions(**values)


class Registration(NamedTuple):
    """A job that may run here. `target` is None in a supervisor that knows it only from the template's manifest."""

    name: str
    options: JobOptions
    target: Callable[..., Any] | None  # the function, or the KQueueJob class
    cooperative: bool  # its handler is a generator or coroutine function
    module: str
    signature: str = ""  # for people: "(to: str)"

    @property
    def isolated(self) -> bool:
        """Whether it runs in a child: as declared, else by the kind of its handler."""
        return not self.cooperative if self.options.isolated is None else self.options.isolated

    @property
    def lane(self) -> str:
        return "isolated" if self.isolated else "inline"

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the handler: a generator or coroutine for a cooperative one, else its result. Raises ArgumentsDoNotFit."""
        if self.target is None:
            raise JobNotFound(f"job {self.name!r} is known from the manifest only; its code is not imported here")
        bound = _call(self.target, self.name, args, kwargs)
        return bound.handle() if isinstance(self.target, type) else bound


def _call(target: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return target(*args, **kwargs)
    except TypeError as error:
        # Raised by the call itself (no frame of the target was entered): the arguments do not fit. `inspect` would tell
        # beforehand, and cost the supervisor 1 MB.
        here = error.__traceback__
        if here is not None and here.tb_next is None:
            raise ArgumentsDoNotFit(f"the arguments do not fit job {name!r}: {error}") from None
        raise


class Registry:
    """Jobs by name. There is one per process, `registry`."""

    def __init__(self) -> None:
        self._jobs: dict[str, Registration] = {}

    def add(self, registration: Registration) -> None:
        """Register a job. DuplicateJob when another one has its name; the same code imported twice (`__main__`) is no other."""
        old = self._jobs.get(registration.name)
        if old is not None and _code(old) != _code(registration):
            raise DuplicateJob(
                f"two jobs are named {registration.name!r}, in {old.module} and in {registration.module}; give one a name="
            )
        self._jobs[registration.name] = registration

    def learn(self, registration: Registration) -> None:
        """Take a job from the template's manifest. One whose code is not here can run in a child only.

        Of one whose code is here already, only how its signature reads is new.
        """
        known = self._jobs.get(registration.name)
        if known is not None and known.target is not None:
            self._jobs[registration.name] = known._replace(signature=registration.signature)
        else:
            isolated = registration._replace(options=registration.options._replace(isolated=True))
            self._jobs[registration.name] = isolated

    def get(self, name: str) -> Registration | None:
        return self._jobs.get(name)

    def names(self) -> list[str]:
        return sorted(self._jobs)

    def __iter__(self) -> Any:
        return iter([self._jobs[name] for name in self.names()])

    def __len__(self) -> int:
        return len(self._jobs)


registry: Final = Registry()


def _code(registration: Registration) -> tuple[str, int, str]:
    target = registration.target
    handler = getattr(target, "handle", None) if isinstance(target, type) else target
    code = getattr(handler, "__code__", None)
    place = (code.co_filename, code.co_firstlineno) if code is not None else (registration.module, 0)
    return (*place, getattr(target, "__qualname__", ""))


_GENERATOR, _COROUTINE, _ITERABLE_COROUTINE, _ASYNC_GENERATOR = 0x20, 0x80, 0x100, 0x200  # inspect.CO_*, without inspect


def _is_cooperative(handler: Any, name: str) -> bool:
    """By the code flags of the function under any partial or method. UsageError for an async generator."""
    while not hasattr(handler, "__code__"):
        inner = getattr(handler, "func", None) or getattr(handler, "__func__", None) or getattr(handler, "__wrapped__", None)
        if inner is None:
            return False
        handler = inner
    flags = handler.__code__.co_flags
    if flags & _ASYNC_GENERATOR:
        raise UsageError(f"job {name!r} is an async generator (it both awaits and yields); use `async def` without yield")
    return bool(flags & (_GENERATOR | _COROUTINE | _ITERABLE_COROUTINE))


def _register(target: Callable[..., Any], name: str, handler: Any, values: Mapping[str, Any]) -> Registration:
    if not isinstance(name, str) or not 0 < len(name) <= 255 or not name.isprintable():
        raise UsageError(f"a job's name is a printable text of 1 to 255 characters, not {name!r:.60}; give it a name=")
    try:
        options = checked_options(values)
        registration = Registration(name, options, target, _is_cooperative(handler, name), target.__module__)
    except UsageError as error:
        raise UsageError(f"job {name!r}: {error}") from None
    registry.add(registration)
    return registration


# -- binding and dispatching ----------------------------------------------------------------------------------------------


class JobHandle(Protocol):
    """What a dispatch returns."""

    id: str

    def state(self) -> JobState:
        """Where the job stands now. A job that is gone reads as DONE."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: without end) until it is done or dead; whether it is."""

    def result(self, timeout: float | None = None) -> Any:
        """Wait, then its result. JobFailed: it is dead; ResultNotKept: without `keep_result`; TimeoutError: it still runs."""

    def cancel(self) -> bool:
        """Bury it if it still waits; whether it did."""


class BoundJob(NamedTuple):
    """A job with its arguments, not dispatched yet."""

    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    options: DispatchOptions = DispatchOptions()
    registration: Registration | None = None  # None: known by name only

    def dispatch(self) -> JobHandle:
        """Enqueue it; a handle."""
        return dispatch_many([self])[0]


Dispatcher = Callable[[Sequence[BoundJob]], "list[JobHandle]"]
_dispatcher: Dispatcher | None = None


def set_dispatcher(dispatcher: Dispatcher | None) -> None:
    """Decide where `dispatch` goes in this process: the client, or in a child the supervisor."""
    global _dispatcher
    _dispatcher = dispatcher


def get_dispatcher() -> Dispatcher | None:
    """Where `dispatch` goes in this process; None: nowhere yet."""
    return _dispatcher


def dispatch_many(jobs: Iterable[BoundJob]) -> list[JobHandle]:
    """Enqueue `jobs` in one round trip for each queue (and 500 jobs). Returns their handles, in order.

    Raises RuntimeError in an inline job (it would block every other one; yield `enqueue(...)` instead), BrokerUnavailable,
    QueueFull, and TypeError or EnvelopeError for arguments that cannot be carried.
    """
    jobs = list(jobs)
    for bound in jobs:
        if not isinstance(bound, BoundJob):
            raise TypeError(f"dispatch_many() takes bound jobs such as SendEmail.job(...), not {type(bound).__name__}")
    running = current_or_none()
    if running is not None and running.inline:
        raise RuntimeError(
            f"dispatch() blocks, and {running.name!r} runs inline, where that would stop every other job; "
            f"write `yield enqueue({jobs[0].name if jobs else 'Job'}.job(...))` (or `await enqueue(...)`)"
        )
    if not jobs:
        return []
    if _dispatcher is None:
        raise RuntimeError("nothing to dispatch to: import kqueue, not only kqueue.job")
    return _dispatcher(jobs)


async def _adispatch(bound: BoundJob) -> JobHandle:
    running = current_or_none()
    if running is not None and running.inline:
        return bound.dispatch()  # which refuses, and says what to write
    import asyncio

    return await asyncio.get_running_loop().run_in_executor(None, bound.dispatch)


class Dispatch(Generic[P]):
    """A job with options for one dispatch: `SendEmail.options(delay=10).dispatch("a")`."""

    def __init__(self, registration: Registration, options: DispatchOptions | None = None) -> None:
        self._registration = registration
        self._options = options or DispatchOptions()

    def job(self, /, *args: P.args, **kwargs: P.kwargs) -> BoundJob:
        """Bind the arguments, dispatch nothing."""
        return BoundJob(self._registration.name, args, kwargs, self._options, self._registration)

    def dispatch(self, /, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """Enqueue it with these arguments; a handle."""
        return self.job(*args, **kwargs).dispatch()

    async def adispatch(self, /, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """The same from an asyncio application, in its default executor."""
        return await _adispatch(self.job(*args, **kwargs))


def dispatch_options(*, delay: Any = 0, at: Any = None, id: str | None = None, **overrides: Any) -> DispatchOptions:
    """Check what `.options(...)` was given: `delay` (seconds or timedelta), `at` (datetime), `id`, and any of JobOptions.

    An id makes the dispatch idempotent: while a job of that id exists, another one is not added. A naive `at` is local time.
    Raises UsageError.
    """
    if hasattr(delay, "total_seconds"):
        delay = delay.total_seconds()
    if not _number(delay) or not 0 <= delay <= LONGEST_DELAY_S:
        raise UsageError(f"delay must be seconds or a timedelta, from 0 to ten years, not {delay!r:.60}")
    if at is not None and not hasattr(at, "timestamp"):
        raise UsageError(f"at must be a datetime, not {at!r:.60}")
    if at is not None and delay:
        raise UsageError("delay and at both say when the job is due; give one of them")
    try:
        due = None if at is None else at.timestamp()
    except (ValueError, OverflowError, OSError) as error:  # a naive one that is before any time zone's year 1
        raise UsageError(f"at is out of range: {error}") from None
    if due is not None and due > time() + LONGEST_DELAY_S:
        raise UsageError(f"at is more than ten years from now: {at}")
    if id is not None and not (isinstance(id, str) and ID_PATTERN.fullmatch(id)):
        raise UsageError(f"an id is 1 to 64 letters, digits, - and _, not {id!r:.60}")
    for name, value in overrides.items():
        check_option(name, value)
        if name in ("isolated", "start"):
            raise UsageError(f"{name} is decided where the job is declared, not at dispatch")
    return DispatchOptions(delay, due, id, overrides)


# -- declaring ----------------------------------------------------------------------------------------------------------


@runtime_checkable
class KQueueJobInterface(Protocol):
    """What the original design calls a job."""

    def handle(self) -> Any: ...
    def get_timeout(self) -> float: ...
    def get_max_memory(self) -> int: ...
    def is_isolated(self) -> bool: ...
    def get_priority(self) -> int: ...


class KQueueJob:
    """Base of a job written as a class: `__init__` takes the JSON arguments of the dispatch, `handle` does the work.

    Options are class attributes (see `JobOptions`), or one `options = JobOptions(...)`. They are read from the class when it is
    defined, never from an instance.
    """

    name: ClassVar[str]
    timeout: ClassVar[float] = 30
    max_memory: ClassVar[int] = 64
    isolated: ClassVar[bool | None] = None
    priority: ClassVar[int] = 0
    queue: Any = "default"
    max_attempts: ClassVar[int] = 3
    backoff: ClassVar[float | Sequence[float] | None] = None
    start: ClassVar[str] = "fork"
    max_cpu: ClassVar[float] = 0
    keep_result: ClassVar[float] = 0
    registration: ClassVar[Registration]
    _declared: ClassVar[JobOptions | None] = None  # its own `options`, or its base's; None: the attributes above say them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(cls.__dict__.get("options"), JobOptions):
            cls._declared = cls.__dict__["options"]
            del cls.options  # so that `SendEmail.options(delay=…)` still works
        for getter in ("get_timeout", "get_max_memory", "is_isolated", "get_priority"):
            if getter in cls.__dict__:
                option = getter.split("_", 1)[1]
                raise UsageError(
                    f"job {cls.__qualname__!r} defines {getter}(), which nothing would call: options are read from the class, "
                    f"so write {option} = …"
                )
        if cls.handle is KQueueJob.handle:
            return  # a base of jobs, not a job
        declared = cls._declared
        values = {name: getattr(cls, name) for name in JobOptions._fields} if declared is None else declared._asdict()
        name = cls.__dict__.get("name", cls.__qualname__)
        cls.registration = _register(cls, name, cls.handle, values)

    def handle(self) -> Any:
        """The work. A generator or coroutine function runs inline, a plain one in a child, unless `isolated` says otherwise."""
        raise NotImplementedError(f"{type(self).__qualname__} does not define handle()")

    @classmethod
    def job(cls: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> BoundJob:
        """Bind the arguments, dispatch nothing."""
        return _dispatch_of(cls).job(*args, **kwargs)

    @classmethod
    def dispatch(cls: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """Enqueue it with these arguments; a handle. See `dispatch_many` for what it raises."""
        return _dispatch_of(cls).dispatch(*args, **kwargs)

    @classmethod
    async def adispatch(cls: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """The same from an asyncio application."""
        return await _dispatch_of(cls).adispatch(*args, **kwargs)

    @classmethod
    def options(cls: Callable[P, Any], **options: Any) -> Dispatch[P]:
        """Options for one dispatch. See `dispatch_options`."""
        return Dispatch(_registration_of(cls), dispatch_options(**options))

    def get_timeout(self) -> float:
        return self.registration.options.timeout

    def get_max_memory(self) -> int:
        return self.registration.options.max_memory

    def is_isolated(self) -> bool:
        return self.registration.isolated

    def get_priority(self) -> int:
        return self.registration.options.priority


def _registration_of(cls: Any) -> Registration:
    registration = cls.__dict__.get("registration")
    if not isinstance(registration, Registration):
        raise UsageError(f"{cls.__qualname__} is no job: it does not define handle()")
    return registration


def _dispatch_of(cls: Callable[P, Any]) -> Dispatch[P]:
    return Dispatch(_registration_of(cls))


class JobFunction(Generic[P, R]):
    """A function under `@job`. Calling it still calls the function."""

    def __init__(self, function: Callable[P, R], name: str | None, values: Mapping[str, Any]) -> None:
        if isinstance(function, type) or not callable(function):
            raise UsageError(f"@job takes a function, or options as in @job(timeout=10), not {function!r:.60}")
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, attribute, getattr(function, attribute, None))
        self.__wrapped__ = function
        known_as = getattr(function, "__qualname__", "") if name is None else name
        self.registration = _register(function, known_as, function, values)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.__wrapped__(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<job {self.registration.name!r}>"

    def job(self, /, *args: P.args, **kwargs: P.kwargs) -> BoundJob:
        """Bind the arguments, dispatch nothing."""
        return Dispatch[P](self.registration).job(*args, **kwargs)

    def dispatch(self, /, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """Enqueue it with these arguments; a handle. See `dispatch_many` for what it raises."""
        return Dispatch[P](self.registration).dispatch(*args, **kwargs)

    async def adispatch(self, /, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """The same from an asyncio application."""
        return await Dispatch[P](self.registration).adispatch(*args, **kwargs)

    def options(self, **options: Any) -> Dispatch[P]:
        """Options for one dispatch. See `dispatch_options`."""
        return Dispatch(self.registration, dispatch_options(**options))


@overload
def job(function: Callable[P, R], /) -> JobFunction[P, R]: ...
@overload
def job(*, name: str | None = None, **options: Any) -> Callable[[Callable[P, R]], JobFunction[P, R]]: ...
def job(function: Callable[..., Any] | None = None, /, *, name: str | None = None, **options: Any) -> Any:
    """Declare a function to be a job: `@job`, or `@job(timeout=300)` with any of JobOptions. Raises UsageError, DuplicateJob."""
    if function is not None:
        return JobFunction(function, name, options)
    return lambda decorated: JobFunction(decorated, name, options)
