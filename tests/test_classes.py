"""Accounting by job class: true to what ended, bounded, and with advice that one can follow."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kqueue.events import Events, JobEnded
from kqueue.observe import classes
from kqueue.observe.classes import MAX_CLASSES, MIN_RUNS, STEPS, Histogram, JobClass, JobClasses
from kqueue.outcome import CAUSES, Outcome
from tests.apps import heavy, inline
from tests.daemon import PATIENCE_S, Daemon

FIFTH = 2 ** (1 / STEPS)


@pytest.mark.parametrize("seed", range(5))
def test_a_quantile_is_never_too_low_and_at_most_a_fifth_too_high(seed: int) -> None:
    dice = random.Random(seed)
    numbers = [dice.lognormvariate(dice.uniform(-8, 8), 3) for _ in range(2000)] + [0.0] * 10
    histogram = Histogram()
    for number in numbers:
        histogram.add(number)
    numbers.sort()
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        truth = numbers[max(0, -int(-share * len(numbers) // 1) - 1)]
        assert truth <= histogram.quantile(share) <= max(truth * FIFTH * 1.000001, 2**-39)
    assert histogram.quantile(1.0) == numbers[-1]
    assert len(histogram.buckets) < 200


@pytest.mark.parametrize("number", [0.0, -1.0, 1e-300, 1e-9, 1e300, 5e-324])
def test_any_number_has_a_bucket(number: float) -> None:
    histogram = Histogram()
    histogram.add(number)
    assert histogram.quantile(0.99) == max(number, 0.0)
    assert Histogram().describe(3) == {"p50": 0.0, "p99": 0.0, "max": 0.0}


def runs(*outcomes: Outcome) -> JobClass:
    known = JobClass()
    for outcome in outcomes:
        known.add(outcome)
    return known


def ok(seconds: float = 1.0, mib: float = 30.0, **limits: float) -> Outcome:
    applied = {"timeout": 30, "max_memory": 64, **limits}
    return Outcome("ok", pid=7, duration_s=seconds, cpu_user_s=seconds / 2, max_memory_mib=mib, limits=applied)


def test_causes_are_counted_and_only_runs_are_measured() -> None:
    known = runs(*(Outcome(cause, duration_s=1.0) for cause in CAUSES), Outcome("ok", duration_s=2.0)).describe()
    assert known["ended"] == len(CAUSES) + 1
    assert known["causes"] == {**dict.fromkeys(CAUSES, 1), "ok": 2}
    assert known["duration_s"] == {"p50": 1.0, "p99": 2.0, "max": 2.0} or known["duration_s"]["p50"] <= FIFTH
    assert (known["cpu_s"], known["memory_mib"], known["advice"]) == (None, None, [])
    cancelled = runs(Outcome("cancelled", duration_s=9.0), Outcome("refused"), Outcome("lost", pid=3, duration_s=9.0)).describe()
    assert (cancelled["ended"], cancelled["duration_s"]["max"], cancelled["cpu_s"]) == (3, 0.0, None)


@pytest.mark.parametrize(
    ("outcomes", "advice"),
    [
        ([ok(mib=170, max_memory=512)] * MIN_RUNS, ["max_memory: p99 170 MiB of 512: 256 would do"]),
        ([ok(mib=170, max_memory=512)] * (MIN_RUNS - 1), []),
        ([ok(mib=170, max_memory=384)] * MIN_RUNS, []),  # it would save too little
        ([ok(mib=170, max_memory=512)] * MIN_RUNS + [ok(mib=400, max_memory=512)], []),  # one needed it
        ([ok(mib=10, max_memory=64)] * MIN_RUNS, []),  # small change
        ([ok(1, timeout=600)] * MIN_RUNS, ["timeout: p99 1 s of 600: 5 s would do"]),
        ([ok(50, timeout=3600)] * MIN_RUNS, ["timeout: p99 50 s of 3600: 300 s would do"]),
        ([ok(1, timeout=0)] * MIN_RUNS, ["timeout: there is none, and p99 is 1 s: 5 s would do"]),
        ([ok(1, timeout=30)] * MIN_RUNS, []),
        (
            [ok()] * 90 + [Outcome("timeout", duration_s=30, limits={"timeout": 30})] * 10,
            ["timeout: 10 of 100 runs took longer than 30 s"],
        ),
        ([ok()] * 999 + [Outcome("timeout", duration_s=30, limits={"timeout": 30})], []),
        (
            [ok(mib=60)] * 17 + [Outcome("memory", pid=9, max_memory_mib=70, limits={"timeout": 30, "max_memory": 64})] * 3,
            ["max_memory: 3 of 20 runs needed more than 64 MiB"],
        ),
    ],
)
def test_advice(outcomes: list[Outcome], advice: list[str]) -> None:
    assert runs(*outcomes).describe()["advice"] == advice


def test_only_what_is_registered_has_a_place_and_there_is_an_end_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    known = JobClasses(events)

    def end(name: str, **fields: Any) -> None:
        events.emit(JobEnded("id", name, "inline", "q", Outcome("ok", **fields), "done", 0.0))

    for number in range(1000):
        end(f"of a payload {number}")
    assert known.names == []
    monkeypatch.setattr(classes, "registry", type("All", (), {"get": staticmethod(lambda name: name)}))
    for number in range(MAX_CLASSES + 10):
        end(f"class {number}")
    assert len(known.names) == MAX_CLASSES
    assert (known.describe("class 3")["ended"], known.describe("none of these")["ended"]) == (1, 0)


def test_a_daemon_tells_of_its_classes(tmp_path: Any) -> None:
    daemon = Daemon(tmp_path, f"sqlite:///{tmp_path}/kqueue.db")
    try:
        daemon.start()
        handles = daemon.dispatch(
            *(inline.nap.job(0.05) for _ in range(5)), inline.fails_twice.job(), heavy.crunch.job(1), inline.too_long.job()
        )
        assert all(handle.wait(PATIENCE_S) for handle in handles)
        found = daemon.status()["jobs"]
        assert {name: each["causes"] for name, each in found.items()} == {
            "nap": {"ok": 5}, "fails_twice": {"exception": 2}, "crunch": {"ok": 1}, "too_long": {"timeout": 1},
        }  # fmt: skip
        assert found["nap"]["duration_s"]["p50"] >= 0.05
        assert (found["nap"]["lane"], found["nap"]["why"], found["nap"]["memory_mib"]) == ("inline", "kind", None)
        assert (found["crunch"]["lane"], found["crunch"]["why"]) == ("isolated", "declared")
        assert found["crunch"]["memory_mib"]["p99"] > 1
        assert found["crunch"]["cpu_s"]["max"] > 0
        page = daemon.kqueue("status").stdout.splitlines()
        assert any(line.split()[:4] == ["fails_twice", "inline", "2", "2"] for line in page)
        shown = daemon.kqueue("show", handles[5].id).stdout
        assert "class      runs inline; of this daemon's: 2 exception; p99 " in shown
        assert daemon.stop() == 0
        assert "class " not in daemon.kqueue("show", handles[5].id).stdout
    finally:
        daemon.close()
