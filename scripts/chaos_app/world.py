"""The processes of a run, and the one loop that keeps them: what dies is started again, as systemd would with Restart=always.

Everything happens in this thread, nemeses too, as generators that yield the seconds they wait: PR_SET_PDEATHSIG, by which nothing
outlives a harness that is killed, is about the thread that forked.
"""

from __future__ import annotations

import ctypes
import heapq
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Final

from . import book
from .checker import History

HERE: Final = Path(__file__).resolve().parent
RESTART_S: Final = 0.1  # systemd's RestartSec
STARTING_S: Final = 2.0  # an interpreter that starts on a busy machine
TICK_S: Final = 0.01
PORTS: Final = range(30000, 32768)
START_S: Final = 20.0  # for a process to come up
REDIS_OPTIONS: Final = ("--save", "", "--appendonly", "yes", "--appendfsync", "always", "--repl-diskless-sync", "no")

Steps = Generator[float, None, None]

_libc = ctypes.CDLL(None)


class Trouble(Exception):
    """The run cannot go on, and what it was to show is not shown."""


class Loop:
    """Runs `Steps` at their times. `on_tick` is called between any two."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Steps]] = []
        self._numbers = count()
        self.on_tick: list[Callable[[], None]] = []

    def spawn(self, steps: Steps, in_s: float = 0.0) -> None:
        heapq.heappush(self._due, (time.monotonic() + in_s, next(self._numbers), steps))

    def run_until(self, over: Callable[[], bool], timeout_s: float) -> bool:
        """Whether `over()` came true in time."""
        deadline = time.monotonic() + timeout_s
        while not over():
            now = time.monotonic()
            if now >= deadline:
                return False
            while self._due and self._due[0][0] <= now:
                _, _, steps = heapq.heappop(self._due)
                wait_s = next(steps, None)
                if wait_s is not None:
                    self.spawn(steps, wait_s)
            for call in self.on_tick:
                call()
            pause_s = min(TICK_S, self._due[0][0] - time.monotonic()) if self._due else TICK_S
            if pause_s > 0:
                time.sleep(pause_s)
        return True


class Service:
    """A program that is kept running. `command(generation)` makes its command line; generations count from 1."""

    def __init__(
        self, loop: Loop, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, *, ends: bool = False
    ) -> None:
        self.name = name
        self.generation = 0
        self.started_at: dict[str, float] = {}  # "a.3" -> CLOCK_MONOTONIC
        self.process: subprocess.Popen[bytes] | None = None
        self.log = log
        self.wanted = False
        self.over = False  # it has done what it was for (`ends`)
        self.excused = ""  # why it may die; "": it may not
        self.mishaps: list[str] = []  # deaths that nobody caused
        self.deaths = 0
        self._loop = loop
        self._command, self._environment = list(command), dict(environment)
        self._ends = ends
        self._out: IO[bytes] = log.open("ab")
        loop.on_tick.append(self._look)

    @property
    def label(self) -> str:
        """This process of it: "a.3"."""
        return f"{self.name}.{self.generation}"

    @property
    def alive(self) -> bool:
        return self.process is not None

    @property
    def pid(self) -> int:
        """0: it does not run."""
        return self.process.pid if self.process is not None else 0

    def start(self) -> None:
        """Have it running from now on."""
        self.wanted = True
        if self.process is None and not self.over:
            self.generation += 1
            self.excused = ""
            environment = {**os.environ, **self._environment, book.DAEMON_VARIABLE: self.label}
            self.started_at[self.label] = book.now()
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._out, env=environment,
                preexec_fn=_die_with_us, start_new_session=True,
            )  # fmt: skip

    def send(self, number: signal.Signals, excuse: str = "") -> bool:
        """Whether there was a process to send it to. `excuse`: why it may die of it."""
        if self.process is None:
            return False
        if excuse:
            self.excused = excuse
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        return True

    def kill(self, excuse: str) -> tuple[float, float] | None:
        """SIGKILL, and wait for it: when it was sent, and when the process was gone. None: there was none."""
        if self.process is None:
            return None
        began = book.now()
        self.send(signal.SIGKILL, excuse)
        self.process.wait()
        ended = book.now()
        self._look()
        return began, ended

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 40.0) -> None:
        """End it for good; a process that does not end in time is killed, and that is a mishap."""
        self.wanted = False
        if self.process is None:
            return
        self.send(signal.SIGCONT)
        self.send(number, "the end")
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.mishaps.append(f"{self.label} did not end within {timeout_s:g} s of {number.name}")
            self.process.kill()
            self.process.wait()
        self._look()

    def close(self) -> None:
        self.wanted = False
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self._out.close()

    def _look(self) -> None:
        """Whether it has died, and what then."""
        if self.process is None or (status := self.process.poll()) is None:
            return
        self.process = None
        self.deaths += 1
        if self._ends and status == 0:
            self.over = True
            return
        if not self.excused:
            self._loop.spawn(self._accuse(self.label, status))
        elif self.excused == "told to stop" and status not in self._clean():
            self.mishaps.append(f"{self.label} ended with {_told(status)} when it was told to stop{self._last_words()}")
        if self.wanted:
            self._loop.spawn(self._restart(), RESTART_S)

    def _clean(self) -> tuple[int, ...]:
        """What it may end with when it is told to stop: before it has set up its signals, by SIGTERM itself."""
        age_s = book.now() - self.started_at[self.label]
        return (0, -signal.SIGTERM) if age_s < STARTING_S else (0,)

    def _restart(self) -> Steps:
        if self.wanted:
            self.start()
        return
        yield 0.0

    def _accuse(self, label: str, status: int) -> Steps:
        yield 0.05  # a job that killed it has written so by now, and the book has been read
        if not self.is_pardoned(label, status):
            self.mishaps.append(f"{label} died by itself: {_told(status)}{self._last_words()}")

    def is_pardoned(self, label: str, status: int) -> bool:
        """Whether the death of `label` is nobody's fault after all. The world decides it."""
        return False

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-4:]
        return "".join(f"\n        {line:.300}" for line in lines)


class Daemon(Service):
    """A kqueued, which may have been killed by a job."""

    history: History

    def is_pardoned(self, label: str, status: int) -> bool:
        return status == -signal.SIGKILL and label in self.history.killed_by_jobs


class Redis(Service):
    """A Redis of its own, AOF always."""

    def __init__(self, loop: Loop, directory: Path, log: Path, environment: Mapping[str, str]) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise Trouble("redis-server is not installed; on Debian: apt-get install redis-server, or use --broker sqlite")
        self.port = free_port()
        directory.mkdir(exist_ok=True)
        command = [program, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(directory), *REDIS_OPTIONS]
        super().__init__(loop, "redis", command, environment, log)

    def answers(self) -> bool:
        """Whether it takes connections and has loaded its file."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.2) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


class Config:
    """A kqueue.yaml in a directory of its own."""

    TEXT: Final = """\
instance: {name}
state_dir: var
queue: {{url: "{url}", names: {{default: 2, mail: 1}}, lease: {lease_s:g}s}}
jobs: {{path: ["{path}"], modules: [chaos_app.jobs], isolated_modules: [chaos_app.heavy]}}
inline: {{max_concurrent: {inline}}}
isolated: {{max_concurrent: {isolated}, kill_grace: 500ms, environment: ["KQUEUE_CHAOS_*"]}}
limits: {{timeout: 0}}
shutdown: {{grace: 1s}}
log: {{level: info, format: logfmt}}
control: {{socket: var/kqueued.sock}}
"""

    def __init__(self, directory: Path, name: str, url: str, lease_s: float, inline: int, isolated: int) -> None:
        self.name = name
        self.directory = directory / name
        self.directory.mkdir()
        self.path = self.directory / "kqueue.yaml"
        self.socket = self.directory / "var/kqueued.sock"
        self.path.write_text(
            self.TEXT.format(name=name, url=url, lease_s=lease_s, path=HERE.parent, inline=inline, isolated=isolated)
        )

    def kqueue(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """The operator's command."""
        command = [sys.executable, "-m", "kqueue.cli.main", "-c", str(self.path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)

    def left(self) -> dict[str, str]:
        """What stands in the broker, id -> state."""
        done = self.kqueue("jobs", "--json", "--limit", "1000000")
        if done.returncode:
            raise Trouble(f"`kqueue jobs` ended with {done.returncode}: {done.stderr.strip()}")
        return {row["id"]: row["state"] for row in json.loads(done.stdout)}


def descendants(pid: int) -> list[int]:
    """Of process `pid`, those that are alive, children before grandchildren."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def parent_of(pid: int) -> int:
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def survivors(book_path: Path, but: int) -> list[str]:
    """Processes of the run that are still there (those with its book in the environment), `but` for one."""
    found = []
    wanted = f"{book.PATH_VARIABLE}={book_path}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != but:
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(f"pid {entry.name}: {(entry / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
    return found


def free_port() -> int:
    """Below those that Linux gives to connections (from 32768 on): it stays free while the server is down."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise Trouble(f"no port of {PORTS.start} to {PORTS.stop} is free on 127.0.0.1")


def _die_with_us() -> None:
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _told(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name
