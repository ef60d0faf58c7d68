"""Where the time of the no-op jobs goes: the daemon of that figure under cProfile, and the 25 functions that took most of it.

cProfile slows Python code down several times and C code hardly, so shares are what counts, not seconds. The daemon runs with
--burst, so it ends by itself and the profile is complete. For a picture without distortion: py-spy record -p PID.
"""

from __future__ import annotations

import pstats
from pathlib import Path

import marks
from bench import Bench
from kqueued import Kqueued, connect, expect_ready
from light import noop
from throughput import fill

TOP = 25


def profile(bench: Bench, file: Path) -> None:
    jobs = bench.pick(20_000, 5_000)
    room, url = bench.empty_queue()
    client = connect(url)
    fill(noop, jobs)
    expect_ready(client, jobs)
    with Kqueued(room, url, python=["-m", "cProfile", "-o", str(file)], options=["--burst"]) as daemon:
        daemon.wait_for("noop", jobs)
        daemon.wait_for_exit()
        daemon.finished(client, noop=jobs)
        rate = marks.rate(marks.read(daemon.marks, "noop"))
    print(f"\n{bench.broker}: {jobs} no-op inline jobs under cProfile, {rate:,.0f}/s\n", flush=True)
    pstats.Stats(str(file)).strip_dirs().sort_stats("tottime").print_stats(TOP)
