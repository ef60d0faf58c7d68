"""What a child may say, and what of it is garbage. Behind this boundary nothing is doubted any more."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kqueue.codec import MAX_BYTES, Envelope, encode
from kqueue.dispatch import NewJob
from kqueue.execution import wire
from kqueue.execution.call_errors import MAX_ARGS, error_of
from kqueue.execution.child_frames import (
    MAX_FAILURE,
    MAX_HEADER,
    MAX_JOBS,
    MAX_PROGRESS,
    Backoff,
    Enqueue,
    Failure,
    Progress,
    Result,
    Then,
    dispatched,
    parse,
)  # fmt: skip
from kqueue.execution.wire import WireError
from kqueue.outcome import Outcome

ERROR = {"class": "ValueError", "message": "no", "traceback": "…", "mro": ["ValueError"]}


def envelope(**fields: Any) -> str:
    known = {"id": "a1", "job": "note", "args": [], "kwargs": {}, "queue": "mail", "lane": "isolated", "priority": 3}
    return encode(Envelope(**{**known, **fields})).decode()


def asked(envelope: Any = None, delay_s: Any = 0, at: Any = None, size: Any = None) -> bytes:
    """An ENQUEUE of one job, and as well a THEN."""
    data = (known() if envelope is None else envelope).encode("utf-8", "surrogatepass")
    return json.dumps([[delay_s, at, len(data) if size is None else size]]).encode() + b"\n" + data


known = envelope
MANY = b"".join([known().encode()] * (MAX_JOBS + 1))


def test_what_a_child_says() -> None:
    assert parse(wire.RESULT, b"[1]") == Result(b"[1]")
    failure = json.dumps({"cause": "exit", "error": ERROR, "exit_code": 3}).encode()
    assert parse(wire.FAILURE, failure) == Failure("exit", ERROR, 3)
    wants = json.dumps({"cause": "exception", "error": ERROR, "asked": "retry", "retry_in_s": 5}).encode()
    assert parse(wire.FAILURE, wants) == Failure("exception", ERROR, None, "retry", 5)
    of_call = json.dumps({"cause": "exception", "error": ERROR, "args": ["no", 3]}).encode()
    assert parse(wire.FAILURE, of_call) == Failure("exception", ERROR, None, args=["no", 3])
    assert parse(wire.BACKOFF, b'[5,""]') == Backoff(5, "")
    assert parse(wire.BACKOFF, b'[null,"it raised"]') == Backoff(None, "it raised")
    assert parse(wire.PROGRESS, b'[0.5,"half"]') == Progress(0.5, "half")
    job = NewJob("a1", "mail", "isolated", 3, envelope().encode(), 2.5, None)
    assert parse(wire.ENQUEUE, asked(delay_s=2.5)) == Enqueue([job])
    assert parse(wire.THEN, asked(delay_s=2.5)) == Then(job)


def test_of_a_dispatch_only_the_envelope_counts() -> None:
    """What a child writes beside it cannot contradict it."""
    first, second = envelope(), envelope(id="b2", queue="other")
    header = json.dumps([[0, None, len(first)], [5, 7.0, len(second)]])
    jobs = parse(wire.ENQUEUE, f"{header}\n{first}{second}".encode()).jobs
    assert [(job.id, job.queue) for job in jobs] == [("a1", "mail"), ("b2", "other")]
    assert {(job.lane, job.priority) for job in jobs} == {("isolated", 3)}
    assert [(job.delay_s, job.at, job.envelope.decode()) for job in jobs] == [(0, None, first), (5, 7.0, second)]
    assert dispatched(jobs).split(b"\n", 1)[1] == (first + second).encode()
    assert parse(wire.ENQUEUE, dispatched(jobs)) == Enqueue(jobs)


def test_progress_out_of_range_is_put_back_into_it() -> None:
    assert parse(wire.PROGRESS, b'[7,"x"]') == Progress(1.0, "x")
    assert len(parse(wire.PROGRESS, json.dumps([0, "n" * 3000]).encode()).note) == 200


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (wire.RESULT, b"not json"),
        (wire.RESULT, b"NaN"),
        (wire.RESULT, b'"' + b"x" * MAX_BYTES + b'"'),
        (wire.RESULT, b"[" * 100_000),
        (wire.FAILURE, b"{}"),
        (wire.FAILURE, b"[]"),
        (wire.FAILURE, b"null"),
        (wire.FAILURE, json.dumps({"cause": "ok", "error": ERROR}).encode()),
        (wire.FAILURE, json.dumps({"cause": "lost", "error": ERROR}).encode()),
        (wire.FAILURE, json.dumps({"cause": "exit", "error": ERROR, "exit_code": "3"}).encode()),
        (wire.FAILURE, json.dumps({"cause": "exit", "error": {**ERROR, "message": 7}}).encode()),
        (wire.FAILURE, json.dumps({"cause": "exit", "error": {**ERROR, "mro": "x"}}).encode()),
        (wire.FAILURE, json.dumps({"cause": "exit", "error": {**ERROR, "message": "x" * MAX_FAILURE}}).encode()),
        (wire.FAILURE, json.dumps({"cause": "exception", "error": ERROR, "asked": "pardon"}).encode()),
        (wire.FAILURE, json.dumps({"cause": "exception", "error": ERROR, "asked": "retry", "retry_in_s": -1}).encode()),
        (wire.FAILURE, json.dumps({"cause": "exception", "error": ERROR, "asked": "retry", "retry_in_s": 1e300}).encode()),
        (wire.FAILURE, json.dumps({"cause": "exception", "error": ERROR, "asked": "retry", "retry_in_s": True}).encode()),
        (wire.FAILURE, json.dumps({"cause": "exception", "error": ERROR, "args": "abc"}).encode()),
        (wire.FAILURE, json.dumps({"cause": "exception", "error": ERROR, "args": ["x" * MAX_ARGS]}).encode()),
        (wire.BACKOFF, b"5"),
        (wire.BACKOFF, b"[5]"),
        (wire.BACKOFF, b"[-5,\"\"]"),
        (wire.BACKOFF, b"[1e999,\"\"]"),
        (wire.BACKOFF, b"[5,null]"),
        (wire.PROGRESS, b"0.5"),
        (wire.PROGRESS, b"[0.5]"),
        (wire.PROGRESS, b'["half","half"]'),
        (wire.PROGRESS, b"[0.5,7]"),
        (wire.PROGRESS, b'[1e999,""]'),
        (wire.PROGRESS, b"[" + b"9" * 400 + b',""]'),
        (wire.ENQUEUE, b"{}"),
        (wire.ENQUEUE, b"[1]"),
        (wire.ENQUEUE, b"[{}]"),
        (wire.ENQUEUE, b"[]"),
        (wire.ENQUEUE, b"[1]\n1"),
        (wire.ENQUEUE, b"[[0,null,2]]\n{}"),
        (wire.ENQUEUE, asked(size="1")),
        (wire.ENQUEUE, asked(size=True)),
        (wire.ENQUEUE, asked(size=-1)),
        (wire.ENQUEUE, asked(size=0)),
        (wire.ENQUEUE, asked(size=5)),
        (wire.ENQUEUE, asked(size=10**9)),
        (wire.ENQUEUE, b"[" + b"[]," * MAX_HEADER + b"[]]\n"),
        (wire.ENQUEUE, asked(envelope="{}")),
        (wire.ENQUEUE, asked(envelope="\ud800")),
        (wire.ENQUEUE, asked(envelope=envelope(queue="a}b{ c"))),
        (wire.ENQUEUE, asked(envelope=envelope(priority=2**63))),
        (wire.ENQUEUE, asked(envelope=envelope(priority=-101))),
        (wire.ENQUEUE, asked(delay_s=-1)),
        (wire.ENQUEUE, asked(delay_s="soon")),
        (wire.ENQUEUE, asked(delay_s=1e300)),
        (wire.ENQUEUE, asked(at="noon")),
        (wire.ENQUEUE, asked(at=-5)),
        (wire.THEN, b"[]\n"),
        (wire.THEN, json.dumps([[0, None, len(known())]] * 2).encode() + b"\n" + 2 * known().encode()),
        (wire.THEN, b"{}"),
        (wire.THEN, b"7"),
        (wire.THEN, asked(envelope="{}")),
        (wire.THEN, asked(delay_s="soon")),
        (wire.THEN, asked(envelope=envelope(queue="a}b{ c"))),
        (wire.ENQUEUE, json.dumps([[0, None, len(known())]] * (MAX_JOBS + 1)).encode() + b"\n" + MANY),
        (wire.PROGRESS, b"[0.5,\"" + b"n" * MAX_PROGRESS + b"\"]"),
        (wire.BACKOFF, b"[5,\"" + b"n" * MAX_HEADER + b"\"]"),
    ],
)
def test_garbage_is_a_wire_error(kind: int, payload: bytes) -> None:
    with pytest.raises(WireError):
        parse(kind, payload)


NAMES = ["OSError", "UnicodeDecodeError", "SyntaxError", "ExceptionGroup", "KeyError", "StopIteration", "exit"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "args",
    [[], [1] * 9, [{"!": "nothing"}], [[[[]]]], [None, None, None, 3, {}], [10**30, "x"], ["utf-8", "no bytes", -1, "x", None]],
)
def test_whatever_a_child_makes_an_error_of_there_is_one_to_raise(name: str, args: list[Any]) -> None:
    error = error_of(Outcome("exception", error={"class": name, "message": "no"}, error_args=args))
    assert isinstance(error, Exception)
    assert type(error).__name__ in (name, "OffloadError")
    assert isinstance(str(error), str), "it can be shown"
