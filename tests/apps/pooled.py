"""Jobs for the pool: what they do to the process that the next job runs in. Imported by the template only."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import locale
import logging
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from kqueue import current, enqueue, offload, sleep
from kqueue import job as any_job
from kqueue.execution import wire

_kept: list[Any] = []  # what a job does not let go of
_variable: ContextVar[str] = ContextVar("variable", default="")


def job(**options: Any) -> Callable[[Any], Any]:
    """As @job, for the pool. Names of jobs are one space for all apps of the tests."""
    return lambda function: any_job(name=f"pool_{function.__name__}", start="pool", keep_result=60, **options)(function)


@job()
def pid() -> int:
    return os.getpid()


@job()
def start_of_this() -> str:
    """Who called us: a pool process, or one of our own."""
    frame, names = sys._getframe(), []
    while frame is not None:
        names.append(frame.f_code.co_filename)
        frame = frame.f_back  # type: ignore[assignment]
    return "pool" if any(name.endswith("pooled_child.py") for name in names) else "fork"


# -- what is left changed -----------------------------------------------------------------------------------------------


def _leaves_a_child() -> None:
    if os.fork() == 0:
        signal.pause()
        os._exit(0)


def _leaves_a_zombie() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)


def _leaves_a_daemon() -> None:
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 100)
            signal.pause()
        os._exit(0)
    os.waitpid(child, 0)


def _lowers(which: int) -> None:
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (8 << 20 if soft == resource.RLIM_INFINITY else soft - 1, hard))


def _moves_stdout() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _opens_high() -> None:
    os.dup2(1, 900)


LEAKS: dict[str, tuple[Callable[[], Any], str]] = {
    "chdir": (lambda: os.chdir("/usr"), "the working directory"),
    "chdir to what is gone": (lambda: (os.chdir(path := tempfile.mkdtemp()), os.rmdir(path)), "the working directory"),
    "umask": (lambda: os.umask(0o007), "the umask"),
    "signal": (lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN), "the handler of SIGUSR2"),
    "sigterm": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), "the handler of SIGTERM"),
    "sigchld": (lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN), "the handler of SIGCHLD"),
    "mask": (lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]), "the mask of blocked signals"),
    "wakeup": (lambda: signal.set_wakeup_fd(_kept.append(os.pipe2(os.O_NONBLOCK)) or _kept[-1][1]), "the wake-up fd"),  # type: ignore[func-returns-value]
    "environment": (lambda: os.environ.update(A_SECRET="hunter2"), "the environment"),
    "environment less": (lambda: os.environ.pop("PATH"), "the environment"),
    "job id": (lambda: os.environ.update(KQUEUE_JOB_ID="another"), "the environment"),
    "files limit": (lambda: _lowers(resource.RLIMIT_NOFILE), "RLIMIT_NOFILE"),
    "memory limit": (lambda: _lowers(resource.RLIMIT_DATA), "RLIMIT_DATA"),
    "stack limit": (lambda: _lowers(resource.RLIMIT_STACK), "RLIMIT_STACK"),
    "fd": (lambda: _kept.append(open("/etc/passwd")), "its open fds"),  # noqa: SIM115
    "high fd": (_opens_high, "its open fds"),
    "closed stdin": (lambda: os.close(0), "its open fds"),
    "closed what is not its own": (lambda: os.closerange(6, 64), "its open fds"),
    "moved stdout": (_moves_stdout, "its open fds"),
    "non-blocking stdout": (lambda: os.set_blocking(1, False), "the flags of its fds (stdout"),
    "non-blocking stderr": (lambda: subprocess.run([sys.executable, "-c", "import os; os.set_blocking(2, False)"]), "(stderr"),
    "non-blocking socket": (lambda: os.set_blocking(3, False), "the flags of its fds (the job's socket"),
    "child": (_leaves_a_child, "its children"),
    "zombie": (_leaves_a_zombie, "its children"),
    "daemon": (_leaves_a_daemon, "its children"),
    "thread": (lambda: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start(), "its threads"),
    "alarm": (lambda: signal.alarm(1000), "a timer"),
    "virtual timer": (lambda: signal.setitimer(signal.ITIMER_VIRTUAL, 1000), "a timer"),
    "locale": (lambda: locale.setlocale(locale.LC_NUMERIC, "C.UTF-8"), "the locale"),
    "nice": (lambda: os.nice(1), "the niceness"),
    "affinity": (lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]), "the CPUs that it may use"),
    "default time-out": (lambda: socket.setdefaulttimeout(0.001), "the default time-out of sockets"),
    "recursion": (lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 1), "the recursion limit"),
    "collector off": (gc.disable, "the garbage collector's settings"),
    "collector": (lambda: gc.set_threshold(10), "the garbage collector's settings"),
    "path": (lambda: sys.path.insert(0, "/nowhere"), "sys.path"),
    "stdout": (lambda: setattr(sys, "stdout", sys.stderr), "sys.stdin, stdout or stderr"),
    "trace": (lambda: sys.settrace(lambda frame, event, argument: None), "the trace"),
}
if len(os.sched_getaffinity(0)) == 1:  # then there is none to leave out
    del LEAKS["affinity"]


@job()
def leaks(how: str, fail: bool = False) -> int:
    LEAKS[how][0]()
    if fail:
        raise LookupError(how)
    return os.getpid()


@job()
def blinds() -> int:
    """Puts something else in the place of the fds by which KQueue looks for what is changed."""
    null = os.open(os.devnull, os.O_RDONLY)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 5 and fd != null and os.path.exists(f"/proc/self/fd/{fd}"):  # the listing's own is not there any more
            os.dup2(null, fd, inheritable=False)
    os.close(null)
    return os.getpid()


# -- what is put back -----------------------------------------------------------------------------------------------------


@job()
def tidy(how: str) -> int:
    if how == "subprocess":
        subprocess.run(["true"], check=True)
    elif how == "thread":
        for _ in range(20):
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()
    elif how == "directory":
        here = os.getcwd()
        os.chdir("/")
        os.chdir(here)
    elif how == "files":
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
    elif how == "log":
        current().logger.warning("tidy")
        logging.getLogger("other").error("tidy, too")
    elif how == "alarm":
        signal.signal(signal.SIGALRM, signal.signal(signal.SIGALRM, lambda number, frame: None))
        signal.alarm(1000)
        signal.alarm(0)
    elif how == "dispatch":
        pid.options(delay=1000).dispatch()
        current().then(pid.options(delay=1000).job())
    return os.getpid()


@job()
def tidy_generator() -> Any:
    yield sleep(0.001)
    yield enqueue(pid.options(delay=1000).job())
    yield offload(divmod, 17, 5)
    return os.getpid()


@job()
async def tidy_async() -> Any:
    """Isolated, since it says how it starts."""
    await asyncio.sleep(0.001)
    await asyncio.get_running_loop().run_in_executor(None, divmod, 17, 5)
    return os.getpid()


@job()
def fails_tidily() -> None:
    raise LookupError(os.getpid())


@job()
def variable() -> str:
    before = _variable.get()
    _variable.set("set")
    return before


# -- limits ---------------------------------------------------------------------------------------------------------------


@job()
def takes(mib: int) -> int:
    return len(b"x" * (mib << 20)) >> 20


@job()
def keeps(mib: int) -> int:
    _kept.append(b"x" * (mib << 20))
    return os.getpid()


@job()
def burns(seconds: float) -> int:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    return os.getpid()


@job(timeout=0.3)
def hangs(stubborn: bool = False) -> None:
    print(os.getpid(), flush=True)
    while stubborn:
        try:
            signal.pause()
        except BaseException:
            continue
    signal.pause()


@job(timeout=0.3)
def hangs_once() -> int:
    if current().attempt == 1:
        try:
            signal.pause()
        finally:
            print("cleaned up")
    return os.getpid()


# -- ways to die ----------------------------------------------------------------------------------------------------------


@job()
def dies(how: str) -> None:
    if how == "segfault":
        ctypes.string_at(0)
    if how == "exit":
        os._exit(7)
    if how == "exit 0":
        os._exit(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "close the socket":
        os.close(3)
    if how == "sys.exit":
        sys.exit(3)


@job()
def kills_the_template() -> str:
    if current().attempt <= 2:
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    return start_of_this()


@job()
def forges(data: str, then: str = "") -> int:
    """`then`: a file that tells that it has."""
    os.write(3, bytes.fromhex(data))
    if then:
        _append(then, "")
    return os.getpid()


FORGED_RESULT = wire.frame(wire.RESULT, b'"forged"').hex()
FORGED_DONE = wire.frame(wire.DONE, wire.DONE_HEAD.pack(b"0123456789abcdef", wire.NO_TOKEN, 0, 0, 0, 1, 1)).hex()


# -- output ---------------------------------------------------------------------------------------------------------------


@job()
def talks(number: int) -> int:
    sys.stdout.write(f"python {number}")  # no newline, so that it stands in Python's buffer
    ctypes.CDLL(None).printf(b"c %d\n", number)
    os.write(2, b"fd %d\n" % number)
    if number % 10 == 0:
        subprocess.run(["echo", f"child {number}"], check=True)
    return os.getpid()


@job()
def floods() -> int:
    piece = b"spam " * 13_000 + b"\n"
    for _ in range(160):
        os.write(1, piece)
    return os.getpid()


# -- behind one another in a tray -----------------------------------------------------------------------------------------


@job()
def notes(path: str, number: int, ballast: str = "") -> int:
    """Tells that it ran, and where, in one write."""
    _append(path, f"{number} {os.getpid()} {os.getppid()}")
    return os.getpid()


@job(timeout=60)
def waits_for(path: str, leave: bool = False) -> int:
    _append(f"{path} is waited for", "")
    while not os.path.exists(path):
        time.sleep(0.002)
    if leave:
        os.chdir("/usr")
    return os.getppid()


@any_job(name="pool_not", start="fork", timeout=60)
def waits_for_apart(path: str) -> int:
    """In a process of its own."""
    _append(f"{path} is waited for", "")
    while not os.path.exists(path):
        time.sleep(0.002)
    return os.getppid()


@job(max_attempts=100, backoff=0)
def begins_and_ends(path: str, number: int) -> None:
    _append(path, f"b {number}")
    _append(path, f"e {number}")


@job(max_attempts=2, backoff=0)
def eats_its_tray(how: str, messages: int) -> None:
    """All that its process is to run next, and then it does not come to an end. Not so when it is run again."""
    if current().attempt > 1:
        return
    with socket.socket(fileno=os.dup(wire.TRAY_FD)) as tray:
        for _ in range(messages):
            tray.recv(65536)
    if how == "grows":
        shared = mmap.mmap(-1, 300 << 20)  # which RLIMIT_DATA does not count
        for at in range(0, len(shared), mmap.PAGESIZE):
            shared[at] = 1
    if how == "prints":
        print("yum", flush=True)
    signal.pause()


@job()
def chatters(number: int) -> int:
    for _ in range(number % 7):
        print(number)
        os.write(2, b"%d\n" % number * 20)
    return os.getpid()


def _append(path: str, line: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)
