"""gzip and deflate, never more at once than is asked for: a bomb is as large as its reader lets it become."""

from __future__ import annotations

import zlib
from typing import Any, Final

_GZIP: Final = 31  # wbits of zlib: with gzip's head and sum
_ZLIB: Final = 15
_RAW: Final = -15
_MAGIC: Final = b"\x1f\x8b"


class Decoder:
    """Decodes "gzip" or "deflate". `feed` gives it what came, `take` what that is, in pieces. Raises zlib.error."""

    __slots__ = ("_began", "_coding", "_input", "_unpacker")

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._unpacker: Any = zlib.decompressobj(_GZIP if coding == "gzip" else _ZLIB)
        self._input = b""
        self._began = False

    def feed(self, data: bytes) -> None:
        self._input += data

    def take(self, limit: int) -> bytes:
        """At most `limit` bytes; b"": it has to be fed first, or nothing more follows."""
        while self._input:
            if self._unpacker.eof and not self._next_member():
                return b""
            data = self._unpack(limit)
            if data:
                return data
        return self._unpack(limit) if self._began else b""  # what it holds back, if anything

    def _unpack(self, limit: int) -> bytes:
        try:
            data: bytes = self._unpacker.decompress(self._input, limit)
        except zlib.error:
            if self._began or self._coding != "deflate":
                raise
            self._unpacker = zlib.decompressobj(_RAW)  # many servers mean this by deflate
            data = self._unpacker.decompress(self._input, limit)
        self._began = True
        self._input = self._unpacker.unused_data if self._unpacker.eof else self._unpacker.unconsumed_tail
        return data

    def _next_member(self) -> bool:
        """A gzip file may have several, one after the other. What is no further one is padding."""
        if self._coding != "gzip" or not _MAGIC.startswith(self._input[:2]):
            self._input = b""
            return False
        if len(self._input) < 2:
            return False
        self._unpacker = zlib.decompressobj(_GZIP)
        return True

    @property
    def is_complete(self) -> bool:
        """Whether it may end here."""
        return not self._began or bool(self._unpacker.eof)
