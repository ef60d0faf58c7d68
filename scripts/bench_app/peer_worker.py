"""A peer's worker, running while a `with` lasts, and its client. What was started is ended by guard.py, whatever became of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import marks
from kqueued import HERE, LOOK_S, Failure
from peers.work import REDIS_VARIABLE
from redis_server import die_with_us

PATIENCE_S = 15.0  # without any progress
LONGEST_S = 45.0  # with it
SEND_S = 60.0  # a client
STOP_S = 5.0  # of SIGTERM


class PeerRun:
    """Client and worker of a peer on `url`. `programs`: of its virtual environment; `room`: a new directory for marks and log."""

    def __init__(self, programs: Path, room: Path, url: str) -> None:
        self._programs = programs
        self._room = room
        self.marks = room / "marks"
        self.marks.mkdir(parents=True)
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
            "PATH": f"{programs}:{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(HERE),
            REDIS_VARIABLE: url,
            marks.DIRECTORY_VARIABLE: str(self.marks),
        }

    def send(self, peer: str, *arguments: str | int | float) -> list[float]:
        """What `peers.send` prints. Failure: it failed, or did not end."""
        command = [str(self._programs / "python"), "-m", "peers.send", peer, *map(str, arguments)]
        try:
            done = subprocess.run(
                command, env=self._environment, cwd=self._room, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=SEND_S, preexec_fn=die_with_us, check=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Failure(f"its client did not end within {SEND_S:g} s") from None
        except subprocess.CalledProcessError as error:
            raise Failure("\n    ".join(["its client failed", *error.stderr.splitlines()[-5:]])) from None
        return [float(word) for word in done.stdout.split()]

    @contextlib.contextmanager
    def worker(self, command: Sequence[str]) -> Iterator[PeerWorker]:
        guarded = [sys.executable, str(HERE / "guard.py"), str(STOP_S), str(self._programs / command[0]), *command[1:]]
        with (
            open(self._room / "log", "wb") as log,
            subprocess.Popen(
                guarded, env=self._environment, cwd=self._room, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, start_new_session=True,
            ) as guard,
        ):  # fmt: skip
            assert guard.stdout is not None
            yield PeerWorker(guard, int(guard.stdout.readline()), self.marks, self._room / "log")
            # leaving closes the guard's stdin, which ends the worker, and waits for it


class PeerWorker:
    def __init__(self, guard: subprocess.Popen[str], pid: int, directory: Path, log: Path) -> None:
        self.pid = pid
        self.marks = directory
        self._guard = guard
        self._log = log

    def finished(self, **expected: int) -> None:
        """Each file of marks has exactly as many as `expected`. Failure otherwise, which says what it did."""
        for name, count in expected.items():
            self._wait_for(name, count)
            found = marks.count(self.marks, name)
            if found != count:
                raise self._failure(f"{found} marks {name!r} for {count} jobs: some ran twice")

    def _wait_for(self, name: str, count: int) -> None:
        began = progress = time.monotonic()
        seen = -1
        while (now_seen := marks.count(self.marks, name)) < count:
            now = time.monotonic()
            if now_seen != seen:
                seen, progress = now_seen, now
            if self._guard.poll() is not None:
                raise self._failure(f"its worker ended with {now_seen} of {count} marks {name!r} written")
            if now > progress + PATIENCE_S or now > began + LONGEST_S:
                raise self._failure(f"only {now_seen} of {count} marks {name!r} after {now - began:.0f} s")
            time.sleep(LOOK_S)

    def _failure(self, what: str) -> Failure:
        lines = self._log.read_text(errors="replace").splitlines()
        return Failure("\n    ".join([what, *(f"log: {line}" for line in lines[-5:])]))
