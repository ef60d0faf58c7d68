"""KQueue beside its peers: medians and ratios of all rounds, as text, as Markdown for docs/performance.md, and as JSON.

A ratio says how many times better KQueue is, so that 2 is good in rates and in delays alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peers.table import PEERS, WORKERS

Samples = Mapping[tuple[str, str], Sequence[float]]  # (key of a contender, of a figure) -> one value a round

BEGIN, END = "<!-- begin: ./scripts/bench --peers --markdown writes what follows -->", "<!-- end -->"
QUIET_CPUS = 0.3  # of all
DISTURBED = (
    " **So they had to share: rates are lower and delays longer than on a quiet machine, not equally for all, and ratios rough.**"
)
OURS = {"inline": "KQueue, inline, one process", "pool": "KQueue, pool of 2", "fork": "KQueue, a fork for each job"}
LABELS: Mapping[str, str] = {
    **OURS,
    **{worker.key: f"{peer.label}, {worker.label}" for peer in PEERS for worker in WORKERS if worker.peer == peer.name},
}
KINDS: Mapping[str, str] = {**{key: key for key in OURS}, **{worker.key: worker.kind for worker in WORKERS}}


class Figure(NamedTuple):
    key: str
    label: str
    more: bool  # True: more is better; False: less is
    unit: str = "/s"


class Table(NamedTuple):
    """The figures of one work. The first decides the order of rows; ratios are taken of it."""

    title: str
    figures: Sequence[Figure]


TABLES: Sequence[Table] = (
    Table(
        "Jobs that do nothing",
        (
            Figure("noop", "jobs/s", True),
            Figure("memory", "MiB (PSS)", False, "MiB"),
            Figure("processes", "processes", False, ""),
        ),
    ),
    Table("Enqueueing, one at a time", (Figure("single", "jobs/s", True),)),
    Table("Enqueueing in bulk", (Figure("bulk", "jobs/s", True),)),
    Table(
        "From enqueueing to start, idle worker",
        (Figure("late_p50", "p50, ms", False, "ms"), Figure("late_p99", "p99, ms", False, "ms")),
    ),
    Table("Jobs that wait 100 ms", (Figure("parked", "jobs/s", True),)),
    Table(
        "Jobs that ask a web server, which answers after 100 ms",
        (Figure("http", "jobs/s", True), Figure("http_memory", "MiB (PSS)", False, "MiB")),
    ),
)
FIGURES: Mapping[str, Figure] = {figure.key: figure for table in TABLES for figure in table.figures}


class Claim(NamedTuple):
    """`ours` is to be at least `factor` times as good as the best of `theirs` (empty: of all)."""

    label: str
    figure: str
    ours: str
    theirs: Sequence[str]
    factor: float


CLAIMS: Sequence[Claim] = (
    Claim("no-op inline jobs, against the best peer", "noop", "inline", (), 6),
    Claim("no-op jobs in the pool, against Huey's 4 processes", "noop", "pool", ("huey-processes",), 2),
    Claim("no-op forked jobs, against RQ", "noop", "fork", ("rq",), 5),
    Claim("dispatch one at a time, against Huey", "single", "inline", ("huey-processes", "huey-threads"), 1),
)


def median(samples: Samples, contender: str, figure: str) -> float | None:
    values = samples.get((contender, figure))
    return statistics.median(values) if values else None


def times_better(ours: float | None, theirs: float | None, more: bool) -> float | None:
    """None: one of the two was not measured."""
    if not ours or not theirs:
        return None
    return ours / theirs if more else theirs / ours


def rows(samples: Samples, table: Table) -> list[str]:
    """The contenders that have its first figure, the best first."""
    figure = table.figures[0]
    found = {key: value for key in LABELS if (value := median(samples, key, figure.key)) is not None}
    return sorted(found, key=lambda key: found[key], reverse=figure.more)


def judged(samples: Samples) -> Iterator[tuple[Claim, float]]:
    """How many times better we are, for each claim of which both sides were measured."""
    for claim in CLAIMS:
        figure = FIGURES[claim.figure]
        theirs = [value for key in claim.theirs or KINDS if key not in OURS and (value := median(samples, key, figure.key))]
        if not theirs:
            continue
        ratio = times_better(median(samples, claim.ours, figure.key), (max if figure.more else min)(theirs), figure.more)
        if ratio is not None:
            yield claim, ratio


def cells(samples: Samples, table: Table, key: str) -> list[str]:
    """Of one row: who, each figure (of the first also the smallest and the largest), and both ratios."""
    first = table.figures[0]
    values = samples[key, first.key]
    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    line = [LABELS[key], number(statistics.median(values)) + spread]
    for figure in table.figures[1:]:
        value = median(samples, key, figure.key)
        line.append("-" if value is None else number(value))
    for ours in ("inline", KINDS[key]):
        ratio = times_better(median(samples, ours, first.key), statistics.median(values), first.more)
        line.append("" if ratio is None or key in OURS else f"{number(ratio)} x")
    return line


def headings(table: Table) -> list[str]:
    return ["", *(figure.label for figure in table.figures), "KQueue inline is better", "KQueue of its kind is better"]


def as_text(samples: Samples, failures: Sequence[str]) -> str:
    parts = []
    for table in TABLES:
        lines = [headings(table), *(cells(samples, table, key) for key in rows(samples, table))]
        if len(lines) > 1:
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            parts.append(f"\n{table.title}")
            parts += ["  " + "  ".join(_padded(line, widths)).rstrip() for line in lines]
    parts += [
        f"{'reached' if ratio >= claim.factor else 'MISSED':8} {claim.label}: {number(ratio)} x, target {claim.factor:g} x"
        for claim, ratio in judged(samples)
    ]
    return "\n".join([*parts, *(f"FAILED   {failure}" for failure in failures)])


def as_markdown(
    conditions: Mapping[str, str], noise: Sequence[float], samples: Samples, failures: Sequence[str], chart: str
) -> str:
    """What stands between the two markers of docs/performance.md; `chart` is the picture's path from there."""
    rounds = max(map(len, samples.values()))
    parts = [
        f"Taken on {time.strftime('%d %B %Y')}: medians of {rounds} round{'s' * (rounds > 1)}, the smallest and the largest in "
        f"brackets. Before each round, {' and '.join(f'{busy:.1f}' for busy in noise)} CPUs were busy with something else."
        + (DISTURBED if max(noise) > QUIET_CPUS else ""),
        "",
        *(f"- {name}: {text}" for name, text in conditions.items()),
        "",
        f"![Jobs per second of KQueue and its peers]({chart})",
    ]
    for table in TABLES:
        keys = rows(samples, table)
        if keys:
            lines = [headings(table), ["---", *["---:"] * (len(headings(table)) - 1)]]
            lines += [cells(samples, table, key) for key in keys]
            parts += ["", f"### {table.title}", "", *(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)]
    claims = [
        f"| {claim.label} | ≥ {claim.factor:g} x | {number(ratio)} x | {'reached' if ratio >= claim.factor else 'missed'} |"
        for claim, ratio in judged(samples)
    ]
    if claims:
        parts += ["", "### Targets", "", "| | target | measured | |", "| --- | ---: | ---: | --- |", *claims]
    if failures:
        parts += ["", "### Not measured", "", *(f"- {failure.splitlines()[0]}" for failure in failures)]
    return "\n".join([*parts, "", "### Settings of the peers", "", settings_as_markdown()])


def settings_as_markdown() -> str:
    """Every peer's versions, command and delivery, from the table that they are run by."""
    lines = ["| worker | kind | installed | a job whose worker is killed | command |", "| --- | --- | --- | --- | --- |"]
    for worker in WORKERS:
        peer = next(peer for peer in PEERS if peer.name == worker.peer)
        installed, command = ", ".join(peer.requirements), " ".join(worker.command)
        lines.append(f"| {LABELS[worker.key]} | {worker.kind} | {installed} | {peer.delivery} | `{command}` |")
    return "\n".join(lines)


def write_between_markers(file: Path, text: str, begin: str = BEGIN) -> None:
    """Replace what stands there between `begin` and END. ValueError: there is not exactly one such place."""
    before, found, rest = file.read_text().partition(f"{begin}\n")
    _, found_end, after = rest.partition(f"{END}\n")
    if not (found and found_end) or begin in after:
        raise ValueError(f"{file} must have one line {begin!r} and then one line {END!r}; what is between them is replaced")
    file.write_text(f"{before}{begin}\n\n{text}\n\n{END}\n{after}")


def as_json(conditions: Mapping[str, str], noise: Sequence[float], samples: Samples, failures: Sequence[str]) -> dict[str, Any]:
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "conditions": dict(conditions),
        "busy_cpus_before_each_round": [round(busy, 2) for busy in noise],
        "peers": {peer.name: {"requirements": peer.requirements, "delivery": peer.delivery, "bulk": peer.bulk} for peer in PEERS},
        "workers": {worker.key: {"command": worker.command, "jobs": worker.jobs, "kind": worker.kind} for worker in WORKERS},
        "figures": [
            {
                "contender": key, "label": LABELS[key], "figure": name, "unit": FIGURES[name].unit,
                "more_is_better": FIGURES[name].more, "median": statistics.median(values), "samples": list(values),
                "times_better_is_kqueue": {
                    ours: times_better(median(samples, ours, name), statistics.median(values), FIGURES[name].more)
                    for ours in OURS
                },
            }
            for (key, name), values in samples.items()
        ],
        "targets": [
            {"label": claim.label, "target": claim.factor, "measured": ratio, "reached": ratio >= claim.factor}
            for claim, ratio in judged(samples)
        ],
        "failures": list(failures),
    }  # fmt: skip


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
