"""SIGHUP: new code for isolated jobs, and what runs goes on with the old. A real daemon, signalled for real."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import BoundJob
from kqueue.options import DispatchOptions
from tests.daemon import PATIENCE_S, Daemon, tree, tree_but_spares, wait_gone

MODULE = """
import os, time
from kqueue import job

VERSION = {version}

@job(name="reload_version", keep_result=60{options})
def version():
    return [VERSION, os.getpid(), os.getppid()]

@job(name="reload_waits", keep_result=60, timeout=60)
def waits(path):
    print("waiting", VERSION, flush=True)
    while not os.path.exists(path):
        time.sleep(0.01)
    return VERSION
{more}
"""


class Reloaded(Daemon):
    def __init__(self, directory: Path) -> None:
        super().__init__(
            directory, f"sqlite:///{directory}/kqueue.db", modules="[]", isolated_modules="[changing]", root=str(directory)
        )
        self.code = directory / "changing.py"

    def write(self, version: int, options: str = "", more: str = "") -> None:
        self.code.write_text(MODULE.format(version=version, options=options, more=more))

    def send(self, name: str, *args: Any) -> Any:
        return self.dispatch(BoundJob(name, args, {}, DispatchOptions()))[0]

    def version(self) -> tuple[int, int, int]:
        return tuple(self.send("reload_version").result(PATIENCE_S))  # type: ignore[return-value]

    def reload(self, count: int = 1) -> None:
        """SIGHUP, and wait until it has replaced the template for the `count`-th time."""
        self.signal(signal.SIGHUP)
        self.wait_log("template replaced", count)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reloaded]:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # two versions within a second would share one .pyc
    daemon = Reloaded(tmp_path)
    daemon.write(1)
    daemon.start()
    yield daemon
    assert daemon.stop() == 0
    daemon.close()


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_runs_ends_on_the_old_code_and_what_begins_has_the_new(daemon: Reloaded, tmp_path: Path) -> None:
    number, _, old_template = daemon.version()
    assert number == 1
    old = daemon.send("reload_waits", str(tmp_path / "go"))
    daemon.wait_log("waiting 1")
    daemon.write(2)
    daemon.reload()
    number, _, template = daemon.version()
    assert (number, template != old_template) == (2, True)
    assert {old_template, template} <= set(tree(daemon.pid)), "the old one waits for its child"
    (tmp_path / "go").touch()
    assert old.result(PATIENCE_S) == 1
    wait_gone([old_template])
    wait_for(lambda: tree_but_spares(daemon.pid) == [template])


def test_several_in_a_row_end_with_the_last_code_and_one_template(daemon: Reloaded) -> None:
    for version in range(2, 8):
        daemon.write(version)
        daemon.signal(signal.SIGHUP)
    daemon.wait_log("template replaced")
    wait_for(lambda: daemon.version()[0] == 7)
    wait_for(lambda: len(tree_but_spares(daemon.pid)) == 1)


def test_reloading_under_load_loses_and_repeats_nothing(daemon: Reloaded) -> None:
    handles = []
    for version in range(2, 6):
        handles += [daemon.send("reload_version") for _ in range(20)]
        daemon.write(version)
        daemon.reload(version - 1)
    results = [handle.result(PATIENCE_S)[0] for handle in handles]
    assert results == sorted(results), "what began later never had older code"
    assert daemon.version()[0] == 5
    assert not [line for line in daemon.log if "lost" in line or "retry" in line]


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("def (", "SyntaxError"), ("raise LookupError('not today')", "LookupError: not today"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("import os; os._exit(3)", "the template ended while it imported the job modules"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"), ("import no_such_module_of_ours", "ModuleNotFoundError"),
    ],
)  # fmt: skip
def test_code_that_cannot_be_imported_changes_nothing(daemon: Reloaded, broken: str, why: str) -> None:
    _, _, template = daemon.version()
    daemon.code.write_text(broken)
    daemon.signal(signal.SIGHUP)
    assert why in daemon.wait_log("SIGHUP: the code that was running goes on")
    assert daemon.version()[::2] == (1, template)
    wait_for(lambda: tree_but_spares(daemon.pid) == [template])
    daemon.write(2)
    daemon.reload()
    assert daemon.version()[0] == 2


def test_an_import_that_hangs_keeps_nobody_waiting(daemon: Reloaded) -> None:
    daemon.code.write_text("import time\nprint('hanging', flush=True)\ntime.sleep(1000)")
    daemon.signal(signal.SIGHUP)
    daemon.wait_log("hanging")
    assert daemon.version()[0] == 1
    daemon.write(2)
    daemon.reload()
    assert daemon.version()[0] == 2
    wait_for(lambda: len(tree_but_spares(daemon.pid)) == 1)


def test_a_shutdown_does_not_wait_for_an_import_that_hangs(daemon: Reloaded) -> None:
    daemon.code.write_text("import time\nprint('hanging', flush=True)\ntime.sleep(1000)")
    daemon.signal(signal.SIGHUP)
    daemon.wait_log("hanging")
    left = tree(daemon.pid)
    assert daemon.stop() == 0
    wait_gone(left)


def test_a_pool_is_replaced_with_its_template(daemon: Reloaded) -> None:
    daemon.write(2, options=', start="pool"')
    daemon.reload()
    number, pid, _ = daemon.version()
    assert (number, daemon.version()[1]) == (2, pid), "it is pooled now"
    daemon.write(3, options=', start="pool"')
    daemon.reload(2)
    assert daemon.version()[0] == 3
    wait_gone([pid])


def test_the_old_template_may_die_meanwhile(daemon: Reloaded, tmp_path: Path) -> None:
    import os

    _, _, old_template = daemon.version()
    old = daemon.send("reload_waits", str(tmp_path / "go"))
    daemon.wait_log("waiting 1")
    daemon.write(2)
    daemon.reload()
    template = daemon.version()[2]
    os.kill(old_template, signal.SIGKILL)
    daemon.wait_log("waiting 2")  # it was lost, and runs again
    (tmp_path / "go").touch()
    assert old.result(PATIENCE_S) == 2
    wait_for(lambda: tree_but_spares(daemon.pid) == [template])


def test_jobs_come_and_go_with_the_code(daemon: Reloaded) -> None:
    daemon.write(2, more='\n@job(name="new_one", keep_result=60)\ndef new_one():\n    return "new"\n')
    daemon.reload()
    wait_for(lambda: "new_one" in daemon.client.manifest(refresh=True))
    assert daemon.send("new_one").result(PATIENCE_S) == "new"
    daemon.write(3)
    gone = daemon.send("new_one")
    gone.result(PATIENCE_S)
    daemon.reload(2)
    wait_for(lambda: "new_one" not in daemon.client.manifest(refresh=True))
