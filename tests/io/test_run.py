"""kqueue.io.run: real programs of all kinds of behaviour, in all kinds of jobs. What they leave behind is counted."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import testing
from kqueue.io import run
from tests.apps import processes
from tests.daemon import PATIENCE_S, Daemon, alive, tree, tree_but_spares, wait_gone

PYTHON = sys.executable
MIB = 1048576


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests that leave it whole; it is looked after at its end."""
    directory = tmp_path_factory.mktemp("run")
    daemon = make(directory).start()
    assert in_daemon(daemon, ["true"])["code"] == 0, "the template is up"
    fds, processes_before = fds_of(daemon), set(tree_but_spares(daemon.pid))
    yield daemon
    settled(daemon, lambda: fds_of(daemon) == fds, "an fd was left open")
    settled(daemon, lambda: set(tree_but_spares(daemon.pid)) <= processes_before, "a process was left")
    assert daemon.stop() == 0
    daemon.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    daemons: list[Daemon] = []

    def start(**settings: Any) -> Daemon:
        daemons.append(make(tmp_path, **settings).start())
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.close()


def make(directory: Path, **settings: Any) -> Daemon:
    modules = "[tests.apps.inline, tests.apps.processes]"
    return Daemon(directory, f"sqlite:///{directory}/kqueue.db", modules=modules, isolated_modules="[]", **settings)


def settled(daemon: Daemon, holds: Callable[[], bool], otherwise: str) -> None:
    """`holds` is true, at the latest after some programs more: what was cancelled has its grace, and a new spare no name yet."""
    for _ in range(100):
        if holds():
            return
        assert in_daemon(daemon, ["sleep", "0.02"])["code"] == 0
    raise AssertionError(otherwise)


def fds_of(daemon: Daemon) -> list[str]:
    """What it has open; connections come and go."""
    return sorted(kind for kind in map(_file, Path(f"/proc/{daemon.pid}/fd").iterdir()) if kind)


def _file(path: Path) -> str:
    try:
        return os.readlink(path).split(":")[0]
    except FileNotFoundError:
        return ""


def in_daemon(daemon: Daemon, argv: list[str], job: Any = processes.runs, **options: Any) -> Any:
    return daemon.dispatch(job.job(argv, options))[0].result(PATIENCE_S * 2)


KINDS = [processes.runs, processes.runs_inline_async, processes.runs_in_a_child, processes.runs_under_asyncio]
everywhere = pytest.mark.parametrize("job", KINDS, ids=["inline", "inline-async", "child", "asyncio"])


# -- what comes of a program --------------------------------------------------------------------------------------------------


@everywhere
def test_output_and_status_come_back_apart(daemon: Daemon, job: Any) -> None:
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    good = in_daemon(daemon, [PYTHON, "-c", program, "0"], job)
    assert good == {"kind": "", "code": 0, "out": b"out\n", "err": b"err\n", "message": ""}
    bad = in_daemon(daemon, [PYTHON, "-c", program, "3"], job)
    assert (bad["kind"], bad["code"], bad["out"], bad["err"]) == ("ProgramFailed", 3, b"out\n", b"err\n")
    assert bad["message"] == f"{PYTHON} exited with status 3: err"
    assert in_daemon(daemon, [PYTHON, "-c", program, "3"], job, check=False)["code"] == 3


@everywhere
def test_there_is_no_shell(daemon: Daemon, job: Any) -> None:
    argument = "$(reboot) * \"' ; | \n\t ä é"
    assert in_daemon(daemon, ["printf", "%s", argument], job)["out"].decode() == argument


@everywhere
def test_environment_and_directory(daemon: Daemon, job: Any, tmp_path: Path) -> None:
    inside = in_daemon(daemon, ["/usr/bin/env"], job, env={"ONLY": "this"})["out"].decode().split("\n")
    assert "ONLY=this" in inside
    assert {line.partition("=")[0] for line in inside} <= {"ONLY", "KQUEUE_OWNER", "KQUEUE_JOB_ID", ""}
    assert in_daemon(daemon, ["pwd"], job, cwd=str(tmp_path))["out"].decode().strip() == str(tmp_path)
    assert b"KQUEUE_TEST_MARKS" in in_daemon(daemon, ["env"], job)["out"]


@everywhere
@pytest.mark.parametrize(
    ("argv", "options", "said"),
    [
        (["no-such-program"], {}, "there is no program 'no-such-program' on PATH"),
        (["/no/such/program"], {}, "there is no program '/no/such/program' that this user may run"),
        ([__file__], {}, "that this user may run|cannot be run: Permission denied"),
        (["{here}/no_format"], {}, "no_format cannot be run: Exec format error"),
        (["{here}/no_interpreter"], {}, "no_interpreter cannot be run: the interpreter that its first line names"),
        (["true"], {"cwd": "/no/such/place"}, "it cannot run in '/no/such/place': No such file or directory"),
    ],
)
def test_what_cannot_be_started_is_told_from_what_failed(
    daemon: Daemon, job: Any, argv: list[str], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    for name, text in (("no_format", "\0garbage"), ("no_interpreter", "#!/no/such/interpreter\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    ran = in_daemon(daemon, [part.format(here=tmp_path) for part in argv], job, **options)
    assert (ran["kind"], ran["code"]) == ("ProgramNotRun", None)
    assert re.search(said, ran["message"]), ran["message"]


@everywhere
def test_a_signal_is_told_as_one(daemon: Daemon, job: Any) -> None:
    ran = in_daemon(daemon, ["sh", "-c", "kill -SEGV $$"], job)
    assert (ran["kind"], ran["code"]) == ("ProgramFailed", -11)
    assert "SIGSEGV" in ran["message"]


# -- input and output ---------------------------------------------------------------------------------------------------------


def test_megabytes_go_through(daemon: Daemon) -> None:
    assert daemon.dispatch(processes.digests.job(20 * MIB))[0].result(PATIENCE_S * 2) is True


@everywhere
def test_input_comes_and_ends(daemon: Daemon, job: Any) -> None:
    text = "é\n" * 100_000
    ran = in_daemon(daemon, ["wc", "-c"], job, input=text)
    assert int(ran["out"]) == len(text.encode())
    assert in_daemon(daemon, ["cat"], job)["out"] == b"", "without input there is an end of it at once"


@everywhere
@pytest.mark.parametrize("program", ["exec <&-; exit 0", "true", "head -c 1 >/dev/null"])
def test_a_program_need_not_read_its_input(daemon: Daemon, job: Any, program: str) -> None:
    assert in_daemon(daemon, ["sh", "-c", program], job, input="x" * 500_000)["code"] == 0


@everywhere
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_gigabyte_of_output_is_not_kept(daemon: Daemon, job: Any, stream: str) -> None:
    to = " >&2" if stream == "stderr" else ""
    ran = in_daemon(daemon, ["sh", "-c", f"exec head -c 1073741824 /dev/zero{to}"], job, max_output=1000)
    assert ran["kind"] == "TooMuchOutput"
    assert f"its {stream} was longer than the 1000 bytes that max_output allows" in ran["message"]
    assert (len(ran["out"]), len(ran["err"])) == ((1000, 0) if stream == "stdout" else (0, 1000))


@everywhere
def test_output_of_just_the_size_is_kept(daemon: Daemon, job: Any) -> None:
    assert len(in_daemon(daemon, ["head", "-c", "300000", "/dev/urandom"], job, max_output=300_000)["out"]) == 300_000


@everywhere
def test_a_daemon_that_holds_the_pipes_keeps_nobody_waiting_and_is_ended(daemon: Daemon, job: Any) -> None:
    for session in ("os.setsid()", "pass"):
        program = f"import os, time\npid = os.fork()\nif not pid:\n {session}; time.sleep(600)\nprint(pid, flush=True)"
        ran = in_daemon(daemon, [PYTHON, "-c", program], job)
        assert ran["code"] == 0
        wait_gone([int(ran["out"])])


# -- ending -------------------------------------------------------------------------------------------------------------------


@everywhere
def test_its_own_timeout_is_an_error_that_the_job_can_handle(daemon: Daemon, job: Any) -> None:
    ran = in_daemon(daemon, ["sh", "-c", "echo before; exec sleep 600"], job, timeout=0.3)
    assert (ran["kind"], ran["out"]) == ("ProgramTimedOut", b"before\n")
    assert "was not done within its timeout of 0.3 s" in ran["message"]


@pytest.mark.parametrize("job", [processes.waits_too_long, processes.waits_too_long_in_a_child], ids=["inline", "isolated"])
def test_a_job_that_is_timed_out_takes_all_of_it_along(own: Callable[..., Daemon], job: Any) -> None:
    daemon = own()
    (handle,) = daemon.dispatch(job.job("late"))
    pids = marked(daemon)
    assert handle.wait(PATIENCE_S)
    row = daemon.client.store.show(handle.id)
    assert row is not None
    assert row.state == "dead"
    wait_gone(pids)
    assert daemon.stop() == 0


@pytest.mark.parametrize("job", [processes.waits, processes.waits_in_a_child], ids=["inline", "isolated"])
@pytest.mark.parametrize("how", ["shutdown", "kill", "template"])
def test_whatever_ends_the_job_ends_all_of_it(own: Callable[..., Daemon], job: Any, how: str) -> None:
    daemon = own(grace="0s")
    daemon.dispatch(job.job("ended"))
    pids = marked(daemon)
    assert all(map(alive, pids))
    if how == "shutdown":
        assert daemon.stop() == 0
    elif how == "kill":
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    else:
        template = next(pid for pid in tree(daemon.pid) if b"template" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(template, signal.SIGKILL)
    wait_gone(pids)


def marked(daemon: Daemon) -> list[int]:
    """The processes of the stubborn program."""
    lines = daemon.marks.wait("program") + daemon.marks.wait("grandchild")
    return [int(line.split()[1]) for line in lines]


@pytest.mark.parametrize("job", [processes.runs, processes.runs_in_a_child], ids=["inline", "isolated"])
def test_who_is_timed_out_at_any_moment_leaves_nothing(daemon: Daemon, job: Any) -> None:
    """In line, while its input is copied, while a process is forked, while that runs, and while it is ended."""
    program = ["sh", "-c", "trap '' TERM; cat >/dev/null; sleep 0.2"]
    handles = daemon.dispatch(
        *(job.options(timeout=0.02 * number).job(program, {"input": "x" * 300_000}) for number in range(1, 31))
    )
    for handle in handles:
        assert handle.wait(PATIENCE_S * 2)


def test_hundreds_of_programs_leave_nothing(daemon: Daemon) -> None:
    handles = daemon.dispatch(*(processes.runs.job(["echo", str(number)], {}) for number in range(300)))
    assert [int(handle.result(60)["out"]) for handle in handles] == list(range(300))


HOWS = {"late": "ProgramTimedOut", "cut": "", "ends": ""}


@pytest.mark.parametrize("how", HOWS)
def test_a_program_has_ended_with_all_it_started_before_its_job_goes_on(daemon: Daemon, how: str, tmp_path: Path) -> None:
    """Whether it is timed out, cancelled or done, and wherever its descendants have gone. No zombie of it is left either."""
    (handle,) = daemon.dispatch(processes.looks_after_in_a_child.job(how, str(tmp_path)))
    assert handle.result(PATIENCE_S * 2) == {"ended": HOWS[how], "alive": [], "children": []}


def test_nor_is_anything_left_to_the_next_job_of_the_pool(own: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = own()
    for how, ended in HOWS.items():
        (tmp_path / how).mkdir()
        (handle,) = daemon.dispatch(processes.looks_after_in_the_pool.job(how, str(tmp_path / how)))
        assert handle.result(PATIENCE_S * 2) == {"ended": ended, "alive": [], "children": []}
    assert daemon.stop() == 0
    assert not [line for line in daemon.log if "looks_after" in line and "left" in line], "the job is to blame for nothing"


def test_what_is_of_the_job_or_of_another_program_is_let_be(daemon: Daemon, tmp_path: Path) -> None:
    (handle,) = daemon.dispatch(processes.keeps_its_own.job(str(tmp_path)))
    assert handle.result(PATIENCE_S * 2) == {"alive": [], "own": [True, True, True]}


# -- what is refused at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "options", "said"),
    [
        ("ls -l", {}, "as a list"),
        ([], {}, "as a list"),
        (["a\0b"], {}, "has a NUL"),
        (["echo", "x" * 200_000], {}, "has 200000 bytes"),
        (["echo", *["x" * 100_000] * 30], {}, "more than 2097152 bytes together"),
        (["true"], {"timeout": 0}, "timeout must be seconds"),
        (["true"], {"timeout": float("nan")}, "timeout must be seconds"),
        (["true"], {"max_output": -1}, "cannot be less"),
        (["true"], {"env": {"A": "\0"}}, "has a NUL"),
    ],
)
def test_nonsense_is_refused_before_anything_is_started(argv: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        next(iter(run(argv, **options)))


def test_a_job_under_test_runs_its_program_for_real() -> None:
    assert testing.run(processes.runs.job(["echo", "hello"], {}))["out"] == b"hello\n"
    assert testing.run(processes.runs.job(["sleep", "600"], {"timeout": 0.1}))["kind"] == "ProgramTimedOut"


@pytest.mark.parametrize("how", HOWS)
def test_a_job_under_test_leaves_nothing_of_its_program(how: str, tmp_path: Path) -> None:
    seen = testing.run(processes.looks_after.job(how, str(tmp_path)))
    assert (seen["ended"], seen["alive"]) == (HOWS[how], [])
