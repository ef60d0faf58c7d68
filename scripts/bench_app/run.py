"""Measures KQueue against its targets: real daemons on a Redis and on SQLite files of its own, several rounds, medians.

    ./scripts/bench [--broker redis|sqlite|both] [--rounds N] [--quick] [--only WORD] [--persistence KIND] [--json FILE]
    ./scripts/bench --only steps|costs [--rounds N] [--quick] [--markdown]
    ./scripts/bench --profile
    ./scripts/bench --peers [NAME,…] [--only noop|latency|parked|http] [--rounds N] [--quick] [--json FILE] [--markdown]

A round takes every measurement once, on each broker, so that what disturbs the machine for a while disturbs all of them alike.
How a figure is measured stands at the head of its file: idle, starting, twenty, latency, throughput, elsewhere, parked,
http_jobs, connections, lag, two, distant, crowded; steps and costs write pages of their own; compare for the comparison with
other queues. `marks` is what jobs leave behind, `kqueued` what runs them, `figures` the targets.

A target that is missed is said, and is no error: machines differ. A job that is lost, runs twice or stays in the queue is one:
that round's figure is left out, and the exit status is 1. Whatever was started is ended by its pid, and the temporary directory
is removed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import click
import comparing
import connections
import costs
import crowded
import distant
import elsewhere
import http_jobs
import idle
import lag
import lasting
import latency
import parked
import profiling
import report
import starting
import steps
import throughput
import twenty
import two
from bench import Bench
from figures import BROKERS, BY_KEY
from kqueued import Failure, compile_modules
from redis_server import PERSISTENCE, RedisServer

MEASUREMENTS: Mapping[str, Callable[[Bench], dict[str, float]]] = {
    "idle": idle.measure,
    "start": starting.measure,
    "twenty": twenty.measure,
    "latency": latency.measure,
    "noop": throughput.measure_inline,
    "forked": throughput.measure_forked,
    "pooled": throughput.measure_pooled,
    "exec": throughput.measure_exec,
    "elsewhere": elsewhere.measure,
    "parked": parked.measure,
    "lasting": lasting.measure,
    "http": http_jobs.measure,
    "tls": connections.measure_tls,
    "requests": connections.measure_requests,
    "lag": lag.measure,
    "two": two.measure,
    "distant": distant.measure,
    "ready": crowded.measure_ready,
    "crowded": crowded.measure,
}
PAGES: Mapping[str, Callable[[Bench, Mapping[str, str], int, bool], None]] = {"steps": steps.run, "costs": costs.run}
PAGE_FILES: Mapping[str, str] = {"steps": steps.FILE, "costs": costs.FILE}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--broker", type=click.Choice([*BROKERS, "both"]), default="both", show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), help="How often each figure is taken.  [default: 3; with --quick 1]")
@click.option("--quick", is_flag=True, help="Fewer jobs: a look, not a measurement.")
@click.option("--only", type=click.Choice([*MEASUREMENTS, *PAGES]), multiple=True, help="These alone. May be repeated.")
@click.option("--persistence", type=click.Choice(list(PERSISTENCE)), default="none", show_default=True, help="Of the Redis.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write every sample there, too.")
@click.option("--profile", is_flag=True, help="Run the no-op inline jobs under cProfile instead, and print the top 25.")
@click.option(
    "--peers", is_flag=False, flag_value="all", metavar="[NAME,…]",
    help="Compare with other queues instead, each installed into .venv-peers; --only takes noop, latency, parked, http.",
)
@click.option("--markdown", is_flag=True, help="With --peers, --only steps or costs: write that page of docs/.")
def main(
    broker: str, rounds: int | None, quick: bool, only: tuple[str, ...], persistence: str, json_file: Path | None, profile: bool,
    peers: str | None, markdown: bool,
) -> None:  # fmt: skip
    """Measure KQueue against its targets, with a Redis and daemons of its own."""
    if peers is not None:
        broker, named = "redis", comparing.chosen(peers)
    wanted = BROKERS if broker == "both" else (broker,)
    names = [name for name in MEASUREMENTS if name in only or not only]
    written = [name for name in PAGES if name in only]
    if written and peers is None:
        if names or len(written) > 1 or broker == "sqlite":
            raise click.UsageError(f"--only {written[0]} stands by itself, and is of Redis")
        broker = "redis"
    samples: dict[tuple[str, str], list[float]] = {}
    failures: list[str] = []
    noise: list[float] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kqueue-bench-"))).resolve()
        redis = stack.enter_context(RedisServer(directory / "redis", persistence)) if "redis" in wanted else None
        benches = [Bench(directory, redis if name == "redis" else None, quick) for name in wanted]
        found = report.conditions(directory, persistence if redis is not None else None)
        for name, text in found.items():
            click.echo(f"{name:9} {text}")
        compile_modules()
        if profile:
            for bench in benches:
                profiling.profile(bench, directory / f"{bench.broker}.prof")
            return
        if peers is not None:
            sys.exit(not comparing.run(benches[0], found, named, only, rounds or (1 if quick else 3), json_file, markdown))
        if written:
            try:
                PAGES[written[0]](benches[0], found, rounds or (1 if quick else 3), markdown)
            except Failure as failure:
                raise click.ClickException(str(failure)) from None
            return
        for number in range(1, (rounds or (1 if quick else 3)) + 1):
            noise.append(report.busy_cpus())
            click.echo(f"round {number}   {noise[-1]:.2f} of {os.cpu_count()} CPUs are busy with something else", err=True)
            for name, bench in product(names, benches):
                click.echo(f"          {name} on {bench.broker}", err=True)
                try:
                    for key, value in MEASUREMENTS[name](bench).items():
                        samples.setdefault((bench.broker, BY_KEY[key].key), []).append(value)
                except Failure as failure:
                    failures.append(f"{name} on {bench.broker}, round {number}: {failure}")
    report.print_table(samples, failures)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json(found, noise, samples, failures), indent=1) + "\n")
    if failures:
        sys.exit(1)


def _terminated(number: int, frame: object) -> None:
    sys.exit(128 + number)  # so that everything is ended on the way out


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    for variable in [name for name in os.environ if name.startswith(("KQUEUE_", "PYTHON"))]:
        del os.environ[variable]  # what is measured is the default
    main(prog_name="./scripts/bench")
