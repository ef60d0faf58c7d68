"""The zoo: a real daemon, every kind of hostile job there is, fifty good ones beside each; and all is judged from outside.

The test is the subreaper of all that the daemon starts, so whatever a job leaves behind is below the test, in /proc: nothing can
get away by a double fork, a session of its own, or the death of its parents.

For each kind: the good jobs are done in the end, at no cost in attempts; the hostile one has the certificate that it deserves, in
`kqueue show --json`, and the log says the same; no process of it is left; supervisor and template are well, and have the fds that
they had before.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest

from kqueue import BoundJob, JobHandle
from kqueue.brokers.base import Row
from kqueue.execution.limits import PR_SET_CHILD_SUBREAPER, prctl
from kqueue.options import DispatchOptions
from kqueue.outcome import Outcome
from kqueue.settings import NOT_YET
from tests.apps.hostile import ATTACKS
from tests.daemon import PATIENCE_S, ROOT, Daemon, alive, title, tree
from tests.servers import RedisServer

STARTS = ("fork", "pool", "exec")
GOOD = 50
OF_A_WORKER = 6  # fds that the supervisor has of an idle pool process: socket, three pipes, epoll, pidfd
PR_GET_CHILD_SUBREAPER = 37


ANY: Any = object()  # of a field of Bad: it is not looked at
DIRECTORY: Any = object()  # as an argument: a directory of the job's own


class Bad(NamedTuple):
    """A hostile job, and the certificate that it deserves: its fields, and patterns for texts. `cause` "ok": it ends well."""

    name: str
    args: Sequence[Any] = ()
    options: Mapping[str, Any] = {}
    starts: Sequence[str] = STARTS
    cause: str = "ok"
    ended_by: Any = "job"  # or several
    signal: str | None = None
    exit_code: int | None = None
    message: str = ""  # a pattern for "Class: message"; "": there is no error
    stack: str = ""  # a pattern; "": there is none
    output: str | None = None  # a pattern; None: whatever
    result: Any = None
    cpu_s: tuple[float, float] = (0.0, 5.0)
    memory_mib: tuple[float, float] = (4.0, 400.0)
    but: Mapping[str, Mapping[str, Any]] = {}  # what differs, by start

    def of(self, start: str) -> Bad:
        return self._replace(**self.but.get(start, {}))


def wait_until(done: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > deadline:
            pytest.fail(str(what()))
        time.sleep(0.01)


class Zoo(Daemon):
    """A daemon that has all of it, below a subreaper."""

    all: ClassVar[list[Zoo]] = []

    def __init__(self, directory: Path, url: str, isolated: str = "", **settings: Any) -> None:
        commands = (
            "good_command: {command: [/bin/echo, '{number}'], result: json, keep_result: 10m}, "
            "hostile_missing_exec: {command: [no-such-program-anywhere], keep_result: 10m, max_attempts: 1}"
        )
        fields = {
            "modules": "[tests.apps.hostile_inline]", "isolated_modules": "[tests.apps.hostile], commands: {" + commands + "}",
            "root": f'{directory}", "{ROOT}',
            "more": "pool: {size: 4}\ninline: {max_slice: 1s, hard_slice: 1s}",
        }  # fmt: skip
        super().__init__(directory, url, **{**fields, **settings})
        text = self.config.read_text().replace("kill_grace: 500ms", f"kill_grace: 300ms, max_concurrent: 10{isolated}")
        self.config.write_text(text.replace("format: logfmt", "format: json"))
        self.places = directory / "places"
        self.places.mkdir()
        self._numbers = 0
        Zoo.all.append(self)
        self.fds = 0  # of the supervisor, when it is calm
        self.memory_mib = 0.0  # of the supervisor, resident, when it has run some jobs

    def send(self, name: str, *args: Any, **options: Any) -> JobHandle:
        return self.dispatch(bound(name, *args, **options))[0]

    def place(self) -> Path:
        """A file for the processes of one job to say that they are there."""
        self._numbers += 1
        return self.places / str(self._numbers)

    def good(self, count: int, first: int = 0) -> list[JobHandle]:
        kinds = ("inline", "pool", "fork", "inline", "pool", "inline", "pool", "fork", "generator", "command")
        return self.dispatch(*[bound(f"good_{kinds[n % len(kinds)]}", n) for n in range(first, first + count)])

    # -- what there is, by /proc ----------------------------------------------------------------------------------------------

    def template(self) -> int:
        (pid,) = (pid for pid in children_of(self.pid) if alive(pid))
        return pid

    def supervisor_fds(self) -> int:
        """But for those of idle pool processes."""
        return len(os.listdir(f"/proc/{self.pid}/fd")) - OF_A_WORKER * len(pool_of(self.template()))

    def wait_calm(self, before: int) -> None:
        """Until nothing of any job is left: there are the daemon, its template, its spare child, and four idle pool processes."""
        wait_until(lambda: not self._restless(before), lambda: [self._restless(before), *self.log[-30:]])

    def _restless(self, fds: int) -> str:
        ours = {zoo.process.pid for zoo in Zoo.all if zoo.process is not None}
        orphans = [pid for pid in children_of(os.getpid()) if pid not in ours and not is_server(pid)]
        for pid in orphans:
            if not alive(pid):
                os.waitpid(pid, os.WNOHANG)  # of a template that was killed; init would do that
        below = [self.pid, *tree(self.pid), *(pid for orphan in orphans for pid in (orphan, *tree(orphan)))]
        try:
            template = self.template()
            pool, spare = pool_of(template), [pid for pid in children_of(template) if title(pid) == "kqueued: spare child"]
            if set(below) != {self.pid, template, *pool, *spare}:
                return f"{[(pid, describe(pid)) for pid in below if pid not in (self.pid, template, *pool, *spare)]} are left"
            if len(pool) > 4 or len(spare) != 1 or not all(map(alive, pool)):
                return f"{len(pool)} pool processes: {[describe(pid) for pid in pool]}"
            if self.supervisor_fds() > fds:  # fewer, when a pool process is gone
                return f"the supervisor has {self.supervisor_fds()} fds, and had {fds}: {links_of(self.pid)}"
        except (ValueError, OSError) as error:
            return f"{error!r}"
        left = [place.name for place in self.places.iterdir() if lives_on(place)]
        return f"jobs {left} live on" if left else ""

    # -- what is told -----------------------------------------------------------------------------------------------------------

    def row(self, handle: JobHandle) -> Row:
        row = self.client.store.show(handle.id)
        assert row is not None, "it is gone"
        return row

    def show(self, handles: Sequence[JobHandle]) -> list[dict[str, Any]]:
        """`kqueue show --json` of each."""
        command = [sys.executable, "-m", "kqueue.cli.main", "-c", str(self.config), "show", "--json"]
        processes = [subprocess.Popen([*command, handle.id], stdout=subprocess.PIPE, text=True) for handle in handles]
        return [json.loads(process.communicate(timeout=PATIENCE_S)[0]) for process in processes]

    def logged(self, id: str, messages: tuple[str, ...]) -> list[dict[str, Any]]:
        """The lines on the job `id` that begin with one of `messages`, once there is one."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [line for line in map(json.loads, [line for line in self.log if f'"id":"{id}"' in line])]
            found[:] = [line for line in found if line["msg"].startswith(messages)]
            return bool(found)

        wait_until(look, lambda: [f"{id}: its end was never logged", *[line for line in self.log if id in line], *self.log[-5:]])
        return found

    # -- judging ----------------------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Open what is opened at first use, and look what that is."""
        self.praise_when_done(self.good(GOOD))
        wait_until(lambda: len(pool_of(self.template())) + 1 == len(children_of(self.template())), lambda: self.log[-30:])
        self.fds, self.memory_mib = self.supervisor_fds(), resident_mib(self.pid)

    def hold_out(self, *bad: Bad) -> None:
        """Run `bad`, in all their starts, with fifty good jobs around them; and judge."""
        self.wait_calm(self.fds)
        supervisor, template = self.pid, self.template()
        template_files = files_of(template)
        good = self.good(GOOD // 2)
        cages = [(each.of(start), start, self.place()) for each in bad for start in each.starts]
        sent = [bound(f"hostile_{each.name}_{start}", *given(each, place), **each.options) for each, start, place in cages]
        handles = self.dispatch(*sent)
        good += self.good(GOOD - GOOD // 2, GOOD // 2)
        self.praise_when_done(good)
        for handle in handles:
            assert handle.wait(PATIENCE_S), [handle, self.row(handle), *self.log[-50:]]
        self.wait_calm(self.fds)
        wrong = []
        for told, handle, (each, start, _) in zip(self.show(handles), handles, cages, strict=True):
            assert told["id"] == handle.id
            wrong += self.judge(each, told)
            pid = told["certificates"][-1]["pid"]
            assert (start == "pool" and pid in pool_of(self.template())) or not alive(pid), describe(pid)
        assert not wrong, "\n\n".join(wrong)
        assert (self.pid, alive(self.pid)) == (supervisor, True)
        if not any(each.name == "kills_its_parent" for each in bad):
            assert self.template() == template, "a template has died"
            wait_until(lambda: files_of(template) == template_files, lambda: (files_of(template), template_files))

    def praise_when_done(self, good: Sequence[JobHandle]) -> None:
        """All of them are done, with their results, and it cost them nothing."""
        for handle in good:
            assert handle.wait(PATIENCE_S), [handle, self.row(handle), *self.log[-50:]]
        assert [handle.result(0) for handle in good] == list(range(len(good)))
        for handle in good:
            counters = self.row(handle).counters
            assert (counters.attempts, counters.crashes) == (0, 0), self.row(handle)

    def judge(self, bad: Bad, told: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with what is told of it."""
        *before, certificate = told["certificates"]
        verdict = "done" if bad.cause == "ok" else "dead"
        error, cpu_s = certificate["error"], certificate["cpu_user_s"] + certificate["cpu_system_s"]
        text = f"{error['class']}: {error['message']}" if error else ""
        good = {
            "earlier runs": all((each["cause"], each["error"]["class"]) == ("lost", "TemplateDied") for each in before),
            "state": told["state"] == verdict,
            "cause": certificate["cause"] == bad.cause,
            "ended_by": certificate["ended_by"] in (bad.ended_by if isinstance(bad.ended_by, tuple) else (bad.ended_by,)),
            "signal": bad.signal is ANY or certificate["signal"] == bad.signal,
            "exit_code": bad.exit_code is None or certificate["exit_code"] == bad.exit_code,
            "error": re.fullmatch(bad.message, text, re.DOTALL) if bad.message else not text,
            "stack": bad.stack is ANY or _finds(bad.stack, certificate["stack"]) or _is_cut(bad.stack, certificate["stack"]),
            "output": bad.output is None or _finds(bad.output, certificate["output"]),
            "result": told["result"] == bad.result,
            "CPU": bad.cpu_s[0] <= cpu_s <= bad.cpu_s[1],
            "memory": bad.memory_mib[0] <= certificate["max_memory_mib"] <= bad.memory_mib[1],
            "duration": certificate["duration_s"] > 0,
            "limits": all(certificate["limits"].get(name, 0) == value for name, value in bad.options.items()),
            "log": self._log_agrees(told, certificate, verdict),
        }  # fmt: skip
        wrong = [what for what, fits in good.items() if not fits]
        if wrong:
            short = {name: value[-600:] if isinstance(value, str) else value for name, value in certificate.items()}
            yield f"{told['job']} {bad.args}: {', '.join(wrong)} of {short}, result {str(told['result'])[:100]}"

    def _log_agrees(self, told: Mapping[str, Any], certificate: Mapping[str, Any], verdict: str) -> bool:
        """Whether the log has one line on its end, which says the same."""
        (line,) = self.logged(told["id"], ("job done", "job dead"))
        known = {name: certificate[name] for name in ("cause", "error", "signal", "exit_code")}
        says = (line["job"], line["pid"], line.get("cause", "ok"))
        return (
            line["msg"].startswith(f"job {verdict}")
            and says == (told["job"], certificate["pid"], certificate["cause"])
            and abs(line["memory_mib"] - certificate["max_memory_mib"]) < 0.1
            and (verdict == "done" or line["error"] == Outcome(**known).summary())
        )


def _is_cut(pattern: str, stack: str) -> bool:
    """Whether it was killed while it told its first line, where it may be killed before it has told any."""
    return pattern.startswith("^$|") and bool(re.fullmatch(r"Current thread [^\n]*(\n  File [^\n]*)?", stack))


def _finds(pattern: str, text: str) -> bool:
    return bool(re.search(pattern, text, re.DOTALL)) if pattern else not text


def given(bad: Bad, place: Path) -> list[Any]:
    arguments = [str(place.parent.parent) if arg is DIRECTORY else arg for arg in bad.args]
    return [] if bad.name == "missing" else [str(place), *arguments]


def bound(name: str, *args: Any, **options: Any) -> BoundJob:
    return BoundJob(name, args, {}, DispatchOptions(overrides=options))


def children_of(pid: int) -> list[int]:
    return [int(word) for task in Path(f"/proc/{pid}/task").glob("*/children") for word in task.read_text().split()]


def left_since(before: Sequence[int]) -> list[int]:
    """Who is below us and was not `before`. Whom a daemon had killed and not waited for when it ended, init would wait for."""
    for pid in children_of(os.getpid()):
        if pid not in before and not alive(pid):
            os.waitpid(pid, os.WNOHANG)
    return [pid for pid in tree(os.getpid()) if pid not in before]


def is_server(pid: int) -> bool:
    """Of the tests' own: a Redis, say."""
    return "redis-server" in title(pid)


def describe(pid: int) -> str:
    with suppress(OSError):
        return f"{Path(f'/proc/{pid}/stat').read_text()[:80]} {title(pid)[:80]!r}"
    return "gone"


def pool_of(template: int) -> list[int]:
    return [pid for pid in children_of(template) if title(pid).startswith("kqueued: job ")]


def files_of(pid: int) -> list[str]:
    """But for cgroups, of which a template keeps as many as it has ever had jobs at once; and without the numbers of pipes."""
    return sorted(link.partition("[")[0] for link in links_of(pid) if "/cgroup." not in link)


def links_of(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return sorted(found)


def lives_on(place: Path) -> bool:
    """Whether a process lives that has said so in `place`, or that has this file open."""
    if not place.exists():
        return False
    with place.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return any(is_it(*map(int, line.split())) for line in file)


def is_it(pid: int, began: int) -> bool:
    """Whether `pid` lives and is the process that began then."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[19]) == began and fields[0] not in "ZX"


def resident_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


@pytest.fixture(autouse=True, scope="module")
def subreaper() -> Iterator[None]:
    """This process, so that it inherits all orphans."""
    before = tree(os.getpid())
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield
    left = [pid for pid in tree(os.getpid()) if pid not in before]
    for pid in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)  # of a test that failed
    prctl(PR_SET_CHILD_SUBREAPER, 0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    """One daemon for many of them: what is wrong after one kind shows at the next."""
    directory = tmp_path_factory.mktemp("zoo")
    yield from opened(Zoo(directory, f"sqlite:///{directory}/queue.db"))


@pytest.fixture(scope="module")
def zoo_on_redis(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    """Without cgroups, where they would be had."""
    redis_server.command("FLUSHALL")
    yield from opened(Zoo(tmp_path_factory.mktemp("zoo"), redis_server.url, ", cgroups: false"))


def opened(zoo: Zoo) -> Iterator[Zoo]:
    write_bombs(zoo.directory)
    try:
        zoo.start()
        zoo.warm_up()
        yield zoo
        assert resident_mib(zoo.pid) < zoo.memory_mib + 8, "of the supervisor, which now knows a hundred classes of jobs"
        assert zoo.stop() == 0
    finally:
        zoo.close()


def write_bombs(directory: Path) -> None:
    for name, text in BOMBS.items():
        (directory / f"bomb_{name}.py").write_text(text)


BOMBS = {
    "exits": "import os\nos._exit(7)",
    "raises": "1 / 0",
    "dies": "import ctypes; ctypes.string_at(0)",
    "loops": "print('looping', flush=True)\nwhile True: pass",
    "forks": "import os, signal\nif os.fork() == 0:\n    os.setsid()\n    signal.pause()",
    "allocates": "data = [bytearray(b'x') * (1 << 20) for _ in range(1024)]",
    "threads": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), name='leftover').start()",
}  # fmt: skip

# -- the kinds ----------------------------------------------------------------------------------------------------------------

SOON: Mapping[str, Any] = {"timeout": 1.5, "max_processes": 0, "max_memory": 512}
SLIM = {"max_memory": 32}
TIMED_OUT = r"SIGKILL: it ran longer than its timeout of 1\.5 s, and 0\.3 s after SIGTERM"
SEEN = r"(MemoryError: it has \d+ MiB, and its max_memory is 32 MiB \(seen after \d+\.\d\d s\))"
TOGETHER = r"MemoryError: its \d+ processes have \d+ MiB, and its max_memory is 32 MiB \(seen after \d+\.\d\d s\)"
TOO_MANY = r"TooManyProcesses: it has \d+ processes at once, and its max_processes is 20"
NO_MORE = r"MemoryError: \(max_memory of this job is 32 MiB\)"
CANNOT_ALLOCATE = r"OSError: \[Errno 12\] Cannot allocate memory \(max_memory of this job is 32 MiB\)"


EITHER: Mapping[str, Any] = {  # whoever comes first
    "ended_by": ("kernel", "supervisor"), "signal": ANY, "message": f"{NO_MORE}|{SEEN}", "stack": ANY,
}  # fmt: skip


def killed(name: str, *args: Any, **fields: Any) -> Bad:
    """Over its time, and deaf to SIGTERM."""
    told = {"cause": "timeout", "ended_by": "supervisor", "signal": "SIGKILL", "message": TIMED_OUT, "stack": f"in {name}"}
    late = {"exec": {"options": {**SOON, "timeout": 2.5}, "message": TIMED_OUT.replace("1\\.5", "2.5")}}
    return Bad(name, args, SOON, **{**told, "but": late, **fields})  # by exec, it has to import its module first


def bomb(how: str, **fields: Any) -> Bad:
    """`max_memory` is 32 MiB; and what is more is seen by the supervisor, unless `fields` say otherwise."""
    told = {"cause": "memory", "ended_by": "supervisor", "signal": "SIGKILL", "message": SEEN, "stack": "^$|in allocates"}
    return Bad("allocates", [how], SLIM, **{**told, "memory_mib": (32.0, 1400.0), **fields})


def refused(how: str, message: str = NO_MORE, **fields: Any) -> Bad:
    """The kernel gives it no more."""
    return bomb(how, ended_by="kernel", signal=None, message=message, stack="", **fields)


def ends(how: str, **fields: Any) -> Bad:
    return Bad("ends", [how], **fields)


def forger(how: str, why: str = "", **fields: Any) -> Bad:
    garbage = f"WireError: the job wrote garbage to KQueue's socket: {why}"
    told = {"cause": "exception", "ended_by": "supervisor", "message": garbage, "signal": ANY, "stack": ANY} if why else {}
    return Bad("forges", [how], **{**told, **fields})


def importer(module: str, **fields: Any) -> Bad:
    """It finds a bomb only when it runs."""
    return Bad("imports", [f"bomb_{module}"], **fields)


KINDS = {
    "fork bomb": [
        Bad("forks_many", [how], {"max_processes": 20}, cause="signal", ended_by="supervisor", signal="SIGKILL", message=TOO_MANY,
            stack="^$|in forks_many")
        for how in ("children", "orphans")
    ],
    "fork bomb that fights back": [killed("bombs", memory_mib=(4, 1400))],
    "memory, by a bytearray": [bomb("bytearray", **EITHER)],
    "memory, page by page": [bomb("pages", **EITHER)],
    "memory, in C": [refused("in C", memory_mib=(4, 400))],
    "memory, by a private mapping": [refused("private", CANNOT_ALLOCATE, memory_mib=(4, 400))],
    "memory, by a shared mapping": [bomb("shared")],
    "memory, by a file in memory": [bomb("memfd")],
    "memory, by a subprocess": [bomb("subprocess", message=TOGETHER)],
    "memory, by many": [bomb("forks", message=TOGETHER)],
    "CPU, in C": [
        killed("spins_in_c", cpu_s=(0.1, 3)),
        Bad("spins_in_c", (), {"max_cpu": 1}, cause="cpu", ended_by="kernel", signal="SIGXCPU", stack="in spins_in_c",
            cpu_s=(0.7, 3), message=r"SIGXCPU: it used \d\S* s of CPU, and its max_cpu is 1 s"),
    ],
    "CPU, and deaf": [
        killed("spins_and_listens_to_nobody", cpu_s=(0.1, 3)),
        Bad("spins_and_listens_to_nobody", (), {"max_cpu": 1}, ("fork", "exec"), cause="cpu", ended_by="kernel", signal="SIGKILL",
            cpu_s=(1.2, 4), message=r"SIGKILL: it used \d\S* s of CPU, and its max_cpu is 1 s"),
    ],
    "deaf": [
        killed("ignores_sigterm"), killed("stops_itself", stack=""), killed("ends", "a generator that never ends", stack=ANY),
    ],
    "daemon": [Bad("daemonises", result="nothing to see here")],
    "nothing left": [
        Bad("opens_files", (), {"max_files": 64}, cause="exception", stack="",
            message=r"OSError: .* Too many open files: '/dev/null' \(max_files of this job is 64\)"),
        Bad("has_no_fd_left", (), {"max_files": 64}, result="all taken"),
        Bad("has_no_memory_left", result="all taken"),
    ],
    "file too large": [
        Bad("fills_the_disk", [DIRECTORY], {"max_file_size": 2}, cause="exception",
            message=r"OSError: .* File too large \(max_file_size of this job is 2 MiB\)")
    ],
    "flood": [
        Bad("floods", ["without newlines"], result="flooded", output="spam spam", cpu_s=(0, 20), starts=["fork"]),
        Bad("floods", ["no text"], result="flooded", output="\ufffd\ufffd\\x00", cpu_s=(0, 20), starts=["exec"]),
        Bad("floods", ["with newlines"], result="flooded", output="spam\nspam", cpu_s=(0, 20)),
    ],
    "garbage": [
        forger("garbage", "a frame of kind 222 and length 3735928559"),
        forger("a huge length", "a frame of kind 19 and length 4294967295"),
        forger("an unknown kind", "a frame of kind 2 and length 3"),
    ],
    "worse garbage": [
        forger("not JSON", "EnvelopeError: .*"), forger("deep JSON", "EnvelopeError: .*"),
        forger("the end of another run", "the end of a run that is not this one"),
    ],
    "forged result": [forger("a result", result="forged"), forger("two results", result="forged")],
    "half a frame": [
        forger("half a frame")._replace(cause="exit", exit_code=0, but={"pool": {
            "options": SOON, "cause": "timeout", "ended_by": "supervisor", "signal": "SIGKILL", "message": TIMED_OUT,
            "exit_code": None, "stack": ""}})
    ],
    "no more to be heard": [
        forger("no more", cause="exit", exit_code=70, but={"pool": {"exit_code": 0}}),
        Bad("closes_its_pipe", cause="exit", exit_code=70, but={
            start: {"message": "WireError: the job has closed KQueue's socket"} for start in ("fork", "pool")}),
    ],
    "crash": [
        ends("segfault", cause="signal", ended_by="kernel", signal="SIGSEGV", stack="Segmentation fault.*in ends"),
        ends("abort", cause="signal", signal="SIGABRT", stack="Aborted.*in ends"),
        ends("SIGKILL", cause="signal", ended_by="operator", signal="SIGKILL", message="SIGKILL: killed by somebody else: .*"),
    ],
    "exit": [
        ends("sys.exit(3)", cause="exit", exit_code=3, message="SystemExit: 3"),
        ends("sys.exit(text)", cause="exit", exit_code=1, message="SystemExit: that was it"),
        ends("os._exit(0)", cause="exit", exit_code=0), ends("os._exit(9)", cause="exit", exit_code=9),
    ],
    "result": [
        ends("no JSON", cause="exception", message="TypeError: the result.* is of type object.*"),
        ends("too large", cause="exception", message="TypeError: the result is 2097154 bytes.*"),
        ends("SystemExit in a thread", result="fine"),
        ends("recursion", cause="exception", message=".*"),
    ],
    "killed template": [Bad("kills_its_parent", result="well behaved at last")],
    "imported late": [
        importer("exits", cause="exit", exit_code=7),
        importer("raises", cause="exception", message="ZeroDivisionError: .*"),
        importer("loops", cause="timeout", ended_by="supervisor", options={"timeout": 3},
                 message="JobTimedOut: .* longer than its timeout of 3 s"),
        importer("forks", result="imported"), importer("threads", result="imported"),
        importer("allocates", options=SLIM, cause="memory", memory_mib=(32, 1400), **EITHER),
    ],
    "no such command": [
        Bad("missing", starts=["exec"], cause="exit", exit_code=127,
            message=r"CommandNotRun: there is no program 'no-such-program-anywhere' on PATH .*")
    ],
}  # fmt: skip


ON_REDIS = ("fork bomb", "fork bomb that fights back", "memory, by many", "deaf", "daemon", "forged result", "killed template")


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_good_jobs_beside_it_are_done(zoo: Zoo, kind: str) -> None:
    zoo.hold_out(*KINDS[kind])


@pytest.mark.parametrize("kind", ON_REDIS)
def test_fifty_good_jobs_beside_it_are_done_on_redis(zoo_on_redis: Zoo, kind: str) -> None:
    zoo_on_redis.hold_out(*KINDS[kind])


def test_a_full_disk_is_the_job_s_alone(zoo: Zoo, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "kqueue-zoo", str(disk)]
    if os.getuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here; it takes root")
    try:
        full = Bad("fills_the_disk", [str(disk)], cause="exception", message=r"OSError: \[Errno 28\] No space left on device")
        zoo.hold_out(full)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


INLINE: Mapping[str, tuple[str, str, str]] = {  # how -> cause, ended_by, "Class: message"
    "raises": ("exception", "job", "LookupError: oh"),
    "sys.exit(3)": ("exit", "job", "SystemExit: 3"),
    "spins": ("timeout", "supervisor", r"JobBlocked: blocked the loop for 1[.\d]* s at .*/hostile_inline.py:\d+ in _spins.*"),
    "sleeps": ("timeout", "supervisor", r"JobBlocked: blocked the loop for 1[.\d]* s at .*/hostile_inline.py:\d+ in _sleeps.*"),
    "grows": ("memory", "supervisor", ".*max_memory.*"),
    "yields nonsense": ("exception", "job", "TypeError: .*"),
    "no JSON": ("exception", "job", "TypeError: .*"),
    "too large": ("exception", "job", "TypeError: the result is 2097154 bytes.*"),
}


def test_inline_ones_among_fifty_good(make: Any) -> None:
    """But for a loop in C, which nothing can interrupt: that is said in docs/operating.md."""
    zoo = make()
    zoo.start()
    zoo.warm_up()
    before = zoo.pid
    good = zoo.good(GOOD // 2)
    handles = {how: zoo.send("hostile_inline", how, max_memory=32) for how in INLINE}
    good += zoo.good(GOOD - GOOD // 2, GOOD // 2)
    zoo.praise_when_done(good)
    for handle in handles.values():
        assert handle.wait(PATIENCE_S), [handle, *zoo.log[-50:]]
    zoo.wait_calm(zoo.fds)
    for how, told in zip(handles, zoo.show([*handles.values()]), strict=True):
        (certificate,) = told["certificates"]
        cause, ended_by, message = INLINE[how]
        error = certificate["error"]
        text = f"{error['class']}: {error['message']}"
        assert (certificate["cause"], certificate["ended_by"]) == (cause, ended_by), (how, certificate)
        assert re.fullmatch(message, text, re.DOTALL), (how, text)
        (line,) = zoo.logged(told["id"], ("job done", "job dead"))
        assert (line["strategy"], line["cause"]) == ("inline", cause)
    assert (zoo.pid, zoo.stop()) == (before, 0)


# -- when the daemon starts, and when its code changes -------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Zoo]]:
    """Daemons of a test's own."""
    made: list[Zoo] = []

    def make(modules: str = "", isolated: str = "", **settings: Any) -> Zoo:
        write_bombs(tmp_path)
        made.append(Zoo(tmp_path, f"sqlite:///{tmp_path}/queue.db", isolated, **settings))
        text = made[-1].config.read_text()
        made[-1].config.write_text(text.replace("[tests.apps.hostile]", f"[{modules}tests.apps.hostile]"))
        return made[-1]

    yield make
    for zoo in made:
        zoo.close()


@pytest.mark.parametrize(
    ("bomb", "why"),
    [("exits", "exited with status 7"), ("raises", "ZeroDivisionError"), ("dies", "killed by SIGSEGV")],
)
def test_a_module_that_goes_off_at_the_start_is_named_and_costs_no_job_anything(make: Any, bomb: str, why: str) -> None:
    zoo = make(f"bomb_{bomb}, ")
    good = [zoo.send("good_fork", n) for n in range(GOOD)]
    before = tree(os.getpid())
    assert zoo.run() == 2
    told = "\n".join(zoo.log)
    assert why in told
    assert f"bomb_{bomb}" in told or bomb != "raises"
    wait_until(lambda: not left_since(before), lambda: [describe(pid) for pid in left_since(before)])
    zoo.config.write_text(zoo.config.read_text().replace(f"bomb_{bomb}, ", ""))
    zoo.start()
    zoo.praise_when_done(good)
    assert zoo.stop() == 0


@pytest.mark.parametrize("bomb", ["forks", "allocates", "threads"])
def test_a_module_that_leaves_something_at_the_start_harms_no_job(make: Any, bomb: str) -> None:
    before = tree(os.getpid())
    zoo = make(f"bomb_{bomb}, ", ", memory_budget: 4GiB")
    zoo.start()
    zoo.praise_when_done(zoo.good(GOOD))
    if bomb == "threads":
        zoo.wait_log("thread 'leftover'")
    assert zoo.stop() == 0
    wait_until(lambda: not left_since(before), lambda: [describe(pid) for pid in left_since(before)])


def test_a_module_whose_import_never_ends_is_waited_for_and_can_be_interrupted(make: Any) -> None:
    before = tree(os.getpid())
    zoo = make("bomb_loops, ")
    zoo.start(wait=False)
    zoo.wait_log("looping")
    assert zoo.stop() == 0
    wait_until(lambda: not left_since(before), lambda: [describe(pid) for pid in left_since(before)])


VANISHING = """
from kqueue import job

@job(name="vanishing", start="START", keep_result=600)
def vanishing():
    return "still here"
"""


@pytest.mark.parametrize("start", STARTS)
def test_a_job_whose_class_is_gone_when_its_time_comes_is_named(make: Any, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # two versions within a second would share one .pyc
    zoo = make("changing, ")
    code = zoo.directory / "changing.py"
    code.write_text(VANISHING.replace("START", start))
    zoo.config.write_text(zoo.config.read_text().replace("commands:", "unknown: bury, commands:"))
    zoo.start()
    assert zoo.send("vanishing").result(PATIENCE_S) == "still here"
    zoo.signal(signal.SIGSTOP)
    good, bad = zoo.good(GOOD // 2), zoo.send("vanishing")
    good += zoo.good(GOOD - GOOD // 2, GOOD // 2)
    code.write_text("")
    zoo.signal(signal.SIGHUP)
    zoo.signal(signal.SIGCONT)
    zoo.wait_log("template replaced")
    zoo.praise_when_done(good)
    assert bad.wait(PATIENCE_S)
    (told,) = zoo.show([bad])
    if told["state"] == "done":  # it was a little faster than the new code
        assert told["result"] == "still here"
        bad = zoo.send("vanishing")
        assert bad.wait(PATIENCE_S)
        (told,) = zoo.show([bad])
    (certificate,) = told["certificates"]
    assert (told["state"], certificate["cause"]) == ("dead", "refused"), certificate
    assert "'vanishing'" in certificate["error"]["message"]
    assert zoo.stop() == 0


# -- limits below what the template needs ------------------------------------------------------------------------------------


def test_a_host_that_allows_less_than_the_template_has_is_named_by_each_job(make: Any) -> None:
    zoo = make()
    zoo.start()
    wait_until(lambda: len(children_of(zoo.template())) == 1, lambda: "it has no spare child")
    for pid in (zoo.template(), *children_of(zoo.template())):
        resource.prlimit(pid, resource.RLIMIT_DATA, (1 << 20, 1 << 20))
    good = zoo.dispatch(*[bound("good_inline", n) for n in range(GOOD)])
    bad = [zoo.send(f"hostile_ends_{start}", str(zoo.place()), "no JSON") for start in ("fork", "exec")]
    for handle in bad:
        assert handle.wait(PATIENCE_S)
    for told in zoo.show(bad):
        (certificate,) = told["certificates"]
        assert (certificate["cause"], certificate["exit_code"]) == ("exit", 70)
        why = r"RLIMIT_DATA of this service is 1 MiB, and the template has \d+ MiB: raise it"
        assert re.search(why, certificate["error"]["message"])
    zoo.praise_when_done(good)
    assert zoo.stop() == 0


def test_memory_in_which_no_interpreter_starts_costs_that_job_only(make: Any) -> None:
    """By exec; a fork has what its template has, and its `max_memory` above that."""
    zoo = make(isolated=", memory_headroom: 0")
    zoo.start()
    zoo.warm_up()
    why = "Refused: a new interpreter takes .* MiB, and max_memory of 1 MiB and isolated.memory_headroom of 0 MiB are less.*"
    no_room = Bad("ends", ["SystemExit in a thread"], {"max_memory": 1}, cause="refused", ended_by="supervisor", message=why)
    # Itself it takes about 1 MiB, which would be seen if the host is slow; a new interpreter takes more than 4.
    small = Bad("ends", ["no JSON"], {"max_memory": 4}, cause="exception", message="TypeError: .*")
    zoo.hold_out(no_room._replace(starts=["exec"]), small._replace(starts=["fork", "pool"]))
    assert zoo.stop() == 0


# -- under another user ---------------------------------------------------------------------------------------------------------


def test_another_user_s_job_can_do_nothing_to_the_supervisor_nor_to_the_template(make: Any) -> None:
    """Not by exec: nobody says that this user may read the interpreter of the tests."""
    if "isolated.user" in NOT_YET or os.getuid() != 0:
        pytest.skip("isolated.user is not to be had here; it takes root")
    zoo = make(isolated=", user: nobody")
    zoo.start()
    zoo.warm_up()
    refused = {**dict.fromkeys(ATTACKS, "EPERM"), **dict.fromkeys(("memory", "environment", "fds"), "EACCES")}
    jobs = [Bad("attacks", [pid], result=refused, starts=["fork", "pool"]) for pid in (zoo.pid, zoo.template())]
    zoo.hold_out(*jobs)
    assert zoo.stop() == 0
