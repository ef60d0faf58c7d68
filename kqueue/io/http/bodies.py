"""Bodies of requests: JSON, forms, files, bytes, and what is sent piece by piece while it is made."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from ...kernel.traps import Trap
from .errors import InvalidRequest

PIECE: Final = 65536  # bytes that are read of a file at a time

File = Any  # bytes, str, a file that is open for reading in binary, or (name, one of these[, content type])


class Body(NamedTuple):
    """`data` is all of it, or `pieces` make it: an iterable of bytes."""

    data: bytes | memoryview = b""
    pieces: Any = None  # None: `data` is the body
    length: int | None = 0  # None: nobody knows, so it is sent in chunks
    content_type: str = ""
    can_repeat: bool = True

    @property
    def is_empty(self) -> bool:
        return self.pieces is None and not len(self.data)


NOTHING: Final = Body()


def body_of(json: Any, data: Any, files: Any, body: Any) -> Body:
    """The body that these arguments of a request mean. Raises InvalidRequest."""
    given = [name for name, value in (("json", json), ("body", body)) if value is not None]
    if data is not None or files is not None:
        given.append("data" if files is None else "files")
    if len(given) > 1:
        raise InvalidRequest(f"a request has one body: give {' or '.join(f'{name}=' for name in given)}")
    if json is not None:
        return _json(json)
    if files is not None:
        return _multipart(data, files)
    if data is None:
        return NOTHING if body is None else _pieces(body)
    if isinstance(data, (Mapping, list, tuple)):
        form = urlencode(list(data.items()) if isinstance(data, Mapping) else data, doseq=True).encode("ascii")
        return Body(form, None, len(form), "application/x-www-form-urlencoded")
    return _pieces(data)


def _json(value: Any) -> Body:
    from json import dumps

    try:
        data = dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"json= cannot be written as JSON: {error}") from None
    return Body(data, None, len(data), "application/json")


def _pieces(body: Any) -> Body:
    if isinstance(body, str):
        data = body.encode()
        return Body(data, None, len(data), "text/plain; charset=utf-8")
    if isinstance(body, (bytes, bytearray, memoryview)):
        whole = memoryview(body).cast("B") if isinstance(body, memoryview) else bytes(body)
        return Body(whole, None, len(whole))
    if hasattr(body, "read"):
        file = _OpenFile(body)
        return Body(b"", file, file.length, "", file.can_repeat)
    if isinstance(body, (Iterable, AsyncIterator)) and not isinstance(body, Mapping):
        return Body(b"", body, None, "", not isinstance(body, (Iterator, AsyncIterator)))
    raise InvalidRequest(f"a body is bytes, str, a file, or an iterable of bytes, not {type(body).__name__}")


class _OpenFile:
    """From where a file stands to its end, as often as it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        try:
            self._start = file.tell()
            self.length: int | None = file.seek(0, os.SEEK_END) - self._start
            file.seek(self._start)
            self.can_repeat = True
        except (AttributeError, OSError, ValueError):  # a pipe
            self.length, self.can_repeat = None, False

    def __iter__(self) -> Iterator[bytes]:
        if self.can_repeat:
            self._file.seek(self._start)
        while piece := self._file.read(PIECE):
            yield piece


def _multipart(data: Any, files: Any) -> Body:
    """multipart/form-data (RFC 7578): the fields of `data`, then `files`."""
    boundary = b"kqueue-" + os.urandom(16).hex().encode()
    parts: list[tuple[bytes, Body]] = []
    for name, value in _items(data, "data"):
        for each in value if isinstance(value, (list, tuple)) else (value,):
            text = each if isinstance(each, bytes) else str(each).encode()
            parts.append((_part_head(boundary, name, "", ""), Body(text, None, len(text))))
    for name, value in _items(files, "files"):
        for each in value if isinstance(value, list) else (value,):
            filename, body, kind = _file(name, each)
            parts.append((_part_head(boundary, name, filename, kind), body))
    end = b"--" + boundary + b"--\r\n"
    content_type = f"multipart/form-data; boundary={boundary.decode()}"
    if all(body.pieces is None for _, body in parts):
        whole = b"".join([*(b"".join((head, body.data, b"\r\n")) for head, body in parts), end])
        return Body(whole, None, len(whole), content_type)
    lengths = [None if body.length is None else len(head) + body.length + 2 for head, body in parts]
    length = None if None in lengths else sum(filter(None, lengths)) + len(end)
    return Body(b"", _Parts(parts, end), length, content_type, all(body.can_repeat for _, body in parts))


class _Parts:
    """The pieces of a multipart body, as often as they are asked for."""

    def __init__(self, parts: list[tuple[bytes, Body]], end: bytes) -> None:
        self._parts = parts
        self._end = end

    def __iter__(self) -> Iterator[Any]:
        for head, body in self._parts:
            yield head
            if body.pieces is None:
                yield body.data
            else:
                yield from body.pieces
            yield b"\r\n"
        yield self._end


def _items(given: Any, what: str) -> list[tuple[str, Any]]:
    if given is None:
        return []
    if isinstance(given, Mapping):
        return list(given.items())
    if isinstance(given, (list, tuple)):
        return list(given)
    raise InvalidRequest(f"{what}= beside files= is a mapping or a list of pairs, not {type(given).__name__}")


def _file(name: str, given: File) -> tuple[str, Body, str]:
    filename, content, kind = "", given, ""
    if isinstance(given, tuple):
        filename, content, kind = given if len(given) == 3 else (*given, "") if len(given) == 2 else ("", None, "")
        if content is None:
            raise InvalidRequest(f"the file {name!r} is (name, content) or (name, content, type), not {len(given)} things")
    elif isinstance(getattr(given, "name", None), str):
        filename = os.path.basename(given.name)
    return filename or name, _pieces(content), kind or "application/octet-stream"


def _part_head(boundary: bytes, name: str, filename: str, kind: str) -> bytes:
    disposition = f'form-data; name="{_quoted(name)}"'
    if filename:
        disposition += f'; filename="{_quoted(filename)}"'
    lines = [f"Content-Disposition: {disposition}"]
    if kind:
        if any(ord(char) < 32 or ord(char) > 126 for char in kind):
            raise InvalidRequest(f"{kind!r} is no content type")
        lines.append(f"Content-Type: {kind}")
    return b"--" + boundary + b"\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n"


def _quoted(text: str) -> str:
    """As browsers do it (the HTML standard, "multipart/form-data encoding algorithm")."""
    return str(text).replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def next_piece(pieces: Any) -> Generator[Any, Any, Any]:
    """The next of `pieces`, an iterator of one kind or the other; None: there are no more.

    A generator may wait while it makes one: the traps that it yields are waited for, and it gets what they answer.
    """
    try:
        if isinstance(pieces, AsyncIterator):
            return (yield from pieces.__anext__().__await__())
        piece = next(pieces)
        while isinstance(piece, Trap):
            try:
                answer = yield from piece
            except BaseException as error:
                piece = pieces.throw(error)
            else:
                piece = pieces.send(answer)
        return piece
    except (StopIteration, StopAsyncIteration):
        return None
