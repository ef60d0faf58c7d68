"""What a child says, as typed tuples: the boundary behind which its word is trusted. Pure: bytes in, tuples or WireError out.

A child may write anything on its socket. Whatever is of the wrong shape, too large or out of range is a WireError here, so that
nothing behind this file need doubt a type or a length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Final, NamedTuple

from ..codec import LANES, MAX_BYTES, decode, from_json, to_json
from ..dispatch import NewJob
from ..errors import EnvelopeError
from ..options import PRIORITY_MAX, PRIORITY_MIN, QUEUE_NAME
from ..retries import LONGEST_DELAY_S, is_wait
from . import wire
from .call_errors import are_args
from .wire import WireError

MAX_FAILURE: Final = 128 * 1024  # bytes: a message of 4 KiB and a traceback of 16 KiB, escaped, and room
MAX_CHANGES: Final = 20  # that a pool process tells of one run
MAX_JOBS: Final = 500  # in one ENQUEUE
MAX_HEADER: Final = 64 * 1024  # bytes of JSON in one; what a nested thing of that size costs, the loop can bear
MAX_PROGRESS: Final = 4096
CAUSES: Final = ("exception", "timeout", "cancelled", "memory", "exit", "refused")


class Result(NamedTuple):
    """The job returned; `json` is its value."""

    json: bytes


class Failure(NamedTuple):
    """The job raised. `error`: class, message, traceback, mro; the last two as `retries.asked_by` has them."""

    cause: str
    error: Mapping[str, Any]
    exit_code: int | None
    asked: str = ""
    retry_in_s: float | None = None
    args: list[Any] | None = None  # of the error of a call; see call_errors


class Backoff(NamedTuple):
    """What its backoff function said of that: seconds, or why it said nothing of use."""

    seconds: float | None
    why_not: str


class Done(NamedTuple):
    """A pool process has run what it took. `token`: of the TAKE that it answers."""

    token: bytes
    duration_s: float
    cpu_user_s: float
    cpu_system_s: float
    max_memory_mib: float  # what it had at the most, if that was in this run; else what it has now
    memory_mib: float  # what it has now
    changed: Sequence[tuple[str, str]]  # (what of the process, in detail) that is not as it was before
    next: bytes = b""  # the token of what it has taken from its tray and begun; b"": it waits to be told


class Progress(NamedTuple):
    fraction: float
    note: str


class Enqueue(NamedTuple):
    jobs: list[NewJob]


class Then(NamedTuple):
    """A follow-up: to be enqueued if the job ends well."""

    job: NewJob


Said = Result | Failure | Backoff | Progress | Enqueue | Then | Done


def parse(kind: int, payload: bytes) -> Said:
    """The frame of `kind`. Raises WireError."""
    try:
        said: Said = _PARSERS[kind](payload)
        return said
    except (EnvelopeError, KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise WireError(f"{type(error).__name__}: {error}"[:200]) from None


def _result(payload: bytes) -> Result:
    _wanted(len(payload) <= MAX_BYTES, "a result that is too large")
    if payload != b"null":  # which most are
        from_json(payload)
    return Result(payload)


def _failure(payload: bytes) -> Failure:
    _wanted(len(payload) <= MAX_FAILURE, "a failure that is too large")
    fields = from_json(payload)
    error, code = fields["error"], fields.get("exit_code")
    _wanted(fields["cause"] in CAUSES and (code is None or type(code) is int), "a failure of an unknown kind")
    texts = {name: error[name] for name in ("class", "message", "traceback")}
    _wanted(all(isinstance(text, str) for text in texts.values()), "a failure without a text")
    _wanted(isinstance(error["mro"], list) and all(isinstance(name, str) for name in error["mro"]), "a failure without an mro")
    asked, retry_in_s = fields.get("asked", ""), fields.get("retry_in_s")
    _wanted(asked in ("", "retry", "discard") and (retry_in_s is None or is_wait(retry_in_s)), "a failure that asks for nonsense")
    args = fields.get("args")
    _wanted(are_args(args), "a failure with arguments that are none, or too large")
    return Failure(fields["cause"], {**texts, "mro": error["mro"]}, code, asked, retry_in_s, args)


def _backoff(payload: bytes) -> Backoff:
    _wanted(len(payload) <= MAX_HEADER, "a backoff that is too large")
    seconds, why_not = from_json(payload)
    _wanted((seconds is None or is_wait(seconds)) and isinstance(why_not, str), "a backoff that is none")
    return Backoff(seconds, why_not[:400])


def _done(payload: bytes) -> Done:
    size = wire.DONE_HEAD.size
    _wanted(size <= len(payload) <= MAX_FAILURE, "an end of the wrong size")
    token, following, *figures = wire.DONE_HEAD.unpack_from(payload)
    duration_s, user_s, system_s, peak_mib, memory_mib = figures
    _wanted(min(figures) >= 0 and isfinite(sum(figures)), "an end without its figures")
    if len(payload) == size:
        following = b"" if following == wire.NO_TOKEN else following
        return Done(token, duration_s, user_s, system_s, peak_mib, memory_mib, (), following)
    _wanted(following == wire.NO_TOKEN, "an end that left something changed, and goes on")
    changed = from_json(payload[size:])
    _wanted(isinstance(changed, list), "an end of the wrong shape")
    pairs = [(what, detail) for what, detail in changed[:MAX_CHANGES]]
    _wanted(all(isinstance(text, str) for pair in pairs for text in pair), "an end that tells of no text")
    told = [(what[:100], detail[:200]) for what, detail in pairs]
    return Done(token, duration_s, user_s, system_s, peak_mib, memory_mib, told)


def _progress(payload: bytes) -> Progress:
    _wanted(len(payload) <= MAX_PROGRESS, "progress that is too large")
    fraction, note = from_json(payload)
    _wanted(isinstance(fraction, (int, float)) and isfinite(fraction) and isinstance(note, str), "progress that is none")
    return Progress(min(1.0, max(0.0, float(fraction))), note[:200])


def _enqueue(payload: bytes) -> Enqueue:
    header, envelopes = payload.split(b"\n", 1)
    _wanted(len(header) <= MAX_HEADER, "a dispatch that is too large")
    listed = from_json(header)
    _wanted(isinstance(listed, list) and len(listed) <= MAX_JOBS, f"more than {MAX_JOBS} jobs at once")
    jobs, at = [], 0
    for delay_s, due, size in listed:
        _wanted(type(size) is int and 0 < size <= len(envelopes) - at, "a job of no valid size")
        jobs.append(_new_job(envelopes[at : at + size], delay_s, due))
        at += size
    _wanted(at == len(envelopes), "more than the jobs of a dispatch")
    return Enqueue(jobs)


def _then(payload: bytes) -> Then:
    (job,) = _enqueue(payload).jobs
    return Then(job)


def _new_job(data: bytes, delay_s: Any, at: Any) -> NewJob:
    """What is in the envelope counts; beside it stands only when the job is due."""
    envelope = decode(data)
    _wanted(QUEUE_NAME.fullmatch(envelope.queue) is not None, "a job for a queue of no valid name")
    _wanted(envelope.lane in LANES and PRIORITY_MIN <= envelope.priority <= PRIORITY_MAX, "a job of no valid lane or priority")
    _wanted(isinstance(delay_s, (int, float)) and 0 <= delay_s <= LONGEST_DELAY_S, "a job of no valid delay")
    _wanted(at is None or (isinstance(at, (int, float)) and 0 <= at <= 1e11), "a job due at no valid time")
    return NewJob(envelope.id, envelope.queue, envelope.lane, envelope.priority, data, float(delay_s), at)


def dispatched(jobs: Sequence[NewJob]) -> bytes:
    """What an ENQUEUE or THEN of `jobs` says: when each is due and how long its envelope is, as JSON; then the envelopes."""
    header = [(job.delay_s, job.at, len(job.envelope)) for job in jobs]
    return b"\n".join((to_json(header), b"".join(job.envelope for job in jobs)))


def _wanted(fits: bool, otherwise: str) -> None:
    if not fits:
        raise WireError(otherwise)


_PARSERS: Final[Mapping[int, Any]] = {
    wire.RESULT: _result,
    wire.FAILURE: _failure,
    wire.BACKOFF: _backoff,
    wire.DONE: _done,
    wire.PROGRESS: _progress,
    wire.ENQUEUE: _enqueue,
    wire.THEN: _then,
}
