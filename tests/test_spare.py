"""The child that is forked before there is a job for it: who gets it, and what happens when it is not there."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from kqueue import BoundJob
from tests.apps import spare
from tests.daemon import tree
from tests.test_isolated import Bench, Ran


class SpareBench(Bench):
    module = "tests.apps.spare"

    def in_turn(self, *jobs: BoundJob) -> list[Ran]:
        return self.run(*jobs, max_isolated=1)


@pytest.fixture
def bench() -> Iterator[SpareBench]:
    children = tree(os.getpid())
    yield SpareBench()
    assert tree(os.getpid()) == children, "a child or a zombie was left"


def test_the_next_job_gets_the_child_that_waits(bench: SpareBench) -> None:
    found, ran = bench.in_turn(spare.find.job(), spare.pid.job())
    assert found.result == ran.result == ran.ended.outcome.pid


def test_each_job_has_a_child_of_its_own_and_draws_its_own_numbers(bench: SpareBench) -> None:
    ran = bench.run(*[spare.draw.job() for _ in range(20)])
    assert len({each.ended.outcome.pid for each in ran}) == 20
    assert len({each.result for each in ran}) == 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_spare_that_somebody_killed_costs_no_job_anything(bench: SpareBench, number: int) -> None:
    killed, ran, found = bench.in_turn(spare.end.job(int(number)), spare.pid.job(), spare.find.job())
    assert ran.ended.outcome.ok
    assert ran.result != killed.result
    assert found.ended.outcome.ok, "there is another one after that"
    assert [settled.verb for settled in bench.settled] == ["ack"] * 3


def test_what_a_spare_did_before_is_not_in_its_job(bench: SpareBench) -> None:
    """It has rehearsed a run, and written nowhere but where its template does."""
    ran = bench.in_turn(spare.find.job(), spare.surroundings.job())[1]
    assert ran.result == {
        "id": ran.ended.id, "fds": ["0", "1", "2", "3", "4"], "blocked": 0, "stdin": "/dev/null",
        "dispatcher": "Run._dispatch", "title": f"kqueued: job surroundings {ran.ended.id}", "output": "pipe:",
    }  # fmt: skip
