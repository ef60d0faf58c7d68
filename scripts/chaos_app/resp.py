"""Where one request or reply of the Redis protocol (RESP 2 and 3) ends, and what a request asks for. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_LINES: Final = b"+-:_#,("
_BLOBS: Final = b"$!="
_PAIRS: Final = b"%|"
PUSH: Final = b">"[0]


def end_of(data: bytes | bytearray, start: int = 0) -> int | None:
    """Where the value that begins at `start` ends; None: not all of it is there."""
    at, wanted = start, 1
    while wanted:
        line_end = data.find(b"\r\n", at)
        if line_end < 0:
            return None
        kind = data[at]
        wanted -= 1
        after = line_end + 2
        if kind in _BLOBS:
            size = int(data[at + 1 : line_end])
            after += size + 2 if size >= 0 else 0
            if len(data) < after:
                return None
        elif kind not in _LINES:
            size = max(0, int(data[at + 1 : line_end]))
            wanted += size * (2 if kind in _PAIRS else 1)
            wanted += kind == b"|"[0]  # an attribute comes before the value that it is of
        at = after
    return at


def kind_of(request: bytes | bytearray, names: Mapping[bytes, str]) -> str:
    """The command of one complete `request`, and for a script its name in `names` (by digest, lower case)."""
    words = _words(request, 2)
    command = words[0].decode("ascii", "replace").upper() if words else "?"
    if command == "EVALSHA" and len(words) > 1:
        return names.get(words[1].lower(), f"script {words[1][:8].decode('ascii', 'replace')}")
    return f"{command} {words[1].decode('ascii', 'replace').upper()}" if command == "SCRIPT" and len(words) > 1 else command


def _words(request: bytes | bytearray, count: int) -> list[bytes]:
    """The first words of an array of blobs."""
    found: list[bytes] = []
    at = request.find(b"\r\n") + 2
    while len(found) < count and at < len(request):
        line_end = request.find(b"\r\n", at)
        size = int(request[at + 1 : line_end])
        found.append(bytes(request[line_end + 2 : line_end + 2 + size]))
        at = line_end + 2 + size + 2
    return found
