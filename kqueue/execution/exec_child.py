"""What becomes of a forked child when a job starts by exec: a command, a program that an inline job runs (kqueue.io.run), or a
new interpreter for a Python job.

    fork, settling_in.py ---------+-- command, program -----> execve
                                  +-- Python: a bundle at BUNDLE_FD, execve -> BOOT -> import the job's module -> Run (child.py)

Limits, session, pidfd and pipes are those of any child, since they outlive execve. Commands and programs have no socket: how
one exits is what there is to know. A Python job finds its socket where a forked one does, and all that its template was told at
BUNDLE_FD.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import errno
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from .. import codec
from ..commands import Command, check_arguments, find_program
from ..errors import ArgumentsDoNotFit, Refused, UsageError
from ..loading import ImportFailed, import_modules, import_script
from ..registry import registry
from ..security import SecurityConfig
from . import limits, wire
from .base import unpacked
from .child import Run, failure
from .identity import user_name
from .killing import JOB_ID, OWNER
from .settling_in import name_process, tell_where_it_stands, tidy_streams

BUNDLE_FD: Final = wire.STACK_FD + 1
LEAST_MIB: Final = 12  # of data that an interpreter has which runs a job that does nothing (measured with CPython 3.11)
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # exit statuses of a shell for these (POSIX, sh, 2.8.2)

# The template's sys.path, since the child's environment and directory may lead elsewhere.
BOOT: Final = (
    f"import json, sys; bundle = json.load(open({BUNDLE_FD})); sys.path[:] = bundle['path']; "
    "from kqueue.execution.exec_child import main; main(bundle)"
)


class CommandNotRun(Exception):
    """A command could not be started. `status`: what a shell would exit with."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


# -- commands -----------------------------------------------------------------------------------------------------------


def run_command(request: Mapping[str, Any]) -> int:
    """Become the command of `request`. Returns an exit status only when that cannot be, and has said why."""
    with socket.socket(fileno=wire.JOB_FD) as supervisor:
        _, payload = wire.read_frame(supervisor, (wire.RUN,))
        try:
            _become(Command(**request["command"]), payload, request["limits"])
        except Exception as error:
            _say_why(supervisor, error, request["limits"])
    return 0


def run_program(request: Mapping[str, Any]) -> int:
    """Become the program that comes in an EXECUTE. Returns as `run_command` does."""
    with socket.socket(fileno=wire.JOB_FD) as supervisor:
        if request["has_input"]:
            _, (fd,), _, _ = socket.recv_fds(supervisor, 1, 1)
            os.dup2(fd, 0)
            os.close(fd)
        _, payload = wire.read_frame(supervisor, (wire.EXECUTE,))
        try:
            _become_program(codec.from_json(payload), request["limits"])
        except Exception as error:
            _say_why(supervisor, error, request["limits"])
    return 0


def _say_why(supervisor: socket.socket, error: Exception, run_limits: Mapping[str, float]) -> None:
    fields = failure(error, run_limits)
    if isinstance(error, CommandNotRun):
        fields |= {"cause": "exit", "exit_code": error.status}
    supervisor.sendall(wire.frame(wire.FAILURE, codec.to_json(fields)))


def _become_program(told: Mapping[str, Any], run_limits: Mapping[str, float]) -> NoReturn:
    argv = [part.encode("latin-1") for part in told["argv"]]
    environment: Mapping[bytes, bytes] = os.environb
    if told["env"] is not None:
        found = {name: os.environb[name] for name in (OWNER.encode(), JOB_ID.encode()) if name in os.environb}
        environment = {k.encode("latin-1"): v.encode("latin-1") for k, v in told["env"].items()} | found
    if told["cwd"]:
        directory = told["cwd"].encode("latin-1")
        try:
            os.chdir(directory)
        except OSError as error:
            raise CommandNotRun(f"it cannot run in {os.fsdecode(directory)!r}: {error.strerror}", NOT_EXECUTABLE) from None
    _execute(argv, environment, run_limits)


def _become(command: Command, envelope_data: bytes, run_limits: Mapping[str, float]) -> NoReturn:
    envelope = codec.decode(envelope_data, max_bytes=wire.MAX_FRAME)
    args, kwargs = unpacked(envelope)
    try:
        given = check_arguments(command.parameters, args, kwargs)
        argv = command.argv(given)
    except UsageError as error:
        raise ArgumentsDoNotFit(f"the arguments do not fit command {command.name!r}: {error}") from None
    if command.stdin == "json":
        raw = dict(zip(command.parameters.names, envelope.args, strict=False)) | dict(envelope.kwargs)
        _put_on_stdin(codec.to_json(raw))
    _execute(argv, os.environb, run_limits)


def _execute(argv: Sequence[bytes], environment: Mapping[bytes, bytes], run_limits: Mapping[str, float]) -> NoReturn:
    name, path = os.fsdecode(argv[0]), os.fsdecode(environment.get(b"PATH", os.fsencode(os.defpath)))
    program = find_program(name, path)
    if program is None:
        raise CommandNotRun(no_program(name, path), NOT_FOUND)
    _default_signals()
    before = _lower_memory(run_limits)
    try:
        os.execve(program, list(argv), environment)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        if error.errno == errno.E2BIG:
            raise ArgumentsDoNotFit(f"the arguments are too long for a process: let {name} read from stdin instead") from None
        raise CommandNotRun(cannot_run(program, error), NOT_EXECUTABLE) from None


def no_program(name: str, path: str) -> str:
    """Why it was not started."""
    return f"there is no program {name!r}{'' if '/' in name else f' on PATH ({path})'} that this user may run"


def cannot_run(program: str, error: OSError) -> str:
    """Why it was not started."""
    interpreter = ": the interpreter that its first line names" if error.errno == errno.ENOENT else ""
    return f"{program} cannot be run{interpreter}: {error.strerror}"


def _put_on_stdin(data: bytes) -> None:
    fd = _memory_file(data)
    os.dup2(fd, 0)
    os.close(fd)


def _memory_file(data: bytes) -> int:
    """An fd from which `data` can be read, however much it is."""
    fd = os.memfd_create("kqueue", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _default_signals() -> None:
    """What is ignored stays ignored through execve, and Python ignores SIGPIPE."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        _signal.signal(int(number), _signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _lower_memory(run_limits: Mapping[str, float]) -> tuple[int, int]:
    """The new program begins with nothing, where a fork begins with what the template has. Returns what was before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int((run_limits["max_memory"] + run_limits["memory_headroom"]) * limits.MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (min(wanted, hard) if hard != resource.RLIM_INFINITY else wanted, hard))
    return soft, hard


# -- Python ---------------------------------------------------------------------------------------------------------------


def run_python(request: Mapping[str, Any]) -> NoReturn:
    """Become a new interpreter that runs the job. Raises Refused when there can be none."""
    memory_mib, headroom_mib = request["limits"]["max_memory"], request["limits"]["memory_headroom"]
    if memory_mib and memory_mib + headroom_mib < LEAST_MIB:
        both = f"max_memory of {memory_mib} MiB and isolated.memory_headroom of {headroom_mib} MiB"
        raise Refused(f"a new interpreter takes {LEAST_MIB} MiB, and {both} are less: raise one of them")
    known = registry.get(request["job"])
    module = known.module if known is not None else None
    bundle = {"request": dict(request), "path": sys.path, "began": time.monotonic(), "module": module}
    fd = _memory_file(json.dumps(bundle).encode())
    os.dup2(fd, BUNDLE_FD)
    for kept in (BUNDLE_FD, wire.JOB_FD, wire.STACK_FD):  # all others close by themselves
        os.set_inheritable(kept, True)
    before = _lower_memory(request["limits"])
    try:
        os.execve(sys.executable, [sys.executable, "-c", BOOT], os.environ)
    except PermissionError as error:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        raise Refused(f"{user_name()} may not run {sys.executable}: {error.strerror}") from None


def main(bundle: Mapping[str, Any]) -> NoReturn:
    """In the new interpreter. Never returns."""
    status = wire.NO_WAY_TO_SAY
    try:
        request = bundle["request"]
        for fd in (wire.JOB_FD, wire.STACK_FD):
            os.set_inheritable(fd, False)
        tell_where_it_stands()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        tidy_streams()
        name_process(request)
        supervisor = socket.socket(fileno=wire.JOB_FD)
        _, payload = wire.read_frame(supervisor, (wire.RUN,))
        _Fresh(request, supervisor, bundle).attempt(wire.RUN, payload)
        status = 0
    except BaseException as error:
        print(f"kqueue: the child could not start: {error!r}", file=sys.stderr)
    finally:
        os._exit(status)


class _Fresh(Run):
    """A run that has to import its job first; an error in that is its own."""

    def __init__(self, request: Mapping[str, Any], supervisor: socket.socket, bundle: Mapping[str, Any]) -> None:
        super().__init__(request, supervisor, began=bundle["began"])
        self._module: str | None = bundle["module"]

    def load(self) -> None:
        importing = self._request["import"]
        if self._module == MAIN and importing["main_file"]:
            import_script(importing["main_file"])
        elif self._module is not None:
            allowed = importing["allowed_paths"]
            security = SecurityConfig(allowed_paths=None if allowed is None else tuple(allowed))
            try:
                import_modules("jobs", [self._module], importing["path"], security)
            except ImportFailed as error:
                raise ImportFailed(error.key, f"{error}{_unreadable(importing['path'])}") from None


def _unreadable(search_path: Sequence[str]) -> str:
    """What may be why a module is not found: it looks as if it were not there."""
    closed = [directory for directory in search_path if not os.access(directory, os.R_OK | os.X_OK)]
    return f"; {user_name()} may not read {', '.join(closed)}" if closed else ""


MAIN: Final = "__kqueue_main__"  # see loading.import_script
