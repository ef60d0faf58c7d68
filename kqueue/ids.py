"""Ids of jobs: ULIDs (48 bits of milliseconds, 80 random bits, Crockford's base 32), increasing within a process.

Source: github.com/ulid/spec. Within one millisecond the random part of the last id is incremented, so ids made in order sort in
order, which is what breaks ties between jobs of equal place. A forked child starts from new random bits.
"""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Final

_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS: Final = [a + b for a in _ALPHABET for b in _ALPHABET]  # ten bits at a time
PATTERN: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")  # what may stand as an id: ours, or one the caller chose

_lock = threading.Lock()
_last = 0


def new_id() -> str:
    """A new id of 26 characters. Thread- and fork-safe."""
    global _last
    with _lock:
        value = time.time_ns() // 1_000_000 << 80
        if value >> 80 <= _last >> 80:  # the same millisecond, or the clock went back
            value = _last + 1
        else:
            value |= int.from_bytes(os.urandom(10), "big")
        _last = value
    pairs = _PAIRS
    a, b, c = value >> 90, value >> 40 & 0x3_FFFF_FFFF_FFFF, value & 0xFF_FFFF_FFFF  # of 40, 50 and 40 bits: words shift faster
    return "".join((
        pairs[a >> 30], pairs[a >> 20 & 1023], pairs[a >> 10 & 1023], pairs[a & 1023],
        pairs[b >> 40], pairs[b >> 30 & 1023], pairs[b >> 20 & 1023], pairs[b >> 10 & 1023], pairs[b & 1023],
        pairs[c >> 30], pairs[c >> 20 & 1023], pairs[c >> 10 & 1023], pairs[c & 1023],
    ))  # fmt: skip


def _after_fork() -> None:
    global _last, _lock
    _lock = threading.Lock()  # another thread may have held it at the moment of the fork
    _last = 0


os.register_at_fork(after_in_child=_after_fork)
