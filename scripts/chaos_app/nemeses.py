"""What is done to the system: each nemesis is a generator, and the schedule is drawn from the seed.

A nemesis reports what it did to the arena as a fault, so that the checker knows what to hold against the system and what not.
Those that only trouble (a cut, a full disk, a clock that jumps) excuse no second run at all.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from . import book
from .arena import CLIENTS, Arena
from .checker import KILL, STOP, TROUBLE
from .world import Service, Steps, descendants

PAIR: Final = ("a", "b")
EVERYBODY: Final = "everybody"
CHILD_PATIENCE_S: Final = 1.5  # for a job's process to appear
REDIS_AT_CLIENT: Final = (*PAIR, CLIENTS)


class Strike(NamedTuple):
    """One blow. `draw`: 0 to 1, for what can only be chosen when it falls."""

    at_s: float
    nemesis: str
    target: str
    seconds: float
    draw: float

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.2f} s" if self.seconds else ""
        return f"{self.at_s:8.2f}  {self.nemesis} {self.target}{lasting}"


class Nemesis(NamedTuple):
    does: str  # in words
    steps: Callable[[Arena, Strike], Steps]
    brokers: str = "redis sqlite"
    targets: Sequence[str] = PAIR
    leases: tuple[float, float] | None = None  # how long it lasts, in leases; None: it is over at once


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def kill_child(arena: Arena, strike: Strike) -> Steps:
    waited_s = 0.0
    while waited_s < CHILD_PATIENCE_S:
        for daemon in _both(arena, strike.target):
            children = titled(daemon.pid, "kqueued: job")
            if children:
                pid = children[int(strike.draw * len(children))]
                label, began = daemon.label, book.now()
                yield from _kill_pid(pid)
                arena.inflict(KILL, strike.nemesis, began, daemon=label, pid=pid)
                return
        waited_s += 0.01
        yield 0.01


def kill_template(arena: Arena, strike: Strike) -> Steps:
    daemon = arena.daemons[strike.target]
    for pid in titled(daemon.pid, "kqueued: template"):
        label, began = daemon.label, book.now()
        yield from _kill_pid(pid)
        arena.inflict(KILL, strike.nemesis, began, daemon=label, pid=pid)


def kill_daemon(arena: Arena, strike: Strike) -> Steps:
    kill(arena, arena.daemons[strike.target], strike.nemesis)
    return
    yield 0.0


def kill_redis(arena: Arena, strike: Strike) -> Steps:
    assert arena.redis is not None
    began = book.now()
    arena.redis.kill(strike.nemesis)
    yield from _redis_back(arena)
    arena.inflict(TROUBLE, strike.nemesis, began)


def kill_dispatcher(arena: Arena, strike: Strike) -> Steps:
    number = int(strike.draw * len(arena.dispatchers))
    arena.dispatchers[number].kill(strike.nemesis)
    return
    yield 0.0


def kill_all(arena: Arena, strike: Strike) -> Steps:
    began = book.now()
    labels = [daemon.label for daemon in arena.daemons.values() if daemon.alive]
    for service in arena.services:  # first all signals, then all waits
        service.send(signal.SIGKILL, strike.nemesis)
    for service in arena.services:
        service.kill(strike.nemesis)
    for label in labels:
        arena.inflict(KILL, strike.nemesis, began, daemon=label)
    if arena.redis is not None:
        ended = book.now()
        yield from _redis_back(arena)
        arena.inflict(TROUBLE, strike.nemesis, ended)


def kill(arena: Arena, daemon: Service, nemesis: str) -> None:
    label = daemon.label
    killed = daemon.kill(nemesis)
    if killed is not None:
        arena.inflict(KILL, nemesis, *killed, daemon=label)


# -- stopping ---------------------------------------------------------------------------------------------------------


def restart(arena: Arena, strike: Strike) -> Steps:
    """As a deploy does: SIGTERM, and another one."""
    daemon = arena.daemons[strike.target]
    label, began = daemon.label, book.now()
    if not daemon.send(signal.SIGTERM, "told to stop"):
        return
    while daemon.alive and daemon.label == label:
        yield 0.02
    arena.inflict(STOP, strike.nemesis, began, daemon=label)


def pause(arena: Arena, strike: Strike) -> Steps:
    """SIGSTOP of the supervisor, its children run on; or, by the draw, of the whole tree."""
    daemon = arena.daemons[strike.target]
    process, label, began = daemon.process, daemon.label, book.now()
    if process is None:
        return
    stopped = [process.pid, *(descendants(process.pid) if strike.draw < 0.5 else [])]
    for pid in stopped:
        _signal(pid, signal.SIGSTOP)
    left_s = strike.seconds
    while left_s > 0 and daemon.process is process:
        yield min(left_s, 0.05)
        left_s -= 0.05
    for pid in stopped if daemon.process is process else stopped[1:]:  # what it left behind must hear that it is dead
        if _state(pid) == "T":
            _signal(pid, signal.SIGCONT)
    arena.inflict(TROUBLE, strike.nemesis, began, daemon=label)


def pause_redis(arena: Arena, strike: Strike) -> Steps:
    assert arena.redis is not None
    process, began = arena.redis.process, book.now()
    if process is None:
        return
    process.send_signal(signal.SIGSTOP)
    yield strike.seconds
    if arena.redis.process is process:
        process.send_signal(signal.SIGCONT)
    arena.inflict(TROUBLE, strike.nemesis, began)


def redis_away(arena: Arena, strike: Strike) -> Steps:
    assert arena.redis is not None
    began = book.now()
    arena.redis.wanted = False
    arena.redis.kill(strike.nemesis)
    yield strike.seconds
    arena.redis.start()
    yield from _redis_back(arena)
    arena.inflict(TROUBLE, strike.nemesis, began)


# -- the connection ---------------------------------------------------------------------------------------------------


def cut(arena: Arena, strike: Strike) -> Steps:
    """Within replies, and within requests, at bytes by chance."""
    random = Random(strike.draw)
    proxy = arena.proxies[strike.target]

    def choose(kind: str, length: int) -> int | None:
        return random.randint(0, length) if random.random() < 0.25 else None

    yield from _wrong(arena, strike, lambda: (setattr(proxy, "choose", choose), setattr(proxy, "choose_request", choose)))


def swallow(arena: Arena, strike: Strike) -> Steps:
    proxy = arena.proxies[strike.target]
    yield from _wrong(arena, strike, lambda: setattr(proxy, "mute", True))


def delay(arena: Arena, strike: Strike) -> Steps:
    proxy = arena.proxies[strike.target]
    yield from _wrong(arena, strike, lambda: setattr(proxy, "delay_s", 0.02 + 0.4 * strike.draw))


def split(arena: Arena, strike: Strike) -> Steps:
    proxy = arena.proxies[strike.target]
    yield from _wrong(arena, strike, lambda: proxy.hold(True))


def _wrong(arena: Arena, strike: Strike, begin: Callable[[], object]) -> Steps:
    """`begin` something at the target's proxy, and heal it in time. Every daemon that lived through it was troubled by it."""
    labels: set[str] = set()
    began, left_s = book.now(), strike.seconds
    begin()
    while left_s > 0:
        labels |= {arena.daemons[strike.target].label} if strike.target in arena.daemons else set()
        yield min(left_s, 0.05)
        left_s -= 0.05
    arena.proxies[strike.target].heal()
    for label in labels:
        arena.inflict(TROUBLE, strike.nemesis, began, daemon=label)


# -- what is around ---------------------------------------------------------------------------------------------------


def full_disk(arena: Arena, strike: Strike) -> Steps:
    assert arena.disk is not None
    began, left_s = book.now(), strike.seconds
    arena.disk_is_full = True
    while left_s > 0:
        arena.disk.fill()  # again and again: what dies gives some back
        yield min(left_s, 0.05)
        left_s -= 0.05
    arena.disk.free()
    if arena.redis is not None:
        yield from _redis_back(arena)
    arena.disk_is_full = False
    arena.inflict(TROUBLE, strike.nemesis, began)


def flush(arena: Arena, strike: Strike) -> Steps:
    """Everything that Redis holds is gone. No queue can survive that: it shows that the checker convicts."""
    assert arena.redis is not None
    with suppress(OSError), socket.create_connection(("127.0.0.1", arena.redis.port), timeout=5) as connection:
        connection.sendall(b"FLUSHALL SYNC\r\n")
        connection.recv(64)
    return
    yield 0.0


def jump(arena: Arena, strike: Strike) -> Steps:
    """The wall clock is set, and stays so: forward by up to an hour, or back by up to two leases."""
    names = [name for name in arena.clocks if strike.target in (EVERYBODY, name) or arena.redis is None]
    lease_s = arena.setting.lease_s
    by_s = round(strike.draw * 5400 - 1800)
    if by_s < 0:
        by_s = -round(2 * lease_s * by_s / -1800)
        arena.lost_wall_s -= by_s
    for clock in {id(arena.clocks[name]): arena.clocks[name] for name in names}.values():
        clock.jump(clock.offset_s + by_s)
    arena.detail(f"          the clock of {', '.join(names)}: {by_s:+d} s")
    return
    yield 0.0


_HOLD_LOCK = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
db.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


def lock(arena: Arena, strike: Strike) -> Steps:
    """Another process holds the file's write lock."""
    path = arena.client_url.removeprefix("sqlite:///")
    began = book.now()
    with subprocess.Popen([sys.executable, "-c", _HOLD_LOCK, path, str(strike.seconds)], stdout=subprocess.DEVNULL) as holder:
        while holder.poll() is None:
            yield 0.02
    arena.inflict(TROUBLE, strike.nemesis, began)


# -- parts ------------------------------------------------------------------------------------------------------------


def titled(pid: int, title: str) -> list[int]:
    """Descendants of `pid` whose command line begins so."""
    found = []
    for each in descendants(pid) if pid else []:
        with suppress(OSError):
            if Path(f"/proc/{each}/cmdline").read_bytes().startswith(title.encode()):
                found.append(each)
    return found


def _both(arena: Arena, first: str) -> list[Service]:
    return sorted((daemon for daemon in arena.daemons.values() if daemon.alive), key=lambda daemon: daemon.name != first)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_pid(pid: int) -> Steps:
    """SIGKILL, until it is gone or a zombie."""
    _signal(pid, signal.SIGKILL)
    for _ in range(500):
        if _state(pid) in ("Z", "X", ""):
            return
        yield 0.002


def _state(pid: int) -> str:
    """The letter that ps shows; "": there is no such process."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _redis_back(arena: Arena) -> Steps:
    assert arena.redis is not None
    for _ in range(1000):
        if arena.redis.answers():
            return
        yield 0.02


NEMESES: Final[dict[str, Nemesis]] = {
    "kill-child": Nemesis("SIGKILL of a job's process", kill_child),
    "kill-template": Nemesis("SIGKILL of a daemon's template", kill_template),
    "kill-daemon": Nemesis("SIGKILL of a daemon", kill_daemon),
    "kill-redis": Nemesis("SIGKILL of Redis (AOF always)", kill_redis, "redis", ("redis",)),
    "kill-dispatcher": Nemesis("SIGKILL of a process that dispatches", kill_dispatcher, targets=("dispatcher",)),
    "kill-all": Nemesis("SIGKILL of all of these at once", kill_all, targets=(EVERYBODY,)),
    "restart": Nemesis("SIGTERM of a daemon, as a deploy does", restart),
    "pause": Nemesis("SIGSTOP of a daemon beyond its lease", pause, leases=(1.2, 1.8)),
    "blink": Nemesis("SIGSTOP of a daemon, within its lease", pause, leases=(0.05, 0.3)),
    "pause-redis": Nemesis("SIGSTOP of Redis", pause_redis, "redis", ("redis",), (0.2, 1.6)),
    "away": Nemesis("Redis dead for longer than a lease", redis_away, "redis", ("redis",), (1.1, 1.6)),
    "cut": Nemesis("cuts within replies and requests, at any byte", cut, "redis", REDIS_AT_CLIENT, (0.2, 0.45)),
    "swallow": Nemesis("replies are swallowed", swallow, "redis", REDIS_AT_CLIENT, (0.1, 1.6)),
    "delay": Nemesis("replies come late", delay, "redis", REDIS_AT_CLIENT, (0.2, 0.45)),
    "split": Nemesis("the network splits one off from Redis", split, "redis", REDIS_AT_CLIENT, (0.2, 1.8)),
    "lock": Nemesis("another process holds SQLite's lock", lock, "sqlite", ("file",), (0.1, 1.5)),
    "full-disk": Nemesis("the broker's disk is full", full_disk, targets=("disk",), leases=(0.2, 1.2)),
    "flush": Nemesis("FLUSHALL, only when named: jobs are lost, and the run must say so", flush, "redis", ("redis",)),
    "jump": Nemesis("a wall clock is set, for good", jump, targets=(*PAIR, "redis", EVERYBODY)),
}


def available(broker: str, chosen: Collection[str] = ()) -> list[str]:
    """Those of `chosen` (empty: all that can be survived) that there are for `broker`."""
    mine = [name for name, nemesis in NEMESES.items() if broker in nemesis.brokers.split()]
    return [name for name in mine if (name in chosen if chosen else name != "flush")]


def schedule(seed: int, names: Iterable[str], seconds: float, lease_s: float, pause_s: float) -> list[Strike]:
    """Strikes for `seconds`. Each of `names` comes once before any comes twice; `pause_s`: between two of them, on average."""
    random = Random(f"{seed} nemeses")
    strikes: list[Strike] = []
    at_s, bag = 0.5, list[str]()
    names = list(names)
    while names:
        if not bag:
            bag = random.sample(names, len(names))
        name = bag.pop()
        nemesis = NEMESES[name]
        lasts_s = lease_s * random.uniform(*nemesis.leases) if nemesis.leases else 0.0
        if at_s + lasts_s > seconds:
            if at_s > seconds:
                break
            at_s += pause_s
            continue  # a short one may still fit
        strikes.append(Strike(round(at_s, 3), name, random.choice(nemesis.targets), round(lasts_s, 3), random.random()))
        at_s += lasts_s * random.uniform(0.4, 1.1) + random.uniform(0.1, 2 * pause_s)  # some begin while another one lasts
    return strikes
