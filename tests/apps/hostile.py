"""Hostile jobs, each under three names: it starts by fork, in the pool, and by exec. See test_zoo. Imported by the template only.

Every process that a job forks says so first, by its number and when it began, in the file that the job is given: so the test can
look for it, whatever it did to its fds, environment, session and parents. All bombs end by themselves before they harm the host.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from kqueue import current, job

MIB = 1 << 20
MOST = 1024  # MiB that a bomb takes at the most
FORKS = 200  # processes of a bomb that live at once, at the most
OPTIONS: dict[str, Any] = {"keep_result": 600, "max_attempts": 1, "causes": {"signal": "bury", "exit": "bury"}, "timeout": 30}
RESULT, DONE = 19, 26  # kinds of frames; see kqueue/execution/wire.py
CHILD = """
import sys, time
data = [bytearray(b"x") * (1 << 20) for _ in range(int(sys.argv[1]))]
time.sleep(30)
"""


def hostile(function: Callable[..., Any]) -> Callable[..., Any]:
    """As @job, for each of the three starts."""
    for start in ("fork", "pool", "exec"):
        job(name=f"hostile_{function.__name__}_{start}", start=start, **OPTIONS)(function)
    return function


@job(name="good_fork", start="fork", keep_result=600)
def good_fork(number: int) -> int:
    return number


@job(name="good_pool", start="pool", keep_result=600)
def good_pool(number: int) -> int:
    return number


@job(name="good_generator", isolated=True, keep_result=600)
def good_generator(number: int) -> Any:
    yield
    return number


# -- what they are made of ----------------------------------------------------------------------------------------------------


def note(where: str) -> None:
    """This process is there; and as long as anybody keeps that fd, the file is locked."""
    with open("/proc/self/stat") as file:
        began = file.read().rpartition(")")[2].split()[19]
    fd = os.open(where, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.set_inheritable(fd, True)
    fcntl.flock(fd, fcntl.LOCK_SH)
    os.write(fd, f"{os.getpid()} {began}\n".encode())


def noted(where: str) -> int:
    try:
        with open(where) as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0


def wait_noted(where: str, count: int) -> None:
    while noted(where) < count:
        time.sleep(0.005)


def fork(where: str, run: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            note(where)
            run()
        finally:
            os._exit(0)
    return pid


def stay() -> NoReturn:
    while True:
        signal.pause()


def ignore_all() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
        signal.signal(number, signal.SIG_IGN)


# -- processes ----------------------------------------------------------------------------------------------------------------


@hostile
def forks_many(where: str, how: str = "children") -> None:
    """`how`: "children" of its own; or "orphans", each in a session of its own."""

    def orphan() -> None:
        os.setsid()
        fork(where, stay)

    for _ in range(FORKS if how == "children" else FORKS // 2):
        fork(where, stay if how == "children" else orphan)
    stay()


@hostile
def bombs(where: str) -> None:
    """Forks while it is killed: many that fork themselves on and are gone, in sessions of their own, deaf to everybody."""
    ends_at = time.monotonic() + 30

    def hop() -> None:
        ignore_all()
        while time.monotonic() < ends_at:
            os.setsid()
            time.sleep(0.05)
            if os.fork():
                os._exit(0)

    ignore_all()
    for _ in range(FORKS // 4):
        fork(where, hop)
    stay()


@hostile
def daemonises(where: str) -> str:
    """Double fork, a session of its own, no fd, no environment, another program; and the job ends well."""

    def disguise() -> None:
        os.chdir("/")
        os.closerange(0, 1024)
        os.execve("/bin/sleep", ["[kworker/0:1]", "1000"], {})

    def middle() -> None:
        os.setsid()
        fork(where, disguise)

    os.waitpid(fork(where, middle), 0)
    wait_noted(where, 2)
    return "nothing to see here"


@hostile
def kills_its_parent(where: str) -> str:
    """The template; the first time."""
    if not noted(where):
        note(where)
        os.kill(os.getppid(), signal.SIGKILL)
        stay()
    return "well behaved at last"


@hostile
def stops_itself(where: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@hostile
def ignores_sigterm(where: str) -> None:
    ignore_all()
    fork(where, stay)
    stay()


# -- CPU and memory -----------------------------------------------------------------------------------------------------------


@hostile
def spins_in_c(where: str) -> int:
    return sum(range(10**12))


@hostile
def spins_and_listens_to_nobody(where: str) -> None:
    ignore_all()
    while True:
        pass


@hostile
def allocates(where: str, how: str) -> None:
    hold = ALLOCATIONS[how](where)
    time.sleep(30)
    del hold


def _a_bytearray(where: str) -> Any:
    data = bytearray()
    while len(data) < MOST * MIB:
        data += b"x" * MIB
    return data


def _touched(area: mmap.mmap) -> mmap.mmap:
    for position in range(0, len(area), 4096):
        area[position] = 1
    return area


def _memfd(where: str) -> Any:
    fd = os.memfd_create("hostile")
    os.ftruncate(fd, MOST * MIB)
    return _touched(mmap.mmap(fd, MOST * MIB))


def _forks(where: str) -> Any:
    for _ in range(8):
        fork(where, lambda: (bytearray(b"x") * (16 * MIB), stay()))


ALLOCATIONS: dict[str, Callable[[str], Any]] = {
    "bytearray": _a_bytearray,
    "pages": lambda where: [bytearray(b"x") * MIB for _ in range(MOST)],
    "in C": lambda where: b"x" * (MOST * MIB),
    "private": lambda where: _touched(mmap.mmap(-1, MOST * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)),
    "shared": lambda where: _touched(mmap.mmap(-1, MOST * MIB)),
    "memfd": _memfd,
    "subprocess": lambda where: subprocess.run([sys.executable, "-c", CHILD, "120"], check=False),
    "forks": _forks,
}


# -- files and output ---------------------------------------------------------------------------------------------------------


@hostile
def opens_files(where: str) -> None:
    for _ in range(100_000):
        os.open("/dev/null", os.O_RDONLY)


@hostile
def has_no_fd_left(where: str) -> str:
    """And ends well."""
    try:
        opens_files(where)
    except OSError:
        return "all taken"
    return "no limit"


@hostile
def has_no_memory_left(where: str) -> str:
    """And ends well."""
    try:
        for size in (MIB, 4096):  # never touched: it counts for RLIMIT_DATA alone
            with suppress(OSError):
                while True:
                    _kept.append(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        while True:
            _kept.append(b"x" * 16)
    except MemoryError:
        return "all taken"


_kept: list[Any] = []


@hostile
def fills_the_disk(where: str, directory: str) -> None:
    """Up to 64 MiB."""
    os.chdir(directory)
    with open(f"rubbish-{current().id}", "wb", buffering=0) as file:
        for _ in range(64):
            if file.write(b"x" * MIB) < MIB:  # the last bit of a full disk
                file.write(b"x")


@hostile
def floods(where: str, how: str) -> str:
    """100 MB on stdout, and some on stderr."""
    bits = {"without newlines": b"spam ", "with newlines": b"spam\n", "no text": b"\xff\xfe\x00\x80\n"}
    piece = bits[how] * 13_000
    for _ in range(1540):  # 65 kB each
        _write_all(1, piece)
    _write_all(2, piece * 4)
    return "flooded"


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# -- frames -------------------------------------------------------------------------------------------------------------------


@hostile
def forges(where: str, how: str) -> str:
    with socket.socket(fileno=os.dup(3)) as supervisor:
        FORGERIES[how](supervisor)
    time.sleep(0.2)  # to be seen at it
    return "the real one"


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">IB", len(payload) + 1, kind) + payload


FORGERIES: dict[str, Callable[[socket.socket], object]] = {
    "garbage": lambda supervisor: supervisor.sendall(b"\xde\xad\xbe\xef" * 1000),
    "a huge length": lambda supervisor: supervisor.sendall(struct.pack(">IB", 0xFFFFFFFF, RESULT)),
    "an unknown kind": lambda supervisor: supervisor.sendall(frame(2, b"{}")),
    "not JSON": lambda supervisor: supervisor.sendall(frame(RESULT, b'{"a": ')),
    "deep JSON": lambda supervisor: supervisor.sendall(frame(RESULT, b"[" * 200_000)),
    "the end of another run": lambda supervisor: supervisor.sendall(frame(DONE, b"\0" * 72)),
    "a result": lambda supervisor: supervisor.sendall(frame(RESULT, b'"forged"')),
    "two results": lambda supervisor: supervisor.sendall(frame(RESULT, b'"forged"') + frame(RESULT, b'"again"')),
    "half a frame": lambda supervisor: supervisor.sendall(struct.pack(">IB", 100_000, RESULT) + b'"half'),
    "no more": lambda supervisor: supervisor.shutdown(socket.SHUT_RDWR),
}


@hostile
def closes_its_pipe(where: str) -> str:
    os.close(3)
    return "nobody hears that"


# -- ends ---------------------------------------------------------------------------------------------------------------------


@hostile
def ends(where: str, how: str) -> Any:
    return ENDS[how]()


ENDS: dict[str, Callable[[], Any]] = {
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "sys.exit(3)": lambda: sys.exit(3),
    "sys.exit(text)": lambda: sys.exit("that was it"),
    "os._exit(0)": lambda: os._exit(0),
    "os._exit(9)": lambda: os._exit(9),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL) or stay(),
    "no JSON": lambda: {"a": object()},
    "too large": lambda: "x" * (2 * MIB),
    "recursion": lambda: _recursive(),
    "a generator that never ends": lambda: _never(),
    "SystemExit in a thread": lambda: threading.Thread(target=sys.exit, args=(3,)).start() or "fine",
}


def _recursive() -> Any:
    data: list[Any] = []
    data.append(data)
    return data


def _never() -> Any:
    while True:
        try:
            while True:
                yield
        except BaseException:  # whoever wants to end it
            continue


@hostile
def imports(where: str, module: str) -> str:
    """Only now, in the job."""
    importlib.import_module(module)
    return "imported"


@hostile
def attacks(where: str, pid: int) -> dict[str, str]:
    """Process `pid`, in all ways there are; what came of each."""
    came = {}
    for name, attack in ATTACKS.items():
        try:
            attack(pid)
            came[name] = "done"
        except OSError as error:
            came[name] = errno.errorcode[error.errno or 0]
    return came


def _ptrace(request: int) -> Callable[[int], object]:
    def attack(pid: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(ctypes.c_long(request), pid, ctypes.c_void_p(0), ctypes.c_void_p(0)) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    return attack


ATTACKS: dict[str, Callable[[int], object]] = {
    "SIGKILL": lambda pid: os.kill(pid, signal.SIGKILL),
    "SIGSTOP": lambda pid: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGSTOP),
    "PTRACE_ATTACH": _ptrace(16),
    "PTRACE_SEIZE": _ptrace(0x4206),
    "memory": lambda pid: os.open(f"/proc/{pid}/mem", os.O_RDWR),
    "environment": lambda pid: os.open(f"/proc/{pid}/environ", os.O_RDONLY),
    "fds": lambda pid: os.listdir(f"/proc/{pid}/fd"),
    "limits": lambda pid: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0)),
    "niceness": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19),
    "group": lambda pid: os.killpg(os.getpgid(pid), signal.SIGKILL),
}
