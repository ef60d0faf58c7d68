"""What long work looks like: a bar on a terminal, and an end between two batches when somebody has had enough."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any, Final

import click

EXIT_SIGNAL: Final = 128  # and the signal's number, as a shell has it
_ASKED_BY: Final = (signal.SIGINT, signal.SIGTERM)


def progress_bar(label: str, length: int, hidden: bool) -> Any:
    """click's bar, on stderr. What is no terminal gets nothing, not even the label."""
    return click.progressbar(length=length, label=label, file=sys.stderr, hidden=hidden or not sys.stderr.isatty())


class Interruption:
    """While it is entered, a first Ctrl-C or SIGTERM is only noted in `exit_code`, so that what runs now is done, and counted.

    A second one raises KeyboardInterrupt there and then.
    """

    def __init__(self) -> None:
        self.exit_code = 0  # nobody asked
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._note) for number in _ASKED_BY}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code:
            raise KeyboardInterrupt
        self.exit_code = EXIT_SIGNAL + number
