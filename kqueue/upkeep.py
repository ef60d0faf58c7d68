"""What a runtime does besides running jobs: keep its epoch alive, watch its memory, obey signals, and tell who listens.

No lease is settled here and no job is started.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, Final

from . import events as facts
from .codec import to_json
from .dispatch import describe
from .errors import KQueueError
from .kernel import Park, sleep
from .loading import ImportFailed
from .outcome import describe_error
from .process import resident_mib
from .registry import registry

if TYPE_CHECKING:
    from .kernel import Task
    from .kernel.signals import Signals
    from .runtime import KQueueRuntime

Steps = Generator[Any, Any, Any]

EXIT_RESTART: Final = 75  # EX_TEMPFAIL: the service manager is to start us again
EXIT_BUG: Final = 70  # EX_SOFTWARE


class Upkeep:
    """One for a runtime. `lease_s` seconds, `heartbeat_s` seconds, `memory_limit_mib` MiB (0: no limit)."""

    def __init__(self, runtime: KQueueRuntime, lease_s: float, heartbeat_s: float, memory_limit_mib: int) -> None:
        self._runtime = runtime
        self._lease_s = lease_s
        self._renewed_at = 0.0  # by the time since boot: when the last renewal that worked was sent
        self._sweeper: deque[Task] = deque()  # waits for a renewal
        self._heartbeat_s = heartbeat_s
        self._memory_limit_mib = memory_limit_mib

    def loops(self) -> list[Steps]:
        """The tasks to run as long as the runtime does."""
        return [self._keep_alive(), self._look_after(), self._beat()]

    def _keep_alive(self) -> Steps:
        """Renew our epoch every third of a lease, counted from the sending of the last renewal, whatever that one took."""
        clock = self._runtime.kernel.clock
        while True:
            while (left_s := self._renewed_at + self._lease_s / 3 - clock.boottime()) > 0:
                yield sleep(left_s)
            yield from self.renew()
            self._runtime.kernel.unpark(self._sweeper)

    def _look_after(self) -> Steps:
        """After a renewal, recover what dead epochs hold; hear of promotions once in a lease.

        A task of its own: no sweep, however long, may keep us from renewing. A renewal during one starts no other.
        """
        rounds = 0
        while True:
            yield Park(self._sweeper)
            yield from self.sweep()
            rounds += 1
            if rounds % 3 == 0 and (yield from self._runtime.promotions.load()):
                yield from self.publish()

    @property
    def in_doubt(self) -> bool:
        """Whether our lease may have run out, so that somebody may have recovered what we hold. Nothing may be reserved then."""
        return self._runtime.kernel.clock.boottime() - self._renewed_at > self._lease_s

    def opened(self, sent_at: float) -> None:
        """The broker was opened by a request sent at `sent_at`, which is as good as a renewal."""
        self._renewed_at = sent_at

    def renew(self) -> Steps:
        """Renew our epoch; where it may have lapsed, see what of all that we have is still ours."""
        sent_at = self._runtime.kernel.clock.boottime()
        doubtful = self.in_doubt
        alive = yield from self._runtime.broker.renew()
        if doubtful or not alive:
            yield from self._runtime.hold()
        self._renewed_at = max(self._renewed_at, sent_at)  # two may be under way

    def sweep(self) -> Steps:
        """Recover what dead epochs hold, let old dead letters go, and tell of both."""
        swept = yield from self._runtime.broker.sweep()
        self.recovered(swept.recovered)
        for queue, jobs in swept.forgotten.items():
            self._runtime.events.emit(facts.DeadForgotten(queue, jobs))

    def recovered(self, counts: Mapping[str, int]) -> None:
        """Jobs of dead supervisors are ready again."""
        for queue, jobs in counts.items():
            self._runtime.events.emit(facts.JobsRecovered(queue, jobs))
        if counts:
            self._runtime.feeding.nudge()

    def _beat(self) -> Steps:
        """The periodic line, and the look at our own memory."""
        runtime = self._runtime
        while True:
            yield sleep(self._heartbeat_s)
            memory_mib = resident_mib()
            runtime.events.emit(
                facts.Heartbeat(memory_mib, runtime.processed, runtime.failed, len(runtime.held), runtime.state)
            )
            if self._memory_limit_mib and memory_mib > self._memory_limit_mib:
                why = f"{memory_mib:.0f} MiB, over runtime.memory_limit {self._memory_limit_mib}"
                runtime.stop(why, exit_code=EXIT_RESTART)

    def obey(self, signals: Signals) -> Steps:
        """What each signal means: see INTERFACES."""
        runtime = self._runtime
        asked_to_stop = False
        while True:
            for name in (yield from signals.receive()):
                if name == "SIGUSR1":
                    runtime.quiet()
                elif name == "SIGHUP":
                    runtime.kernel.spawn(self._reload(), name="reload")
                elif name == "SIGUSR2":
                    self.warn("SIGUSR2: this version cannot upgrade in place; restart the service instead")
                elif asked_to_stop:
                    self.warn(f"{name} again: ending what still runs")
                    yield from runtime.hurry()
                else:
                    asked_to_stop = True
                    runtime.stop(name)

    def _reload(self) -> Steps:
        """New code for isolated jobs, while the old runs what it has begun. What cannot be imported changes nothing."""
        templates = self._runtime.isolated.link
        if self._runtime.state not in ("running", "quiet"):
            return
        if not templates.are_used:
            self.warn("SIGHUP: no job here is isolated, so there is no code to load anew; for inline jobs restart the service")
            return
        try:
            yield from templates.replace()
        except ImportFailed as error:
            self.warn(f"SIGHUP: the code that was running goes on, since the new one cannot be used: {error}")

    def publish(self) -> Steps:
        """Tell clients, for each of our queues, what can be dispatched to it, and within which limits."""
        runtime = self._runtime
        manifest = to_json({registration.name: describe(registration) for registration in registry})
        limits = to_json(runtime.security.published())
        documents = {f"manifest:{queue}": manifest for queue in runtime.queues}
        documents |= {f"limits:{queue}": limits for queue in runtime.queues}
        yield from runtime.broker.publish(documents)

    def warn(self, message: str) -> None:
        self._runtime.events.emit(facts.Warned(message))

    # -- what the kernel and the broker report ----------------------------------------------------------------------

    def crashed(self, task: Task) -> None:
        """A task of KQueue's own failed. Crash-only: stop, and let the service manager start a sound one."""
        if isinstance(task.error, KQueueError):  # such as a broker that refuses what it took before
            self.warn(str(task.error))
            self._runtime.stop(type(task.error).__name__, exit_code=task.error.exit_code)
            return
        trace = describe_error(task.error, whole=True)["traceback"] if task.error is not None else ""
        self.warn(f"internal error in {task.name}; please report it\n{trace}")
        self._runtime.stop("internal error", exit_code=EXIT_BUG)

    def broker_news(self, kind: str, text: str, retry_in_s: float) -> None:
        """`brokers.News`."""
        runtime = self._runtime
        if kind == "lost":
            runtime.events.emit(facts.BrokerLost(runtime.broker.address, text, retry_in_s))
        elif kind == "back":
            runtime.events.emit(facts.BrokerBack(runtime.broker.address))
        else:
            self.warn(text)
