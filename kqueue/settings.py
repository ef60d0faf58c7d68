"""The schema of kqueue.yaml: every setting, its default, and what it may be. A test holds docs/settings.md to it.

Values are read here one at a time, without knowing the file that they stand in: `config_file.py` has that. Nothing here opens a
broker or imports a job's module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from math import inf
from typing import Any, Final, NamedTuple

from .commands import RESULTS, STDIN
from .environment import check_pattern
from .errors import UsageError, nearest
from .options import ACCOUNT, MIN_FILES, PRIORITY_MAX, PRIORITY_MIN, QUEUE_NAME, STARTS

MIB: Final = 1024 * 1024
_LONGEST_S: Final = 3650 * 86400.0  # ten years: longer is a slip of the pen
_LARGEST: Final = 1 << 50  # bytes, 1 PiB: the same


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


class FromEnvironment(str):
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
        if isinstance(value, FromEnvironment) and re.fullmatch(r"-?[0-9]{1,18}", value):
            value = int(value)
        _wanted(type(value) is int and value >= least, "take the quotes away" if isinstance(value, str) else "")
        return int(value)

    return Kind(f"an integer of at least {least}", read)


def _read_files(value: Any, directory: str) -> int:
    count: int = _integer(0).read(value, directory)
    _wanted(count == 0 or count >= MIN_FILES, "fewer, and no child could start")
    return count


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


def _read_some_mib(value: Any, directory: str) -> int:
    size = parse_size(value)
    _wanted(size >= MIB)
    return size // MIB


def _read_priority(value: Any, directory: str) -> int:
    _wanted(type(value) is int and PRIORITY_MIN <= value <= PRIORITY_MAX)
    return int(value)


def _read_bytes(value: Any, directory: str) -> int:
    size = parse_size(value)
    _wanted(size >= 1024)
    return size


def _read_switch(value: Any, directory: str) -> bool:
    if isinstance(value, FromEnvironment):
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


def _read_nice(value: Any, directory: str) -> int:
    _wanted(type(value) is int and 0 <= value <= 19)
    return int(value)


def _read_pattern(value: Any, directory: str) -> str:
    _wanted(isinstance(value, str), "put quotes around it")
    return check_pattern(value)


def _read_budget(value: Any, directory: str) -> str:
    if not (isinstance(value, str) and re.fullmatch(r"(100|[1-9][0-9]?)%", value)):
        _wanted(parse_size(value) >= MIB)
    return str(value)


def _read_pins(value: Any, directory: str) -> dict[str, str]:
    _wanted(isinstance(value, dict) and all(isinstance(name, str) for name in value))
    for name, lane in value.items():
        _wanted(lane in ("inline", "isolated"), f"{name} cannot be {lane!r:.40}")
    return dict(value)


def _is_module(value: str) -> bool:
    return all(part.isidentifier() for part in value.split("."))


_PATH: Final = Kind("a path", _read_path)
_SWITCH: Final = Kind("true or false", _read_switch)
_MODE: Final = Kind("an octal number in quotes", _read_mode)
_USER: Final = _text("the name of a user", lambda v: bool(ACCOUNT.fullmatch(v)))
_GROUP: Final = _text("the name of a group", lambda v: bool(ACCOUNT.fullmatch(v)))
_MODULE: Final = _text("a dotted module name such as app.jobs", _is_module)
_MEMORY: Final = Kind("a size of at least 1MiB, or 0", _read_mib, "_mib")
_INSTANCE: Final = _text("1 to 64 letters, digits and _ . -", lambda v: bool(re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", v)))
QUEUE: Final = _text("1 to 64 letters, digits and _ . : -", lambda v: bool(QUEUE_NAME.fullmatch(v)))
COMMANDS: Final = Kind("a mapping of names to commands, each with its command, and options", lambda v, _: v)
NAMES: Final = Kind("a mapping of queues to weights (or to weight, max_concurrent, per_minute), or a list", lambda v, _: v)

# -- the URL of the queue ---------------------------------------------------------------------------------------------------

SCHEMES: Final = ("sqlite", "redis", "rediss", "unix", "redis+sentinel", "memory")
_SCHEMES_NOT_YET: Final = ("postgresql", "sqs")
_REDIS: Final = ("redis", "rediss", "unix", "redis+sentinel")


def resolve_url(url: str, directory: str | None) -> str:
    """`url`, checked, its relative SQLite path taken from `directory` (None: it has to be absolute, as in $KQUEUE_URL).

    As in SQLAlchemy, sqlite:///x is relative and sqlite:////x absolute; the path stands there literally, nothing is
    percent-encoded. Raises UsageError, whose message never repeats more of the URL than its scheme.
    """
    scheme, colon, rest = url.partition("://")
    if not colon:
        raise UsageError("it has no scheme: write sqlite:///path, redis://host:6379/0, rediss://…, unix:///path or memory://")
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
        for host in parts.netloc.rpartition("@")[2].split(","):
            urlsplit(f"//{host}").port  # noqa: B018 - a property that raises
    except ValueError:
        raise UsageError(
            "its host and port cannot be read; percent-encode / ? # @ in a password, or put it into queue.password_file"
        ) from None
    if parts.scheme == "unix":
        if parts.hostname or parts.path in ("", "/"):
            raise UsageError("a Unix socket takes three slashes, and an absolute path: unix:///run/redis/redis.sock?db=0")
    elif parts.scheme == "redis+sentinel":
        if not re.fullmatch(r"/[^/]+(/[0-9]*)?", parts.path):
            form = "redis+sentinel://host:26379,host:26379/SERVICE/0"
            raise UsageError(f"after the Sentinels stand the name of their service and the number of the database: {form}")
    elif not re.fullmatch(r"/?[0-9]*", parts.path):
        raise UsageError("after the host stands the number of the database, as in redis://host:6379/0")
    if any(pair.startswith("db=") and not re.fullmatch("db=[0-9]+", pair) for pair in parts.query.split("&")):
        raise UsageError("after db= stands the number of the database, as in ?db=0")


def with_password(url: str, password: str) -> str:
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


def with_sync_replicas(url: str, count: int) -> str:
    """`url`, that says how many replicas must have what is promised. It travels in the URL, so that whoever connects knows it."""
    scheme, _, rest = url.partition("://")
    if scheme not in _REDIS:
        raise UsageError(f"a {scheme}:// queue has no replicas; leave it at 0")
    if re.search("[?&]sync_replicas=", rest):
        raise UsageError("the URL says sync_replicas= already; keep one of the two")
    return f"{url}{'&' if '?' in rest else '?'}sync_replicas={count}"


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
    Setting("queue.names", {"default": 1}, NAMES),
    Setting("queue.lease", "15s", _duration("3s")),
    Setting("queue.sync_replicas", 0, _integer(0)),
    Setting("queue.dead.max_age", 0, _duration()),
    Setting("queue.dead.max_count", 0, _integer(0)),
    Setting("jobs.path", ["."], _PATH.listed()),
    Setting("jobs.modules", [], _MODULE.listed()),
    Setting("jobs.isolated_modules", [], _MODULE.listed()),
    Setting("jobs.pin", {}, Kind("a mapping of jobs to inline or isolated", _read_pins)),
    Setting("jobs.unknown", "retry", _one_of("retry", "bury")),
    Setting("jobs.commands", {}, COMMANDS),
    Setting("inline.max_concurrent", 10000, _integer(1)),
    Setting("inline.max_slice", "100ms", _duration("1ms")),
    Setting("inline.hard_slice", "5s", _duration("1ms")),
    Setting("isolated.max_concurrent", 4, _integer(0)),
    Setting("isolated.start", "fork", _one_of(*STARTS)),
    Setting("isolated.memory_budget", "80%", Kind("a percentage or a size", _read_budget)),
    Setting("isolated.kill_grace", "2s", _duration()),
    Setting("isolated.cgroups", True, _SWITCH),
    Setting("isolated.user", None, _USER.or_null()),
    Setting("isolated.group", None, _GROUP.or_null()),
    Setting("isolated.umask", None, _MODE.or_null()),
    Setting("isolated.directory", None, _PATH.or_null()),
    Setting("isolated.nice", 0, Kind("an integer from 0 to 19", _read_nice)),
    Setting("isolated.environment", [], Kind("a name or a pattern such as APP_*", _read_pattern).listed()),
    Setting("isolated.private_tmp", False, _SWITCH),
    Setting("isolated.network", True, _SWITCH),
    Setting("isolated.memory_headroom", 128, _MEMORY),
    Setting("pool.size", 2, _integer(1)),
    Setting("pool.max_jobs", 1000, _integer(0)),
    Setting("pool.max_memory", 256, _MEMORY),
    Setting("pool.max_age", "1h", _duration()),
    Setting("limits.timeout", 0, _duration()),
    Setting("limits.memory", 512, _MEMORY),
    Setting("limits.cpu", 0, _duration()),
    Setting("limits.files", 0, Kind(f"an integer of at least {MIN_FILES}, or 0", _read_files)),
    Setting("limits.processes", 0, _integer(0)),
    Setting("limits.file_size", 0, _MEMORY),
    Setting("limits.concurrent", 0, _integer(0)),
    Setting("limits.per_minute", 0, _integer(0)),
    Setting("limits.queue_depth", 0, _integer(0)),
    Setting("limits.envelope", "1MiB", Kind("a size of at least 1KiB", _read_bytes, "_bytes")),
    Setting("security.allowed_paths", None, _PATH.listed().or_null()),
    Setting("security.signing_key_file", None, _PATH.or_null()),
    Setting("security.allowed_users", None, _USER.listed().or_null()),
    Setting("security.strict", True, _SWITCH),
    Setting("runtime.memory_limit", 512, _MEMORY),
    Setting("runtime.memory_check", "5s", _duration("100ms")),
    Setting("shutdown.grace", "20s", _duration()),
    Setting("log.level", "info", _one_of("debug", "info", "warning", "error")),
    Setting("log.format", "auto", _one_of("auto", "plain", "logfmt", "journald", "json")),
    Setting("control.socket", "var/kqueued.sock", _PATH),
    Setting("control.mode", "0600", _MODE),
)

QUEUE_SETTINGS: Final = (
    Setting("weight", 1, _integer(1)),
    Setting("max_concurrent", 0, _integer(0)),
    Setting("per_minute", 0, _integer(0)),
)
"""What may stand below queue.names.NAME."""

COMMAND_SETTINGS: Final = (
    Setting("command", None, _text("a text", lambda v: True).listed()),
    Setting("stdin", "none", _one_of(*STDIN)),
    Setting("result", "none", _one_of(*RESULTS)),
    Setting("queue", "default", QUEUE),
    Setting("timeout", 30, _duration()),
    Setting("max_memory", 64, Kind("a size of at least 1MiB", _read_some_mib)),
    Setting("max_cpu", 0, _duration()),
    Setting("max_attempts", 3, _integer(1)),
    Setting("priority", 0, Kind("an integer from -100 to 100", _read_priority)),
    Setting("keep_result", 0, _duration()),
    Setting("user", None, _USER),
    Setting("group", None, _GROUP),
    Setting("network", True, _SWITCH),
    Setting("private_tmp", False, _SWITCH),
)
"""What may stand below jobs.commands.NAME."""

NOT_YET: Final[tuple[str, ...]] = ()
"""Settings of features that this version does not have: refused unless they stand at their default."""

BY_KEY: Final = {setting.key: setting for setting in SETTINGS}
