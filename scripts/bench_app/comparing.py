"""`scripts/bench --peers`: the rounds of compare, and what is printed and written of them by versus and chart."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import chart
import click
import report
import versus
from bench import Bench
from compare import WORKS, Comparison
from kqueued import Failure
from peers.table import PEERS

DOCS = Path(__file__).resolve().parents[2] / "docs"
METHOD = (
    "KQueue with its default settings, peers as in the table of settings; all jobs stand in the queue when the worker starts; "
    "jobs mark a file (8 bytes, O_APPEND); the contenders take turns"
)


def chosen(names: str) -> list[str]:
    """The peers that "all" or "rq,huey" means."""
    known = [peer.name for peer in PEERS]
    if names == "all":
        return known
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise click.UsageError(f"there is no peer {unknown[0]!r}; there are {', '.join(known)}")
    return [name for name in known if name in wanted]


def works(only: Sequence[str]) -> list[str]:
    unknown = [name for name in only if name not in WORKS]
    if unknown:
        raise click.UsageError(f"--peers does not compare {unknown[0]!r}, but {', '.join(WORKS)}")
    return [name for name in WORKS if name in only or not only]


def run(
    bench: Bench, conditions: Mapping[str, str], peers: Sequence[str], only: Sequence[str], rounds: int,
    json_file: Path | None, markdown: bool,
) -> bool:  # fmt: skip
    """Whether nothing failed."""
    comparison = Comparison(bench, peers, works(only))
    conditions = {name: text for name, text in conditions.items() if name != "SQLite"} | {"method": METHOD}
    samples: dict[tuple[str, str], list[float]] = {}
    failures: list[str] = []
    noise: list[float] = []
    for number in range(1, rounds + 1):
        noise.append(report.busy_cpus())
        click.echo(f"round {number}   {noise[-1]:.2f} of {os.cpu_count()} CPUs are busy with something else", err=True)
        for contender, taken in comparison.round():
            if isinstance(taken, Failure):
                failures.append(f"{versus.LABELS[contender]}, round {number}: {taken}")
            else:
                for figure, value in taken.items():
                    samples.setdefault((contender, figure), []).append(value)
    click.echo(versus.as_text(samples, failures))
    if json_file is not None:
        json_file.write_text(json.dumps(versus.as_json(conditions, noise, samples, failures), indent=1) + "\n")
    if markdown and samples:
        (DOCS / "performance.svg").write_text(chart.svg(panels(samples)))
        versus.write_between_markers(
            DOCS / "performance.md", versus.as_markdown(conditions, noise, samples, failures, "performance.svg")
        )
    return not failures


def panels(samples: versus.Samples) -> list[chart.Panel]:
    """One for each work whose figure is a rate of jobs that run."""
    found = []
    for table in versus.TABLES:
        figure = table.figures[0]
        bars = [
            chart.Bar(versus.LABELS[key], value, versus.number(value), key in versus.OURS)
            for key in versus.rows(samples, table)
            if (value := versus.median(samples, key, figure.key)) is not None
        ]
        if bars and figure.key in WORKS:
            found.append(chart.Panel(f"{table.title}: {figure.label}", bars))
    return found
