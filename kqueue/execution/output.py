"""A job's stdout and stderr: lines for the log, at a bounded rate, and a tail for the death certificate."""

from __future__ import annotations

from collections import deque
from typing import Final

MAX_LINE: Final = 8192  # bytes; what is longer is cut into several
TAIL: Final = 8192  # bytes kept for the certificate
LINES_PER_S: Final = 200  # of one job that reach the log; the tail is kept whatever the rate


class Lines:
    """Cuts a stream of bytes into lines of text. What is not UTF-8 shows as U+FFFD."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipped = 0

    def feed(self, data: bytes, most: int | None = None) -> list[str]:
        """The lines that `data` completes, at most about `most` of them (None: all); what is beyond is skipped unread.

        64 KiB of bare newlines are 65,536 lines: making texts of them all would keep the loop for 30 ms.
        """
        *whole, rest = (self._rest + data).split(b"\n", -1 if most is None else most)
        if most is not None and b"\n" in rest:
            self._skipped += rest.count(b"\n")
            rest = rest[rest.rindex(b"\n") + 1 :]
        keep = len(rest) % MAX_LINE if len(rest) > MAX_LINE else len(rest)
        self._rest = rest[len(rest) - keep :]
        pieces = [piece for line in whole for piece in _cut(line.rstrip(b"\r"))]
        pieces += _cut(rest[: len(rest) - keep]) if keep < len(rest) else []
        return [piece.decode("utf-8", "replace") for piece in pieces]

    def take_skipped(self) -> int:
        """How many lines were skipped since this was last asked."""
        skipped, self._skipped = self._skipped, 0
        return skipped

    def rest(self) -> list[str]:
        """The last line, when it was not ended."""
        rest, self._rest = self._rest, b""
        return [rest.decode("utf-8", "replace")] if rest else []


def _cut(line: bytes) -> list[bytes]:
    return [line[start : start + MAX_LINE] for start in range(0, len(line), MAX_LINE)] or [b""]


class Tail:
    """The last TAIL bytes of everything that was put in."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._size = 0

    def add(self, data: bytes) -> None:
        self._pieces.append(data[-TAIL:])
        self._size += len(self._pieces[-1])
        while self._size - len(self._pieces[0]) >= TAIL:
            self._size -= len(self._pieces.popleft())

    def text(self) -> str:
        return b"".join(self._pieces)[-TAIL:].decode("utf-8", "replace")


class Rate:
    """Lets LINES_PER_S lines a second through, and counts what it held back."""

    def __init__(self) -> None:
        self._window = 0.0
        self._left = LINES_PER_S
        self.held_back = 0

    def left(self, now: float) -> int:
        """How many lines may pass now."""
        if now - self._window >= 1.0:
            self._window, self._left = now, LINES_PER_S
        return self._left

    def spend(self) -> None:
        """One has passed."""
        self._left = max(0, self._left - 1)

    def allows(self, now: float) -> bool:
        """Whether a line may pass now: spends it, or counts it as held back."""
        if self.left(now):
            self.spend()
            return True
        self.held_back += 1
        return False
