"""The retry policy: what may be declared and dispatched, what a job may ask for itself, and what of it applies first."""

from __future__ import annotations

import functools
import json
import pickle
from datetime import datetime, timedelta
from typing import Any

import pytest

import kqueue
from kqueue import BoundJob, Discard, JobOptions, KQueueError, KQueueJob, Retry, SecurityConfig, job, sleep
from kqueue.brokers.base import Counters, Lease, Token
from kqueue.codec import Envelope, decode, encode, to_json
from kqueue.dispatch import describe, prepare, undescribe
from kqueue.errors import JobTimedOut, UsageError
from kqueue.options import DispatchOptions, check_option, dispatch_options
from kqueue.outcome import Outcome, describe_error
from kqueue.registry import registry
from kqueue.retries import CAUSES, COMPUTED, LONGEST_DELAY_S, ask_backoff, asked_by, grown
from kqueue.security import admit
from kqueue.testing import FakeQueue, run_with_retries
from kqueue.verdict import Verdict, backoff_s, judge

NOW = 1_790_000_000.0
NONE = Counters()


class Refused2(ConnectionRefusedError):
    """Two steps below OSError."""


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_jobs", {})


def judged(
    cause: str = "exception", error: BaseException | None = None, *, counters: Counters = NONE, age_s: float = 0,
    enqueued_at: float | None = None, said: dict[str, Any] | None = None, **options: Any,
) -> Verdict:  # fmt: skip
    """The verdict on a run of a job that was enqueued `age_s` ago. `said`: fields of its outcome."""
    envelope = encode(Envelope("id", "it", [], {}, enqueued_at=NOW - age_s if enqueued_at is None else enqueued_at))
    lease = Lease(Token("epoch", "id", 1), "default", "inline", envelope, counters, NOW)
    outcome = Outcome(cause, error=None if error is None else describe_error(error), **(said or {}))
    checked = {name: check_option(name, value) for name, value in options.items()}
    return judge(lease, JobOptions(**{"backoff": 7, **checked}), outcome, "inline", NOW)


def why(verdict: Verdict) -> str:
    certificate = json.loads(verdict.settlement.certificate or b"")
    assert certificate["then"] == verdict.then
    return str(certificate["why"])


# -- backoff ------------------------------------------------------------------------------------------------------------------


def test_a_dict_shapes_the_exponential_one() -> None:
    shape = {"base": 5, "factor": 3, "cap": 100, "jitter": False}
    assert [backoff_s(JobOptions(backoff=shape), n) for n in range(1, 6)] == [5, 15, 45, 100, 100]
    assert backoff_s(JobOptions(backoff=shape), 10_000) == 100
    assert backoff_s(JobOptions(backoff={**shape, "base": 0}), 10_000) == 0
    assert [backoff_s(JobOptions(backoff={"cap": 3}), n, uniform=0.5) for n in range(1, 4)] == [1, 1.5, 1.5]
    waits = {backoff_s(JobOptions(backoff={"base": 100}), 1) for _ in range(50)}
    assert len(waits) > 10, "jitter, unless it is said otherwise"
    assert all(0 < wait <= 100 for wait in waits)
    assert backoff_s(JobOptions(backoff={}), 3, uniform=1.0) == backoff_s(JobOptions(), 3, uniform=1.0)


def by_attempt(attempt: int, error: BaseException) -> float:
    return attempt * 10.0


class Takes:
    def __call__(self, attempt: int, error: BaseException) -> float:
        return 1.0


GOOD_FUNCTIONS = [
    by_attempt, lambda attempt, error: 5, lambda *both: 5, lambda attempt, error, more=1: 5, Takes(), Takes().__call__,
    functools.partial(by_attempt), functools.partial(lambda more, attempt, error: 5, 1), max,
]  # fmt: skip


@pytest.mark.parametrize("function", GOOD_FUNCTIONS)
def test_a_function_is_kept_as_it_is_and_stays_out_of_the_manifest(function: Any) -> None:
    registration = job(name="computed", backoff=function)(lambda: None).registration
    assert registration.options.backoff is function
    described = describe(registration)
    assert json.loads(to_json(described))["options"]["backoff"] == COMPUTED
    assert undescribe(described).options.backoff == COMPUTED
    with pytest.raises(UsageError, match="backoff is a function, which no queue can carry: declare it with the job"):
        dispatch_options(backoff=function)
    envelope = prepare(BoundJob("computed", [], {}, dispatch_options(timeout=5), registration), registration).envelope
    assert b"backoff" not in envelope, "whatever else a dispatch sets"


async def waits(attempt: int, error: BaseException) -> float:
    return 5


def yields(attempt: int, error: BaseException) -> Any:
    yield 5


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (waits, "must be a plain function"), (yields, "must be a plain function"),
        (lambda: 5, "is called as backoff(attempt, error), and this one is <lambda>()"),
        (lambda attempt: 5, "this one is <lambda>(attempt)"), (lambda a, b, c: 5, "this one is <lambda>(a, b, c)"),
        (float, "must be seconds"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_so_is_refused_when_it_is_declared(function: Any, message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        job(name="wrong", backoff=function)(lambda: None)
    assert message in str(refusal.value)


def test_a_class_has_its_backoff_as_a_static_or_class_method() -> None:
    class Static(KQueueJob):
        @staticmethod
        def backoff(attempt: int, error: BaseException) -> float:
            return 5 * attempt

        def handle(self) -> None: ...

    class Klass(KQueueJob):
        @classmethod
        def backoff(cls, attempt: int, error: BaseException) -> float:
            return 6 * attempt

        def handle(self) -> None: ...

    options = [kind.registration.options.backoff for kind in (Static, Klass)]
    assert [backoff(2, ValueError()) for backoff in options if callable(backoff)] == [10, 12]
    with pytest.raises(UsageError, match="there is no instance when it is called: make it a @staticmethod"):

        class Method(KQueueJob):
            def backoff(self, attempt: int, error: BaseException) -> float:  # type: ignore[override]
                return 5

            def handle(self) -> None: ...


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def raising(error: BaseException) -> Any:
    def backoff(attempt: int, failed: BaseException) -> float:
        raise error

    return backoff


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (by_attempt, (30.0, "")), (lambda a, e: timedelta(minutes=1), (60.0, "")), (lambda a, e: 0, (0.0, "")),
        (lambda a, e: len(str(e)), (4.0, "")), (lambda a, e: LONGEST_DELAY_S, (LONGEST_DELAY_S, "")),
        (lambda a, e: None, (None, "it returned None, which is no number of seconds")),
        (lambda a, e: "5", (None, "it returned '5', which is no number of seconds")),
        (lambda a, e: True, (None, "it returned True, which is no number of seconds")),
        (lambda a, e: -1, (None, "it returned -1, which is no number of seconds")),
        (lambda a, e: float("nan"), (None, "it returned nan, which is no number of seconds")),
        (lambda a, e: 10**400, (None, f"it returned {'1' + 79 * '0'}, which is no number of seconds")),
        (lambda a, e: LONGEST_DELAY_S * 2, (None, f"it returned {LONGEST_DELAY_S * 2}, which is no number of seconds")),
        (lambda a, e: Unspeakable(), (None, "it raised RuntimeError: no")),
        (raising(LookupError("x" * 999)), (None, f"it raised LookupError: {'x' * 999}"[:200])),
        (raising(SystemExit(3)), (None, "it raised SystemExit: 3")),
        (raising(KeyboardInterrupt()), (None, "it raised KeyboardInterrupt: ")),
        (raising(GeneratorExit()), (None, "it raised GeneratorExit: ")), (raising(Mute()), (None, "it raised Mute")),
    ],
)  # fmt: skip
def test_whatever_a_backoff_function_does_there_is_an_answer(function: Any, says: tuple[float | None, str]) -> None:
    assert ask_backoff(function, 3, ValueError("four")) == says


@pytest.mark.parametrize("backoff", [by_attempt, COMPUTED])
def test_its_answer_is_the_delay_and_without_one_the_default_is_and_the_certificate_says_so(backoff: Any) -> None:
    lease = Lease(Token("epoch", "id", 1), "default", "inline", b"{}", Counters(), NOW)
    options = JobOptions(backoff=backoff)
    asked = judge(lease, options, Outcome("timeout", backoff_s=42.0), "isolated", NOW)
    assert (asked.then, asked.settlement.delay_s, why(asked)) == ("retry", 42, "")
    failed = judge(lease, options, Outcome("exception", backoff_failed="it raised ValueError: no"), "isolated", NOW)
    assert 0 < failed.settlement.delay_s <= 2
    assert why(failed) == "the default backoff, since the job's own gave none: it raised ValueError: no"
    died = judge(lease, options, Outcome("signal", signal="SIGKILL"), "isolated", NOW)
    assert 0 < died.settlement.delay_s <= 2
    assert "it was not asked, or did not answer" in why(died)


def test_an_answer_nobody_asked_for_changes_nothing() -> None:
    assert judged(said={"backoff_s": 999.0}).settlement.delay_s == 7


# -- retry_until --------------------------------------------------------------------------------------------------------------


def test_until_then_it_is_retried_however_often_it_failed() -> None:
    verdict = judged(counters=Counters(attempts=99), retry_until=100, age_s=93)
    assert (verdict.then, verdict.settlement.delay_s) == ("retry", 7)


def test_a_retry_that_would_be_due_later_is_not_waited_for() -> None:
    verdict = judged(retry_until=100, age_s=95)
    assert (verdict.then, verdict.settlement.verb, verdict.settlement.delay_s) == ("dead", "bury", 0)
    assert why(verdict) == "the retry would be due 2 s after retry_until"
    assert judged(retry_until=timedelta(seconds=100), age_s=95, backoff=4).then == "retry"


def test_whoever_writes_envelopes_without_a_time_gets_max_attempts() -> None:
    assert judged(retry_until=100, enqueued_at=0.0).then == "retry"
    assert judged(retry_until=100, enqueued_at=0.0, counters=Counters(attempts=2)).then == "dead"


def test_what_is_lost_has_its_own_limit_and_a_process_that_dies_dies_three_times() -> None:
    assert judged("lost", retry_until=1, age_s=50).then == "released"
    assert judged("signal", retry_until=1000, counters=Counters(crashes=1)).then == "retry"
    dead = judged("signal", retry_until=1000, counters=Counters(crashes=2))
    assert (dead.then, why(dead)) == ("dead", "its process has died 3 times, and the limit is 3")
    assert judged("signal", retry_until=1, age_s=50).then == "dead"


def test_a_dispatch_may_give_a_date_which_counts_from_its_own_clock() -> None:
    later = datetime.now() + timedelta(hours=1)
    options = dispatch_options(retry_until=later, timeout=5)
    assert (options.retry_until, options.overrides) == (later.timestamp(), {"timeout": 5})
    envelope = decode(prepare(BoundJob("any", [], {}, options), None).envelope)
    assert envelope.options["retry_until"] == pytest.approx(3600, abs=60)
    assert envelope.enqueued_at + envelope.options["retry_until"] == pytest.approx(later.timestamp(), abs=0.01)
    kept = decode(prepare(BoundJob("any", [], {}, DispatchOptions(retry_until=5.0)), None).envelope)
    assert kept.options["retry_until"] == 0.001, "one that has passed since it was bound is over"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (datetime.now() - timedelta(seconds=1), "retry_until has passed already"),
        (datetime.now() + timedelta(days=4000), "retry_until is more than ten years from now"),
        (datetime(1, 1, 1), "retry_until is out of range|retry_until has passed already"),
        (timedelta(0), "retry_until must be seconds or a timedelta"), ("tomorrow", "retry_until must be seconds or a timedelta"),
    ],
)  # fmt: skip
def test_a_date_that_makes_no_sense_is_refused_at_dispatch(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dispatch_options(retry_until=value)


def test_a_declaration_has_no_date() -> None:
    with pytest.raises(UsageError, match="of a declaration is seconds or a timedelta after the enqueueing"):
        job(name="dated", retry_until=datetime.now() + timedelta(hours=1))(lambda: None)


def test_a_dispatch_with_max_attempts_is_not_overruled_by_a_declared_retry_until() -> None:
    registration = job(name="timed", retry_until=3600)(lambda: None).registration

    def in_force(**asked: Any) -> JobOptions:
        return admit(SecurityConfig(), Envelope("id", "timed", [], {}, options=asked), registration).options

    assert in_force().retry_until == 3600
    assert in_force(max_attempts=2).retry_until is None
    assert in_force(max_attempts=2, retry_until=60).retry_until == 60


# -- retry_on, dont_retry_on --------------------------------------------------------------------------------------------------


def test_classes_are_stored_by_name_and_one_needs_no_list() -> None:
    def kept(**options: Any) -> Any:
        declared = job(name="names", **options)(lambda: None).registration.options
        registry._jobs.pop("names")
        return declared.retry_on, declared.dont_retry_on

    assert kept(retry_on=(OSError, "MyError", OSError), dont_retry_on=Refused2) == (("OSError", "MyError"), ("Refused2",))
    assert kept(retry_on="OSError", dont_retry_on=[]) == (("OSError",), None)
    assert kept(retry_on={OSError}, dont_retry_on=[JobTimedOut]) == (("OSError",), ("JobTimedOut",))
    assert dispatch_options(retry_on=[OSError]).overrides == {"retry_on": ("OSError",)}


@pytest.mark.parametrize(
    ("error", "options", "then", "reason"),
    [
        (Refused2(), {"retry_on": [OSError]}, "retry", ""),
        (Refused2(), {"retry_on": ["Refused2"]}, "retry", ""),
        (Refused2(), {"retry_on": [LookupError]}, "dead", "Refused2 is not retried: it is none of retry_on (LookupError)"),
        (Refused2(), {"dont_retry_on": [OSError]}, "dead", "Refused2 is not retried: OSError is in dont_retry_on"),
        (Refused2(), {"retry_on": [Refused2], "dont_retry_on": [OSError]}, "dead",
         "Refused2 is not retried: OSError is in dont_retry_on"),
        (Refused2(), {"dont_retry_on": [LookupError]}, "retry", ""),
        (Refused2(), {"dont_retry_on": ["Refused"]}, "retry", ""),
        (Refused2(), {"retry_on": [LookupError], "retry_until": 50}, "dead",
         "Refused2 is not retried: it is none of retry_on (LookupError)"),
        (JobTimedOut(), {"retry_on": [OSError]}, "dead", "JobTimedOut is not retried: it is none of retry_on (OSError)"),
    ],
)  # fmt: skip
def test_classes_are_matched_along_the_mro(error: Any, options: Any, then: str, reason: str) -> None:
    cause = "timeout" if isinstance(error, JobTimedOut) else "exception"
    verdict = judged(cause, error, **options)
    assert (verdict.then, why(verdict)) == (then, reason)
    assert verdict.settlement.counters == Counters(attempts=1)


@pytest.mark.parametrize(("cause", "name"), [("timeout", "JobTimedOut"), ("memory", "MemoryError"), ("exit", "SystemExit")])
def test_a_cause_that_is_an_error_counts_as_its_class_even_where_the_process_could_not_say(cause: str, name: str) -> None:
    error = SystemExit(1) if cause == "exit" else None  # without one, that is a process that died
    assert judged(cause, error, dont_retry_on=[name]).then == "dead"
    assert judged(cause, error, retry_on=[name]).then == "retry"
    assert judged(cause, error, retry_on=[OSError]).then == "dead"
    assert judged(cause, error, retry_on=[OSError], causes={cause: {}}).then == "retry", "its own policy is first"


@pytest.mark.parametrize("cause", ["signal", "exit", "cpu"])
def test_a_death_is_no_error(cause: str) -> None:
    assert judged(cause, retry_on=[OSError], dont_retry_on=[BaseException]).then == "retry"


def test_garbage_on_the_socket_is_an_error_without_bases() -> None:
    outcome = {"class": "WireError", "message": "garbage"}
    lease = Lease(Token("epoch", "id", 1), "default", "isolated", b"{}", Counters(), NOW)
    assert judge(lease, JobOptions(dont_retry_on=["WireError"]), Outcome("exception", error=outcome), "isolated").then == "dead"
    assert judge(lease, JobOptions(dont_retry_on=["KeyError"]), Outcome("exception", error=outcome), "isolated").then == "retry"


# -- causes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", CAUSES)
def test_a_cause_may_bury_and_touches_no_other(cause: str) -> None:
    error = ValueError() if cause == "exception" else None
    verdict = judged(cause, error, causes={cause: "bury"})
    assert (verdict.then, why(verdict)) == ("dead", f"causes says to bury it after {cause}")
    for other in set(CAUSES) - {cause}:
        assert judged(other, causes={cause: "bury"}).then == "retry"


def test_a_cause_may_have_its_own_attempts_and_backoff() -> None:
    causes = {"timeout": {"max_attempts": 5, "backoff": [1, 20]}, "exception": {"max_attempts": 1}}
    longer = judged("timeout", counters=Counters(attempts=3), causes=causes)
    assert (longer.then, longer.settlement.delay_s) == ("retry", 20)
    assert judged("timeout", counters=Counters(attempts=4), causes=causes).then == "dead"
    once = judged("exception", ValueError(), causes=causes)
    assert (once.then, why(once)) == ("dead", "it has failed once, and max_attempts in causes: exception is 1")
    own = judged("memory", counters=Counters(attempts=2), causes=causes)
    assert (own.then, why(own)) == ("dead", "it has failed 3 times, and max_attempts is 3")


def test_a_cause_with_attempts_of_its_own_has_them_under_retry_until_too() -> None:
    causes = {"timeout": {"max_attempts": 2}}
    assert judged("timeout", counters=Counters(attempts=1), retry_until=3600, causes=causes).then == "dead"
    assert judged("exception", ValueError(), counters=Counters(attempts=1), retry_until=3600, causes=causes).then == "retry"


def test_a_process_may_die_less_often_but_never_more_than_three_times() -> None:
    assert judged("signal", causes={"signal": {"max_attempts": 1}}).then == "dead"
    assert judged("exit", causes={"exit": {"max_attempts": 1}}).then == "dead"
    assert judged("exit", causes={"exit": {"max_attempts": 9}}, counters=Counters(crashes=1)).then == "retry"
    assert judged("exit", causes={"exit": {"max_attempts": 9}}, counters=Counters(crashes=2)).then == "dead"
    assert judged("exit", SystemExit(1), causes={"exit": {"max_attempts": 9}}, counters=Counters(attempts=5)).then == "retry"


def test_a_policy_s_backoff_goes_before_the_job_s_function() -> None:
    verdict = judged("timeout", said={"backoff_s": 99.0}, backoff=by_attempt, causes={"timeout": {"backoff": 3}})
    assert verdict.settlement.delay_s == 3


def test_memory_deaths_are_counted_and_the_next_run_has_more() -> None:
    assert judged("memory", counters=Counters(attempts=1, memory=1)).settlement.counters == Counters(attempts=2, memory=2)
    assert judged("exception", ValueError(), counters=Counters(memory=1)).settlement.counters == Counters(attempts=1, memory=1)
    causes = {"memory": {"grow": 2}}
    assert [grown(64, causes, deaths) for deaths in range(4)] == [64, 128, 256, 512]
    assert [grown(100, {"memory": {"grow": 1.5}}, deaths) for deaths in range(3)] == [100, 150, 225]
    assert [grown(64, other, 3) for other in ({}, {"memory": "bury"}, {"memory": {}}, {"timeout": {"grow": 2}})] == [64] * 4
    assert grown(64, {"memory": {"grow": 100}}, 10**9) == 1 << 30, "what stands in a store may be anything"


def test_it_grows_up_to_the_limit_of_the_daemon() -> None:
    registration = job(name="retries.grows", max_memory=100, causes={"memory": {"grow": 2}})(lambda: None).registration
    envelope = Envelope("id", "retries.grows", [], {})
    security = SecurityConfig(max_memory_mib=500)
    had = [admit(security, envelope, registration, deaths).options.max_memory for deaths in range(5)]
    assert had == [100, 200, 400, 500, 500]
    assert admit(security, envelope, registration).options.max_memory == 100, "and nothing of that is remembered"
    at_dispatch = envelope._replace(options={"causes": {"memory": {"grow": 3}}, "max_memory": 10})
    assert admit(security, at_dispatch, registration, 2).options.max_memory == 90


# -- what a job asks for ------------------------------------------------------------------------------------------------------


def test_retry_and_discard_are_exceptions_that_everybody_can_catch_and_carry() -> None:
    assert issubclass(Retry, Exception)
    assert issubclass(Discard, Exception)
    assert not issubclass(Retry, KQueueError)
    assert (kqueue.Retry, kqueue.Discard) == (Retry, Discard)
    for error in (Retry(), Retry(5), Retry(delay=timedelta(minutes=1), message="later"), Discard(), Discard("gone")):
        again = pickle.loads(pickle.dumps(error))
        assert (asked_by(again), str(again)) == (asked_by(error), str(error))
    assert str(Retry(delay=5, message="later")) == "later"
    assert asked_by(Retry(timedelta(minutes=1))) == ("retry", 60)


@pytest.mark.parametrize("delay", [-1, "soon", float("nan"), 1e300, True, [5]])
def test_a_delay_that_is_none_is_refused_where_it_is_raised(delay: Any) -> None:
    with pytest.raises(UsageError, match="Retry: delay must be seconds or a timedelta"):
        Retry(delay=delay)


def test_a_retry_asked_for_counts_and_ends_like_any_other_attempt() -> None:
    said = {"asked": "retry", "retry_in_s": 33.0}
    verdict = judged("exception", Retry(33), said=said)
    assert (verdict.then, verdict.settlement.delay_s, verdict.settlement.counters) == ("retry", 33, Counters(attempts=1))
    assert judged("exception", Retry(33), said=said, counters=Counters(attempts=2)).then == "dead"
    assert judged("exception", Retry(33), said=said, retry_until=30).then == "dead"
    assert judged("exception", Retry(33), said=said, retry_until=40, counters=Counters(attempts=9)).then == "retry"
    assert judged("exception", Retry(), said={"asked": "retry"}).settlement.delay_s == 7, "without a delay, the usual backoff"
    assert judged("exception", Retry(), said={"asked": "retry", "retry_in_s": 0.0}).settlement.delay_s == 0


def test_a_retry_asked_for_passes_what_would_bury_the_error() -> None:
    said = {"asked": "retry", "retry_in_s": 1.0}
    for options in ({"dont_retry_on": [Exception]}, {"retry_on": [OSError]}, {"causes": {"exception": "bury"}}):
        assert judged("exception", Retry(1), said=said, **options).then == "retry"


def test_a_discarded_job_is_dead_at_once_whatever_else_is_said() -> None:
    options: dict[str, Any] = {"retry_on": [Discard], "max_attempts": 99, "retry_until": 999}
    verdict = judged("exception", Discard("no such user"), said={"asked": "discard"}, **options)
    assert (verdict.then, why(verdict), verdict.settlement.counters) == ("dead", "the job discarded itself", Counters(attempts=1))
    certificate = json.loads(verdict.settlement.certificate or b"")
    assert (certificate["error"]["class"], certificate["error"]["message"]) == ("Discard", "no such user")


# -- in the tests of applications ---------------------------------------------------------------------------------------------


@job(name="retries.flaky", backoff=[60, 600], max_attempts=3)
def flaky(succeeds_at: int) -> Any:
    yield sleep(1)
    kqueue.current().then(flaky.job(0))
    if kqueue.current().attempt < succeeds_at:
        raise LookupError("not yet")


@job(name="retries.asks", keep_result=60, timeout=10, retry_until=3600, causes={"timeout": {"backoff": 1000}})
def asks() -> Any:
    attempt = kqueue.current().attempt
    if attempt == 1:
        raise Retry(delay=1, message="warming up")
    if attempt == 2:
        yield sleep(99)
    if attempt == 3:
        raise MemoryError
    return attempt


@job(name="retries.gives_up", isolated=True, backoff=by_attempt)
def gives_up() -> None:
    if kqueue.current().attempt == 2:
        raise Discard("enough")
    raise ValueError


def test_a_whole_life_is_run_on_a_virtual_clock() -> None:
    queue = FakeQueue()
    life = run_with_retries(flaky.job(3), queue=queue)
    assert (life.then, [(each.cause, each.then, each.delay_s) for each in life.runs]) == (
        "done", [("exception", "retry", 60), ("exception", "retry", 600), ("ok", "done", 0)],
    )  # fmt: skip
    assert life.runs[0].error == "LookupError: not yet"
    assert queue.jobs == [flaky.job(0)], "of the run that ended well only"
    dead = run_with_retries(flaky.job(9))
    assert (dead.then, dead.result, dead.runs[-1].why) == ("dead", None, "it has failed 3 times, and max_attempts is 3")


def test_of_every_kind_of_end() -> None:
    life = run_with_retries(asks.job())
    assert (life.then, life.result) == ("done", 4)
    assert [(each.cause, each.delay_s) for each in life.runs[:2]] == [("exception", 1), ("timeout", 1000)]
    assert life.runs[0].error == "Retry: warming up"
    discarded = run_with_retries(gives_up.job())
    assert [(each.then, each.delay_s) for each in discarded.runs] == [("retry", 10), ("dead", 0)]
    assert discarded.runs[-1].error == "Discard: enough"


def test_time_passes_for_retry_until() -> None:
    life = run_with_retries(asks.options(retry_until=500).job())
    assert (life.then, life.runs[-1].cause) == ("dead", "timeout")
    assert life.runs[-1].why == "the retry would be due 511 s after retry_until"


def test_more_memory_shows_where_it_would_be_had() -> None:
    @job(name="retries.hungry", max_memory=100, backoff=0, max_attempts=4, causes={"memory": {"grow": 4}})
    def hungry() -> None:
        raise MemoryError

    life = run_with_retries(hungry.job())
    assert [each.max_memory for each in life.runs] == [100, 400, 512, 512]
