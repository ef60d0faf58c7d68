"""A small disk of its own for the broker's files, so that it can be filled: a tmpfs, mounted for the run. Root only."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final

PIECE: Final = 1 << 16  # bytes
BALLAST: Final = "ballast"


class SmallDisk:
    """Mounted on `directory` while the `with` lasts. `why_not`: why there is none; "" when there is."""

    def __init__(self, directory: Path, size_mib: int) -> None:
        self.directory = directory
        self.why_not = ""
        self._size_mib = size_mib

    def __enter__(self) -> SmallDisk:
        self.directory.mkdir()
        options = f"size={self._size_mib}m,mode=0700"
        command = ["mount", "-t", "tmpfs", "-o", options, "kqueue-chaos", str(self.directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.why_not = f"no tmpfs can be mounted here ({done.stderr.strip() or 'mount failed'}); it takes root"
        return self

    def __exit__(self, *error: object) -> None:
        if not self.why_not:
            # Lazy, since what was killed a moment ago may still hold files open.
            subprocess.run(["umount", "--lazy", str(self.directory)], check=False)

    def fill(self) -> int:
        """Take all the space that is left; how many bytes that was."""
        taken = 0
        with open(self.directory / BALLAST, "ab", buffering=0) as ballast, suppress(OSError):
            for size in (PIECE, 1):
                with suppress(OSError):
                    while True:
                        taken += ballast.write(b"x" * size)
        return taken

    def free(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.directory / BALLAST)
