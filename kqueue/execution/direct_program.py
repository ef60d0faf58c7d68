"""`kqueue.io.run` inside a child: the program is a child of the job's process. Never imported by the supervisor.

Whatever ends the job ends its program (killing.py). Here it is ended when the job goes on without it: after its time-out, over
its output, and when somebody cancels who waits for it.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, suppress
from typing import Any, Final

from ..kernel.traps import READ, wait_io
from ..program import NOT_STARTED, Capture, Program, ProgramEnd
from .exec_child import cannot_run, no_program
from .handle import memory_file
from .killing import kill_trees

Steps = Generator[Any, Any, Any]

GRACE_S: Final = 2.0  # between SIGTERM and SIGKILL
READ_SIZE: Final = 65536
_PASSES: Final = 50


def run_directly(program: Program) -> Steps:
    """Run it; returns its ProgramEnd."""
    with ExitStack() as opened:
        stdin: int = subprocess.DEVNULL
        if program.input:
            stdin = yield from memory_file(program.input)
            opened.callback(os.close, stdin)
        try:
            process = _start(program, stdin)
        except OSError as error:
            return ProgramEnd(NOT_STARTED, b"", b"", "refused", _why_not(program, error))
        opened.callback(_end, process)
        assert process.stdout is not None
        assert process.stderr is not None
        opened.enter_context(process.stdout)
        opened.enter_context(process.stderr)
        pidfd = os.pidfd_open(process.pid)
        opened.callback(os.close, pidfd)
        return (yield from _Watch(program, process, pidfd).to_the_end())


def _start(program: Program, stdin: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        program.argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=program.environment,
        cwd=program.directory or None, start_new_session=True,
    )  # fmt: skip


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


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever of it is left, and reap it: its group as long as its number is its own, and what is below it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for _ in range(_PASSES):
        if not kill_trees([process.pid]).alive:
            break
    process.wait()


class _Watch:
    """A program while it runs."""

    def __init__(self, program: Program, process: subprocess.Popen[bytes], pidfd: int) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._pidfd = pidfd
        self._process = process
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
        _end(self._process)
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
