"""How things look on a terminal: tables, times, what came out of a queue. Strings in, strings out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from ..observe.logs import json_text, printable

__all__ = ["ago", "block", "duration", "json_text", "moment", "printable", "table"]

_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = ()) -> str:
    """Columns under `headings`; those named in `right` are aligned there. Cells are shown printable, None as a dash."""
    cells = [list(headings), *[["-" if cell is None else printable(str(cell)) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    lines = []
    for row in cells:
        padded = (
            cell.rjust(width) if heading in right else cell.ljust(width)
            for cell, width, heading in zip(row, widths, headings, strict=True)
        )  # fmt: skip
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def block(text: str, indent: str) -> str:
    """Lines of a traceback or of output: printable, but still lines."""
    return "\n".join(f"{indent}{printable(line.expandtabs(4))}".rstrip() for line in text.rstrip().split("\n"))


def duration(seconds: float) -> str:
    """Like "12 ms", "3.2 s", "2 min 5 s", "3 h 12 min", "4 d 1 h"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts: list[str] = []
    for size, unit in _UNITS:
        if left >= size or parts:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2])


def ago(then: float) -> str:
    """Like "in 5.0 s" or "2 min 5 s ago". `then`: seconds since 1970."""
    left_s = then - time.time()
    return f"in {duration(left_s)}" if left_s > 0 else f"{duration(-left_s)} ago"


def moment(then: float) -> str:
    """Like "2026-11-24 08:00:00 (2 min 5 s ago)". `then`: seconds since 1970."""
    try:
        local = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(then))
    except (OverflowError, ValueError, OSError):  # anything may stand in an envelope
        return f"{then} s since 1970"
    return f"{local} ({ago(then)})"
