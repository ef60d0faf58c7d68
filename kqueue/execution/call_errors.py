"""The error of an offloaded call, on its way from the child to the job: whole, where its class is built in.

What it was made of goes as JSON, as arguments of a job do. Nothing of a child is ever unpickled, and of a class that is not built
in only the name and the message are known.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from ..codec import pack, to_json, unpack
from ..errors import OffloadError
from ..outcome import Outcome

MAX_ARGS: Final = 16384  # bytes of JSON; what has more is told by its message
_NEVER_RAISED: Final = (StopIteration, StopAsyncIteration)  # in a generator they are a RuntimeError about that


def told_args(error: BaseException, message: str) -> list[Any] | None:
    """What makes an error like `error`, in plain JSON types; None: its message has to do. `message`: what is said of it."""
    if type(error) is not _built_in(type(error).__name__):
        return None
    with suppress(Exception):  # whatever they are, nobody has promised anything about them
        hint = message.removeprefix(str(error))
        args: list[Any] = list(error.args)
        if isinstance(error, OSError) and error.errno is not None:
            names = [os.fspath(name) if isinstance(name, os.PathLike) else name for name in (error.filename, error.filename2)]
            args = [error.errno, f"{error.strerror}{hint}", names[0], None, names[1]]
        elif hint:
            return None
        packed: list[Any] = pack(args, "args")
        if len(to_json(packed)) <= MAX_ARGS:
            return packed
    return None


def are_args(told: Any) -> bool:
    """Whether a child may have told this."""
    return told is None or (isinstance(told, list) and len(to_json(told)) <= MAX_ARGS)


def error_of(outcome: Outcome) -> BaseException:
    """The error of an offloaded call: of its own class where that is built in and can be made, else OffloadError."""
    error = outcome.error or {}
    message = str(error.get("message", ""))
    kind = _built_in(str(error.get("class", "")))
    if kind is not None and _is_itself(kind, error):
        for args in _attempts(outcome.error_args, message):
            with suppress(Exception):  # UnicodeDecodeError and its kind take more than a message
                return kind(*args)
        return OffloadError(outcome.summary())
    if kind is None and outcome.cause == "timeout":
        return TimeoutError(message or "the offloaded call ran longer than its job may")
    return OffloadError(outcome.summary())


def _attempts(told: Any, message: str) -> list[list[Any]]:
    attempts = [[message]]
    with suppress(Exception):
        if told is not None:
            attempts.insert(0, unpack(told))
    return attempts


def _built_in(name: str) -> type[Exception] | None:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _NEVER_RAISED):
        return kind
    return None


def _is_itself(kind: type[Exception], error: Mapping[str, Any]) -> bool:
    """Whether `error` is a `kind`, and not another class of that name."""
    mro = error.get("mro")
    return mro is None or mro == [base.__name__ for base in kind.__mro__ if base is not object]
