"""kqueue.yaml -> Config. What is wrong with it is one ConfigError: `kqueue.yaml:12: what is wrong, what is allowed`.

Two halves: `_tree` turns YAML into plain values and the lines they stand on, `_checked` turns plain values into a Config by the
schema of `settings.py`. Only the first needs yaml, and nothing else in the project imports it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from .commands import Command
from .config import SECTIONS, Config, QueueSpec, line_of
from .errors import ConfigError, UsageError, nearest
from .settings import (
    BY_KEY,
    COMMAND_SETTINGS,
    COMMANDS,
    NAMES,
    NOT_YET,
    QUEUE,
    QUEUE_SETTINGS,
    SETTINGS,
    FromEnvironment,
    Kind,
    Setting,
    with_password,
    with_sync_replicas,
)

# -- reading ----------------------------------------------------------------------------------------------------------------


def load_config(path: str, environ: Mapping[str, str] = os.environ) -> Config:
    """The configuration in the YAML file `path`. Relative paths in it start from its directory. Raises ConfigError."""
    source = _Source(path, os.path.dirname(os.path.abspath(path)), {})
    return _checked(_tree(_text_of(path), source, environ), source)


def make_config(values: Mapping[str, Any] | None = None, directory: str = ".") -> Config:
    """The configuration of nested `values`, shaped as the YAML is: `{"queue": {"url": "memory://"}}`. Raises ConfigError."""
    return _checked(values or {}, _Source(None, os.path.abspath(directory), {}))


class _Source(NamedTuple):
    """Where the values being read come from."""

    file: str | None  # as the user typed it
    directory: str  # that relative paths start from
    lines: dict[str, int]

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(message, file=self.file, line=line_of(self.lines, key))

    def read(self, kind: Kind, key: str, value: Any) -> Any:
        """`value` as `kind` reads it. Raises ConfigError."""
        if value is None and kind.null:
            return None
        if kind.many:
            if not isinstance(value, (list, tuple)):
                raise self.error(key, f"{key} must be a list{', or null' * kind.null}, not {_shown(value)}: write [a, b]")
            return tuple(self.read(kind._replace(many=False, null=False), f"{key}.{i}", item) for i, item in enumerate(value))
        try:
            return kind.read(value, self.directory)
        except UsageError as error:
            hint = f": {error}" if str(error) else ""
            message = f"{key}{hint}" if kind.secret else f"{key} must be {kind.allowed}, not {_shown(value)}{hint}"
            raise self.error(key, message) from None


def _checked(tree: Mapping[str, Any], source: _Source) -> Config:
    values = {setting.key: _read(setting, setting.default, source) for setting in SETTINGS}
    values["queue.strict_order"] = False
    for setting, value in _settings(tree, source):
        values[setting.key] = _read(setting, value, source)
        if setting.key == "queue.names":
            values["queue.strict_order"] = not isinstance(value, Mapping)
        if setting.key in NOT_YET and values[setting.key] != _read(setting, setting.default, source):
            stay = "null" if setting.default is None else f"at {setting.default}"
            raise source.error(setting.key, f"{setting.key} is not supported by this version; leave it {stay}")
    values["queue.url"] = _url(values, source, "url" in (tree.get("queue") or {}))
    if values["inline.hard_slice"] < values["inline.max_slice"]:
        raise source.error("inline.hard_slice", "inline.hard_slice must not be shorter than inline.max_slice")
    return _built(values, source)


def _built(values: dict[str, Any], source: _Source) -> Config:
    for key in ("queue.url_file", "queue.password_file"):
        del values[key]  # they are in the URL
    sections: dict[str, dict[str, Any]] = {"": {}, **{name: {} for name in SECTIONS}}
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        sections[section][BY_KEY[key].field if key in BY_KEY else leaf] = value
    for name, record in SECTIONS.items():
        outer, _, leaf = name.rpartition(".")
        sections[outer][leaf] = record(**sections[name])
    file = None if source.file is None else os.path.abspath(source.file)
    return Config(file=file, shown_file=source.file, lines=source.lines, **sections[""])


def _read(setting: Setting, value: Any, source: _Source) -> Any:
    read = {NAMES: _queues, COMMANDS: _commands}.get(setting.kind)
    return read(value, source) if read is not None else source.read(setting.kind, setting.key, value)


def _settings(tree: Mapping[str, Any], source: _Source, above: str = "") -> Iterator[tuple[Setting, Any]]:
    """The settings in `tree`, in its order, so that the first error is the first in the file. Raises ConfigError: unknown key.

    `above`: "queue." in the section of that name.
    """
    for name, value in tree.items():
        key = f"{above}{name}"
        if "." not in str(name) and key in BY_KEY:
            yield BY_KEY[key], value
        elif "." in str(name) or key not in SECTIONS:
            known = [known.removeprefix(above).partition(".")[0] for known in BY_KEY if known.startswith(above)]
            raise _unknown(source, key, list(dict.fromkeys(known)))
        elif value is not None:  # a section whose every line is commented out
            if not isinstance(value, Mapping):
                raise source.error(key, f"{key} must be a mapping of settings, not {_shown(value)}")
            yield from _settings(value, source, f"{key}.")


def _unknown(source: _Source, key: str, known: Sequence[str]) -> ConfigError:
    word = key.rpartition(".")[2]
    elsewhere = next((f' (did you mean "{other}"?)' for other in BY_KEY if other.endswith(f".{word}")), "")
    hint = nearest(word, tuple(known)) or elsewhere
    return source.error(key, f'unknown setting "{key}"{hint}; allowed here: {", ".join(known)}')


def _queues(given: Any, source: _Source) -> tuple[QueueSpec, ...]:
    if not isinstance(given, (list, tuple, Mapping)) or not given:
        raise source.error("queue.names", f"queue.names must be {NAMES.allowed}, not {_shown(given)}")
    specs: list[QueueSpec] = []
    for number, item in enumerate(given):
        key = f"queue.names.{item if isinstance(given, Mapping) else number}"
        name = source.read(QUEUE, key, item)
        if any(spec.name == name for spec in specs):
            raise source.error(key, f"queue.names lists {name!r} twice; keep one")
        specs.append(QueueSpec(name, **_queue(given[item], key, source)) if isinstance(given, Mapping) else QueueSpec(name))
    return tuple(specs)


def _queue(given: Any, key: str, source: _Source) -> dict[str, Any]:
    kinds = {setting.key: setting.kind for setting in QUEUE_SETTINGS}
    if not isinstance(given, Mapping):
        return {"weight": source.read(Kind("a weight of at least 1, or a mapping", kinds["weight"].read), key, given)}
    for name in given:
        if name not in kinds:
            raise _unknown(source, f"{key}.{name}", list(kinds))
    return {name: source.read(kinds[name], f"{key}.{name}", value) for name, value in given.items()}


def _commands(given: Any, source: _Source) -> tuple[Command, ...]:
    if given is None:  # all of it is commented out
        return ()
    if not isinstance(given, Mapping):
        raise source.error("jobs.commands", f"jobs.commands must be {COMMANDS.allowed}, not {_shown(given)}")
    return tuple(_command(name, fields, source) for name, fields in given.items())


def _command(name: str, given: Any, source: _Source) -> Command:
    key = f"jobs.commands.{name}"
    if not isinstance(given, Mapping) or "command" not in given:
        raise source.error(key, f"{key} must say its command: write {name}: {{command: [program, argument, …]}}")
    if "." in name or not 0 < len(name) <= 255 or not name.isprintable():  # a dot would make two levels of it
        raise source.error(key, f"{key}: a command's name is a printable text of 1 to 255 characters without dots")
    kinds = {setting.key: setting.kind for setting in COMMAND_SETTINGS}
    for each in given:
        if each not in kinds:
            raise _unknown(source, f"{key}.{each}", list(kinds))
    read = {each: source.read(kinds[each], f"{key}.{each}", value) for each, value in given.items()}
    program, *rest = read.pop("command") or ("",)
    if "/" in program:
        program = os.path.join(source.directory, program)
    ways = {way: read.pop(way) for way in ("stdin", "result") if way in read}
    try:
        return Command(name, (program, *rest) if program else (), options=read, **ways).checked()
    except UsageError as error:
        raise source.error(f"{key}.command", f"{key}.command: {error}") from None


def _url(values: Mapping[str, Any], source: _Source, url_given: bool) -> str:
    url: str = values["queue.url"]
    if values["queue.url_file"] is not None:
        if url_given:
            raise source.error("queue.url_file", "queue.url and queue.url_file are both set; keep one")
        url = source.read(BY_KEY["queue.url"].kind, "queue.url_file", _secret(values, "queue.url_file", source))
    if values["queue.password_file"] is not None:
        try:
            url = with_password(url, _secret(values, "queue.password_file", source))
        except UsageError as error:
            raise source.error("queue.password_file", f"queue.password_file: {error}") from None
    if values["queue.sync_replicas"]:
        try:
            url = with_sync_replicas(url, values["queue.sync_replicas"])
        except UsageError as error:
            raise source.error("queue.sync_replicas", f"queue.sync_replicas: {error}") from None
    return url


def _secret(values: Mapping[str, Any], key: str, source: _Source) -> str:
    path = values[key]
    try:
        with open(path, encoding="utf-8") as file:
            secret = file.read().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise source.error(key, f"{key}: {path} cannot be read: {why}") from None
    if not secret or "\n" in secret:
        raise source.error(key, f"{key}: {path} must hold one line, the secret")
    return secret


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (Mapping, list, tuple)):
        kind = "mapping" if isinstance(value, Mapping) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    return f"{str(value)!r:.60}" if isinstance(value, str) else f"{value!r:.60}"


# -- YAML -------------------------------------------------------------------------------------------------------------------

_DEEPEST: Final = 6  # levels; the deepest setting stands on the fourth. An alias of itself has no end
_REFERENCE: Final = re.compile(r"\$(\$?)\{([^}]*)(\}?)")
_NAMED: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)


def _text_of(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise ConfigError('there is no such file; "kqueue init" writes one, -c names another', file=path) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"it cannot be read: {getattr(error, 'strerror', None) or error}", file=path) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("it is not UTF-8 text", file=path, line=data.count(b"\n", 0, error.start) + 1) from None


def _tree(text: str, source: _Source, environ: Mapping[str, str]) -> dict[str, Any]:
    """Plain values of the YAML `text`, ${…} expanded; notes in source.lines where each stands. Raises ConfigError."""
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        try:
            root = loader.get_single_node()  # nodes know their lines; nothing is constructed but scalars of the core schema
            value = None if root is None else _Yaml(source, environ, loader).value(root, "")
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        raise ConfigError(_syntax(text, line, error.problem, error.context), file=source.file, line=line) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, text.find(chr(error.character))) + 1  # its `position` counts bytes or characters
        message = f"it holds the character U+{error.character:04X}, which YAML forbids"
        raise ConfigError(message, file=source.file, line=line) from None
    except RecursionError:  # of the loader without libyaml
        raise ConfigError("it is nested too deeply", file=source.file) from None
    if root is None or value is None:  # an empty file
        return {}
    if not isinstance(value, dict):
        message = f"the file must be a mapping such as queue: {{…}}, not {_shown(value)}"
        raise ConfigError(message, file=source.file, line=root.start_mark.line + 1)
    return value


def _syntax(text: str, line: int | None, problem: str | None, context: str | None) -> str:
    at = (text.split("\n")[line - 1 : line] or [""])[0] if line else ""
    hint = ""
    if at.lstrip(" ").startswith("\t"):
        hint = "; indent with spaces, not tabs"
    elif "${" in at:
        hint = '; between { } or [ ] put quotes around it: "${…}"'
    return f"not valid YAML: {problem}{f' ({context})' if context else ''}{hint}"


class _Yaml(NamedTuple):
    """Turns nodes into plain values."""

    source: _Source
    environ: Mapping[str, str]
    loader: Any

    def value(self, node: Any, key: str) -> Any:
        if key:
            self.source.lines.setdefault(key, node.start_mark.line + 1)
        if key.count(".") >= _DEEPEST:
            raise self._error(node, f"{key.partition('.')[0]} is nested too deeply")
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if node.id == "mapping" and tag == "map":  # both: `!!map x` is a scalar that says it is a mapping
            return self._mapping(node, key)
        if node.id == "sequence" and tag == "seq":
            return [self.value(item, f"{key}.{i}" if key else str(i)) for i, item in enumerate(node.value)]
        if node.id == "scalar" and tag in ("str", "timestamp", "value"):  # `instance: 2026-11-24` means the text
            return self._text(node.value, key)
        if node.id == "scalar" and tag in ("int", "float", "bool", "null"):
            try:
                return self.loader.construct_object(node)
            except (ValueError, LookupError):  # `!!int x`, `!!bool x`, `!!int ""`
                raise self._error(node, f"{key}: {node.value!r:.40} is not {tag}") from None
        raise self._error(node, f"{key or 'the file'} has the tag {node.tag:.60}; write plain values, without tags")

    def _error(self, node: Any, message: str) -> ConfigError:
        return ConfigError(message, file=self.source.file, line=node.start_mark.line + 1)

    def _mapping(self, node: Any, key: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = name_node.value
            if not isinstance(name, str):
                raise self._error(name_node, "a key must be a name")
            inner = f"{key}.{name}" if key else name
            if name in found:
                raise self._error(name_node, f'"{inner}" is set twice, first on line {self.source.lines[inner]}; keep one')
            self.source.lines[inner] = name_node.start_mark.line + 1
            found[name] = self.value(value_node, inner)
        return found

    def _text(self, text: str, key: str) -> str:
        if "${" not in text:
            return text
        try:
            return FromEnvironment(_REFERENCE.sub(self._reference, text))
        except UsageError as error:
            raise self.source.error(key, f"{key}: {error}") from None

    def _reference(self, match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]  # $${ is a literal ${
        named = _NAMED.fullmatch(match[2])
        if not match[3] or named is None:
            raise UsageError(f"{match[0]!r:.60} is no reference; write ${{NAME}}, ${{NAME:-default}}, or $${{ for a literal ${{")
        value, default = self.environ.get(named[1]), named[2]
        if default is not None:
            return value or default  # as in a shell, :- covers an empty variable, too
        if value is None:
            raise UsageError(f"${{{named[1]}}} is not set in the environment; set it, or write ${{{named[1]}:-default}}")
        return value
