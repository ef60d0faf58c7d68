"""Isolated jobs that want more than they may have, each in its own way; and some that only look like it. See test_limits."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from kqueue import job

MIB = 1 << 20
EATER = "import sys, time; data = bytearray(b'x') * (int(sys.argv[1]) << 20); time.sleep(float(sys.argv[2]))"

ORPHANS = """
import os, sys
for _ in range({count}):
    if os.fork() == 0:
        os.setsid()
        os.execv(sys.executable, [sys.executable, "-c", {eater!r}, "{mib}", "20"])
"""


@job(isolated=True, max_memory=32, timeout=20)
def maps(kind: str, mib: int = 400) -> None:
    """Touches pages of one kind, a MiB at a time, as fast as that goes."""
    if kind == "private":
        area: Any = mmap.mmap(-1, mib * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    elif kind == "shared":
        area = mmap.mmap(-1, mib * MIB)
    else:
        fd = os.memfd_create("greedy")
        if kind == "written memfd":
            for _ in range(mib):
                os.write(fd, b"x" * MIB)
            time.sleep(20)
        os.ftruncate(fd, mib * MIB)
        area = mmap.mmap(fd, mib * MIB)
    for position in range(0, mib * MIB, 4096):
        area[position] = 1
    time.sleep(20)


@job(isolated=True, max_memory=32, timeout=20)
def grows_a_bytearray() -> None:
    data = bytearray()
    while True:
        data += b"x" * MIB
        time.sleep(0.001)


@job(isolated=True, max_memory=32, timeout=20)
def eats_in_a_subprocess(mib: int = 120) -> None:
    subprocess.run([sys.executable, "-c", EATER, str(mib), "20"], check=False)


@job(isolated=True, max_memory=64, timeout=20)
def eats_in_many(count: int = 12, mib: int = 8, how: str = "subprocess") -> None:
    """Each of them small."""
    if how == "orphans":  # their parent, which made a session of its own, is gone
        script = ORPHANS.format(eater=EATER, count=count, mib=mib)
        subprocess.run([sys.executable, "-c", script], check=False)
    elif how == "threads":
        run = [sys.executable, "-c", EATER, str(mib), "20"]
        for _ in range(count):
            threading.Thread(target=subprocess.run, args=(run,)).start()
    elif how == "forks":  # they share what their parent had, which counts once
        for _ in range(count):
            if os.fork() == 0:
                data = bytearray(b"x") * (mib * MIB)
                time.sleep(20)
                os._exit(len(data) and 0)
    else:
        for _ in range(count):
            subprocess.Popen([sys.executable, "-c", EATER, str(mib), "20"])
    time.sleep(20)


@job(isolated=True, max_memory=100, timeout=20, keep_result=60)
def shares_with_its_forks(mib: int = 60, count: int = 6) -> int:
    """Has `mib` once, though each of its processes has it resident."""
    data = bytearray(b"x") * (mib * MIB)
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            time.sleep(1.0)
            os._exit(len(data) and 0)
        pids.append(pid)
    return sum(os.waitpid(pid, 0)[1] for pid in pids)


@job(isolated=True, max_processes=10, timeout=20)
def forks(count: int = 40, how: str = "children") -> None:
    """A bomb of at most `count`."""
    if how == "chain":
        for _ in range(count):
            if os.fork():
                signal.pause()
    elif how == "orphans":
        for _ in range(count):
            if os.fork() == 0:
                if os.fork() == 0:
                    time.sleep(20)
                os._exit(0)
    else:
        for _ in range(count):
            if os.fork() == 0:
                time.sleep(20)
                os._exit(0)
    time.sleep(20)


@job(isolated=True, max_processes=10, timeout=20, keep_result=60)
def forks_within_its_limit() -> int:
    pids = []
    for _ in range(9):
        pid = os.fork()
        if pid == 0:
            time.sleep(0.8)
            os._exit(0)
        pids.append(pid)
    return sum(os.waitpid(pid, 0)[1] for pid in pids)


@job(isolated=True, max_cpu=1, timeout=60)
def spins_in_c() -> int:
    return sum(range(10**12))


@job(isolated=True, timeout=0.3)
def spins_in_c_too_long() -> int:
    return sum(range(10**12))


@job(isolated=True, max_cpu=1, timeout=60)
def spins_and_ignores_it() -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    while True:
        pass


@job(isolated=True, max_file_size=2, timeout=20)
def fills_the_disk(path: str, how: str = "python") -> int:
    """What became of it; at most 16 MiB."""
    if how == "program":
        command = ["dd", "if=/dev/zero", f"of={path}", "bs=1M", "count=16", "status=none"]
        return subprocess.run(command, check=False).returncode
    if how == "signal":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with open(path, "wb", buffering=0) as file:
        for _ in range(16):
            file.write(b"x" * MIB)
    return 0


@job(isolated=True, max_files=32)
def opens_files(count: int) -> int:
    return len([os.open("/dev/null", os.O_RDONLY) for _ in range(count)])


@job(isolated=True, max_files=48, max_file_size=3, keep_result=60)
def limits_it_has() -> dict[str, Any]:
    which = ("NOFILE", "FSIZE", "CORE", "DATA")
    return {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in which}


@job(isolated=True, timeout=0.3)
def stops_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@job(isolated=True, timeout=0.3)
def blocks_every_signal() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    while True:
        time.sleep(1)


@job(isolated=True, timeout=0.3)
def hides_among_threads() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_waits_in_a_thread, daemon=True).start()
    while True:
        time.sleep(60)


def _waits_in_a_thread() -> None:
    time.sleep(60)


@job(isolated=True, timeout=0.3)
def becomes_another_program() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.execvp("sleep", ["sleep", "20"])


@job(isolated=True, timeout=0.3)
def recurses_deeply(depth: int = 300) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if depth:
        recurses_deeply(depth - 1)
    while True:
        time.sleep(60)


@job(isolated=True, timeout=0.3)
def floods_its_stack_pipe() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        try:
            os.write(4, b"  File nonsense\n" * 4000)
        except BlockingIOError:
            time.sleep(0.001)


@job(isolated=True, timeout=30)
def is_taken_by_the_oom_killer(cgroup: str) -> None:
    with open(f"{cgroup}/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    data = [bytearray(b"x") * MIB for _ in range(150)]
    time.sleep(20 + len(data))


@job(isolated=True)
def fails_with_secrets() -> None:
    raise RuntimeError("cannot open /srv/app/private/data.json with redis://bob:s3cret@db/0, password=hunter2")


@job(isolated=True)
def closes_its_result_pipe_and_goes_on() -> str:
    os.close(3)
    return "nobody hears that"
