"""Jobs that start by exec: commands without a shell, and Python in an interpreter of its own. Real processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kqueue import BoundJob, KQueueRuntime, events
from kqueue.codec import Envelope, encode, from_json, unpack
from kqueue.commands import MAX_ARGUMENT, Command
from kqueue.config import Config
from kqueue.config_file import load_config, make_config
from kqueue.dispatch import NewJob, describe, prepare, undescribe
from kqueue.errors import ConfigError, UsageError
from kqueue.loading import template_config
from kqueue.options import DispatchOptions
from kqueue.registry import Parameters, registry
from tests.apps import fresh, fresh_bad
from tests.daemon import Daemon, tree, wait_gone
from tests.test_isolated import ROOT, Bench, Noting, Ran

SHOW = "import json, os, sys; print(json.dumps([os.fsencode(a).hex() for a in sys.argv[1:]]))"
BOTH = "import json, sys; print(json.dumps([sys.argv[1], json.load(sys.stdin)]))"
KEPT = {"keep_result": 60.0}


def python(name: str, code: str, *arguments: str, **fields: Any) -> Command:
    options = {**KEPT, "max_memory": 256, **fields.pop("options", {})}
    code = code.replace("{", "{{").replace("}", "}}")
    return Command(name, (sys.executable, "-c", code, *arguments), options=options, **fields).checked()


COMMANDS = [
    python("exec_show", SHOW, "{a}", "x{b}y{a}z", "{{a}}", "--", "{b}", result="json"),
    python("exec_stdin", "import sys; sys.stdout.write(sys.stdin.read())", stdin="json", result="json"),
    python("exec_both", BOTH, "{size}", stdin="json", result="json"),
    Command("exec_missing", ("no-such-program-anywhere", "{a}"), options=KEPT),
    Command("exec_not_executable", ("/etc/passwd",)),
    Command("exec_sh", ("/bin/sh", "-c", "exit $1", "sh", "{status}")),
    Command("exec_signal", ("/bin/sh", "-c", "kill -$1 $$", "sh", "{number}")),
    Command("exec_garbage", ("/usr/bin/printf", "\\377\\376 no text\\n")),
    Command("exec_hangs", ("/bin/sleep", "1000"), options={"timeout": 0.3}),
    Command("exec_stubborn", ("/bin/sh", "-c", "trap '' TERM; echo $$; while :; do sleep 1000; done"), options={"timeout": 0.3}),
    Command("exec_not_json", ("/bin/echo", "{text}"), result="json"),
    python("exec_large", "import sys; print('\"' + 'x' * int(sys.argv[1]) + '\"')", "{size}", result="json"),
    python("exec_eats", "x = b'x' * 400_000_000", options={"max_memory": 32}),
    python("exec_burns", "while True: pass", options={"max_cpu": 1}),
    python("exec_chatty", "import sys\nfor i in range(3): print(i)\nprint('last words', file=sys.stderr); sys.exit(9)"),
    python(
        "exec_about",
        "import json, os; s = dict(l.split(':', 1) for l in open('/proc/self/status')); print(json.dumps({"
        "'fds': sorted(map(int, os.listdir('/proc/self/fd'))), 'stdin': os.readlink('/proc/self/fd/0'), "
        "'ignored': s['SigIgn'].strip(), 'blocked': s['SigBlk'].strip(), 'privs': s['NoNewPrivs'].strip(), "
        "'id': os.environ['KQUEUE_JOB_ID'], 'sid': os.getsid(0), 'pid': os.getpid(), "
        "'secrets': [n for n in os.environ if n.startswith('KQUEUE_URL')]}))",
        result="json",
    ),
]  # fmt: skip


class ExecBench(Bench):
    def runtime(self, kill_grace_s: float = 0.3) -> KQueueRuntime:
        modules = ["tests.apps.fresh", "tests.apps.fresh_bad"]
        runtime = KQueueRuntime(
            Noting(self.store, self.settled), template=template_config([ROOT], [], modules), commands=COMMANDS,
            kill_grace_s=kill_grace_s, security=self.security,
        )  # fmt: skip
        for kind in (events.JobEnded, events.JobOutput, events.Warned):
            runtime.events.subscribe(kind, self.facts.append)
        return runtime

    def ran(self, *jobs: BoundJob | NewJob) -> list[Ran]:
        runtime = self.runtime()
        prepared = [each if isinstance(each, NewJob) else prepare(each, registry.get(each.name)) for each in jobs]
        self.client.enqueue(prepared)
        assert runtime.run(burst=True, handle_signals=False) == 0
        last = {fact.id: fact for fact in self.of(events.JobEnded)}
        rows = [self.client.show(job.id) for job in prepared]
        results = [unpack(from_json(row.result)) if row and row.result else None for row in rows]
        return [Ran(last[job.id], result) for job, result in zip(prepared, results, strict=True)]

    def command(self, name: str, *args: Any, **kwargs: Any) -> Ran:
        self.runtime().kernel.close()  # makes its commands known
        return self.ran(bound(name, *args, **kwargs))[0]


def bound(name: str, *args: Any, **kwargs: Any) -> BoundJob:
    return BoundJob(f"exec_{name}", args, kwargs)


def forged(name: str, *args: Any, **kwargs: Any) -> NewJob:
    """As something that does not check would enqueue it."""
    id = f"forged-{name}-{len(kwargs)}-{len(args)}"
    envelope = encode(Envelope(id=id, job=f"exec_{name}", args=args, kwargs=kwargs, lane="isolated"))
    return NewJob(id, "default", "isolated", 0, envelope)


@pytest.fixture
def bench() -> Iterator[ExecBench]:
    fds, children = len(os.listdir("/proc/self/fd")), tree(os.getpid())
    yield ExecBench()
    assert len(os.listdir("/proc/self/fd")) == fds, "an fd was left open"
    assert tree(os.getpid()) == children, "a child or a zombie was left"


# -- templates --------------------------------------------------------------------------------------------------------------


NASTY = [
    "", " ", "a b", "-rf", "--help", "--", "-", "$HOME", "$(reboot)", "`id`", ";ls", "| cat", "&& true", "> /tmp/x", "*", "~",
    "\n", "a\nb", "\t", "\r\n", "'", '"', "\\", "\\n", "{a}", "{b}", "{{a}}", "{", "}", "%s", "\x01\x7f", "ünïcödé", "日本語",
    "🎉", "\u202e", "\ufeff", "a" * 60_000,
]  # fmt: skip


def random_texts() -> list[str]:
    random = Random(4)
    alphabet = "".join(NASTY[:-1]) + "".join(chr(random.randrange(1, 0xD800)) for _ in range(200))
    return ["".join(random.choices(alphabet, k=random.randrange(60))) for _ in range(200)]


def test_no_argument_breaks_a_template() -> None:
    command = COMMANDS[0]
    for a in [*NASTY, *random_texts()]:
        for b in ("plain", "{a}", a):
            argv = command.argv({"a": a, "b": b})
            as_bytes = [text.encode() for text in (a, f"x{b}y{a}z", "{a}", "--", b)]
            assert argv[3:] == as_bytes


def test_a_process_gets_each_argument_as_it_is(bench: ExecBench) -> None:
    bench.runtime().kernel.close()
    texts = [*NASTY, *random_texts()[:40]]
    ran = bench.ran(*[bound("show", text, "b") for text in texts])
    for text, each in zip(texts, ran, strict=True):
        wanted = [text, f"xby{text}z", "{a}", "--", "b"]
        assert each.result == [part.encode().hex() for part in wanted], (text, each.ended)


@pytest.mark.parametrize(
    ("part", "names"),
    [("{a}", ["a"]), ("x{a}{b}{a}", ["a", "b", "a"]), ("{{a}}", []), ("{{{a}}}", ["a"]), ("a", []), ("", []), ("{_a1}", ["_a1"])],
)
def test_what_a_placeholder_is(part: str, names: list[str]) -> None:
    from kqueue.commands import placeholders

    assert placeholders(part) == names


NO_PLACEHOLDERS = ["{", "}", "{}", "{0}", "{a", "a}", "{a b}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{{a}", "{ a }", "{ä}"]


@pytest.mark.parametrize("part", NO_PLACEHOLDERS)
def test_what_no_placeholder_is(part: str) -> None:
    with pytest.raises(UsageError, match="a placeholder is a name in braces"):
        Command("x", ("echo", part)).checked()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (Command("x", ()), "needs at least the program"), (Command("x", ("{a}", "b")), "must not depend on the arguments"),
        (Command("x", ("a{b}",)), "must not depend on the arguments"), (Command("x", ("a", "b\0")), "NUL"),
        (Command("x", ("a", "b" * 20_000)), "characters at the most"),
    ],
)  # fmt: skip
def test_what_no_command_is(command: Command, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        command.checked()


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ([], {}, "it lacks 'src', 'size'"), (["a"], {}, "it lacks 'size'"),
        (["a", 1, 2], {}, "it takes 2 arguments without a name"), (["a"], {"src": "b", "size": 1}, "'src' twice"),
        ([], {"src": "a", "size": 1, "siz": 2}, "it takes no 'siz' (did you mean"),
        (["a", None], {}, "argument 'size' must be a text or a number for a command, not NoneType"),
        (["a", [1]], {}, "not list"), (["a", {"b": 1}], {}, "not dict"), (["a\0b", 1], {}, "argument 'src' has a NUL"),
        (["\ud800", 1], {}, "half of a surrogate pair"), (["a" * (MAX_ARGUMENT + 1), 1], {}, "one of a process may have 131071"),
        (["a", float("inf")], {}, "not float"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_at_dispatch(args: list[Any], kwargs: dict[str, Any], message: str) -> None:
    registration = Command("exec_thumb", ("convert", "{src}", "-resize", "{size}")).registration()
    known = undescribe(json.loads(json.dumps(describe(registration))))  # as a client has it, from the manifest
    for each in (registration, known):
        with pytest.raises((UsageError, TypeError)) as caught:
            prepare(BoundJob("exec_thumb", args, kwargs), each)
        assert message in str(caught.value)
        assert "command 'exec_thumb'(src, size)" in str(caught.value)


def test_a_manifest_tells_what_a_command_takes() -> None:
    registration = COMMANDS[2].registration()
    known = undescribe(json.loads(json.dumps(describe(registration))))
    assert known.parameters == Parameters(("size",), more=True)
    assert known.signature == "(size, **more)"
    assert sys.executable not in json.dumps(describe(registration)), "what it runs is the operator's own business"


# -- running ----------------------------------------------------------------------------------------------------------------


def test_arguments_by_name_by_place_and_of_any_plain_kind(bench: ExecBench) -> None:
    assert bench.command("show", b=1.5, a=True).result[0] == b"true".hex()
    assert bench.command("show", -3, "x").result[0] == b"-3".hex()


def test_arguments_on_stdin(bench: ExecBench) -> None:
    large = {"a": "ü" * 300_000, "list": [1, None, {"b": []}]}
    assert bench.command("stdin", **large).result == large
    assert bench.command("both", "10x10", other=[1]).result == ["10x10", {"size": "10x10", "other": [1]}]


def test_a_command_is_set_up_as_any_child(bench: ExecBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KQUEUE_URL", "redis://:secret@127.0.0.1/0")
    ran = bench.command("about")
    me = ran.result
    assert [fd for fd in me["fds"] if fd > 3] == [], "nothing inherited; 3 is the listing itself"
    assert me["stdin"] == "/dev/null"
    ignored = {number for number in range(1, 65) if int(me["ignored"], 16) >> number - 1 & 1}
    assert ignored <= {13, 25, 32, 33}, "SIGPIPE and SIGXFSZ by Python, which runs there; 32 and 33 are the C library's own"
    assert int(me["blocked"], 16) == 0
    assert me["privs"] == "1"
    assert me["id"] == ran.ended.id
    assert me["sid"] == me["pid"] == ran.ended.outcome.pid
    assert me["secrets"] == []


def test_a_closed_pipe_ends_a_command_as_it_would_in_a_shell(bench: ExecBench) -> None:
    bench.runtime().kernel.close()
    registry.add(Command("exec_pipe", ("/bin/sh", "-c", "yes | head -1; exit 0")).registration())
    COMMANDS.append(Command("exec_pipe", ("/bin/sh", "-c", "yes | head -1; exit 0")))
    try:
        (ran,) = bench.ran(bound("pipe"))
    finally:
        COMMANDS.pop()
    assert (ran.ended.outcome.cause, ran.ended.outcome.output) == ("ok", "y\n")


@pytest.mark.parametrize(
    ("name", "args", "cause", "code", "detail"),
    [
        ("sh", [0], "ok", 0, "ok"),
        ("sh", [3], "exit", 3, "CommandFailed: exec_sh exited with status 3"),
        ("missing", ["x"], "exit", 127, "CommandNotRun: there is no program 'no-such-program-anywhere' on PATH ("),
        ("not_executable", [], "exit", 127, "CommandNotRun: there is no program '/etc/passwd' that this user may run"),
        ("signal", ["USR1"], "signal", None, "signal: SIGUSR1"),
        ("signal", ["KILL"], "signal", None, "signal: SIGKILL"),
        ("signal", ["TERM"], "signal", None, "signal: SIGTERM"),
        ("hangs", [], "timeout", None, "timeout: SIGTERM"),
        ("stubborn", [], "timeout", None, "timeout: SIGKILL"),
        ("not_json", ["{nope"], "exception", 0, "ResultNotJSON: what exec_not_json printed is no result"),
        ("large", [2_000_000], "exception", 0, "more than 1048576 bytes"),
        ("eats", [], "exit", 1, "MemoryError"),
        ("burns", [], "cpu", None, "cpu: SIGXCPU"),
        ("chatty", [], "exit", 9, "exec_chatty exited with status 9: last words"),
    ],
)
def test_each_end_of_a_command_has_its_cause(
    bench: ExecBench, name: str, args: list[Any], cause: str, code: int | None, detail: str
) -> None:
    ended = bench.command(name, *args).ended
    assert (ended.outcome.cause, ended.outcome.exit_code) == (cause, code), ended
    assert detail in ended.outcome.summary()
    assert ended.then == ("done" if cause == "ok" else "retry")
    counters = bench.settled[-1].counters
    assert (counters.attempts, counters.crashes) == {"ok": (0, 0), "signal": (0, 1)}.get(cause, (1, 0))


def test_a_command_that_is_not_there_costs_its_own_job_only(bench: ExecBench) -> None:
    bench.runtime().kernel.close()
    missing, good = bench.ran(bound("missing", "x"), bound("show", "a", "b"))
    assert missing.ended.outcome.exit_code == 127
    assert good.ended.outcome.ok


def test_a_result_may_be_as_large_as_any(bench: ExecBench) -> None:
    assert bench.command("large", 1_000_000).result == "x" * 1_000_000


def test_output_that_is_not_utf_8_is_shown_all_the_same(bench: ExecBench) -> None:
    ran = bench.command("garbage")
    assert ran.ended.outcome.ok
    assert ran.ended.outcome.output == "\ufffd\ufffd no text\n"


def test_a_killed_command_is_gone_with_what_it_started(bench: ExecBench) -> None:
    before = set(tree(os.getpid()))  # servers of other tests
    seen: list[int] = []
    runtime = bench.runtime()
    runtime.events.subscribe(events.JobOutput, lambda fact: seen.extend(set(tree(os.getpid())) - before))
    bench.client.enqueue([prepare(bound("stubborn"), registry.get("exec_stubborn"))])
    assert runtime.run(burst=True, handle_signals=False) == 0
    assert len(seen) >= 2
    wait_gone(seen)


@pytest.mark.parametrize(
    ("job", "detail"),
    [
        (forged("show"), "it lacks 'a', 'b'"), (forged("show", "a", "b", c=1), "it takes no 'c'"),
        (forged("show", ["a"], "b"), "not list"), (forged("show", "a\0", "b"), "NUL"),
        (forged("show", *(["x" * 100_000] * 2)), "one of a process may have 131071"),
    ],
)  # fmt: skip
def test_arguments_that_nobody_checked_are_refused_at_run(bench: ExecBench, job: NewJob, detail: str) -> None:
    (ran,) = bench.ran(job)
    assert (ran.ended.outcome.cause, ran.ended.then) == ("refused", "dead")
    assert "the arguments do not fit command 'exec_show': " in ran.ended.outcome.summary()
    assert detail in ran.ended.outcome.summary()


def test_more_arguments_than_a_process_takes_are_refused(bench: ExecBench) -> None:
    command = Command("exec_many", ("/bin/true", *["{a}"] * 40))
    COMMANDS.append(command)
    try:
        bench.runtime().kernel.close()
        (ran,) = bench.ran(bound("many", "x" * 130_000))
    finally:
        COMMANDS.pop()
    assert (ran.ended.outcome.cause, ran.ended.then) == ("refused", "dead")
    assert "too long for a process" in ran.ended.outcome.summary()


# -- Python -----------------------------------------------------------------------------------------------------------------


def test_a_python_job_has_an_interpreter_of_its_own(bench: ExecBench) -> None:
    first, second = bench.ran(fresh.about.job(), fresh.about.job())
    me = first.result
    assert me["imported_for"] == me["id"] == first.ended.id, "imported anew, for this job"
    assert me["seen"] == [me["pid"]]
    assert me["pid"] == me["sid"] == first.ended.outcome.pid != second.result["pid"]
    assert [fd for fd in me["fds"] if fd > 5] == [], "its own, the pipe for its stack, and the listing itself"
    assert (me["stdin"], me["core"], me["no_new_privs"], me["sigint"]) == ("/dev/null", [0, 0], True, True)
    assert me["modules"] == [], "nothing but its own module"
    assert me["title"].startswith(f"kqueued: job fresh_about {me['id']}")
    assert me["data"] == (50 + 128) << 20, "counted from nothing, since it began with nothing"


def test_generators_and_coroutines_start_by_exec_too(bench: ExecBench) -> None:
    by_asyncio, by_traps = bench.ran(fresh.runs_under_asyncio.job(), fresh.generator.job())
    assert by_asyncio.result == "_UnixSelectorEventLoop"
    assert [bench.client.show(id).state for id in by_traps.result] == ["delayed", "delayed"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "cause", "detail", "output"),
    [
        ("hangs", "timeout", "JobTimedOut: fresh_hangs ran longer than its timeout of 1 s", "cleaned up\n"),
        ("eats", "memory", "MemoryError", ""), ("dies", "signal", "SIGSEGV", ""),
    ],
)  # fmt: skip
def test_a_python_job_ends_as_a_forked_one(bench: ExecBench, name: str, cause: str, detail: str, output: str) -> None:
    (ran,) = bench.ran(getattr(fresh, name).job())
    assert ran.ended.outcome.cause == cause
    assert detail in ran.ended.outcome.summary()
    assert ran.ended.outcome.output == output


def test_a_module_that_cannot_be_imported_again_fails_its_own_jobs(bench: ExecBench) -> None:
    bad, good = bench.ran(fresh_bad.never.job(), fresh.about.job())
    assert (bad.ended.outcome.cause, bad.ended.then) == ("exception", "retry")
    assert "ImportFailed: module 'tests.apps.fresh_bad' raised at import: LookupError: not twice" in bad.ended.outcome.summary()
    assert good.ended.outcome.ok


# -- configuration ------------------------------------------------------------------------------------------------------------

YAML = """\
jobs:
  commands:
    thumbnail:
      command: [convert, "{src}", -resize, "{size}", --, "{dst}"]
      timeout: 1m
      max_memory: 256MiB
      queue: mail
      priority: 5
    tool: {command: [./bin/tool], stdin: json, result: json, keep_result: 1h, max_attempts: 1, max_cpu: 10}
"""


def test_commands_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "kqueue.yaml").write_text(YAML)
    config = load_config(str(tmp_path / "kqueue.yaml"), {})
    thumbnail, tool = config.jobs.commands
    assert thumbnail.parameters == Parameters(("src", "size", "dst"))
    options = thumbnail.registration().options
    assert (options.timeout, options.max_memory, options.queue, options.priority, options.start) == (60, 256, "mail", 5, "exec")
    assert tool.command == (f"{tmp_path}/bin/tool",) or tool.command == (f"{tmp_path}/./bin/tool",)
    assert (tool.stdin, tool.result, tool.registration().options.keep_result) == ("json", "json", 3600)
    assert Config.from_plain(json.loads(json.dumps(config.to_plain()))) == config
    assert make_config({"jobs": {"commands": {"a": {"command": ["b"]}}}}).jobs.commands[0].name == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]", "1: jobs.commands must be a mapping of names to commands"),
        ("{a: [b]}", "1: jobs.commands.a must say its command"),
        ("{a: {timeout: 5}}", "1: jobs.commands.a must say its command"),
        ("{a: {command: b}}", "1: jobs.commands.a.command must be a list"),
        ("{a: {command: []}}", "1: jobs.commands.a.command: a command needs at least the program"),
        ("{a: {command: [b, 5]}}", "1: jobs.commands.a.command.1 must be a text, not 5: put quotes around it"),
        ('{a: {command: [b, "{"]}}', "1: jobs.commands.a.command: '{': a placeholder is a name in braces"),
        ('{a: {command: ["{b}"]}}', "1: jobs.commands.a.command: '{b}': which program runs must not depend"),
        ("{a: {command: [b], stdin: text}}", "1: jobs.commands.a.stdin must be none or json, not 'text'"),
        ("{a: {command: [b], shell: true}}", '1: unknown setting "jobs.commands.a.shell"'),
        ("{a: {command: [b], timeot: 5}}", '1: unknown setting "jobs.commands.a.timeot" (did you mean "timeout"?)'),
        ("{a: {command: [b], max_memory: 0}}", "1: jobs.commands.a.max_memory must be a size of at least 1MiB"),
        ("{a: {command: [b], priority: 500}}", "1: jobs.commands.a.priority must be an integer from -100 to 100"),
    ],
)
def test_what_is_wrong_with_a_command_is_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "kqueue.yaml").write_text(f"jobs: {{commands: {text}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "kqueue.yaml"), {})
    assert f"kqueue.yaml:{message}" in str(caught.value)


# -- the daemon -------------------------------------------------------------------------------------------------------------


def test_commands_by_the_daemon_and_the_command_line(tmp_path: Path) -> None:
    commands = json.dumps(
        {
            "say": {"command": ["/bin/echo", "{text}"], "keep_result": 60},
            "list": {"command": [sys.executable, "-c", SHOW, "--", "{a}"], "result": "json", "keep_result": 60},
            "gone": {"command": ["no-such-thing"]},
        }
    )
    daemon = Daemon(tmp_path, f"sqlite:///{tmp_path}/kqueue.db", isolated_modules=f"[], commands: {commands}", modules="[]")
    try:
        checked = daemon.run_check()
        assert checked.returncode == 0, checked.stderr
        assert "warning: there is no program 'no-such-thing' here; job 'gone' will fail" in checked.stderr
        assert "list" in checked.stdout
        daemon.start()
        done = daemon.kqueue("dispatch", "list", "--args", '{"a": "-x y"}', "--wait", "--json")
        assert json.loads(done.stdout)["result"] == [b"--".hex(), b"-x y".hex()]
        refused = daemon.kqueue("dispatch", "say", "--args", '{"txt": "hello"}')
        assert refused.returncode != 0
        assert "command 'say'(text): it lacks 'text'" in refused.stderr
        bound = BoundJob("say", (), {"text": "hello"}, DispatchOptions())
        (handle,) = daemon.dispatch(bound)
        assert handle.wait(20)
        assert "hello" in daemon.wait_log("hello")
        assert daemon.stop() == 0
    finally:
        daemon.close()
