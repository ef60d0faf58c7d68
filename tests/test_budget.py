"""The memory budget: isolated jobs never have more together than there is, none starves, and waiting costs none anything."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kqueue import KQueueRuntime, SecurityConfig, events, job, sleep
from kqueue.brokers.base import Counters
from kqueue.brokers.commands.memory import MemoryStore
from kqueue.brokers.memory import MemoryBroker
from kqueue.budget import MemoryBudget
from kqueue.client.memory import MemoryClient
from kqueue.codec import from_json
from kqueue.config import QueueSpec
from kqueue.dispatch import prepare
from kqueue.errors import UsageError
from kqueue.hostmemory import Budget, available_memory, budget
from kqueue.loading import template_config
from kqueue.outcome import Outcome
from kqueue.testing import VirtualClock

ROOT = str(Path(__file__).resolve().parent.parent)
MIB = 1048576


@job(isolated=True, max_memory=10, timeout=0)
def sized(seconds: float, *what: str) -> None: ...


@job(isolated=True, max_memory=20, backoff=0, max_attempts=9, causes={"memory": {"grow": 2}})
def growing() -> None: ...


@job
def light() -> Any:
    yield sleep(0)


class Pretending:
    """Isolated jobs that only take their time, and what they have together meanwhile."""

    name = "isolated"
    cancel_grace_s = 1.0

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.most = 0
        self.began: list[str] = []

    def start(self) -> Any:
        yield from ()

    def stop(self) -> Any:
        yield from ()

    def execute(self, work: Any) -> Any:
        if work.options.max_memory < 30 and work.envelope.job == "growing":
            return Outcome("memory", "kernel")
        self.running[work.envelope.id] = work.options.max_memory
        self.most = max(self.most, sum(self.running.values()))
        self.began.append(work.envelope.id)
        try:
            yield sleep(work.envelope.args[0] if work.envelope.args else 0.01)
        finally:
            del self.running[work.envelope.id]
        return Outcome("ok", result=b"null")


class Host:
    """A runtime with `total_mib` for isolated jobs, which are only pretended."""

    def __init__(self, total_mib: int, queues: Mapping[str, int] | None = None, *, strict: bool = False, slots: int = 8) -> None:
        clock = VirtualClock()
        self.store = MemoryStore(clock=lambda: clock.now)
        self.ended: list[events.JobEnded] = []
        self.strategy = Pretending()
        self.broker = Counting(self.store)
        specs = [QueueSpec(name, weight) for name, weight in (queues or {"default": 1}).items()]
        self.runtime = KQueueRuntime(
            self.broker, queues=specs, strict_order=strict, max_isolated=slots, memory_budget=Budget(total_mib, "by the test"),
            clock=clock, security=SecurityConfig(max_memory_mib=0),
        )  # fmt: skip
        self.runtime.add_strategy(self.strategy)
        self.runtime.events.subscribe(events.JobEnded, self.ended.append)

    def enqueue(self, id: str, mib: int, seconds: float = 1.0, **options: Any) -> None:
        bound = sized.options(id=id, max_memory=mib, **options).job(seconds)
        self.store.enqueue([prepare(bound, sized.registration)])

    def run(self) -> None:
        assert self.runtime.run(burst=True, handle_signals=False) == 0
        assert (self.runtime.memory.used_mib, self.runtime.memory.waiting) == (0, None)


class Counting(MemoryBroker):
    """Counts the reservations, and what went back."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.reservations = 0
        self.put_back: list[str] = []

    def reserve(self, queue: str, wants: Mapping[str, int]) -> Any:
        self.reservations += 1
        return (yield from super().reserve(queue, wants))

    def settle(self, batch: Any) -> Any:
        self.put_back += [item.token.id for item in batch if item.lane is not None]
        return (yield from super().settle(batch))


@pytest.mark.parametrize("seed", range(40))
def test_random_jobs_never_exceed_it_and_all_of_them_finish(seed: int) -> None:
    dice = random.Random(seed)
    total = dice.randrange(20, 400)
    queues = {name: dice.randrange(1, 5) for name in "abc"[: dice.randrange(1, 4)]}
    host = Host(total, queues, strict=dice.random() < 0.3, slots=dice.randrange(1, 12))
    for number in range(200):
        mib = dice.choice([dice.randrange(1, total + 1), dice.randrange(1, total // 10 + 2)])
        seconds = dice.choice([0, 0.01, dice.random()])
        host.enqueue(f"j{number}", mib, seconds, queue=dice.choice(list(queues)), priority=dice.randrange(-2, 3))
    host.run()
    assert host.strategy.most <= total
    assert sorted(host.strategy.began) == sorted(f"j{n}" for n in range(200)), "each of them once"
    assert all(ended.outcome.ok for ended in host.ended)
    assert host.broker.reservations < 4 * 200 * len(queues), "nobody asks again and again for what does not fit"
    assert len(host.broker.put_back) < 4 * 200


def test_what_waits_costs_nothing_and_keeps_its_place() -> None:
    host = Host(100)
    host.enqueue("first", 80)
    host.enqueue("second", 60)
    host.enqueue("third", 60)
    host.run()
    assert host.strategy.began == ["first", "second", "third"]
    assert host.broker.put_back.count("second") == 1
    assert {(ended.id, ended.then) for ended in host.ended} == {(id, "done") for id in ("first", "second", "third")}
    assert host.runtime.processed == 3


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("weights", [{"small": 1, "large": 1}, {"small": 100, "large": 1}])
def test_a_large_job_is_not_starved_by_small_ones_in_another_queue(weights: dict[str, int], strict: bool) -> None:
    with_plenty, with_little = (position_of_the_large_job(total, weights, strict) for total in (0, 100))
    assert with_little <= with_plenty + 20, "its queue's turn decides when it may run, and from then on it waits for no newcomer"


def position_of_the_large_job(total_mib: int, weights: dict[str, int], strict: bool) -> int:
    """How many began before it, where there is always another small one."""
    host = Host(total_mib, weights, strict=strict)
    for number in range(10):
        host.enqueue(f"s{number}", 10, 1 + number / 10, queue="small")
    host.enqueue("large", 95, queue="large")

    def more(fact: events.JobEnded) -> None:
        if fact.id.startswith("s") and len(host.ended) < 200:
            host.enqueue(f"s{len(host.ended) + 9}", 10, 1 + len(host.ended) % 7 / 10, queue="small")

    host.runtime.events.subscribe(events.JobEnded, more)
    host.run()
    assert not total_mib or host.strategy.most <= total_mib
    return host.strategy.began.index("large")


def test_inline_jobs_go_on_while_a_large_one_waits() -> None:
    host = Host(100)
    host.enqueue("first", 80, 10.0)
    host.enqueue("waits", 60)

    def began(fact: events.JobStarted) -> None:
        if fact.id == "first":
            host.store.enqueue([prepare(light.options(id="light").job(), light.registration)])

    host.runtime.events.subscribe(events.JobStarted, began)
    host.run()
    assert [ended.id for ended in host.ended] == ["light", "first", "waits"]


def test_what_can_never_fit_is_buried_with_the_numbers() -> None:
    host = Host(100)
    host.enqueue("huge", 101)
    host.enqueue("fits", 100)
    host.run()
    (huge,) = (ended for ended in host.ended if ended.id == "huge")
    assert (huge.then, huge.outcome.cause, huge.outcome.ended_by) == ("dead", "refused", "supervisor")
    assert huge.outcome.error is not None
    assert huge.outcome.error["message"] == (
        "its max_memory is 101 MiB, and isolated.memory_budget is 100 MiB (by the test): it can never run here"
    )
    assert host.strategy.began == ["fits"]
    row = MemoryClient(host.store).show("huge")
    assert row is not None
    assert (row.state, row.counters) == ("dead", Counters())
    assert from_json(row.certificates[-1])["cause"] == "refused"


def test_what_grows_after_it_ran_out_of_memory_grows_up_to_the_budget() -> None:
    host = Host(35)
    host.store.enqueue([prepare(growing.options(id="grows").job(), growing.registration)])
    host.run()
    assert [ended.outcome.cause for ended in host.ended] == ["memory", "ok"]
    assert host.strategy.most == 35, "twice 20 would be 40"


def test_many_that_can_never_fit_are_all_buried() -> None:
    host = Host(5)
    for number in range(20):
        host.enqueue(f"huge{number}", 10)
    host.run()
    assert {ended.then for ended in host.ended} == {"dead"}
    assert len(host.ended) == 20


def test_without_a_budget_everything_fits() -> None:
    memory = MemoryBudget(Budget(), 0)
    assert (memory.room(50), memory.why_never(1 << 40), memory.capped(1 << 40), memory.status()) == (None, "", 1 << 40, None)
    assert all(memory.take(n, "q", str(n), 1 << 30) for n in range(100))


def test_its_status_says_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryBudget, "_least_mib", lambda self: 10)
    memory = MemoryBudget(Budget(100), 0)
    assert memory.take("a", "q", "A", 70)
    assert not memory.take("b", "r", "B", 40)
    waiting = {"id": "B", "queue": "r", "max_memory": 40}
    assert memory.status() == {"total_mib": 100, "used_mib": 70, "waiting": waiting}
    memory.give("a")
    assert memory.next_up() is None, "the broker does not have it again yet"
    memory.released("b")
    assert (memory.room(0), memory.next_up(), memory.next_up(), memory.room(0)) == (0, "r", None, 10)


# -- how much there is ------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host of 1000 MiB without cgroups."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable:  {1000 * 1024} kB\n")
    return tmp_path


@pytest.mark.parametrize(
    ("cgroup", "files", "mib"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": f"{300 * MIB}"}, 300),
        ("0::/a/b", {"a/b/memory.max": f"{200 * MIB}", "a/memory.max": f"{300 * MIB}"}, 200),
        ("0::/a", {"a/memory.max": f"{2000 * MIB}"}, 1000),
        ("0::/", {"memory.max": f"{90 * MIB}"}, 90),
        ("0::/a", {"a/memory.max": "garbage"}, 1000),
        ("4:cpu,memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": f"{70 * MIB}"}, 70),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, 1000),
        ("4:cpu:/a", {"memory/a/memory.limit_in_bytes": "1"}, 1000),
    ],
)
def test_a_cgroup_s_limit_counts_where_it_is_less(root: Path, cgroup: str, files: dict[str, str], mib: int) -> None:
    (root / "proc/self/cgroup").write_text(cgroup + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    available, whose = available_memory(str(root))
    assert available == mib * MIB
    assert whose == ("the host has available" if mib == 1000 else "its cgroup allows")


def test_a_budget_is_a_share_or_a_size() -> None:
    assert budget("2GiB") == (2048, "2GiB")
    assert budget("512") == (512, "512")
    half, basis = budget("50%")
    assert 0 < half < available_memory()[0] // MIB
    assert basis.startswith("50% of the ")
    with pytest.raises(UsageError):
        budget("lots")


# -- with real children -----------------------------------------------------------------------------------------------


def test_real_children_stay_within_it() -> None:
    """By what the children say themselves of when they ran."""
    from tests.apps import zoo

    store = MemoryStore()
    dice = random.Random(7)
    sizes = [dice.randrange(8, 100) for _ in range(60)]
    options = [zoo.naps.options(max_memory=size, id=f"j{n}", queue=dice.choice("ab")) for n, size in enumerate(sizes)]
    store.enqueue([prepare(each.job(dice.random() / 20), zoo.naps.registration) for each in options])
    runtime = KQueueRuntime(
        MemoryBroker(store), template=template_config([ROOT], [], ["tests.apps.zoo"]), max_isolated=8, memory_budget=Budget(128),
        queues=["a", "b"],
    )  # fmt: skip
    ended: list[events.JobEnded] = []
    runtime.events.subscribe(events.JobEnded, ended.append)
    assert runtime.run(burst=True, handle_signals=False) == 0
    assert [fact.outcome.cause for fact in ended] == ["ok"] * 60
    client = MemoryClient(store)
    spans = [from_json(client.show(f"j{n}").result or b"") for n in range(60)]  # type: ignore[union-attr]
    together = [sum(size for size, (b, e) in zip(sizes, spans, strict=True) if b <= began < e) for began, _ in spans]
    assert max(together) <= 128
    assert sum(each > 64 for each in together) > 10, "and it is used"
