"""Admission: what no job may exceed, and where the code of jobs may come from.

`SecurityConfig` is injected into the runtime. At run every job goes through `admit`, which clamps it to the limits; before that,
`check_dispatch` tells whoever dispatches, and `kqueued --check`, what exceeds them. Concurrency, rate and depth stand here as
numbers; the runtime keeps to the first two by reserving less, the broker to the third at enqueue.

Paths are compared resolved and part by part, never as text: /app/Jobs must not admit /app/JobsEvil. This keeps code that was
never meant to be a job from becoming one by a slip in the configuration; it is no sandbox, since admitted code may do anything.
Nothing here imports a job's module or reads a payload.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .codec import MAX_BYTES
from .codec import OPTIONS as ENVELOPE_OPTIONS
from .errors import ConfigError, Refused, UsageError, nearest
from .options import MIN_FILES, PRIORITY_MAX, PRIORITY_MIN, JobOptions, check_option
from .registry import Registration
from .retries import grown
from .signing import ENVIRONMENT

if TYPE_CHECKING:
    from .codec import Envelope
    from .config import LimitsConfig, SecuritySettings


class SecurityConfig(NamedTuple):
    """What no job may exceed. 0: no limit. Made by hand, it is checked by `validated()`; the presets are checked already."""

    max_timeout_s: float = 0
    max_memory_mib: int = 512
    max_concurrent: int = 0  # jobs that run at once
    per_minute: int = 0  # jobs started
    queue_depth: int = 0  # jobs that may wait in a queue, looked at when dispatching
    max_envelope_bytes: int = MAX_BYTES
    allowed_paths: tuple[str, ...] | None = None  # where job modules may lie; None: anywhere, (): nowhere
    strict: bool = True  # dispatch and --check refuse what exceeds a limit; False: it is clamped
    signing_key_file: str | None = None  # what envelopes are signed with; None: they are not, and signatures are not checked
    signed: bool = False  # they must be signed: what a daemon that has a key tells clients that know only the broker
    max_cpu_s: float = 0
    max_files: int = 0  # at least options.MIN_FILES
    max_processes: int = 0
    max_file_size_mib: int = 0

    @classmethod
    def production(cls, **overrides: Any) -> SecurityConfig:
        """Strict, at most an hour and 512 MiB a job and 100,000 waiting jobs a queue. Raises ConfigError.

        `allowed_paths` has to be given: no default is both safe and useful. None, meaning anywhere, is refused.
        """
        if overrides.get("allowed_paths") is None:
            raise ConfigError(
                "SecurityConfig.production() needs allowed_paths, the directories that job modules may lie in: "
                'SecurityConfig.production(allowed_paths=["/srv/app"])'
            )
        return _with(cls(max_timeout_s=3600, queue_depth=100_000), overrides)

    @classmethod
    def development(cls, **overrides: Any) -> SecurityConfig:
        """Lenient: job modules from anywhere, no limit but 1 GiB a job, to which jobs are clamped. Raises ConfigError."""
        return _with(cls(max_memory_mib=1024, strict=False), overrides)

    @classmethod
    def from_config(cls, limits: LimitsConfig, security: SecuritySettings) -> SecurityConfig:
        """What kqueue.yaml says under `limits` and `security`; without a signing key there, the one of the environment."""
        return cls(
            max_timeout_s=limits.timeout_s,
            max_memory_mib=limits.memory_mib,
            max_cpu_s=limits.cpu_s,
            max_files=limits.files,
            max_processes=limits.processes,
            max_file_size_mib=limits.file_size_mib,
            max_concurrent=limits.concurrent,
            per_minute=limits.per_minute,
            queue_depth=limits.queue_depth,
            max_envelope_bytes=limits.envelope_bytes,
            allowed_paths=security.allowed_paths,
            strict=security.strict,
            signing_key_file=security.signing_key_file or os.environ.get(ENVIRONMENT) or None,
        ).validated()

    @classmethod
    def from_published(cls, fields: Mapping[str, Any]) -> SecurityConfig:
        """The inverse of `published`. What is missing in `fields` is no limit. Raises ConfigError for what makes no sense."""
        known = {name: fields[name] for name in _PUBLISHED if name in fields}
        return cls(**{"max_memory_mib": 0, "strict": False, **known}).validated()

    def published(self) -> dict[str, Any]:
        """What the daemon tells clients that have no configuration: all that is looked at at dispatch. JSON values."""
        return {**{name: getattr(self, name) for name in _PUBLISHED}, "signed": self.signed or self.signing_key_file is not None}

    def validated(self) -> SecurityConfig:
        """Itself, paths made absolute. Raises ConfigError for what makes no sense. No file is looked at."""
        for name in _COUNTS:
            value = getattr(self, name)
            _check(type(value) is int and value >= 0, name, "an integer of at least 0 (0 for no limit)", value)
        files = self.max_files
        _check(not files or files >= MIN_FILES, "max_files", f"at least {MIN_FILES}, or 0 for no limit", files)
        for name in ("max_timeout_s", "max_cpu_s"):
            seconds = getattr(self, name)
            number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
            _check(number and 0 <= seconds < float("inf"), name, "seconds, 0 for no limit", seconds)
        size = self.max_envelope_bytes
        _check(type(size) is int and size >= 1024, "max_envelope_bytes", "an integer of at least 1024", size)
        _check(type(self.strict) is bool, "strict", "True or False", self.strict)
        _check(type(self.signed) is bool, "signed", "True or False", self.signed)
        key_file: Any = self.signing_key_file
        given = isinstance(key_file, (str, os.PathLike)) and bool(os.fspath(key_file))
        _check(key_file is None or given, "signing_key_file", "a path or None", key_file)
        return self._replace(
            allowed_paths=None if self.allowed_paths is None else _absolute(self.allowed_paths),
            signing_key_file=None if key_file is None else os.path.abspath(key_file),
        )


_COUNTS: Final = (
    "max_memory_mib", "max_files", "max_processes", "max_file_size_mib", "max_concurrent", "per_minute", "queue_depth",
)  # fmt: skip
_PUBLISHED: Final = (
    "max_timeout_s", "max_memory_mib", "max_cpu_s", "max_files", "max_processes", "max_file_size_mib", "queue_depth",
    "max_envelope_bytes", "strict", "signed",
)  # fmt: skip


def _with(preset: SecurityConfig, overrides: dict[str, Any]) -> SecurityConfig:
    for name in overrides:
        if name not in SecurityConfig._fields:
            raise ConfigError(f"SecurityConfig has no {name!r}{nearest(name, SecurityConfig._fields)}")
    return preset._replace(**overrides).validated()


def _check(fits: bool, name: str, wanted: str, value: Any) -> None:
    if not fits:
        raise ConfigError(f"SecurityConfig: {name} must be {wanted}, not {value!r:.60}")


def _absolute(paths: Any) -> tuple[str, ...]:
    listed = isinstance(paths, Sequence) and not isinstance(paths, (str, bytes))  # a str is a sequence of paths, too
    _check(listed and all(isinstance(path, (str, os.PathLike)) for path in paths), "allowed_paths", "a list of paths", paths)
    texts = [os.fspath(path) for path in paths]
    _check(all(isinstance(text, str) and text for text in texts), "allowed_paths", "a list of paths, none of them empty", paths)
    return tuple(map(os.path.abspath, texts))


# -- options ----------------------------------------------------------------------------------------------------------------


class Admitted(NamedTuple):
    """A job that may run. `options` are those in force: declared, overridden by the dispatch, clamped."""

    registration: Registration
    options: JobOptions


_known: Final[dict[str, tuple[SecurityConfig, Registration, dict[int, Admitted]]]] = {}  # by name; the last by priority


def admit(
    security: SecurityConfig, envelope: Envelope, registration: Registration, memory_deaths: int = 0
) -> Admitted:
    """What `envelope` may run with. Refused, with the reason for its death certificate: an option in it that makes no sense.

    `memory_deaths`: how often it ran out of memory before, since a job may ask for more after each. Most envelopes bring no
    options, so their answer is kept: 0.2 µs instead of 2.
    """
    if memory_deaths:
        return _grown(security, _admit(security, envelope, registration), memory_deaths)
    if envelope.options:
        return _admit(security, envelope, registration)
    known = _known.get(registration.name)
    if known is None or known[0] is not security or known[1] is not registration:
        known = _known[registration.name] = (security, registration, {})
    admitted = known[2].get(envelope.priority)
    if admitted is None:
        admitted = _admit(security, envelope, registration)
        if PRIORITY_MIN <= envelope.priority <= PRIORITY_MAX:  # what stands in the store is anybody's, and must not fill memory
            known[2][envelope.priority] = admitted
    return admitted


def _admit(security: SecurityConfig, envelope: Envelope, registration: Registration) -> Admitted:
    asked = {}
    for name, value in envelope.options.items():
        if name not in ENVELOPE_OPTIONS:
            raise Refused(f"an envelope cannot set {name!r:.60}; it may set {', '.join(ENVELOPE_OPTIONS)}")
        try:
            asked[name] = check_option(name, value)
        except UsageError as error:
            raise Refused(f"the envelope's {error}") from None
        except OverflowError:  # JSON takes an integer of any length, and no float holds 10**400
            raise Refused(f"the envelope's {name} is a number out of range") from None
    if "max_attempts" in asked:  # a dispatch that sets the one is not to be overruled by a declaration of the other
        asked.setdefault("retry_until", None)
    merged = registration.options._replace(priority=envelope.priority, **asked)
    return Admitted(registration, _clamped(security, merged))


def _grown(security: SecurityConfig, admitted: Admitted, deaths: int) -> Admitted:
    options = admitted.options
    more = options._replace(max_memory=grown(options.max_memory, options.causes, deaths))
    return admitted._replace(options=_clamped(security, more))


def check_dispatch(security: SecurityConfig, options: JobOptions, name: str) -> JobOptions:
    """The options job `name` will run with when it is dispatched, or declared, with `options`.

    Strict: raises UsageError when they exceed a limit. Else they are clamped.
    """
    clamped = _clamped(security, options)
    if not security.strict or clamped is options:
        return clamped
    for (option, setting, _), limit in zip(_LIMITS, _limits(security), strict=True):
        value = getattr(options, option)
        if value != getattr(clamped, option):
            shown = f"{value:.12g}" if value else "0 (no limit)"
            raise UsageError(f"job {name!r}: {option} {shown} is over {setting} {limit:.12g}; lower it or raise the limit")
    raise UsageError(f"job {name!r}: priority {options.priority} is not within {PRIORITY_MIN} to {PRIORITY_MAX}")


# Option, its setting, and its field in SecurityConfig. Read all at once, since every dispatch does.
_LIMITS: Final = (
    ("timeout", "limits.timeout", "max_timeout_s"),
    ("max_memory", "limits.memory", "max_memory_mib"),
    ("max_cpu", "limits.cpu", "max_cpu_s"),
    ("max_files", "limits.files", "max_files"),
    ("max_processes", "limits.processes", "max_processes"),
    ("max_file_size", "limits.file_size", "max_file_size_mib"),
)
_asked: Final = attrgetter(*(option for option, _, _ in _LIMITS))
_limits: Final = attrgetter(*(field for _, _, field in _LIMITS))


def _clamped(security: SecurityConfig, options: JobOptions) -> JobOptions:
    """`options` itself when nothing in it exceeds a limit."""
    changes: dict[str, Any] = {}
    for value, limit, (option, _, _) in zip(_asked(options), _limits(security), _LIMITS, strict=True):
        if limit and (value > limit or not value):  # 0 asks for no limit
            changes[option] = limit
    if not PRIORITY_MIN <= options.priority <= PRIORITY_MAX:
        changes["priority"] = max(PRIORITY_MIN, min(options.priority, PRIORITY_MAX))
    return options._replace(**changes) if changes else options


# -- paths ------------------------------------------------------------------------------------------------------------------


def check_module_path(security: SecurityConfig, module_name: str, origin_file: str | None) -> None:
    """Raise Refused unless the module that lies in `origin_file` (None: in no file, or not found) may define jobs."""
    _check_path(security, f"module {module_name!r}", origin_file)


def check_handler_path(security: SecurityConfig, registration: Registration) -> None:
    """Raise Refused unless the code that `registration` runs lies where jobs may.

    A module in an allowed place can register a function it imported from elsewhere (`job(shutil.rmtree)`); only the code itself
    knows its file. A decorated function counts as the function inside, whoever wrote the decorator. A job known from the manifest
    only has no code here: the template has checked it.
    """
    if security.allowed_paths is None or registration.target is None:
        return
    target: Any = registration.target
    handler = _innermost(getattr(target, "handle", None) if isinstance(target, type) else target)
    code = getattr(handler, "__code__", None)
    file = None if code is None or code.co_filename.startswith("<") else code.co_filename  # "<string>": made by exec
    _check_path(security, f"job {registration.name!r} of module {registration.module!r}", file)


def _innermost(handler: Any) -> Any:
    for _ in range(100):  # decorators, methods and partials deep; `f.__wrapped__ = f` has no end
        inner = getattr(handler, "__wrapped__", None)
        if inner is None and not hasattr(handler, "__code__"):
            inner = getattr(handler, "__func__", None) or getattr(handler, "func", None)
        if inner is None:
            return handler
        handler = inner
    return None


def _check_path(security: SecurityConfig, what: str, file: str | None) -> None:
    allowed = security.allowed_paths
    if allowed is None or (file is not None and _within(file, allowed)):
        return
    where = "is in no file" if file is None else f"lies in {os.path.realpath(file)}"
    raise Refused(
        f"{what} {where}, which is not within security.allowed_paths ({', '.join(allowed) or 'empty: nothing is'}); "
        "move it there, or add its directory"
    )


def _within(file: str, allowed: Sequence[str]) -> bool:
    real = os.path.realpath(file)
    roots = map(os.path.realpath, allowed)
    return any(os.path.commonpath([real, root]) == root for root in roots)


def find_module_file(name: str, search_paths: Sequence[str]) -> str | None:
    """The file that `import name` would run, with `search_paths` in front of sys.path; None: there is none. Runs no code of it.

    `importlib.util.find_spec("app.jobs")` would import `app` to learn where its submodules are, and so run what is to be checked
    first. So the finders are asked level by level, and told where to look. What `app` would change while it is imported (its
    `__path__`, say) is not seen.
    """
    from importlib.machinery import PathFinder

    first, *rest = name.split(".")
    if not all(part.isidentifier() for part in (first, *rest)):
        return None
    spec = None
    for finder in sys.meta_path:  # all of them: an editable install is known to a finder of its own only
        find_spec = getattr(finder, "find_spec", None)
        if spec is None and find_spec is not None:
            spec = find_spec(first, [*search_paths, *sys.path] if finder is PathFinder else None)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # Under its full name, a namespace package would look its parent up in sys.modules, and not find it there.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec.origin if spec is not None and spec.has_location else None
