"""A real kqueued for tests: its configuration, its process, what its jobs tell, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import kqueue
from kqueue.client import Client, from_config
from kqueue.config_file import load_config

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 20.0  # a test that waits so long has failed; nothing is measured by it

CONFIG = """\
instance: test
state_dir: var
queue: {{url: "{url}", names: {names}, lease: {lease}}}
jobs: {{path: ["{root}"], modules: {modules}, isolated_modules: {isolated_modules}}}
isolated: {{kill_grace: 500ms, environment: ["KQUEUE_TEST_*"]}}
shutdown: {{grace: {grace}}}
runtime: {{memory_check: 500ms}}
log: {{level: debug, format: logfmt}}
control: {{socket: var/kqueued.sock}}
{more}
"""


class Marks:
    """What jobs tell by `tests.apps.inline.mark`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._news = threading.Condition()
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(65536)
            except OSError:
                return
            with self._news:
                self.lines.append(data.decode())
                self._news.notify_all()

    def wait_for(self, wanted: Callable[[list[str]], bool]) -> list[str]:
        """Until `wanted(lines)`; the lines."""
        with self._news:
            assert self._news.wait_for(lambda: wanted(self.lines), PATIENCE_S), f"only came: {self.lines}"
            return list(self.lines)

    def wait(self, word: str, count: int = 1) -> list[str]:
        """Until `count` marks begin with `word`; these."""
        lines = self.wait_for(lambda lines: sum(line.split()[0] == word for line in lines) >= count)
        return [line for line in lines if line.split()[0] == word]

    def close(self) -> None:
        self._socket.close()


class Daemon:
    """kqueued in `directory` on the broker `url`."""

    def __init__(self, directory: Path, url: str, **settings: Any) -> None:
        self.directory = directory
        self.marks = Marks(directory / "marks.sock")
        self.config = directory / "kqueue.yaml"
        fields: dict[str, Any] = {
            "url": url, "root": ROOT, "names": "{default: 1, mail: 3}", "modules": "[tests.apps.inline]",
            "isolated_modules": "[tests.apps.heavy]", "grace": "10s", "lease": "15s", "more": "",
        }  # fmt: skip
        self.config.write_text(CONFIG.format(**{**fields, **settings}))
        self.python = sys.executable
        self.user: tuple[int, int] | None = None  # uid and gid that it runs as; None: ours
        self.process: subprocess.Popen[str] | None = None
        self.log: list[str] = []
        self._log_news = threading.Condition()
        self._client: Client | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        return {**os.environ, "KQUEUE_TEST_MARKS": self.marks.path}

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = from_config(load_config(str(self.config)))
        return self._client

    def start(self, *options: str, wait: bool = True) -> Daemon:
        """Start it; `wait`: until it is ready."""
        self.log = []
        self.process = subprocess.Popen(
            [self.python, "-m", "kqueue.cli.kqueued", "-c", str(self.config), *options], stderr=subprocess.PIPE, text=True,
            env=self.environment, cwd=self.directory, errors="replace", **self._as_user(),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read_log, args=(self.process,), daemon=True)
        self._reader.start()
        if wait:
            self.wait_log("ready")
        return self

    def _as_user(self) -> dict[str, Any]:
        return {} if self.user is None else {"user": self.user[0], "group": self.user[1], "extra_groups": []}

    def run(self, *options: str) -> int:
        """Start it and wait for its end; the exit code."""
        self.start(*options, wait=False)
        return self.wait()

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                with self._log_news:
                    self.log.append(line.rstrip("\n"))
                    self._log_news.notify_all()

    def wait_log(self, text: str, count: int = 1) -> str:
        """Until `count` lines with `text` were logged; the last of them."""
        with self._log_news:
            found = self._log_news.wait_for(lambda: sum(text in line for line in self.log) >= count, PATIENCE_S)
            assert found, "\n".join(["it never logged " + text, *self.log])
            return [line for line in self.log if text in line][-1]

    def dispatch(self, *jobs: kqueue.BoundJob) -> list[kqueue.JobHandle]:
        return self.client.dispatch(jobs)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        assert self.process is not None
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return status

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait()

    def kqueue(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The operator's command on this configuration."""
        command = [sys.executable, "-m", "kqueue.cli.main", "-c", str(self.config), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False, timeout=PATIENCE_S)

    def run_check(self) -> subprocess.CompletedProcess[str]:
        """kqueued --check."""
        command = [sys.executable, "-m", "kqueue.cli.kqueued", "-c", str(self.config), "--check"]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False, timeout=PATIENCE_S)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.kqueue("status", "--json").stdout)
        return status

    def close(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.wait()
        self.marks.close()
        if self._client is not None:
            self._client.store.close()


def tree(pid: int) -> list[int]:
    """The descendants of `pid` that are alive."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            for child in map(int, task.read_text().split()):
                found += [child, *tree(child)]
    return found


def tree_but_spares(pid: int) -> list[int]:
    """The same without the children that wait for a job, which come and go."""
    return [each for each in tree(pid) if not title(each).startswith("kqueued: spare child")]


def title(pid: int) -> str:
    """As ps shows it; "": it is gone. A spare that has just been forked still has its template's."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    """Whether process `pid` runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_gone(pids: list[int]) -> None:
    """Until none of `pids` is alive."""
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            import select

            assert select.select([pidfd], [], [], PATIENCE_S)[0], f"{pid} outlives its supervisor"
        finally:
            os.close(pidfd)
