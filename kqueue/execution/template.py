"""The template: a clean process that has imported the application, and forks one child per job. Run with `-m`, by link.py.

It holds no broker connection and starts no thread, so forking it is safe and cheap. It is a small machine:

    CONFIG -> import -> JOB_KNOWN… READY -> { FORK -> STARTED | SIGCHLD -> EXITED, end its leftovers | nothing to do -> fork }
    EOF -> end all, exit

A child is forked before there is a job for it, so that a job waits neither for the fork nor for what a fork has to do first. One
such spare is kept; where jobs come faster than that, each is forked when it is asked for.

When the supervisor goes, for whatever reason, its end of the socket closes, and a SIGCONT comes, in case somebody has stopped us;
then nothing that was forked here survives. When we go first, our children get a SIGKILL, and the supervisor ends what they left.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any, Final, NamedTuple

from ..dispatch import describe, signature_of
from ..loading import ImportFailed, import_modules, import_script
from ..registry import registry
from ..security import SecurityConfig
from . import exec_child as exec_child
from . import inherited, settling_in, wire
from . import pooled_child as pooled_child
from .child import Order, rehearse  # here, not in the child: what is imported before a fork is imported once
from .child import main as child_main
from .killing import TEMPLATE_SERIAL, Leftovers, Running, put_mark
from .limits import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, prctl
from .privileges import Privileges


def main() -> int:
    """The life of a template; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are for the supervisor; the template follows its socket
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # until it can listen: an import may hang
    os.closerange(wire.CONTROL_FD + 1, os.sysconf("SC_OPEN_MAX"))  # whatever our ancestors have left inheritable
    os.dup2(2, wire.STACK_FD, inheritable=False)  # here it is where our own output goes
    control = socket.socket(fileno=wire.CONTROL_FD)
    control.setblocking(True)
    os.set_inheritable(wire.CONTROL_FD, False)
    began = time.monotonic()
    message = wire.receive_message(control)
    if message is None:
        return 0
    owner, cgroups = message[1]["owner"], message[1]["cgroups"]
    is_marked = put_mark(owner, TEMPLATE_SERIAL)
    try:
        try:
            _import(message[1])
            _warm_up(is_marked)
            _introduce(control, time.monotonic() - began)
        except ImportFailed as error:
            wire.send_message(control, wire.IMPORT_FAILED, {"key": error.key, "message": str(error)[:MAX_TEXT]})
            return 2
    except OSError:  # the supervisor gave up meanwhile
        return 0
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of jobs stay under us
    prctl(PR_SET_PDEATHSIG, signal.SIGCONT)  # from here on EOF tells, if we can run; our children are ended before us
    return Template(control, Leftovers(owner, cgroups), message[1]).serve()


def _import(config: dict[str, Any]) -> None:
    allowed = config["allowed_paths"]
    security = SecurityConfig(allowed_paths=None if allowed is None else tuple(allowed))
    for key in ("modules", "isolated_modules"):
        import_modules(f"jobs.{key}", config[key], config["path"], security)
    if config["main_file"]:
        import_script(config["main_file"])
    # For current().logger and libraries in a job; does nothing when a module has configured logging itself.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    settling_in.ready_to_fork(Privileges(**config["privileges"]))


def _warm_up(is_marked: bool) -> None:
    """Do what each child would else do for itself, and with it copy the memory that it writes to."""
    if is_marked:  # else we are known by what /proc/PID/environ says, which a title overwrites
        settling_in.ready_to_be_named()
    for _ in range(REHEARSALS):
        rehearse()
    gc.collect()
    gc.freeze()  # so that a child's first collection does not touch, and thereby copy, every page


def _introduce(control: socket.socket, import_s: float) -> None:
    for registration in registry:
        described = describe(registration._replace(signature=signature_of(registration)[:MAX_TEXT]))
        try:
            wire.send_message(control, wire.JOB_KNOWN, described)
        except wire.WireError:
            raise ImportFailed("jobs", f"the options of job {registration.name!r} are too large: shorten its backoff") from None
    for message in inherited.warnings(allowed=(0, 1, 2, wire.CONTROL_FD, wire.STACK_FD)):
        wire.send_message(control, wire.WARNING, {"message": message[:MAX_TEXT]})
    wire.send_message(control, wire.READY, {"import_s": round(import_s, 4)})


MAX_TEXT: Final = 2000  # characters of a signature or an error: a message must fit the socket


END_PATIENCE_S: Final = 60.0  # for what was killed at our own end; a supervisor that lives has less, and kills us


REHEARSALS: Final = 20  # by then the interpreter has rewritten the code of a run to its liking, and no child's copy has to be


QUIET_MS: Final = 5  # after which a child is forked ahead: where jobs come faster, it would only cost more than it saves


class Forked(NamedTuple):
    pid: int
    pidfd: int


class Spare(NamedTuple):
    """A child that waits for its job."""

    child: Forked
    orders: socket.socket  # what it is to do goes here


class Template:
    """Forks on request, reaps, reports, and ends what a job leaves behind."""

    def __init__(self, control: socket.socket, leftovers: Leftovers, config: dict[str, Any]) -> None:
        self._control = control
        self._config = config
        self._running: dict[int, Running] = {}  # by pid
        self._spare: Spare | None = None
        self._may_fork = True  # ahead: the last one that was did not end before it had a job
        self._leftovers = leftovers
        self._preparations = settling_in.Preparations(Privileges(**config["privileges"]))
        self._wake_fd, wakeup_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, _noted)
        signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)

    def serve(self) -> int:
        """Until the supervisor is gone. Returns the exit status."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        try:
            while True:
                news = poll.poll(QUIET_MS) if self._spare is None and self._may_fork else []
                if not news and self._spare is None and self._may_fork:
                    self._fork_ahead()
                pause_s = self._leftovers.pause_s
                ready = [fd for fd, _ in news or poll.poll(None if pause_s is None else pause_s * 1000)]
                if self._wake_fd in ready:
                    os.read(self._wake_fd, 512)
                ended = self._reap() if self._wake_fd in ready else 0
                if ended or pause_s is not None:
                    self._end_leftovers()
                if self._control.fileno() in ready:
                    message = wire.receive_message(self._control)
                    if message is None:
                        break
                    self._start(*message)
        except OSError:  # the supervisor's end is gone while we send
            pass
        finally:
            everything_ended = self._end_all()
        return 0 if everything_ended else 1

    def _start(self, kind: int, request: dict[str, Any], fds: list[int]) -> None:
        """Have a child do what is asked for."""
        serial = request.pop("serial")
        self._may_fork = True
        try:
            child = self._order(request, fds)
        except OSError as error:
            wire.send_message(self._control, wire.FORK_FAILED, {"serial": serial, "message": str(error)})
            return
        finally:
            for fd in fds:
                os.close(fd)
        job = self._running[child.pid]
        job.serial, job.id = serial, request["id"]
        wire.send_message(self._control, wire.STARTED, {"serial": serial, "pid": child.pid}, [child.pidfd])
        os.close(child.pidfd)

    def _order(self, request: dict[str, Any], fds: list[int]) -> Forked:
        """The child that has got `request`: the spare, or a new one. OSError when there can be none."""
        fields, more_fds = self._preparations.of(request)
        request, fds = {**request, **fields}, [*fds, *more_fds]
        spare, self._spare = self._spare, None
        if spare is not None:
            with spare.orders:
                self._leftovers.limit(self._running[spare.child.pid], request["limits"])
                try:
                    wire.send_message(spare.orders, wire.FORK, request, fds)
                    return spare.child
                except OSError:  # it has died, as _reap is about to see
                    os.close(spare.child.pidfd)
        return self._fork((request, fds), None)

    def _fork_ahead(self) -> None:
        try:
            orders, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with its:
                self._spare = Spare(self._fork(None, its), orders)
        except OSError:
            self._may_fork = False

    def _fork(self, order: Order | None, orders: socket.socket | None) -> Forked:
        """A new child, for `order`, or for one that will come through `orders`. OSError when there can be none."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        job = self._leftovers.start()
        self._leftovers.limit(job, order[0]["limits"] if order is not None else {})
        try:
            pid = os.fork()
        except OSError:
            self._leftovers.over(job)
            raise
        if pid == 0:
            try:
                self._leftovers.enter(job)
                child_main(parent, self._config, order, orders)
            finally:  # whatever happens, a child is never a second template
                os._exit(wire.NO_WAY_TO_SAY)
        self._running[pid] = job
        return Forked(pid, os.pidfd_open(pid))

    def _reap(self) -> int:
        """Report every child that ended; how many of them were jobs.

        The group of one is killed while it is still a zombie, and so its number still its own; that ends most of what there is
        in one call, which the group cannot outrun.
        """
        ended_jobs = 0
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return ended_jobs
            if ended is None:
                return ended_jobs
            pid = ended.si_pid
            if pid in self._running:
                _kill_group(pid)
            _, status, usage = os.wait4(pid, 0)
            job = self._running.pop(pid, None)
            if job is None:
                self._leftovers.reaped(pid)
                continue
            ended_jobs += 1
            seen = self._leftovers.seen(job)
            self._leftovers.over(job)
            if self._spare is not None and self._spare.child.pid == pid:
                os.close(self._spare.child.pidfd)
                self._spare.orders.close()
                self._spare, self._may_fork = None, False
            if not job.serial:
                continue
            fields = {
                "serial": job.serial,
                "status": status,
                "cpu_user_s": usage.ru_utime,
                "cpu_system_s": usage.ru_stime,
                "max_memory_mib": usage.ru_maxrss / 1024,
                "seen": seen,
            }
            wire.send_message(self._control, wire.EXITED, fields)

    def _end_leftovers(self) -> None:
        for process in self._leftovers.end(self._running):
            message = (
                f"process {process.pid} ({process.name}), left behind by a job, runs as another user and cannot be killed by "
                f"this one: end it by hand, and see what the job executes"
            )
            wire.send_message(self._control, wire.WARNING, {"message": message})

    def _end_all(self) -> bool:
        """The supervisor is gone: nothing that was forked here survives. False when something did, for the sweep to find."""
        for pid in self._running:
            _kill_group(pid)
        return self._leftovers.end_all(self._running.values(), END_PATIENCE_S)


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # the group is not there yet in the first microseconds of a child
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _noted(number: int, frame: FrameType | None) -> None:
    """SIGCHLD came; the wake-up fd has it."""


if __name__ == "__main__":
    # The code must run under its real name: `-m` calls it __main__, and child.py imports parts of it.
    from kqueue.execution.template import main as _main

    os._exit(_main())
