"""Names: looked up by a helper that may be slow, die, or not be there, and that nobody finds when the loop has ended."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kqueue import io
from kqueue.io import dialing, names, names_helper
from kqueue.io.names import Names, addresses_of
from kqueue.kernel import Kernel, join, sleep, wait_process
from tests.io.conftest import Server
from tests.io.test_streams import echo

Serve = Callable[..., Server]


class Log:
    """What helpers were asked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    @property
    def asked(self) -> Counter[str]:
        return Counter(line.split()[0] for line in self.lines)

    @property
    def pids(self) -> set[int]:
        return {int(line.split()[1]) for line in self.lines}


def use_helper(monkeypatch: pytest.MonkeyPatch, log: Path, idle_s: float) -> None:
    script = str(Path(__file__).parent / "slow_names.py")
    monkeypatch.setattr(names, "HELPER", [sys.executable, "-I", script, names_helper.__file__, str(log), str(idle_s)])


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    use_helper(monkeypatch, tmp_path / "log", 60)
    return Log(tmp_path / "log")


def ended(pid: int) -> bool:
    """Gone, and no zombie either."""
    return not os.path.exists(f"/proc/{pid}")


def resolve(name: str, timeout: float | None = None) -> Any:
    found = yield from addresses_of(name, 80, names.now() + timeout if timeout else None)
    return [at[0] for _, at in found]


def resolve_all(kernel: Kernel, *asked: str, timeout: float | None = None) -> Any:
    tasks = [kernel.spawn(resolve(name, timeout)) for name in asked]
    answers = []
    for task in tasks:
        answers.append((yield join(task)))
    return answers


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", [(socket.AF_INET, ("127.0.0.1", 80))]),
        ("::1", [(socket.AF_INET6, ("::1", 80, 0, 0))]),
        ("fe80::1%lo", [(socket.AF_INET6, ("fe80::1", 80, 0, socket.if_nametoindex("lo")))]),
        ("LocalHost.", [(socket.AF_INET, ("127.0.0.1", 80)), (socket.AF_INET6, ("::1", 80, 0, 0))]),
    ],
)
def test_addresses_need_no_helper(kernel: Kernel, host: str, expected: Any) -> None:
    assert kernel.run(addresses_of(host, 80, None)) == expected
    assert not any(isinstance(kept, Names) for kept in kernel.locals.values())


@pytest.mark.parametrize("name", ["a b", "a\nb", "x\0y", "x" * 254, "\ud800"])
def test_what_is_no_name_is_not_asked(kernel: Kernel, log: Log, name: str) -> None:
    with pytest.raises(io.NameNotFound, match="is no name"):
        kernel.run(resolve(name))
    assert log.lines == []


def test_the_real_helper_reads_what_the_host_knows(kernel: Kernel) -> None:
    """A name of /etc/hosts, which needs no network; and it is small, alone, and without our fds."""
    secret = os.open("/proc/self/status", os.O_RDONLY)
    os.set_inheritable(secret, True)
    try:
        assert "127.0.0.1" in kernel.run(resolve("ip4-loopback" if "ip4-loopback" in Path("/etc/hosts").read_text() else "127.1"))
        pid = kernel.locals[Names]._helpers[0].pid
        fds = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert set(fds) == {"0", "1", "2"}
        assert (fds["1"], fds["2"]) == ("/dev/null", "/dev/null")
        assert Path(f"/proc/{pid}/comm").read_text() == "kqueued: names\n"
        environment = Path(f"/proc/{pid}/environ").read_text()
        assert "KQUEUE" not in environment
        assert "PATH=" not in environment
        assert os.getpgid(pid) == pid, "a ^C is not for it"
    finally:
        os.close(secret)
    kernel.close()
    assert ended(pid)


def test_a_name_that_there_is_not(kernel: Kernel, log: Log) -> None:
    for name in ("none.example", "none.example", "trouble.example"):
        with pytest.raises(io.NameNotFound, match=rf"{name} cannot be resolved: (Name or service not known|Temporary failure)"):
            kernel.run(resolve(name))
    assert log.asked == {"none.example": 1, "trouble.example": 1}, "a failure is kept, too"


def test_the_same_name_is_looked_up_once(kernel: Kernel, log: Log) -> None:
    assert kernel.run(resolve_all(kernel, *["a.example"] * 50)) == [["127.0.0.1"]] * 50
    assert kernel.run(resolve("a.example")) == ["127.0.0.1"]
    assert log.asked == {"a.example": 1}


def test_a_slow_name_costs_only_who_waits_for_it(kernel: Kernel, log: Log) -> None:
    kernel.on_crash = lambda task: None  # its error is asked for later

    def job() -> Any:
        slow = [kernel.spawn(resolve(f"hangs.{number}", 0.3)) for number in range(40)]
        assert (yield from resolve_all(kernel, *(f"quick.{number}" for number in range(40)))) == [["127.0.0.1"]] * 40
        for task in slow:
            with pytest.raises(io.TimedOut, match="was not resolved in time"):
                yield join(task)

    kernel.run(job())


def test_more_names_than_are_looked_up_at_once(kernel: Kernel, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_ASKED", 3)
    assert kernel.run(resolve_all(kernel, *(f"n.{number}" for number in range(200)))) == [["127.0.0.1"]] * 200


def test_names_that_nobody_waits_for_hold_no_place(kernel: Kernel, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """All places are theirs, and their look-ups never end."""
    monkeypatch.setattr(names, "MAX_ASKED", 3)
    monkeypatch.setattr(names, "STUCK_S", 3600.0)
    kernel.on_crash = lambda task: None  # who gives up

    def job() -> Any:
        for generation in range(9):
            slow = [kernel.spawn(resolve(f"hangs.{generation}.{number}", 0.01)) for number in range(9)]
            for task in slow:
                with pytest.raises(io.TimedOut):
                    yield join(task)
            assert (yield from resolve(f"quick.{generation}", 60)) == ["127.0.0.1"]

    kernel.run(job())
    known = kernel.locals[Names]
    assert len(known._helpers) <= names.MAX_HELPERS
    assert not known._turn
    assert len(known._asked) <= names.MAX_ASKED * names.MAX_HELPERS, "the others are forgotten"


def test_who_gave_up_before_his_turn_is_not_asked_for(kernel: Kernel, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_ASKED", 1)
    monkeypatch.setattr(names, "MAX_HELPERS", 1)

    def job() -> Any:
        slow = kernel.spawn(resolve("hangs.1"))
        while not log.asked["hangs.1"]:
            yield sleep(0.001)
        with pytest.raises(io.TimedOut):
            yield from resolve("given.up", 0.01)
        kernel.cancel(slow, GeneratorExit())
        assert (yield from resolve("quick.1", 60)) == ["127.0.0.1"]

    kernel.run(job())
    assert log.asked == {"hangs.1": 1, "quick.1": 1}


def test_who_waits_long_for_his_turn_gets_another_helper(kernel: Kernel, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then another, but not without end."""
    monkeypatch.setattr(names, "MAX_ASKED", 2)
    monkeypatch.setattr(names, "STUCK_S", 0.01)
    kernel.on_crash = lambda task: None

    def job() -> Any:
        slow = [kernel.spawn(resolve(f"hangs.{number}")) for number in range(7)]
        assert (yield from resolve("quick.1", 60)) == ["127.0.0.1"]
        assert len(kernel.locals[Names]._helpers) == names.MAX_HELPERS
        slow += [kernel.spawn(resolve(f"hangs.{number}")) for number in range(7, 20)]
        yield sleep(0)
        with pytest.raises(io.TimedOut):
            yield from resolve("quick.2", 0.1)
        assert len(kernel.locals[Names]._helpers) == names.MAX_HELPERS
        for task in slow[:2]:
            kernel.cancel(task, GeneratorExit())
        for task in slow[8:]:
            kernel.cancel(task, GeneratorExit())
        assert (yield from resolve("quick.3", 60)) == ["127.0.0.1"]

    kernel.run(job())
    pids = log.pids
    kernel.close()
    assert all(ended(pid) for pid in pids)


def test_a_helper_that_makes_room_loses_nobodys_question(kernel: Kernel, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody waits for is asked again of another one, as often as that happens."""
    monkeypatch.setattr(names, "MAX_ASKED", 4)
    monkeypatch.setattr(names, "MAX_HELPERS", 1)
    kernel.on_crash = lambda task: None

    def job() -> Any:
        waits = kernel.spawn(resolve("hangs.waits", 3600))
        for generation in range(5):
            slow = [kernel.spawn(resolve(f"hangs.{generation}.{number}", 0.01)) for number in range(4)]
            for task in slow:
                with pytest.raises(io.TimedOut):
                    yield join(task)
            assert (yield from resolve(f"quick.{generation}", 60)) == ["127.0.0.1"]
            while log.asked["hangs.waits"] < generation + 1:
                yield sleep(0.001)
        assert not waits.ended
        kernel.cancel(waits, GeneratorExit())

    kernel.run(job())


def test_what_is_kept_is_bounded_and_grows_old(kernel: Kernel, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_KEPT", 2)
    for name in "abc":
        kernel.run(resolve(name))
    known = kernel.locals[Names]._known
    assert list(known) == ["b", "c"]
    known["c"] = known["c"]._replace(until=0.0)
    kernel.run(resolve("c"))
    assert log.asked == {"a": 1, "b": 1, "c": 2}


def test_the_death_of_the_helper_is_survived(kernel: Kernel, log: Log) -> None:
    def job() -> Any:
        yield from resolve("first")
        slow = kernel.spawn(resolve("hangs.1", 5))
        while log.asked["hangs.1"] < 1:
            yield sleep(0.001)
        os.kill(kernel.locals[Names]._helpers[0].pid, signal.SIGKILL)
        while log.asked["hangs.1"] < 2:
            yield sleep(0.001)
        kernel.cancel(slow, GeneratorExit())
        assert (yield from resolve("dies-once.1")) == ["127.0.0.1"]
        assert (yield from resolve("after")) == ["127.0.0.1"]

    kernel.run(job())
    living = {pid for pid in log.pids if not ended(pid)}
    assert living == {kernel.locals[Names]._helpers[0].pid}
    kernel.close()
    assert all(ended(pid) for pid in log.pids)


def test_a_name_that_kills_the_helper_is_given_up(kernel: Kernel, log: Log) -> None:
    with pytest.raises(io.NameNotFound, match="died twice over it"):
        kernel.run(resolve("dies.1"))
    assert log.asked == {"dies.1": 2}


def test_there_is_no_helper(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "HELPER", ["/nonexistent"])
    with pytest.raises(io.NameNotFound, match="cannot be started: No such file"):
        kernel.run(resolve("x"))


def test_an_idle_helper_ends_itself(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_helper(monkeypatch, tmp_path / "log", 0.01)
    log = Log(tmp_path / "log")

    def job() -> Any:
        yield from resolve("one")
        (pid,) = log.pids
        yield wait_process(pid)
        while not ended(pid):
            yield sleep(0.001)
        assert (yield from resolve("two")) == ["127.0.0.1"]

    kernel.run(job())


def test_it_ends_with_a_loop_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    """By SIGKILL, while a thread of it hangs in a look-up."""
    pid = os.fork()
    if pid == 0:
        try:
            kernel = Kernel()
            kernel.run(resolve("hangs.1"))
        finally:
            os._exit(1)
    while not log.pids:
        os.sched_yield()
    (helper,) = log.pids
    pidfd = os.pidfd_open(helper)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(10_000), "it is still there"
    os.close(pidfd)


# -- happy eyeballs -------------------------------------------------------------------------------------------------------


def test_families_take_turns() -> None:
    six, four = [(socket.AF_INET6, n) for n in range(3)], [(socket.AF_INET, n) for n in range(2)]
    assert dialing.alternating([*six, *four]) == [six[0], four[0], six[1], four[1], six[2]]
    assert dialing.alternating([]) == []


def test_the_second_address_is_tried_when_the_first_refuses(kernel: Kernel, serve: Serve, log: Log) -> None:
    def job() -> Any:
        with (yield io.connect("both.example", serve(echo).port)) as stream:
            yield stream.write(b"x")
            assert (yield stream.read()) == b"x"

    kernel.run(job())


@pytest.fixture
def black_hole() -> Any:
    """A port of 127.0.0.1 that answers nobody: its backlog is full, and the kernel drops what comes."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    fillers = []
    for _ in range(3):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        fillers.append(filler)
    yield listener.getsockname()
    for sock in (*fillers, listener):
        sock.close()


def test_a_silent_address_is_overtaken(kernel: Kernel, serve: Serve, black_hole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    good = ("127.0.0.1", serve(echo).port)

    def found(*args: Any) -> Any:
        yield from ()
        return [(socket.AF_INET, black_hole), (socket.AF_INET, good)]

    monkeypatch.setattr(dialing, "addresses_of", found)

    def job() -> Any:
        began = kernel.clock.monotonic()
        with (yield io.connect("x", 1)) as stream:
            assert stream._socket.getpeername() == good
            assert kernel.clock.monotonic() - began >= dialing.STAGGER_S

    kernel.run(job())


def test_nobody_answers(kernel: Kernel, black_hole: Any) -> None:
    def job() -> Any:
        with pytest.raises(io.TimedOut, match="did not answer in time"):
            yield io.connect(*black_hole, timeout=0.05)

    kernel.run(job())
