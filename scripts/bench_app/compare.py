"""KQueue and its peers on the same work, with the same marks, on one Redis, one after another, round by round.

    ./scripts/bench --peers[=rq,huey] [--only noop|latency|parked|http] [--rounds N] [--quick] [--json FILE] [--markdown]

`peers.table` says who they are and how each is set. Every worker but those of "http" and "parked" alone does, in one life:

noop      N jobs are enqueued, some one at a time, the others in bulk, both timed; then the worker starts. Each appends 8 bytes
          (the time) to a file. The rate: (N - 1) / (last mark - first mark). When all are done: PSS of all its processes.
latency   the same worker is idle, and gets a job every 25 ms: from right before it is enqueued to its first line.

parked    N jobs that wait 100 ms stand in the queue. The rate: N / (end of the last - start of the first).
http      The same with jobs that send a GET to a server (answering.py) that answers after 100 ms; and the largest PSS meanwhile.

KQueue runs with its defaults. A peer that fails is said to have failed, with what it had done by then, and the others go on.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import marks
import peer_venvs
import procfs
from bench import Bench
from forked import forked_late, forked_noop
from kqueued import HERE, Failure, Kqueued, connect
from latency import dispatch_at_a_pace
from light import late, noop
from peer_worker import PeerRun
from peers import ours
from peers.table import PEERS, WORKERS, Worker
from redis_server import die_with_us
from throughput import fill, timed
from warm import pooled_late, pooled_noop

WORKS = ("noop", "latency", "parked", "http")
PERIOD_S = 0.025
REST_S = 0.5  # before a worker counts as idle
LOOK_S = 0.1  # between two looks at memory; each makes the kernel walk page tables


class Start(NamedTuple):
    """One of the ways in which KQueue starts jobs. `jobs` as in peers.table."""

    key: str
    label: str
    noop: Any
    late: Any
    prefix: str  # of the names of its marks
    modules: Sequence[str]  # isolated ones
    jobs: Mapping[str, int]


STARTS: Sequence[Start] = (
    Start("inline", "inline, one process", noop, late, "", (), {"noop": 50_000, "parked": 2_000, "http": 5_000}),
    Start("pool", "pool of 2", pooled_noop, pooled_late, "pooled_", ("warm",), {"noop": 20_000}),
    Start("fork", "a fork for each job", forked_noop, forked_late, "forked_", ("forked",), {"noop": 800}),
)
Taken = dict[str, float]  # key of a figure -> its value


class Comparison:
    """`bench` must be on Redis. `peers`: their names. `works`: of WORKS."""

    def __init__(self, bench: Bench, peers: Sequence[str], works: Sequence[str]) -> None:
        self._bench = bench
        self._works = works
        self._workers = [worker for worker in WORKERS if worker.peer in peers]
        self._programs = {peer.name: peer_venvs.ready(peer) for peer in PEERS if peer.name in peers}

    def round(self) -> Iterator[tuple[str, Taken | Failure]]:
        """Every figure once: who, and what was taken of it, or why that is missing."""
        for work, contender in self._order():
            name = contender.key
            print(f"          {work} by {name}", file=sys.stderr)
            try:
                if isinstance(contender, Start):
                    yield name, self._take_ours(work, contender)
                else:
                    yield name, self._take_peers(work, contender)
            except Failure as failure:
                yield name, failure

    def _order(self) -> Iterator[tuple[str, Start | Worker]]:
        for work in ("noop", "parked", "http"):
            if work in self._works or (work == "noop" and "latency" in self._works):
                for contender in (*STARTS, *self._workers):
                    if work in contender.jobs:
                        yield work, contender

    def _jobs(self, work: str, contender: Start | Worker) -> int:
        return self._bench.pick(contender.jobs[work], -(-contender.jobs[work] // 5))

    def _take_ours(self, work: str, start: Start) -> Taken:
        room, url = self._bench.empty_queue()
        client = connect(url)
        jobs = self._jobs(work, start)
        if work == "noop":
            start.noop.dispatch()  # the client is connected
            singles = jobs // 10
            single_s = timed(lambda: [start.noop.dispatch() for _ in range(singles)])
            batch_s = timed(lambda: fill(start.noop, jobs - singles - 1))
            with Kqueued(room, url, ["light"], start.modules) as daemon:
                name = f"{start.prefix}noop"
                daemon.finished(client, **{name: jobs})
                taken = _noop(marks.read(daemon.marks, name), daemon.pid, (singles, single_s), (jobs - singles - 1, batch_s))
                if "latency" in self._works:
                    dispatch_at_a_pace(start.late, self._bench.pick(120, 40), PERIOD_S)
                    daemon.finished(client, **{f"{start.prefix}late": self._bench.pick(120, 40)})
                    taken |= _late(marks.read(daemon.marks, f"{start.prefix}late"))
            return taken
        with _arguments(work) as arguments:
            fill(getattr(ours, work), jobs, *arguments)
            with Kqueued(room, url, ["light", "peers.ours"]) as daemon:
                largest_mib = _largest_pss_mib(daemon.pid, daemon.marks, jobs) if work == "http" else 0.0
                daemon.finished(client, ends=jobs)
                return _whole(work, daemon.marks, daemon.pid, largest_mib)

    def _take_peers(self, work: str, worker: Worker) -> Taken:
        room, url = self._bench.empty_queue()
        jobs = self._jobs(work, worker)
        run = PeerRun(self._programs[worker.peer], room, url)
        if work == "noop":
            singles = jobs // 2
            single_s, batch_s = run.send(worker.peer, "noop", singles, jobs - singles)
            with run.worker(worker.command) as process:
                process.finished(noop=jobs)
                bulk = any(peer.bulk for peer in PEERS if peer.name == worker.peer)
                batched = (jobs - singles, batch_s) if bulk else None
                taken = _noop(marks.read(run.marks, "noop"), process.pid, (singles, single_s), batched)
                if "latency" in self._works:
                    run.send(worker.peer, "late", self._bench.pick(120, 40), PERIOD_S)
                    process.finished(late=self._bench.pick(120, 40))
                    taken |= _late(marks.read(run.marks, "late"))
            return taken
        with _arguments(work) as arguments:
            run.send(worker.peer, work, 0, jobs, *arguments)
            with run.worker(worker.command) as process:
                largest_mib = _largest_pss_mib(process.pid, run.marks, jobs) if work == "http" else 0.0
                process.finished(ends=jobs)
                return _whole(work, run.marks, process.pid, largest_mib)


def _noop(moments: Sequence[float], pid: int, singly: tuple[int, float], batched: tuple[int, float] | None) -> Taken:
    time.sleep(REST_S)
    taken = {
        "noop": marks.rate(moments),
        "memory": _pss_mib(pid),
        "processes": len(procfs.tree(pid)),
        "single": singly[0] / singly[1],
    }
    return taken | ({"bulk": batched[0] / batched[1]} if batched else {})


def _late(delays: Sequence[float]) -> Taken:
    return {f"late_p{percent}": marks.percentile(delays, percent) * 1000 for percent in (50, 99)}


def _whole(work: str, directory: Path, pid: int, largest_mib: float) -> Taken:
    starts, ends = marks.read(directory, "starts"), marks.read(directory, "ends")
    taken = {work: len(ends) / (ends[-1] - starts[0])}
    return taken | ({"http_memory": max(largest_mib, _pss_mib(pid))} if work == "http" else {})


def _pss_mib(pid: int) -> float:
    total_mib = 0.0
    for each in procfs.tree(pid):
        try:
            total_mib += procfs.memory(each).pss
        except (FileNotFoundError, ProcessLookupError, KeyError):  # it has just ended
            continue
    return total_mib


def _largest_pss_mib(pid: int, directory: Path, jobs: int) -> float:
    """Looked at until `jobs` are done, or none has been for a while: whoever waits for them says what is wrong then."""
    largest_mib, seen, progress = 0.0, -1, time.monotonic()
    while (now_seen := marks.count(directory, "ends")) < jobs and time.monotonic() < progress + 5:
        if now_seen != seen:
            seen, progress = now_seen, time.monotonic()
        largest_mib = max(largest_mib, _pss_mib(pid))
        time.sleep(LOOK_S)
    return largest_mib


@contextmanager
def _arguments(work: str) -> Iterator[list[str]]:
    """Of each job; and what it needs meanwhile, which for "http" is a server."""
    if work != "http":
        yield []
        return
    command = [sys.executable, str(HERE / "answering.py"), str(ours.PARKED_S), "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_us) as server:
        assert server.stdout is not None
        try:
            yield [f"http://127.0.0.1:{int(server.stdout.readline())}/"]
        finally:
            server.terminate()
