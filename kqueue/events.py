"""Facts: what happened, as small typed tuples, told to whoever subscribed.

Emitting is a plain call, made at once and in order. A subscriber must be quick, and one that raises is reported, never felt
by the emitter. Logs, metrics and the control socket live on these; nothing here may know them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from .outcome import Outcome


class DaemonReady(NamedTuple):
    """The broker answered and the template is up: from now on jobs are reserved."""

    broker: str  # its address without secrets
    queues: list[str]
    start_s: float  # since the process began


class DaemonStopping(NamedTuple):
    """No more jobs are reserved. `why`: a signal's name, "burst", "memory", …"""

    why: str
    running: int


class DaemonStopped(NamedTuple):
    exit_code: int
    processed: int


class Heartbeat(NamedTuple):
    """Every few seconds (`runtime.memory_check`)."""

    memory_mib: float
    processed: int
    failed: int
    running: int
    state: str


class JobStarted(NamedTuple):
    id: str
    job: str
    strategy: str
    queue: str
    attempt: int


class JobEnded(NamedTuple):
    """An attempt ended. `then`: "done", "retry", "released" or "dead". `delay_s`: until the retry."""

    id: str
    job: str
    strategy: str
    queue: str
    outcome: Outcome
    then: str
    delay_s: float


class JobOutput(NamedTuple):
    """One line a child wrote to `stream` ("stdout" or "stderr")."""

    id: str
    job: str
    stream: str
    line: str


class JobProgress(NamedTuple):
    id: str
    job: str
    fraction: float
    note: str


class LeaseLost(NamedTuple):
    """The job belongs to somebody else by now, or is gone: its run was cancelled, or its outcome came too late to count."""

    id: str
    job: str


class OutboxSettled(NamedTuple):
    """At the start, what an earlier life of ours had left unsettled: settled now, or too late, since somebody had reserved it."""

    settled: int
    late: int


class SlowSlice(NamedTuple):
    """An inline job kept the loop for `seconds`, longer than `inline.max_slice`.

    `where`: the line at which it stood at that moment, and the call that blocked, if one did. `instead`: what to write there.
    """

    id: str
    job: str
    seconds: float
    where: str
    instead: str = ""


class JobPromoted(NamedTuple):
    """A job class blocked the loop too often, for `seconds` the last time, and runs isolated now. For the rest see SlowSlice."""

    job: str
    seconds: float
    where: str
    instead: str = ""


class BrokerLost(NamedTuple):
    broker: str
    reason: str
    retry_in_s: float


class BrokerBack(NamedTuple):
    broker: str


class JobsRecovered(NamedTuple):
    """Jobs of a supervisor that died are ready again."""

    queue: str
    jobs: int


class DeadForgotten(NamedTuple):
    """Retention (`queue.dead`) dropped dead letters."""

    queue: str
    jobs: int


class TemplateStarted(NamedTuple):
    pid: int
    jobs: int
    start_s: float


class TemplateReplaced(NamedTuple):
    """A new template forks in place of the old one, which lives until its last child has ended. `children`: how many it has."""

    old_pid: int  # 0: there was none
    pid: int
    children: int


class TemplateDied(NamedTuple):
    pid: int
    reason: str
    restart_in_s: float


class LeftoversEnded(NamedTuple):
    """Processes that jobs of `whose` had left behind were found and killed: "5123 (python)", …"""

    whose: str
    processes: list[str]


class IsolationKnown(NamedTuple):
    """How isolated jobs are killed and held to their limits where this daemon runs."""

    how: str


class EnvironmentWithheld(NamedTuple):
    """Variables that the daemon has and its isolated jobs have not."""

    names: list[str]


class Warned(NamedTuple):
    """Something the operator should know; `message` says the next step."""

    message: str


Fact = TypeVar("Fact")


class Events:
    """Who wants to hear of which facts. One per runtime."""

    def __init__(self) -> None:
        self._subscribers: dict[type[Any], list[Callable[[Any], None]]] = {}

    def subscribe(self, kind: type[Fact], subscriber: Callable[[Fact], None]) -> None:
        """Call `subscriber` with every fact of `kind` from now on."""
        self._subscribers.setdefault(kind, []).append(subscriber)

    def hears(self, kind: type[Any]) -> bool:
        """Whether anybody wants facts of `kind`: those that come ten thousand times a second need not be made for nobody."""
        return kind in self._subscribers

    def emit(self, fact: NamedTuple) -> None:
        """Tell everyone who subscribed to this kind of fact."""
        for subscriber in self._subscribers.get(type(fact), ()):
            try:
                subscriber(fact)
            except Exception as error:
                print(f"kqueue: a subscriber of {type(fact).__name__} failed: {error!r}", file=sys.stderr)
