"""`kqueue.io.run` inside a child: the program is a child of the job's process. Never imported by the supervisor.

Whatever ends the job ends its program (killing.py). Here it is ended when the job goes on without it: after its time-out, over
its output, and when somebody cancels who waits for it; and when it has ended itself, what it has left.

While a program runs, this process is a subreaper, so that who loses his parent becomes a child of this one. Such an orphan may be
of the job itself, or of another program. So each program has a mark that neither setsid nor an exec takes off, made like that
of a job: RLIMIT_LOCKS, which Linux has ignored since 2.4.25, inherits, and shows in /proc/PID/limits.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from typing import Any, Final

from ..kernel.traps import READ, wait_io
from ..program import NOT_STARTED, Capture, Program, ProgramEnd
from .exec_child import cannot_run, no_program
from .handle import memory_file
from .killing import children_of, kill_trees, limit_of
from .limits import PR_SET_CHILD_SUBREAPER, is_subreaper, prctl

Steps = Generator[Any, Any, Any]

GRACE_S: Final = 2.0  # between SIGTERM and SIGKILL
READ_SIZE: Final = 65536
_PASSES: Final = 500  # over what is left of a program, and the pause between two of them:
_PASS_S: Final = 0.002
_LOCKS: Final = 10  # RLIMIT_LOCKS (asm-generic/resource.h), which the module `resource` does not have
_LOCKS_LINE: Final = b"Max file locks"
_numbers: Final = count(1 << 40)  # beyond any number of locks that somebody could have meant


def run_directly(program: Program) -> Steps:
    """Run it; returns its ProgramEnd."""
    with ExitStack() as opened:
        stdin: int = subprocess.DEVNULL
        if program.input:
            stdin = yield from memory_file(program.input)
            opened.callback(os.close, stdin)
        opened.enter_context(_reaper)
        number = next(_numbers)
        try:
            process = _start(program, stdin, number)
        except OSError as error:
            return ProgramEnd(NOT_STARTED, b"", b"", "refused", _why_not(program, error))
        opened.callback(_end, process, number)
        assert process.stdout is not None
        assert process.stderr is not None
        opened.enter_context(process.stdout)
        opened.enter_context(process.stderr)
        pidfd = os.pidfd_open(process.pid)
        opened.callback(os.close, pidfd)
        return (yield from _Watch(program, process, number, pidfd).to_the_end())


def _start(program: Program, stdin: int, number: int) -> subprocess.Popen[bytes]:
    with _marked(number):
        return subprocess.Popen(
            program.argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=program.environment,
            cwd=program.directory or None, start_new_session=True,
        )  # fmt: skip


@contextmanager
def _marked(number: int) -> Iterator[None]:
    """What is started meanwhile has the mark `number`. Where an administrator has set a lower limit, there is none.

    Not by `preexec_fn`: that forks where Popen else has vfork, and runs the application's hooks after a fork.
    """
    soft, hard = resource.getrlimit(_LOCKS)
    if hard != resource.RLIM_INFINITY and hard < number:
        yield
        return
    resource.setrlimit(_LOCKS, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(_LOCKS, (soft, hard))


class _Reaper:
    """While entered, this process is the subreaper of its descendants. Entered as often as programs run."""

    def __init__(self) -> None:
        self._programs = 0
        self._was_one = False

    def __enter__(self) -> None:
        if not self._programs:
            self._was_one = is_subreaper()
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._programs += 1

    def __exit__(self, *error: object) -> None:
        self._programs -= 1
        if not self._programs and not self._was_one:
            prctl(PR_SET_CHILD_SUBREAPER, 0)


_reaper: Final = _Reaper()


def _why_not(program: Program, error: OSError) -> str:
    environment = os.environb if program.environment is None else program.environment
    name = os.fsdecode(program.argv[0])
    if program.directory and error.filename == program.directory:
        return f"it cannot run in {os.fsdecode(program.directory)!r}: {error.strerror}"
    if error.errno == errno.E2BIG:
        return f"the arguments are too long for a process: let {name} read from stdin instead"
    if error.errno == errno.ENOENT and not os.path.isfile(program.argv[0]):
        return no_program(name, os.fsdecode(environment.get(b"PATH", os.fsencode(os.defpath))))
    return cannot_run(name, error)


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    """Kill whatever of it is left, and reap it: what is below it, then its group, then the orphans that it has made.

    Not the group first: whose parent is dead is no longer found below it.
    """
    if process.returncode is not None:  # that has been done, and its number may be somebody else's
        return
    for _ in range(_PASSES):
        if not kill_trees([process.pid]).alive:
            break
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()  # whatever it has forked in its last moment is an orphan from here on
    for _ in range(_PASSES):
        orphans = [pid for pid in children_of(os.getpid()) if limit_of(pid, _LOCKS_LINE) == number]
        if not orphans:
            break
        kill_trees(orphans)
        if not all(map(_reaped, orphans)):
            time.sleep(_PASS_S)


def _reaped(pid: int) -> bool:
    """Whether the child `pid` is no more."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:  # the job has waited for whatever comes
        return True


class _Watch:
    """A program while it runs."""

    def __init__(self, program: Program, process: subprocess.Popen[bytes], number: int, pidfd: int) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._pidfd = pidfd
        self._process = process
        self._number = number
        self._capture = Capture(program.max_output)
        self._streams = {process.stdout.fileno(): "stdout", process.stderr.fileno(): "stderr"}
        self._deadline = time.monotonic() + program.timeout_s if program.timeout_s else None
        self._why = ""

    def to_the_end(self) -> Steps:
        """Its ProgramEnd."""
        with select.epoll() as ears:  # of all its fds, so that whoever waits needs one wait
            for fd in (*self._streams, self._pidfd):
                ears.register(fd, select.EPOLLIN)
                if fd in self._streams:
                    os.set_blocking(fd, False)
            while not self._has_died(ears):
                left_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
                yield from wait_io(ears.fileno(), READ, left_s)
                if self._capture.over:
                    break
                if self._deadline is not None and time.monotonic() >= self._deadline and not self._ask_to_end():
                    break
        self._drain()
        _end(self._process, self._number)
        return self._capture.end(self._process.returncode, self._why)

    def _has_died(self, ears: select.epoll) -> bool:
        """Take what is there; whether its process has ended. A daemon that it left may hold the pipes for ever."""
        died = False
        for fd, _ in ears.poll(0):
            if fd == self._pidfd:
                died = True
            elif not self._take(fd):
                ears.unregister(fd)
        return died

    def _take(self, fd: int) -> bool:
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return True
        self._capture.add(self._streams[fd], data)
        return bool(data)

    def _drain(self) -> None:
        """What it wrote before its end, and what others go on writing only as far as a pipe holds it."""
        for fd in self._streams:
            for _ in range(2):
                self._take(fd)

    def _ask_to_end(self) -> bool:
        """Its time is up: SIGTERM; False when that was sent before, so that it has to be killed."""
        if self._why:
            return False
        self._why, self._deadline = "timeout", time.monotonic() + GRACE_S
        os.killpg(self._process.pid, signal.SIGTERM)
        return True
