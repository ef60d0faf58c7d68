"""Which variables of the daemon's environment its jobs have: those of a list, so that what nobody thought of is not among them.

The environment of a service is where its secrets are: the URL of its broker, the keys of its cloud. What is executed keeps its
environment in /proc/PID/environ, so the template is executed with what the list lets through, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from .errors import UsageError

ALLOWED: Final = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TERM", "TZ", "LANG", "LANGUAGE", "LC_*", "PYTHON*", "VIRTUAL_ENV",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
"""What lets programs find themselves, their language and their time, and holds no secrets."""

NEVER: Final = ("KQUEUE_URL", "KQUEUE_SIGNING_KEY_FILE", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_*")
"""Where the queue is and what signs for it: a job dispatches without. And what systemd says to this process alone."""

_OF_NO_INTEREST: Final = (
    "_", "SHLVL", "PWD", "OLDPWD", "LS_COLORS", "LESS*", "PS1", "INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID",
    "MEMORY_PRESSURE_*", "STATE_DIRECTORY", "RUNTIME_DIRECTORY", "SSH_*", "XDG_*", "DBUS_*", "DISPLAY", "HOSTNAME", "MAIL",
    "KQUEUE_CONFIG", *NEVER,
)  # fmt: skip
_PATTERN: Final = re.compile(r"[A-Za-z_*][A-Za-z0-9_*]*")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_pattern(pattern: str) -> str:
    """Itself. Raises UsageError for what is no name, or one that is never let through."""
    if not _PATTERN.fullmatch(pattern):
        raise UsageError("write a name such as DATABASE_URL, or a pattern such as APP_*; the value is the daemon's own")
    if "*" not in pattern and _matches(pattern, NEVER):
        raise UsageError(f"{pattern} is never in a job's environment")
    return pattern


def for_jobs(environ: Mapping[str, str], more: Iterable[str] = ()) -> dict[str, str]:
    """What of `environ` a job has, where `more` names and patterns are let through."""
    passing = (*ALLOWED, *more)
    return {name: value for name, value in environ.items() if _matches(name, passing) and not _matches(name, NEVER)}


def withheld(environ: Mapping[str, str], more: Iterable[str] = ()) -> list[str]:
    """The names that jobs do not have, and that somebody may miss."""
    given = for_jobs(environ, more)
    return sorted(name for name in environ if name not in given and not _matches(name, _OF_NO_INTEREST))


def hint(message: str, environ: Mapping[str, str], more: Iterable[str] = ()) -> str:
    """What to add to an error that seems to be about a variable that was withheld; "": it is about something else."""
    names = withheld(environ, more)
    missed = next((name for name in _NAME.findall(message) if name in names), "")
    if not missed:
        return ""
    listed = ", ".join((*more, missed))
    return f"{missed} is set for the daemon, and jobs do not have it: write isolated: {{environment: [{listed}]}}"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(
        name == pattern or ("*" in pattern and re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name) is not None)
        for pattern in patterns
    )
