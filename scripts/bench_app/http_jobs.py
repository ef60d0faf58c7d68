"""HTTP: inline jobs that each send one GET to a server that answers after 100 ms, in one daemon.

The server is a process of its own (answering.py). All jobs wait in the queue when the daemon starts; `inline.max_concurrent` lets
5,000 run, and whenever one ends another takes its place. The server answers the first when all 5,000 are in flight, and says so:
the RSS is the largest of that moment and of all the time after it. Then it answers each after 100 ms, so that how many are in
flight is the rate times that, or more. The rate is taken from the end of the 5,000th job to the end of the last; the lag is what
`kqueue status` says in the middle of that: the time that a turn of the loop takes, of the last 512.
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
    with Answering(ANSWER_S, IN_FLIGHT) as server:
        fill(web, jobs, f"http://127.0.0.1:{server.port}/")
        expect_ready(client, jobs)
        with Kqueued(room, url, ["webbed"], inline=IN_FLIGHT) as daemon:
            server.wait_for_all()
            largest_mib, lag_ms = _watch(daemon, jobs, procfs.resident_mib(daemon.pid))
            daemon.finished(client, web=jobs)
            moments = marks.read(daemon.marks, "web")
    return {"http": marks.rate(moments[IN_FLIGHT:]), "http_memory": largest_mib, "http_lag": lag_ms}


class Answering:
    """answering.py, running while the `with` lasts."""

    def __init__(self, seconds: float, first: int, *certificate: str) -> None:
        self._command = [sys.executable, str(HERE / "answering.py"), str(seconds), str(first), *certificate]

    def __enter__(self) -> Answering:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_us
        )
        self.port = int(self._line())
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def wait_for_all(self) -> None:
        """Until the first have all been asked for."""
        if self._line() != "all\n":
            raise Failure("the server ended")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def _watch(daemon: Kqueued, jobs: int, largest_mib: float) -> tuple[float, float]:
    """Until nearly all are done: the largest RSS, and the lag halfway."""
    lag_ms, seen, deadline = None, 0, time.monotonic() + PATIENCE_S
    while (now_seen := marks.count(daemon.marks, "web")) < jobs * 9 // 10:
        if now_seen != seen:
            seen, deadline = now_seen, time.monotonic() + PATIENCE_S
        if time.monotonic() > deadline:
            raise Failure(f"only {seen} of {jobs} requests were answered")
        daemon.expect_running()
        largest_mib = max(largest_mib, procfs.resident_mib(daemon.pid))
        if lag_ms is None and now_seen >= (IN_FLIGHT + jobs) // 2:
            lag_ms = float(daemon.status()["loop"]["lag_ms_p99"])
        time.sleep(10 * LOOK_S)
    if lag_ms is None:
        raise Failure("the daemon was too fast to be asked")
    return largest_mib, lag_ms
