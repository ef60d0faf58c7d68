"""Jobs whose processes do all they can to outlive them. Imported by the template only.

Each process says that it is there by a line in a file of its job's own, which it then keeps open: so the test can see in /proc
who is there, whatever has become of it. Who is never the same process for long is not seen there; but the file stays locked.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import NoReturn

from kqueue import job

FILES = "KQUEUE_TEST_FILES"  # the directory of those files
BOMB = 200  # processes of one bomb
_file = ""


def note(what: str) -> None:
    fd = os.open(_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.set_inheritable(fd, True)
    fcntl.flock(fd, fcntl.LOCK_SH)  # until the last of those that inherit it is gone
    os.write(fd, f"{what} {os.getpid()}\n".encode())


def count(what: str) -> int:
    with open(_file) as file:
        return sum(line.startswith(what + " ") for line in file)


def wait_for(what: str, number: int = 1) -> None:
    while count(what) < number:
        time.sleep(0.005)


def stay(what: str) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    note(what)
    while True:
        signal.pause()


def fork(run: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(0)
    return pid


def daemonise(run: Callable[[], object]) -> None:
    """Double fork and a session of one's own."""

    def middle() -> None:
        os.setsid()
        fork(run)

    os.waitpid(fork(middle), 0)


def daemon() -> None:
    daemonise(lambda: stay("daemon"))
    wait_for("daemon")


def family() -> None:
    """SIGTERM is ignored by all of it, and each generation has a session of its own."""

    def child() -> None:
        os.setsid()
        fork(grandchild)
        stay("child")

    def grandchild() -> None:
        os.setsid()
        fork(lambda: stay("greatgrandchild"))
        stay("grandchild")

    fork(child)
    for what in ("child", "grandchild", "greatgrandchild"):
        wait_for(what)


def stopped() -> None:
    def child() -> None:
        os.setsid()
        fork(lambda: stop("stopped"))
        stop("stopped")

    def stop(what: str) -> None:
        note(what)
        os.kill(os.getpid(), signal.SIGSTOP)

    fork(child)
    wait_for("stopped", 2)


def disguised() -> None:
    """Executes something else, with no variable in its environment."""

    def child() -> None:
        os.setsid()
        note("disguised")
        os.execve("/bin/sleep", ["sleep", "1000"], {})

    daemonise(child)
    wait_for("disguised")


def unmarked() -> None:
    """Takes off whatever it can: its environment, and all soft and hard limits."""

    def child() -> None:
        note("unmarked")  # first: from then on the end of any job is the end of it
        for name in ("RLIMIT_RSS", "RLIMIT_NOFILE", "RLIMIT_DATA"):
            hard = resource.getrlimit(getattr(resource, name))[1]
            low = 500 if name == "RLIMIT_NOFILE" else hard // 2
            resource.setrlimit(getattr(resource, name), (low, low))
        os.setsid()
        os.execve("/bin/sleep", ["sleep", "1000"], {})

    daemonise(child)
    wait_for("unmarked")


def bomb() -> None:
    """Forks while it is being killed: each process two more, all in sessions of their own, up to BOMB in all."""

    def explode() -> None:
        os.setsid()
        note("bomb")
        while count("bomb") < BOMB:
            fork(explode)
            time.sleep(0.002)
        while True:
            signal.pause()

    daemonise(explode)
    wait_for("bomb", 20)


def chain() -> None:
    """Never the same process for long: each forks the next and is gone, up to 20 * BOMB of them."""

    def run() -> None:
        for _ in range(20 * BOMB):
            os.setsid()
            if os.fork():
                os._exit(0)
        stay("chain")

    note("chain")
    daemonise(run)


KINDS = {kind.__name__: kind for kind in (daemon, family, stopped, disguised, unmarked, bomb, chain)}


def enter(name: str) -> bool:
    """Take the file `name` for this job; False when an earlier run has had it."""
    global _file
    _file = os.path.join(os.environ[FILES], name)
    try:
        os.close(os.open(_file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def holders(directory: str) -> dict[int, str]:
    """Who has a file of `directory` open: {pid: file}."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        found.update({int(pid): link for link in links if link.startswith(directory + "/")})
    return found


@job(isolated=True, max_memory=256, keep_result=60, max_attempts=1, timeout=60)
def leaves(kind: str, then: str = "ends") -> str:
    if not enter(kind):
        return "had run before"
    KINDS[kind]()
    note("ready")
    if then == "raises":
        raise LookupError(then)
    if then == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if then == "stays":
        stay("job")
    if then == "stops its template":
        os.kill(os.getppid(), signal.SIGSTOP)
        stay("job")
    return then


@job(isolated=True, keep_result=60, timeout=60)
def has_a_daemon(name: str) -> bool:
    """Has a daemon of its own, which must be there as long as the job is: until somebody writes "go" into its file."""
    enter(name)
    daemonise(lambda: stay("own"))
    wait_for("own")
    wait_for("go")
    with open(_file) as file:
        pid = next(int(line.split()[1]) for line in file if line.startswith("own "))
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] not in "ZX"


@job(isolated=True, keep_result=60)
def looks() -> list[str]:
    """What of other jobs is there while this one runs."""
    return sorted(holders(os.environ[FILES]).values())


if "KQUEUE_TEST_LEFT_AT_IMPORT" in os.environ:
    import socket
    import threading

    threading.Thread(target=time.sleep, args=(1000,), daemon=True, name="poller").start()
    left = socket.socket()
    left.connect(("127.0.0.1", int(os.environ["KQUEUE_TEST_LEFT_AT_IMPORT"])))
    left.setblocking(False)
    journal = open(__file__)  # noqa: SIM115 - it is left open on purpose
