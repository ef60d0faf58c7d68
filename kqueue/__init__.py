"""KQueue: one small daemon that runs your queue, light jobs inside itself, heavy jobs in limited children.

This file is the list of what users may import. Each name is loaded when it is first asked for, so that a web server that
dispatches does not load a runtime, and the supervisor no client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .job import BoundJob, JobHandle, KQueueJob, job, set_dispatcher

if TYPE_CHECKING:
    from .client import Client, connect, get, send
    from .context import JobContext, current
    from .errors import (
        Discard,
        JobBlocked,
        JobCancelled,
        JobFailed,
        JobTimedOut,
        KQueueError,
        OffloadError,
        QueueFull,
        ResultNotKept,
        Retry,
    )
    from .execution.base import ExecutionStrategy
    from .execution.inline import InlineExecutionStrategy
    from .execution.isolated import IsolatedExecutionStrategy
    from .execution.jobtraps import enqueue, offload, progress
    from .job import KQueueJobInterface, dispatch_many
    from .kernel.traps import Park, Trap, join, sleep, wait_io, wait_process
    from .options import JobOptions
    from .runtime import KQueueRuntime
    from .security import SecurityConfig
    from .states import JobState

__version__ = "0.1.0"

_WHERE = {
    ".client": ("Client", "connect", "get", "send"),
    ".context": ("JobContext", "current"),
    ".errors": (
        "Discard", "JobBlocked", "JobCancelled", "JobFailed", "JobTimedOut", "KQueueError", "OffloadError", "QueueFull",
        "ResultNotKept", "Retry",
    ),
    ".execution.base": ("ExecutionStrategy",),
    ".execution.inline": ("InlineExecutionStrategy",),
    ".execution.isolated": ("IsolatedExecutionStrategy",),
    ".execution.jobtraps": ("enqueue", "offload", "progress"),
    ".job": ("KQueueJobInterface", "dispatch_many"),
    ".options": ("JobOptions",),
    ".states": ("JobState",),
    ".kernel.traps": ("Park", "Trap", "join", "sleep", "wait_io", "wait_process"),
    ".runtime": ("KQueueRuntime",),
    ".security": ("SecurityConfig",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "BoundJob", "Client", "Discard", "ExecutionStrategy", "InlineExecutionStrategy", "IsolatedExecutionStrategy", "JobBlocked",
    "JobCancelled", "JobContext", "JobFailed", "JobHandle", "JobOptions", "JobState", "JobTimedOut", "KQueueError", "KQueueJob",
    "KQueueJobInterface", "KQueueRuntime", "OffloadError", "Park", "QueueFull", "ResultNotKept", "Retry", "SecurityConfig",
    "Trap", "connect", "current", "dispatch_many", "enqueue", "get", "job", "join",
    "offload", "progress", "send", "sleep", "wait_io", "wait_process",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'kqueue' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(module, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


def _dispatch(jobs: Sequence[BoundJob]) -> list[JobHandle]:
    from .client import default

    return default().dispatch(jobs)


set_dispatcher(_dispatch)
