"""A program that a running job starts, and how that ended: what `kqueue.io.run`, and those that carry it out, say to each other.

Nothing here starts a process: `execution/isolated.py` does for an inline job, `execution/direct_program.py` inside a child.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Program(NamedTuple):
    """What is to run. No shell, and no text: a process has bytes."""

    argv: tuple[bytes, ...]
    input: bytes = b""  # what it finds on stdin
    timeout_s: float = 0.0  # after which it is ended; 0: when its job is
    max_output: int = 1 << 20  # bytes that each of stdout and stderr may be
    environment: Mapping[bytes, bytes] | None = None  # all of it; None: that of the job's process
    directory: bytes = b""  # b"": that of the job's process
    max_memory_mib: int = 0  # of all its processes together; 0: what an offloaded call may have. Inside a child: the job's

    @property
    def name(self) -> str:
        return self.argv[0].rpartition(b"/")[2].decode("utf-8", "replace")


class ProgramEnd(NamedTuple):
    """What came of it."""

    returncode: int  # as subprocess has it: less than 0 for a signal
    stdout: bytes
    stderr: bytes
    why: str = ""  # "timeout", "output", "refused", "limit" or "lost"; "": it ended by itself
    message: str = ""  # what there is to say of that


class Capture:
    """The output of a program, up to `most` bytes of each stream."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._streams = {"stdout": bytearray(), "stderr": bytearray()}
        self.over = ""  # the stream that was longer than that; "": none was

    def add(self, stream: str, data: bytes) -> bool:
        """Keep `data`, as far as there is room; whether there was."""
        kept = self._streams[stream]
        room = self._most - len(kept)
        kept += data[:room]
        if len(data) > room:
            self.over = self.over or stream
        return not self.over

    def end(self, returncode: int, why: str = "", message: str = "") -> ProgramEnd:
        """What came of it; too much output goes before any other reason."""
        if self.over:
            why, message = "output", f"its {self.over} was longer than the {self._most} bytes that max_output allows"
        return ProgramEnd(returncode, bytes(self._streams["stdout"]), bytes(self._streams["stderr"]), why, message)


NOT_STARTED: Final = -1  # as a returncode: there was no process to have one
