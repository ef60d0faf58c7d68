"""Steps: where the time of one no-op job goes, in microseconds: `scripts/bench --only steps [--markdown]`.

What is timed is the real daemon and the real client, with the functions of stepping.py wrapped; stages.py says how, and what that
costs. Beside their sum stands what the same daemon spends on a job when nothing is wrapped (spending.py): the two agree as far as
the method is right. Redis is measured by itself (redis_costs.py). Jobs in a pool and in a fork are too many processes for
timers: there it is the CPU of each kind of process, and system calls counted by strace where that is installed and allowed.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pages
import procfs
import redis_costs
import stepping
from bench import Bench
from forked import forked_noop
from kqueued import PATIENCE_S, Failure, Kqueued, connect, expect_ready
from light import noop
from pages import Page, Table, number
from redis_costs import RedisCost
from redis_server import die_with_us
from spending import Spent, spend
from throughput import BATCH, fill
from warm import pooled_noop

FILE = "where-the-time-goes.md"
COMMAND = "./scripts/bench --only steps --markdown"
STARTS: Sequence[tuple[str, Any, str, int]] = (
    ("inline", noop, "light", 20_000), ("pool", pooled_noop, "warm", 5_000), ("fork", forked_noop, "forked", 600),
)  # fmt: skip
AT_ONCE = (1, 10, 200)  # the last is what a busy daemon does


class Round(NamedTuple):
    client: Sequence[Mapping[str, float]]  # one at a time, and in bulk: stage -> microseconds a job
    daemon: Mapping[str, float]
    spent: Mapping[str, Spent]
    redis: Sequence[RedisCost]
    syscalls: Mapping[str, float]  # empty: there is no strace, or it may not


def run(bench: Bench, conditions: Mapping[str, str], rounds: int, markdown: bool) -> None:
    taken, noise = pages.rounds_of(rounds, lambda: _round(bench))
    pages.show(Page(FILE, COMMAND, tables(taken)), conditions, noise, markdown)


def _round(bench: Bench) -> Round:
    assert bench.redis is not None
    room, url = bench.empty_queue()
    room.mkdir()
    jobs = bench.pick(20_000, 2_000)
    client = [
        _staged(room / "stages", [sys.executable, "-c", stepping.PROGRAM, str(room / "stages"), "client", url, *sizes], count)
        for count, *sizes in ((jobs // 10, str(jobs // 10), "1"), (jobs, str(jobs), str(BATCH)))
    ]
    spent = {
        name: spend(bench, job, bench.pick(count, count // 10), isolated_modules=[module]) for name, job, module, count in STARTS
    }
    return Round(
        client,
        _daemon(bench, jobs),
        spent,
        [redis_costs.measure(bench.redis, at_once, bench.pick(10_000, 2_000)) for at_once in AT_ONCE],
        {name: calls for name, job, module, count in STARTS if (calls := _syscalls(bench, job, module, count // 10)) is not None},
    )


def _staged(file: Path, command: Sequence[str], jobs: int) -> dict[str, float]:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Failure(f"the client failed: {done.stderr}")
    return _read(file, jobs)


def _daemon(bench: Bench, jobs: int) -> dict[str, float]:
    room, url = bench.empty_queue()
    client = connect(url)
    fill(noop, jobs)
    expect_ready(client, jobs)
    file = room.with_name(f"{room.name}-stages")
    with Kqueued(room, url, python=["-c", stepping.PROGRAM, str(file), "daemon"], options=["--burst"]) as daemon:
        daemon.wait_for_exit()
        daemon.finished(client, noop=jobs)
    return _read(file, jobs)


def _read(file: Path, jobs: int) -> dict[str, float]:
    found = json.loads(file.read_text())
    if found["missing"]:
        raise Failure(f"stepping.py names functions that there are not: {', '.join(found['missing'])}")
    return {stage: seconds * 1e6 / jobs for stage, (seconds, _) in found["taken"].items()}


def _syscalls(bench: Bench, job: Any, module: str, jobs: int) -> float | None:
    """Of a daemon and all below it, for a job. None: there is no strace, or it may not look."""
    if shutil.which("strace") is None:
        return None
    name = job.registration.name
    room, url = bench.empty_queue()
    client = connect(url)
    with Kqueued(room, url, ["light"], [module]) as daemon:
        fill(job, 20)
        daemon.finished(client, **{name: 20})
        file = room / "strace"
        whom = [option for pid in procfs.tree(daemon.pid) for option in ("-p", str(pid))]
        command = ["strace", "-f", "-c", "-o", str(file), *whom]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_us) as strace:
            assert strace.stderr is not None
            if "attached" not in strace.stderr.readline():
                strace.kill()
                return None
            fill(job, jobs)
            daemon.finished(client, **{name: 20 + jobs})
            strace.send_signal(signal.SIGINT)
            strace.wait(PATIENCE_S)
        total = next(line.split() for line in file.read_text().splitlines() if line.endswith(" total"))
        return int(total[3]) / jobs


# -- the page ---------------------------------------------------------------------------------------------------------------


def tables(rounds: Sequence[Round]) -> list[Table]:
    return [_of_client(rounds), _of_daemon(rounds), _of_redis(rounds), _of_starts(rounds)]


def _of_client(rounds: Sequence[Round]) -> Table:
    single, bulk = (_medians([each.client[kind] for each in rounds]) for kind in (0, 1))
    order = [stepping.BUILD, *stepping.CLIENT]
    rows = [[stage, number(single[stage]), number(bulk[stage])] for stage in order]
    rows.append(["**sum**", *(number(sum(taken.values())) for taken in (single, bulk))])
    text = "CPU: how long Redis takes to answer is not in it."
    return Table("The client", ["one at a time, µs", f"{BATCH:,} at once, µs"], rows, text)


def _of_daemon(rounds: Sequence[Round]) -> Table:
    taken = _medians([each.daemon for each in rounds])
    order = [stage for stage in stepping.DAEMON if stage != stepping.WAITING]
    rows = [[stage, number(taken[stage])] for stage in (*order, stepping.KERNEL)]
    whole = sum(taken[stage] for stage in (*order, stepping.KERNEL))
    real = statistics.median(each.spent["inline"].daemon_us for each in rounds)
    rows += [["**sum**", number(whole)], ["CPU of the same without timers", number(real)]]
    text = (
        "The last line is what the operating system says of a daemon with nothing wrapped. The sum is "
        f"{whole / real:.0%} of it: the timers throw what runs between out of the processor's caches, and waiting (epoll) is not "
        "in it; so shares are what counts."
    )
    return Table("The daemon, inline jobs, as many at once as it asks for", ["µs"], rows, text)


def _of_redis(rounds: Sequence[Round]) -> Table:
    found = [pages.medians([each.redis[place] for each in rounds]) for place in range(len(AT_ONCE))]
    steps = ("enqueue", "reserve", "settle")
    labels = (*steps, *(f"{step}, its script alone" for step in steps))
    rows = [[label, *(number(values[place]) for values in found)] for place, label in enumerate(labels)]
    rows.insert(3, ["**all three**", *(number(sum(values[:3])) for values in found)])
    return Table("Redis", [f"{at_once:,} at once, µs" for at_once in AT_ONCE], rows)


def _of_starts(rounds: Sequence[Round]) -> Table:
    rows = []
    for name, *_ in STARTS:
        rate, daemon, children, redis, client = pages.medians([each.spent[name] for each in rounds])
        calls = [each.syscalls[name] for each in rounds if name in each.syscalls]
        counted = number(statistics.median(calls)) if calls else "-"
        rows.append([name, *map(number, (daemon, children, redis, client)), counted, number(rate)])
    head = ["daemon, µs", "template and children, µs", "Redis, µs", "client, in bulk, µs", "system calls", "jobs/s"]
    return Table("CPU of a job by the way in which it starts", head, rows)


def _medians(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {stage: statistics.median(each[stage] for each in samples) for stage in samples[0]}
