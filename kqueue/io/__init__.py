"""Input and output for jobs: streams, names, and the structure around them, on the loop that runs the job. Nothing here blocks
it.

This file is the list of what users may import. Each name is loaded when it is first asked for, so that nobody pays for what he
does not use: TLS, HTTP, a database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import http as http
    from .data.errors import (
        OutcomeUnknown,
        PostgresAborted,
        PostgresError,
        PostgresRefused,
        PostgresTryAgain,
        RedisError,
        RedisRedirected,
        RedisTryAgain,
    )
    from .data.postgres import postgres
    from .data.redis import redis
    from .dialing import connect
    from .errors import (
        CertificateRefused,
        Closed,
        ConnectFailed,
        ConnectionLost,
        IncompleteRead,
        IOFailed,
        NameNotFound,
        NoDescriptor,
        StreamLimit,
        TimedOut,
        TLSFailed,
        Truncated,
    )
    from .listening import Listener, listen
    from .mail import MailDeferred, MailFailed, MailRejected, send_mail
    from .operation import Operation
    from .process import (
        Completed,
        ProgramError,
        ProgramFailed,
        ProgramLost,
        ProgramNotRun,
        ProgramTimedOut,
        TooMuchOutput,
        run,
    )
    from .scopes import timeout
    from .sharing import Queue, Semaphore
    from .streams import Stream
    from .tasks import gather, race

_WHERE = {
    ".data.errors": (
        "OutcomeUnknown", "PostgresAborted", "PostgresError", "PostgresRefused", "PostgresTryAgain", "RedisError",
        "RedisRedirected", "RedisTryAgain",
    ),
    ".data.postgres": ("postgres",),
    ".data.redis": ("redis",),
    ".dialing": ("connect",),
    ".errors": (
        "CertificateRefused", "Closed", "ConnectFailed", "ConnectionLost", "IOFailed", "IncompleteRead", "NameNotFound",
        "NoDescriptor", "StreamLimit", "TLSFailed", "TimedOut", "Truncated",
    ),
    ".listening": ("Listener", "listen"),
    ".mail": ("MailDeferred", "MailFailed", "MailRejected", "send_mail"),
    ".operation": ("Operation",),  # the decorator has the name of its module, so it is imported from there
    ".process": (
        "Completed", "ProgramError", "ProgramFailed", "ProgramLost", "ProgramNotRun", "ProgramTimedOut", "TooMuchOutput", "run",
    ),
    ".scopes": ("timeout",),
    ".sharing": ("Queue", "Semaphore"),
    ".streams": ("Stream",),
    ".tasks": ("gather", "race"),
}
_PACKAGES = ("http",)  # each with an extra of its own
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "CertificateRefused", "Closed", "Completed", "ConnectFailed", "ConnectionLost", "IOFailed", "IncompleteRead",
    "Listener", "MailDeferred", "MailFailed", "MailRejected", "NameNotFound", "NoDescriptor", "Operation", "OutcomeUnknown",
    "PostgresAborted", "PostgresError", "PostgresRefused", "PostgresTryAgain", "ProgramError", "ProgramFailed",
    "ProgramLost", "ProgramNotRun", "ProgramTimedOut", "Queue", "RedisError", "RedisRedirected", "RedisTryAgain",
    "Semaphore", "Stream", "StreamLimit", "TLSFailed", "TimedOut", "TooMuchOutput", "Truncated", "connect", "gather",
    "listen", "postgres", "race", "redis", "run", "send_mail", "timeout",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None and name not in _PACKAGES:
        raise AttributeError(f"module 'kqueue.io' has no attribute {name!r}")
    from importlib import import_module

    value = import_module(f".{name}", __name__) if module is None else getattr(import_module(module, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *_PACKAGES})
