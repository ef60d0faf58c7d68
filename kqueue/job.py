"""Jobs as applications write them: `KQueueJob` classes and functions under `@job`, bound to arguments and dispatched.

`SendEmail.job("a")` binds arguments without running anything; dispatching hands that to the dispatcher that the package injects
(the client in an application, the supervisor's frames in a child). Brokers and loops must never appear here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

from .context import current_or_none
from .errors import UsageError
from .options import Backoff, DispatchOptions, JobOptions, dispatch_options
from .registry import Registration, register
from .states import JobState

P = ParamSpec("P")
R = TypeVar("R")

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
        return dispatch_many((self.job(*args, **kwargs),))[0]

    async def adispatch(self, /, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """The same from an asyncio application, in its default executor."""
        return await _adispatch(self.job(*args, **kwargs))


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
    backoff: ClassVar[Backoff] = None
    start: ClassVar[str | None] = None
    max_cpu: ClassVar[float] = 0
    max_files: ClassVar[int] = 1024
    max_processes: ClassVar[int] = 256
    max_file_size: ClassVar[int] = 0
    keep_result: ClassVar[float] = 0
    retry_until: ClassVar[Any] = None
    retry_on: ClassVar[Any] = None
    dont_retry_on: ClassVar[Any] = None
    causes: ClassVar[Mapping[str, Any]] = {}
    user: Any = None
    group: Any = None
    network: Any = True
    private_tmp: Any = False
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
        cls.registration = register(cls, name, cls.handle, values)

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
        self.registration = register(function, known_as, function, values)
        self._as_declared: Dispatch[P] = Dispatch(self.registration)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.__wrapped__(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<job {self.registration.name!r}>"

    def job(self, /, *args: P.args, **kwargs: P.kwargs) -> BoundJob:
        """Bind the arguments, dispatch nothing."""
        return self._as_declared.job(*args, **kwargs)

    def dispatch(self, /, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """Enqueue it with these arguments; a handle. See `dispatch_many` for what it raises."""
        return dispatch_many((self._as_declared.job(*args, **kwargs),))[0]

    async def adispatch(self, /, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        """The same from an asyncio application."""
        return await self._as_declared.adispatch(*args, **kwargs)

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
