"""Distant: no-op inline jobs from a Redis that is 2 ms away, against the same one through the same proxy without the delay.

The proxy (delaying.py) is a process of its own between the daemon and Redis; the jobs are enqueued without it. Both ways of it
are taken by turns, and twice in a round, the first one last the second time. The rate is that of throughput.py. How long a
round trip then is, is measured by PING through the proxy; and so that nobody has to believe that the proxy is not what holds
jobs up, there is the share of a CPU that it used while jobs ran, and the rate through it without delay stands beside that
without it ("noop").
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from urllib.parse import urlsplit

import marks
import procfs
from bench import Bench
from kqueued import HERE, PATIENCE_S, Kqueued, connect, expect_ready
from light import noop
from redis_server import die_with_us
from throughput import fill

DELAY_S = 0.001  # each way
PINGS = 100


def measure(bench: Bench) -> dict[str, float]:
    if bench.broker != "redis":
        return {}
    taken: dict[float, list[tuple[float, float]]] = {DELAY_S: [], 0.0: []}
    for delay_s in (0.0, DELAY_S, DELAY_S, 0.0):
        taken[delay_s].append(_rate(bench, delay_s))
    near, far = (statistics.mean(rate for rate, _ in taken[delay_s]) for delay_s in (0.0, DELAY_S))
    with Delaying(_port(bench.empty_queue()[1]), DELAY_S) as proxy:
        round_trip_s = proxy.round_trip_s()
    return {
        "near_noop": near,
        "distant_noop": far,
        "distant_share": far / near * 100,
        "distant_round_trip": round_trip_s * 1000,
        "distant_proxy": max(share for values in taken.values() for _, share in values) * 100,
    }


def _rate(bench: Bench, delay_s: float) -> tuple[float, float]:
    """Jobs a second, and the share of a CPU that the proxy used meanwhile."""
    jobs = bench.pick(60_000, 15_000)
    room, url = bench.empty_queue()
    client = connect(url)
    fill(noop, jobs)
    expect_ready(client, jobs)
    with Delaying(_port(url), delay_s) as proxy, Kqueued(room, f"redis://127.0.0.1:{proxy.port}/0") as daemon:
        daemon.wait_for("noop", 1)
        cpu_s, began = procfs.cpu_s(proxy.pid), time.monotonic()
        daemon.wait_for("noop", jobs)
        share = (procfs.cpu_s(proxy.pid) - cpu_s) / (time.monotonic() - began)
        daemon.finished(client, noop=jobs)
        return marks.rate(marks.read(daemon.marks, "noop")), share


def _port(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


class Delaying:
    """delaying.py in front of `port`, running while the `with` lasts."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._command = [sys.executable, str(HERE / "delaying.py"), str(port), str(delay_s)]

    def __enter__(self) -> Delaying:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_us
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def round_trip_s(self) -> float:
        """Of a PING to the Redis behind it; median."""
        taken = []
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as connection:
            for _ in range(PINGS):
                began = time.perf_counter()
                connection.sendall(b"PING\r\n")
                connection.recv(64)
                taken.append(time.perf_counter() - began)
        return statistics.median(taken)
