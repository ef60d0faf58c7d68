"""Signals: the handler does nothing, the wake-up fd tells the loop, a task reads names off a queue.

What a Python signal handler does runs between two bytecodes of whatever runs just then. So it does nothing here but exist
(without one, the C-level handler that writes the fd is not installed), as in gunicorn's arbiter.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterable
from types import FrameType
from typing import Any

from .traps import READ, Trap, wait_io


def _noted(number: int, frame: FrameType | None) -> None:
    """The wake-up fd has it."""


class Signals:
    """Turns `numbers` into names that a task receives; `close` puts the old handlers back. Main thread only."""

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _noted) for number in numbers}

    def receive(self) -> Generator[Trap, Any, list[str]]:
        """Wait for signals; their names in the order they came, e.g. ["SIGTERM"]."""
        while True:
            yield wait_io(self._read_fd, READ)
            names = [signal.Signals(n).name for n in os.read(self._read_fd, 512) if n in self._old]
            if names:
                return names

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._read_fd)
        os.close(self._write_fd)
