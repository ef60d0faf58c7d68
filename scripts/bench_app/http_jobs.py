"""HTTP: inline jobs that each send one GET to a server that answers after 100 ms. 5,000 are in flight, in one daemon.

The server is a process of its own (answering.py). All jobs wait in the queue when the daemon starts; `inline.max_concurrent` lets
5,000 run, and whenever one ends another takes its place. The rate is that between the 5,000th end and the 5,000th last one, so
that all were in flight then. RSS is the largest that was seen; lag is what `kqueue status` says in the middle: how long the turns
of the loop take, of the last 512.
"""

from __future__ import annotations

import subprocess
import sys
import time

import marks
import procfs
from bench import Bench
from kqueued import HERE, LOOK_S, PATIENCE_S, Failure, Kqueued, connect, expect_ready
from redis_server import die_with_us
from throughput import fill
from webbed import web

IN_FLIGHT = 5_000
ANSWER_S = 0.1


def measure(bench: Bench) -> dict[str, float]:
    jobs = bench.pick(40_000, 15_000)
    room, url = bench.empty_queue()
    client = connect(url)
    command = [sys.executable, str(HERE / "answering.py"), str(ANSWER_S)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_us
    ) as server:  # fmt: skip
        assert server.stdout is not None
        port = int(server.stdout.readline())
        fill(web, jobs, f"http://127.0.0.1:{port}/")
        expect_ready(client, jobs)
        with Kqueued(room, url, ["webbed"], inline=IN_FLIGHT) as daemon:
            largest_mib, lag_ms = _watch(daemon, jobs)
            daemon.finished(client, web=jobs)
            moments = marks.read(daemon.marks, "web")
        server.terminate()
    return {"http": marks.rate(moments[IN_FLIGHT:-IN_FLIGHT]), "http_memory": largest_mib, "http_lag": lag_ms}


def _watch(daemon: Kqueued, jobs: int) -> tuple[float, float]:
    """Until three quarters are done: the largest RSS, and the lag halfway."""
    largest_mib, lag_ms, seen, deadline = 0.0, None, 0, time.monotonic() + PATIENCE_S
    while (now_seen := marks.count(daemon.marks, "web")) < jobs * 3 // 4:
        if now_seen != seen:
            seen, deadline = now_seen, time.monotonic() + PATIENCE_S
        if time.monotonic() > deadline:
            raise Failure(f"only {seen} of {jobs} requests were answered")
        daemon.expect_running()
        largest_mib = max(largest_mib, procfs.resident_mib(daemon.pid))
        if lag_ms is None and now_seen >= jobs // 2:
            lag_ms = float(daemon.status()["loop"]["lag_ms_p99"])
        time.sleep(10 * LOOK_S)
    if lag_ms is None:
        raise Failure("the daemon was too fast to be asked")
    return largest_mib, lag_ms
