"""The control socket: it answers whoever may ask, and whoever means no good is bounded, hung up on, and forgotten."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kqueue import KQueueRuntime
from kqueue import events as facts
from kqueue.control import (
    DEAFNESS_S,
    MAX_CLIENTS,
    MAX_REQUEST,
    NO_DESCRIPTORS_PAUSE_S,
    SILENCE_S,
    Command,
    Control,
    address_of,
)
from kqueue.errors import AlreadyRunning, ConfigError, JobNotFound
from kqueue.kernel import READ, Clock, Park, Task, VirtualClock, sleep, wait_io, wait_process

Steps = Generator[Any, Any, Any]


def echo(request: Mapping[str, Any]) -> Steps:
    yield
    return {"request": dict(request)}


def refuse(request: Mapping[str, Any]) -> Steps:
    yield
    raise JobNotFound("no job 'x' is here")


def fail(request: Mapping[str, Any]) -> Steps:
    yield
    raise ZeroDivisionError("oh")


def long_answer(request: Mapping[str, Any]) -> Steps:
    yield
    return {"none": [], "one": [1], "many": [{"n": n, "text": "x" * 100} for n in range(10_000)]}


COMMANDS = {"echo": echo, "refuse": refuse, "fail": fail, "long": long_answer}
ECHO = b'{"command": "echo"}\n'


class Client:
    """The other end, on the same kernel. Its reads give up when nothing comes for a day of the virtual clock."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        with address_of(path) as address:
            self.socket.connect(address)
        self.unread = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> Steps:
        """The next answer; None when it was hung up on."""
        while b"\n" not in self.unread:
            if not (yield wait_io(self.socket.fileno(), READ, 86400)):
                raise AssertionError("no answer came")
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self.unread += data
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def ask(self, data: bytes) -> Steps:
        self.send(data)
        return (yield from self.answer())


class Rig:
    """A control socket that answers COMMANDS, in virtual time unless told otherwise."""

    def __init__(self, directory: Path, clock: Clock | None = None, mode: int = 0o600, **more: Command) -> None:
        self.path = str(directory / "kqueued.sock")
        self.runtime = KQueueRuntime("memory://control", clock=clock or VirtualClock())
        self.warnings: list[facts.Warned] = []
        self.runtime.events.subscribe(facts.Warned, self.warnings.append)
        self.clients: list[Client] = []
        self.control = Control(self.runtime, self.path, mode, {**COMMANDS, **more})

    def client(self) -> Client:
        self.clients.append(Client(self.path))
        return self.clients[-1]

    def run(self, script: Callable[[], Steps]) -> Any:
        return self.runtime.kernel.run(script())

    def now(self) -> float:
        return self.runtime.kernel.clock.monotonic()

    def close(self) -> None:
        for client in self.clients:
            client.socket.close()
        self.control.close()
        self.runtime.kernel.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    before = len(os.listdir("/proc/self/fd"))
    rig = Rig(tmp_path)
    rig.control.start()
    yield rig
    rig.close()
    assert len(os.listdir("/proc/self/fd")) == before, "an fd was left open"
    assert not os.path.exists(rig.path)


# -- answers ----------------------------------------------------------------------------------------------------------------


def test_a_command_gets_the_whole_request_and_its_fields_are_the_answer(rig: Rig) -> None:
    answer = rig.run(lambda: rig.client().ask(b'{"command": "echo", "id": 7}\n'))
    assert answer == {"ok": True, "request": {"command": "echo", "id": 7}}


def test_one_connection_may_ask_again_and_again_and_ahead(rig: Rig) -> None:
    def script() -> Steps:
        client = rig.client()
        first = yield from client.ask(b'{"command": "echo", "n": 1}\n')
        client.send(b"".join(b'{"command": "echo", "n": %d}\n' % n for n in (2, 3, 4)))
        rest = []
        for _ in range(3):
            rest.append((yield from client.answer()))
        return [answer["request"]["n"] for answer in [first, *rest]]

    assert rig.run(script) == [1, 2, 3, 4]


def test_a_long_answer_takes_several_turns_and_is_whole(rig: Rig) -> None:
    def script() -> Steps:
        turns = rig.runtime.kernel.turns
        answer = yield from rig.client().ask(b'{"command": "long"}\n')
        return answer, rig.runtime.kernel.turns - turns

    answer, turns = rig.run(script)
    assert (answer["none"], answer["one"]) == ([], [1])
    assert [item["n"] for item in answer["many"]] == list(range(10_000))
    assert turns > 20


def test_a_request_may_come_in_pieces(rig: Rig) -> None:
    def script() -> Steps:
        client = rig.client()
        for byte in ECHO[:-1]:
            client.send(bytes([byte]))
            yield sleep(0.01)
        return (yield from client.ask(b"\n"))

    assert rig.run(script)["ok"] is True


@pytest.mark.parametrize(
    ("request_line", "error"),
    [
        (b"hello\n", "the request is not JSON"),
        (b"\xff\xfe\x00\n", "the request is not JSON"),
        (b"\n", "the request is not JSON"),
        (b"[" * 60_000 + b"\n", "the request is not JSON"),
        (b"[]\n", 'no such command; say {"command": NAME}, where NAME is one of echo, fail, long, refuse'),
        (b'{"command": 5}\n', "no such command"),
        (b'{"command": ["echo"]}\n', "no such command"),
        (b'{"command": "nosuch"}\n', "no such command"),
        (b'{"command": "refuse"}\n', "no job 'x' is here"),
        (b'{"command": "fail"}\n', "internal error: ZeroDivisionError('oh')"),
    ],
)
def test_what_is_no_request_is_an_error_and_the_next_one_is_answered(rig: Rig, request_line: bytes, error: str) -> None:
    def script() -> Steps:
        client = rig.client()
        return (yield from client.ask(request_line)), (yield from client.ask(ECHO))

    refused, answered = rig.run(script)
    assert refused["ok"] is False
    assert refused["error"].startswith(error)
    assert answered["ok"] is True
    assert len(rig.warnings) == ("fail" in request_line.decode("latin-1"))


# -- clients that mean no good ----------------------------------------------------------------------------------------------


def test_a_request_that_never_ends_is_refused(rig: Rig) -> None:
    def script() -> Steps:
        client = rig.client()
        client.send(b"x" * (MAX_REQUEST + 1))
        return (yield from client.answer()), (yield from client.answer())

    assert rig.run(script) == ({"ok": False, "error": f"a request has at most {MAX_REQUEST} bytes"}, None)


def test_a_silent_client_is_hung_up_on(rig: Rig) -> None:
    def script() -> Steps:
        answer = yield from rig.client().answer()
        return answer, rig.now()

    assert rig.run(script) == (None, SILENCE_S)


def test_so_is_one_that_trickles(rig: Rig) -> None:
    def script() -> Steps:
        client = rig.client()
        try:
            while True:
                client.send(b"x")
                yield sleep(1.0)
        except BrokenPipeError:
            return rig.now()

    assert SILENCE_S <= rig.run(script) <= SILENCE_S + 1.0


def test_so_is_one_that_asks_and_does_not_listen(rig: Rig) -> None:
    def script() -> Steps:
        deaf = rig.client()
        deaf.send(b'{"command": "long"}\n')
        yield sleep(DEAFNESS_S - 1)
        other = yield from rig.client().ask(ECHO)
        yield sleep(2.0)
        try:
            deaf.send(ECHO)
        except BrokenPipeError:
            return other

    assert rig.run(script)["ok"] is True


def test_a_client_that_goes_in_the_middle_is_forgotten(rig: Rig) -> None:
    def script() -> Steps:
        for words in (b"", b'{"comm', ECHO, ECHO * 1000):
            client = rig.client()
            client.send(words)
            client.socket.close()
        yield sleep(1.0)
        return (yield from rig.client().ask(ECHO))

    assert rig.run(script)["ok"] is True
    assert len(rig.control._clients) == 1


def test_when_all_places_are_taken_the_longest_silent_client_goes(rig: Rig) -> None:
    def script() -> Steps:
        first = rig.client()
        yield from first.ask(ECHO)
        crowd = [rig.client() for _ in range(MAX_CLIENTS - 1)]
        yield sleep(0.1)
        yield from first.ask(ECHO)
        late = yield from rig.client().ask(ECHO)
        return late, (yield from crowd[0].answer()), (yield from first.ask(ECHO)), (yield from crowd[1].ask(ECHO))

    late, silent, first, next_silent = rig.run(script)
    assert silent is None
    assert [answer["ok"] for answer in (late, first, next_silent)] == [True] * 3
    assert len(rig.control._clients) == MAX_CLIENTS


def test_a_thousand_connections_leave_no_more_than_there_are_places(rig: Rig) -> None:
    def script() -> Steps:
        for _ in range(1000):
            client = rig.client()
            yield
            if len(rig.clients) > MAX_CLIENTS:
                rig.clients.pop(0).socket.close()
        yield sleep(0.1)
        assert len(rig.control._clients) <= MAX_CLIENTS
        return (yield from client.ask(ECHO))

    assert rig.run(script)["ok"] is True


def test_without_descriptors_it_waits_until_there_are_some_again(rig: Rig) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def script() -> Steps:
        client = rig.client()
        client.send(ECHO)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (client.socket.fileno() + 1, hard))
        try:
            fillers: list[int] = []
            while client.socket.fileno() < highest or len(fillers) < 1024:
                try:
                    fillers.append(os.open("/dev/null", os.O_RDONLY))
                except OSError:
                    break
            yield sleep(NO_DESCRIPTORS_PAUSE_S / 2)
            assert not rig.control._clients
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in fillers:
                os.close(fd)
        return (yield from client.answer())

    assert rig.run(script)["ok"] is True


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_refused_even_where_the_file_lets_them_in() -> None:
    directory = Path(tempfile.mkdtemp(prefix="kqueue-control-"))  # pytest's own is closed to others
    directory.chmod(0o755)
    rig = Rig(directory, Clock(), 0o666)  # a process takes real time
    rig.control.start()
    code = """
import os, socket, sys
os.setgid(65534), os.setuid(65534)
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
print(client.makefile().read())
"""
    stranger = subprocess.Popen([sys.executable, "-c", code, rig.path], stdout=subprocess.PIPE, text=True)

    def script() -> Steps:
        yield wait_process(stranger.pid)

    try:
        rig.run(script)
        said, _ = stranger.communicate(timeout=10)
    finally:
        stranger.kill()
        rig.close()
        shutil.rmtree(directory)
    assert json.loads(said) == {"ok": False, "error": "this daemon answers its own user and root only"}


# -- the file ---------------------------------------------------------------------------------------------------------------


def test_the_file_has_the_mode_of_the_configuration(rig: Rig) -> None:
    status = os.stat(rig.path)
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert os.listdir(os.path.dirname(rig.path)) == ["kqueued.sock"]


def test_the_socket_of_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(rig.path)
    rig.control.start()
    assert rig.run(lambda: rig.client().ask(ECHO))["ok"] is True
    rig.close()


def test_the_socket_of_a_live_daemon_is_not(rig: Rig, tmp_path: Path) -> None:
    other = Control(rig.runtime, rig.path, 0o600, {})
    with pytest.raises(AlreadyRunning, match=r"another daemon answers on .*kqueued\.sock; give each its own"):
        other.start()
    other.close()
    assert rig.run(lambda: rig.client().ask(ECHO))["ok"] is True


@pytest.mark.parametrize("kind", ["file", "directory", "symbolic link"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    rig = Rig(tmp_path)
    path = Path(rig.path)
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(ConfigError, match=f"control.socket: .*kqueued.sock is a {kind}, not a socket; remove it") as caught:
        rig.control.start()
    assert caught.value.exit_code == 2
    rig.close()
    assert os.path.lexists(path)


def test_a_path_longer_than_a_socket_may_have_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    rig = Rig(deep)
    assert len(rig.path) > 107
    rig.control.start()
    assert rig.run(lambda: rig.client().ask(ECHO))["ok"] is True
    rig.close()
    assert list(deep.iterdir()) == []


def test_where_no_socket_can_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.sock", tmp_path / ("n" * 200)):
        rig = Rig(tmp_path)
        rig.control = Control(rig.runtime, str(path), 0o600, {})
        with pytest.raises(ConfigError, match=r"^control\.socket: .* cannot be opened: .*; name another path$"):
            rig.control.start()
        rig.close()
    assert os.listdir(tmp_path) == ["file"]


def test_closing_leaves_the_socket_of_a_successor(rig: Rig) -> None:
    os.unlink(rig.path)
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(rig.path)
        rig.control.close()
        assert os.path.exists(rig.path)
    os.unlink(rig.path)


def test_closing_hangs_up_on_everyone_at_once(rig: Rig) -> None:
    def script() -> Steps:
        client = rig.client()
        yield from client.ask(ECHO)
        rig.control.close()
        return (yield from client.answer())

    assert rig.run(script) is None
    assert rig.run(lambda: (yield)) is None, "whoever was hung up on ends quietly"


def test_a_command_that_takes_long_holds_up_only_who_asked(tmp_path: Path) -> None:
    never: deque[Task] = deque()

    def hang(request: Mapping[str, Any]) -> Steps:
        yield Park(never)

    rig = Rig(tmp_path, hang=hang)
    rig.control.start()

    def script() -> Steps:
        rig.client().send(b'{"command": "hang"}\n')
        yield sleep(0.1)
        return (yield from rig.client().ask(ECHO))

    assert rig.run(script)["ok"] is True
    rig.close()
