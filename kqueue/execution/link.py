"""The supervisor's end of the template: keep one alive, ask it for children, hear how they end.

A template that dies takes its children with it (their PDEATHSIG); what those had started is ended here, by its mark, before they
are told to be lost, and a new template is started after a backoff. What runs in a child, and what its end means, is isolated.py's
business.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Container, Generator, Mapping, Sequence
from contextlib import ExitStack, suppress
from contextvars import Context
from math import inf
from typing import Any, Final

from .. import environment
from ..dispatch import undescribe
from ..errors import DuplicateJob, EnvelopeError
from ..events import Events, JobOutput, LeftoversEnded, TemplateDied, TemplateStarted, Warned
from ..kernel import READ, WRITE, Kernel, Park, Slots, Task, sleep, wait_io, wait_process
from ..loading import ImportFailed
from ..process import signal_name
from ..registry import Registration, registry
from . import wire
from .base import NotStarted
from .cgroup import Seen
from .handle import Child, ChildExit, pipe
from .killing import OWNER, end_marked, look, owner_of, owner_text
from .output import Lines
from .privileges import DEFAULT, Privileges

Steps = Generator[Any, Any, Any]
_GONE: Final = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)
FORK_PATIENCE_S: Final = 30.0  # a template that has not answered by then is taken for hung
BACKOFF_S: Final = (0.1, 30.0)  # first and longest wait before another template is started
STOP_PATIENCE_S: Final = 2.0  # for the template to end its children and itself
LOOK_S: Final = 0.5  # for any news of a child, before a look at what keeps it
REPORT_PATIENCE_S: Final = 10.0  # a template that has not reported a dead child by then is taken for hung, too


class TemplateLink:
    """Starts a template, restarts it when it dies, and passes requests on.

    It is started right away when there is something for it to run ("needed" in the configuration), else by the first request.
    """

    def __init__(
        self, kernel: Kernel, events: Events, identity: str = "", cgroups: bool = True, privileges: Privileges = DEFAULT
    ) -> None:  # fmt: skip
        self._kernel = kernel
        self._events = events
        self._privileges = privileges
        self._owner = owner_of(identity)
        self._cgroups = cgroups
        self._config: Mapping[str, Any] = {}
        self._socket: socket.socket | None = None
        self._keeper: Task | None = None
        self._waiting: deque[Task] = deque()  # for a template that is ready
        self._children: dict[int, Child] = {}
        self._serial = 0
        self._sending = Slots()
        self._sender: Task | None = None  # who is sending to the template
        self._refusal: tuple[str, str] | None = None  # (key, message) of the ImportFailed that ended it all
        self._starting = False  # somebody waits for the first one, and has to hear why there is none
        self._last_pid = 0
        self.known: set[str] = set()  # names of the jobs that its template has imported
        self.pid = 0  # of the template that is ready; 0: there is none
        self.is_retired = False
        self.siblings: Callable[[], Container[int]] = tuple  # other templates of this daemon, whose jobs are spared
        self._childless: Callable[[], None] = lambda: None
        self._described: list[Registration] = []  # the jobs of the template that is about to be ready
        self.on_manifest: Callable[[], None] = lambda: None

    def configure(self, config: Mapping[str, Any]) -> None:
        """What the template is to import; see loading.template_config. Read at its next start."""
        self._config = config

    @property
    def roots(self) -> Sequence[str]:
        """Where the modules of jobs are found."""
        return [*self._config.get("path", ()), *sys.path]

    def sweep(self, whose: str, living: Container[int] = ()) -> Steps:
        """End whatever jobs of `whose` are still there, and tell what that was. `living`: templates, whose jobs are spared."""
        ended = yield from end_marked(self._owner, living)
        if ended:
            self._events.emit(LeftoversEnded(whose, [f"{process.pid} ({process.name})" for process in ended.values()]))

    def start(self) -> Steps:
        """Start it if it is needed, and wait until it is ready. Raises ImportFailed when its very first imports fail."""
        if self._config.get("needed"):
            self._starting = True
            try:
                yield from self.ready()
            finally:
                self._starting = False

    def ready(self) -> Steps:
        """Wait until there is a template that can fork, or this one is retired.

        Raises ImportFailed when it is known that there will be none.
        """
        if self._keeper is None:
            self._keeper = self._kernel.spawn(self._keep(), name="template keeper", context=Context())  # no job's
        while not self.pid and not self.is_retired:
            if self._refusal is not None:
                raise ImportFailed(*self._refusal)
            yield Park(self._waiting)

    def fork(self, request: Mapping[str, Any], first: bytes = b"") -> Steps:
        """A running Child, that is told `first`. Raises NotStarted; one whose template died meanwhile is returned `lost`."""
        yield from self.ready()
        self._serial += 1
        try:
            child = Child(self._serial, self)
        except OSError as error:  # out of fds
            raise NotStarted(f"no pipes for a child: {error.strerror}") from None
        self._children[child.serial] = child
        if first:
            child.tell(first)
        try:
            yield from self._send({"serial": child.serial, **request}, child.its_fds)
            child.close_its_ends()
            given_up_at = self._kernel.clock.monotonic() + FORK_PATIENCE_S
            while child.is_pending and self._kernel.clock.monotonic() < given_up_at:
                yield Park(child.news, LOOK_S)
                if child.is_pending:
                    self._wake_stopped_template()
            if child.is_pending:
                self._kill_template()  # it is stuck; its death is news for all its children
                yield from self.exited(child)
        except BaseException:
            self.forget(child)
            raise
        if child.failure is not None:
            self.forget(child)
            raise NotStarted(child.failure)
        return child

    def exited(self, child: Child) -> Steps:
        """Wait until the template has said how `child` ended, or has died itself (then `child.lost`)."""
        given_up_at = inf
        while child.exit is None and not child.lost:
            yield Park(child.news, LOOK_S)
            if child.exit is not None or not child.has_ended:
                continue
            self._wake_stopped_template()
            now = self._kernel.clock.monotonic()
            given_up_at = min(given_up_at, now + REPORT_PATIENCE_S)
            if now >= given_up_at:
                self._kill_template()  # its death is news for all its children
                given_up_at = inf

    def kill(self, child: Child) -> None:
        """SIGKILL `child`. Its death makes the template end all that it started, even a template that somebody has stopped."""
        child.kill(signal.SIGKILL)
        self._wake_template()

    def forget(self, child: Child) -> None:
        """Kill it if it lives, and close what we hold of it. Its reaping is the template's business."""
        if child.exit is None:
            self.kill(child)
        self._children.pop(child.serial, None)
        child.close()
        self._look_whether_childless()

    @property
    def template_pid(self) -> int:
        """Of the template, ready or not; 0: there is none."""
        return self._last_pid

    @property
    def is_kept(self) -> bool:
        """Whether a template was asked for."""
        return self._keeper is not None

    @property
    def children(self) -> int:
        """How many of them there are."""
        return len(self._children)

    def retire(self, childless: Callable[[], None]) -> None:
        """Fork no more. `childless` is called once, when the last child is gone, as it may be already."""
        self.is_retired = True
        self._childless = childless
        self._kernel.unpark(self._waiting)  # to be told so
        self._look_whether_childless()

    def _look_whether_childless(self) -> None:
        if self.is_retired and not self._children:
            childless, self._childless = self._childless, lambda: None
            childless()

    def kill_all(self) -> None:
        """SIGKILL every child now."""
        for child in self._children.values():
            self.kill(child)

    def stop(self) -> Steps:
        """End the template, and with it whatever it still runs. It is the end of this link."""
        self.is_retired = True
        self._kernel.unpark(self._waiting)
        if self._keeper is not None:
            self._kernel.cancel(self._keeper, GeneratorExit())
            self._keeper = None
        self._hang_up()
        if self._last_pid:
            self._wake_template()
            killer = self._kernel.spawn(self._kill_later(), name="template killer")
            yield from self._bury("a template that was stopped")
            self._kernel.cancel(killer, GeneratorExit())
        self._lose_children()

    # -- keeping one alive ------------------------------------------------------------------------------------------

    def _keep(self) -> Steps:
        backoff_s = BACKOFF_S[0]
        first = True
        while True:
            began = self._kernel.clock.monotonic()
            reason, refusal = yield from self._live()
            pid, was_ready = self._last_pid, bool(self.pid)
            self._hang_up()
            if pid:
                reason = (yield from self._bury("a template that died")) or reason
            self._lose_children()
            if first and not was_ready and (refusal is not None or self._starting):
                key = "jobs.isolated_modules" if self._config.get("isolated_modules") else "jobs.modules"
                why = f"the template ended while it imported the job modules: {reason}"
                self._refusal = (refusal.key, str(refusal)) if refusal is not None else (key, why)
            if self.is_retired:
                self._look_whether_childless()
                return
            if self._refusal is not None:
                self._kernel.unpark(self._waiting)
                return
            if self._kernel.clock.monotonic() - began > BACKOFF_S[1]:
                backoff_s = BACKOFF_S[0]
            self._events.emit(TemplateDied(pid, reason, backoff_s))
            yield sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_S[1])
            first = False

    def _live(self) -> Steps:
        """The life of one template: (why it ended, its ImportFailed or None)."""
        try:
            pid, output_fd = self._spawn()
            self._kernel.spawn(self._pump(output_fd), name="template output")
            yield from self._listen(pid, self._kernel.clock.monotonic())
        except ImportFailed as error:
            return str(error), error
        except (OSError, EnvelopeError, wire.WireError) as error:
            return str(error), None
        return "it went away", None

    def _spawn(self) -> tuple[int, int]:
        """Exec a template; (its pid, the fd its output comes from). OSError when it cannot be."""
        with ExitStack() as opened:
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            opened.callback(ours.close)
            opened.callback(its.close)
            output_fd, its_output = pipe()
            opened.callback(os.close, output_fd)
            opened.callback(os.close, its_output)
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            opened.pop_all()
        its_environment = environment.for_jobs(os.environ, self._privileges.environment)
        its_environment[OWNER] = owner_text(self._owner)
        actions = [
            (os.POSIX_SPAWN_DUP2, null, 0),
            (os.POSIX_SPAWN_DUP2, its_output, 1),
            (os.POSIX_SPAWN_DUP2, its_output, 2),
            (os.POSIX_SPAWN_DUP2, its.fileno(), wire.CONTROL_FD),
        ]
        arguments = [sys.executable, "-m", "kqueue.execution.template"]
        try:
            # A session of its own: Ctrl-C in a terminal is for the supervisor to deal with.
            pid = os.posix_spawn(sys.executable, arguments, its_environment, file_actions=actions, setsid=True)
        except OSError:
            ours.close()
            os.close(output_fd)
            raise
        finally:
            its.close()
            os.close(its_output)
            os.close(null)
        ours.setblocking(False)
        self._socket = ours
        self._last_pid = pid
        of_this_daemon = {"owner": self._owner, "cgroups": self._cgroups, "privileges": self._privileges.plain()}
        wire.send_message(ours, wire.CONFIG, {**self._config, **of_this_daemon})
        return pid, output_fd

    def _listen(self, pid: int, began: float) -> Steps:
        """Hear the template out until it is gone."""
        sock = self._socket
        assert sock is not None
        self._described = []
        while True:
            yield wait_io(sock.fileno(), READ)
            while True:
                try:
                    message = wire.receive_message(sock)
                except BlockingIOError:
                    break
                if message is None:
                    return
                kind, fields, fds = message
                if kind == wire.JOB_KNOWN:
                    self._described.append(undescribe(fields))
                elif kind == wire.READY:
                    self._learn()
                    self.known = {registration.name for registration in self._described}
                    self.pid = pid
                    self._events.emit(TemplateStarted(pid, len(self._described), self._kernel.clock.monotonic() - began))
                    self.on_manifest()
                    self._kernel.unpark(self._waiting)
                elif kind == wire.IMPORT_FAILED:
                    hint = environment.hint(fields["message"], os.environ, self._privileges.environment)
                    raise ImportFailed(fields["key"], f"{fields['message']}; {hint}" if hint else fields["message"])
                elif kind == wire.WARNING:
                    self._events.emit(Warned(fields["message"]))
                else:
                    self._child_news(kind, fields, fds)

    def _learn(self) -> None:
        """What the template has told of, and nothing that an earlier one did."""
        try:
            registry.learn(self._described)
        except DuplicateJob as error:
            raise ImportFailed("jobs.commands", str(error)) from None

    def _child_news(self, kind: int, fields: dict[str, Any], fds: Sequence[int]) -> None:
        child = self._children.get(fields["serial"])
        if child is None:  # forgotten meanwhile
            for fd in fds:
                if kind == wire.STARTED:  # forgotten before it was born: nobody else can end it
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                os.close(fd)
            return
        if kind == wire.STARTED:
            child.started(fields["pid"], fds[0] if fds else self._pidfd_of(fields["pid"]))
        elif kind == wire.FORK_FAILED:
            child.failure = fields["message"]
        else:
            child.exit = ChildExit(
                fields["status"], fields["cpu_user_s"], fields["cpu_system_s"], fields["max_memory_mib"], Seen(*fields["seen"])
            )
            self._children.pop(child.serial)
            self._look_whether_childless()
        self._kernel.unpark(child.news)

    def _pidfd_of(self, pid: int) -> int:
        """The kernel dropped the fd of a message because we had no number left for it. -1: there still is none."""
        try:
            return os.pidfd_open(pid)
        except OSError:
            with suppress(OSError):
                os.killpg(pid, signal.SIGKILL)  # not reaped yet, as far as we have heard
            return -1

    def _bury(self, whose: str) -> Steps:
        """Wait until the template is gone, end what it should have ended, and reap it; how it ended, "" for an ordinary exit."""
        pid = self._last_pid
        yield wait_process(pid)
        how = _reap(pid)
        self._last_pid = 0
        if how:
            yield from self.sweep(whose, self.siblings())
        return how

    def _hang_up(self) -> None:
        """There is no template to be asked any more. One that lives sees end-of-file, ends its children, and itself."""
        self.pid = 0
        if self._sender is not None:
            self._kernel.wake(self._sender, 0)  # before its fd is closed, or it would wait for ever
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _lose_children(self) -> None:
        lost, self._children = self._children, {}
        for child in lost.values():
            child.lost = True
            self._kernel.unpark(child.news)

    def _send(self, fields: Mapping[str, Any], fds: Sequence[int]) -> Steps:
        """Send a FORK, one sender at a time: only one task may wait for a direction of an fd. Raises NotStarted."""
        yield from self._sending.take()
        self._sender = self._kernel.current
        try:
            while (sock := self._socket) is not None:  # None: it died just now, and said so to every child
                try:
                    wire.send_message(sock, wire.FORK, fields, fds)
                    return
                except BlockingIOError:
                    yield wait_io(sock.fileno(), WRITE)
                except OSError as error:
                    if error.errno in _GONE:
                        return  # _listen is about to find out
                    raise NotStarted(f"the template cannot be asked: {error.strerror}") from None
        finally:
            self._sender = None
            self._sending.give()

    def _pump(self, fd: int) -> Steps:
        lines = Lines()
        try:
            while True:
                yield wait_io(fd, READ)
                data = os.read(fd, 65536)
                for line in lines.feed(data) if data else lines.rest():
                    self._events.emit(JobOutput("-", "template", "stderr", line))
                if not data:
                    return
        finally:
            os.close(fd)

    def _kill_template(self) -> None:
        if self._last_pid:
            os.kill(self._last_pid, signal.SIGKILL)  # our own child, not reaped yet: the number is still its

    def _wake_stopped_template(self) -> None:
        """It has not answered for a while. That it was stopped is a job's doing; nobody else is to wait for it."""
        process = look(self._last_pid) if self._last_pid else None
        if process is not None and process.state == "T":
            self._wake_template()
            running = ", ".join(sorted(str(child.pid) for child in self._children.values() if child.pid)) or "none"
            self._events.emit(
                Warned(
                    f"the template ({process.pid}) was stopped by a signal, and goes on: a job has sent it one, or an operator "
                    f"(processes of jobs at the time: {running}); jobs that run as another user cannot, see isolated.user"
                )
            )

    def _wake_template(self) -> None:
        if self._last_pid:
            os.kill(self._last_pid, signal.SIGCONT)  # a job may have stopped it; to who is not stopped it is nothing

    def _kill_later(self) -> Steps:
        yield sleep(STOP_PATIENCE_S)
        self._kill_template()


def _reap(pid: int) -> str:
    """Reap our template; how it ended, "" for an ordinary exit."""
    try:
        _, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return ""
    if os.WIFSIGNALED(status):
        return f"killed by {signal_name(os.WTERMSIG(status))}"
    return f"exited with status {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else ""
