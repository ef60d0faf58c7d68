"""The SQLite broker: a queue in one file, for every process of one host. No server, no thread, and the loop never waits for it.

Group commit. A durable commit costs an fsync, whatever is in it. So a verb only asks: its command joins a list, the task
parks, and a task of the broker's own, which has its first step when everybody else has had theirs, runs the whole list in one
transaction and wakes everyone with their answers, after COMMIT returned.

Rule 1. A command that raises undoes the transaction and is answered with its error; the others run again without it.
Rule 2. A file that is locked, full or failing keeps the list as it is, in its order, until it works; new commands join its end.
Rule 3. A cancelled verb's command runs all the same, for it may be somebody's settlement. A reservation alone is withdrawn, or
        when it has run already, given back: nobody would ever settle its leases, and our renewals would hold them for good.

Jobs are due by the host's wall clock, the one that all processes that share the file have in common across reboots. Epochs lapse
by the time since its boot, which nobody can set.
"""

from __future__ import annotations

import os
import socket
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from ..errors import BrokerRefused, BrokerUnavailable
from ..kernel.loop import Kernel, Task
from ..kernel.traps import PARKED, READ, Trap, sleep, this_kernel, wait_io
from . import News
from .base import (
    LEASE_S,
    MAX_BATCH,
    NO_RETENTION,
    Capabilities,
    Lease,
    NewJob,
    Opened,
    Owner,
    QueueStats,
    Reserved,
    Retention,
    Settlement,
    Swept,
    Take,
    Verb,
    nobody,
)
from .commands import sqlite as commands
from .commands.host_clock import HOST, HostClock
from .commands.sqlite_file import LOCKED_PAUSE_S, SQLiteFile, bell_path, is_locked, is_passing, jittered, make_bells, ring
from .commands.sqlite_transaction import Transaction

FAILING_PAUSE_S: Final = 0.1  # after the first failure of the disk, doubled up to …
FAILING_PAUSE_MAX_S: Final = 5.0
LOCKED_TELL_S: Final = 1.0  # a lock that is held as long as that is worth a word
_REPLACED: Final = (
    "is another file than before: somebody moved, removed or replaced it. What is there now counts, and jobs of the old file "
    "that run here end as lost leases. Whoever puts a file there should stop kqueued before"
)
CLOSE_PATIENCE_S: Final = 2.0  # for giving up the epoch; without that, it expires


class SQLiteBroker:
    """A SQLiteFile behind the ten verbs. `on_event` hears when it cannot be written, and when it can again."""

    capabilities = Capabilities(durable=True)

    def __init__(self, path: str, *, mode: int = 0o600, clock: HostClock = HOST, on_event: News | None = None) -> None:
        self.address = f"sqlite:///{path}"
        self._file = SQLiteFile(path, mode=mode, clock=clock)
        self._on_event = on_event or (lambda kind, text, retry_in_s: None)
        self._owner = Owner("", "")
        self._lease_s = LEASE_S
        self._queues: list[str] = []
        self._retention = NO_RETENTION
        self._bell: _Bell | None = None  # None: not open
        self._asked: list[_Ask] = []  # what the next transaction runs
        self._kernel: Kernel | None = None  # of the first verb; None: nobody has asked yet
        self._committing = False  # a task of ours is at it
        self._replaced = 0  # how often we have told of another file in the place of ours

    # -- the verbs --------------------------------------------------------------------------------------------------

    def open(
        self, owner: Owner, queues: Sequence[str], lease_s: float, *, unsettled: Sequence[Settlement] = (), culprit: str = "",
        retention: Retention = NO_RETENTION, take: Take = nobody,
    ) -> Verb[Opened]:  # fmt: skip
        answers: list[str] = []
        for start in range(0, len(unsettled), MAX_BATCH):
            answers += yield from self.settle(unsettled[start : start + MAX_BATCH])
        self._owner, self._lease_s = owner, lease_s
        self._queues, self._retention = list(dict.fromkeys(queues)), retention
        recovered: dict[str, int] = {}
        while batch := (yield self._ask(commands.open_epoch, owner, lease_s, culprit)):
            _add(recovered, batch)
        if self._bell is None:
            self._bell = _Bell(self._file, owner.epoch)
        return Opened(recovered, answers)

    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> Verb[list[bool]]:
        fresh: list[bool] = yield self._ask(commands.enqueue, jobs, max_depth)
        return fresh

    def reserve(self, queue: str, wants: Mapping[str, int]) -> Verb[Reserved]:
        ask = self._ask(commands.reserve, self._owner, self._lease_s, queue, wants)
        try:
            reserved: Reserved = yield ask
        except BaseException:
            self._take_back(ask)
            raise
        return reserved

    def withdraw(self, queue: str) -> Verb[None]:
        yield from ()  # nobody is handed anything

    def settle(self, batch: Sequence[Settlement]) -> Verb[list[str]]:
        answers: list[str] = yield self._ask(commands.settle, batch)
        return answers

    def renew(self) -> Verb[bool]:
        alive: bool = yield self._ask(commands.renew, self._owner, self._lease_s)
        if self._bell is not None and not self._bell.is_hung():  # somebody removed the directory, perhaps with the database
            self._bell.close()
            self._bell = _Bell(self._file, self._owner.epoch)
        return alive

    def sweep(self) -> Verb[Swept]:
        """What is left after a third of a lease is left to the next one.

        Then it looks whether anything waits that no bell was rung for: its dispatcher was killed after the commit, or out of fds.
        """
        kernel = yield this_kernel()
        until = kernel.clock.monotonic() + self._lease_s / 3
        recovered: dict[str, int] = {}
        forgotten: dict[str, int] = {}
        more, waits = True, False
        while more and kernel.clock.monotonic() < until:  # a round is a bounded transaction; others have their turn between two
            swept, more, waits = yield self._ask(commands.sweep, self._lease_s, self._queues, self._retention)
            _add(recovered, swept.recovered)
            _add(forgotten, swept.forgotten)
        if waits and self._bell is not None:
            self._bell.ring()
        return Swept(recovered, forgotten)

    def wait(self, timeout_s: float | None) -> Verb[bool]:
        assert self._bell is not None, "wait() before open()"
        rang = yield _Listen(self._bell, timeout_s)
        if rang:
            self._bell.silence()
        return bool(rang)

    def stats(self) -> Verb[dict[str, QueueStats]]:
        counts: dict[str, QueueStats] = yield self._ask(commands.stats)
        return counts

    def publish(self, documents: Mapping[str, bytes]) -> Verb[None]:
        yield self._ask(commands.publish, documents)

    def documents(self, prefix: str) -> Verb[dict[str, bytes]]:
        found: dict[str, bytes] = yield self._ask(commands.documents, prefix)
        return found

    def close(self, *, give_up: bool = True) -> Verb[None]:
        if self._bell is not None:
            self._bell.close()
            self._bell = None
            with suppress(Exception):  # a file that fails now lets the epoch expire
                if give_up:
                    yield self._ask(commands.close_epoch, self._owner.epoch, timeout_s=CLOSE_PATIENCE_S)
        for ask in self._asked:
            ask.answer(error=BrokerUnavailable(f"{self.address} was closed before it could answer: open it again"))
        self._asked = []
        self._file.close()

    # -- the turn's transaction -------------------------------------------------------------------------------------

    def _ask(self, command: Callable[..., Any], *arguments: Any, timeout_s: float | None = None) -> _Ask:
        return _Ask(self, command, arguments, timeout_s)

    def _join(self, ask: _Ask, kernel: Kernel) -> None:
        """Let `ask` have its part in the next transaction."""
        self._kernel = kernel
        self._asked.append(ask)
        if not self._committing:
            self._committing = True
            kernel.spawn(self._commit_all(), name="sqlite")  # at the back of the ready queue: the rest of this turn joins in

    def _commit_all(self) -> Verb[None]:
        """Commit what is asked until nothing is."""
        assert self._kernel is not None
        trouble = _Trouble(self._on_event, self._file)
        try:
            while self._asked:
                try:
                    self._commit(self._asked)
                except sqlite3.OperationalError as error:
                    yield sleep(trouble.pause_s(error, self._kernel.clock.monotonic()))
            trouble.over()
        finally:
            self._committing = False

    def _commit(self, batch: list[_Ask]) -> None:
        """Run `batch` and answer it, or the culprit in it. Raises OperationalError when all of it is to be tried again."""
        running: list[_Ask] = []

        def run_all(transaction: Transaction) -> list[Any]:
            values = []
            for ask in batch:
                running[:] = [ask]
                values.append(ask.command(transaction, *ask.arguments))
            running.clear()
            return values

        try:
            values, rings = self._file.write(run_all)
        except Exception as error:
            if is_locked(error) or is_passing(error):
                raise
            culprits = running or batch  # nobody in particular: the file itself will not do
            self._asked = [ask for ask in batch if ask not in culprits]
            for ask in culprits:
                ask.answer(error=self._file.explain(error))
            return
        self._asked = []
        if self._file.replaced > self._replaced:
            self._replaced = self._file.replaced
            self._on_event("warning", f"{self.address} {_REPLACED}", 0.0)
        for ask, value in zip(batch, values, strict=True):
            ask.answer(value)
        if rings:
            self._ring()

    def _ring(self) -> None:
        ring(self._file.bells, but="" if self._bell is None else self._bell.name)
        if self._bell is not None:
            self._bell.ring()

    def _take_back(self, ask: _Ask) -> None:
        """Release what a cancelled reservation leased, at its old place."""
        leases: list[Lease] = [] if ask.value is None else ask.value.leases
        if leases and self._kernel is not None and self._bell is not None:
            release = [Settlement(lease.token, lease.queue, "release", lease.counters) for lease in leases]
            self._join(self._ask(commands.settle, release), self._kernel)


class _Ask(Trap):
    """One command that waits for the turn's transaction. Yielding it returns what the command returns, None after `timeout_s`."""

    __slots__ = ("arguments", "broker", "command", "kernel", "task", "timeout_s", "value")

    def __init__(
        self, broker: SQLiteBroker, command: Callable[..., Any], arguments: Sequence[Any], timeout_s: float | None
    ) -> None:
        self.broker = broker
        self.command = command
        self.arguments = arguments
        self.timeout_s = timeout_s
        self.kernel: Kernel | None = None
        self.task: Task | None = None  # that waits for the answer; None: nobody does, or no longer
        self.value: Any = None  # the answer, kept for a task that is cancelled before it can take it

    def arm(self, kernel: Kernel, task: Task) -> Any:
        self.kernel, self.task = kernel, task
        task.undo = self._left
        self.broker._join(self, kernel)
        if self.timeout_s is not None:
            kernel.wake_at(task, kernel.clock.monotonic() + self.timeout_s)
        return PARKED

    def answer(self, value: Any = None, error: BaseException | None = None) -> None:
        self.value = value
        if self.task is not None and self.kernel is not None:
            self.kernel.wake(self.task, value, error)

    def _left(self) -> None:
        """The task goes on: with the answer, or without it because it was cancelled."""
        self.task = None
        asked = self.broker._asked
        if self.command is commands.reserve and self in asked:
            asked.remove(self)


class _Trouble:
    """A file that does not let us write: how long to wait, and what to tell whom."""

    def __init__(self, tell: News, file: SQLiteFile) -> None:
        self._tell = tell
        self._file = file
        self._told = False
        self._locked_since: float | None = None  # by the kernel's clock; None: it was not locked
        self._failing_pause_s = FAILING_PAUSE_S

    def pause_s(self, error: Exception, now: float) -> float:
        """Seconds until the next try."""
        if not is_locked(error):
            pause_s = jittered(self._failing_pause_s)
            self._failing_pause_s = min(2 * self._failing_pause_s, FAILING_PAUSE_MAX_S)
            self._lost(f"{error}; nothing is lost: {self._file.remedy(error)}", pause_s)
            return pause_s
        if self._locked_since is None:
            self._locked_since = now
        if now - self._locked_since < LOCKED_TELL_S:
            return jittered(LOCKED_PAUSE_S)
        pause_s = jittered(20 * LOCKED_PAUSE_S)
        if not self._told:
            who = f"see who has the file open (fuser {self._file.path})"
            self._lost(f"{error}: another process has been writing for {LOCKED_TELL_S:g} s; {who}", pause_s)
        return pause_s

    def over(self) -> None:
        if self._told:
            self._tell("back", "", 0.0)

    def _lost(self, why: str, retry_in_s: float) -> None:
        self._told = True
        self._tell("lost", why, retry_in_s)


class _Bell:
    """Our doorbell: a socket that others ring, and a flag for ourselves."""

    def __init__(self, file: SQLiteFile, epoch: str) -> None:
        self.name = f"{epoch}.sock"
        self.rung = False  # by ourselves
        self.listener: Task | None = None  # that waits for a ring, and its kernel
        self.kernel: Kernel | None = None
        self._folder = file.bells
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            fd = make_bells(file)
            try:
                self._bind(fd, epoch)
            finally:
                os.close(fd)
        except OSError as error:
            self._socket.close()
            raise BrokerRefused(
                f"cannot put a doorbell into {file.bells}: {error.strerror or error}; "
                "make it a directory that this user may write"
            ) from None
        ring(self._folder, but=self.name)  # sweeps the bells of dead daemons, and is no news for the living

    def _bind(self, fd: int, epoch: str) -> None:
        unnamed = f"{epoch}.new"
        self._socket.bind(bell_path(fd, unnamed))
        os.chmod(unnamed, 0o666, dir_fd=fd)  # whoever may enter the directory may ring
        os.rename(unnamed, self.name, src_dir_fd=fd, dst_dir_fd=fd)

    def fileno(self) -> int:
        return self._socket.fileno()

    def is_hung(self) -> bool:
        """Whether others can find it."""
        return os.path.exists(os.path.join(self._folder, self.name))

    def ring(self) -> None:
        self.rung = True
        self._wake(READ)

    def silence(self) -> None:
        """Forget all rings so far."""
        self.rung = False
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(1)

    def close(self) -> None:
        self._wake(0)
        self._socket.close()
        with suppress(OSError):
            os.unlink(os.path.join(self._folder, self.name))

    def _wake(self, events: int) -> None:
        if self.listener is not None and self.kernel is not None:
            self.kernel.wake(self.listener, events)


class _Listen(wait_io):
    """wait_io for a bell that our own rings end as well, without a system call."""

    __slots__ = ("bell",)

    def __init__(self, bell: _Bell, timeout_s: float | None) -> None:
        super().__init__(bell.fileno(), READ, timeout_s)
        self.bell = bell

    def arm(self, kernel: Kernel, task: Task) -> Any:
        if self.bell.rung:
            return READ
        armed = super().arm(kernel, task)
        stop_polling = task.undo
        assert stop_polling is not None

        def undo() -> None:
            self.bell.listener = None
            stop_polling()

        task.undo = undo
        self.bell.listener, self.bell.kernel = task, kernel
        return armed


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for queue, jobs in more.items():
        total[queue] = total.get(queue, 0) + jobs
