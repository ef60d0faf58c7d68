"""From a bound job to what stands in a queue: one function, for the client, for a child and for the supervisor alike.

No I/O and no broker here: `prepare` decides queue, lane, place and options, checks them, and encodes the envelope.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from .codec import MAX_BYTES, OPTIONS, Envelope, encode
from .commands import check_arguments
from .errors import UsageError
from .ids import new_id
from .job import BoundJob
from .options import JobOptions
from .registry import Parameters, Registration
from .retries import COMPUTED
from .signing import Keys

Check = Callable[[JobOptions, str], JobOptions]


class NewJob(NamedTuple):
    """A job to enqueue. Due `delay_s` seconds from the broker's now, or `at` (seconds since 1970), which wins."""

    id: str
    queue: str
    lane: str
    priority: int
    envelope: bytes
    delay_s: float = 0.0
    at: float | None = None


def options_of(bound: BoundJob, registration: Registration | None) -> JobOptions:
    """The options that `bound` asks for: as declared, where that is known, and overridden by its dispatch."""
    options = registration.options if registration is not None else JobOptions()
    return options._replace(**bound.options.overrides) if bound.options.overrides else options


def prepare(
    bound: BoundJob, registration: Registration | None, *, options: JobOptions | None = None, check: Check | None = None,
    max_bytes: int = MAX_BYTES, arguments_too: bool = True, keys: Keys | None = None,
) -> NewJob:  # fmt: skip
    """What to enqueue for `bound`. `registration` is what is known of the job; None: nothing, so its lane is a guess.

    `options`: what `options_of` came to, where that is known. `check(options, name)` refuses or clamps them (SecurityConfig).
    `arguments_too`: see that they fit the handler, where its code is here. `keys` sign it; None: nothing does.
    Raises UsageError, Refused, TypeError, EnvelopeError.
    """
    dispatch = bound.options
    merged = options_of(bound, registration) if options is None else options
    if check is not None:
        merged = check(merged, bound.name)
    if arguments_too and registration is not None and registration.target is not None:
        _check_arguments(registration, bound)
    if registration is not None and registration.parameters is not None:
        _check_parameters(registration, registration.parameters, bound)
    now = time.time()
    asked = {name: getattr(merged, name) for name in dispatch.overrides if name in OPTIONS} if dispatch.overrides else {}
    if dispatch.retry_until is not None:
        asked["retry_until"] = max(0.001, round(dispatch.retry_until - now, 3))  # so it does not hang on how clocks are set
    envelope = Envelope(
        id=dispatch.id or new_id(),
        job=bound.name,
        args=bound.args,
        kwargs=bound.kwargs,
        queue=merged.queue,
        lane=registration.lane if registration is not None else "inline",
        priority=merged.priority,
        enqueued_at=now,
        options=asked,
    )
    data = encode(envelope, max_bytes)
    if keys is not None:
        data = keys.sign(data)
    # A time that has passed is now: a job's place follows from when it was due, and nobody may buy a place with an old date.
    at = dispatch.at if dispatch.at is not None and dispatch.at > now else None
    return NewJob(envelope.id, envelope.queue, envelope.lane, envelope.priority, data, dispatch.delay_s, at)


def _check_arguments(registration: Registration, bound: BoundJob) -> None:
    why = _misfit(registration.target, len(bound.args), *bound.kwargs)
    if why:
        raise UsageError(f"the arguments do not fit job {registration.name!r}{_signature(registration.target)}: {why}")


@lru_cache(maxsize=1024)  # whether they fit does not hang on what they are, and binding costs 3 µs
def _misfit(target: Callable[..., Any] | None, count: int, *names: str) -> str:
    """Why `target` cannot be called with `count` positional arguments and those of these names; "": it can."""
    known = _signature(target)
    if known is None:
        return ""  # written in C, or otherwise without one: the call itself will tell
    try:
        known.bind(*[None] * count, **dict.fromkeys(names))
    except TypeError as error:
        return str(error)
    return ""


def _check_parameters(registration: Registration, parameters: Parameters, bound: BoundJob) -> None:
    try:
        check_arguments(parameters, bound.args, bound.kwargs)
    except UsageError as error:
        raise UsageError(f"the arguments do not fit command {registration.name!r}{parameters}: {error}") from None


def describe(registration: Registration) -> dict[str, Any]:
    """A job as the manifest carries it: JSON values."""
    options = registration.options
    return {
        "name": registration.name,
        "options": {**options._asdict(), "backoff": COMPUTED if callable(options.backoff) else options.backoff},
        "cooperative": registration.cooperative,
        "module": registration.module,
        "signature": registration.signature,
        "chosen": registration.chosen,
        "parameters": None if registration.parameters is None else registration.parameters._asdict(),
    }


def signature_of(registration: Registration) -> str:
    """ "(to: str)". For the template, which tells the supervisor: `inspect` costs 1.2 MB."""
    known = _signature(registration.target)
    return "(…)" if known is None else str(known)


@lru_cache(maxsize=1024)  # 40 µs each otherwise, at every dispatch
def _signature(target: Callable[..., Any] | None) -> Any:
    from inspect import signature  # applications have it; the supervisor, which has not, passes arguments_too=False

    try:
        return None if target is None else signature(target)
    except (TypeError, ValueError):
        return None


def undescribe(fields: Mapping[str, Any]) -> Registration:
    """The inverse of `describe`, without the code, and without options that a later version may have added."""
    options = JobOptions(**{name: value for name, value in fields["options"].items() if name in JobOptions._fields})
    chosen = fields.get("chosen")
    known = fields.get("parameters")  # an earlier version has neither
    return Registration(
        fields["name"], options, None, fields["cooperative"], fields["module"], fields["signature"],
        chosen if chosen in ("inline", "isolated") else "",
        None if known is None else Parameters(tuple(known["names"]), bool(known["more"])),
    )  # fmt: skip
