"""What is said to a job that blocks: its own line, the call in it, and the replacement. Each call blocks for real."""

from __future__ import annotations

import asyncio
import importlib
import os
import queue
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep as nap
from types import CodeType, FrameType
from typing import Any

import pytest

from kqueue.execution.instead import Standing, standing


class Interrupted(BaseException):
    """By the alarm."""


class Client:
    def __init__(self) -> None:
        self.socket, self.other = socket.socketpair()

    def ask(self) -> None:
        self.socket.recv(1)

    def close(self) -> None:
        self.socket.close()
        self.other.close()


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def stands(blocks: Callable[[], Any]) -> Standing:
    """Where `blocks` stood a moment after it began."""
    found: list[Standing] = []

    def look(number: int, frame: FrameType | None) -> None:
        assert frame is not None
        found.append(standing(frame, UNTIL))
        raise Interrupted

    old = signal.signal(signal.SIGALRM, look)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        call(blocks)
    except Interrupted:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    return found[0]


def call(blocks: Callable[[], Any]) -> None:
    blocks()


UNTIL: CodeType = call.__code__


def test_its_own_line_is_told_with_the_function(client: Client) -> None:
    where = stands(client.ask)
    line = Client.ask.__code__.co_firstlineno + 1
    assert str(where) == f"{__file__}:{line} in ask (socket)"
    assert where.instead == "use `yield kqueue.io.connect(…)`, or declare the job isolated=True"


@pytest.mark.parametrize(
    ("blocks", "call", "instead"),
    [
        (lambda: time.sleep(60), "time.sleep", "`yield kqueue.sleep(…)`"),
        (lambda: nap(60), "time.sleep", "`yield kqueue.sleep(…)`"),
        (lambda: [nap(60), max(1, 2)], "time.sleep", "`yield kqueue.sleep(…)`"),
        (lambda: subprocess.run(["sleep", "60"], check=True), "subprocess.run", "`yield kqueue.io.run([…])`"),
        (lambda: subprocess.check_output(["sleep", "60"]), "subprocess.check_output", "`yield kqueue.io.run([…])`"),
        (lambda: os.system("sleep 0.2"), "os.system", "`yield kqueue.io.run([…])`"),
        (lambda: threading.Event().wait(), "threading.wait", "`yield kqueue.offload(function, …)`"),
        (lambda: queue.Queue().get(), "queue.get", "`yield kqueue.offload(function, …)`"),
        (lambda: asyncio.run(asyncio.sleep(60)), "asyncio.run", "isolated=True, under which asyncio works"),
    ],
)
def test_what_blocks_is_named_with_its_replacement(blocks: Callable[[], Any], call: str, instead: str) -> None:
    where = stands(blocks)
    assert where.call == call
    assert instead in where.instead
    assert "in <lambda>" in where.line


def test_a_request_is_named_by_what_was_imported(port: int) -> None:
    where = stands(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/"))
    assert where.call == "urllib.request.urlopen"
    assert "kqueue.io.http, or `yield kqueue.offload(function, …)`" in where.instead


@pytest.mark.parametrize("directory", ["/usr/lib/python3.11/site-packages", "/usr/lib/python3/dist-packages"])
def test_an_installed_library_is_named_and_the_jobs_line_told(directory: str) -> None:
    names: dict[str, Any] = {"__name__": "requests.api", "time": time}
    exec(compile("def get(url):\n    time.sleep(60)", f"{directory}/requests/api.py", "exec"), names)
    where = stands(lambda: names["get"]("http://example.org"))
    assert where.call == "requests.get"
    assert __file__ in where.line
    assert "kqueue.io.http" in where.instead


def test_a_directory_whose_name_only_looks_like_that_of_libraries_is_the_applications() -> None:
    names: dict[str, Any] = {"time": time}
    exec(compile("def get():\n    time.sleep(60)", "/srv/my-site-packages/app.py", "exec"), names)
    assert stands(lambda: names["get"]()).line == "/srv/my-site-packages/app.py:2 in get"


@pytest.mark.parametrize("how", ["import slow_to_import", "importlib.import_module('slow_to_import')", "from app_of_it import x"])
def test_an_import_is_named_with_the_jobs_line(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "slow_to_import.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "site-packages" / "app_of_it.py").write_text("import slow_to_import\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    names: dict[str, Any] = {"importlib": importlib}
    exec(compile(f"def job():\n    {how}", "/srv/app.py", "exec"), names)
    where = stands(names["job"])
    imported = "app_of_it" if "app_of_it" in how else "slow_to_import"
    assert str(where) == f"/srv/app.py:2 in job (import {imported})"
    assert where.instead == "import it at the top of the job's module"


def test_a_file_that_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    where = stands(lambda: open(tmp_path / "fifo"))  # noqa: SIM115
    assert where.call == "open"
    assert "`yield kqueue.offload(function, …)`" in where.instead


def test_a_method_in_c_is_named_by_its_object() -> None:
    connection = sqlite3.connect(":memory:")
    many = "with recursive n(x) as (select 1 union all select x + 1 from n limit 3000000) select count(*) from n"
    where = stands(lambda: connection.execute(many).fetchall())
    connection.close()
    assert where.call == "sqlite3"
    assert "`yield kqueue.offload(function, …)`" in where.instead


def computes() -> None:
    while True:
        pass


def test_who_computes_is_told_just_that() -> None:
    where = stands(computes)
    assert (where.call, "in computes" in where.line) == ("", True)
    there = "use `yield kqueue.sleep(…)` or `yield kqueue.offload(function, …)` there"
    assert where.instead == f"{there}, or declare the job isolated=True"


class Nasty:
    """Nobody may look at it."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"somebody asked for {name}")


def test_no_code_of_the_job_is_run_to_find_out() -> None:
    nasty = Nasty()

    def blocks() -> None:
        _ = (nap(60), lambda: nasty.sleep(1))

    assert stands(blocks).call == "time.sleep"


def test_a_line_that_cannot_be_read_is_told_without_its_call() -> None:
    names: dict[str, Any] = {"nap": nap}
    exec(compile("def blocks():\n    nap(60)", "/no/such/file.py", "exec"), names)
    assert str(stands(names["blocks"])) == "/no/such/file.py:2 in blocks"
