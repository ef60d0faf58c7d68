"""What is done in a run. Each scenario sets up an arena, has jobs dispatched, strikes, heals, waits, and returns a Result.

    chaos       the mixed one: every kind of job, nemeses by the seed
    kills       one daemon, many equal jobs, killed with everything it started at several points, and started again
    survivor    two daemons, one is killed for good
    cut-every-byte   the connection to Redis, cut after every byte of every kind of reply
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from . import book, nemeses, workload
from .arena import CLIENTS, Arena, Setting
from .checker import TROUBLE
from .nemeses import Strike
from .proxy import Walk, Walker
from .report import Result
from .world import Steps, Trouble

CUT_EVERY_BYTE: Final = "cut-every-byte"
SLOW: Final = 0.25  # seconds that a job takes at most on average, with all that goes with it
PROGRESS_S: Final = 0.5
TRICKLE: Final = 60  # jobs a second for cut-every-byte
HANDFUL: Final = 8  # of them at once
WALK_LIMIT: Final = 400  # bytes: a reservation of one job, and well into a second one

# The replies to walk through, by when they come.
AT_WORK: Final = frozenset(["reserve", "reserve, with jobs", "settle", "renew", "sweep", "enqueue", "SADD", "push"])
AT_CONNECT: Final = frozenset(["HELLO", "SCRIPT LOAD", "SUBSCRIBE"])
AT_START: Final = frozenset(["open", "HSET"])


class Wishes(NamedTuple):
    """What the command line asks for."""

    broker: str
    seed: int
    seconds: float
    jobs: int
    lease_s: float
    nemeses: Sequence[str]
    without: Sequence[str]  # of workload.Kind.needs
    pause_s: float  # between strikes, on average
    bound_s: float | None  # from the last heal to the end of the last job; None: by what is left to do
    keep: bool
    verbose: bool
    slots: int  # for inline jobs of each daemon; 0: as the scenario has it
    heavy_share: float  # of the jobs of kills and survivor run in children
    stride: int  # cut-every-byte: only every so many bytes
    command: str
    say: Callable[[str], None]


def chaos(wishes: Wishes) -> Result:
    names = list(wishes.nemeses)
    disk_mib = _disk_mib(wishes) if "full-disk" in names else 0
    setting = Setting(wishes.broker, wishes.seed, wishes.lease_s, clock="jump" in names, disk_mib=disk_mib)
    with Arena(setting, wishes.keep, wishes.say, wishes.verbose) as arena:
        strikes = nemeses.schedule(
            wishes.seed, [name for name in names if name not in arena.lacking], wishes.seconds, wishes.lease_s, wishes.pause_s
        )
        orders = workload.mixed(wishes.seed, wishes.jobs, wishes.seconds, wishes.lease_s, wishes.without)
        arena.detail("\n".join(map(str, strikes)))
        return _run(arena, wishes, "chaos", orders, strikes)


def kills(wishes: Wishes) -> Result:
    """The whole worker tree, killed at five points of the work, started again at once."""
    setting = Setting(
        wishes.broker, wishes.seed, wishes.lease_s, daemons=1, inline=wishes.slots or 100, disk_mib=0, proxies=False
    )
    points = [0.08, 0.25, 0.45, 0.7, 0.95]
    orders = workload.uniform(wishes.jobs, 0.1, heavy_share=wishes.heavy_share)
    with Arena(setting, wishes.keep, wishes.say, wishes.verbose) as arena:
        arena.start()
        began = time.monotonic()
        arena.dispatch(orders)
        daemon = arena.daemons["a"]
        for point in points:
            _until(arena, lambda point=point: len(arena.history.finished) >= point * len(orders), 120)  # type: ignore[misc]
            nemeses.kill(arena, daemon, "kill-daemon")
            arena.loop.run_until(lambda: daemon.alive, 5)
        left = [order for order in orders if order.id not in arena.history.finished]
        restarted_at = daemon.started_at[daemon.label]
        heavy = sum(order.module == "heavy" for order in left)
        work_s = 0.1 * max((len(left) - heavy) / setting.inline, heavy / setting.isolated)
        standing = _end(arena, 60 + work_s)
        beyond_s = _last_end(arena) - restarted_at - work_s
        return _result(
            arena, wishes, "kills", standing, Counter({"kill-daemon": len(points)}), time.monotonic() - began, 5.0, beyond_s,
            {"last restart to last finish, beyond the work": f"{beyond_s:.2f} s (bound 5 s)"},
        )  # fmt: skip


def survivor(wishes: Wishes) -> Result:
    """Two daemons on one broker, as two hosts; one is killed for good while it is at work."""
    setting = Setting(wishes.broker, wishes.seed, wishes.lease_s, inline=wishes.slots or 100, disk_mib=0, proxies=False)
    orders = workload.uniform(wishes.jobs, 0.1, heavy_share=wishes.heavy_share)
    with Arena(setting, wishes.keep, wishes.say, wishes.verbose) as arena:
        arena.start()
        began = time.monotonic()
        arena.dispatch(orders)
        _until(arena, lambda: len(arena.history.finished) >= len(orders) * 0.3, 120)
        arena.daemons["a"].wanted = False
        nemeses.kill(arena, arena.daemons["a"], "kill-daemon")
        killed_at = book.now()
        standing = _end(arena, 60)
        took_s = _last_end(arena) - killed_at
        return _result(
            arena, wishes, "survivor", standing, Counter({"kill-daemon": 1}), time.monotonic() - began, 25.0, took_s,
            {"the kill to the last finish": f"{took_s:.2f} s (bound 25 s)"},
        )  # fmt: skip


def cut_every_byte(wishes: Wishes) -> Result:
    """Jobs flow in while every kind of reply is cut after 0, 1, 2 … bytes; by several daemons, half of them for the handshake."""
    if wishes.broker != "redis":
        raise Trouble("cut-every-byte is about replies over a network: use --broker redis")
    setting = Setting("redis", wishes.seed, wishes.lease_s, daemons=6, dispatchers=1, isolated=0, disk_mib=0)
    walk = Walk({*AT_WORK, *AT_CONNECT, *AT_START}, WALK_LIMIT, wishes.stride, wishes.seed)
    with Arena(setting, wishes.keep, wishes.say, wishes.verbose) as arena:
        walkers = {}
        for number, (name, proxy) in enumerate(arena.proxies.items()):
            kinds = AT_CONNECT if number % 2 and name != CLIENTS else AT_WORK
            walkers[name] = proxy.choose = Walker(walk, proxy, kinds, None if name == CLIENTS else wishes.lease_s * 0.4)
        arena.start()
        began = time.monotonic()
        arena.dispatch(_trickle(wishes))
        arena.loop.spawn(_provoke(arena, walk, walkers))
        arena.loop.spawn(_progress(arena, lambda: walk.left().values(), int(wishes.seconds * TRICKLE), wishes))
        over = _until(arena, lambda: not walk.left(), wishes.seconds, must=False)
        for proxy in arena.proxies.values():
            proxy.heal()
        healed_at = book.now()
        for dispatcher in arena.dispatchers:  # what it has not dispatched by now is not needed
            dispatcher.stop()
            dispatcher.over = True
        bound_s = wishes.bound_s or 60.0
        for daemon in arena.daemons.values():
            for label in daemon.started_at:
                arena.inflict(TROUBLE, CUT_EVERY_BYTE, arena.began_at, healed_at, label)
        standing = _end(arena, bound_s)
        cuts = Counter(each.kind for proxy in arena.proxies.values() for each in proxy.cuts)
        if not over:
            standing[1].append(f"not every byte was reached in {wishes.seconds:g} s: {walk.left()} are left")
        if wishes.keep:
            _save_cuts(arena)
        more = {
            "replies cut, by kind": ", ".join(f"{kind} {count}" for kind, count in cuts.most_common()),
            "up to byte": ", ".join(f"{kind} {min(walk.length(kind) or 0, WALK_LIMIT)}" for kind in sorted(walk.kinds)),
        }
        return _result(
            arena, wishes, CUT_EVERY_BYTE, standing, Counter({"cut": sum(cuts.values())}), time.monotonic() - began, bound_s,
            max(0.0, _last_end(arena) - healed_at), more,
        )  # fmt: skip


SCENARIOS: Final[Mapping[str, Callable[[Wishes], Result]]] = {
    "chaos": chaos, "kills": kills, "survivor": survivor, CUT_EVERY_BYTE: cut_every_byte,
}  # fmt: skip


# -- parts ------------------------------------------------------------------------------------------------------------


def _run(arena: Arena, wishes: Wishes, name: str, orders: Sequence[workload.Order], strikes: Sequence[Strike]) -> Result:
    arena.start()
    began = time.monotonic()
    arena.dispatch(orders)
    pending = {"strikes": len(strikes)}
    for strike in strikes:
        arena.loop.spawn(_strike(arena, strike, pending), strike.at_s)
    arena.loop.spawn(_progress(arena, pending.values, len(orders), wishes))
    if not arena.loop.run_until(lambda: pending["strikes"] == 0, wishes.seconds + 60):
        raise Trouble("a nemesis does not end")
    arena.heal()
    healed_at = book.now()
    backlog = arena.history.waiting() + len(orders) - len(arena.history.attempts)
    bound_s = wishes.bound_s or 20 + 3 * wishes.lease_s + backlog * SLOW / arena.setting.inline + arena.lost_wall_s
    standing = _end(arena, bound_s)
    took_s = max(0.0, _last_end(arena) - healed_at)
    done = Counter(strike.nemesis for strike in strikes)
    return _result(arena, wishes, name, standing, done, time.monotonic() - began, bound_s, took_s, {})


def _strike(arena: Arena, strike: Strike, pending: dict[str, int]) -> Steps:
    arena.detail(f"{book.now() - arena.began_at:8.2f}  {strike.nemesis} {strike.target} begins")
    yield from nemeses.NEMESES[strike.nemesis].steps(arena, strike)
    pending["strikes"] -= 1


def _end(arena: Arena, bound_s: float) -> tuple[Mapping[str, str], list[str]]:
    """Wait for the end of all jobs, then stop everything; what stands in the broker then, and the mishaps of the run."""
    arena.wait_until_empty(bound_s)
    mishaps = arena.stop()
    return next(iter(arena.configs.values())).left(), mishaps


def _result(
    arena: Arena, wishes: Wishes, name: str, standing: tuple[Mapping[str, str], list[str]], strikes: Counter[str], took_s: float,
    bound_s: float, needed_s: float, more: Mapping[str, str],
) -> Result:  # fmt: skip
    left, mishaps = standing
    if needed_s > bound_s:
        mishaps.append(f"the last job ended after {needed_s:.1f} s, and was to end within {bound_s:.0f} s")
    return Result(
        name, wishes.broker, wishes.seed, wishes.command, arena.judge(left), strikes, arena.lacking, mishaps, took_s, needed_s,
        bound_s, more,
    )  # fmt: skip


def _last_end(arena: Arena) -> float:
    """CLOCK_MONOTONIC of the last job's last mark."""
    runs = [run for each in arena.history.runs().values() for run in each]
    return max((run.ended or run.started for run in runs), default=book.now())


def _until(arena: Arena, over: Callable[[], bool], timeout_s: float, must: bool = True) -> bool:
    reached = arena.loop.run_until(over, timeout_s)
    if must and not reached:
        raise Trouble(f"{len(arena.history.finished)} jobs have finished, and no more do")
    return reached


def _progress(arena: Arena, pending: Callable[[], Iterable[int]], orders: int, wishes: Wishes) -> Steps:
    """A line that is written over, on a terminal."""
    while sys.stderr.isatty():
        history = arena.history
        deaths = sum(service.deaths for service in arena.services)
        text = (
            f"{wishes.broker}: {book.now() - arena.began_at:5.0f} s  {len(history.returned)}/{orders} dispatched  "
            f"{history.started} runs  {len(history.finished)} finished  {deaths} deaths  {sum(pending())} to come"
        )
        sys.stderr.write(f"\r\x1b[K{text:.120}")
        sys.stderr.flush()
        yield PROGRESS_S


def _disk_mib(wishes: Wishes) -> int:
    """Room for everything and as much again: an AOF keeps all that was ever written, some 3 KiB a job."""
    return max(64, wishes.jobs * 12 // 1024)


# -- cut-every-byte ---------------------------------------------------------------------------------------------------


def _trickle(wishes: Wishes) -> list[workload.Order]:
    """Jobs by the handful, so that replies carry one or a few of them."""
    jobs = workload.uniform(int(wishes.seconds * TRICKLE), 0.01)
    return [
        job._replace(at_s=number // HANDFUL * HANDFUL / TRICKLE, queue=workload.QUEUES[number % len(workload.QUEUES)])
        for number, job in enumerate(jobs)
    ]


def _provoke(arena: Arena, walk: Walk, walkers: Mapping[str, Walker]) -> Steps:
    """Make new connections for what is said once in each, and in the end new daemons for what is said once in their lives."""
    while left := walk.left():
        if not left.keys() & AT_CONNECT:
            for walker in walkers.values():
                walker.kinds = AT_WORK | AT_START
        for name, walker in walkers.items():
            if name == CLIENTS or not walker.alive:
                continue
            if left.keys() & AT_CONNECT & set(walker.kinds):
                arena.proxies[name].cut_all()
            elif left.keys() <= AT_START:
                walker.renew()
                nemeses.kill(arena, arena.daemons[name], "kill-daemon")
        yield 0.05


def _save_cuts(arena: Arena) -> None:
    """Into the directory that is kept: each cut, and each renewal."""
    lines = []
    for name, proxy in arena.proxies.items():
        lines += [f"{cut.at:.3f} {name} {cut.kind} {cut.offset} of {cut.length}\n" for cut in proxy.cuts]
        lines += [f"{at:.3f} {name} renews\n" for at in proxy.renewed_at]
    (arena.directory / "cuts").write_text("".join(sorted(lines)))
