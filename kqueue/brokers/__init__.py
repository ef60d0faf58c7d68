"""Brokers: where jobs stand while nobody runs them. `base` says what one must do; one file each does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import UsageError, nearest

if TYPE_CHECKING:
    from .base import Broker

News = Callable[[str, str, float], None]  # kind ("lost", "back" or "warning"), text, seconds until the next try


def open_broker(url: str, on_event: News) -> Broker:
    """The broker that `url` means, not opened yet. Each is imported only when it is asked for. Raises UsageError."""
    scheme, _, rest = url.partition("://")
    if scheme == "memory":
        from .memory import MemoryBroker

        return MemoryBroker(address=url)
    if scheme == "sqlite":
        from .sqlite import SQLiteBroker

        return SQLiteBroker(rest.removeprefix("/"), on_event=on_event)
    if scheme in ("redis", "rediss", "unix", "redis+sentinel"):
        from .redis import RedisBroker

        return RedisBroker(url, on_event=on_event)
    from ..settings import SCHEMES  # not before: the daemon does without the schema

    raise UsageError(f"no broker speaks {scheme!r}{nearest(scheme, SCHEMES)}; known are {', '.join(SCHEMES)}")
