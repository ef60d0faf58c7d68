"""Jobs that tell who they are, what they see, and how far they get against others. What they need is imported before a fork."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from kqueue import io, job, offload

TEMPLATE_PID = os.getpid()
_libc = ctypes.CDLL(None, use_errno=True)
PTRACE_ATTACH, PTRACE_DETACH = 16, 17


def about() -> dict[str, Any]:
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return {
        "pid": os.getpid(), "ppid": os.getppid(), "uids": status["Uid"].split(), "gids": status["Gid"].split(),
        "groups": [int(group) for group in status["Groups"].split()], "capabilities": int(status["CapPrm"], 16),
        "no_new_privs": status["NoNewPrivs"].strip(), "umask": status["Umask"].strip(), "cwd": os.getcwd(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "home": os.environ.get("HOME"), "user": os.environ.get("USER"),
        "logname": os.environ.get("LOGNAME"), "environment": sorted(os.environ), "tmp": sorted(os.listdir("/tmp")),
    }  # fmt: skip


def outcome_of(action: Callable[[], Any]) -> str:
    """"done", or the name of the error."""
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


@job(isolated=True, keep_result=60)
def ordinary() -> dict[str, Any]:
    return about()


@job(user="nobody", keep_result=60)
def of_nobody() -> dict[str, Any]:
    return about()


@job(user="daemon", group="daemon", keep_result=60)
def of_daemon() -> dict[str, Any]:
    return about()


@job(user="nobody", start="pool", keep_result=60)
def pooled_nobody() -> dict[str, Any]:
    return about()


@job(user="daemon", start="pool", keep_result=60)
def pooled_daemon() -> dict[str, Any]:
    return about()


@job(start="pool", keep_result=60)
def pooled_plain() -> dict[str, Any]:
    return about()


@job(user="nobody", start="exec", keep_result=60)
def fresh_nobody() -> dict[str, Any]:
    return about()


def real_user() -> int:
    return os.getuid()


@job(user="nobody", network=False, keep_result=60)
def yields_as_nobody() -> Any:
    """A generator, which would run inline if it named nobody."""
    network = yield io.run(["readlink", "/proc/self/ns/net"])
    user = yield io.run(["id", "-u"])
    return {"call": (yield offload(real_user)), "program": int(user.text), "network": network.text.strip()}


@job(user="no-such-user-here")
def of_a_stranger() -> None:
    raise AssertionError("it runs")


@job(user="no-such-user-here", start="pool")
def pooled_stranger() -> None:
    raise AssertionError("it runs")


@job(group="no-such-group-here", start="exec")
def of_a_strange_group() -> None:
    raise AssertionError("it runs")


@job(user="nobody", group="daemon")
def of_a_group_of_others() -> None:
    raise AssertionError("it runs")


@job(user="root", keep_result=60)
def of_root() -> dict[str, Any]:
    return about()


@job(user="nobody", keep_result=60)
def tries_to_go_back() -> dict[str, str]:
    return {
        "setuid": outcome_of(lambda: os.setuid(0)),
        "seteuid": outcome_of(lambda: os.seteuid(0)),
        "setresuid": outcome_of(lambda: os.setresuid(-1, 0, -1)),
        "setgid": outcome_of(lambda: os.setgid(0)),
        "setgroups": outcome_of(lambda: os.setgroups([0])),
        "hosts": outcome_of(lambda: open("/etc/hosts", "a").close()),
        "own environment": outcome_of(lambda: open("/proc/self/environ", "rb").close()),
        "/dev/stdout": outcome_of(lambda: open("/dev/stdout", "w").close()),
    }


@job(isolated=True, keep_result=60)
def tries_the_supervisor(supervisor: int, signals: bool) -> dict[str, str]:
    def ptrace(pid: int) -> None:
        if _libc.ptrace(PTRACE_ATTACH, pid, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")
        os.waitpid(pid, 0)
        _libc.ptrace(PTRACE_DETACH, pid, None, None)

    def pidfd_getfd(pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        if _libc.syscall(438, pidfd, 3, 0) < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")

    got = {}
    for name, pid in (("supervisor", supervisor), ("template", TEMPLATE_PID)):
        for file in ("mem", "environ", "maps", "fd/0"):
            got[f"{name} {file}"] = outcome_of(lambda path=f"/proc/{pid}/{file}": os.close(os.open(path, os.O_RDONLY)))  # type: ignore[misc]
        got[f"{name} ptrace"] = outcome_of(lambda pid=pid: ptrace(pid))  # type: ignore[misc]
        got[f"{name} pidfd_getfd"] = outcome_of(lambda pid=pid: pidfd_getfd(pid))  # type: ignore[misc]
        if signals:
            for number in (signal.SIGSTOP, signal.SIGKILL):
                got[f"{name} {number.name}"] = outcome_of(lambda pid=pid, n=number: os.kill(pid, n))  # type: ignore[misc]
    return got


@job(isolated=True, timeout=0)
def holds(path: str) -> None:
    """Until it is told, by that file, to end."""
    while not os.path.exists(path):
        time.sleep(0.02)


@job(network=False, keep_result=60)
def without_network(port: int) -> dict[str, Any]:
    return _reaches(port)


@job(network=False, start="pool", keep_result=60)
def pooled_without_network(port: int) -> dict[str, Any]:
    return _reaches(port)


@job(isolated=True, keep_result=60)
def with_network(port: int) -> dict[str, Any]:
    return _reaches(port)


def _reaches(port: int) -> dict[str, Any]:
    def connect() -> None:
        with socket.socket() as sock:  # create_connection() would import idna
            sock.settimeout(5)
            sock.connect(("127.0.0.1", port))

    return {"connect": outcome_of(connect), "interfaces": [name for _, name in socket.if_nameindex()]}


@job(private_tmp=True, max_memory=64, keep_result=60)
def with_its_own_tmp(name: str) -> dict[str, Any]:
    before = os.listdir("/tmp")

    def fill() -> None:
        with open(f"/tmp/{name}", "wb") as file:
            for _ in range(65):
                file.write(b"x" * (1 << 20))

    return {"before": before, "fill": outcome_of(fill), "var": os.listdir("/var/tmp")}


ESCAPE = """
import os, resource, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(2):
    if os.fork():
        os._exit(0)
    os.setsid()
resource.setrlimit(resource.RLIMIT_RSS, (0, 0))
print(os.getpid(), flush=True)
os.close(1)
time.sleep(600)
"""
PYTHON = "/usr/bin/python3"  # which other users may run


def escape() -> int:
    """Start what gets away as far as it can; its pid."""
    ran = subprocess.run([PYTHON, "-c", ESCAPE], env={}, stdout=subprocess.PIPE, stderr=sys.stderr, check=True)
    return int(ran.stdout)


@job(user="nobody", network=False, private_tmp=True, keep_result=60, max_memory=256)
def leaves_somebody() -> int:
    return escape()


@job(user="nobody", network=False, private_tmp=True, timeout=0.5, max_attempts=1, max_memory=256)
def does_not_end() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("left", escape(), flush=True)
    while True:
        time.sleep(1)


@job(start="exec", max_memory=1)
def too_small_for_an_interpreter() -> None:
    raise AssertionError("it runs")


@job(max_memory=1, keep_result=60)
def small() -> int:
    return 1


@job(user="nobody", max_memory=64, max_attempts=1)
def swells() -> None:
    """By what no rlimit counts."""
    with mmap.mmap(-1, 160 << 20) as shared:
        for page in range(0, len(shared), mmap.PAGESIZE):
            shared[page] = 1
        time.sleep(60)


@job(isolated=True, keep_result=60)
def environment() -> dict[str, str]:
    return dict(os.environ)


@job(isolated=True, keep_result=60)
def reads_file(name: str) -> str:
    return os.environ[name]


