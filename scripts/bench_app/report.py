"""The samples of all rounds, as a table for people and as JSON for programs; and on what they were taken."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import procfs
import redis_server
from figures import FIGURES, Figure

Samples = Mapping[tuple[str, str], Sequence[float]]  # (broker, key of the figure) -> one value a round


def conditions(directory: Path, persistence: str | None) -> dict[str, str]:
    """On what it runs. `persistence` None: there is no Redis in it."""
    found = {
        "machine": f"{_cpu_model()}, {os.cpu_count()} CPUs, {_memory_gib():.0f} GiB, {platform.system()} {platform.release()}",
        "versions": f"kqueue {version('kqueue')} ({_commit()}), Python {platform.python_version()}, "
        f"hiredis {version('hiredis')}, SQLite {sqlite3.sqlite_version}",
        "method": "real daemons, default settings; jobs mark a file (8 bytes, O_APPEND); median of the rounds",
        "SQLite": f"synchronous=FULL; files on {_filesystem(directory)}, where a 4 KiB write and fsync take "
        f"{_fsync_s(directory) * 1000:.2f} ms",
    }
    if persistence is not None:
        durability = "without any persistence" if persistence == "none" else f"with appendfsync {persistence}"
        found["Redis"] = f"{redis_server.version()}, over loopback TCP, {durability}"
    return found


def busy_cpus() -> float:
    """How many CPUs are busy while we are not: the noise of a shared machine."""
    before, began = procfs.busy_s(), time.monotonic()
    time.sleep(1)
    return (procfs.busy_s() - before) / (time.monotonic() - began)


def print_table(samples: Samples, failures: Sequence[str]) -> None:
    width = max(len(figure.label) for figure in FIGURES)
    for broker in dict.fromkeys(broker for broker, _ in samples):
        rounds = max(len(values) for (name, _), values in samples.items() if name == broker)
        heading = f"{broker}, {rounds} round{'s' * (rounds > 1)}"
        click.echo(f"\n{heading:{width}}  {'median':>11} {'min':>11} {'max':>11}      target")
        for figure in FIGURES:
            values = samples.get((broker, figure.key))
            if values:
                click.echo(_line(broker, figure, values, width))
    for failure in failures:
        click.echo(f"\nFAILED: {failure}", err=True)


def as_json(found: Mapping[str, str], noise: Sequence[float], samples: Samples, failures: Sequence[str]) -> dict[str, Any]:
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "conditions": dict(found),
        "busy_cpus_before_each_round": [round(busy, 2) for busy in noise],
        "figures": [
            {
                "broker": broker, "figure": figure.key, "label": figure.label, "unit": figure.unit,
                "median": statistics.median(values), "min": min(values), "max": max(values), "samples": list(values),
                "target": figure.target_on(broker), "more_is_better": figure.more,
                "reached": figure.reached(broker, statistics.median(values)),
            }
            for broker in dict.fromkeys(broker for broker, _ in samples)
            for figure in FIGURES
            if (values := samples.get((broker, figure.key)))
        ],
        "failures": list(failures),
    }  # fmt: skip


def _line(broker: str, figure: Figure, values: Sequence[float], width: int) -> str:
    median = statistics.median(values)
    columns = " ".join(f"{_number(value):>11}" for value in (median, min(values), max(values)))
    line = f"  {figure.label:{width - 2}}  {columns} {figure.unit:4}"
    target = figure.target_on(broker)
    if target is None:
        return line.rstrip()
    return f"{line} {'≥' if figure.more else '≤'} {_number(target):7} {'reached' if figure.reached(broker, median) else 'MISSED'}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.4g}"


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as cpuinfo:
        return next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), platform.machine())


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _commit() -> str:
    here = Path(__file__).parent
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "no commit"


def _filesystem(directory: Path) -> str:
    best, kind = "", "an unknown file system"
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            _, point, name, *_ = line.split()
            if directory.is_relative_to(point) and len(point) >= len(best):
                best, kind = point, name
    return kind


def _fsync_s(directory: Path) -> float:
    """Median of 50: what a durable commit cannot be faster than."""
    taken = []
    with open(directory / "fsync", "wb", buffering=0) as file:
        for _ in range(50):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)
