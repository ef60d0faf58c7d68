"""Jobs that were lost again and again: how many of them run at once, who is to blame, and that the page says so after a death."""

from __future__ import annotations

from pathlib import Path

import pytest

from kqueue.brokers.base import Counters, Lease, Token
from kqueue.instance import SlicePage
from kqueue.kernel import Clock, VirtualClock
from kqueue.options import JobOptions
from kqueue.outcome import Outcome
from kqueue.quarantine import APART_S, Quarantine
from kqueue.settling import Held
from kqueue.verdict import judge


def held(recoveries: int, id: str = "a") -> Held:
    counters = Counters(recoveries=recoveries)
    return Held(Lease(Token("e", id, 1), "q", "inline", None, counters, 0.0), 0.0, 0.0)


@pytest.fixture
def page(tmp_path: Path) -> SlicePage:
    return SlicePage(str(tmp_path / "slice"))


@pytest.mark.parametrize(("recoveries", "at_once"), [(0, 1000), (1, 1000), (2, 64), (3, 8), (4, 1), (9, 1)])
def test_how_many_run_at_once(page: SlicePage, recoveries: int, at_once: int) -> None:
    quarantine = Quarantine(page, Clock().monotonic)
    everybody = [held(recoveries) for _ in range(1000)]
    admitted = [each for each in everybody if quarantine.admits(each)]
    assert len(admitted) == at_once
    assert [quarantine.convicts(each) for each in admitted[:1]] == [at_once == 1]
    quarantine.leave(admitted[0])
    assert quarantine.admits(held(recoveries))


def test_who_has_to_wait_is_waited_for(page: SlicePage) -> None:
    clock = VirtualClock()
    quarantine = Quarantine(page, clock.monotonic)
    assert quarantine.admits(held(4))
    assert quarantine.opens_in_s() is None
    assert not quarantine.admits(held(4))
    assert quarantine.opens_in_s() == 2 * APART_S
    clock.now += 2 * APART_S
    assert quarantine.opens_in_s() is None


def test_those_of_few_losses_wait_for_one_of_many_and_others_do_not(page: SlicePage) -> None:
    quarantine, alone = Quarantine(page, Clock().monotonic), held(4)
    assert quarantine.admits(alone)
    assert not quarantine.admits(held(2))
    assert not quarantine.admits(held(3))
    assert quarantine.admits(held(1))
    quarantine.leave(alone)
    few = held(2)
    assert quarantine.admits(few)
    assert not quarantine.admits(held(4)), "it has to be alone"
    assert not quarantine.convicts(few)


def test_the_page_names_it_until_it_has_ended(page: SlicePage, tmp_path: Path) -> None:
    quarantine, longest = Quarantine(page, Clock().monotonic), "x" * 64
    suspect = held(4, longest)
    assert quarantine.admits(suspect)
    assert SlicePage(str(tmp_path / "slice")).culprit == longest
    page.page[:64] = b"another".ljust(64, b"\0")
    assert SlicePage(str(tmp_path / "slice")).culprit == "another", "whose own code runs goes before"
    page.page[0] = 0
    quarantine.leave(suspect)
    assert SlicePage(str(tmp_path / "slice")).culprit == ""


def test_nobody_is_named_who_was_not_admitted(page: SlicePage, tmp_path: Path) -> None:
    quarantine = Quarantine(page, Clock().monotonic)
    assert quarantine.admits(held(4, "first"))
    second = held(4, "second")
    assert not quarantine.admits(second)
    quarantine.leave(second)
    assert SlicePage(str(tmp_path / "slice")).culprit == "first"


def test_one_that_is_lost_alone_has_crashed() -> None:
    lease = held(4).lease
    lost = Outcome("lost", "kernel")
    assert judge(lease, JobOptions(), lost, "isolated").settlement.counters == Counters(recoveries=5)
    assert judge(lease, JobOptions(), lost, "isolated", convicted=True).settlement.counters == Counters(recoveries=4, crashes=1)
    thrice = lease._replace(counters=Counters(recoveries=4, crashes=2))
    assert judge(thrice, JobOptions(), lost, "isolated", convicted=True).then == "dead"
