"""Commands: jobs that are no Python, declared in kqueue.yaml. What a template of arguments may be, and how arguments fill it.

    thumbnail: {command: [convert, "{src}", -resize, "{size}", --, "{dst}"], timeout: 60}

There is no shell. A placeholder is one argument, or part of one, whatever the text that fills it looks like: spaces, quotes,
newlines and asterisks mean nothing here. What the program itself makes of an argument that begins with a dash is for the template
to settle, by a `--` or by an option that takes its value in the same argument (`--file={name}`).

Nothing here starts a process; `execution/exec_child.py` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Final, NamedTuple

from .errors import UsageError
from .options import JobOptions
from .registry import Parameters, Registration

MODULE: Final = "jobs.commands"  # where a command stands, as a module is where a job does
STDIN: Final = ("none", "json")
RESULTS: Final = ("none", "json")
MAX_TEMPLATE: Final = 16 * 1024  # bytes of one command, so that a request for it fits a message to the template
MAX_ARGUMENT: Final = 128 * 1024 - 1  # bytes; MAX_ARG_STRLEN of Linux (execve(2)), with the NUL

_PIECE: Final = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")


class Command(NamedTuple):
    """One of `jobs.commands`. `options`: those of JobOptions that it sets."""

    name: str
    command: tuple[str, ...]
    stdin: str = "none"  # "json": it is given its arguments there, as one JSON object
    result: str = "none"  # "json": what it prints is its result
    options: Mapping[str, Any] = {}

    def checked(self) -> Command:
        """Itself. Raises UsageError for a template that is none."""
        if not self.command:
            raise UsageError("a command needs at least the program: write [program, argument, …]")
        for part in self.command:
            placeholders(part)
            if "\0" in part:
                raise UsageError(f"{part!r:.60} has a NUL in it, which no argument can have")
        if placeholders(self.command[0]):
            raise UsageError(f"{self.command[0]!r:.60}: which program runs must not depend on the arguments of a job")
        if sum(map(len, self.command)) > MAX_TEMPLATE:
            raise UsageError(f"a command may have {MAX_TEMPLATE} characters at the most")
        return self

    @property
    def parameters(self) -> Parameters:
        """Its placeholders in the order in which they first stand there, and whether it takes others, too."""
        names = [name for part in self.command for name in placeholders(part)]
        return Parameters(tuple(dict.fromkeys(names)), self.stdin == "json")

    def registration(self) -> Registration:
        """It as a job. Raises UsageError for options that make no sense."""
        options = JobOptions(**{**self.options, "isolated": True, "start": "exec"})
        return Registration(self.name, options, None, False, MODULE, str(self.parameters), parameters=self.parameters)

    def argv(self, given: Mapping[str, Any]) -> list[bytes]:
        """The arguments of the process, with those `given`. Raises UsageError for a value that no argument can hold."""
        return [_encoded(fill(part, given), part) for part in self.command]


def placeholders(part: str) -> list[str]:
    """The names of those in `part`. Raises UsageError for a brace that belongs to none."""
    names = []
    for match in _PIECE.finditer(part):
        if match[1]:
            names.append(match[1])
        elif len(match[0]) == 1:
            raise UsageError(f"{part!r:.60}: a placeholder is a name in braces, as in {{src}}; a brace itself is written twice")
    return names


def fill(part: str, given: Mapping[str, Any]) -> str:
    """`part`, each placeholder replaced once; what replaces it is not looked at again."""
    return _PIECE.sub(lambda match: text_of(match[1], given[match[1]]) if match[1] else match[0][0], part)


def text_of(name: str, value: Any) -> str:
    """`value` as text in an argument. Raises UsageError."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text: str = value
    elif isinstance(value, int) or (isinstance(value, float) and isfinite(value)):
        text = repr(value)
    else:
        raise UsageError(f"argument {name!r} must be a text or a number for a command, not {type(value).__name__}")
    _encoded(text, name)
    return text


def check_arguments(parameters: Parameters, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name. Raises UsageError when some are missing, too many, or cannot be an argument of a process."""
    given = parameters.bind(args, kwargs)
    for name in parameters.names:
        text_of(name, given[name])
    return given


def _encoded(text: str, name: str) -> bytes:
    """As the process has it: UTF-8. Raises UsageError."""
    if "\0" in text:
        raise UsageError(f"argument {name!r:.60} has a NUL in it, which no argument of a process can have")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"argument {name!r:.60} is no text: it has half of a surrogate pair in it") from None
    if len(data) > MAX_ARGUMENT:
        message = f"argument {name!r:.60} has {len(data)} bytes, and one of a process may have {MAX_ARGUMENT}"
        raise UsageError(f"{message}: have the command take it by stdin: json")
    return data


def find_program(program: str, path: str | None) -> str | None:
    """The file that would run, looked for on `path` ($PATH); None: there is none."""
    directories = [""] if "/" in program else (path or os.defpath).split(":")
    places = [os.path.join(directory, program) for directory in directories]
    return next((place for place in places if os.path.isfile(place) and os.access(place, os.X_OK)), None)
