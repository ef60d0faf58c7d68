"""The automatic choice: a job class that blocks the loop again and again runs isolated from then on.

Only one that leaves it open (`isolated=None`) and is no plain function. What was found out is a document in the broker for each
class, `promoted:NAME`, so it survives restarts, and all daemons of a broker come to agree: the last word on a class counts; it is
`null` where an operator has taken it back. `jobs.pin` goes before all that, on its own daemon.

The choice is kept in the registry, and so reaches clients with the manifest. A daemon hears of what others found out once in a
lease, and asks before it moves a job of such a class to the other lane, so that two do not send it to and fro.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, Final

from . import events as facts
from .codec import from_json, to_json
from .errors import EnvelopeError, nearest
from .loading import ImportFailed
from .registry import Registration, registry
from .retries import is_number

if TYPE_CHECKING:
    from .runtime import KQueueRuntime

Steps = Generator[Any, Any, Any]

PREFIX: Final = "promoted:"
STRIKES: Final = 2
REFRESH_S: Final = 1.0
FORGOTTEN: Final = b"null"
LONGEST: Final = 500  # characters of what a document says


class Promotions:
    """One for a runtime. `pins`: lanes by the name of the job. `can_isolate` False: no isolated job runs here."""

    def __init__(self, runtime: KQueueRuntime, pins: Mapping[str, str], *, can_isolate: bool) -> None:
        self._runtime = runtime
        self._pins = dict(pins)
        self._can_isolate = can_isolate
        self._strikes: dict[str, int] = {}
        self._promoted: dict[str, dict[str, Any]] = {}  # by name: what its document says
        self._loaded_at = 0.0  # by the kernel's clock
        self._busy = 0  # how many of ours are on their way to the broker; what is read meanwhile may be older

    def start(self) -> None:
        """Begin with what the operator says. What an earlier runtime of this process chose is not ours."""
        for name in registry.names():
            registry.choose(name, self._pins.get(name, ""))

    def check_pins(self) -> None:
        """Warn of pins that pin nothing. For when all jobs are known."""
        for name in self._pins:
            if (why := wrong_pin(name)) is not None:
                self._runtime.events.emit(facts.Warned(f"jobs.pin.{name}: {why}"))
            registry.choose(name, self._pins[name])

    def why(self, registration: Registration) -> str:
        """What decided where it runs: "declared", "pinned", "blocked" (the loop), or "kind" (of its handler)."""
        if registration.options.isolated is not None:
            return "declared"
        if not registration.chosen:
            return "kind"
        return "pinned" if registration.name in self._pins else "blocked"

    def details(self, name: str) -> Mapping[str, Any] | None:
        """How a promoted class blocked: seconds, where, instead, at, by; None: it is not promoted."""
        return self._promoted.get(name)

    @property
    def names(self) -> list[str]:
        return [*self._promoted, *self._pins]

    # -- finding out ------------------------------------------------------------------------------------------------

    def blocked(self, name: str, seconds: float, where: str, instead: str = "") -> None:
        """A slice of an inline job of this class took `seconds`, which is too long. The rest as in events.SlowSlice."""
        registration = registry.get(name)
        if registration is None or registration.options.isolated is not None or registration.chosen:
            return
        if not registration.cooperative or not self._can_isolate:
            return
        self._strikes[name] = self._strikes.get(name, 0) + 1
        if self._strikes[name] != STRIKES:
            return
        found = {
            "seconds": round(seconds, 3), "where": where, "instead": instead, "at": round(time.time(), 3),
            "by": os.uname().nodename,
        }  # fmt: skip
        if name in self._runtime.isolated.link.known:
            self._promote_here(name, found)  # at once: there may be hundreds more in this very turn of the loop
            self._runtime.background(self._tell(name, found))
        else:
            self._runtime.background(self._promote_if_possible(name, found))

    def _promote_if_possible(self, name: str, found: dict[str, Any]) -> Steps:
        """Start a template, to see whether a child could find the job."""
        link = self._runtime.isolated.link
        link.configure(self._runtime.template())
        why = "the template does not import it"
        try:
            yield from link.ready()
        except ImportFailed as error:
            why = str(error)
        if name not in link.known:
            self._runtime.events.emit(facts.Warned(f"{name} has blocked the loop twice, and cannot be run isolated: {why}"))
            return
        self._promote_here(name, found)
        yield from self._tell(name, found)

    def _promote_here(self, name: str, found: dict[str, Any]) -> None:
        self._busy += 1
        self._promote(name, found)
        self._runtime.events.emit(facts.JobPromoted(name, found["seconds"], found["where"], found["instead"]))

    def _tell(self, name: str, found: dict[str, Any]) -> Steps:
        """Tell other daemons, then clients."""
        try:
            yield from self._runtime.broker.publish({PREFIX + name: to_json(found)})
        finally:
            self._busy -= 1
        yield from self._runtime.publish()

    def _promote(self, name: str, found: dict[str, Any]) -> None:
        self._strikes.pop(name, None)
        self._promoted[name] = found
        if name not in self._pins:
            registry.choose(name, "isolated")

    def _is_busy(self) -> bool:
        return self._busy > 0

    # -- agreeing ---------------------------------------------------------------------------------------------------

    def refresh(self) -> Steps:
        """`load`, but not more often than every REFRESH_S."""
        if self._runtime.kernel.clock.monotonic() - self._loaded_at >= REFRESH_S and (yield from self.load()):
            yield from self._runtime.publish()

    def load(self) -> Steps:
        """Take over what stands in the broker; whether that changed anything."""
        if self._is_busy():
            return False
        self._loaded_at = self._runtime.kernel.clock.monotonic()
        documents = yield from self._runtime.broker.documents(PREFIX)
        if self._is_busy():
            return False
        before = dict(self._promoted)
        found = {key.removeprefix(PREFIX): read_promotion(document) for key, document in documents.items()}
        for name, details in found.items():
            if details is not None and registry.get(name) is not None:
                self._promote(name, details)
        for name in [name for name in self._promoted if found.get(name) is None]:
            del self._promoted[name]
            if name not in self._pins:
                registry.choose(name, "")
        return before.keys() != self._promoted.keys()


def read_promotion(document: bytes) -> dict[str, Any] | None:
    """What a document of a promotion says; None: it was taken back, or somebody else wrote it."""
    try:
        found = from_json(document)
    except EnvelopeError:
        return None
    if not isinstance(found, dict):
        return None
    numbers = {name: found.get(name) if is_number(found.get(name)) else 0 for name in ("seconds", "at")}
    return {**numbers, **{name: str(found.get(name, ""))[:LONGEST] for name in ("where", "instead", "by")}}


def wrong_pin(name: str) -> str | None:
    """Why pinning the job `name` does nothing; None: it does."""
    registration = registry.get(name)
    if registration is None:
        return f"no job is registered as {name!r:.80}{nearest(name, registry.names())}"
    if registration.options.isolated is None:
        return None
    if registration.target is None:
        return f"{name} is in jobs.isolated_modules, so it runs isolated"
    return f"{name} declares isolated={registration.options.isolated}, and that is obeyed"
