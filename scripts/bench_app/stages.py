"""Stages: how long a program spends in each of some named functions, what they call in others of them not counted.

A function is wrapped where it is looked up. Whenever one is entered or left, the time since the last such moment goes to the
stage that was under way. A generator's time is that of its steps. What the wrapping itself costs is measured on an empty
function, once for the stage (from its clock to its clock) and once for whoever calls it, and subtracted. It is the thread's CPU
time: neither neighbours nor a server that the kernel lets run first make a stage longer. Python collects its garbage in
whatever stage it happens to be.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

CALIBRATIONS, ROUNDS = 20_000, 5


class Taken(NamedTuple):
    seconds: float
    entered: int  # how often; a generator each time it is resumed


class Stages:
    """`root`: the stage of everything that is not wrapped."""

    def __init__(self, root: str) -> None:
        self._now: str = root
        self._since = time.thread_time_ns()
        self._ns: dict[str, int] = {root: 0}
        self._entered: dict[str, int] = {root: 0}
        self._calls: dict[str, int] = {root: 0}  # of other stages, by this one
        self.missing: list[str] = []  # targets that there are not

    def clear(self) -> None:
        """Begin anew, in whatever stage it is."""
        for counts in (self._ns, self._entered, self._calls):
            counts.update(dict.fromkeys(counts, 0))
        self._since = time.thread_time_ns()

    def watch(self, stage: str, targets: Sequence[str]) -> None:
        """Time "module:name.of.the.function" for each of `targets` as `stage`."""
        for counts in (self._ns, self._entered, self._calls):
            counts.setdefault(stage, 0)
        for target in targets:
            owner, name, function = find(target)
            if function is None:
                self.missing.append(target)
            else:
                setattr(owner, name, self.timed(stage, function))

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self._enter(stage)
            self._since = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self._leave(before, time.thread_time_ns())

        @functools.wraps(function)
        def steps(*args: Any, **kwargs: Any) -> Any:
            generator = function(*args, **kwargs)
            resume, value = generator.send, None
            while True:
                before = self._enter(stage)
                self._since = time.thread_time_ns()
                try:
                    trap = resume(value)
                except StopIteration as end:
                    return end.value
                finally:
                    self._leave(before, time.thread_time_ns())
                try:
                    resume, value = generator.send, (yield trap)
                except BaseException as error:
                    resume, value = generator.throw, error

        return steps if inspect.isgeneratorfunction(function) else call

    def _enter(self, stage: str) -> str:
        before = self._now
        self._ns[before] += time.thread_time_ns() - self._since
        self._calls[before] += 1
        self._entered[stage] += 1
        self._now = stage
        return before

    def _leave(self, before: str, now: int) -> None:
        self._ns[self._now] += now - self._since
        self._now = before
        self._since = time.thread_time_ns()

    def taken(self) -> dict[str, Taken]:
        """What each stage took by now, without what the watching took."""
        own_ns, callers_ns = calibrated()
        return {
            stage: Taken(max(0.0, ns - entered * own_ns - self._calls[stage] * callers_ns) / 1e9, entered)
            for stage, ns in self._ns.items()
            for entered in [self._entered[stage]]
        }


def find(target: str) -> tuple[Any, str, Any]:
    """Where "module:Class.function" is looked up, by which name, and what it is; None: there is none."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    try:
        owner: Any = functools.reduce(getattr, parents, importlib.import_module(module))
    except (ImportError, AttributeError):
        return None, name, None
    return owner, name, getattr(owner, name, None)


@functools.cache
def calibrated() -> tuple[float, float]:
    """Nanoseconds that an entry adds to the stage itself, and to the one that it was entered from: the least of some rounds."""

    def empty() -> None:
        pass

    own, callers = [], []
    for _ in range(ROUNDS):
        stages = Stages("caller")
        stages.watch("empty", [])
        wrapped = stages.timed("empty", empty)
        began = time.thread_time_ns()
        for _ in range(CALIBRATIONS):
            empty()
        bare_ns = time.thread_time_ns() - began
        stages.clear()
        for _ in range(CALIBRATIONS):
            wrapped()
        stages._enter("empty")
        own.append(stages._ns["empty"] / CALIBRATIONS)
        callers.append((stages._ns["caller"] - bare_ns) / CALIBRATIONS)
    return min(own), max(0.0, min(callers))


def as_json(stages: Stages) -> Mapping[str, Any]:
    return {"missing": stages.missing, "taken": {name: [*taken] for name, taken in stages.taken().items()}}
