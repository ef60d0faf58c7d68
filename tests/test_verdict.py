"""What becomes of a job after an attempt: the whole table of kqueue.verdict, and the numbers of the backoff."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kqueue.brokers.base import Counters, Lease, Token
from kqueue.dispatch import NewJob
from kqueue.options import JobOptions
from kqueue.outcome import CAUSES, Outcome
from kqueue.verdict import (
    DEFERRAL_S,
    MAX_DEFERRALS,
    POSTPONE_S,
    Verdict,
    backoff_s,
    defer,
    judge,
    move,
    postpone,
)

ERROR = {"class": "ValueError", "message": "no", "traceback": "…", "mro": ["ValueError", "Exception"]}


def lease(**counters: int) -> Lease:
    return Lease(Token("epoch", "id", 3), "mail", "inline", b"{}", Counters(**counters), 0.0)


def judged(cause: str, counters: dict[str, int] | None = None, error: Any = None, **options: Any) -> Verdict:
    return judge(lease(**(counters or {})), JobOptions(**options), Outcome(cause, error=error), "inline")


def certificate_of(verdict: Verdict) -> dict[str, Any]:
    assert verdict.settlement.certificate is not None
    certificate: dict[str, Any] = json.loads(verdict.settlement.certificate)
    return certificate


# -- the table ----------------------------------------------------------------------------------------------------------------

DOING = [("exception", ERROR), ("timeout", None), ("memory", None), ("cpu", None), ("exit", ERROR)]  # by the job's own
DYING = [("signal", None), ("exit", None)]  # of its process


def test_every_cause_is_in_the_table() -> None:
    assert {cause for cause, _ in DOING + DYING} | {"ok", "lost", "cancelled", "refused"} == set(CAUSES)


def test_a_job_that_ended_well_is_acked_and_leaves_nothing() -> None:
    then, settlement = judged("ok", {"attempts": 2, "crashes": 1})
    assert (then, settlement.verb, settlement.certificate, settlement.keep_s) == ("done", "ack", None, 0)
    assert (settlement.token, settlement.queue) == (Token("epoch", "id", 3), "mail")


def test_a_result_is_kept_with_its_certificate_when_the_job_asks_for_that() -> None:
    outcome = Outcome("ok", result=b"42", duration_s=1.23456789)
    settlement = judge(lease(attempts=1), JobOptions(keep_result=60), outcome, "isolated").settlement
    assert (settlement.verb, settlement.result, settlement.keep_s) == ("ack", b"42", 60)
    certificate = json.loads(settlement.certificate or b"")
    assert (certificate["cause"], certificate["attempt"], certificate["strategy"]) == ("ok", 2, "isolated")
    assert certificate["duration_s"] == 1.2346
    assert "result" not in certificate


def test_follow_ups_go_with_the_ack_and_with_nothing_else() -> None:
    follow_ups = (NewJob("next", "mail", "inline", 0, b"{}"),)
    assert judge(lease(), JobOptions(), Outcome("ok", follow_ups=follow_ups), "inline").settlement.follow_ups == follow_ups
    assert b"next" not in (judge(lease(), JobOptions(keep_result=9), Outcome("ok", follow_ups=follow_ups), "inline")
                           .settlement.certificate or b"")  # fmt: skip
    for cause in CAUSES:
        if cause != "ok":
            assert judged(cause).settlement.follow_ups == ()


@pytest.mark.parametrize(("cause", "error"), DOING)
def test_what_a_job_did_itself_costs_an_attempt_and_the_last_is_its_death(cause: str, error: Any) -> None:
    for before in (0, 1):
        counters = {"attempts": before, "recoveries": 9, "crashes": 2, "memory": 1}
        then, settlement = judged(cause, counters, error, max_attempts=3, backoff=7)
        assert (then, settlement.verb, settlement.delay_s) == ("retry", "release", 7)
        memory = 2 if cause == "memory" else 1
        assert settlement.counters == Counters(attempts=before + 1, recoveries=9, crashes=2, memory=memory)
    dead = judged(cause, {"attempts": 2}, error, max_attempts=3)
    assert (dead.then, dead.settlement.verb, dead.settlement.counters.attempts) == ("dead", "bury", 3)
    assert judged(cause, {}, error, max_attempts=1).then == "dead"


@pytest.mark.parametrize(("cause", "error"), DYING)
def test_the_third_death_of_its_process_is_a_job_s_own(cause: str, error: Any) -> None:
    for before in (0, 1):
        then, settlement = judged(cause, {"crashes": before, "attempts": 1}, error, max_attempts=2, backoff=[1, 2, 3, 4])
        assert (then, settlement.verb) == ("retry", "release")
        assert settlement.counters == Counters(crashes=before + 1, attempts=1)
        assert settlement.delay_s == before + 2, "failed runs of both kinds make it wait longer"
    assert judged(cause, {"crashes": 2}, error, max_attempts=100).then == "dead"


def test_what_was_lost_goes_back_at_once_then_later_and_the_tenth_time_it_is_dead() -> None:
    for before in range(9):
        then, settlement = judged("lost", {"recoveries": before, "attempts": 2}, max_attempts=3)
        assert (then, settlement.verb) == ("released", "release")
        assert settlement.delay_s == (min(60, 2**before) if before else 0), "what ends its template must not do so in a row"
        assert settlement.counters == Counters(recoveries=before + 1, attempts=2)
    assert judged("lost", {"recoveries": 9}).then == "dead"


def test_an_attempt_that_could_not_begin_costs_nothing_and_waits() -> None:
    then, settlement = postpone(lease(attempts=1, recoveries=9))
    assert (then, settlement.verb, settlement.delay_s) == ("released", "release", POSTPONE_S)
    assert settlement.counters == Counters(attempts=1, recoveries=9)


def test_a_shutdown_counts_nothing() -> None:
    counters = {"attempts": 2, "crashes": 2, "recoveries": 9}
    then, settlement = judged("cancelled", counters, max_attempts=3)
    assert (then, settlement.verb, settlement.delay_s, settlement.counters) == ("released", "release", 0, Counters(**counters))


def test_a_refused_job_is_dead_at_once_with_the_reason() -> None:
    verdict = judged("refused", {"attempts": 0}, ERROR, max_attempts=100)
    assert (verdict.then, verdict.settlement.verb, verdict.settlement.counters) == ("dead", "bury", Counters())
    assert certificate_of(verdict)["error"] == {"class": "ValueError", "message": "no", "traceback": "…"}


@pytest.mark.parametrize("cause", [cause for cause in CAUSES if cause != "ok"])
def test_every_attempt_that_did_not_end_well_has_its_certificate(cause: str) -> None:
    certificate = certificate_of(judged(cause, {"attempts": 1, "crashes": 1, "recoveries": 1}))
    assert (certificate["cause"], certificate["attempt"], certificate["strategy"]) == (cause, 4, "inline")
    assert certificate["ended_at"] > 1_700_000_000


# -- jobs that nobody here can run ----------------------------------------------------------------------------------------------


def test_a_job_nobody_knows_waits_ten_minutes_for_the_deploy_to_end() -> None:
    counters, waited_s = Counters(), 0.0
    while True:
        verdict = defer(lease(**counters._asdict()), Outcome("refused"))
        if verdict.then == "dead":
            break
        settlement = verdict.settlement
        assert (settlement.verb, settlement.delay_s, settlement.certificate) == ("release", DEFERRAL_S, None)
        counters, waited_s = settlement.counters, waited_s + settlement.delay_s
    assert waited_s == 600
    assert counters == Counters(deferrals=MAX_DEFERRALS), "and no attempt was counted"
    assert (verdict.settlement.verb, verdict.settlement.delay_s) == ("bury", 0)
    assert certificate_of(verdict)["cause"] == "refused"


def test_or_is_buried_at_once_where_the_operator_wants_that() -> None:
    verdict = defer(lease(attempts=1), Outcome("refused", error=ERROR), bury=True)
    assert (verdict.then, verdict.settlement.verb) == ("dead", "bury")
    assert certificate_of(verdict)["error"]["message"] == "no"
    assert certificate_of(verdict)["attempt"] == 2


def test_a_job_in_the_wrong_lane_is_moved_at_no_cost() -> None:
    then, settlement = move(lease(attempts=1), "isolated")
    assert (then, settlement.verb, settlement.lane, settlement.delay_s) == ("released", "release", "isolated", 0)
    assert (settlement.counters, settlement.certificate) == (Counters(attempts=1), None)


# -- backoff --------------------------------------------------------------------------------------------------------------------


def test_the_default_doubles_from_two_seconds_to_an_hour() -> None:
    ceilings = [backoff_s(JobOptions(), failures, uniform=1.0) for failures in range(1, 15)]
    assert ceilings == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3600, 3600, 3600]
    assert backoff_s(JobOptions(), 10_000, uniform=1.0) == 3600


def test_its_jitter_is_full() -> None:
    assert backoff_s(JobOptions(), 3, uniform=0.25) == 2
    waits = [backoff_s(JobOptions(), 5) for _ in range(2000)]
    assert all(0 < wait <= 32 for wait in waits), "never 0: a retry at once would be no backoff"
    assert min(waits) < 3
    assert max(waits) > 29
    assert 14 < sum(waits) / len(waits) < 18


@pytest.mark.parametrize("failures", [1, 2, 3, 50])
def test_a_number_is_taken_as_it_is(failures: int) -> None:
    assert backoff_s(JobOptions(backoff=7), failures) == 7
    assert backoff_s(JobOptions(backoff=0), failures) == 0


@pytest.mark.parametrize("declared", [[2, 10, 60], (2, 10, 60)])
def test_of_a_list_the_last_entry_holds_for_ever(declared: Any) -> None:
    assert [backoff_s(JobOptions(backoff=declared), failures) for failures in (1, 2, 3, 4, 99)] == [2, 10, 60, 60, 60]
