"""memory.max and pids.max of jobs' cgroups, where the controllers may be enabled: skipped elsewhere, as in most containers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue.execution import cgroup
from tests.apps import hoarder
from tests.test_limits import ROOT, Bench, message

BASE = cgroup.home()
LIMITED = BASE is not None and all(cgroup._may_enable(BASE, name) for name in ("memory", "pids"))
pytestmark = pytest.mark.alone  # every daemon of another test has its cgroups in the same one
limited = pytest.mark.skipif(not LIMITED, reason="the memory and pids controllers cannot be enabled for jobs' cgroups here")


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = ours()
    yield Bench()
    assert ours() == before, "a cgroup was left"


def ours() -> set[str]:
    return {path for path in os.listdir(BASE) if path.startswith("kqueue-")} if BASE else set()


@pytest.fixture
def hoard() -> Iterator[Path]:
    path = Path(f"/dev/shm/kqueue-hoard-{os.getpid()}")
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def run(bench: Bench, *jobs: Any, slots: int = 1) -> list[Any]:
    return bench.run(*jobs, neighbours=2, module="tests.apps.hoarder", slots=slots)


def of(name: str, *args: Any, **options: Any) -> Any:
    return getattr(hoarder, name).options(max_attempts=1, **options).job(*args)


@limited
@pytest.mark.parametrize("name", ["hoards", "hoards_in_a_subprocess"])
@pytest.mark.parametrize("where", ["/dev/shm", "memfd"])
def test_files_in_memory_count_and_the_kernel_ends_the_job(bench: Bench, hoard: Path, name: str, where: str) -> None:
    (outcome,) = run(bench, of(name, str(hoard) if where != "memfd" else where, 300, max_memory=64))
    assert (outcome.cause, outcome.signal) == ("memory", "SIGKILL"), outcome
    if where != "memfd":  # the sampler sees a memfd, if it comes to look in time
        assert outcome.ended_by == "kernel"
        assert sum(file.stat().st_size for file in hoard.iterdir()) <= 208 << 20
    if outcome.ended_by == "kernel":
        expected = "by the kernel's OOM killer: over 208 MiB, its max_memory, isolated.memory_headroom and 16 MiB for the kernel"
        assert message(outcome).startswith(expected + "; oom_kill of its cgroup rose by ")


@limited
def test_what_a_job_leaves_in_memory_is_not_charged_to_the_next(bench: Bench, hoard: Path) -> None:
    outcomes = run(bench, of("hoards", str(hoard), 150, max_memory=64), of("hoards", "memfd", 60, max_memory=64))
    assert [outcome.cause for outcome in outcomes] == ["ok", "ok"], outcomes


@limited
def test_limits_are_those_of_the_job_whoever_had_the_cgroup_before(bench: Bench) -> None:
    from kqueue.codec import from_json, unpack

    def jobs() -> Iterator[Any]:
        yield of("tells_its_limits", max_memory=64, max_processes=4)
        yield of("tells_those_of_the_pool")
        yield of("tells_its_limits", max_memory=100, max_processes=0)
        yield of("tells_those_of_a_new_program", max_memory=256)

    given = [
        [str(208 << 20), "1", str(256 + 64)], ["max", "0", "max"], [str(244 << 20), "1", "max"],
        [str((256 + 144) << 20), "1", str(256 + 4096)],
    ]  # fmt: skip
    outcomes = run(bench, *jobs(), *jobs())
    assert [outcome.cause for outcome in outcomes] == ["ok"] * 8
    told = [unpack(from_json(outcome.result)) for outcome in outcomes]
    assert [values[1:] for values in told] == given * 2
    assert len({values[0] for values in told}) < len(told), "none was used twice"


@limited
def test_a_fork_bomb_comes_to_an_end(bench: Bench) -> None:
    outcome, again = run(bench, of("multiplies", 2000, max_processes=4), of("multiplies", 3, max_processes=4))
    assert not outcome.ok
    if outcome.ended_by == "supervisor":  # it was looked at just then
        assert message(outcome).startswith("it has ")
    else:
        text = "(its cgroup allows 320 processes and threads, for its max_processes; the kernel refused it "
        assert text in message(outcome)
    assert again.ok, again


@limited
def test_a_sigkill_that_was_not_the_oom_killer_s_is_known_for_certain(bench: Bench) -> None:
    (outcome,) = run(bench, of("shoots_itself"))
    assert (outcome.cause, outcome.ended_by) == ("signal", "operator")
    assert message(outcome).endswith("nor did the kernel's OOM killer (oom_kill of its cgroup did not rise)")


@limited
def test_the_usual_end_is_a_memory_error(bench: Bench) -> None:
    """RLIMIT_DATA and the sampler are before the cgroup."""
    from tests.apps import greedy

    (outcome,) = bench.run(greedy.maps.options(max_attempts=1).job("private"), neighbours=2)
    assert (outcome.cause, outcome.ended_by, outcome.signal) == ("memory", "kernel", None)


# -- where ours is ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unit() -> Iterator[Path]:
    """A cgroup like that of a unit with Delegate=yes and DelegateSubgroup=supervisor."""
    if BASE is None or os.getuid():
        pytest.skip("no cgroup v2 that may be divided here")
    path = Path(BASE) / f"kqtest-{os.getpid()}"
    leaf = path / "supervisor"
    leaf.mkdir(parents=True)
    try:
        os.setxattr(path, "user.delegate", b"1")
        yield path
    finally:
        for name in (leaf, path / "app.service", path):
            if name.exists():
                name.rmdir()


LOOK = "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write('0')\n"
LOOK += "from kqueue.execution import cgroup; print(cgroup.home()); print(cgroup.guarantees())"


def seen_from(path: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", LOOK, path], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    return done.stdout.splitlines()


def test_the_cgroup_of_the_unit_is_divided_when_the_daemon_is_in_its_subgroup(unit: Path) -> None:
    home, how = seen_from(unit / "supervisor")
    assert home == str(unit)
    assert how.startswith("killed as a whole by cgroup")
    assert seen_from(unit)[0] == str(unit)


def test_a_unit_s_own_cgroup_is_not_taken_for_a_subgroup(unit: Path) -> None:
    (unit / "app.service").mkdir()
    assert seen_from(unit / "app.service")[0] == "None"


def test_without_any_the_sampler_is_said_to_hold() -> None:
    assert cgroup.guarantees(False) == "killed as a whole by marks, max_memory and max_processes held by sampling"
