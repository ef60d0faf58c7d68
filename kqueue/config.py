"""kqueue.yaml -> one frozen `Config`. What is wrong with it is one ConfigError: `kqueue.yaml:12: what is wrong, what is allowed`.

SETTINGS is the whole schema: it reads the file, names the nearest known key, and a test holds docs/settings.md to it. Reading
has two halves: `_tree` turns YAML into plain values and the lines they stand on, `_checked` turns plain values into a Config.
Only the first needs yaml (1.5 MiB, 12 ms), and nothing else in the project imports it: the daemon lets a short-lived child
call `load_config` and send `to_plain()`. Nothing here opens a broker or imports a job's module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from typing import Any, Final, NamedTuple

from .errors import ConfigError, UsageError, nearest
from .job import QUEUE_NAME, STARTS

MIB: Final = 1024 * 1024
_LONGEST_S: Final = 3650 * 86400.0  # ten years: longer is a slip of the pen
_LARGEST: Final = 1 << 50  # bytes, 1 PiB: the same


# -- what a configuration is ------------------------------------------------------------------------------------------------


class QueueSpec(NamedTuple):
    name: str
    weight: int = 1  # share of the reservations, against the other queues'
    max_concurrent: int = 0  # 0: no limit
    per_minute: int = 0  # 0: no limit


class QueueConfig(NamedTuple):
    url: str  # with its password; a relative SQLite path has become absolute
    names: tuple[QueueSpec, ...]
    strict_order: bool  # names was a list: an earlier queue goes first
    lease_s: float
    sync_replicas: int


class JobsConfig(NamedTuple):
    path: tuple[str, ...]
    modules: tuple[str, ...]
    isolated_modules: tuple[str, ...]
    unknown: str  # "retry" | "bury"


class InlineConfig(NamedTuple):
    max_concurrent: int
    max_slice_s: float
    hard_slice_s: float


class IsolatedConfig(NamedTuple):
    max_concurrent: int  # 0: no isolated job runs here
    start: str
    memory_budget: str  # as written: "80%", or a size
    kill_grace_s: float
    user: str | None  # None: the daemon's own
    memory_headroom_mib: int


class PoolConfig(NamedTuple):
    size: int
    max_jobs: int  # 0: no limit
    max_memory_mib: int  # 0: no limit


class LimitsConfig(NamedTuple):
    """What no job may exceed; 0: no limit."""

    timeout_s: float
    memory_mib: int
    concurrent: int
    per_minute: int
    queue_depth: int
    envelope_bytes: int


class SecuritySettings(NamedTuple):
    allowed_paths: tuple[str, ...] | None  # None: job modules may come from anywhere
    signing_key_file: str | None
    strict: bool


class RuntimeConfig(NamedTuple):
    memory_limit_mib: int  # 0: no limit
    memory_check_s: float


class ShutdownConfig(NamedTuple):
    grace_s: float


class LogConfig(NamedTuple):
    level: str
    format: str


class ControlConfig(NamedTuple):
    socket: str
    mode: int  # of the socket's file


class Config(NamedTuple):
    """The whole configuration, checked; every path is absolute."""

    file: str | None  # absolute; None: it was made in code
    shown_file: str | None  # the same as the user typed it, for messages
    instance: str
    state_dir: str
    queue: QueueConfig
    jobs: JobsConfig
    inline: InlineConfig
    isolated: IsolatedConfig
    pool: PoolConfig
    limits: LimitsConfig
    security: SecuritySettings
    runtime: RuntimeConfig
    shutdown: ShutdownConfig
    log: LogConfig
    control: ControlConfig
    lines: Mapping[str, int]  # "jobs.modules.0" -> the line it stands on; what the file does not set is not in it

    def error(self, key: str, message: str) -> ConfigError:
        """A ConfigError that points at `key` ("jobs.modules.0"), or at the nearest thing around it that the file sets."""
        return ConfigError(message, file=self.shown_file, line=_line(self.lines, key))

    def to_plain(self) -> dict[str, Any]:
        """JSON values. Secrets are in it: it goes through a pipe, never to a file or a log."""
        plain: dict[str, Any] = _to_plain(self)
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Config:
        """The inverse of `to_plain`, without yaml and without looking at files or the environment again."""
        fields = dict(plain)
        for section, record in _SECTIONS.items():
            fields[section] = record(**{name: tuple(v) if isinstance(v, list) else v for name, v in plain[section].items()})
        queue: QueueConfig = fields["queue"]
        fields["queue"] = queue._replace(names=tuple(QueueSpec(**spec) for spec in plain["queue"]["names"]))
        return cls(**fields)


_SECTIONS: Final[dict[str, Callable[..., Any]]] = {
    "queue": QueueConfig,
    "jobs": JobsConfig,
    "inline": InlineConfig,
    "isolated": IsolatedConfig,
    "pool": PoolConfig,
    "limits": LimitsConfig,
    "security": SecuritySettings,
    "runtime": RuntimeConfig,
    "shutdown": ShutdownConfig,
    "log": LogConfig,
    "control": ControlConfig,
}


def _to_plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, tuple) else value


def _line(lines: Mapping[str, int], key: str) -> int | None:
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key)


# -- what a setting may be --------------------------------------------------------------------------------------------------

_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(ms|s|m|h|d)?")
_SECONDS: Final = {"ms": 0.001, "s": 1, None: 1, "m": 60, "h": 3600, "d": 86400}
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(B|[kKMGT]B|[KMGT]iB)?")
_POWERS: Final = {"k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_duration(value: Any) -> float:
    """Seconds of 500ms, 5s, 2m, 1h, 1d, or of a number of seconds. Raises UsageError."""
    number, unit = _measure(_DURATION, value, "write 500ms, 5s, 2m, 1h, 1d, or a number of seconds")
    seconds = number * _SECONDS[unit]
    if seconds > _LONGEST_S:
        raise UsageError("the longest is 3650d")
    return float(seconds)


def parse_size(value: Any) -> int:
    """Bytes of 512MB, 2GB (decimal), 64KiB, 512MiB, 2GiB, or of a number of MiB. Raises UsageError."""
    number, unit = _measure(_SIZE, value, "write 512MB, 512MiB, 2GiB, 64KiB, or a number of MiB")
    scale = 1 if unit == "B" else MIB if unit is None else (1024 if "i" in unit else 1000) ** _POWERS[unit[0]]
    if number * scale > _LARGEST:
        raise UsageError("the largest is 1024TiB")
    return int(number * scale)


def _measure(pattern: re.Pattern[str], value: Any, hint: str) -> tuple[float, str | None]:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < inf:
        return value, None
    match = pattern.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise UsageError(hint)
    return float(match[1]), match[2]


class _FromEnvironment(str):
    """A text in which ${…} was expanded. The environment holds texts only, so it may stand for a number or a switch, too."""

    __slots__ = ()


class Kind(NamedTuple):
    """What values a setting takes. `read` raises UsageError with a hint (or "") when `value` is none of them."""

    allowed: str  # completes "must be …"
    read: Callable[[Any, str], Any]  # (value, the directory that relative paths start from)
    unit: str = ""  # ends the name of the field: "lease" is read into `lease_s`
    many: bool = False  # a list of them
    null: bool = False  # null is allowed, too
    secret: bool = False  # messages do not repeat the value

    def listed(self) -> Kind:
        return self._replace(many=True)

    def or_null(self) -> Kind:
        return self._replace(null=True)

    def describe(self) -> str:
        """For docs/settings.md."""
        listed = f"a list, each {self.allowed};" if self.many else self.allowed
        return f"{listed} or null" if self.null else listed.rstrip(";")


def _wanted(fits: bool, hint: str = "") -> None:
    if not fits:
        raise UsageError(hint)


def _text(allowed: str, fits: Callable[[str], bool] = bool) -> Kind:
    def read(value: Any, directory: str) -> str:
        _wanted(not isinstance(value, (bool, int, float)), "put quotes around it")
        _wanted(isinstance(value, str) and fits(value))
        return str(value)

    return Kind(allowed, read)


def _one_of(*choices: str) -> Kind:
    def read(value: Any, directory: str) -> str:
        if value not in choices:
            raise UsageError(nearest(value, choices).strip(" ()") if isinstance(value, str) else "")
        return str(value)

    return Kind(f"{', '.join(choices[:-1])} or {choices[-1]}", read)


def _integer(least: int) -> Kind:
    def read(value: Any, directory: str) -> int:
        if isinstance(value, _FromEnvironment) and re.fullmatch(r"-?[0-9]{1,18}", value):
            value = int(value)
        _wanted(type(value) is int and value >= least, "take the quotes away" if isinstance(value, str) else "")
        return int(value)

    return Kind(f"an integer of at least {least}", read)


def _duration(least: str = "") -> Kind:
    def read(value: Any, directory: str) -> float:
        seconds = parse_duration(value)
        _wanted(not least or seconds >= parse_duration(least))
        return seconds

    return Kind(f"a duration of at least {least}" if least else "a duration", read, "_s")


def _read_mib(value: Any, directory: str) -> int:
    size = parse_size(value)
    _wanted(size >= MIB or size == 0)  # 64KiB must not round to 0, which means no limit
    return size // MIB


def _read_bytes(value: Any, directory: str) -> int:
    size = parse_size(value)
    _wanted(size >= 1024)
    return size


def _read_switch(value: Any, directory: str) -> bool:
    if isinstance(value, _FromEnvironment):
        value = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(value.lower(), value)
    _wanted(type(value) is bool, "take the quotes away" if isinstance(value, str) else "")
    return bool(value)


def _read_path(value: Any, directory: str) -> str:
    _wanted(isinstance(value, str) and bool(value) and "\0" not in value)
    return os.path.normpath(os.path.join(directory, value))


def _read_mode(value: Any, directory: str) -> int:
    _wanted(not isinstance(value, int), 'put quotes around it: "0600"')  # YAML reads 0600 as 384, and 600 as 600
    _wanted(isinstance(value, str) and bool(re.fullmatch(r"0?[0-7]{3}", value)))
    return int(value, 8)


def _read_budget(value: Any, directory: str) -> str:
    if not (isinstance(value, str) and re.fullmatch(r"(100|[1-9][0-9]?)%", value)):
        _wanted(parse_size(value) >= MIB)
    return str(value)


def _is_module(value: str) -> bool:
    return all(part.isidentifier() for part in value.split("."))


_PATH: Final = Kind("a path", _read_path)
_MODULE: Final = _text("a dotted module name such as app.jobs", _is_module)
_MEMORY: Final = Kind("a size of at least 1MiB, or 0", _read_mib, "_mib")
_INSTANCE: Final = _text("1 to 64 letters, digits and _ . -", lambda v: bool(re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", v)))
_QUEUE: Final = _text("1 to 64 letters, digits and _ . : -", lambda v: bool(QUEUE_NAME.fullmatch(v)))
_NAMES: Final = Kind("a mapping of queues to weights (or to weight, max_concurrent, per_minute), or a list", lambda v, _: v)

# -- the URL of the queue ---------------------------------------------------------------------------------------------------

SCHEMES: Final = ("sqlite", "redis", "rediss", "memory")
_SCHEMES_NOT_YET: Final = ("redis+sentinel", "postgresql", "sqs")
_REDIS: Final = ("redis", "rediss")


def resolve_url(url: str, directory: str | None) -> str:
    """`url`, checked, its relative SQLite path taken from `directory` (None: it has to be absolute, as in $KQUEUE_URL).

    As in SQLAlchemy, sqlite:///x is relative and sqlite:////x absolute; the path stands there literally, nothing is
    percent-encoded. Raises UsageError, whose message never repeats more of the URL than its scheme.
    """
    scheme, colon, rest = url.partition("://")
    if not colon:
        raise UsageError("it has no scheme: write sqlite:///path, redis://host:6379/0, rediss://… or memory://")
    if scheme in _SCHEMES_NOT_YET:
        raise UsageError(f"{scheme}:// is not supported by this version; use {', '.join(SCHEMES)}")
    if scheme not in SCHEMES:
        raise UsageError(f"{scheme!r:.40} is no known scheme{nearest(scheme, SCHEMES)}; known are {', '.join(SCHEMES)}")
    if scheme == "sqlite":
        return _resolve_sqlite(rest, directory)
    if scheme in _REDIS:
        _check_redis(url)
    return url


def _resolve_sqlite(rest: str, directory: str | None) -> str:
    if not rest.startswith("/"):
        raise UsageError("sqlite: takes three slashes before a relative path (sqlite:///var/x.db), four before an absolute one")
    path = rest[1:]
    if "?" in path:
        raise UsageError("sqlite:// takes no options after a ?")
    if path in ("", ":memory:"):
        raise UsageError("sqlite:// names no file; for a queue in memory write memory://")
    if not os.path.isabs(path) and directory is None:
        raise UsageError("a relative SQLite path would be another file in every directory; write it absolute: sqlite:////path")
    return f"sqlite:///{os.path.normpath(os.path.join(directory or '/', path))}"


def _check_redis(url: str) -> None:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - a property that raises
    except ValueError:
        raise UsageError(
            "its host and port cannot be read; percent-encode / ? # @ in a password, or put it into queue.password_file"
        ) from None
    if not re.fullmatch(r"/?[0-9]*", parts.path):
        raise UsageError("after the host stands the number of the database, as in redis://host:6379/0")


def _with_password(url: str, password: str) -> str:
    from urllib.parse import quote

    scheme, _, rest = url.partition("://")
    if scheme not in _REDIS:
        raise UsageError(f"a {scheme}:// queue takes no password; remove it")
    authority, tail = re.fullmatch(r"([^/?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]  # it always matches
    user, _, host = authority.rpartition("@")
    name, _, old = user.partition(":")
    if old:
        raise UsageError("the URL has a password already; keep one of the two")
    return f"{scheme}://{name}:{quote(password, safe='')}@{host}{tail}"


def _read_url(value: Any, directory: str) -> str:
    _wanted(isinstance(value, str), "write sqlite:///path, redis://host:6379/0 or memory://")
    return resolve_url(value, directory)


_URL: Final = Kind("a URL", _read_url, secret=True)

# -- the schema -------------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    key: str
    default: Any  # as it would stand in the YAML
    kind: Kind

    @property
    def field(self) -> str:
        """Its name in its record, with the unit: "lease_s"."""
        return self.key.rpartition(".")[2] + self.kind.unit


SETTINGS: Final[tuple[Setting, ...]] = (
    Setting("instance", "main", _INSTANCE),
    Setting("state_dir", "var", _PATH),
    Setting("queue.url", "sqlite:///var/kqueue.db", _URL),
    Setting("queue.url_file", None, _PATH.or_null()),
    Setting("queue.password_file", None, _PATH.or_null()),
    Setting("queue.names", {"default": 1}, _NAMES),
    Setting("queue.lease", "15s", _duration("3s")),
    Setting("queue.sync_replicas", 0, _integer(0)),
    Setting("jobs.path", ["."], _PATH.listed()),
    Setting("jobs.modules", [], _MODULE.listed()),
    Setting("jobs.isolated_modules", [], _MODULE.listed()),
    Setting("jobs.unknown", "retry", _one_of("retry", "bury")),
    Setting("inline.max_concurrent", 10000, _integer(1)),
    Setting("inline.max_slice", "100ms", _duration("1ms")),
    Setting("inline.hard_slice", "5s", _duration("1ms")),
    Setting("isolated.max_concurrent", 4, _integer(0)),
    Setting("isolated.start", "fork", _one_of(*STARTS)),
    Setting("isolated.memory_budget", "80%", Kind("a percentage or a size", _read_budget)),
    Setting("isolated.kill_grace", "2s", _duration()),
    Setting("isolated.user", None, _text("the name of a user").or_null()),
    Setting("isolated.memory_headroom", 128, _MEMORY),
    Setting("pool.size", 2, _integer(1)),
    Setting("pool.max_jobs", 1000, _integer(0)),
    Setting("pool.max_memory", 256, _MEMORY),
    Setting("limits.timeout", 0, _duration()),
    Setting("limits.memory", 512, _MEMORY),
    Setting("limits.concurrent", 0, _integer(0)),
    Setting("limits.per_minute", 0, _integer(0)),
    Setting("limits.queue_depth", 0, _integer(0)),
    Setting("limits.envelope", "1MiB", Kind("a size of at least 1KiB", _read_bytes, "_bytes")),
    Setting("security.allowed_paths", None, _PATH.listed().or_null()),
    Setting("security.signing_key_file", None, _PATH.or_null()),
    Setting("security.strict", True, Kind("true or false", _read_switch)),
    Setting("runtime.memory_limit", 512, _MEMORY),
    Setting("runtime.memory_check", "5s", _duration("100ms")),
    Setting("shutdown.grace", "20s", _duration()),
    Setting("log.level", "info", _one_of("debug", "info", "warning", "error")),
    Setting("log.format", "auto", _one_of("auto", "plain", "logfmt", "journald", "json")),
    Setting("control.socket", "var/kqueued.sock", _PATH),
    Setting("control.mode", "0600", Kind("an octal number in quotes", _read_mode)),
)

QUEUE_SETTINGS: Final = (
    Setting("weight", 1, _integer(1)),
    Setting("max_concurrent", 0, _integer(0)),
    Setting("per_minute", 0, _integer(0)),
)
"""What may stand below queue.names.NAME."""

NOT_YET: Final = ("queue.sync_replicas", "isolated.start", "isolated.user", "security.signing_key_file")
"""Settings of features that this version does not have: refused unless they stand at their default."""

_BY_KEY: Final = {setting.key: setting for setting in SETTINGS}
_TOP: Final = [key for key in _BY_KEY if "." not in key]


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
        return ConfigError(message, file=self.file, line=_line(self.lines, key))

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
    sections: dict[str, dict[str, Any]] = {"": {}, **{name: {} for name in _SECTIONS}}
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        sections[section][_BY_KEY[key].field if key in _BY_KEY else leaf] = value
    records = {name: record(**sections[name]) for name, record in _SECTIONS.items()}
    file = None if source.file is None else os.path.abspath(source.file)
    return Config(file=file, shown_file=source.file, lines=source.lines, **sections[""], **records)


def _read(setting: Setting, value: Any, source: _Source) -> Any:
    return _queues(value, source) if setting.kind is _NAMES else source.read(setting.kind, setting.key, value)


def _settings(tree: Mapping[str, Any], source: _Source) -> Iterator[tuple[Setting, Any]]:
    """The settings in `tree`, in its order, so that the first error is the first in the file. Raises ConfigError: unknown key."""
    for name, value in tree.items():
        if name in _TOP:
            yield _BY_KEY[name], value
        elif name not in _SECTIONS:
            raise _unknown(source, str(name), [*_TOP, *_SECTIONS])
        elif value is not None:  # a section whose every line is commented out
            if not isinstance(value, Mapping):
                raise source.error(name, f"{name} must be a mapping of settings, not {_shown(value)}")
            for leaf, item in value.items():
                if f"{name}.{leaf}" not in _BY_KEY:
                    known = [key.partition(".")[2] for key in _BY_KEY if key.startswith(f"{name}.")]
                    raise _unknown(source, f"{name}.{leaf}", known)
                yield _BY_KEY[f"{name}.{leaf}"], item


def _unknown(source: _Source, key: str, known: Sequence[str]) -> ConfigError:
    word = key.rpartition(".")[2]
    elsewhere = next((f' (did you mean "{other}"?)' for other in _BY_KEY if other.endswith(f".{word}")), "")
    hint = nearest(word, tuple(known)) or elsewhere
    return source.error(key, f'unknown setting "{key}"{hint}; allowed here: {", ".join(known)}')


def _queues(given: Any, source: _Source) -> tuple[QueueSpec, ...]:
    if not isinstance(given, (list, tuple, Mapping)) or not given:
        raise source.error("queue.names", f"queue.names must be {_NAMES.allowed}, not {_shown(given)}")
    specs: list[QueueSpec] = []
    for number, item in enumerate(given):
        key = f"queue.names.{item if isinstance(given, Mapping) else number}"
        name = source.read(_QUEUE, key, item)
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


def _url(values: Mapping[str, Any], source: _Source, url_given: bool) -> str:
    url: str = values["queue.url"]
    if values["queue.url_file"] is not None:
        if url_given:
            raise source.error("queue.url_file", "queue.url and queue.url_file are both set; keep one")
        url = source.read(_BY_KEY["queue.url"].kind, "queue.url_file", _secret(values, "queue.url_file", source))
    if values["queue.password_file"] is not None:
        try:
            url = _with_password(url, _secret(values, "queue.password_file", source))
        except UsageError as error:
            raise source.error("queue.password_file", f"queue.password_file: {error}") from None
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
            return _FromEnvironment(_REFERENCE.sub(self._reference, text))
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
