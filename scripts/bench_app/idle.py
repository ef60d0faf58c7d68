"""Idle: what a kqueued costs that has nothing to do. The target for its memory is for Redis, plaintext and unsigned.

A daemon with a small inline module and a small isolated one is given 3 s to come to rest; then its memory is read, and over
the next 5 s the CPU time and the wake-ups of the supervisor. A second daemon, whose isolated module is heavy to import (numpy,
or 50 MB), shows by how much the supervisor grows with it: by RSS, which other processes do not move. A job that runs afterwards
shows that both were alive.

PSS depends on who else maps the same interpreter: alone on a machine, it is the RSS. So all three are printed. On SQLite, waiting
for the disk counts as going to sleep, so each commit adds a wake-up or two to the periodic ones.
"""

from __future__ import annotations

import time

import procfs
from bench import Bench
from kqueued import Kqueued, connect
from light import noop

REST_S = 3.0
WATCH_S = 5.0


def measure(bench: Bench) -> dict[str, float]:
    room, url = bench.empty_queue()
    client = connect(url)
    with Kqueued(room, url, ["light"], ["forked"]) as daemon:
        daemon.wait_for_socket()
        time.sleep(REST_S)
        daemon.expect_running()
        pid = daemon.pid
        memory = procfs.memory(pid)
        tree_pss = sum(procfs.memory(each).pss for each in procfs.tree(pid))
        cpu_s, wakeups, began = procfs.cpu_s(pid), procfs.wakeups(pid), time.monotonic()
        time.sleep(WATCH_S)
        elapsed_s = time.monotonic() - began
        cpu_s, wakeups = procfs.cpu_s(pid) - cpu_s, procfs.wakeups(pid) - wakeups
        noop.dispatch()
        daemon.finished(client, noop=1)
    heavy, heavy_tree_pss = _with_a_heavy_module(bench)
    return {
        "idle_pss": memory.pss,
        "idle_anonymous": memory.anonymous,
        "idle_resident": memory.resident,
        "idle_tree_pss": tree_pss,
        "idle_cpu": cpu_s * 1000,
        "idle_wakeups": wakeups / elapsed_s,
        "heavy_growth": heavy.resident - memory.resident,
        "heavy_tree_pss": heavy_tree_pss,
    }


def _with_a_heavy_module(bench: Bench) -> tuple[procfs.Memory, float]:
    """The supervisor's memory, and the PSS of the whole tree."""
    room, url = bench.empty_queue()
    client = connect(url)
    with Kqueued(room, url, ["light"], ["heavy"]) as daemon:
        daemon.wait_for_socket()
        time.sleep(REST_S)
        daemon.expect_running()
        memory = procfs.memory(daemon.pid)
        tree_pss = sum(procfs.memory(each).pss for each in procfs.tree(daemon.pid))
        noop.dispatch()
        daemon.finished(client, noop=1)
    return memory, tree_pss
