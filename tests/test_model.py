"""The protocol of delivery, explored whole within small bounds; and each of its rules is missed when it is left out."""

from __future__ import annotations

import pytest

from .model.explore import explore
from .model.world import CUT, ECONOMIES, GONE, KILLED, PAUSED, RULES, Bounds, Model

EXPLORED = {  # and for which reasons, and no others, a job may be run a second time there
    "one of any fault": (Bounds(faults=1), {KILLED, PAUSED, CUT}),
    "the broker away, or its clock set": (Bounds(kinds=("away", "jump")), set()),
    "killed twice": (Bounds(kinds=("kill",)), {KILLED}),
    "deployed while the broker is away": (Bounds(kinds=("stop", "away"), lease=2), {GONE}),
    "two jobs": (Bounds(jobs=2, faults=1, kinds=("kill",)), {KILLED}),
    "a follow-up of a job that fails": (Bounds(jobs=2, faults=1, kinds=("kill",), failures=1, follow="same"), {KILLED}),
    "a follow-up whose ack is repeated": (Bounds(jobs=2, faults=1, kinds=("cut",), follow="same"), {CUT}),
    "a follow-up in another queue": (Bounds(jobs=2, faults=1, kinds=("kill",), follow="another"), {KILLED}),
    "a job that is handed over": (Bounds(faults=1, kinds=("kill", "cut"), lease=2, dispatched=1), {KILLED, CUT}),
    "two jobs that are handed over": (Bounds(jobs=2, faults=0, lease=2, dispatched=2), set()),
}

MISSED = {  # rule -> bounds within which it is, and how that shows
    "fence": (Bounds(faults=1, kinds=("pause",), failures=1), "a stale token changed a job"),
    "keep token": (Bounds(faults=1, kinds=("cut",)), "an outcome was refused"),
    "take back": (Bounds(faults=1, kinds=("pause",)), "two runs of a job are live"),
    "remember reserve": (Bounds(faults=1, kinds=("cut",)), "a job waits for ever"),
    "remember settle": (Bounds(faults=1, kinds=("cut",)), "an outcome was refused"),
    "abort": (Bounds(kinds=("kill", "cut")), "a job is run again"),
    "revive": (Bounds(faults=1, kinds=("pause",)), "a job is leased to an epoch that nobody knows"),
    "hush": (Bounds(faults=1, kinds=("jump",)), "a job is run again"),
    "steady": (Bounds(kinds=("away",)), "a job is run again"),
    "tell of lapses": (Bounds(faults=1, kinds=("pause",)), "two runs of a job are live"),
    "count from asking": (Bounds(faults=1, kinds=("pause",)), "two runs of a job are live"),
    "cancel": (Bounds(faults=1, kinds=("pause",)), "two runs of a job are live"),
    "identity": (Bounds(faults=1, kinds=("kill",)), "a job is run again"),
    "replay first": (Bounds(kinds=("stop", "away")), "a job is run again"),
    "keep outcomes": (Bounds(kinds=("stop", "away")), "a job is run again"),
    "settle before close": (Bounds(faults=1, kinds=("stop",)), "a job is run again"),
    "ack after work": (Bounds(faults=1, kinds=("kill",)), "a job is lost"),
    "follow with ack": (Bounds(jobs=2, faults=1, follow="same"), "a follow-up was enqueued, and its job is not done"),
    "mark": (Bounds(jobs=2, faults=0, follow="another"), "a follow-up was enqueued twice"),
    "lasting mark": (Bounds(jobs=2, faults=0, follow="another"), "a follow-up was enqueued twice"),
    "hand to the living": (Bounds(faults=1, kinds=("pause",), lease=2, dispatched=1), "a job is leased to an epoch that nobody"),
    "hand once": (Bounds(jobs=2, faults=1, kinds=("cut",), dispatched=2), "a job is leased to a daemon that does not know of it"),
    "look for the offer": (Bounds(faults=1, kinds=("cut",), lease=2, dispatched=1), "a job waits for ever"),
    "answer the next": (Bounds(faults=1, kinds=("cut",), lease=2, dispatched=1), "a job waits for ever"),
    "take the next": (Bounds(faults=1, kinds=("kill",), dispatched=1), "a job is run again"),
    "wait for the answer": (Bounds(faults=1, kinds=("kill",), dispatched=1), "a job is run again"),
    "forget in doubt": (Bounds(faults=1, kinds=("pause",), lease=2, dispatched=1), "a job is run again"),
}
SAVED = {  # economy -> bounds within which it is not missed
    "doubt": Bounds(faults=1),
    "hand to a listener": Bounds(faults=1, kinds=("kill",), lease=2, dispatched=1),
    "compare numbers": Bounds(jobs=2, faults=0, lease=2, dispatched=2),
    "look when connected": Bounds(faults=1, kinds=("cut",), lease=2, dispatched=1),
    "look when renewed": Bounds(faults=1, kinds=("cut",), lease=2, dispatched=1),
    "keep what was handed": Bounds(faults=1, kinds=("kill",), lease=2, dispatched=1),
    "withdraw": Bounds(faults=1, kinds=("stop",), lease=2, dispatched=1),
}


@pytest.mark.parametrize("name", EXPLORED)
def test_nothing_is_lost_and_nothing_runs_twice_but_for_a_reason_that_the_promise_names(name: str) -> None:
    bounds, reasons = EXPLORED[name]
    found = explore(Model(bounds))
    assert not found.violated, "\n".join((found.violated, *found.trace))
    assert set(found.again) == reasons


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_missed(rule: str) -> None:
    bounds, how = MISSED[rule]
    found = explore(Model(bounds, rule))
    assert found.violated.startswith(how), f"without the rule that {RULES[rule]}"
    assert 0 < len(found.trace) <= 20  # a shortest way, which people can follow


@pytest.mark.parametrize("rule", ECONOMIES)
def test_an_economy_is_not_missed(rule: str) -> None:
    assert not explore(Model(SAVED[rule], rule)).violated
