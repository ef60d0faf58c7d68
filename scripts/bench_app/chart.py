"""A bar chart as SVG, of nothing but rectangles and text: panels below each other, each with its own scale, from 0.

It has no background, and its colours are readable on a white page and on a black one (tests/test_bench_peers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

TEXT, OURS, OTHERS = "#76787a", "#2b82c9", "#8a8d91"
WIDTH, LABELS, VALUES = 760, 290, 90  # pixels: all of it, what stands before the bars, and behind the longest
ROW, BAR, TITLE, GAP = 22, 14, 30, 14


class Bar(NamedTuple):
    label: str
    value: float
    shown: str
    ours: bool


class Panel(NamedTuple):
    title: str
    bars: Sequence[Bar]


def svg(panels: Sequence[Panel]) -> str:
    height = sum(TITLE + ROW * len(panel.bars) + GAP for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{TEXT}" role="img">'
    ]
    top = 0
    for panel in panels:
        parts.append(f'<text x="4" y="{top + 18}" font-weight="bold">{escape(panel.title)}</text>')
        top += TITLE
        largest = max((bar.value for bar in panel.bars), default=0)
        for bar in panel.bars:
            parts += _row(bar, top, bar.value / largest if largest else 0)
            top += ROW
        top += GAP
    return "\n".join([*parts, "</svg>\n"])


def _row(bar: Bar, top: int, share: float) -> list[str]:
    length = max(1.0, round(share * (WIDTH - LABELS - VALUES), 1))
    middle = top + BAR - 2
    weight = ' font-weight="bold"' if bar.ours else ""
    return [
        f'<text x="{LABELS - 8}" y="{middle}" text-anchor="end"{weight}>{escape(bar.label)}</text>',
        f'<rect x="{LABELS}" y="{top}" width="{length:g}" height="{BAR}" rx="2" fill="{OURS if bar.ours else OTHERS}"/>',
        f'<text x="{LABELS + length + 6:g}" y="{middle}"{weight}>{escape(bar.shown)}</text>',
    ]
