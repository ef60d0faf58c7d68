"""Spending: how many jobs a second, and the CPU of daemons, of their children and of Redis for one of them.

Daemons are started first, do some jobs, and are stopped (SIGSTOP) while all the others are enqueued; from then on until the queue
is empty is what counts. So no start is in it, and the CPU of a job does not depend on who else works on the machine, as rates do.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import marks
import procfs
from bench import Bench
from kqueued import Kqueued, connect, expect_ready
from throughput import fill

from kqueue.client import Client

WARM_UP = 50
REST_S = 0.3


class Spent(NamedTuple):
    """Times are microseconds of CPU for a job."""

    rate: float  # jobs a second, from the first to the last
    daemon_us: float  # of all daemons together
    children_us: float  # of templates, pools and jobs in processes of their own
    redis_us: float  # 0: the broker is SQLite, whose work is the daemon's
    client_us: float  # of this process, to enqueue in bulk


def spend(
    bench: Bench, job: Any, count: int, args: Sequence[Any] = (), *, daemons: int = 1, isolated_modules: Sequence[str] = (),
    url: Callable[[str], str] = lambda url: url, queue: str = "", more: str = "", send: Callable[[int], None] | None = None,
) -> Spent:  # fmt: skip
    """`url`: changes it; `queue`, `more`: see Kqueued; `send`: enqueues so many jobs, where `fill` is not to."""
    name = job.registration.name
    send = send or (lambda jobs: fill(job, jobs, *args))
    room, plain_url = bench.empty_queue()
    with ExitStack() as stack:
        client = connect(url(plain_url))
        started: list[Kqueued] = []
        for number in range(daemons):
            daemon = Kqueued(
                room.with_name(f"{room.name}-{number}"), url(plain_url), ["light"], isolated_modules, queue=queue, more=more,
                marks_in=started[0].marks if started else None,
            )  # fmt: skip
            started.append(stack.enter_context(daemon))
            daemon.wait_for_socket()
        send(WARM_UP)
        started[0].finished(client, **{name: WARM_UP})
        time.sleep(REST_S)
        for daemon in started:
            os.kill(daemon.pid, signal.SIGSTOP)
        try:
            client_us = _enqueue_us(client, send, count)
            daemons_s, children_s, redis_s = _read(started, bench)
        finally:
            for daemon in started:
                os.kill(daemon.pid, signal.SIGCONT)
        started[0].finished(client, **{name: WARM_UP + count})
        after = _read(started, bench)
        spent = [(now_s - then_s) * 1e6 / count for now_s, then_s in zip(after, (daemons_s, children_s, redis_s), strict=True)]
        rate = marks.rate(marks.read(started[0].marks, name)[WARM_UP:])
    return Spent(rate, *spent, client_us)


def _enqueue_us(client: Client, send: Callable[[int], None], count: int) -> float:
    began_s = time.process_time()
    send(count)
    taken_s = time.process_time() - began_s
    expect_ready(client, count)
    return taken_s * 1e6 / count


def _read(daemons: Sequence[Kqueued], bench: Bench) -> tuple[float, float, float]:
    """Seconds of CPU by now: of the daemons, of what is below them, of Redis."""
    daemons_s = sum(procfs.cpu_s(daemon.pid) for daemon in daemons)
    children_s = sum(procfs.cpu_below_s(daemon.pid) for daemon in daemons)
    return daemons_s, children_s, procfs.cpu_s(bench.redis.pid) if bench.redis is not None else 0.0
