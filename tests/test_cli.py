"""`kqueue`: what it prints and how it ends, on both brokers; without a daemon, and with one."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from kqueue import job
from kqueue.cli.certificate import told
from kqueue.cli.main import main
from kqueue.cli.text import ago, block, duration, moment, table
from kqueue.config_file import load_config
from kqueue.job import BoundJob
from kqueue.options import DispatchOptions
from kqueue.outcome import Outcome
from tests.cli_home import COMMAND, PATIENCE_S, Home, MakeHome
from tests.daemon import Daemon
from tests.servers import RedisServer


@job(name="cli_fails", max_attempts=2, backoff=[0], timeout=5)
def fails(word: str) -> Any:
    yield
    raise ValueError(f"no such \x1b[31m{word}")


@job(name="cli_returns", keep_result=60)
def returns(value: Any) -> Any:
    yield
    return value


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KQUEUE_URL", "KQUEUE_CONFIG"):
        monkeypatch.delenv(name, raising=False)


# -- dispatch, jobs, show: the shapes of INTERFACES -------------------------------------------------------------------------


def test_dispatch_prints_the_id_and_jobs_lists_it(home: Home) -> None:
    id = home.kqueue("dispatch", "greet", "--args", '["w"]').out.strip()
    (row,) = home.kqueue("jobs", "--json").json
    assert list(row) == ["id", "job", "state", "queue", "lane", "priority", "attempts", "available_at"]
    assert (row["id"], row["job"], row["state"], row["queue"], row["priority"], row["attempts"]) == (
        id, "greet", "ready", "default", 0, 0,
    )  # fmt: skip


def test_an_object_is_keyword_arguments_and_options_are_as_in_python(home: Home) -> None:
    id = home.dispatch("greet", "--args", '{"to": {"a": [1, null]}}', "--delay", "1h", "--priority", "5", "--queue", "mail")
    shown = home.kqueue("show", id, "--json").json
    assert (shown["args"], shown["kwargs"]) == ([], {"to": {"a": [1, None]}})
    assert (shown["state"], shown["priority"], shown["queue"]) == ("delayed", 5, "mail")
    assert shown["available_at"] - shown["enqueued_at"] == pytest.approx(3600, abs=5)


def test_json_may_stand_before_and_after_the_command(home: Home) -> None:
    assert home.kqueue("--json", "jobs").json == home.kqueue("jobs", "--json").json == []


def test_count_dispatches_in_batches(home: Home) -> None:
    assert home.kqueue("dispatch", "greet", "--count", "1200").out == "1200 jobs dispatched\n"
    ids = home.kqueue("dispatch", "greet", "--count", "2", "--json").json["ids"]
    assert len(set(ids)) == 2
    assert home.kqueue("status", "--json").json["queues"]["default"]["ready"] == 1202


def test_jobs_can_be_chosen_by_state_and_queue_and_limited(home: Home) -> None:
    ready = home.dispatch("greet")
    delayed = home.dispatch("greet", "--delay", "60")
    mail = home.dispatch("greet", "--queue", "mail")

    def listed(*options: str) -> set[str]:
        return {row["id"] for row in home.kqueue("jobs", "--json", *options).json}

    assert listed() == {ready, delayed, mail}
    assert listed("--state", "delayed") == {delayed}
    assert listed("--queue", "mail") == {mail}
    assert len(listed("--limit", "2")) == 2
    assert listed("--state", "dead") == set()


def test_those_that_are_done_are_listed_only_when_asked_for(home: Home) -> None:
    home.dispatch("cli_returns", "--args", "[1]")
    home.run_all()
    waiting = home.dispatch("cli_returns", "--args", "[2]", "--delay", "1h")
    assert [row["id"] for row in home.kqueue("jobs", "--json").json] == [waiting]
    assert [row["state"] for row in home.kqueue("jobs", "--state", "done", "--json").json] == ["done"]


def test_show_has_all_of_a_dead_job_with_its_certificates_the_newest_last(home: Home) -> None:
    home.client.dispatch([fails.job("luck")])
    home.run_all()
    (dead,) = home.kqueue("jobs", "--state", "dead", "--json").json
    shown = home.kqueue("show", dead["id"], "--json").json
    assert list(shown) == [*dead, "crashes", "recoveries", "args", "kwargs", "enqueued_at", "result", "certificates", "class"]
    assert {name: shown[name] for name in dead} == dead
    assert (shown["attempts"], shown["crashes"], shown["recoveries"], shown["result"]) == (2, 0, 0, None)
    assert [certificate["attempt"] for certificate in shown["certificates"]] == [1, 2]
    assert shown["certificates"][1]["error"]["message"] == "no such \x1b[31mluck"


def test_a_result_is_shown_as_it_is_carried(home: Home) -> None:
    home.client.dispatch([returns.job(date(2026, 11, 24))])
    home.run_all()
    (done,) = home.kqueue("jobs", "--state", "done", "--json").json
    shown = home.kqueue("show", done["id"], "--json").json
    assert shown["state"] == "done"
    assert shown["args"] == [shown["result"]] == [{"$kq": "date", "v": "2026-11-24"}]


def test_people_get_a_page_that_cannot_play_tricks_on_their_terminal(home: Home) -> None:
    home.client.dispatch([fails.job("luck")])
    home.client.dispatch([BoundJob("evil\x1b]0;title\x07", ["\x9b2J"], {}, DispatchOptions())])
    home.run_all()
    rows = home.kqueue("jobs", "--json").json
    pages = [home.kqueue("jobs").out, *(home.kqueue("show", row["id"]).out for row in rows)]
    for page in pages:
        assert page.replace("\n", "").isprintable()
    text = "\n".join(pages)
    for words in ("failed     2 attempts", "ValueError: no such \\x1b[31mluck", "in fails", 'args       ["luck"]'):
        assert words in text
    assert "evil\\x1b]0;title" in text


@pytest.mark.parametrize("garbage", [b"", b"garbage \x1b[2J\xff", b'{"v":1,"id":"other"}', b'{"v":99}', b"[]"])
def test_what_is_no_envelope_shows_as_just_that(home: Home, garbage: bytes) -> None:
    id = home.dispatch("greet")
    home.corrupt(id, garbage)
    (row,) = home.kqueue("jobs", "--json").json
    shown = home.kqueue("show", id, "--json").json
    assert (row["id"], row["job"]) == (shown["id"], shown["job"]) == (id, None)
    assert (shown["args"], shown["kwargs"], shown["enqueued_at"]) == (None, None, None)
    assert "(unreadable)" in home.kqueue("jobs").out
    page = home.kqueue("show", id)
    assert "(unreadable)" in page.out
    assert page.out.replace("\n", "").isprintable()


def test_garbage_in_the_sets_of_redis_shows_too(make_home: MakeHome, redis_server: RedisServer) -> None:
    redis_server.command("FLUSHALL")
    home = make_home(redis_server.url)
    home.dispatch("greet")
    redis_server.command("ZADD", "kq:{default}:ready:inline", 0, b"\xff\x9b \n{}")
    rows = home.kqueue("jobs", "--json").json
    assert [row["job"] for row in rows] == [None, "greet"]
    page = home.kqueue("jobs").out
    assert "\\n{}" in page
    assert page.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["ready:inline", "delayed", "epochs", "owners", "done", "dead", "beat", "idle"])
def test_a_broken_structure_of_one_queue_stops_neither_the_daemon_nor_the_others(
    make_home: MakeHome, redis_server: RedisServer, name: str
) -> None:
    redis_server.command("FLUSHALL")
    home = make_home(redis_server.url)
    home.client.store.enqueue([])
    redis_server.commands([("SADD", "kq:queues", "default", "mail"), ("SADD", f"kq:{{mail}}:{name}", "x")])
    id = home.dispatch("cli_returns", "--args", "[1]")
    home.run_all()
    assert home.kqueue("show", id, "--json").json["state"] == "done"
    assert home.kqueue("status").code == 0
    moved: Any = redis_server.command("KEYS", "kq:{mail}:corrupt:*")
    assert len(moved) == 1


def test_json_output_is_json_whatever_a_queue_holds(sqlite_home: Home) -> None:
    nasty = "\x7f\x9b\u2028\u202e\U000e0001 é 😀"
    id = sqlite_home.dispatch("greet", "--args", json.dumps([nasty]))
    ended = sqlite_home.kqueue("show", id, "--json")
    assert ended.out.rstrip("\n").isprintable()
    assert ended.json["args"] == [nasty]


def test_a_certificate_says_where_a_killed_job_stood_and_one_of_before_does_not() -> None:
    outcome = Outcome("timeout", "supervisor", signal="SIGKILL", pid=7, stack='Thread 1:\n  File "app.py", line 3 in work')
    certificate = outcome.certificate(attempt=1, strategy="isolated", ended_at=1e9)
    assert 'stood at\n  | Thread 1:\n  |   File "app.py", line 3 in work' in told(certificate)
    del certificate["stack"]
    assert "stood at" not in told(certificate)


def test_a_certificate_that_somebody_else_wrote_shows_as_it_is() -> None:
    for odd in ({"unreadable": "x\x1b"}, {"attempt": 1}, [1], None):
        assert told(odd).startswith("\nanother    ")


# -- names ------------------------------------------------------------------------------------------------------------------


def test_before_any_daemon_ran_a_name_is_taken_on_trust_and_that_is_said(home: Home) -> None:
    ended = home.kqueue("dispatch", "greet")
    assert ended.code == 0
    assert ended.err.startswith("note: no kqueued has published its jobs")


def test_once_a_daemon_has_run_an_unknown_name_is_refused_with_the_nearest(home: Home) -> None:
    home.run_all()
    ended = home.kqueue("dispatch", "cli_retruns")
    assert (ended.code, ended.out) == (2, "")
    assert 'knows no job \'cli_retruns\' (did you mean "cli_returns"?)' in ended.err
    assert ended.err.count("\n") == 1
    assert home.kqueue("dispatch", "cli_returns", "--args", "[1]").err == ""


# -- status without a daemon ------------------------------------------------------------------------------------------------


def test_status_without_a_daemon_has_the_same_fields_and_the_queues(home: Home) -> None:
    home.dispatch("greet")
    ended = home.kqueue("status", "--json")
    assert list(ended.json) == [
        "pid", "version", "uptime_s", "state", "memory_mib", "processed", "failed", "retried", "killed", "forgotten", "running",
        "queues", "loop", "memory_budget", "jobs",
    ]  # fmt: skip
    assert (ended.json["state"], ended.json["pid"], ended.json["running"]) == ("stopped", None, [])
    assert ended.json["queues"] == {
        "default": {"ready": 1, "delayed": 0, "leased": 0, "dead": 0},
        "mail": {"ready": 0, "delayed": 0, "leased": 0, "dead": 0},
    }
    page = home.kqueue("status").out.splitlines()
    assert page[0] == "kqueued is stopped"
    assert page[3].split() == ["default", "1", "0", "0", "0"]
    checked = home.kqueue("status", "--check")
    assert (checked.code, checked.out.splitlines()[0]) == (1, "kqueued is stopped")


def test_a_queue_that_nobody_used_yet_is_empty_and_stays_so(sqlite_home: Home) -> None:
    assert sqlite_home.kqueue("jobs", "--json").json == []
    assert sqlite_home.kqueue("status", "--json").json["queues"]["default"]["ready"] == 0
    assert sqlite_home.kqueue("show", "x").code == 2
    assert not (sqlite_home.directory / "var").exists(), "reading creates nothing"


# -- where it looks ---------------------------------------------------------------------------------------------------------


def test_the_configuration_is_found_as_documented(
    sqlite_home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    id = sqlite_home.dispatch("greet")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)

    def sees_it(*options: str) -> bool:
        ended = sqlite_home.kqueue(*options, "jobs", "--json")
        return ended.code == 0 and [row["id"] for row in ended.json] == [id]

    nothing = sqlite_home.kqueue("jobs")
    assert (nothing.code, nothing.err) == (
        2, 'kqueue.yaml: there is no such file; "kqueue init" writes one, -c names another\n',
    )  # fmt: skip
    assert sees_it("-c", str(sqlite_home.directory / "kqueue.yaml"))
    monkeypatch.setenv("KQUEUE_CONFIG", str(sqlite_home.directory / "kqueue.yaml"))
    assert sees_it()
    monkeypatch.delenv("KQUEUE_CONFIG")
    monkeypatch.setenv("KQUEUE_URL", sqlite_home.url)
    assert sees_it()
    unknown = sqlite_home.kqueue("status", "--json")
    assert (unknown.json["state"], unknown.json["queues"]["default"]["ready"]) == ("unknown", 1)
    assert unknown.err.startswith("note: $KQUEUE_URL says where jobs are")
    (elsewhere / "kqueue.yaml").write_text("queue: {url: 'sqlite:///other.db'}")
    assert sees_it(), "as for an application, $KQUEUE_URL goes before ./kqueue.yaml"
    assert not sees_it("-c", "kqueue.yaml"), "-c goes before everything"


# -- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nosuch",), 2, "kqueue: No such command 'nosuch'; see kqueue --help"),
        (("dispatch",), 2, "kqueue: Missing argument 'JOB'; see kqueue dispatch --help"),
        (("dispatch", "x", "--args", "hello"), 2, "kqueue: --args is not JSON: "),
        (("dispatch", "x", "--args", "5"), 2, "kqueue: --args must be a list or an object, not 5; for one argument write '[5]'"),
        (("dispatch", "x", "--priority", "200"), 2, "kqueue: priority must be an integer from -100 to 100, not 200"),
        (("dispatch", "x", "--queue", "a b"), 2, "kqueue: queue must be 1 to 64 of letters, digits"),
        (("dispatch", "x", "--delay", "soon"), 2, "kqueue: Invalid value for '--delay': write 500ms, 5s, 2m, 1h, 1d"),
        (("dispatch", "x", "--count", "0"), 2, "kqueue: Invalid value for '--count'"),
        (("jobs", "--state", "lost"), 2, "kqueue: Invalid value for '--state': 'lost' is not one of 'delayed', 'ready'"),
        (("show", "nosuch\n"), 2, "kqueue: no job 'nosuch\\n' is in sqlite:"),
        (("-c", "other.yaml", "jobs"), 2, "other.yaml: there is no such file"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    sqlite_home: Home, arguments: tuple[str, ...], code: int, message: str
) -> None:
    ended = sqlite_home.kqueue(*arguments)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.splitlines()[-1].startswith(message)
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "code", "words"),
    [
        ("redis://127.0.0.1:1/0", 4, ":1/0: cannot connect: Connection refused; start Redis there, or correct the URL\n"),
        ("sqlite:////proc/nowhere/q.db", 4, "make /proc/nowhere a directory"),
        ("memory://here", 2, "no other process can reach it; use sqlite:///"),
    ],
)
def test_a_broker_that_cannot_be_used_is_one_line(make_home: MakeHome, url: str, code: int, words: str) -> None:
    ended = make_home(url).kqueue("dispatch", "greet")
    assert (ended.code, ended.out) == (code, "")
    assert words in ended.err
    assert ended.err.count("\n") == 1


def test_a_bug_of_ours_is_one_line_too(sqlite_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kqueue.cli.target.Target.ask", lambda target, command: 1 / 0)
    ended = sqlite_home.kqueue("status")
    assert ended.code == 70
    assert ended.err.startswith("kqueue: internal error: ZeroDivisionError('division by zero') at ")
    assert ended.err.count("\n") == 1


def test_help_and_version(sqlite_home: Home) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        ended = sqlite_home.kqueue(*arguments)
        assert ended.code == 0
        for command in ("init", "dispatch", "status", "jobs", "show"):
            assert f"\n  {command} " in ended.out
        assert "..." not in ended.out.partition("Commands:")[2], "a summary is cut short"
    assert sqlite_home.kqueue("--version").out.startswith("kqueue, version ")
    for command in ("init", "dispatch", "status", "jobs", "show"):
        assert "--json" in sqlite_home.kqueue(command, "--help").out


# -- init -------------------------------------------------------------------------------------------------------------------


def test_init_writes_what_works_and_overwrites_nothing(
    sqlite_home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("new")
    monkeypatch.chdir(directory)
    ended = sqlite_home.kqueue("init")
    assert ended.code == 0
    assert "kqueue dispatch greet --args '[\"world\"]' --wait" in ended.out
    config = load_config("kqueue.yaml", {})
    assert (config.queue.url, config.jobs.modules) == (f"sqlite:///{directory}/var/kqueue.db", ("app.jobs",))
    (directory / "kqueue.yaml").unlink()
    again = sqlite_home.kqueue("init")
    assert (again.code, again.err.partition(" is there already")[0]) == (2, "kqueue: app/jobs.py")
    assert not (directory / "kqueue.yaml").exists()


def test_init_elsewhere_says_how_to_get_there(sqlite_home: Home) -> None:
    (sqlite_home.directory / "new/app").mkdir(parents=True)
    (sqlite_home.directory / "new/app/__init__.py").write_text("mine = True\n")
    ended = sqlite_home.kqueue("init", "new", "--json")
    assert ended.json == {"files": ["new/kqueue.yaml", "new/app/jobs.py"]}
    assert (sqlite_home.directory / "new/app/__init__.py").read_text() == "mine = True\n"
    assert "kqueued -c other/kqueue.yaml" in sqlite_home.kqueue("init", "other").out


def test_init_where_nothing_may_be_written_is_one_line(sqlite_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = sqlite_home.kqueue("init", "/proc/nowhere")
    assert (ended.code, ended.err) == (
        2, "kqueue: cannot write /proc/nowhere/kqueue.yaml: No such file or directory; make that directory writable, "
        "or name another\n",
    )  # fmt: skip

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.makedirs", refuse)
    assert "cannot write new/kqueue.yaml: Permission denied; " in sqlite_home.kqueue("init", "new").err


# -- real processes ---------------------------------------------------------------------------------------------------------



def test_the_first_two_commands_of_a_newcomer(tmp_path: Path) -> None:
    subprocess.run([*COMMAND, "init"], check=True, cwd=tmp_path, capture_output=True, timeout=PATIENCE_S)
    daemon = subprocess.Popen([sys.executable, "-m", "kqueue.cli.kqueued"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        for name, argument, result in (("greet", '["world"]', '"Hello, world!"'), ("count_primes", "[1000]", "168")):
            command = [*COMMAND, "dispatch", name, "--args", argument, "--wait"]
            done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
            assert done.stdout.endswith(f" done: {result}\n")
    finally:
        daemon.terminate()
        assert daemon.wait(PATIENCE_S) == 0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, f"sqlite:///{tmp_path}/q.db").start()
    yield daemon
    daemon.close()


def test_wait_tells_what_came_of_it(daemon: Daemon) -> None:
    done = daemon.kqueue("dispatch", "note", "--args", '["hi"]', "--wait", "--json")
    assert done.returncode == 0
    assert list(json.loads(done.stdout)) == ["id", "state", "result"]
    assert json.loads(done.stdout)["result"] == "hi"
    dead = daemon.kqueue("dispatch", "fails_twice", "--wait")
    assert dead.returncode == 1
    assert " dead: ValueError: no such luck; more: kqueue show " in dead.stdout
    many = daemon.kqueue("dispatch", "note", "--args", '["hi"]', "--wait", "--count", "3")
    assert (many.returncode, many.stdout, many.stderr) == (0, "3 done, 0 dead\n", "")


def test_status_is_the_daemons_own_word(daemon: Daemon) -> None:
    daemon.dispatch(BoundJob("linger", [60], {}, DispatchOptions()))
    daemon.marks.wait("linger")
    assert daemon.kqueue("status", "--check").returncode == 0
    found = daemon.status()
    assert (found["pid"], found["state"], found["queues"]["default"]["leased"]) == (daemon.pid, "running", 1)
    (running,) = found["running"]
    assert (running["job"], running["strategy"]) == ("linger", "isolated")
    page = daemon.kqueue("status").stdout
    assert f"kqueued {found['version']}, pid {daemon.pid}, up " in page
    assert ", running\n" in page
    assert f"{running['id']}  linger  isolated  {running['pid']}" in page
    # The template, the job, and perhaps a spare.
    memory = re.search(r"^memory ([\d.]+) MiB, with its [23] children ([\d.]+) MiB$", page, re.MULTILINE)
    assert memory is not None
    assert 5 < float(memory[1]) < float(memory[2]) < 500


def test_a_daemon_that_is_stopped_in_its_tracks_is_unhealthy(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kqueue.cli.target.DAEMON_PATIENCE_S", 0.1)
    daemon.signal(signal.SIGSTOP)
    try:
        with pytest.raises(SystemExit) as exit:
            main(["-c", str(daemon.config), "status", "--check"])
    finally:
        daemon.signal(signal.SIGCONT)
    assert exit.value.code not in (0, 2)
    assert "kqueued does not answer on " in capsys.readouterr().err


def test_interrupted_it_ends_with_130(sqlite_home: Home) -> None:
    command = [*COMMAND, "dispatch", "greet", "--wait"]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiting.stderr is not None
    assert waiting.stderr.readline().startswith("note: "), "it has begun"
    waiting.send_signal(signal.SIGINT)
    assert waiting.communicate(timeout=PATIENCE_S) == ("", "\n")
    assert waiting.returncode == 130


def test_a_reader_who_has_seen_enough_is_no_error(sqlite_home: Home) -> None:
    sqlite_home.kqueue("dispatch", "greet", "--count", "2000")
    command = f"{' '.join(COMMAND)} jobs --limit 2000 | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.startswith("ID ")
    assert done.stderr in ("", "the first 2000; more with --limit\n")


def test_a_progress_bar_shows_on_a_terminal_only(sqlite_home: Home) -> None:
    ours, its = pty.openpty()
    command = [*COMMAND, "dispatch", "greet", "--count", "1500"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=its, text=True, timeout=PATIENCE_S, check=True)
    os.close(its)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.stdout == "1500 jobs dispatched\n"
    assert "dispatching" in shown
    assert "100%" in shown
    piped = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert "dispatching" not in piped.stderr


def test_help_loads_click_and_little_else() -> None:
    code = "import sys, kqueue.cli.main; print(*({'yaml', 'redis', 'sqlite3', 'ssl', 'asyncio', 'psutil'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert done.stdout.strip() == ""


# -- how things look --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (3.21, "3.2 s"), (125, "2 min 5 s"), (119.9, "2 min 0 s"), (3600, "1 h 0 min"), (349300, "4 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_moments_of_any_number() -> None:
    assert ago(0).endswith(" ago")
    assert ago(1e12).startswith("in ")
    assert moment(1e300) == "1e+300 s since 1970"


def test_tables_and_blocks() -> None:
    assert table(("A", "N"), [("x\n", 1), (None, 22)], right=("N",)) == "A     N\nx\\n   1\n-    22"
    assert block("a\tb\n\x1b[31m\n", "  ") == "  a   b\n  \\x1b[31m"
