"""The child: one process, one job. What it does before the job's first line, how it runs it, and how it says what came of it.

How it becomes that process is `settling_in.py`'s.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.signal makes enums, at ten times the price
import errno
import importlib
import os
import signal
import socket
import stat
import sys
import threading
import time
import types
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from types import FrameType
from typing import Any, Final, NoReturn

from .. import codec
from ..context import JobContext, close_all, enter
from ..dispatch import NewJob, prepare
from ..errors import ArgumentsDoNotFit, JobCancelled, JobTimedOut, KQueueError, Refused
from ..job import BoundJob, JobHandle, get_dispatcher, set_dispatcher
from ..kernel import READ, Kernel, Task, wait_io
from ..options import JobOptions
from ..outcome import describe_error
from ..program import Program
from ..registry import Registration, registry
from ..retries import ask_backoff, asked_by, needs_backoff
from ..states import JobState
from . import limits, settling_in, tray, wire
from .base import unpacked
from .call_errors import told_args
from .child_frames import MAX_JOBS, dispatched
from .inline import result_json

Order = tuple[Mapping[str, Any], Sequence[int]]  # a request, and the fds that came with it
PIECE_SIZE: Final = wire.MAX_FRAME // 4  # bytes of envelopes in one ENQUEUE


def main(template_pid: int, config: Mapping[str, Any], order: Order | None, orders: socket.socket | None) -> NoReturn:
    """Everything after the fork. Never returns, and runs no exit handler of the template.

    `config`: what the template was told to import. `order`: what to do; None: it will come through `orders`.
    """
    status = wire.NO_WAY_TO_SAY
    try:
        settling_in.prepare(template_pid, config["privileges"]["nice"])
        request, fds = order or _wait(orders)
        try:
            settling_in.equip(request, fds, template_pid)
            status = _STARTS[request.get("start", "fork")]({**request, "import": config})
        except Refused as error:
            _refuse(request, error)
            status = 0
    except BaseException as error:  # before there was a way to report it: stderr is captured
        if isinstance(error, OSError) and error.errno in (errno.EBADF, errno.ENOTSOCK) and not _has_its_socket():
            print(f"kqueue: {wire.SOCKET_CLOSED}", file=sys.stderr)
        else:
            print(f"kqueue: the child could not start: {error!r}", file=sys.stderr)
            _tell_why(error, status)
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _has_its_socket() -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(wire.JOB_FD).st_mode)
    except OSError:
        return False


def _wait(orders: socket.socket | None) -> Order:
    """As a spare, which has the time to prepare for whatever comes."""
    assert orders is not None
    orders = settling_in.keep_only(orders)
    rehearse()
    settling_in.name_spare()
    order = wire.receive_message(orders)
    if order is None:  # the template has no use for it any more
        os._exit(0)
    return order[1:]


def _tell_why(error: BaseException, status: int) -> None:
    """Where there is somebody to tell: until it has a socket of its own, the child has that of its template in the same place."""
    with suppress(Exception), socket.socket(fileno=os.dup(wire.JOB_FD)) as supervisor:
        if supervisor.type == socket.SOCK_STREAM:
            fields = {**failure(error, {}), "cause": "exit", "exit_code": status}
            supervisor.sendall(wire.frame(wire.FAILURE, codec.to_json(fields)))


def _run_one(request: Mapping[str, Any]) -> int:
    """A process for one run. Returns its exit status."""
    supervisor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, wire.JOB_FD)  # it need not find out what that is
    kind, payload = wire.read_frame(supervisor, (wire.RUN, wire.CALL))
    # Its time-out counts from when it was asked for: no later than at the supervisor, whose SIGTERM would else be a cancellation.
    Run(request, supervisor, request.get("asked_at")).attempt(kind, payload)
    return 0


def _run_many(request: Mapping[str, Any]) -> int:
    from .pooled_child import serve

    return serve(socket.socket(fileno=wire.JOB_FD), tray.Until(*request["until"]))


def _run_elsewhere(request: Mapping[str, Any]) -> int:
    from .exec_child import run_command, run_program, run_python

    if "has_input" in request:
        return run_program(request)
    return run_command(request) if "command" in request else run_python(request)


def _refuse(request: Mapping[str, Any], error: Refused) -> None:
    """Take the job, so that it is not said to be unread, and say why it does not run."""
    with socket.socket(fileno=wire.JOB_FD) as supervisor:
        if request.get("start") == "pool" or request.get("has_input"):
            supervisor.recv(1)  # which an fd comes with
        wire.read_frame(supervisor, (wire.RUN, wire.CALL, wire.TAKE, wire.EXECUTE))
        supervisor.sendall(wire.frame(wire.FAILURE, codec.to_json({**failure(error, request["limits"]), "cause": "refused"})))


_STARTS: Final[Mapping[str, Callable[[Mapping[str, Any]], int]]] = {"fork": _run_one, "pool": _run_many, "exec": _run_elsewhere}


class Run:
    """One run of a job in this process: what surrounds it; also its `Services`. `request`: what the supervisor says of it.

    `began`: time.monotonic() from which its timeout counts; None: from now.
    """

    def __init__(self, request: Mapping[str, Any], supervisor: socket.socket, began: float | None = None) -> None:
        self._request = request
        self._socket = supervisor
        self._lock = threading.Lock()  # a job may have threads, and each may dispatch
        timeout_s = request["limits"]["timeout"]
        self._deadline = (time.monotonic() if began is None else began) + timeout_s if timeout_s else None
        self._backoff: Any = None  # the one in force, as declared or dispatched
        # Into a cooperative job, of which the frame given was interrupted; None: there is none, raise where it is.
        self._cancel: Callable[[BaseException, FrameType | None], None] | None = None
        self._is_over = False
        self.was_interrupted = False
        self.ran_out_of_memory = False
        self.kept_sigterm = True  # the job left the handler of SIGTERM alone

    def attempt(self, kind: int, payload: bytes, farewell: Callable[[], bytes] = bytes) -> None:
        """Do what a frame says and report it. `farewell`: a frame to send after that, and the last moment to look around."""
        _signal.signal(signal.SIGTERM, self.terminated)
        failed: BaseException | None = None  # its error, where a retry would need a backoff
        try:
            value = self._call(payload) if kind == wire.CALL else self._run(payload)
            answer = wire.frame(wire.RESULT, result_json(value) if self._request["keep_result"] else b"null")
        except BaseException as error:
            fields = failure(error, self._request["limits"])
            if kind == wire.CALL:
                fields["args"] = told_args(error, fields["error"]["message"])
            failed = error if fields["cause"] not in ("refused", "cancelled") and needs_backoff(error) else None
            self.ran_out_of_memory = fields["cause"] == "memory"
            answer = wire.frame(wire.FAILURE, codec.to_json(fields))
        self._is_over = True  # what is left is to say so
        self.kept_sigterm = _signal.signal(signal.SIGTERM, _signal.SIG_IGN) == self.terminated
        flush()
        if failed is not None and callable(self._backoff):
            # After the failure was said: a function that blocks costs its own answer, and whoever lingers is killed.
            self._send(answer)
            answer = wire.frame(wire.BACKOFF, codec.to_json(ask_backoff(self._backoff, self._request["attempt"], failed)))
            flush()
        self._send(answer + farewell())

    # -- running ----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Before the job is looked up. What this raises, the job has raised."""

    def _run(self, data: bytes) -> Any:
        self.load()
        envelope = codec.decode(data, max_bytes=wire.MAX_FRAME)
        registration = self._find(envelope.job)
        context = JobContext(
            id=envelope.id, name=envelope.job, queue=envelope.queue, attempt=self._request["attempt"],
            deadline=self._deadline, inline=False, services=self,
        )  # fmt: skip
        enter(context)
        self._backoff = envelope.options.get("backoff", registration.options.backoff)
        set_dispatcher(self._dispatch)
        args, kwargs = unpacked(envelope)
        return self._drive(registration.call(args, kwargs))

    def _find(self, name: str) -> Registration:
        registration = registry.get(name)
        if registration is None:
            raise ArgumentsDoNotFit(f"job {name!r} is not registered in the template: its module changed meanwhile")
        return registration

    def _call(self, data: bytes) -> Any:
        """An offloaded call. The function's name comes from the supervisor's own code, never from a queue."""
        call = codec.from_json(data)
        set_dispatcher(self._dispatch)
        target: Any = importlib.import_module(call["module"])
        for part in call["qualname"].split("."):
            target = getattr(target, part)
        target = getattr(target, "__wrapped__", target) if hasattr(target, "registration") else target
        kwargs = {key: codec.unpack(value) for key, value in call["kwargs"].items()}
        return self._drive(target(*codec.unpack(call["args"]), **kwargs))

    def _drive(self, steps: Any) -> Any:
        if isinstance(steps, types.CoroutineType):
            from .asyncio_child import run_under_asyncio

            return run_under_asyncio(steps)
        if isinstance(steps, types.GeneratorType):
            return self._drive_cooperatively(steps)
        return steps

    def _drive_cooperatively(self, steps: types.GeneratorType[Any, Any, Any]) -> Any:
        """A generator job in a child has a loop of its own, so that its traps work; a signal is thrown at its trap."""
        kernel = Kernel()
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_fd)  # else select() would go on after the handler returned (PEP 475)

        def wakeups() -> Any:
            while True:
                yield wait_io(read_fd, READ)
                os.read(read_fd, 512)

        def job() -> Any:
            task = kernel.current
            assert task is not None
            self._cancel = partial(_cancel, kernel, task)
            try:
                return (yield from steps)
            finally:
                close_all()

        kernel.spawn(wakeups())
        try:
            return kernel.run(job())
        finally:
            self._cancel = None
            signal.set_wakeup_fd(-1)
            kernel.close()
            os.close(read_fd)
            os.close(write_fd)

    def terminated(self, number: int, frame: FrameType | None) -> None:
        if self._is_over:
            return
        self.was_interrupted = True
        name = self._request["job"]
        if self._deadline is not None and time.monotonic() >= self._deadline - 0.05:
            timeout_s = self._request["limits"]["timeout"]
            error: BaseException = JobTimedOut(f"{name} ran longer than its timeout of {timeout_s:g} s")
        else:
            error = JobCancelled(f"{name} was stopped")
        if self._cancel is None:
            raise error
        self._cancel(error, frame)

    # -- services ---------------------------------------------------------------------------------------------------

    def enqueue(self, jobs: Sequence[BoundJob]) -> Any:
        yield from ()
        return self._enqueue(jobs)

    def offload(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """This process may block, so there is nowhere else to go."""
        yield from ()
        return function(*args, **kwargs)

    def run_program(self, program: Program) -> Any:
        """A child of this process, so it is ended with it."""
        from .direct_program import run_directly

        return run_directly(program)

    def progress(self, context: JobContext) -> None:
        self._send(wire.frame(wire.PROGRESS, codec.to_json([context.fraction, context.note])))

    def prepare(self, job: BoundJob) -> NewJob:
        prepared = prepare(job, job.registration or registry.get(job.name))
        self._ask(wire.THEN, [prepared])
        return prepared

    def _dispatch(self, jobs: Sequence[BoundJob]) -> list[JobHandle]:
        return [DispatchedByChild(id) for id in self._enqueue(jobs)]

    def _enqueue(self, jobs: Sequence[BoundJob]) -> list[str]:
        prepared = [prepare(bound, bound.registration or registry.get(bound.name)) for bound in jobs]
        for piece in _pieces(prepared):
            self._ask(wire.ENQUEUE, piece)
        return [job.id for job in prepared]

    def _ask(self, kind: int, jobs: Sequence[NewJob]) -> None:
        """Ask the supervisor for `jobs`, and wait for its answer. KQueueError when it refuses."""
        with self._lock:
            self._socket.sendall(wire.frame(kind, dispatched(jobs)))
            _, payload = wire.read_frame(self._socket, (wire.REPLY,))
        reply = codec.from_json(payload)
        if "error" in reply:
            raise KQueueError(reply["error"])

    def _send(self, data: bytes) -> None:
        with self._lock:
            self._socket.sendall(data)


def _cancel(kernel: Kernel, task: Task, error: BaseException, frame: FrameType | None) -> None:
    """Raise `error` in the job, from the handler of a signal, which may come at any instruction.

    In the kernel's own, between two steps of the job, it would end the job without a word to it; in those of kqueue.io it would
    come between two lines that belong together: then it is for the next step.
    """
    if task is kernel.current and frame is not None and frame.f_globals.get("__package__") in ("kqueue.kernel", "kqueue.io"):
        kernel.spawn(_soon(kernel, task, error))
    else:
        kernel.cancel(task, error, grace_s=NEVER_ABANDONED_S)


def _soon(kernel: Kernel, task: Task, error: BaseException) -> Generator[None, None, None]:
    yield
    kernel.cancel(task, error, grace_s=NEVER_ABANDONED_S)


NEVER_ABANDONED_S: Final = 3600.0  # the supervisor's kill comes long before


class _Rehearsal(Run):
    """The run of a job that does nothing."""

    def _find(self, name: str) -> Registration:
        return Registration(name, JobOptions(), _nothing, cooperative=False, module=__name__)


def _nothing() -> None:
    return None


def rehearse() -> None:
    """Run a job that does nothing: whatever memory a run touches, this process then has copies of."""
    none = {"timeout": 0, "max_memory": 0, "max_cpu": 0}
    envelope = codec.Envelope(id="0" * 26, job="rehearsal", args=(), kwargs={})
    request = {"id": envelope.id, "job": envelope.job, "attempt": 1, "keep_result": True, "limits": none}
    dispatcher = get_dispatcher()
    supervisor, ours = socket.socketpair()
    with supervisor, ours:
        supervisor.sendall(wire.frame(wire.RUN, codec.encode(envelope)))
        copy_context().run(_Rehearsal(request, ours).attempt, *wire.read_frame(ours, (wire.RUN,)))
    set_dispatcher(dispatcher)
    _signal.signal(signal.SIGTERM, _signal.SIG_DFL)


def flush() -> None:
    """All that was printed goes out now. A stream that is closed, or cannot take it, is the job's own doing."""
    limits.flush_c()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            continue


_LIMIT_OF: Final = {errno.EMFILE: ("max_files", ""), errno.EFBIG: ("max_file_size", " MiB")}  # what each is about
_CAUSES: Final = (  # the first that fits
    (ArgumentsDoNotFit, "refused"),
    (JobTimedOut, "timeout"),
    (JobCancelled, "cancelled"),
    (MemoryError, "memory"),
    (SystemExit, "exit"),
    (BaseException, "exception"),
)


def failure(error: BaseException, limits: Mapping[str, float]) -> dict[str, Any]:
    """What `error` amounts to, as `child_frames.Failure` reads it."""
    cause = next(cause for kind, cause in _CAUSES if isinstance(error, kind))
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # mmap, fork
        cause = "memory"
    asked, retry_in_s = asked_by(error)
    described = describe_error(error)
    fields = {"cause": cause, "error": described, "asked": asked, "retry_in_s": retry_in_s}
    if isinstance(error, OSError) and error.errno in _LIMIT_OF:
        name, unit = _LIMIT_OF[error.errno]
        if limits.get(name):
            described["message"] = f"{described['message']} ({name} of this job is {limits[name]:g}{unit})"
    if cause == "memory" and limits.get("max_memory"):
        text = f"(max_memory of this job is {limits['max_memory']:g} MiB)"
        described["message"] = f"{described['message']} {text}" if described["message"] else text
    if isinstance(error, SystemExit):
        fields["exit_code"] = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    return fields


def _pieces(jobs: Sequence[NewJob]) -> Iterator[list[NewJob]]:
    """What one frame takes: so many jobs, and so many bytes."""
    piece: list[NewJob] = []
    size = 0
    for job in jobs:
        if piece and (len(piece) == MAX_JOBS or size + len(job.envelope) > PIECE_SIZE):
            yield piece
            piece, size = [], 0
        piece.append(job)
        size += len(job.envelope)
    if piece:
        yield piece


class DispatchedByChild:
    """A handle inside a child: the id is known, the rest is not, since a job has no connection to the broker."""

    def __init__(self, id: str) -> None:
        self.id = id

    def state(self) -> JobState:
        raise self._no("state")

    def wait(self, timeout: float | None = None) -> bool:
        raise self._no("wait")

    def result(self, timeout: float | None = None) -> Any:
        raise self._no("result")

    def cancel(self) -> bool:
        raise self._no("cancel")

    def _no(self, what: str) -> RuntimeError:
        return RuntimeError(f"{what}() is not there inside an isolated job, which has no broker; keep the id ({self.id}) instead")
