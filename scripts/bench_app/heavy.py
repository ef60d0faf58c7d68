"""An isolated job whose module is heavy to import: numpy where it is installed, else 50 MB that are really touched."""

from __future__ import annotations

import marks

from kqueue import job

try:
    import numpy  # type: ignore[import-not-found]

    BALLAST = numpy.ones(1_000_000)  # 8 MB beyond its code
except ImportError:
    BALLAST = bytearray(b"\1") * 50_000_000  # not bytearray(50_000_000), whose pages would be promised, and never there


@job
def forked_heavy() -> None:
    marks.write("forked_heavy", float(len(BALLAST)))
