"""A `kqueued -c` as a user would start it, one for each measurement, and the books that no job may be missing from.

The configuration is the default one but for paths, the queue and the job modules. The log goes to a file; its level is the
default, so every job writes a line there. Each daemon has a directory of its own, with its marks in it, and ends by SIGTERM; one
that does not end cleanly is a failure of the figure. Its modules were compiled before, as those of an installed package are.
"""

from __future__ import annotations

import compileall
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import marks
import procfs
from redis_server import die_with_us

import kqueue
from kqueue.client import Client

HERE = Path(__file__).resolve().parent
PATIENCE_S = 60.0  # without any progress
STOP_S = 30.0  # more than shutdown.grace and what INTERFACES adds to it
LOOK_S = 0.005  # between two looks; a stat(2) each
CONFIG = """\
instance: {instance}
state_dir: {room}/var
queue: {{url: "{url}"{queue}}}
jobs: {{path: [{here}], modules: {modules}, isolated_modules: {isolated_modules}}}
control: {{socket: {room}/var/kqueued.sock}}
isolated: {{environment: [{variable}], max_concurrent: {isolated}}}
inline: {{max_concurrent: {inline}}}
{more}
"""


class Failure(Exception):
    """A figure that means nothing: a job was lost or run twice, or a daemon did not do what it was told."""


class Kqueued:
    """A kqueued on `url` in the new directory `room`, running while the `with` lasts.

    `python`: options of the interpreter ("-m cProfile …"); `options`: of kqueued; `isolated`, `inline`: jobs at once; `marks_in`:
    the directory of another one's marks, for its own to go there. `queue`: what else stands below that (", names: …"), `more`:
    and at the end of its configuration.
    """

    def __init__(
        self, room: Path, url: str, modules: Sequence[str] = ("light",), isolated_modules: Sequence[str] = (), *,
        python: Sequence[str] = (), options: Sequence[str] = (), isolated: int = 4, inline: int = 10_000,
        marks_in: Path | None = None, queue: str = "", more: str = "",
    ) -> None:  # fmt: skip
        room.mkdir(parents=True)
        self._config = room / "kqueue.yaml"
        self._config.write_text(
            CONFIG.format(
                instance=room.name, room=room, url=url, here=json.dumps(str(HERE)), modules=json.dumps(list(modules)),
                isolated_modules=json.dumps(list(isolated_modules)), isolated=isolated, inline=inline,
                variable=marks.DIRECTORY_VARIABLE, queue=queue, more=more,
            )
        )  # fmt: skip
        self._room = room
        self._command = [sys.executable, *python, "-m", "kqueue.cli.kqueued", "-c", str(self._config), *options]
        self._process: subprocess.Popen[bytes] | None = None
        self._stamp = mmap.mmap(-1, 8)  # shared with the child
        self.marks = room / "marks" if marks_in is None else marks_in
        self.marks.mkdir(exist_ok=True)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def executed_at(self) -> float:
        """time.time() right before its exec."""
        return float(struct.unpack("<d", self._stamp[:8])[0])

    def __enter__(self) -> Kqueued:
        def before_exec() -> None:
            die_with_us()
            self._stamp[:8] = struct.pack("<d", time.time())

        environment = {**os.environ, marks.DIRECTORY_VARIABLE: str(self.marks)}
        with open(self._room / "log", "wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, preexec_fn=before_exec
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        process = self._process
        assert process is not None
        if kind is not None:  # something is wrong already: end all of it now
            for pid in reversed(procfs.tree(process.pid)) if process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            process.wait()
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.__exit__(Failure)
            raise self._failure(f"kqueued did not end within {STOP_S:g} s of SIGTERM") from None
        if status:
            raise self._failure(f"kqueued ended with status {status}")

    def wait_for(self, name: str, count: int) -> None:
        """Until `count` marks stand in the file `name`. Failure: they do not come, or the daemon is gone."""
        seen, deadline = -1, 0.0
        while (now_seen := marks.count(self.marks, name)) < count:
            if now_seen != seen:
                seen, deadline = now_seen, time.monotonic() + PATIENCE_S
            if self._process is None or self._process.poll() is not None:
                raise self._failure(f"kqueued ended with {now_seen} of {count} marks {name!r} written")
            if time.monotonic() > deadline:
                raise self._failure(f"only {now_seen} of {count} marks {name!r} after {PATIENCE_S:g} s without any")
            time.sleep(LOOK_S)

    def wait_for_exit(self) -> None:
        """Until it has ended by itself."""
        assert self._process is not None
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise self._failure(f"kqueued still runs after {PATIENCE_S:g} s") from None

    def wait_for_socket(self) -> None:
        """Until it takes commands, which is when everything but the broker is up."""
        deadline = time.monotonic() + PATIENCE_S
        while not (self._room / "var/kqueued.sock").exists():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                raise self._failure("kqueued did not come up")
            time.sleep(LOOK_S)

    def status(self) -> Mapping[str, Any]:
        """What `kqueue status` would say, now."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(PATIENCE_S)
            control.connect(str(self._room / "var/kqueued.sock"))
            control.sendall(b'{"command": "status"}\n')
            with control.makefile("rb") as answer:
                found: Mapping[str, Any] = json.loads(answer.readline())
        return found

    def expect_running(self) -> None:
        """Failure when it has ended."""
        if self._process is None or self._process.poll() is not None:
            raise self._failure("kqueued has ended by itself")

    def finished(self, client: Client, **expected: int) -> None:
        """Each file of marks has exactly as many as `expected`, and nothing is left in the queue. Failure otherwise."""
        for name, count in expected.items():
            self.wait_for(name, count)
        deadline = time.monotonic() + PATIENCE_S
        while any(any(stats) for stats in client.store.stats().values()):  # the last are being settled
            if time.monotonic() > deadline:
                raise self._failure(f"the queue is not empty: {client.store.stats()}")
            time.sleep(LOOK_S)
        for name, count in expected.items():
            found = marks.count(self.marks, name)
            if found != count:
                raise self._failure(f"{found} marks {name!r} for {count} jobs: some ran twice")

    def _failure(self, what: str) -> Failure:
        log = (self._room / "log").read_text(errors="replace").splitlines()
        return Failure("\n    ".join([what, *(f"log: {line}" for line in log[-5:])]))


def expect_ready(client: Client, count: int) -> None:
    """Failure unless exactly `count` jobs wait in the queue."""
    ready = sum(stats.ready for stats in client.store.stats().values())
    if ready != count:
        raise Failure(f"{ready} jobs wait in the queue after {count} were dispatched")


def connect(url: str) -> Client:
    """This process's jobs go to `url` from now on."""
    return kqueue.connect(url)


def compile_modules() -> None:
    """Write the bytecode that a daemon would otherwise make at its start."""
    for directory in (Path(kqueue.__file__).parent, HERE):
        compileall.compile_dir(directory, quiet=1)
