"""Pages of the documentation that a measurement writes: tables, printed and put between the markers of a page."""

from __future__ import annotations

import os
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
import report
import versus

DOCS = Path(__file__).resolve().parents[2] / "docs"
WIDTH = 140
T = TypeVar("T")


class Table(NamedTuple):
    """The first column is text, the others are numbers, or text that is as short."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""  # what has to be known to read it; stands above it


class Page(NamedTuple):
    file: str  # in docs
    command: str  # which writes it
    tables: Sequence[Table]


def rounds_of(rounds: int, take: Callable[[], T]) -> tuple[list[T], list[float]]:
    """What each round brought, and how many CPUs were busy with something else before it."""
    taken, noise = [], []
    for number in range(1, rounds + 1):
        noise.append(report.busy_cpus())
        click.echo(f"round {number}   {noise[-1]:.2f} of {os.cpu_count()} CPUs are busy with something else", err=True)
        taken.append(take())
    return taken, noise


def medians(samples: Sequence[Sequence[float]]) -> list[float]:
    """Of each place."""
    return [statistics.median(values) for values in zip(*samples, strict=True)]


def show(page: Page, conditions: Mapping[str, str], noise: Sequence[float], write: bool) -> None:
    for table in page.tables:
        lines = [["", *table.head], *table.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        click.echo(f"\n{table.title}")
        for first, *rest in lines:
            cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
            click.echo(f"  {'  '.join(cells)}".rstrip())
    if write:
        begin = f"<!-- begin: {page.command} writes what follows -->"
        versus.write_between_markers(DOCS / page.file, as_markdown(page, conditions, noise), begin)


def as_markdown(page: Page, conditions: Mapping[str, str], noise: Sequence[float]) -> str:
    busy = " and ".join(f"{each:.1f}" for each in noise)
    first = (
        f"Taken on {time.strftime('%d %B %Y')}: medians of {len(noise)} round{'s' * (len(noise) > 1)}, before which {busy} "
        "CPUs were busy with something else."
    )
    parts = [textwrap.fill(first, WIDTH), "", *(f"- {name}: {text}" for name, text in conditions.items())]
    for table in page.tables:
        parts += ["", f"### {table.title}", ""]
        if table.text:
            parts += [textwrap.fill(table.text, WIDTH), ""]
        lines = [["", *table.head], ["---", *["---:"] * len(table.head)], *table.rows]
        parts += [f"| {' | '.join(line)} |".replace("  ", " ") for line in lines]
    return "\n".join(parts)


def number(value: float) -> str:
    return versus.number(value)
