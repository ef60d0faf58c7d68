"""`run`: a program with its output captured, ended together with the job that waits for it.

Who starts and ends the process is not decided here. For an inline job it is a child of the template, with the limits, the mark
and the cgroup of any job; inside a child it is that one's child.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from math import isfinite
from typing import Any, Final, NamedTuple

from ..commands import MAX_ARGUMENT
from ..context import current
from ..program import Program, ProgramEnd
from .errors import IOFailed, TimedOut
from .operation import operation

MAX_OUTPUT: Final = 1 << 20  # bytes of each stream, unless told otherwise
MAX_INPUT: Final = 256 << 20  # bytes
MAX_TOLD: Final = 2 << 20  # bytes of arguments and environment together; Linux takes no more (execve(2), 8 MiB of stack)

Argument = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class Completed(NamedTuple):
    """A program that has ended by itself."""

    argv: tuple[str, ...]
    returncode: int  # 0: it says that all is well; less than 0: the signal that ended it
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """`stdout` as UTF-8; what is none is shown as U+FFFD."""
        return self.stdout.decode("utf-8", "replace")


class ProgramError(IOFailed):
    """A program did not do what it was started for. `returncode`, `stdout`, `stderr`: as far as there are any."""

    def __init__(self, message: str, returncode: int | None = None, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.returncode = returncode  # None: there was no process, or nobody knows
        self.stdout = stdout
        self.stderr = stderr


class ProgramFailed(ProgramError):
    """It ended with another status than 0, by a signal, or over one of its limits."""


class ProgramNotRun(ProgramError):
    """It could not be started: there is none of that name, or it is not executable. No retry changes that."""


class ProgramLost(ProgramError):
    """What starts programs died, or could start none just now. A retry makes sense."""


class TooMuchOutput(ProgramError):
    """It wrote more than `max_output` allows, and was killed. What it wrote until then is in `stdout` and `stderr`."""


class ProgramTimedOut(ProgramError, TimedOut):
    """It was not done within its `timeout`, and was ended."""


@operation
def run(
    argv: Sequence[Argument], *, input: bytes | str | None = None, timeout: float | None = None, check: bool = True,
    max_output: int = MAX_OUTPUT, env: Mapping[str, str] | None = None, cwd: Argument | None = None, max_memory: int = 0,
) -> Generator[Any, Any, Completed]:  # fmt: skip
    """Run a program to its end: `page = (yield io.run(["pdftotext", path, "-"], timeout=20)).text`.

    There is no shell: `argv` is the program and its arguments, each as it is. `input` is what stdin has; None: nothing.
    `timeout`: seconds from its start; the job's own holds anyway. `check` False: a status other than 0 is no error.
    `max_output`: bytes that each of stdout and stderr may have. `env`: its whole environment; None: that of the job.
    `max_memory`: MiB of all its processes, for an inline job; 0: `pool.max_memory`.

    When the job ends first, by whatever, or the daemon, the program is ended with all that it has started; so is what it leaves
    running when it ends. Raises ProgramFailed, ProgramNotRun, ProgramTimedOut, TooMuchOutput, ProgramLost.
    """
    program = _program(argv, input, timeout, max_output, env, cwd, max_memory)
    end: ProgramEnd = yield from current().services.run_program(program)
    name = tuple(os.fsdecode(part) for part in program.argv)
    if (error := _error(name[0], end, timeout)) is not None:
        raise error
    if check and end.returncode:
        last = end.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ProgramFailed(f"{name[0]} {_how(end.returncode)}{': ' if last else ''}{last[:400]}", *end[:3])
    return Completed(name, *end[:3])


def _program(
    argv: Sequence[Argument], input: bytes | str | None, timeout: float | None, max_output: int, env: Mapping[str, str] | None,
    cwd: Argument | None, max_memory: int,
) -> Program:  # fmt: skip
    """What is to run. Raises TypeError or ValueError for what no process can have."""
    if isinstance(argv, (str, bytes)) or not argv:
        raise TypeError(f'run() takes the program and its arguments as a list, such as ["ls", "-l"], not {argv!r:.60}')
    parts = tuple(os.fsencode(part) for part in argv)
    environment = None if env is None else {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
    named = [] if environment is None else [name + b"=" + value for name, value in environment.items()]
    for part in (*parts, *named):
        if b"\0" in part or len(part) > MAX_ARGUMENT:
            what = "has a NUL in it" if b"\0" in part else f"has {len(part)} bytes, of {MAX_ARGUMENT} that are possible"
            raise ValueError(f"{os.fsdecode(part)!r:.60} {what}: give that to the program by input= or in a file")
    if sum(map(len, (*parts, *named))) > MAX_TOLD:
        raise ValueError(f"the arguments are more than {MAX_TOLD} bytes together: give them by input= or in a file")
    if timeout is not None and not (isfinite(timeout) and timeout > 0):
        raise ValueError(f"timeout must be seconds, more than 0, or None, not {timeout!r}")
    data = input.encode() if isinstance(input, str) else bytes(input or b"")
    if len(data) > MAX_INPUT:
        raise ValueError(f"input has {len(data)} bytes, allowed are {MAX_INPUT}: give the program a file")
    if max_output < 0 or max_memory < 0:
        raise ValueError("max_output and max_memory cannot be less than 0")
    directory = b"" if cwd is None else os.fsencode(cwd)
    return Program(parts, data, timeout or 0.0, max_output, environment, directory, max_memory)


def _error(name: str, end: ProgramEnd, timeout: float | None) -> ProgramError | None:
    """Why it did not end by itself; None: it did."""
    if not end.why:
        return None
    if end.why == "refused":
        return ProgramNotRun(end.message)
    if end.why == "lost":
        return ProgramLost(f"{name} was lost: {end.message}")
    if end.why == "timeout":
        time = f"its timeout of {timeout:g} s" if timeout else "the time of its job"
        return ProgramTimedOut(f"{name} was not done within {time}, and was ended", *end[:3])
    kind = TooMuchOutput if end.why == "output" else ProgramFailed
    return kind(f"{name} was ended: {end.message}", *end[:3])


def _how(returncode: int) -> str:
    from ..process import signal_name

    return f"was ended by {signal_name(-returncode)}" if returncode < 0 else f"exited with status {returncode}"
