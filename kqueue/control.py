"""The control socket: a Unix socket on which the daemon answers the `kqueue` command. One JSON object a line, both ways.

    {"command": "status"}  ->  {"ok": true, …}
    {"command": "nosuch"}  ->  {"ok": false, "error": "…"}

What a command does is somebody else's function, given by name; here is only the talking. Nobody who talks may cost the daemon
more than a few microseconds a turn of the loop: one client is accepted a turn, requests and clients are bounded, whoever says
nothing, or does not listen, is hung up on, and when all places are taken the longest silent one goes.

The file's mode keeps others out, and SO_PEERCRED makes sure: root and the daemon's own user are answered, nobody else.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

from .codec import from_json, to_json
from .errors import AlreadyRunning, ConfigError, EnvelopeError, KQueueError, UsageError
from .events import Warned
from .kernel import READ, WRITE, Task, sleep, wait_io
from .runtime import KQueueRuntime

Steps = Generator[Any, Any, Any]
Command = Callable[[Mapping[str, Any]], Steps]
"""Takes the whole request; the generator returns what is answered besides "ok". A KQueueError it raises is the answer, too."""

MAX_REQUEST: Final = 64 * 1024  # bytes
READ_SIZE: Final = 16 * 1024
MAX_CLIENTS: Final = 64
BACKLOG: Final = 128  # connections that wait to be accepted
SILENCE_S: Final = 10.0  # for a request to be complete
DEAFNESS_S: Final = 10.0  # for an answer to be taken
SLICE: Final = 500  # items of a list encoded in one turn of the loop
NO_DESCRIPTORS_PAUSE_S: Final = 0.1
LONGEST_PATH: Final = 107  # bytes; sun_path has 108 with its NUL, unix(7)


class Control:
    """Answers `commands` on the socket `path`, a file of `mode`, from `start` to `close`."""

    def __init__(self, runtime: KQueueRuntime, path: str, mode: int, commands: Mapping[str, Command]) -> None:
        self._runtime = runtime
        self._kernel = runtime.kernel
        self._path = path
        self._mode = mode
        self._commands = commands
        self._listener: socket.socket | None = None  # None: not started, or closed
        self._acceptor: Task | None = None
        self._inode = (0, 0)  # of our file
        self._clients: dict[Task, socket.socket] = {}  # the longest silent first

    def start(self) -> None:
        """Open the socket, in place of one that a dead daemon left. Raises ConfigError, AlreadyRunning when one answers there."""
        try:
            self._listener = _listen(self._path, self._mode)
            self._inode = _inode(self._path)
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"control.socket: {self._path} cannot be opened: {why}; name another path") from None
        self._acceptor = self._kernel.spawn(self._accept(self._listener), name="control")

    def close(self) -> None:
        """Hang up on everyone and remove the file. The kernel need not run any more."""
        for task in list(self._clients):
            self._hang_up(task)
        if self._acceptor is not None:
            self._kernel.cancel(self._acceptor, GeneratorExit())
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with suppress(OSError):
                if _inode(self._path) == self._inode:  # else it is our successor's
                    os.unlink(self._path)

    # -- clients ----------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> Steps:
        while True:
            yield wait_io(listener.fileno(), READ)
            try:
                client, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError:  # no descriptor is left, and the connection goes on knocking
                yield sleep(NO_DESCRIPTORS_PAUSE_S)
                continue
            if len(self._clients) >= MAX_CLIENTS:
                self._hang_up(next(iter(self._clients)))
            client.setblocking(False)
            task = self._kernel.spawn(self._serve(client), name="control client")
            task.on_end = self._ended
            self._clients[task] = client

    def _ended(self, task: Task) -> None:
        client = self._clients.pop(task, None)
        if client is not None:  # else we hung up
            client.close()

    def _hang_up(self, task: Task) -> None:
        self._kernel.cancel(task, GeneratorExit())
        self._clients.pop(task).close()

    def _serve(self, client: socket.socket) -> Steps:
        """One request after the other, until the client goes, or must."""
        with suppress(OSError):
            if _uid_of(client) not in (0, os.geteuid()):
                yield from self._send(client, _refusal("this daemon answers its own user and root only"))
                return
            unread = bytearray()
            while True:
                line = yield from self._receive(client, unread)
                if line is None:
                    return
                if len(line) > MAX_REQUEST:
                    yield from self._send(client, _refusal(f"a request has at most {MAX_REQUEST} bytes"))
                    return
                task = self._kernel.current
                assert task is not None
                self._clients[task] = self._clients.pop(task)  # last: it is the least silent now
                answer = yield from self._answer(line)
                if not (yield from self._send(client, answer)):
                    return
                yield  # whatever else it has asked already

    def _receive(self, client: socket.socket, unread: bytearray) -> Steps:
        """The next line, or as much of a longer one as proves it too long; None when none came. `unread` keeps what follows."""
        deadline = self._now() + SILENCE_S
        while True:
            end = unread.find(b"\n")
            if end >= 0 or len(unread) > MAX_REQUEST:
                line = bytes(unread if end < 0 else unread[:end])
                del unread[: len(line) + 1]
                return line
            if not (yield wait_io(client.fileno(), READ, max(0.0, deadline - self._now()))):
                return None
            data = client.recv(READ_SIZE)
            if not data:
                return None
            unread += data

    def _send(self, client: socket.socket, answer: bytes) -> Steps:
        """Send `answer`; whether it was taken in time."""
        left = memoryview(answer)
        deadline = self._now() + DEAFNESS_S
        while left:
            try:
                left = left[client.send(left) :]
            except BlockingIOError:
                if not (yield wait_io(client.fileno(), WRITE, max(0.0, deadline - self._now()))):
                    return False
        return True

    def _now(self) -> float:
        return self._kernel.clock.monotonic()

    # -- requests ---------------------------------------------------------------------------------------------------

    def _answer(self, line: bytes) -> Steps:
        """The line to answer to `line`, whatever that is."""
        try:
            request = from_json(line)
            name = request.get("command") if isinstance(request, dict) else None
            command = self._commands.get(name) if isinstance(name, str) else None
            if command is None:
                known = ", ".join(sorted(self._commands))
                raise UsageError(f'no such command; say {{"command": NAME}}, where NAME is one of {known}')
            fields = yield from command(request)
            return (yield from _encoded({"ok": True, **fields}))
        except EnvelopeError as error:
            return _refusal(f"the request is {error}")
        except KQueueError as error:
            return _refusal(str(error))
        except Exception as error:
            self._runtime.events.emit(Warned(f"internal error in a control command: {error!r}; please report it"))
            return _refusal(f"internal error: {error!r}")


def _refusal(why: str) -> bytes:
    return to_json({"ok": False, "error": why}) + b"\n"


def _encoded(answer: Mapping[str, Any]) -> Steps:
    """`answer` as a line. 10,000 running jobs take 15 ms to encode, so a long list takes several turns of the loop."""
    fields = []
    for name, value in answer.items():
        text = (yield from _encoded_list(value)) if isinstance(value, list) else to_json(value)
        fields.append(to_json(name) + b":" + text)
    return b"{" + b",".join(fields) + b"}\n"


def _encoded_list(items: list[Any]) -> Steps:
    pieces = []
    for start in range(0, len(items), SLICE):
        if start:
            yield
        pieces.append(to_json(items[start : start + SLICE])[1:-1])
    return b"[" + b",".join(pieces) + b"]"


def _uid_of(client: socket.socket) -> int:
    credentials = struct.Struct("3i")  # pid, uid, gid of whoever connected
    uid: int = credentials.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))[1]
    return uid


# -- the file ---------------------------------------------------------------------------------------------------------------


@contextmanager
def address_of(path: str) -> Iterator[str]:
    """What to bind or connect to for `path`: itself, or where that is too long for a socket, a short name of its directory."""
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def _listen(path: str, mode: int) -> socket.socket:
    """A listening socket at `path`. It gets its name by a rename, so that nobody meets it half made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    _check_place(path)
    new = f"{path}.{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        with suppress(FileNotFoundError):
            os.unlink(new)
        with address_of(new) as address:
            listener.bind(address)
        os.chmod(new, mode)
        listener.listen(BACKLOG)
        os.rename(new, path)
    except BaseException:
        listener.close()
        with suppress(OSError):
            os.unlink(new)
        raise
    return listener


def _check_place(path: str) -> None:
    """Raise unless `path` is free, or a socket that nobody listens on any more."""
    try:
        found = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found):
        kind = "a directory" if stat.S_ISDIR(found) else "a symbolic link" if stat.S_ISLNK(found) else "a file"
        raise ConfigError(f"control.socket: {path} is {kind}, not a socket; remove it, or name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, address_of(path) as address:
        probe.setblocking(False)
        refused = probe.connect_ex(address)
    if refused in (0, errno.EAGAIN):  # EAGAIN: somebody listens, whose backlog is full
        raise AlreadyRunning(f"control.socket: another daemon answers on {path}; give each its own")
    if refused != errno.ECONNREFUSED:
        raise OSError(refused, os.strerror(refused))


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino
