"""One frozen `Config`: what kqueue.yaml says, checked. Records and nothing else, since this is all that the supervisor loads.

`settings.py` is the schema and `config_file.py` reads the file. The daemon lets a short-lived child do that, which sends
`to_plain()`: yaml alone costs 1.5 MiB and 12 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from .commands import Command
from .errors import ConfigError


class QueueSpec(NamedTuple):
    name: str
    weight: int = 1  # share of the reservations, against the other queues'
    max_concurrent: int = 0  # 0: no limit
    per_minute: int = 0  # 0: no limit


class DeadConfig(NamedTuple):
    """How long dead letters are kept, in each queue. 0: for ever, and any number."""

    max_age_s: float
    max_count: int


class QueueConfig(NamedTuple):
    url: str  # with its password; a relative SQLite path has become absolute
    names: tuple[QueueSpec, ...]
    strict_order: bool  # names was a list: an earlier queue goes first
    lease_s: float
    sync_replicas: int
    dead: DeadConfig


class JobsConfig(NamedTuple):
    path: tuple[str, ...]
    modules: tuple[str, ...]
    isolated_modules: tuple[str, ...]
    pin: Mapping[str, str]  # the name of a job -> "inline" | "isolated"
    unknown: str  # "retry" | "bury"
    commands: tuple[Command, ...]


class InlineConfig(NamedTuple):
    max_concurrent: int
    max_slice_s: float
    hard_slice_s: float


class IsolatedConfig(NamedTuple):
    max_concurrent: int  # 0: no isolated job runs here
    start: str
    memory_budget: str  # as written: "80%", or a size
    kill_grace_s: float
    cgroups: bool  # one for each running job, where they may be made
    user: str | None  # None: the daemon's own
    group: str | None  # None: the user's
    umask: int | None  # None: the daemon's own
    directory: str | None  # None: where the daemon runs
    nice: int
    environment: tuple[str, ...]
    private_tmp: bool
    network: bool
    memory_headroom_mib: int


class PoolConfig(NamedTuple):
    size: int
    max_jobs: int  # 0: no limit
    max_memory_mib: int  # 0: no limit
    max_age_s: float  # 0: no limit


class LimitsConfig(NamedTuple):
    """What no job may exceed; 0: no limit."""

    timeout_s: float
    memory_mib: int
    cpu_s: float
    files: int
    processes: int
    file_size_mib: int
    concurrent: int
    per_minute: int
    queue_depth: int
    envelope_bytes: int


class SecuritySettings(NamedTuple):
    allowed_paths: tuple[str, ...] | None  # None: job modules may come from anywhere
    signing_key_file: str | None
    allowed_users: tuple[str, ...] | None  # whom job classes may name; None: all but root
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
        return ConfigError(message, file=self.shown_file, line=line_of(self.lines, key))

    def to_plain(self) -> dict[str, Any]:
        """JSON values. Secrets are in it: it goes through a pipe, never to a file or a log."""
        plain: dict[str, Any] = _to_plain(self)
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Config:
        """The inverse of `to_plain`, without yaml and without looking at files or the environment again."""
        fields = dict(plain)
        fields |= {section: _record(section, plain[section]) for section in SECTIONS if "." not in section}
        queue: QueueConfig = fields["queue"]
        jobs: JobsConfig = fields["jobs"]
        commands = [Command(**{**each, "command": tuple(each["command"])}) for each in plain["jobs"]["commands"]]
        fields["jobs"] = jobs._replace(commands=tuple(commands))
        fields["queue"] = queue._replace(names=tuple(QueueSpec(**spec) for spec in plain["queue"]["names"]))
        return cls(**fields)


SECTIONS: Final[dict[str, Callable[..., Any]]] = {
    "queue.dead": DeadConfig,
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
"""Of each section its record; what stands in another section comes before it."""


def _record(section: str, plain: Mapping[str, Any]) -> Any:
    fields = {}
    for name, value in plain.items():
        inner = f"{section}.{name}"
        fields[name] = _record(inner, value) if inner in SECTIONS else tuple(value) if isinstance(value, list) else value
    return SECTIONS[section](**fields)


def _to_plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    return [_to_plain(item) for item in value] if isinstance(value, tuple) else value


def line_of(lines: Mapping[str, int], key: str) -> int | None:
    while key and key not in lines:
        key = key.rpartition(".")[0]
    return lines.get(key)
