"""Logs: every fact, and every record of Python's `logging`, becomes one line on stderr.

A line is a level, a message and fields, so the formats below say the same thing in different clothes:

    plain     2026-11-24 08:00:00.123 warning job failed, it will be retried  job=send_email id=01J… error="OSError: refused"
    logfmt    time=2026-11-24T08:00:00.123Z level=warning msg="job failed, it will be retried" job=send_email id=01J… …
    journald  <4>job failed, it will be retried  job=send_email …           (sd-daemon(3); the journal has its own clock)
    json      {"time":"2026-11-24T08:00:00.123Z","level":"warning","msg":"job failed, it will be retried","job":"send_email",…}

Rule 1. One fact is one line, whatever is in it: names, errors and output are other people's, and whatever could end a line or
        talk to a terminal is escaped.
Rule 2. A log never raises and never holds up the loop. What a slow reader does not take is kept, up to BACKLOG, then dropped and
        counted. stderr stays blocking, since its file description is shared with the shell and others; poll(2) asks beforehand.
Rule 3. Who has configured `logging` before keeps it as it is. (Importing it costs 0.3 MiB, and setproctitle does so anyway.)

How a job ran, and what becomes of it, is decided elsewhere; here it is only told.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from stat import S_ISREG
from threading import RLock
from typing import Any, Final, NamedTuple

from .. import events as facts
from ..context import current_or_none
from ..execution.output import Rate

STDERR: Final = 2
LEVELS: Final = ("debug", "info", "warning", "error")
DEBUG, INFO, WARNING, ERROR = range(len(LEVELS))
BACKLOG: Final = 256 * 1024  # bytes that wait for a slow reader
OF_JOBS: Final = BACKLOG // 2  # of these, so much may be what jobs print: one that floods does not silence the daemon
CHUNK: Final = 4096  # bytes written at once; as PIPE_BUF, a pipe that polls writable takes them without blocking
LONGEST: Final = 16384  # characters of a record's message, and of its traceback
LAST_PATIENCE_S: Final = 1.0  # for the reader, when the daemon ends


class Line(NamedTuple):
    """What there is to say. `level`: an index into LEVELS. A field that is None is left out."""

    level: int
    message: str
    fields: Mapping[str, Any] = {}


class Logs:
    """Writes lines of at least `level` to `fd`, in `format`; "auto" decides by what `fd` is.

    From its creation on, it is also where Python's `logging` goes, unless somebody has configured that already.
    """

    def __init__(self, level: str = "info", format: str = "auto", *, fd: int = STDERR) -> None:
        if fd == STDERR and sys.__stderr__ is None:
            fd = -1  # it was closed when the process began, so descriptor 2 is something else by now: a database, say
        self._sink = _Sink(fd)
        self._level = LEVELS.index(level)
        self._render = _renderer(format, fd)
        self._dropped = 0
        self._done_rate = Rate()
        self._take_records()

    def subscribe(self, events: facts.Events) -> None:
        """Log every fact of `events`."""
        own: dict[type[Any], Callable[[Any], None]] = {facts.JobEnded: self._job_ended, facts.JobOutput: self._job_output}
        for kind, (most, describe) in _DESCRIPTIONS.items():
            if most >= self._level:
                events.subscribe(kind, own.get(kind) or self._subscriber(describe))
        events.subscribe(facts.Heartbeat, lambda fact: self.flush())
        events.subscribe(facts.DaemonStopped, lambda fact: self.flush(LAST_PATIENCE_S))

    def write(self, line: Line, room: int = BACKLOG) -> None:
        """Write `line`, unless it is below the level. `room`: in the backlog, beyond which it is dropped."""
        if line.level < self._level:
            return
        if self._dropped and self._sink.flush():
            dropped, self._dropped = self._dropped, 0
            self._put(Line(WARNING, f"{dropped} lines were dropped here: whoever reads this log is too slow"))
        if not self._put(line, room):
            self._dropped += 1

    def flush(self, patience_s: float = 0.0) -> None:
        """Write what a slow reader did not take yet, waiting for it up to `patience_s` seconds."""
        self._sink.flush(patience_s)

    def _put(self, line: Line, room: int = BACKLOG) -> bool:
        return self._sink.put(self._render(line, time.time()).encode("utf-8", "backslashreplace") + b"\n", room)

    def _subscriber(self, describe: Callable[[Any], Line]) -> Callable[[Any], None]:
        return lambda fact: self.write(describe(fact))

    def _job_output(self, fact: facts.JobOutput) -> None:
        self.write(_job_output(fact), OF_JOBS)

    def _job_ended(self, fact: facts.JobEnded) -> None:
        """Each job that failed; of those that are done, at most output.LINES_PER_S a second, and the number of the rest.

        A line costs as much as a fifth of a job that does nothing, and nobody reads ten thousand a second.
        """
        if fact.then == "done" and self._level > DEBUG:
            if not self._done_rate.allows(time.monotonic()):
                return
            if self._done_rate.held_back:
                held_back, self._done_rate.held_back = self._done_rate.held_back, 0
                self.write(Line(INFO, f"{held_back} more jobs done; log.level: debug has a line for each"))
        self.write(_job_ended(fact))

    def _take_records(self) -> None:
        root = logging.getLogger()
        if not root.handlers:
            root.addHandler(_Records(self))
            root.setLevel(LEVELS[self._level].upper())


class _Records(logging.Handler):
    """Where Python's own log records go, those of libraries and of other threads included."""

    def __init__(self, logs: Logs) -> None:
        super().__init__()
        self._logs = logs

    def handle(self, record: logging.LogRecord) -> bool:
        """Instead of `emit`, around which logging holds a lock of its own; two locks are one too many for a __del__ that logs."""
        try:
            self._logs.write(_of_record(record))
        except Exception as error:  # its arguments may be anything
            self._logs.write(Line(WARNING, f"a log record of {record.name} cannot be formatted: {error!r:.200}"))
        return True


# -- what there is to say ---------------------------------------------------------------------------------------------------


def _job_started(fact: facts.JobStarted) -> Line:
    return Line(DEBUG, "job started", _job(fact, attempt=fact.attempt, strategy=fact.strategy, queue=fact.queue))


def _job_ended(fact: facts.JobEnded) -> Line:
    outcome = fact.outcome
    fields = _job(fact, strategy=fact.strategy, queue=fact.queue)
    if not outcome.ok:
        fields.update(cause=outcome.cause, error=outcome.summary())
    if fact.delay_s:
        fields["retry_in_s"] = round(fact.delay_s, 1)
    fields["duration_s"] = round(outcome.duration_s, 3)
    if outcome.pid is not None:
        cpu_s = outcome.cpu_user_s + outcome.cpu_system_s
        fields.update(pid=outcome.pid, cpu_s=round(cpu_s, 3), memory_mib=round(outcome.max_memory_mib, 1))
    if fact.then == "done":
        return Line(INFO, "job done", fields)
    if fact.then == "retry":
        return Line(WARNING, "job failed, it will be retried", fields)
    if fact.then == "dead":
        return Line(ERROR, f"job dead; why: kqueue show {fact.id}", fields)
    return Line(INFO if outcome.cause == "cancelled" else WARNING, "job not finished, it is back in its queue", fields)


def _job_output(fact: facts.JobOutput) -> Line:
    of_a_job = fact.id != "-"  # else the template's
    return Line(INFO, fact.line, {"job": fact.job, "id": fact.id if of_a_job else None, "stream": fact.stream})


def _lease_lost(fact: facts.LeaseLost) -> Line:
    message = "job lost its lease: what comes of this run does not count, and another run of it does"
    return Line(WARNING, message, _job(fact))


def _outbox_settled(fact: facts.OutboxSettled) -> Line:
    return Line(INFO, "outcomes that an earlier run of this daemon had kept", fact._asdict())


def _slow_slice(fact: facts.SlowSlice) -> Line:
    place = f" at {fact.where}" if fact.where else ""
    todo = fact.instead or "make it yield, or declare it isolated=True"
    message = f"{fact.job} held up all others for {fact.seconds:.2g} s{place}: {todo}"
    return Line(WARNING, message, _job(fact, seconds=round(fact.seconds, 3), where=fact.where or None))


def _job_promoted(fact: facts.JobPromoted) -> Line:
    place = f" at {fact.where}" if fact.where else ""
    todo = fact.instead or "make it yield, or declare it isolated=True"
    message = (
        f"{fact.job} has blocked the loop twice, for {fact.seconds:.2g} s just now{place}, and runs isolated from now on. "
        f"To have it inline, {todo}, then: kqueue demote {fact.job}. jobs.pin keeps it inline as it is"
    )
    return Line(WARNING, message, {"job": fact.job, "seconds": round(fact.seconds, 3), "where": fact.where or None})


def _broker_lost(fact: facts.BrokerLost) -> Line:
    return Line(WARNING, "broker lost", _rounded(fact, retry_in_s=2))


def _jobs_recovered(fact: facts.JobsRecovered) -> Line:
    return Line(WARNING, "jobs of a daemon that died are ready again", fact._asdict())


def _dead_forgotten(fact: facts.DeadForgotten) -> Line:
    return Line(WARNING, "dead letters dropped, as queue.dead says", fact._asdict())


def _template_died(fact: facts.TemplateDied) -> Line:
    message = "template died, and with it the jobs in its children; another one is started"
    return Line(ERROR, message, _rounded(fact, restart_in_s=2))


def _leftovers_ended(fact: facts.LeftoversEnded) -> Line:
    shown = ", ".join(fact.processes[:10]) + (", …" if len(fact.processes) > 10 else "")
    message = f"killed {len(fact.processes)} processes that jobs of {fact.whose} had left behind"
    return Line(WARNING, message, {"processes": shown})


def _environment_withheld(fact: facts.EnvironmentWithheld) -> Line:
    shown = ", ".join(fact.names[:30]) + (", …" if len(fact.names) > 30 else "")
    message = "isolated jobs do not have these environment variables; isolated.environment lets them through"
    return Line(INFO, message, {"names": shown})


def _heartbeat(fact: facts.Heartbeat) -> Line:
    return Line(INFO, "heartbeat", _rounded(fact, memory_mib=1))


def _daemon_ready(fact: facts.DaemonReady) -> Line:
    return Line(INFO, "ready", {**_rounded(fact, start_s=3), "queues": ",".join(fact.queues)})


def _of_record(record: logging.LogRecord) -> Line:
    """What was logged inside an inline job carries its name and id."""
    number = record.levelno  # 10, 20, 30, 40; libraries add levels in between
    job = current_or_none()
    fields = {
        "logger": record.name,
        "job": getattr(record, "job", None) or (job and job.name),  # JobContext.logger brings both
        "id": getattr(record, "job_id", None) or (job and job.id),
    }
    if record.exc_info and record.exc_info[1] is not None:
        fields["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))[-LONGEST:].rstrip()
    level = ERROR if number >= 40 else WARNING if number >= 30 else INFO if number >= 20 else DEBUG
    return Line(level, record.getMessage()[:LONGEST], fields)


def _job(fact: Any, **more: Any) -> dict[str, Any]:
    return {"job": fact.job, "id": fact.id, **more}


def _rounded(fact: Any, **digits: int) -> dict[str, Any]:
    return {name: round(value, digits[name]) if name in digits else value for name, value in fact._asdict().items()}


_DESCRIPTIONS: Final[dict[type[Any], tuple[int, Callable[[Any], Line]]]] = {
    facts.DaemonReady: (INFO, _daemon_ready),
    facts.DaemonStopping: (INFO, lambda fact: Line(INFO, "stopping", fact._asdict())),
    facts.DaemonStopped: (INFO, lambda fact: Line(INFO, "stopped", fact._asdict())),
    facts.Heartbeat: (INFO, _heartbeat),
    facts.JobStarted: (DEBUG, _job_started),
    facts.JobEnded: (ERROR, _job_ended),
    facts.JobOutput: (INFO, _job_output),
    facts.LeaseLost: (WARNING, _lease_lost),
    facts.OutboxSettled: (INFO, _outbox_settled),
    facts.SlowSlice: (WARNING, _slow_slice),
    facts.JobPromoted: (WARNING, _job_promoted),
    facts.BrokerLost: (WARNING, _broker_lost),
    facts.BrokerBack: (INFO, lambda fact: Line(INFO, "broker back", fact._asdict())),
    facts.JobsRecovered: (WARNING, _jobs_recovered),
    facts.DeadForgotten: (WARNING, _dead_forgotten),
    facts.TemplateStarted: (DEBUG, lambda fact: Line(DEBUG, "template started", _rounded(fact, start_s=3))),
    facts.TemplateReplaced: (INFO, lambda fact: Line(INFO, "template replaced", fact._asdict())),
    facts.TemplateDied: (ERROR, _template_died),
    facts.LeftoversEnded: (WARNING, _leftovers_ended),
    facts.EnvironmentWithheld: (INFO, _environment_withheld),
    facts.IsolationKnown: (INFO, lambda fact: Line(INFO, f"isolated jobs are {fact.how}")),
    facts.Warned: (WARNING, lambda fact: Line(WARNING, fact.message)),
}
"""Kind of fact -> (the most serious level it can have, how to describe it). JobProgress is for `kqueue status`, not for a log."""


# -- formats ----------------------------------------------------------------------------------------------------------------

_BARE: Final = re.compile(r'[^\s"=\\]+')
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_PRIORITIES: Final = (7, 6, 4, 3)  # of syslog(3): debug, info, warning, err
_COLOURS: Final = ("\x1b[2m", "\x1b[32m", "\x1b[33m", "\x1b[31m")  # dim, green, yellow, red
_NORMAL, _DIM = "\x1b[0m", "\x1b[2m"

Renderer = Callable[[Line, float], str]  # (line, seconds since 1970) -> text without a newline


def printable(text: str) -> str:
    """`text` with whatever is not printable escaped: line ends, control and escape characters, and what turns text around."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    number = ord(character)
    code = f"x{number:02x}" if number < 0x100 else f"u{number:04x}" if number < 0x10000 else f"U{number:08x}"
    return _SHORT.get(character, f"\\{code}")


# Not codec.to_json, which refuses what a queue must not carry: half a surrogate pair, say, and any object.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode


def json_text(value: Any) -> str:
    """`value` as one line of JSON, with whatever is not printable escaped as JSON does."""
    text = _encode(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _renderer(format: str, fd: int) -> Renderer:
    if format == "auto":
        format = "journald" if _is_the_journal(fd) else _on_a_terminal() if os.isatty(fd) else "logfmt"
    return _RENDERERS[format]


def _is_the_journal(fd: int) -> bool:
    """All that a service starts inherits $JOURNAL_STREAM; only while it names `fd` does `fd` lead there (systemd.exec(5))."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _on_a_terminal() -> str:
    return "plain" if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else "colours"


def _plain(line: Line, now: float) -> str:
    return f"{_time(now, '%Y-%m-%d %H:%M:%S', time.localtime)} {LEVELS[line.level]:7} {printable(line.message)}{_tail(line)}"


def _colours(line: Line, now: float) -> str:
    level = f"{_COLOURS[line.level]}{LEVELS[line.level]:7}{_NORMAL}"
    return f"{_time(now, '%H:%M:%S', time.localtime)} {level} {printable(line.message)}{_DIM}{_tail(line)}{_NORMAL}"


def _logfmt(line: Line, now: float) -> str:
    begin = f"time={_utc(now)} level={LEVELS[line.level]} msg={_value(line.message)}"
    return " ".join([begin, *_pairs(line)])


def _journald(line: Line, now: float) -> str:
    return f"<{_PRIORITIES[line.level]}>{printable(line.message)}{_tail(line)}"


def _json(line: Line, now: float) -> str:
    fields = {name: value for name, value in line.fields.items() if value is not None}
    return json_text({"time": _utc(now), "level": LEVELS[line.level], "msg": line.message, **fields})


_RENDERERS: Final[dict[str, Renderer]] = {
    "plain": _plain, "colours": _colours, "logfmt": _logfmt, "journald": _journald, "json": _json,
}  # fmt: skip


def _tail(line: Line) -> str:
    pairs = _pairs(line)
    return f"  {' '.join(pairs)}" if pairs else ""


def _pairs(line: Line) -> list[str]:
    return [f"{name}={_value(value)}" for name, value in line.fields.items() if value is not None]


def _value(value: Any) -> str:
    text = str(value)
    if _BARE.fullmatch(text) and text.isprintable():
        return text
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _utc(now: float) -> str:
    return _time(now, "%Y-%m-%dT%H:%M:%S", time.gmtime) + "Z"


_last: tuple[int, str, str] = (0, "", "")  # second, pattern, text: strftime costs as much as all the rest of a line


def _time(now: float, pattern: str, zone: Callable[[float], time.struct_time]) -> str:
    global _last
    second = int(now)
    last = _last
    if last[:2] != (second, pattern):
        last = _last = (second, pattern, time.strftime(pattern, zone(second)))
    return f"{last[2]}.{int((now - second) * 1000):03d}"


# -- writing ----------------------------------------------------------------------------------------------------------------


class _Sink:
    """A file descriptor that others write to as well, and that is not ours to make non-blocking. fd -1: there is none."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._backlog = bytearray()
        self._lock = RLock()  # records come from any thread, and from a __del__ in the middle of a write
        self._busy = False
        self._poll: select.poll | None = None  # None: a file, which never keeps a writer waiting for a reader
        try:
            if not S_ISREG(os.fstat(fd).st_mode):
                self._poll = select.poll()
                self._poll.register(fd, select.POLLOUT)
        except (OSError, ValueError):
            self._fd = -1

    def put(self, data: bytes, room: int = BACKLOG) -> bool:
        """Write `data`, or keep it for later; False: there was no room to keep it."""
        with self._lock:
            if len(self._backlog) + len(data) > room:
                self._write()
            if len(self._backlog) + len(data) > room:
                return False
            self._backlog += data
            self._write()
            return True

    def flush(self, patience_s: float = 0.0) -> bool:
        """Write what was kept, waiting up to `patience_s` seconds in all; whether everything is written."""
        deadline = time.monotonic() + patience_s
        with self._lock:
            self._write()
            while self._backlog and self._poll is not None and (left_s := deadline - time.monotonic()) > 0:
                self._poll.poll(left_s * 1000)
                self._write()
            return not self._backlog

    def _write(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            while self._backlog and (self._poll is None or self._poll.poll(0)):
                written = os.write(self._fd, self._backlog[:CHUNK])
                del self._backlog[:written]
        except BlockingIOError:
            return  # somebody else made it non-blocking
        except OSError:
            self._backlog.clear()  # a closed pipe, a full disk: there is nobody to tell
        finally:
            self._busy = False
