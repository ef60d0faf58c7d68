"""The registry: which jobs may run here, by name. Nothing but a registered name ever runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from .errors import ArgumentsDoNotFit, DuplicateJob, JobNotFound, UsageError, nearest
from .options import PRIVILEGES, JobOptions, checked_options


class Parameters(NamedTuple):
    """What a job takes whose code no process of KQueue has: a command. `more`: and any others by name."""

    names: tuple[str, ...]
    more: bool = False

    def __str__(self) -> str:
        return f"({', '.join([*self.names, *(['**more'] if self.more else [])])})"

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name; those without one stand in the order of `names`. Raises UsageError."""
        if len(args) > len(self.names):
            raise UsageError(f"it takes {len(self.names)} arguments without a name, and was given {len(args)}")
        given = dict(zip(self.names, args, strict=False))
        if twice := [name for name in given if name in kwargs]:
            raise UsageError(f"it was given {', '.join(map(repr, twice))} twice")
        given.update(kwargs)
        if missing := [name for name in self.names if name not in given]:
            raise UsageError(f"it lacks {', '.join(map(repr, missing))}")
        if not self.more and (unknown := [name for name in given if name not in self.names]):
            raise UsageError(f"it takes no {', '.join(map(repr, unknown))}{nearest(unknown[0], self.names)}")
        return given


class Registration(NamedTuple):
    """A job that may run here. `target` is None in a supervisor that knows it only from the template's manifest."""

    name: str
    options: JobOptions
    target: Callable[..., Any] | None  # the function, or the KQueueJob class
    cooperative: bool  # its handler is a generator or coroutine function
    module: str
    signature: str = ""  # for people: "(to: str)"
    chosen: str = ""  # "inline" or "isolated", where `isolated` is None: by the operator, or since it blocked; "": by its kind
    parameters: Parameters | None = None  # of a command; None: it is Python, and its code says them

    @property
    def isolated(self) -> bool:
        """Whether it runs in a child: as declared, else as chosen, else by the kind of its handler."""
        if self.options.isolated is not None:
            return self.options.isolated
        return self.chosen == "isolated" if self.chosen else not self.cooperative

    @property
    def lane(self) -> str:
        return "isolated" if self.isolated else "inline"

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the handler: a generator or coroutine for a cooperative one, else its result. Raises ArgumentsDoNotFit."""
        if self.target is None:
            raise JobNotFound(f"job {self.name!r} is known from the manifest only; its code is not imported here")
        bound = call_target(self.target, self.name, args, kwargs)
        return bound.handle() if isinstance(self.target, type) else bound


def call_target(target: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call the function or class that is a job. Raises ArgumentsDoNotFit, and whatever it raises itself."""
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
        self._learned: set[str] = set()  # those whose code is not here

    def add(self, registration: Registration) -> None:
        """Register a job. DuplicateJob when another one has its name; the same code imported twice (`__main__`) is no other."""
        old = self._jobs.get(registration.name)
        if old is not None and old.name not in self._learned and _code(old) != _code(registration):
            raise DuplicateJob(
                f"two jobs are named {registration.name!r}, in {old.module} and in {registration.module}; give one a name="
            )
        self._jobs[registration.name] = registration
        self._learned.discard(registration.name)

    def learn(self, registrations: Sequence[Registration]) -> None:
        """Take the jobs of a template's manifest, in place of those of an earlier one.

        One whose code is not here can run in a child only; of one whose code is here, only how its signature reads is new.
        DuplicateJob, with nothing changed, when a command has the name of one.
        """
        for registration in registrations:
            known = self._jobs.get(registration.name)
            if known is not None and known.parameters is not None:
                raise DuplicateJob(f"command {known.name!r} has the name of a job in {registration.module}: rename one of them")
        for name in self._learned:
            self._jobs.pop(name, None)
        self._learned = set()
        for registration in registrations:
            known = self._jobs.get(registration.name)
            if known is not None:
                self._jobs[known.name] = known._replace(signature=registration.signature)
            else:
                self._jobs[registration.name] = registration._replace(options=registration.options._replace(isolated=True))
                self._learned.add(registration.name)

    def choose(self, name: str, lane: str) -> None:
        """Let the job `name` run in `lane` ("": by its kind), unless it declares where. Nothing where there is none."""
        known = self._jobs.get(name)
        if known is not None and known.options.isolated is None and known.chosen != lane:
            self._jobs[name] = known._replace(chosen=lane)

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


def register(target: Callable[..., Any], name: str, handler: Any, values: Mapping[str, Any]) -> Registration:
    if not isinstance(name, str) or not 0 < len(name) <= 255 or not name.isprintable():
        raise UsageError(f"a job's name is a printable text of 1 to 255 characters, not {name!r:.60}; give it a name=")
    try:
        options = checked_options(values)
        if options.isolated is False and options.start is not None:
            raise UsageError(f"isolated=False and start={options.start!r} contradict each other; leave one out")
        special = [name for name in PRIVILEGES if getattr(options, name) != getattr(JobOptions(), name)]
        if options.isolated is False and special:
            shown = f"{special[0]}={getattr(options, special[0])!r}"
            raise UsageError(f"isolated=False and {shown} contradict each other; leave one out")
        if options.start is not None or special:
            options = options._replace(isolated=True)
        registration = Registration(name, options, target, _is_cooperative(handler, name), target.__module__)
    except UsageError as error:
        raise UsageError(f"job {name!r}: {error}") from None
    registry.add(registration)
    return registration
