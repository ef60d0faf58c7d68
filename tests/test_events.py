"""Facts are told at once, in order, to whoever asked for their kind; a subscriber that fails harms nobody."""

from __future__ import annotations

import pytest

from kqueue.events import BrokerBack, DaemonStopped, Events, Warned


def test_a_fact_goes_to_those_who_asked_for_its_kind_in_their_order() -> None:
    events, heard = Events(), []
    events.subscribe(Warned, lambda fact: heard.append(("first", fact.message)))
    events.subscribe(Warned, lambda fact: heard.append(("second", fact.message)))
    events.subscribe(BrokerBack, lambda fact: heard.append(("other", fact.broker)))
    events.emit(Warned("a"))
    events.emit(BrokerBack("b"))
    events.emit(DaemonStopped(0, 0))
    assert heard == [("first", "a"), ("second", "a"), ("other", "b")]


def test_a_subscriber_that_fails_is_reported_and_felt_by_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    events, heard = Events(), []
    events.subscribe(Warned, lambda fact: 1 / 0)
    events.subscribe(Warned, heard.append)
    events.emit(Warned("a"))
    assert heard == [Warned("a")]
    assert capsys.readouterr().err == "kqueue: a subscriber of Warned failed: ZeroDivisionError('division by zero')\n"


def test_whoever_subscribes_during_a_fact_hears_of_the_next() -> None:
    events, heard = Events(), []
    events.subscribe(Warned, lambda fact: events.subscribe(BrokerBack, heard.append))
    events.emit(Warned("a"))
    events.emit(BrokerBack("b"))
    assert heard == [BrokerBack("b")]
