"""What daemons published on a broker: the jobs they know, and the limits of their queues. Read, merged, and kept for a while.

A daemon publishes `manifest:QUEUE` and `limits:QUEUE` for each queue that it serves, so that daemons of different queues, with
different jobs, can share a broker. What cannot be read, because something other than KQueue or a later one wrote it, counts as
not published: at run the daemon holds a job to its limits in any case. Nothing is dispatched or refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

from ..brokers.base import Store
from ..codec import from_json
from ..dispatch import undescribe
from ..errors import ConfigError, EnvelopeError
from ..registry import Registration
from ..security import SecurityConfig

T = TypeVar("T")

LOOK_AGAIN_S: Final = 10.0  # so that a loop that dispatches pays for no look, and a daemon that starts is soon noticed

NO_LIMITS: Final = SecurityConfig.from_published({})


class Published:
    """What stands in `store`. `clock`: monotonic seconds."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._limits = _Kept(lambda: read_limits(store.documents("limits:")), clock)
        self._manifest = _Kept(lambda: read_manifest(store.documents("manifest:")), clock)

    def limits(self, queue: str) -> SecurityConfig:
        """Of `queue`; none at all where no daemon has published any."""
        return self._limits.get().get(queue, NO_LIMITS)

    def manifest(self, refresh: bool = False) -> dict[str, Registration]:
        """The jobs of all daemons by name. `refresh`: look now."""
        return self._manifest.get(refresh)


class _Kept(Generic[T]):
    """What `look` returned, for LOOK_AGAIN_S. Threads that find it too old at the same time all look, which does no harm."""

    def __init__(self, look: Callable[[], T], clock: Callable[[], float]) -> None:
        self._look = look
        self._clock = clock
        self._found: tuple[float, T] | None = None  # (when, what); None: it has not looked yet

    def get(self, refresh: bool = False) -> T:
        now, found = self._clock(), self._found
        if refresh or found is None or now - found[0] >= LOOK_AGAIN_S:
            self._found = found = (now, self._look())
        return found[1]


def read_limits(documents: Mapping[str, bytes]) -> dict[str, SecurityConfig]:
    """Limits by queue, of the documents `limits:QUEUE`."""
    limits = {}
    for queue, fields in _objects(documents):
        with suppress(ConfigError):
            limits[queue] = SecurityConfig.from_published(fields)
    return limits


def read_manifest(documents: Mapping[str, bytes]) -> dict[str, Registration]:
    """Jobs by name, of the documents `manifest:QUEUE`. Where two disagree on a job, the one of the job's own queue is right."""
    jobs: dict[str, Registration] = {}
    own: dict[str, Registration] = {}
    for queue, fields in _objects(documents):
        for name, description in fields.items():
            with suppress(KeyError, TypeError, AttributeError):
                registration = undescribe(description)
                jobs[name] = registration
                if registration.options.queue == queue:
                    own[name] = registration
    return jobs | own


def _objects(documents: Mapping[str, bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(queue, what its document says), in an order that does not depend on the broker."""
    for key, document in sorted(documents.items()):
        with suppress(EnvelopeError):
            fields = from_json(document)
            if isinstance(fields, dict):
                yield key.partition(":")[2], fields
