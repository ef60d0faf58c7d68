"""A wall clock that jumps, for some processes only: a library of thirty lines (fakeclock.c) that they preload, told by a file.

libfaketime will not do: preloaded into a Redis with jemalloc it makes the server end at its start (libfaketime issue #130, seen
with Debian 12), and in Python 3.11 it makes every time.sleep() raise. The machine's clock is never touched, and the monotonic
clocks stay true: they do not jump when a wall clock does. It takes a C compiler; without one the nemesis is left out, as is said.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("fakeclock.c")


class NoFakeClock(Exception):
    """Why there can be none here."""


def build(directory: Path) -> Path:
    """The library, compiled into `directory`. NoFakeClock: it could not be."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoFakeClock("there is no C compiler; on Debian: apt-get install gcc libc6-dev")
    library = directory / "fakeclock.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoFakeClock(f"fakeclock.c does not compile: {done.stderr.strip().splitlines()[-1:]}")
    return library


class FakeClock:
    """The clock of whoever has `environment`. `offset_s`: how far it is ahead of the machine's."""

    def __init__(self, file: Path, library: Path) -> None:
        self._file = file
        self._library = library
        file.write_bytes(bytes(8))
        self.offset_s = 0

    @property
    def environment(self) -> Mapping[str, str]:
        return {"LD_PRELOAD": str(self._library), "KQUEUE_CHAOS_CLOCK": str(self._file)}

    def jump(self, offset_s: int) -> None:
        """Have it differ from the machine's by `offset_s` seconds from now on."""
        self.offset_s = offset_s
        fd = os.open(self._file, os.O_WRONLY)  # in place: whoever has it mapped sees it
        try:
            os.pwrite(fd, (offset_s * 10**9).to_bytes(8, "little", signed=True), 0)
        finally:
            os.close(fd)
