"""The runtime: the life of a job, from its reservation to its settlement.

    reserve -> decode -> admit -> choose -> execute -> judge -> settle        (_life, read it first)

Around that there is little: `feeding.py` reserves for slots that are free and holds no backlog, `settling.py` ends leases in
batches, `upkeep.py` keeps the epoch alive, and `stop` turns "running" into "terminating". Everything is a task of one kernel.
Only this file says what becomes of a lease; how a job runs, how a queue stores it, and what a log says of it are other rooms.

    starting -> running <-> quiet
                   |          |
                   +-> terminating -> stopped
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NoReturn

from . import events as facts
from . import signing
from .ahead import Ahead
from .brokers import open_broker
from .brokers.base import LEASE_S, NO_RETENTION, STALE, Broker, Lease, Owner, Retention
from .budget import MemoryBudget
from .codec import decode
from .commands import Command
from .config import QueueSpec
from .context import JobContext
from .dispatch import prepare
from .errors import BrokerUnavailable, EnvelopeError, JobBlocked, JobCancelled, JobNotFound, JobTimedOut, NewerEnvelope, Refused
from .events import Events
from .execution.base import ExecutionStrategy, NotStarted, Work
from .execution.guard import SliceGuard
from .execution.inline import InlineExecutionStrategy
from .execution.isolated import IsolatedExecutionStrategy
from .execution.privileges import DEFAULT, Privileges
from .execution.workers import DEFAULTS, PoolSettings
from .feeding import Feeding
from .hostmemory import NO_BUDGET, Budget
from .ids import new_id
from .instance import SlicePage
from .intake import Intake
from .job import BoundJob
from .kernel import Abandoned, Clock, Kernel, Park, Task, join, sleep
from .kernel.signals import Signals
from .loading import register_commands, template_config
from .options import JobOptions
from .outbox import Outbox
from .outcome import Outcome, describe_error
from .promotion import Promotions
from .quarantine import Quarantine
from .registry import Registration, registry
from .security import SecurityConfig, admit, check_dispatch
from .services import RuntimeServices
from .settling import Ended, Held, Settling
from .signing import unsigned
from .slices import Slices
from .upkeep import EXIT_RESTART, Upkeep
from .verdict import defer, exhausted, judge, keep_apart, move, postpone, put_back

Steps = Generator[Any, Any, Any]

SETTLE_S: Final = 1.0  # to settle what was ended at shutdown; all of it stays within grace + kill_grace + 5 s (INTERFACES)


class KQueueRuntime:
    """Runs jobs from a broker. `KQueueRuntime("memory://").run(burst=True)` is a whole program.

    `broker`: a URL or an unopened Broker. `queues`: names, or QueueSpecs with weights. `template`: what the template imports, see
    `loading.template_config`; None: what is registered when it starts. `memory_budget`: what all isolated jobs that run may have
    together, see `hostmemory.budget`. `privileges`: what isolated jobs may do. All times are seconds, sizes MiB.
    """

    def __init__(
        self, broker: Broker | str = "memory://", *, queues: Sequence[QueueSpec | str] = ("default",),
        strict_order: bool = False, security: SecurityConfig | None = None, events: Events | None = None,
        clock: Clock | None = None, template: Mapping[str, Any] | None = None, identity: str = "",
        slice_page: SlicePage | None = None, outbox: str = "",
        lease_s: float = LEASE_S, retention: Retention = NO_RETENTION, max_inline: int = 10_000,
        max_isolated: int = 4, max_slice_s: float = 0.1, hard_slice_s: float = 5.0, kill_grace_s: float = 2.0,
        memory_headroom_mib: int = 128, cgroups: bool = True, default_start: str = "fork", pool: PoolSettings = DEFAULTS,
        commands: Sequence[Command] = (), offload_slots: int = 2, offload_memory_mib: int = 256,
        bury_unknown: bool = False, memory_limit_mib: int = 0, heartbeat_s: float = 5.0, grace_s: float = 20.0,
        memory_budget: Budget = NO_BUDGET, pins: Mapping[str, str] | None = None, privileges: Privileges = DEFAULT,
    ) -> None:  # fmt: skip
        self.events = events or Events()
        self.kernel = Kernel(clock=clock, max_slice_s=max_slice_s)
        self.upkeep = Upkeep(self, lease_s, heartbeat_s, memory_limit_mib)
        self.kernel.on_crash = self.upkeep.crashed
        self.broker = open_broker(broker, self.upkeep.broker_news) if isinstance(broker, str) else broker
        self.security = security or SecurityConfig()
        self.keys = None if self.security.signing_key_file is None else signing.load(self.security.signing_key_file)
        register_commands(commands)
        self.state = "starting"
        self.exit_code = 0
        self.processed = 0  # attempts that ended, whatever came of them
        self.failed = 0
        self.held: set[Held] = set()
        self._newest: dict[str, dict[str, Held]] = {}  # by queue, then by id
        self._specs = [QueueSpec(queue) if isinstance(queue, str) else queue for queue in queues]
        self._strict_order = strict_order
        self._slots = {"inline": max_inline, "isolated": max_isolated}
        self.memory = MemoryBudget(memory_budget, self.security.max_memory_mib)
        self.intake = self._new_intake()
        self._owner = Owner(new_id(), identity)
        self._slice_page = slice_page
        self.quarantine = Quarantine(slice_page, self.kernel.clock.monotonic)
        self._lease_s = lease_s
        self._retention = retention
        self._bury_unknown = bury_unknown
        self._grace_s = grace_s
        self._template_given = template
        self._strategies: dict[str, ExecutionStrategy] = {}
        self._services = RuntimeServices(self, offload_slots, offload_memory_mib)
        self.isolated = IsolatedExecutionStrategy(
            self.kernel, self.events, enqueue=self._services.enqueue_from_child, check=self._services.check_from_child,
            identity=identity, kill_grace_s=kill_grace_s, memory_headroom_mib=memory_headroom_mib, cgroups=cgroups,
            default_start=default_start, pool=pool, commands=commands, privileges=privileges,
        )  # fmt: skip
        self.add_strategy(InlineExecutionStrategy(self.kernel))
        self.add_strategy(self.isolated)
        self.ahead = Ahead(self.isolated.pool, self.memory, lambda: self.intake.excess, self._put_back)
        self.settling = Settling(self.kernel, self.broker, self.events, Outbox(outbox) if outbox else None, self._settled)
        self.settling.is_unhurried = lambda: self.isolated.pool.has_a_line
        self.promotions = Promotions(self, pins or {}, can_isolate=max_isolated > 0)
        self.slices = Slices(self.kernel, self.events, self.promotions, max_slice_s)
        self.feeding = Feeding(self)
        self._loops: list[Task] = []
        self._signals: Signals | None = None
        self._guard = SliceGuard(self.kernel, hard_slice_s, self._give_up, max_slice_s) if hard_slice_s else None
        if self._guard is not None:
            self.slices.standing = self._guard.standing
        # Where tasks wait: for the end, for the last job to end.
        self._stopper: deque[Task] = deque()
        self._drained: deque[Task] = deque()
        self._began = self.kernel.clock.monotonic()

    # -- the life of a job ------------------------------------------------------------------------------------------

    def _life(self, held: Held) -> Steps:
        """One reservation, from its bytes to its verdict. Whatever it raises is KQueue's own fault; `_ended` deals with it."""
        lease = held.lease
        try:
            data = self._unsigned(lease)
            envelope = self._decode(lease, data)
            held.job = envelope.job
            registration = self._registration(envelope.job)
            options = held.options = admit(self.security, envelope, registration, lease.counters.memory).options
        except (NewerEnvelope, JobNotFound) as reason:
            outcome = _refused(reason)
            return Ended(held, outcome, defer(lease, outcome, bury=self._bury_unknown), ran=False)
        except (EnvelopeError, Refused) as reason:
            outcome = _refused(reason)
            return Ended(held, outcome, judge(lease, held.options, outcome, "none"))

        was_lost = lease.counters.crashes or lease.counters.recoveries  # else it is neither exhausted nor a suspect
        if was_lost and (spent := exhausted(lease)) is not None:
            return Ended(held, *spent)
        strategy = self._choose(registration)
        if strategy.name != lease.lane and registration.options.isolated is None:
            yield from self.promotions.refresh()  # or two daemons of two minds would send it to and fro
            strategy = self._choose(self._registration(envelope.job))
        if strategy.name != lease.lane:
            return Ended(held, Outcome("cancelled", "supervisor"), move(lease, strategy.name), ran=False)
        if was_lost and not self.quarantine.admits(held):
            return Ended(held, Outcome("cancelled", "supervisor"), keep_apart(lease), ran=False)
        if lease.lane == "isolated":
            if lease.counters.memory:  # what grew, since it ran out of memory before, grows up to the budget
                options = held.options = options._replace(max_memory=self.memory.capped(options.max_memory))
            if (why := self.memory.why_never(options.max_memory)):
                outcome = _refused(Refused(why))
                return Ended(held, outcome, judge(lease, options, outcome, "none"))
            if not self.memory.take(held, lease.queue, envelope.id, options.max_memory):
                return Ended(held, Outcome("cancelled", "supervisor"), put_back(lease), ran=False)

        attempt = lease.counters.runs + 1
        alone = bool(was_lost and self.quarantine.suspects(held))
        work = self._work(registration, options, envelope, data, attempt, strategy.name, alone)
        running = self.intake.running["isolated"]
        if lease.lane == "isolated" and not self.isolated.may_start(work, running, self._slots["isolated"]):
            self.isolated.pool.slow_down()
            return Ended(held, Outcome("cancelled", "supervisor"), put_back(lease), ran=False)
        held.context, held.started = work.context, self.kernel.clock.monotonic()
        if self.events.hears(facts.JobStarted):
            self.events.emit(facts.JobStarted(envelope.id, envelope.job, strategy.name, lease.queue, attempt))
        try:
            outcome = yield from strategy.execute(work)
        except NotStarted as reason:
            self.events.emit(facts.Warned(f"{envelope.job} {envelope.id} could not start and is tried again in 5 s: {reason}"))
            return Ended(held, Outcome("cancelled", "kernel", error=describe_error(reason)), postpone(lease), ran=False)
        if held.is_dismissed:
            return Ended(held, outcome, put_back(lease), ran=False)
        convicted = bool(was_lost and self.quarantine.convicts(held))
        return Ended(held, outcome, judge(lease, options, outcome, strategy.name, convicted=convicted))

    def _unsigned(self, lease: Lease) -> bytes:
        if lease.envelope is None:
            raise EnvelopeError("there is no envelope: something other than KQueue wrote or removed it")
        return unsigned(lease.envelope) if self.keys is None else self.keys.check(lease.envelope)

    def _decode(self, lease: Lease, data: bytes) -> Any:
        envelope = decode(data, self.security.max_envelope_bytes, lease.token.id)
        if envelope.id != lease.token.id:
            raise EnvelopeError(f"the envelope of {lease.token.id} says that it is {envelope.id}'s")
        return envelope

    def _registration(self, name: str) -> Registration:
        """Only a registered name runs; no name in a payload is ever imported."""
        registration = registry.get(name)
        if registration is None:
            raise JobNotFound(f"no job is registered as {name!r} here: is its module in jobs.modules or jobs.isolated_modules?")
        return registration

    def _choose(self, registration: Registration) -> ExecutionStrategy:
        return self._strategies[registration.lane]

    def _work(
        self, registration: Registration, options: JobOptions, envelope: Any, data: bytes, attempt: int, lane: str,
        alone: bool = False,
    ) -> Work:  # fmt: skip
        deadline = self.kernel.clock.monotonic() + options.timeout if options.timeout else None
        context = JobContext(
            id=envelope.id, name=envelope.job, queue=envelope.queue, attempt=attempt, deadline=deadline,
            inline=lane == "inline", services=self._services, max_memory_mib=options.max_memory,
        )  # fmt: skip
        return Work(envelope, data, registration, options, attempt, context, alone)

    def _ended(self, held: Held, task: Task) -> None:
        """The task of a lease has ended, one way or another: free its slot and hand its verdict to the settler."""
        self.held.discard(held)
        self.quarantine.leave(held)
        newest, id = self._newest[held.lease.queue], held.lease.token.id
        if newest.get(id) is held:
            del newest[id]
        self.intake.ended(held.lease.queue, held.lease.lane)
        self.memory.give(held)
        ended: Ended = task.value if task.error is None else self._mishap(held, task.error)
        task.value = None  # it holds the task, and the collector would have to find that out
        if held.lost:
            self.memory.released(held)
            self._look_whether_drained()
            self.feeding.nudge()
            return
        if not ended.ran:
            self.intake.give_back(held.lease.queue, held.taken_at)
        self.settling.add(ended)
        self.feeding.slot_is_free()

    def _mishap(self, held: Held, error: BaseException) -> Ended:
        """A job that would not stop, or an error of KQueue's own. Neither acks the job; the first makes us start afresh."""
        if isinstance(error, Abandoned):
            outcome = self._would_not_stop(held, error)
            self.events.emit(facts.Warned(f"{held.job} {held.lease.token.id} would not stop; restarting to end it ({error})"))
            self.stop("a job that would not stop", exit_code=EXIT_RESTART)
        elif isinstance(error, JobCancelled):  # before its first step
            outcome = Outcome("cancelled", "shutdown")
        else:
            outcome = Outcome("lost", "supervisor", error=describe_error(error, whole=True))
            self.events.emit(facts.Warned(f"internal error with job {held.lease.token.id}: {error!r}; please report it"))
        return Ended(held, outcome, judge(held.lease, held.options, outcome, held.strategy))

    def _would_not_stop(self, held: Held, error: Abandoned) -> Outcome:
        """Why it was cancelled decides what is said of it: for its time, or for ours."""
        now, context = self.kernel.clock.monotonic(), held.context
        blocked = self._guard.blocked(held.task) if self._guard is not None else None
        outcome = Outcome("cancelled", "supervisor", error=describe_error(error), duration_s=now - held.started)
        if blocked is not None:
            limits = {"hard_slice": blocked.hard_slice_s}
            return outcome._replace(cause="timeout", error=describe_error(blocked), limits=limits)
        if context is not None and context.deadline is not None and now >= context.deadline:
            timeout_s = held.options.timeout
            late = JobTimedOut(f"{held.job} ran longer than its timeout of {timeout_s:g} s, and would not stop: {error}")
            return outcome._replace(cause="timeout", error=describe_error(late), limits={"timeout": timeout_s})
        return outcome

    def _give_up(self, task: Task, error: JobBlocked) -> NoReturn:
        """A job swallows its interruptions, so the loop never has its turn. What has ended is kept, the job's own end too."""
        for held in self.held:
            if held.task is task:
                self.held.discard(held)
                limits = {"hard_slice": error.hard_slice_s}
                duration_s = self.kernel.clock.monotonic() - held.started
                outcome = Outcome("timeout", "supervisor", error=describe_error(error), duration_s=duration_s, limits=limits)
                self.settling.add(Ended(held, outcome, judge(held.lease, held.options, outcome, held.strategy)))
                self.events.emit(facts.Warned(f"{held.job} {task.name} would not stop; restarting to end it ({error})"))
                break
        self.settling.keep(len(self.held))
        os._exit(EXIT_RESTART)

    def begin(self, lease: Lease) -> None:
        """A job that was reserved starts its life."""
        held = Held(lease, self.kernel.clock.monotonic(), self.intake.taken_at)
        newest, id = self._newest.setdefault(lease.queue, {}), lease.token.id
        older, newest[id] = newest.get(id), held
        if older is not None:  # it was recovered, and came back to us while its first run still goes on
            self._end(older, "its lease was lost, and it runs again")
        self.held.add(held)
        held.task = self.kernel.spawn(self._life(held), name=id)
        held.task.on_end = partial(self._ended, held)
        if lease.lane == "inline":
            held.task.mark = id
        self.intake.started(lease.queue, lease.lane)

    def _put_back(self, task: Task) -> None:
        """The job of `task` waits for the pool, and has not begun: its queue has it again."""
        held = next(held for held in self.held if held.task is task)
        held.is_dismissed = True
        self._end(held, "it had not begun")

    # -- settling ---------------------------------------------------------------------------------------------------

    def _look_whether_drained(self) -> None:
        if not self.busy():
            self.kernel.unpark(self._drained)
            self.feeding.nudge()  # for --burst, which ends when the queue is empty, too

    def hold(self) -> Steps:
        """Our lease may have run out: take back what nobody has reserved since, and cancel what somebody has."""
        for held in (yield from self.settling.hold(self.held)):
            if held in self.held and not held.lost:
                held.lost = True
                self.events.emit(facts.LeaseLost(held.lease.token.id, held.job or "(not begun)"))
                self._end(held, "its lease was lost: another daemon has this job now")

    def _settled(self, batch: Sequence[Ended], answers: Sequence[str]) -> None:
        for ended, answer in zip(batch, answers, strict=True):
            self._account(ended, stale=answer == STALE)
        if self.memory.waiting is not None:
            for ended in batch:
                self.memory.released(ended.held)
            self.feeding.nudge()
        self._look_whether_drained()

    def _account(self, ended: Ended, stale: bool) -> None:
        held, outcome = ended.held, ended.outcome
        id, job = held.lease.token.id, held.job or "(unreadable)"
        if stale:
            self.events.emit(facts.LeaseLost(id, job))
            return
        then, delay_s = ended.verdict.then, ended.verdict.settlement.delay_s
        if then != "released":  # what was released is not over
            self.processed += 1
            self.failed += not outcome.ok
        if ended.verdict.settlement.lane is None:  # a move to the other lane is not an attempt
            self.events.emit(facts.JobEnded(id, job, held.strategy, held.lease.queue, outcome, then, delay_s))

    # -- starting and stopping --------------------------------------------------------------------------------------

    def add_strategy(self, strategy: ExecutionStrategy) -> None:
        """Serve the lane `strategy.name` with it, in place of the one that did."""
        self._strategies[strategy.name] = strategy

    def start(self) -> None:
        """Open the broker and start the template; `run` does it when it has not been done.

        Raises BrokerRefused, and loading.ImportFailed when the template cannot import what it should.
        """
        try:
            self.kernel.run(self._start_unless_stopped())
        except BaseException:
            self.slices.close()
            self.kernel.close()
            raise

    def run(self, *, burst: bool = False, max_jobs: int = 0, max_time_s: float = 0.0, handle_signals: bool = True) -> int:
        """Start, run until stopped, stop; the exit code. `burst`: until nothing is ready and nothing runs. Raises as `start`."""
        self.feeding.burst = burst
        self.intake = self._new_intake(max_jobs)
        if handle_signals:
            known = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
            self._signals = Signals(known)
            if self._guard is not None:
                self._guard.start()
        try:
            return int(self.kernel.run(self._main(max_time_s)))
        finally:
            if self._signals is not None:
                self._signals.close()
                if self._guard is not None:
                    self._guard.close()
            self.slices.close()
            self.kernel.close()

    def stop(self, why: str = "stop()", exit_code: int = 0) -> None:
        """Stop reserving, let jobs finish for the grace, then end and release what is left."""
        if self.state in ("terminating", "stopped"):
            return
        self.state = "terminating"
        self.exit_code = exit_code
        self.events.emit(facts.DaemonStopping(why, len(self.held)))
        self.ahead.give_all_back()
        self.kernel.unpark(self._stopper)
        self.feeding.nudge()

    def hurry(self) -> Steps:
        """While terminating: wait for no job any longer. A generator: what each strategy is told needs a turn before the kill."""
        self._grace_s = 0.0
        self._end_everything()
        yield
        self.isolated.link.kill_all()
        self.kernel.unpark(self._drained)

    def quiet(self) -> None:
        """Stop reserving, keep running."""
        if self.state == "running":
            self.state = "quiet"
            self.events.emit(facts.Warned("quiet: no more jobs are reserved; those that run go on. SIGTERM ends the daemon"))
            self.ahead.give_all_back()
            self.feeding.nudge()

    def execute_job(self, job: BoundJob) -> Task:
        """Run `job` here and now, without a queue: admitted, chosen and executed like any other. The task's value is its Outcome.

        It runs once the runtime does; without that, drive it by `runtime.kernel.run(join(task))`.
        """
        if not isinstance(job, BoundJob):
            raise TypeError(f"execute_job() takes a bound job, such as {type(job).__name__}.job(...), which any strategy can run")
        registration = registry.get(job.name) or job.registration or self._registration(job.name)
        prepared = prepare(job, registration, check=self.check, arguments_too=False)
        envelope = decode(prepared.envelope)
        options = admit(self.security, envelope, registration).options
        strategy = self._choose(registration)
        work = self._work(registration, options, envelope, prepared.envelope, 1, strategy.name)
        if registration.isolated:
            self.isolated.link.configure(self.template())
        task = self.kernel.spawn(strategy.execute(work), name=envelope.id)
        task.mark = envelope.id if strategy.name == "inline" else ""
        return task

    @property
    def queues(self) -> list[str]:
        """The names of the queues that are served."""
        return self.intake.queues

    def check(self, options: JobOptions, name: str) -> JobOptions:
        """The options a dispatch may have, by the limits of `security`. Raises UsageError, or clamps."""
        return check_dispatch(self.security, options, name)

    def publish(self) -> Steps:
        """Tell clients what can be dispatched here, and within which limits."""
        yield from self.upkeep.publish()

    def background(self, steps: Steps) -> None:
        """Run `steps` beside the jobs, as long as the runtime runs."""
        self._loop(steps)

    def _main(self, max_time_s: float) -> Steps:
        if self._signals is not None:
            self._loop(self.upkeep.obey(self._signals))
        if max_time_s:
            self._loop(self._stop_after(max_time_s))
        if self.state == "starting":
            yield from self._start_unless_stopped()
        if self.state == "running":
            self._loop(self.feeding.run())
        while self.state in ("running", "quiet"):
            yield Park(self._stopper)
        yield from self._finish()
        return self.exit_code

    def _start_unless_stopped(self) -> Steps:
        """`_start` as a task of its own, since a signal may come before a broker that is waited for."""
        starter = self.kernel.spawn(self._start(), name="start")
        starter.on_end = self._started
        while not starter.ended and self.state == "starting":
            yield Park(self._stopper)
        if starter.ended and starter.error is not None:
            yield from self._let_go()
            raise starter.error
        self.kernel.cancel(starter, GeneratorExit())

    def _opened(self, opening: Task, starting: Task | None) -> None:
        """A broker that refuses need not wait for the template's imports to be heard."""
        if opening.error is not None and opening.grace_s is None and starting is not None:
            self.kernel.cancel(starting, opening.error)

    def _started(self, task: Task) -> None:
        self.kernel.unpark(self._stopper)

    def _start(self) -> Steps:
        """End what an earlier life of ours left. Broker and template at once, since both take their time; then the loops."""
        self.slices.start()
        self.promotions.start()
        if self._owner.identity:
            yield from self.isolated.link.sweep("an earlier run of this daemon")
        self.isolated.link.configure(self.template())
        opening = self.kernel.spawn(self._open(), name="open")
        starting = self.kernel.current
        opening.on_end = lambda task: self._opened(task, starting)
        try:
            for strategy in self._strategies.values():
                yield from strategy.start()
            opened = yield join(opening)
        finally:
            self.kernel.cancel(opening, GeneratorExit())
        self.upkeep.recovered(opened.recovered)
        self.promotions.check_pins()
        yield from self.promotions.load()
        yield from self.publish()
        self.isolated.link.on_manifest = lambda: self.background(self.publish())  # of the templates that replace this one
        if self.keys is not None and self.keys.warning:
            self.upkeep.warn(self.keys.warning)
        yield from self.upkeep.sweep()
        for steps in (self.settling.run(), self.feeding.listen(), *self.upkeep.loops()):
            self._loop(steps)
        if self.state != "starting":  # stopped meanwhile
            return
        self.state = "running"
        took_s = self.kernel.clock.monotonic() - self._began
        self.events.emit(facts.DaemonReady(self.broker.address, self.intake.queues, took_s))

    def _open(self) -> Steps:
        """Open the broker. Whose code ran when an earlier life of ours died pays for it; then the page is ours."""
        page = self._slice_page
        culprit = page.culprit if page is not None else ""
        kept = self.settling.kept()
        sent_at = self.kernel.clock.boottime()
        opened = yield from self.broker.open(
            self._owner, self.queues, self._lease_s, unsettled=kept, culprit=culprit, retention=self._retention,
            take=self.feeding.take_handed,
        )  # fmt: skip
        self.upkeep.opened(sent_at)
        self.settling.replayed(kept, opened.answers)
        if page is not None:
            page.clear()
            self.kernel.page = page.page
        return opened

    def _finish(self) -> Steps:
        """Wait for what runs; end what will not; settle; let go."""
        clock = self.kernel.clock
        began = clock.monotonic()
        while self.busy() and (left_s := began + self._grace_s - clock.monotonic()) > 0:
            yield Park(self._drained, left_s)
        self._end_everything()
        began = clock.monotonic()
        patience_s = max(strategy.cancel_grace_s for strategy in self._strategies.values()) + SETTLE_S
        while self.busy() and (left_s := began + patience_s - clock.monotonic()) > 0:
            yield Park(self._drained, left_s)
        if self.busy():
            self.settling.keep(len(self.held))
        yield from self._let_go()
        self.state = "stopped"
        self.events.emit(facts.DaemonStopped(self.exit_code, self.processed))

    def _let_go(self) -> Steps:
        for task in self._loops:
            self.kernel.cancel(task, GeneratorExit())
        yield from self._services.stop()
        for strategy in self._strategies.values():
            yield from strategy.stop()
        closing = self.kernel.spawn(self.broker.close(give_up=not self.settling), name="close")
        with suppress(BrokerUnavailable):
            yield Park(closing.joiners, 1.0)
        self.kernel.cancel(closing, GeneratorExit())

    def busy(self) -> bool:
        """Whether something that was taken is still on its way."""
        return bool(self.held or self.settling)

    def _end_everything(self) -> None:
        for held in list(self.held):
            self._end(held, "KQueue is shutting down")

    def _end(self, held: Held, why: str) -> None:
        """Cancel the run, unless something ends it already: a second throw would interrupt its cleaning up."""
        if held.task.grace_s is None:
            self.kernel.cancel(held.task, JobCancelled(why), self._strategies[held.strategy].cancel_grace_s)

    def _stop_after(self, seconds: float) -> Steps:
        yield sleep(seconds)
        self.stop("max-time")

    def _loop(self, steps: Steps) -> None:
        self._loops = [task for task in self._loops if not task.ended]
        self._loops.append(self.kernel.spawn(steps))

    # -- odds and ends ----------------------------------------------------------------------------------------------

    def _new_intake(self, max_jobs: int = 0) -> Intake:
        return Intake(
            self._specs, self._slots, strict_order=self._strict_order, concurrent=self.security.max_concurrent,
            per_minute=self.security.per_minute, max_jobs=max_jobs, clock=self.kernel.clock.monotonic, room=self.memory.room,
            ahead=lambda: self.ahead.most(),
        )  # fmt: skip

    def template(self) -> Mapping[str, Any]:
        return self._template_given if self._template_given is not None else template_config(security=self.security)


def _refused(reason: Exception) -> Outcome:
    return Outcome("refused", "supervisor", error=describe_error(reason))
