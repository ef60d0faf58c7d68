"""How much is reserved from which queue: limits hold exactly, weights converge, and nobody starves.

A test plays the runtime and the broker: it asks every queue as `Feeding` does, hands out what stands there, and
ends jobs in the order of its choice.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest

from kqueue.config import QueueSpec
from kqueue.intake import BATCH, MAX_CREDIT, SMALLEST_BATCH, STARTING_S, Intake, RateWindow

ENDLESS = 10**9


class Shop:
    """An intake, the queues it serves, and what runs. `stock`: queue -> lane -> how many jobs stand there."""

    def __init__(
        self, queues: list[QueueSpec], stock: Mapping[str, Mapping[str, int]], slots: Mapping[str, int] | None = None,
        **limits: Any,
    ) -> None:  # fmt: skip
        self.now = 0.0
        self.intake = Intake(queues, slots or {"inline": 10_000, "isolated": 4}, clock=lambda: self.now, **limits)
        self.stock = {queue: dict(lanes) for queue, lanes in stock.items()}
        self.running: deque[tuple[str, str]] = deque()
        self.taken: Counter[tuple[str, str]] = Counter()
        self.order: list[tuple[str, str]] = []
        self.asks = 0

    def round(self) -> int:
        """One round over the queues; how many jobs it brought."""
        before = len(self.order)
        for share in (True, False) if len(self.stock) > 1 else (False,):
            for queue in self.intake.order():
                ask = self.intake.ask(queue, share)
                if ask is None:
                    continue
                self.asks += 1
                leases = []
                for lane, want in ask.wants.items():
                    got = min(want, self.stock[queue].get(lane, 0))
                    self.stock[queue][lane] = self.stock[queue].get(lane, 0) - got
                    leases += [(queue, lane)] * got
                self.intake.got(ask, len(leases))
                for queue, lane in leases:
                    self.intake.started(queue, lane)
                self.running += leases
                self.order += leases
                self.taken.update(leases)
        return len(self.order) - before

    def take_all(self) -> None:
        """Rounds until one brings nothing, as the feeder does before it parks."""
        while self.round():
            pass

    def end(self, index: int = 0) -> tuple[str, str]:
        self.running.rotate(-index)
        job = self.running.popleft()
        self.intake.ended(*job)
        return job

    def end_all(self) -> None:
        while self.running:
            self.end()

    def of_queue(self, queue: str) -> int:
        return sum(count for (name, _), count in self.taken.items() if name == queue)

    def of_lane(self, lane: str) -> int:
        return sum(count for (_, name), count in self.taken.items() if name == lane)


def saturated(weights: list[int], lane: str, slots: int, jobs: int, seed: int = 1) -> Shop:
    """`jobs` jobs later, where every queue always has more, and slots are freed one or a few at a time."""
    dice = random.Random(seed)
    queues = [QueueSpec(f"q{number}", weight) for number, weight in enumerate(weights)]
    shop = Shop(queues, {queue.name: {lane: ENDLESS} for queue in queues}, {"inline": slots, "isolated": slots})
    shop.take_all()
    shop.order.clear()
    shop.taken.clear()
    while len(shop.order) < jobs:
        for _ in range(dice.randint(1, max(1, slots // 10))):
            shop.end(dice.randrange(len(shop.running)))
        shop.take_all()
    return shop


# -- weights -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["inline", "isolated"])
@pytest.mark.parametrize("slots", [1, 4, 400])
@pytest.mark.parametrize("weights", [[1, 1], [1, 3], [5, 2, 1], [1, 99], [1] * 10])
def test_under_saturation_each_queue_gets_its_weight(weights: list[int], slots: int, lane: str) -> None:
    shop = saturated(weights, lane, slots, jobs=1000)
    for number, weight in enumerate(weights):
        fair = len(shop.order) * weight / sum(weights)
        assert abs(shop.of_queue(f"q{number}") - fair) <= (3 if slots < 10 else 20), "to within a few jobs of a thousand"


@pytest.mark.parametrize("weights", [[1, 3], [1, 99], [5, 2, 1]])
def test_no_queue_waits_longer_than_its_weight_says(weights: list[int]) -> None:
    shop = saturated(weights, "inline", 1, jobs=1000)
    for number, weight in enumerate(weights):
        turns = [index for index, (queue, _) in enumerate(shop.order) if queue == f"q{number}"]
        longest = max(late - early for early, late in pairwise(turns))
        assert longest <= sum(weights) / weight + len(weights)


def test_slots_that_are_free_at_once_are_shared_at_once() -> None:
    """Long jobs may hold them for an hour, so it would not do to even it out later."""
    stock = {"a": {"isolated": ENDLESS}, "b": {"isolated": ENDLESS}}
    shop = Shop([QueueSpec("a", 1), QueueSpec("b", 3)], stock, {"inline": 10, "isolated": 8})
    shop.take_all()
    assert (shop.of_queue("a"), shop.of_queue("b")) == (2, 6)


def test_what_one_queue_has_no_use_for_the_others_get() -> None:
    shop = Shop([QueueSpec("a", 1), QueueSpec("b", 99)], {"a": {"inline": 50}, "b": {"inline": 3}}, {"inline": 20, "isolated": 0})
    shop.take_all()
    assert (shop.of_queue("a"), shop.of_queue("b")) == (17, 3)


def test_a_queue_that_was_empty_for_long_is_owed_nothing() -> None:
    shop = Shop([QueueSpec("a"), QueueSpec("b")], {"a": {"inline": ENDLESS}, "b": {}}, {"inline": 1, "isolated": 1})
    for _ in range(500):
        shop.take_all()
        shop.end_all()
    assert shop.of_queue("a") == 500
    shop.stock["b"]["inline"] = ENDLESS
    shop.order.clear()
    for _ in range(100):
        shop.take_all()
        shop.end_all()
    first = [queue for queue, _ in shop.order]
    assert 48 <= first.count("b") <= 52
    assert first[:20].count("a") >= 8, "it does not take them all at first, either"


def test_a_queue_its_own_limit_held_back_is_not_owed_everything_since() -> None:
    queues = [QueueSpec("a", max_concurrent=1), QueueSpec("b")]
    shop = Shop(queues, {"a": {"inline": ENDLESS}, "b": {"inline": ENDLESS}}, {"inline": 2, "isolated": 0})
    shop.take_all()
    assert {queue for queue, _ in shop.running} == {"a", "b"}
    for _ in range(3000):  # the one job of a runs on and on
        shop.end(next(index for index, (queue, _) in enumerate(shop.running) if queue == "b"))
        shop.take_all()
    shop.intake._queues["a"].spec = QueueSpec("a")
    shop.order.clear()
    shop.end_all()
    for _ in range(500):
        shop.take_all()
        shop.end()
    assert len([queue for queue, _ in shop.order[: int(4 * MAX_CREDIT)] if queue == "b"]) > 10


def test_a_lane_that_is_busy_with_one_queue_does_not_upset_the_other_lane() -> None:
    """Each lane keeps its own books: an empty isolated lane used to reset what the inline lane owed."""
    stock = {"a": {"inline": ENDLESS}, "b": {"inline": ENDLESS}}
    shop = Shop([QueueSpec("a", 1), QueueSpec("b", 3)], stock, {"inline": 1, "isolated": 4})
    for _ in range(400):
        shop.take_all()
        shop.end_all()
    assert abs(shop.of_queue("a") - 100) <= 2


def test_a_queue_that_ran_dry_keeps_no_debt_either() -> None:
    queues = [QueueSpec("a"), QueueSpec("b", per_minute=1)]
    shop = Shop(queues, {"a": {"inline": 500}, "b": {"inline": ENDLESS}}, {"inline": 1, "isolated": 0})
    while shop.round():
        shop.end_all()
    assert (shop.of_queue("a"), shop.of_queue("b")) == (500, 1)
    shop.intake._queues["b"].rate = RateWindow(0)
    shop.stock["a"]["inline"] = ENDLESS
    shop.order.clear()
    for _ in range(80):
        shop.take_all()
        shop.end_all()
    assert [queue for queue, _ in shop.order].count("a") >= 10


def test_whoever_is_owed_most_is_asked_first_and_then_whoever_weighs_most() -> None:
    queues = [QueueSpec("a"), QueueSpec("b"), QueueSpec("c", 2)]
    shop = Shop(queues, {queue.name: {"inline": ENDLESS} for queue in queues}, {"inline": 1, "isolated": 0})
    assert shop.intake.order() == ["c", "a", "b"]
    shop.intake.started("c", "inline")
    shop.intake.started("a", "inline")
    assert shop.intake.order() == ["b", "c", "a"]


# -- strict order --------------------------------------------------------------------------------------------------------------


def test_in_strict_order_an_earlier_queue_takes_whatever_it_can() -> None:
    stock = {"urgent": {"inline": 5}, "normal": {"inline": 5, "isolated": 3}, "rest": {"inline": ENDLESS}}
    queues = [QueueSpec("urgent", 1), QueueSpec("normal", 9), QueueSpec("rest", 99)]
    shop = Shop(queues, stock, {"inline": 2, "isolated": 1}, strict_order=True)
    while len(shop.order) < 20:
        shop.take_all()
        shop.end_all()
    inline = [queue for queue, lane in shop.order if lane == "inline"]
    assert inline[:10] == ["urgent"] * 5 + ["normal"] * 5
    assert set(inline[10:]) == {"rest"}
    assert shop.taken["normal", "isolated"] == 3, "in the lane that the urgent queue has no use for"


# -- lanes ---------------------------------------------------------------------------------------------------------------------


def test_a_full_heavy_lane_never_blocks_light_jobs() -> None:
    shop = Shop([QueueSpec("q")], {"q": {"inline": 5000, "isolated": ENDLESS}}, {"inline": 100, "isolated": 4})
    for _ in range(60):
        shop.take_all()
        while any(lane == "inline" for _, lane in shop.running):
            shop.end(next(index for index, (_, lane) in enumerate(shop.running) if lane == "inline"))
    assert (shop.of_lane("inline"), shop.of_lane("isolated")) == (5000, 4)


def test_nothing_is_reserved_beyond_the_slots() -> None:
    shop = Shop([QueueSpec("q")], {"q": {"inline": ENDLESS, "isolated": ENDLESS}}, {"inline": 300, "isolated": 4})
    shop.take_all()
    assert (shop.of_lane("inline"), shop.of_lane("isolated")) == (300, 4)
    assert shop.intake.ask("q") is None
    assert shop.intake.running == {"inline": 300, "isolated": 4}
    assert shop.intake.total_running == 304
    shop.end()
    ask = shop.intake.ask("q", share=False)
    assert ask is not None
    assert sum(ask.wants.values()) == 1


def test_no_more_than_a_batch_is_asked_for_at_once() -> None:
    shop = Shop([QueueSpec("q")], {"q": {"inline": ENDLESS}})
    ask = shop.intake.ask("q", share=False)
    assert ask is not None
    assert ask.wants == {"inline": BATCH, "isolated": 4}


def test_a_lane_without_slots_is_never_asked_for() -> None:
    shop = Shop([QueueSpec("q")], {"q": {"inline": 5, "isolated": 5}}, {"inline": 10, "isolated": 0})
    shop.take_all()
    assert shop.of_lane("isolated") == 0


LIMITS: list[dict[str, Any]] = [{"concurrent": 1}, {"concurrent": 2}, {"concurrent": 7}, {"max_jobs": 40}, {"per_minute": 30}]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("queues", [1, 2, 3])
@pytest.mark.parametrize("lane", ["inline", "isolated"])
def test_where_both_lanes_draw_on_one_limit_an_empty_lane_keeps_nothing_from_the_other(
    lane: str, queues: int, limits: dict[str, Any]
) -> None:
    """In one go: a feeder that got nothing parks until something new happens."""
    specs = [QueueSpec(f"q{number}") for number in range(queues)]
    shop = Shop(specs, {spec.name: {lane: ENDLESS} for spec in specs}, **limits)
    allowed = min(limits.get("concurrent", 99), limits.get("max_jobs", 99), limits.get("per_minute", 99))
    for _ in range(5):
        assert shop.round(), "the very first round finds them, whichever lane it begins with"
        shop.take_all()
        assert len(shop.running) == min(allowed, 4 if lane == "isolated" else 99)
        if limits.get("concurrent") is None:
            break
        shop.end_all()


@pytest.mark.parametrize("limits", [{"concurrent": 1}, {"concurrent": 2}, {"concurrent": 5}], ids=str)
@pytest.mark.parametrize("queues", [1, 2])
def test_where_both_lanes_draw_on_one_limit_each_has_its_half(queues: int, limits: dict[str, Any]) -> None:
    dice = random.Random(1)
    specs = [QueueSpec(f"q{number}") for number in range(queues)]
    shop = Shop(specs, {spec.name: {"inline": ENDLESS, "isolated": ENDLESS} for spec in specs}, **limits)
    while len(shop.order) < 1000:
        shop.take_all()
        shop.end(dice.randrange(len(shop.running)))
    for spec in specs:
        for lane in ("inline", "isolated"):
            assert abs(shop.taken[spec.name, lane] / len(shop.order) - 1 / (2 * queues)) < 0.1


# -- limits --------------------------------------------------------------------------------------------------------------------


def test_no_more_run_at_once_than_allowed_in_all_and_of_a_queue() -> None:
    dice = random.Random(1)
    queues = [QueueSpec("a", 1, max_concurrent=3), QueueSpec("b", 5), QueueSpec("c", 1, max_concurrent=1)]
    shop = Shop(queues, {queue.name: {"inline": ENDLESS, "isolated": ENDLESS} for queue in queues}, concurrent=6)
    most: Counter[str] = Counter()
    for _ in range(500):
        shop.take_all()
        now = Counter(queue for queue, _ in shop.running)
        assert len(shop.running) == 6, "and no fewer than that, since there is always more"
        most |= now
        for _ in range(dice.randint(1, 6)):
            shop.end(dice.randrange(len(shop.running)))
    assert most["a"] <= 3
    assert most["c"] == 1


@pytest.mark.parametrize("limit", [1, 2, 5, 150, 250, 1000])
def test_no_more_jobs_are_taken_in_a_life_than_max_jobs(limit: int) -> None:
    stock = {"a": {"inline": ENDLESS, "isolated": ENDLESS}, "b": {"inline": ENDLESS}}
    shop = Shop([QueueSpec("a"), QueueSpec("b", 3)], stock, max_jobs=limit)
    for _ in range(50):
        shop.take_all()
        shop.end_all()
    assert len(shop.order) == limit
    assert shop.intake.remaining == 0
    assert Shop([QueueSpec("a")], {"a": {}}).intake.remaining is None


def test_a_job_that_did_not_run_after_all_is_given_back() -> None:
    """It was moved to its lane, or nobody here knows it."""
    shop = Shop([QueueSpec("a", per_minute=3)], {"a": {"inline": ENDLESS}}, max_jobs=4, per_minute=5)
    shop.take_all()
    assert (len(shop.order), shop.intake.remaining) == (3, 1)
    shop.intake.give_back("a", shop.intake.taken_at)
    shop.end_all()
    shop.take_all()
    assert (len(shop.order), shop.intake.remaining) == (4, 1), "the rate lets one more through, and no second one"
    shop.end_all()
    shop.now = 60
    shop.take_all()
    assert (len(shop.order), shop.intake.remaining) == (5, 0), "four of them ran"


def test_and_so_it_is_to_the_rate_of_all() -> None:
    shop = Shop([QueueSpec("a"), QueueSpec("b")], {"a": {"inline": ENDLESS}, "b": {"inline": ENDLESS}}, per_minute=4)
    shop.take_all()
    shop.intake.give_back("b", shop.intake.taken_at)
    shop.take_all()
    assert len(shop.order) == 5


def test_what_is_given_back_is_that_which_was_taken_then() -> None:
    window = RateWindow(5)
    for when in (0, 1, 2):
        window.take(1, when)
    for when in (0, 1, 2):
        window.give_back(when)
    assert window.left(2) == 5
    window.take(5, 70)
    window.give_back(2)  # long ago: it is in no window any more
    assert window.left(70) == 0


def test_what_was_never_taken_cannot_be_given_back() -> None:
    window = RateWindow(2)
    window.give_back(0)
    assert window.left(0) == 2
    window.take(1, 0)
    window.give_back(0)
    window.give_back(0)
    assert window.left(0) == 2


def most_in_any_minute(moments: list[float]) -> int:
    return max(sum(1 for other in moments if moment <= other < moment + 60) for moment in moments)


@pytest.mark.parametrize("seed", range(5))
def test_in_no_minute_are_more_taken_than_the_rate_allows(seed: int) -> None:
    dice = random.Random(seed)
    queues = [QueueSpec("a", 1, per_minute=20), QueueSpec("b", 2)]
    shop = Shop(queues, {queue.name: {"inline": ENDLESS, "isolated": ENDLESS} for queue in queues}, per_minute=50)
    moments: dict[str, list[float]] = {"a": [], "b": []}
    while shop.now < 600:
        before = len(shop.order)
        shop.take_all()
        for queue, _ in shop.order[before:]:
            moments[queue].append(shop.now)
        shop.end_all()
        shop.now += dice.choice([0.001, 0.1, 1, 7, 59.999, 60.0, shop.intake.opens_in_s() or 0])
    assert most_in_any_minute(moments["a"]) <= 20
    assert most_in_any_minute(moments["a"] + moments["b"]) == 50


def test_a_rate_is_used_to_the_full() -> None:
    shop = Shop([QueueSpec("a", per_minute=20)], {"a": {"inline": ENDLESS, "isolated": ENDLESS}})
    moments: list[float] = []
    for _ in range(5):
        shop.take_all()
        moments += [shop.now] * (len(shop.order) - len(moments))
        shop.end_all()
        shop.now += shop.intake.opens_in_s() or 0
    assert moments == [minute * 60.0 for minute in range(5) for _ in range(20)]


def test_a_rate_opens_at_the_very_moment_that_it_names() -> None:
    """Also where the sum of floats is not exact, or a feeder would wait for nothing, again and again."""
    for start in (0.0, 0.1, 1 / 3, 1e6 + 0.7, 123456.789, 3e7 + 1e-3):
        window = RateWindow(2)
        window.take(1, start)
        assert window.left(start) == 1
        assert window.opens_in_s(start) is None
        window.take(1, start + 10)
        wait_s = window.opens_in_s(start + 10)
        assert wait_s == pytest.approx(50)
        now = start + 10 + (wait_s or 0)
        assert window.left(now) == 1 or window.opens_in_s(now) > 0
        assert window.left(start + 60) == 1
        assert window.left(start + 70) == 2


def test_without_a_rate_there_is_nothing_to_wait_for() -> None:
    window = RateWindow(0)
    window.take(10**6, 0)
    assert window.left(0) is None
    assert window.opens_in_s(0) is None
    assert Shop([QueueSpec("q")], {"q": {}}).intake.opens_in_s() is None


def test_the_soonest_of_all_rates_is_waited_for() -> None:
    queues = [QueueSpec("a", per_minute=1), QueueSpec("b", per_minute=2)]
    shop = Shop(queues, {"a": {"inline": 1}, "b": {"inline": 0}})
    shop.take_all()
    shop.now = 20
    assert shop.intake.opens_in_s() == 40
    shop.stock["b"]["inline"] = 5
    shop.take_all()
    shop.now = 30
    assert shop.intake.opens_in_s() == 30
    shop.now = 60
    assert shop.intake.opens_in_s() == 20


def test_fewer_are_asked_for_at_once_while_their_starts_are_long() -> None:
    shop = Shop([QueueSpec("q")], {"q": {"inline": ENDLESS}})

    def asked() -> int:
        ask = shop.intake.ask("q", False)
        assert ask is not None
        return ask.wants["inline"]

    def starts(seconds: float, count: int) -> None:
        shop.intake.starts_begin(count)
        shop.now += seconds
        shop.intake.starts_end()

    assert asked() == BATCH
    for _ in range(10):
        starts(STARTING_S * 4, BATCH)
    assert BATCH // 5 <= asked() <= BATCH // 3, "a quarter of them takes as long as all should"
    for _ in range(10):
        starts(5.0, 3)
    assert asked() == SMALLEST_BATCH
    starts(0.0, 0)
    assert asked() == SMALLEST_BATCH, "none says nothing"
    for _ in range(20):
        starts(0.0, 1)
    assert BATCH - 1 <= asked() <= BATCH


# -- economy -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [1, 2, 4])
def test_an_idle_round_asks_each_queue_once(queues: int) -> None:
    specs = [QueueSpec(f"q{number}") for number in range(queues)]
    for limit, asks in [(0, queues), (50, queues), (1, 2 * queues)]:  # of one job at most, each lane is asked in its turn
        shop = Shop(specs, {spec.name: {} for spec in specs}, concurrent=limit)
        assert shop.round() == 0
        assert shop.asks == asks


def test_a_round_that_found_nothing_with_all_slots_free_need_not_be_repeated_for_a_slot() -> None:
    shop = Shop([QueueSpec("q", max_concurrent=3)], {"q": {"inline": ENDLESS}}, {"inline": 5, "isolated": 2}, concurrent=4)
    assert shop.intake.has_slots()
    shop.take_all()
    assert not shop.intake.has_slots(), "the queue's own limit is used up"
    shop.end()
    assert shop.intake.has_slots()
    for lane in ("inline", "isolated"):
        full = Shop([QueueSpec("q")], {"q": {lane: ENDLESS}}, {"inline": 5, "isolated": 2})
        full.take_all()
        assert not full.intake.has_slots(), f"the {lane} lane is full"
    unserved = Shop([QueueSpec("q")], {"q": {}}, {"inline": 5, "isolated": 0})
    assert unserved.intake.has_slots(), "a lane that is not served is not full"
