"""The Redis of the benchmark: a server of its own on a free port of 127.0.0.1, in a directory that goes with it."""

from __future__ import annotations

import ctypes
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

START_S = 20.0
PERSISTENCE = {
    "none": ["--appendonly", "no"],
    "everysec": ["--appendonly", "yes", "--appendfsync", "everysec"],
    "always": ["--appendonly", "yes", "--appendfsync", "always"],
}
_libc = ctypes.CDLL(None)


def die_with_us() -> None:
    """In a child, before exec: a benchmark that is killed leaves nothing behind (PR_SET_PDEATHSIG)."""
    _libc.prctl(1, signal.SIGKILL)


class RedisServer:
    """Running while the `with` lasts. `persistence`: a key of PERSISTENCE; snapshots are off in each."""

    def __init__(self, directory: Path, persistence: str = "none", options: Sequence[str] = ()) -> None:
        self._directory = directory
        self._options: Sequence[str] = [*PERSISTENCE[persistence], *options]
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def port(self) -> int:
        return self._port

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> RedisServer:
        program = shutil.which("redis-server")
        if program is None:
            raise SystemExit("redis-server is not installed: apt-get install redis-server, or run with --broker sqlite")
        self._directory.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [program, "--bind", "127.0.0.1", "--port", str(self._port), "--save", "", "--dir", str(self._directory)]
        self._process = subprocess.Popen([*command, *self._options], stdout=subprocess.DEVNULL, preexec_fn=die_with_us)
        deadline = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                self._ask("PING")
                return self
            except OSError:
                time.sleep(0.01)
        self.__exit__()
        raise SystemExit(f"redis-server did not start on port {self._port}")

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def flush(self) -> None:
        """Forget everything."""
        self._ask("FLUSHALL SYNC")

    def _ask(self, line: str) -> None:
        with socket.create_connection(("127.0.0.1", self._port), timeout=START_S) as connection:
            connection.sendall(f"{line}\r\n".encode())
            reply = connection.recv(1024)
        if not reply.startswith(b"+"):
            raise OSError(f"Redis answered {reply!r} to {line}")


def version() -> str:
    """Of the installed redis-server; "" when there is none."""
    program = shutil.which("redis-server")
    if program is None:
        return ""
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return next((word[2:] for word in words if word.startswith("v=")), "of unknown version")
