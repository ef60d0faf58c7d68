"""Logs: one line for each fact, whatever is in it, in every format; and a reader who does not read changes nothing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kqueue import events as facts
from kqueue.events import Events
from kqueue.execution.output import LINES_PER_S
from kqueue.observe import logs
from kqueue.observe.logs import Line, Logs, printable
from kqueue.outcome import Outcome

FORMATS = ("plain", "logfmt", "journald", "json")
ERROR = {"class": "ValueError", "message": "no such user\nsecond line"}
NASTY = 'a "b" c=d \\ \n<3>fake\r\t\x1b[31m\x00\x7f\x9b \u2028 \u202e é 😀 \U000e0001 \udcff'


def ended(then: str, outcome: Outcome, delay_s: float = 0.0) -> facts.JobEnded:
    return facts.JobEnded("01J0", "send_email", "inline", "mail", outcome, then, delay_s)


EVERY_FACT: list[Any] = [
    facts.DaemonReady("sqlite:////q.db", ["default", "mail"], 0.1234),
    facts.OutboxSettled(20, 1),
    facts.DaemonStopping("SIGTERM", 3),
    facts.Heartbeat(14.26, 10, 2, 3, "running"),
    facts.JobStarted("01J0", "send_email", "inline", "mail", 2),
    ended("done", Outcome("ok", duration_s=0.5)),
    ended("retry", Outcome("exception", error=ERROR), 3.21),
    ended("released", Outcome("cancelled", "shutdown")),
    ended("released", Outcome("refused", "supervisor", error={"class": "JobNotFound", "message": "no job 'x'"}), 30.0),
    ended("dead", Outcome("signal", "operator", signal="SIGKILL", pid=77, max_memory_mib=20.5)),
    facts.JobOutput("01J0", "send_email", "stdout", "hello"),
    facts.JobOutput("-", "template", "stderr", "a warning"),
    facts.LeaseLost("01J0", "send_email"),
    facts.SlowSlice("01J0", "send_email", 0.3456, "/srv/app/jobs.py:7 in handle"),
    facts.JobPromoted("send_email", 0.3456, "/srv/app/jobs.py:7 in handle"),
    facts.BrokerLost("redis://h:6379/0", "connection refused", 0.5),
    facts.BrokerBack("redis://h:6379/0"),
    facts.JobsRecovered("mail", 4),
    facts.DeadForgotten("mail", 17),
    facts.TemplateStarted(99, 5, 0.2),
    facts.TemplateReplaced(99, 100, 3),
    facts.TemplateDied(99, "killed by SIGKILL", 0.1),
    facts.LeftoversEnded("an earlier run of this daemon", ["5123 (python)", NASTY]),
    facts.EnvironmentWithheld(["DATABASE_URL"]),
    facts.IsolationKnown("killed as a whole by cgroup"),
    facts.Warned("something is odd; do this"),
    facts.DaemonStopped(0, 10),
]


class Log:
    """Logs into a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def of(self, *told: Any, format: str = "logfmt", level: str = "debug") -> list[str]:
        """The lines that `told`, facts or Lines, become."""
        os.truncate(self.fd, 0)
        events = Events()
        writer = Logs(level, format, fd=self.fd)
        writer.subscribe(events)
        for each in told:
            if isinstance(each, Line):
                writer.write(each)
            else:
                events.emit(each)
        text = self.path.read_text()
        assert text.endswith("\n") or not text
        return text.splitlines()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path / "log")
    yield log
    os.close(log.fd)


# -- what is said -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_fact_is_told_but_for_progress() -> None:
    kinds = {kind for kind in vars(facts).values() if isinstance(kind, type) and issubclass(kind, tuple)}
    assert kinds - set(logs._DESCRIPTIONS) == {facts.JobProgress}
    assert {type(fact) for fact in EVERY_FACT} == set(logs._DESCRIPTIONS)


@pytest.mark.parametrize("format", FORMATS)
def test_one_fact_is_one_line_in_every_format(log: Log, format: str) -> None:
    assert len(log.of(*EVERY_FACT, format=format)) == len(EVERY_FACT)


@pytest.mark.parametrize(
    ("then", "outcome", "level"),
    [
        ("done", Outcome("ok"), "info"),
        ("retry", Outcome("exception", error=ERROR), "warning"),
        ("dead", Outcome("exception", error=ERROR), "error"),
        ("released", Outcome("cancelled", "shutdown"), "info"),
        ("released", Outcome("lost", "supervisor"), "warning"),
    ],
)
def test_the_end_of_a_job_is_as_serious_as_what_becomes_of_it(log: Log, then: str, outcome: Outcome, level: str) -> None:
    (line,) = log.of(ended(then, outcome), format="json")
    assert json.loads(line)["level"] == level


def test_a_retry_says_why_when_and_of_what(log: Log) -> None:
    (line,) = log.of(ended("retry", Outcome("exception", error=ERROR, duration_s=0.1), 3.21), format="json")
    fields = json.loads(line)
    assert (fields["job"], fields["id"], fields["cause"], fields["retry_in_s"]) == ("send_email", "01J0", "exception", 3.2)
    assert fields["error"] == "ValueError: no such user"


def test_a_slow_slice_names_the_job_and_the_line_and_what_to_do(log: Log) -> None:
    (line,) = log.of(facts.SlowSlice("01J0", "send_email", 0.3456, "/srv/app/jobs.py:7 in handle"))
    for word in ("job=send_email", "id=01J0", "/srv/app/jobs.py:7", "make it yield", "isolated=True"):
        assert word in line


def test_the_periodic_line_has_memory_processed_failed_and_running(log: Log) -> None:
    (line,) = log.of(facts.Heartbeat(14.26, 10, 2, 3, "running"))
    assert line.endswith("level=info msg=heartbeat memory_mib=14.3 processed=10 failed=2 running=3 state=running")


@pytest.mark.parametrize(("level", "count"), [("debug", 27), ("info", 25), ("warning", 12), ("error", 2)])
def test_levels(log: Log, level: str, count: int) -> None:
    assert len(log.of(*EVERY_FACT, level=level)) == count


def test_a_flood_of_jobs_done_is_counted_and_not_logged_one_by_one(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0] * 1000 + [101.0] * 10)
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(now))
    lines = log.of(*[ended("done", Outcome("ok"))] * 1001, ended("dead", Outcome("exception", error=ERROR)), level="info")
    assert len([line for line in lines if "job done" in line]) == LINES_PER_S + 1
    assert any('msg="800 more jobs done' in line for line in lines)
    assert "job dead" in lines[-1], "what failed is always logged"


# -- how it is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_that_a_job_says_can_forge_a_line_or_reach_the_terminal(log: Log, format: str) -> None:
    (line,) = log.of(facts.JobOutput("id\n", "job\x1b", "stdout", NASTY), format=format)
    assert line.isprintable()
    if format == "json":
        fields = json.loads(line)
        assert (fields["msg"], fields["job"], fields["id"], fields["stream"]) == (NASTY, "job\x1b", "id\n", "stdout")


def test_logfmt_quotes_what_needs_it(log: Log) -> None:
    (line,) = log.of(Line(logs.INFO, "hi", {"a": "", "b": "x y", "c": 'q"\\', "d": None, "e": "k=v", "f": 1.5, "g": "é"}))
    assert line.endswith(r"""msg=hi a="" b="x y" c="q\"\\" e="k=v" f=1.5 g=é""")


def test_journald_lines_begin_with_their_priority(log: Log) -> None:
    lines = log.of(*(Line(level, "x") for level in range(4)), format="journald")
    assert lines == ["<7>x", "<6>x", "<4>x", "<3>x"]


def test_printable() -> None:
    assert printable("plain é 😀 \\n") == "plain é 😀 \\n"
    assert printable("\n\r\t\x1b\x9b\u202e\U000e0001") == r"\n\r\t\x1b\x9b\u202e\U000e0001"


# -- where it goes ----------------------------------------------------------------------------------------------------------


def first_line_on_a_terminal() -> str:
    ours, its = pty.openpty()
    try:
        Logs("info", "auto", fd=its).write(Line(logs.WARNING, "hello"))
        return os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(its)


def test_auto_is_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[33mwarning" in first_line_on_a_terminal()


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_auto_is_plain_on_a_terminal_without_colours(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert first_line_on_a_terminal().endswith("warning hello\r\n")


def test_auto_is_journald_only_where_the_journal_reads(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.fstat(log.fd)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert log.of(Line(logs.INFO, "x"), format="auto") == ["<6>x"]
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert log.of(Line(logs.INFO, "x"), format="auto")[0].startswith("time=")


def test_a_reader_who_does_not_read_holds_up_nobody_and_is_told_what_it_missed() -> None:
    read_fd, write_fd = os.pipe()
    writer = Logs("info", "logfmt", fd=write_fd)
    for number in range(5000):
        writer.write(Line(logs.INFO, f"line {number:04} {'x' * 100}"))
    assert os.get_blocking(write_fd), "the description is shared, so it has to stay as it was"
    text = b""
    while b"too slow" not in text:
        text += os.read(read_fd, 65536)
        writer.write(Line(logs.INFO, "goes on"))
    lines = text.decode().splitlines()
    assert [line.split()[3] for line in lines[:2]] == ["0000", "0001"]
    assert any("lines were dropped here: whoever reads this log is too slow" in line for line in lines)
    os.close(read_fd)
    os.close(write_fd)


def test_a_reader_who_is_gone_changes_nothing() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    writer = Logs("info", "logfmt", fd=write_fd)
    for _ in range(3):
        writer.write(Line(logs.INFO, "x"))
    os.close(write_fd)
    writer.write(Line(logs.INFO, "x"))


def python(code: str, *, shell: str = "", directory: Path | None = None) -> str:
    """What `code` writes to stderr in a new interpreter. `shell`: redirections."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=directory, timeout=30)
    return done.stderr


def test_a_closed_stderr_is_not_mistaken_for_the_file_that_got_its_number(tmp_path: Path) -> None:
    code = """
import os
fd = os.open("database", os.O_RDWR | os.O_CREAT)
assert fd == 2, fd
from kqueue.observe.logs import INFO, Line, Logs
Logs().write(Line(INFO, "x"))
"""
    python(code, shell="2>&-", directory=tmp_path)
    assert (tmp_path / "database").read_bytes() == b""


# -- Python's logging -------------------------------------------------------------------------------------------------------

SETUP = """
import logging
from kqueue.observe.logs import Logs
Logs("info", "json")
"""


def records(code: str) -> list[dict[str, Any]]:
    """The lines that log records made by `code` become."""
    return [json.loads(line) for line in python(SETUP + code).splitlines()]


def test_records_of_libraries_go_the_same_way() -> None:
    warning, error = records(r"""
logging.getLogger("some.library").warning("two\nlines of %s", "it")
logging.getLogger("some.library").debug("not this")
try:
    1 / 0
except ZeroDivisionError:
    logging.exception("oh no")
""")
    assert (warning["level"], warning["msg"], warning["logger"]) == ("warning", "two\nlines of it", "some.library")
    assert error["level"] == "error"
    assert error["traceback"].startswith("Traceback (most recent call last)")


def test_records_of_an_inline_job_carry_its_name_and_id() -> None:
    by_library, by_job = records("""
from kqueue.context import JobContext, enter
context = JobContext(id="01J0", name="greet", queue="q", attempt=1, deadline=None, inline=True, services=None)
enter(context)
logging.getLogger("some.library").info("from far away")
context.logger.info("from the job")
""")
    for line in (by_library, by_job):
        assert (line["job"], line["id"]) == ("greet", "01J0")
    assert (by_library["logger"], by_job["logger"]) == ("some.library", "greet")


def test_a_record_that_cannot_be_formatted_is_reported_and_nothing_is_raised() -> None:
    (line,) = records('logging.getLogger("l").info("%d", "no number")')
    assert line["msg"].startswith("a log record of l cannot be formatted: TypeError")


def test_whoever_configured_logging_before_keeps_it() -> None:
    text = python('import logging; logging.basicConfig(format="mine %(message)s")' + SETUP + 'logging.warning("x")')
    assert text == "mine x\n"
