"""Headers: case does not matter, and what was sent twice is there twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from .errors import InvalidRequest

Pair = tuple[bytes, bytes]  # the name in lower case, and the value
Given = Mapping[str, str] | Iterable[tuple[str, str]]  # as users write them

_NAME: Final = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")  # RFC 9110, section 5.6.2
_OURS: Final = (b"transfer-encoding", b"trailer")  # how a body is framed follows from what it is


class Headers(Mapping[str, str]):
    """Those of a response. `headers["x"]` joins by ", " what was sent more than once; `get_all` does not."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self._pairs = tuple(pairs)

    def __getitem__(self, name: str) -> str:
        found = self.get_all(name)
        if not found:
            raise KeyError(name)
        return found[0] if len(found) == 1 else ", ".join(found)

    def get_all(self, name: str) -> list[str]:
        """Each value of `name`, in the order of the response."""
        wanted = name.lower().encode("latin-1", "replace")
        return [value.decode("latin-1") for key, value in self._pairs if key == wanted]

    def pairs(self) -> list[tuple[str, str]]:
        """All of them, in the order of the response."""
        return [(key.decode("latin-1"), value.decode("latin-1")) for key, value in self._pairs]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.get_all(name))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key.decode("latin-1") for key, _ in self._pairs))

    def __len__(self) -> int:
        return len({key for key, _ in self._pairs})

    def __repr__(self) -> str:
        return f"Headers({self.pairs()})"


def encode(given: Given | None) -> list[Pair]:
    """What users wrote, as it is sent. Raises InvalidRequest for what would be something else on the wire."""
    if not given:
        return []
    pairs = []
    for name, value in given.items() if isinstance(given, Mapping) else given:
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidRequest(f"a header is a name and a value, both str, not {name!r} and {type(value).__name__}")
        try:
            key, data = name.lower().encode("ascii"), value.strip(" \t").encode("latin-1")
        except UnicodeEncodeError:
            raise InvalidRequest(f"the header {name!r} has characters that cannot be sent: encode it (RFC 8187)") from None
        if not key or not _NAME.issuperset(key):
            raise InvalidRequest(f"{name!r} is no name of a header")
        if any((byte < 32 and byte != 9) or byte == 127 for byte in data):
            raise InvalidRequest(f"the header {name!r} has a line break or another control character in its value: refused")
        if key in _OURS:
            raise InvalidRequest(f"the header {name!r} follows from the body, and is not given")
        pairs.append((key, data))
    return pairs


def merged(first: list[Pair], *others: list[Pair]) -> list[Pair]:
    """A later list replaces what an earlier one says of the same name."""
    for other in others:
        if other:
            names = {key for key, _ in other}
            first = [pair for pair in first if pair[0] not in names] + other
    return first
