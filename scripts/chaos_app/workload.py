"""The jobs of a run: a mix by weights, spread over its time in bursts, all of it by the seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

QUEUES: Final = ("default", "mail")
DONE, DEAD = "done", "dead"


class Order(NamedTuple):
    """One job to dispatch. `options`: of the dispatch, besides id and queue."""

    at_s: float  # after the start of the run
    id: str
    module: str
    job: str
    args: Sequence[Any]
    queue: str
    options: Mapping[str, Any]
    owed: str  # DONE or DEAD
    insist: bool  # a dispatch that raised is repeated until it returns


class Kind(NamedTuple):
    weight: float
    module: str
    job: str
    seconds: tuple[float, float] | None = None  # its first argument is drawn from there; None: it has none
    more: Sequence[Any] = ()
    owed: str = DONE
    needs: str = ""  # "then": follow-ups; "inline poison"


KINDS: Final = (
    Kind(62, "jobs", "nap", (0.01, 0.4)),
    Kind(10, "jobs", "flaky", (0.01, 0.2)),
    Kind(1, "jobs", "hopeless", owed=DEAD),
    Kind(4, "jobs", "fans", (0.01, 0.1)),
    Kind(5, "heavy", "work", (0.02, 0.3)),
    Kind(1, "heavy", "flaky_work", (0.01, 0.1)),
    Kind(0.5, "heavy", "fans_work", (0.01, 0.1)),
    Kind(0.15, "heavy", "poison", more=("segfault",), owed=DEAD),
    Kind(0.15, "heavy", "poison", more=("exit",), owed=DEAD),
    Kind(0.05, "jobs", "poison_inline", owed=DEAD, needs="inline poison"),
    Kind(4, "jobs", "followed", (0.01, 0.1), (False,), needs="then"),
    Kind(2, "jobs", "followed", (0.01, 0.1), (True,), needs="then"),
    Kind(1, "jobs", "followed_in_vain", owed=DEAD, needs="then"),
    Kind(0.7, "heavy", "followed_work", (0.01, 0.1), (False,), needs="then"),
    Kind(0.3, "heavy", "followed_work", (0.01, 0.1), (True,), needs="then"),
)
LONG_SHARE: Final = 0.003  # of the naps take longer than any lease
DELAYED_SHARE, PRIORITY_SHARE, GIVES_UP_SHARE, BURST_SHARE = 0.1, 0.1, 0.3, 0.2


def mixed(seed: int, count: int, seconds: float, lease_s: float, without: Iterable[str] = ()) -> list[Order]:
    """`count` jobs of every kind that needs nothing of `without`, dispatched over `seconds`. Each kind comes at least once."""
    random = Random(f"{seed} jobs")
    kinds = [kind for kind in KINDS if not kind.needs or kind.needs not in without]
    chosen = [*kinds, *random.choices(kinds, [kind.weight for kind in kinds], k=max(0, count - len(kinds)))]
    random.shuffle(chosen)
    orders, at_s = [], 0.0
    for number, kind in enumerate(chosen[:count]):
        if random.random() >= BURST_SHARE:  # else: at once with the one before
            at_s = number / count * seconds
        args: list[Any] = []
        if kind.seconds is not None:
            long = kind.job == "nap" and random.random() < LONG_SHARE
            args.append(round(lease_s * random.uniform(1.1, 1.6) if long else random.uniform(*kind.seconds), 3))
        options: dict[str, Any] = {}
        if random.random() < DELAYED_SHARE:
            options["delay"] = round(random.uniform(0.1, 3.0), 3)
        if random.random() < PRIORITY_SHARE:
            options["priority"] = random.randint(-2, 2)
        insist = kind.owed == DEAD or random.random() >= GIVES_UP_SHARE
        orders.append(
            Order(
                round(at_s, 3), f"j{number:06}", kind.module, kind.job, [*args, *kind.more], random.choice(QUEUES), options,
                kind.owed, insist,
            )
        )  # fmt: skip
    return orders


def uniform(count: int, seconds: float, *, heavy_share: float = 0.0) -> list[Order]:
    """`count` jobs of `seconds`, all dispatched at once; every so many of them in a child."""
    every = round(1 / heavy_share) if heavy_share else 0
    orders = []
    for number in range(count):
        heavy = every and number % every == 0
        module, job = ("heavy", "work") if heavy else ("jobs", "nap")
        orders.append(Order(0.0, f"j{number:06}", module, job, [seconds], QUEUES[0], {}, DONE, True))
    return orders


def save(orders: Iterable[Order], path: Path) -> None:
    path.write_text("".join(json.dumps(order) + "\n" for order in orders))


def load(path: Path) -> list[Order]:
    return [Order(*json.loads(line)) for line in path.read_text().splitlines()]
