"""Whom jobs run as, what they see of the daemon and of the host, and how far they get against either. By real daemons, and /proc.

Most of it takes root: users of their own, and namespaces. `nobody` and `daemon` are users that every Debian has.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kqueue import BoundJob, JobFailed, JobHandle, environment
from kqueue.client.handle import Handle
from kqueue.codec import decode, encode
from kqueue.dispatch import NewJob, prepare
from kqueue.errors import UsageError
from kqueue.execution.privileges import Privileges
from kqueue.options import DispatchOptions, JobOptions, dispatch_options
from tests.apps import privileged
from tests.daemon import PATIENCE_S, ROOT, Daemon, alive, tree, wait_gone

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
NOBODY, DAEMON = pwd.getpwnam("nobody"), pwd.getpwnam("daemon")
SITE = sysconfig.get_path("purelib")


def python_runs_for_nobody() -> bool:
    """Whether they may run another Python with what is installed for this one."""
    code = f"import sys; sys.path[:0] = {[SITE, str(ROOT)]!r}; import kqueue.runtime, kqueue.cli.front, setproctitle"
    command = [privileged.PYTHON, "-I", "-c", code]
    try:
        return subprocess.run(command, user="nobody", extra_groups=[], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def unprivileged() -> Any:
    reason = f"no user nobody who may run {privileged.PYTHON} with what is installed for {sys.executable}"
    usable = os.geteuid() == 0 and sys.version_info[:2] == _version(privileged.PYTHON) and python_runs_for_nobody()
    return pytest.mark.skipif(not usable, reason=reason)


def _version(python: str) -> tuple[int, ...]:
    if not os.path.exists(python):
        return ()
    code = "import sys; print(*sys.version_info[:2])"
    return tuple(map(int, subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split()))


class Place(Daemon):
    """A daemon with the privileged jobs. `isolated`: more settings of that section; `extra`: variables that it has."""

    def __init__(self, directory: Path, isolated: str = "", *, extra: Mapping[str, str] | None = None, **settings: Any) -> None:
        fields = {"modules": "[]", "isolated_modules": "[tests.apps.privileged]", **settings}
        super().__init__(directory, f"sqlite:///{directory}/queue.db", **fields)
        self._extra = extra or {}
        text = self.config.read_text()
        assert "kill_grace: 500ms" in text
        self.config.write_text(text.replace("kill_grace: 500ms", f"kill_grace: 500ms{isolated and ', '}{isolated}"))

    @property
    def environment(self) -> Mapping[str, str]:
        return {**super().environment, "PYTHONPATH": str(ROOT), **self._extra}

    def ask(self, name: str, *args: Any) -> JobHandle:
        return self.dispatch(BoundJob(name, args, {}, DispatchOptions()))[0]

    def result(self, name: str, *args: Any) -> Any:
        return self.ask(name, *args).result(PATIENCE_S)

    def refused(self, name: str, *args: Any) -> str:
        """Why the job is dead, which it has to be."""
        with pytest.raises(JobFailed) as death:
            self.result(name, *args)
        return str(death.value)

    @property
    def template(self) -> int:
        (pid,) = map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())
        return pid


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def status_of(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


Make = Callable[..., Place]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Make]:
    """Makes a Place in a directory of its own, which ends with the test."""
    made: list[Place] = []

    def make(*args: Any, **settings: Any) -> Place:
        directory = tmp_path / str(len(made))
        directory.mkdir()
        made.append(Place(directory, *args, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def place_of_nobody() -> Iterator[Make]:
    """Makes a Place whose daemon runs as nobody."""
    made: list[Place] = []
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(directory, NOBODY.pw_uid, NOBODY.pw_gid)
    directory.chmod(0o755)

    def make(*args: Any, extra: Mapping[str, str] | None = None, **settings: Any) -> Place:
        made.append(Place(directory, *args, extra={"PYTHONPATH": f"{SITE}:{ROOT}", **(extra or {})}, **settings))
        made[-1].python, made[-1].user = privileged.PYTHON, (NOBODY.pw_uid, NOBODY.pw_gid)
        return made[-1]

    yield make
    for each in made:
        each.close()
    shutil.rmtree(directory)


def held(place: Place) -> tuple[int, Path, JobHandle]:
    """A job that runs until the file is there: its pid."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    handle = place.ask("holds", str(directory / "end"))
    deadline = PATIENCE_S
    while True:
        if found := [pid for pid in tree(place.pid) if cmdline(pid).startswith(b"kqueued: job holds ")]:
            return found[0], directory / "end", handle
        deadline -= 0.01
        assert deadline > 0, "the job never came"
        signal.sigtimedwait((), 0.01)


# -- users ------------------------------------------------------------------------------------------------------------------


@as_root
def test_a_job_runs_as_the_user_that_its_code_names_and_its_neighbours_do_not(place: Make) -> None:
    daemon = place().start()
    for name, user in (("of_nobody", NOBODY), ("pooled_nobody", NOBODY), ("of_daemon", DAEMON), ("pooled_daemon", DAEMON)):
        told = daemon.result(name)
        assert told["uids"] == [str(user.pw_uid)] * 4, "real, effective, saved, and of the file system"
        assert told["gids"] == [str(user.pw_gid)] * 4
        assert set(told["groups"]) == set(os.getgrouplist(user.pw_name, user.pw_gid)), "of the daemon's there is none"
        assert (told["capabilities"], told["no_new_privs"]) == (0, "1")
        assert (told["home"], told["user"], told["logname"]) == (user.pw_dir, user.pw_name, user.pw_name)
    for name in ("ordinary", "pooled_plain"):
        told = daemon.result(name)
        assert (told["uids"], told["user"]) == (["0"] * 4, os.environ.get("USER"))
    assert daemon.stop() == 0


@as_root
def test_seen_from_outside(place: Make) -> None:
    daemon = place("user: nobody, umask: '0027', nice: 5, directory: /").start()
    pid, end, handle = held(daemon)
    status = status_of(pid)
    assert status["Uid"].split() == [str(NOBODY.pw_uid)] * 4
    assert (status["NoNewPrivs"], status["Umask"], int(status["CapPrm"], 16)) == ("1", "0027", 0)
    assert os.getpriority(os.PRIO_PROCESS, pid) == 5
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "500"
    assert (os.getpgid(pid), os.getsid(pid)) == (pid, pid)
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    assert sorted(re.sub(r":.*", "", link) for link in links) == ["/dev/null", "pipe", "pipe", "pipe", "socket"]
    end.touch()
    assert handle.wait(PATIENCE_S)
    end.unlink()
    end.parent.rmdir()


@as_root
def test_there_is_no_way_back(place: Make) -> None:
    tried = place().start().result("tries_to_go_back")
    assert tried == {
        **dict.fromkeys(("setuid", "seteuid", "setresuid", "setgid", "setgroups"), "EPERM"),
        "hosts": "EACCES", "own environment": "done", "/dev/stdout": "done",
    }  # fmt: skip


@as_root
def test_a_user_for_all_holds_for_all_kinds_of_start(place: Make) -> None:
    commands = '{who: {command: [id], result: none}, who_daemon: {command: [id], user: daemon, group: nogroup}}'
    daemon = place("user: nobody, group: daemon", isolated_modules=f"[tests.apps.privileged], commands: {commands}").start()
    for name in ("ordinary", "pooled_plain"):
        told = daemon.result(name)
        assert (told["uids"], told["gids"]) == ([str(NOBODY.pw_uid)] * 4, [str(DAEMON.pw_gid)] * 4)
    assert daemon.result("of_daemon")["uids"] == [str(DAEMON.pw_uid)] * 4, "its own goes before"
    for name in ("who", "who_daemon"):
        assert daemon.ask(name).wait(PATIENCE_S)
    nogroup = grp.getgrnam("nogroup").gr_gid
    assert "job=who " in daemon.wait_log(f"uid={NOBODY.pw_uid}(nobody) gid={DAEMON.pw_gid}(daemon)")
    assert "job=who_daemon " in daemon.wait_log(f"uid={DAEMON.pw_uid}(daemon) gid={nogroup}(nogroup)")


@as_root
def test_calls_and_programs_of_a_job_are_of_its_user_and_network(place: Make) -> None:
    daemon = place().start()
    told = daemon.result("yields_as_nobody")
    assert (told["call"], told["program"]) == (NOBODY.pw_uid, NOBODY.pw_uid)
    assert told["network"] != os.readlink(f"/proc/{daemon.pid}/ns/net")
    assert daemon.stop() == 0


@as_root
def test_those_of_an_inline_job_are_of_the_user_for_all_since_it_can_name_none(place: Make) -> None:
    daemon = place("user: nobody", modules="[tests.apps.processes]").start()
    assert daemon.result("proc_runs", ["id", "-un"], {})["out"] == b"nobody\n"
    assert daemon.result("proc_runs_inline_async", ["id", "-un"], {})["out"] == b"nobody\n"
    assert daemon.result("proc_offloads_to", "user_of_process") == NOBODY.pw_uid
    assert daemon.stop() == 0


@as_root
def test_the_pool_shares_a_process_only_among_jobs_of_one_user(place: Make) -> None:
    daemon = place(more="pool: {size: 1}").start()
    names = ["pooled_nobody", "pooled_nobody", "pooled_daemon", "pooled_plain", "pooled_nobody", "pooled_plain", "pooled_plain"]
    told = [daemon.result(name) for name in names]
    by_pid: dict[int, set[str]] = {}
    for each in told:
        by_pid.setdefault(each["pid"], set()).add(each["uids"][0])
    assert all(len(users) == 1 for users in by_pid.values()), by_pid
    assert told[0]["pid"] == told[1]["pid"], "one of the same user goes on"
    assert told[5]["pid"] == told[6]["pid"]


@as_root
def test_what_cannot_be_costs_that_job_only_and_is_named(place: Make) -> None:
    daemon = place()
    checked = daemon.run_check()
    assert checked.returncode == 0
    for name in ("of_a_stranger", "pooled_stranger", "of_a_strange_group", "of_a_group_of_others"):
        assert f"warning: job {name!r} will be buried: " in checked.stderr
    assert "'of_nobody'" not in checked.stderr
    daemon.start()
    assert "there is no user 'no-such-user-here' on this host" in daemon.refused("of_a_stranger")
    assert "there is no user 'no-such-user-here' on this host" in daemon.refused("pooled_stranger")
    assert "there is no group 'no-such-group-here' on this host" in daemon.refused("of_a_strange_group")
    assert "nobody is no member of group 'daemon'" in daemon.refused("of_a_group_of_others")
    row = json.loads(daemon.kqueue("jobs", "--state", "dead", "--json").stdout)[0]
    assert (row["cause"], row["attempts"]) == ("refused", 0)
    assert daemon.result("of_nobody")["user"] == "nobody"


def test_a_limit_below_what_an_interpreter_takes_costs_that_job_only(place: Make) -> None:
    daemon = place("memory_headroom: 0").start()
    assert "max_memory of 1 MiB and isolated.memory_headroom of 0 MiB are less" in daemon.refused("too_small_for_an_interpreter")
    assert daemon.result("small") == 1, "a fork has what its template has, and this above it"


@as_root
def test_an_interpreter_that_the_user_may_not_run_is_named(place: Make) -> None:
    try:
        subprocess.run([sys.executable, "-c", ""], user="nobody", group="nogroup", check=True)
    except PermissionError:
        assert "Refused: user nobody may not run …/python: Permission denied" in place().start().refused("fresh_nobody")
    else:
        assert place().start().result("fresh_nobody")["user"] == "nobody"


@as_root
def test_code_names_whom_the_operator_lets_it(place: Make) -> None:
    daemon = place("user: nobody", more="security: {allowed_users: [nobody]}").start()
    assert "security.allowed_users has no 'daemon' (nobody)" in daemon.refused("of_daemon")
    assert daemon.result("of_nobody")["user"] == "nobody"
    daemon.stop()
    daemon = place("user: nobody").start()
    assert "name it in security.allowed_users" in daemon.refused("of_root"), "root is never meant by saying nothing"
    daemon.stop()
    daemon = place("user: nobody", more="security: {allowed_users: [root]}").start()
    assert daemon.result("of_root")["uids"] == ["0"] * 4


@as_root
def test_no_message_chooses_a_user(place: Make) -> None:
    """Neither a dispatch, nor an envelope that somebody wrote by hand."""
    for option in ({"user": "root"}, {"group": "root"}, {"network": True}, {"private_tmp": False}):
        with pytest.raises(UsageError, match="is decided where the job is declared, not at dispatch"):
            dispatch_options(**option)  # type: ignore[arg-type]
    daemon = place().start()
    prepared = prepare(BoundJob("of_nobody", (), {}), None)
    fields = json.loads(encode(decode(prepared.envelope)._replace(lane="isolated")))
    for number, forged in enumerate(({"user": "root"}, {"identity": ["root", None, True]}, {"options": {"user": "root"}})):
        envelope = json.dumps({**fields, "id": f"forged-{number}", **forged}).encode()
        daemon.client.store.enqueue([NewJob(f"forged-{number}", "default", "isolated", 0, envelope)])
        assert Handle(daemon.client.store, f"forged-{number}", None).result(PATIENCE_S)["uids"] == [str(NOBODY.pw_uid)] * 4


@as_root
@pytest.mark.parametrize(
    ("isolated", "says"),
    [
        ("user: no-such-user-here", "isolated.user: there is no user 'no-such-user-here' on this host"),
        ("group: no-such-group-here", "isolated.group: there is no group 'no-such-group-here' on this host"),
        ("directory: /no-such-directory", "isolated.directory: /no-such-directory: No such file or directory"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_the_start(place: Make, isolated: str, says: str) -> None:
    daemon = place(isolated)
    checked = daemon.run_check()
    assert (checked.returncode, checked.stdout) == (2, "")
    assert re.fullmatch(rf"{re.escape(str(daemon.config))}:5: {re.escape(says)}\n", checked.stderr)
    assert daemon.run() == 2
    assert says in daemon.log[-1]


@as_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv, which takes capabilities away")
@pytest.mark.parametrize(
    ("lacks", "isolated", "says"),
    [
        ("kill", "user: nobody", "isolated.user: the daemon could start jobs as nobody, but not end them (it has no CAP_KILL)"),
        ("setuid", "user: nobody", "isolated.user: the daemon may not run a job as user nobody (it has no CAP_SETUID"),
        ("sys_admin", "private_tmp: true", "isolated.private_tmp: a private /tmp is not possible here"),
    ],
)
def test_root_that_lacks_a_capability_is_no_root(place: Make, lacks: str, isolated: str, says: str) -> None:
    """As in many containers, and under systemd's CapabilityBoundingSet=."""
    daemon = place(isolated)
    kqueued = [sys.executable, "-m", "kqueue.cli.kqueued", "-c", str(daemon.config), "--check"]
    command = ["setpriv", f"--bounding-set=-{lacks}", *kqueued]
    checked = subprocess.run(command, capture_output=True, text=True, env=daemon.environment, check=False, timeout=PATIENCE_S)
    assert (checked.returncode, f":5: {says}" in checked.stderr) == (2, True), checked.stderr


@as_root
def test_what_a_user_may_not_read_is_said_at_the_start(place: Make, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    daemon = place("user: nobody, directory: /")
    daemon.config.write_text(daemon.config.read_text().replace('path: ["', f'path: ["{closed}", "'))
    warning = f"user nobody may not read {closed}: what a job imports from there only when it runs will fail"
    assert warning in daemon.run_check().stderr
    assert warning in daemon.start().wait_log(str(closed))


# -- the environment ----------------------------------------------------------------------------------------------------------

SECRETS = {
    "KQUEUE_URL": "redis://:s3cr3t-of-the-broker@127.0.0.1:6379/0", "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-the-cloud",
    "NOTIFY_SOCKET": "/run/s3cr3t-of-systemd",
}  # fmt: skip
IN_MEMORY = re.compile(rb"s3cr3t-of-[a-z]+")


def in_memory(pid: int) -> set[bytes]:
    """Secrets that process `pid` has anywhere in what it can read."""
    found: set[bytes] = set()
    with open(f"/proc/{pid}/mem", "rb") as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions = line.split()[:2]
            begin, end = (int(part, 16) for part in span.split("-"))
            if permissions.startswith("r") and "[vvar" not in line and "[vsyscall]" not in line:
                try:
                    memory.seek(begin)
                    found.update(IN_MEMORY.findall(memory.read(end - begin)))
                except OSError:
                    continue
    return found


@as_root
def test_no_secret_is_in_a_jobs_environment_memory_or_files(place: Make, tmp_path: Path) -> None:
    key = tmp_path / "keys"
    key.write_text("s3cr3t-of-signing-and-a-good-deal-longer-than-that\n")
    key.chmod(0o600)
    extra = {**SECRETS, "APP_NAME": "shop", "APP_DATABASE_URL": "postgres://"}
    daemon = place(extra=extra, more=f"security: {{signing_key_file: {key}}}")
    daemon.config.write_text(daemon.config.read_text().replace('["KQUEUE_TEST_*"]', '["KQUEUE_TEST_*", APP_NAME]'))
    daemon.start()
    there = {b"s3cr3t-of-the", b"s3cr3t-of-systemd", b"s3cr3t-of-signing"}
    assert in_memory(daemon.pid) >= there, "the search finds what is there"
    pid, end, handle = held(daemon)
    for process in (daemon.template, pid):
        assert in_memory(process) == set()
    given = daemon.result("environment")
    assert given["APP_NAME"] == "shop"
    assert {"PATH", "KQUEUE_OWNER", "KQUEUE_TEST_MARKS"} <= set(given)
    assert not {*SECRETS, "APP_DATABASE_URL"} & set(given)
    for process in (daemon.template, pid):
        targets = [os.readlink(entry) for entry in Path(f"/proc/{process}/fd").iterdir()]
        about_itself = ("/sys/fs/cgroup/", f"/proc/{process}/")
        files = {target for target in targets if target.startswith("/") and not target.startswith(about_itself)}
        assert files == {"/dev/null"}
    said = [line for line in daemon.log if "isolated jobs do not have" in line]
    assert len(said) == 1
    assert "AWS_SECRET_ACCESS_KEY" in said[0]
    assert "s3cr3t" not in said[0]
    assert "APP_NAME" not in said[0]
    end.touch()
    assert handle.wait(PATIENCE_S)
    end.unlink()
    end.parent.rmdir()


def test_an_application_that_misses_a_variable_is_told_the_line_to_write(place: Make) -> None:
    module = {"isolated_modules": "[tests.apps.wants_environment]"}
    daemon = place(extra={"APP_DATABASE_URL": "postgres://"}, **module)
    line = "write isolated: {environment: [KQUEUE_TEST_*, APP_DATABASE_URL]}"
    assert daemon.run() == 2
    assert "raised at import: KeyError: 'APP_DATABASE_URL'" in daemon.log[-1]
    assert line in daemon.log[-1]
    checked = daemon.run_check()
    assert (checked.returncode, line in checked.stderr) == (2, True)
    daemon.config.write_text(daemon.config.read_text().replace('["KQUEUE_TEST_*"]', '["KQUEUE_TEST_*", "APP_*"]'))
    assert daemon.start().result("database") == "postgres://"


def test_a_job_that_misses_one_too(place: Make) -> None:
    daemon = place(extra={"APP_TOKEN": "hunter2"}).start()
    daemon.ask("reads_file", "APP_TOKEN")
    assert "write isolated: {environment: [KQUEUE_TEST_*, APP_TOKEN]}" in daemon.wait_log("reads_file failed with KeyError")
    assert not [line for line in daemon.log if "hunter2" in line]


@pytest.mark.parametrize(
    ("name", "more", "passes"),
    [
        ("PATH", (), True), ("LC_ALL", (), True), ("LC", (), False), ("PYTHONPATH", (), True), ("path", (), False),
        ("DATABASE_URL", (), False), ("DATABASE_URL", ("DATABASE_URL",), True), ("DATABASE_URL", ("DATABASE",), False),
        ("DATABASE_URL", ("*_URL",), True), ("KQUEUE_URL", ("*_URL",), False), ("KQUEUE_URL", ("*",), False),
        ("KQUEUE_SIGNING_KEY_FILE", ("*",), False), ("NOTIFY_SOCKET", ("*",), False), ("LISTEN_FDS", ("*",), False),
        ("ANYTHING", ("*",), True), ("A.B", ("AxB",), False),
    ],
)  # fmt: skip
def test_which_variables_pass(name: str, more: tuple[str, ...], passes: bool) -> None:
    assert (name in environment.for_jobs({name: "value"}, more)) is passes


def test_what_nobody_misses_is_not_listed() -> None:
    assert environment.withheld(dict.fromkeys(["_", "SHLVL", "INVOCATION_ID", "KQUEUE_URL", "PATH", "B", "A"], "")) == ["A", "B"]


# -- the supervisor -----------------------------------------------------------------------------------------------------------


@unprivileged()
def test_a_job_of_the_same_user_cannot_look_into_the_supervisor(place_of_nobody: Make) -> None:
    daemon = place_of_nobody().start()
    assert status_of(daemon.pid)["Uid"].split() == [str(NOBODY.pw_uid)] * 4
    got = daemon.result("tries_the_supervisor", daemon.pid, False)
    of_supervisor = {what: came for what, came in got.items() if what.startswith("supervisor")}
    assert set(of_supervisor.values()) <= {"EACCES", "EPERM"}, of_supervisor
    assert (got["template environ"], got["template ptrace"]) == ("done", "done"), "so they would have got there"
    assert daemon.result("ordinary")["environment"], "and a job can read its own, as ever"
    assert "running" in daemon.kqueue("status").stdout
    assert daemon.stop() == 0


@as_root
def test_jobs_of_another_user_reach_neither_supervisor_nor_template(place: Make) -> None:
    daemon = place("user: nobody").start()
    template = daemon.template
    got = daemon.result("tries_the_supervisor", daemon.pid, True)
    assert set(got.values()) <= {"EACCES", "EPERM"}, got
    assert daemon.template == template
    assert status_of(daemon.pid)["State"][0] in "SR"
    assert daemon.stop() == 0


# -- the network, and /tmp ----------------------------------------------------------------------------------------------------


@as_root
def test_without_network_there_is_not_even_loopback(place: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        daemon = place().start()
        for name in ("without_network", "pooled_without_network", "without_network"):
            assert daemon.result(name, port) == {"connect": "ENETUNREACH", "interfaces": ["lo"]}
        told = daemon.result("with_network", port)
        assert told["connect"] == "done"
        daemon.stop()
        daemon = place("network: false, user: nobody").start()
        assert daemon.result("with_network", port)["connect"] == "ENETUNREACH", "what all have not, none can have"


@as_root
def test_a_private_tmp_is_empty_bounded_and_gone_with_its_job(place: Make) -> None:
    mounts = mounts_of_the_host()
    daemon = place().start()
    name = f"kqueue-{os.getpid()}"
    told = [daemon.result("with_its_own_tmp", name) for _ in range(2)]
    for each in told:
        assert (each["before"], each["fill"], each["var"]) == ([], "ENOSPC", [name]), "64 MiB, its max_memory"
    assert not Path("/tmp", name).exists()
    assert mounts_of_the_host() == mounts


def mounts_of_the_host() -> list[str]:
    """Without the small disks that other tests mount in directories of their own, maybe just now."""
    lines = Path("/proc/mounts").read_text().splitlines()
    return [line for line in lines if not re.match(r"\S+ \S*/(pytest-of-|kqc-)", line)]


@as_root
def test_what_ends_a_job_ends_all_of_it_in_namespaces_and_of_another_user_too(place: Make) -> None:
    """The one that is left has no mark, no environment, no parent, no network, and another user than the daemon."""
    daemon = place().start()
    left = daemon.result("leaves_somebody")
    handle = daemon.ask("does_not_end")
    line = daemon.wait_log("left ")
    assert handle.wait(PATIENCE_S)
    for pid in (left, int(re.search(r"left (\d+)", line)[1])):  # type: ignore[index]
        if alive(pid):
            wait_gone([pid])
    assert daemon.stop() == 0


@as_root
def test_what_the_supervisor_watches_it_watches_of_another_user_too(place: Make) -> None:
    daemon = place().start()
    assert "MiB" in daemon.refused("swells")
    row = json.loads(daemon.kqueue("jobs", "--state", "dead", "--json").stdout)[0]
    assert (row["job"], row["cause"]) == ("swells", "memory")


# -- not as root ----------------------------------------------------------------------------------------------------------------


@unprivileged()
@pytest.mark.parametrize(
    ("isolated", "says"),
    [
        ("user: daemon", "isolated.user: the daemon does not run as root, so no job of it can run as user daemon"),
        ("group: daemon", "isolated.group: the daemon does not run as root, so no job of it can run as group daemon"),
        ("network: false", "isolated.network: a job without network is not possible here (unshare: Operation not permitted)"),
        ("private_tmp: true", "isolated.private_tmp: a private /tmp is not possible here"),
    ],
)
def test_what_takes_root_is_refused_at_the_start_without(place_of_nobody: Make, isolated: str, says: str) -> None:
    daemon = place_of_nobody(isolated)
    assert daemon.run("--check") == 2
    assert f"{daemon.config}:5: {says}" in daemon.log[-1]
    assert daemon.run() == 2
    assert says in daemon.log[-1]


@unprivileged()
def test_and_costs_a_job_that_asks_for_it_and_no_other(place_of_nobody: Make) -> None:
    daemon = place_of_nobody("user: nobody").start()
    assert "the daemon does not run as root, so no job of it can run as user daemon" in daemon.refused("of_daemon")
    assert "the daemon does not run as root" in daemon.refused("pooled_daemon")
    assert "a job without network is not possible here" in daemon.refused("without_network", 1)
    assert "a private /tmp is not possible here" in daemon.refused("with_its_own_tmp", "x")
    assert daemon.result("of_nobody")["user"] == "nobody", "which it is already"
    assert daemon.result("fresh_nobody")["uids"] == [str(NOBODY.pw_uid)] * 4
    assert daemon.stop() == 0


# -- the request --------------------------------------------------------------------------------------------------------------


def test_what_a_job_may_only_take_away() -> None:
    closed, open_ = Privileges(network=False, private_tmp=True), JobOptions(network=True, private_tmp=False)
    assert closed.of_job(open_, 64, by_operator=False) == {"network": False, "private_tmp": 64}
    assert Privileges().of_job(JobOptions(), 64, by_operator=False) == {}


def test_a_job_with_privileges_of_its_own_runs_isolated() -> None:
    from kqueue import job

    async def handler() -> None: ...

    with pytest.raises(UsageError, match="isolated=False and user='nobody' contradict each other"):
        job(isolated=False, user="nobody", name="contradicts")(handler)
    assert job(network=False, name="offline")(handler).registration.lane == "isolated"
