"""The death certificate says what happened, in JSON, however strange the error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kqueue.codec import pack, to_json
from kqueue.options import JobOptions
from kqueue.outcome import Outcome, describe_error
from kqueue.registry import Registration


def caught(raising: Any) -> BaseException:
    try:
        raising()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def job() -> None:
    secret = "a local that nobody should read"  # noqa: F841
    raise ValueError("no such file")


def test_an_error_is_described_by_class_message_traceback_and_ancestry() -> None:
    described = describe_error(caught(job))
    assert (described["class"], described["message"]) == ("ValueError", "no such file")
    assert described["mro"] == ["ValueError", "Exception", "BaseException"]
    assert 'raise ValueError("no such file")' in described["traceback"]
    assert "nobody should read" not in described["traceback"]


def test_the_traceback_begins_where_kqueue_s_own_frames_end() -> None:
    class Carries:
        def __len__(self) -> int:
            raise ValueError("in the job")

    error = caught(lambda: Registration("job", JobOptions(), lambda: len(Carries()), False, "").call([], {}))
    while error.__traceback__ is not None and error.__traceback__.tb_frame.f_code.co_filename == __file__:
        error.__traceback__ = error.__traceback__.tb_next
    assert "registration" not in describe_error(error)["traceback"]
    assert "in the job" in describe_error(error)["traceback"]
    assert "job.py" not in describe_error(error)["traceback"].replace("in the job", "")


def test_an_error_of_kqueue_s_own_is_described_with_its_frames() -> None:
    error = caught(lambda: pack(object()))
    while error.__traceback__ is not None and error.__traceback__.tb_frame.f_code.co_filename == __file__:
        error.__traceback__ = error.__traceback__.tb_next
    assert "codec.py" not in describe_error(error)["traceback"]
    assert "codec.py" in describe_error(error, whole=True)["traceback"]


class Unprintable(Exception):
    def __init__(self, broken: type[BaseException]) -> None:
        self.broken = broken

    def __str__(self) -> str:
        raise self.broken("no")


@pytest.mark.parametrize("broken", [ValueError, RecursionError, SystemExit, KeyboardInterrupt])
def test_an_error_that_cannot_be_printed_is_described_all_the_same(broken: type[BaseException]) -> None:
    described = describe_error(Unprintable(broken))
    assert described["message"] == f"(its __str__ raised {broken.__name__})"
    to_json(described)


@pytest.mark.parametrize("text", ["x" * 10_000_000, "half \ud800 a pair", "\0\n\t", "Grüße 🎉" * 5000])
def test_a_message_is_always_json_and_never_huge(text: str) -> None:
    described = describe_error(ValueError(text))
    assert len(described["message"]) < 4200
    assert len(described["traceback"]) < 16_500
    assert len(to_json(described)) < 100_000


def test_a_long_message_shows_both_ends() -> None:
    message = describe_error(ValueError("begin" + "x" * 10_000 + "end"))["message"]
    assert message.startswith("begin")
    assert message.endswith("end")
    assert "… 5912 characters left out …" in message


def test_causes_are_told() -> None:
    def chain() -> None:
        try:
            job()
        except ValueError as error:
            raise RuntimeError("outer") from error

    traceback = describe_error(caught(chain))["traceback"]
    assert "no such file" in traceback
    assert "RuntimeError: outer" in traceback


def test_the_certificate_holds_all_there_is_to_say_but_the_result() -> None:
    error = {"class": "E", "message": "m", "traceback": "t", "mro": ["E"]}
    outcome = Outcome("exception", "job", b"result", error, 1, None, 42, 1.000049)
    certificate = outcome.certificate(attempt=2, strategy="isolated", ended_at=1790000000.12345)
    assert json.loads(to_json(certificate)) == {
        "attempt": 2, "strategy": "isolated", "cause": "exception", "ended_by": "job", "exit_code": 1, "signal": None, "pid": 42,
        "error": {"class": "E", "message": "m", "traceback": "t"}, "duration_s": 1.0, "cpu_user_s": 0.0, "cpu_system_s": 0.0,
        "max_memory_mib": 0.0, "limits": {}, "stack": "", "output": "", "ended_at": 1790000000.123, "then": "", "why": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (Outcome("ok"), "ok"),
        (Outcome("exception", error={"class": "ValueError", "message": "no\nsecond line"}), "ValueError: no"),
        (Outcome("exception", error={"class": "KeyError", "message": ""}), "KeyError"),
        (Outcome("signal", signal="SIGSEGV"), "signal: SIGSEGV"),
        (Outcome("exit", exit_code=3), "exit: status 3"),
        (Outcome("timeout"), "timeout"),
    ],
)
def test_a_log_has_one_line_for_it(outcome: Outcome, line: str) -> None:
    assert outcome.summary() == line
    assert outcome.ok == (outcome.cause == "ok")
