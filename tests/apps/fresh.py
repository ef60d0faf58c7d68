"""Python jobs that start by exec: a new interpreter for each. Imported by the template and by each of these."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from typing import Any

from kqueue import current, job, sleep

IMPORTED_FOR = os.environ.get("KQUEUE_JOB_ID", "")  # "": by the template
SEEN = [os.getpid()]


@job(name="fresh_about", start="exec", keep_result=60, max_memory=50)
def about() -> dict[str, Any]:
    with open("/proc/self/stat") as stat:
        started = int(stat.read().rpartition(")")[2].split()[19])
    with open(f"/proc/{os.getppid()}/stat") as stat:
        template_started = int(stat.read().rpartition(")")[2].split()[19])
    return {
        "imported_for": IMPORTED_FOR, "id": current().id, "pid": os.getpid(), "seen": SEEN, "sid": os.getsid(0),
        "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd")), "stdin": os.readlink("/proc/self/fd/0"),
        "title": open("/proc/self/cmdline").read(), "no_new_privs": "NoNewPrivs:\t1" in open("/proc/self/status").read(),
        "data": resource.getrlimit(resource.RLIMIT_DATA)[0], "after": started >= template_started,
        "modules": [name for name in ("kqueue.execution.template", "tests.apps.zoo") if name in sys.modules],
        "sigint": signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "core": resource.getrlimit(resource.RLIMIT_CORE),
    }  # fmt: skip


@job(name="fresh_async", start="exec", keep_result=60)
async def runs_under_asyncio() -> str:
    await asyncio.sleep(0.001)
    return type(asyncio.get_running_loop()).__name__


@job(name="fresh_generator", start="exec", keep_result=60)
def generator() -> Any:
    yield sleep(0.001)
    return [about.options(delay=1000).dispatch().id, current().then(about.options(delay=1000).job())]


@job(name="fresh_hangs", start="exec", timeout=1.0)
def hangs() -> None:
    try:
        signal.pause()
    finally:
        print("cleaned up")


@job(name="fresh_eats", start="exec", max_memory=32)
def eats() -> int:
    return len(b"x" * 400_000_000)


@job(name="fresh_dies", start="exec")
def dies() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
