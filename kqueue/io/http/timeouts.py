"""How long each phase of a request may take."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ...errors import UsageError


class Timeouts(NamedTuple):
    """Seconds; None: as long as the job may. Where several end a phase, the one that is up first does."""

    pool: float | None = None  # waiting for a connection, when as many as may be are in use
    connect: float | None = 10.0  # resolving the name, and connecting
    tls: float | None = 10.0  # the handshake
    write: float | None = 30.0  # for the server to take one piece of what is sent
    head: float | None = 60.0  # from there to the end of the response's headers
    read: float | None = 30.0  # between two pieces of its body
    total: float | None = None  # all of that, redirects and the body too


def timeouts_of(value: float | Timeouts | None, default: Timeouts) -> Timeouts:
    """A number is the total: how the phases divide it among them is their business."""
    if value is None:
        return default
    if isinstance(value, Timeouts):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise UsageError(f"timeout= takes seconds, or io.http.Timeouts(...) for each phase, not {value!r}")
    return _only_total(float(value))


@lru_cache(maxsize=64)
def _only_total(seconds: float) -> Timeouts:
    """One for all requests that have the same."""
    return Timeouts(write=None, head=None, read=None, total=seconds)
