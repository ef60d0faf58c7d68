"""One run's surroundings: a broker, daemons, dispatchers, the book, and what was inflicted. Made and unmade here."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from . import book, checker
from .checker import Fault, History, Verdict
from .disk import SmallDisk
from .fakeclock import FakeClock, NoFakeClock, build
from .proxy import Proxy, names
from .workload import Order, save
from .world import HERE, START_S, Config, Daemon, Loop, Redis, Service, Trouble, survivors

CLIENTS: Final = "clients"  # the proxy of the dispatchers
DISK_MIB: Final = 64
SILENT_LEASES: Final = 2  # without a renewal, and with nothing that hinders it: a daemon that has dropped out


class Setting(NamedTuple):
    """What a scenario wants. Times in seconds."""

    broker: str  # "redis" or "sqlite"
    seed: int
    lease_s: float
    daemons: int = 2
    dispatchers: int = 2
    inline: int = 60  # slots of each daemon
    isolated: int = 4
    disk_mib: int = DISK_MIB  # 0: no disk that can be filled
    clock: bool = False  # whether wall clocks can be made to jump
    proxies: bool = True  # between Redis and everybody else


class Arena:
    """Everything of a run. Use it in a `with`: whatever it started is gone afterwards, and its directory too, unless `keep`."""

    def __init__(self, setting: Setting, keep: bool, say: Callable[[str], None], verbose: bool = False) -> None:
        self.setting = setting
        self.say = say
        self.detail = say if verbose else lambda text: None
        self.loop = Loop()
        self.history = History()
        self.faults: list[Fault] = []
        self.lacking: dict[str, str] = {}  # nemesis -> why it cannot be had
        self.daemons: dict[str, Daemon] = {}
        self.dispatchers: list[Service] = []
        self.redis: Redis | None = None
        self.proxies: dict[str, Proxy] = {}
        self.disk: SmallDisk | None = None
        self.clocks: dict[str, FakeClock] = {}
        self.configs: dict[str, Config] = {}
        self.began_at = 0.0  # CLOCK_MONOTONIC, of the first dispatch
        self.disk_is_full = False
        self.lost_wall_s = 0.0  # by how much wall clocks were set back
        self._stopped_at = float("inf")  # CLOCK_MONOTONIC: when all that still ran was told to end
        self._keep = keep
        self._stack = ExitStack()

    def __enter__(self) -> Arena:
        try:
            self._set_up()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._stack.close()

    # -- making it --------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        setting = self.setting
        self.directory = Path(tempfile.mkdtemp(prefix="kqueue-chaos-")).resolve()
        self._stack.callback(self._remove)
        self.book_path = self.directory / "book"
        self._reader = book.Reader(str(self.book_path))
        self._stack.callback(self._reader.close)
        self.loop.on_tick.append(self.read_book)
        data = self._data_directory()
        self._make_clocks()
        if setting.broker == "redis":
            self.redis = _OwnRedis(self, data / "redis")
            self._stack.callback(self.redis.close)
            self.redis.start()
        for name in [chr(ord("a") + number) for number in range(setting.daemons)]:
            self._add_daemon(name, data)
        self.client_url = self._url(CLIENTS, data)

    def _data_directory(self) -> Path:
        if self.setting.disk_mib:
            disk = self._stack.enter_context(SmallDisk(self.directory / "disk", self.setting.disk_mib))
            if not disk.why_not:
                self.disk = disk
                return disk.directory
            self.lacking["full-disk"] = disk.why_not
        data = self.directory / "data"
        data.mkdir()
        return data

    def _make_clocks(self) -> None:
        if not self.setting.clock:
            return
        try:
            library = build(self.directory)
        except NoFakeClock as why:
            self.lacking["jump"] = str(why)
            return
        alone = ["redis", *(chr(ord("a") + number) for number in range(self.setting.daemons)), CLIENTS]
        shared = FakeClock(self.directory / "clock", library)  # processes that share a file share the host's clock
        for name in alone:
            own = self.setting.broker == "redis" and name != CLIENTS
            self.clocks[name] = FakeClock(self.directory / f"clock-{name}", library) if own else shared

    def environment(self, name: str) -> Mapping[str, str]:
        clock = self.clocks.get(name)
        own = {book.PATH_VARIABLE: str(self.book_path), "PYTHONPATH": str(HERE.parent)}
        return {**own, **(clock.environment if clock else {})}

    def _url(self, name: str, data: Path) -> str:
        """The broker as `name` sees it."""
        if self.redis is None:
            return f"sqlite:///{data}/kqueue.db"
        port = self.redis.port
        if self.setting.proxies:
            proxy = self.proxies[name] = Proxy(port, names())
            self._stack.callback(proxy.stop)
            port = proxy.port
        return f"redis://127.0.0.1:{port}/0"

    def _add_daemon(self, name: str, data: Path) -> None:
        setting = self.setting
        config = Config(self.directory, name, self._url(name, data), setting.lease_s, setting.inline, setting.isolated)
        command = [sys.executable, "-m", "kqueue.cli.kqueued", "-c", str(config.path)]
        daemon = Daemon(self.loop, name, command, self.environment(name), config.directory / "log")
        daemon.history = self.history
        self._stack.callback(daemon.close)
        self.configs[name], self.daemons[name] = config, daemon

    def _remove(self) -> None:
        if self._keep:
            self.say(f"kept {self.directory}")
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    # -- running it -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Daemons, until each takes commands."""
        if self.redis is not None and not self.loop.run_until(self.redis.answers, START_S):
            raise Trouble(f"Redis does not answer: {self.redis.log.read_text(errors='replace')[-500:]}")
        for daemon in self.daemons.values():
            daemon.start()
        if not self.loop.run_until(lambda: all(config.socket.exists() for config in self.configs.values()), START_S):
            logs = "\n".join(daemon.log.read_text(errors="replace")[-500:] for daemon in self.daemons.values())
            raise Trouble(f"the daemons do not come up:\n{logs}")

    def dispatch(self, orders: Sequence[Order]) -> None:
        """Have these dispatched from now on, by all dispatchers together."""
        self.began_at = book.now()
        shares = self.setting.dispatchers
        for number in range(shares):
            file = self.directory / f"orders-{number}"
            save(orders[number::shares], file)
            command = [sys.executable, "-m", "chaos_app.dispatcher", str(file), self.client_url, str(self.began_at)]
            log = self.directory / f"dispatcher-{number}.log"
            dispatcher = Service(self.loop, f"d{number}", command, self.environment(CLIENTS), log, ends=True)
            self._stack.callback(dispatcher.close)
            self.dispatchers.append(dispatcher)
            dispatcher.start()

    def read_book(self) -> None:
        self.history.add(self._reader.more())

    @property
    def services(self) -> list[Service]:
        return [*self.daemons.values(), *self.dispatchers, *([self.redis] if self.redis else [])]

    def inflict(
        self, how: str, nemesis: str, began: float, ended: float | None = None, daemon: str = "", pid: int = 0
    ) -> None:
        self.faults.append(Fault(how, nemesis, began, book.now() if ended is None else ended, daemon, pid))

    def heal(self) -> None:
        """Undo whatever a nemesis may have left behind."""
        for proxy in self.proxies.values():
            proxy.heal()
        if self.disk is not None:
            self.disk.free()
            self.disk_is_full = False
        for service in self.services:
            service.send(signal.SIGCONT)
            if service.wanted or service is self.redis:
                service.start()

    def is_idle(self) -> bool:
        """Whether, as far as the book tells, everything is over."""
        return all(dispatcher.over for dispatcher in self.dispatchers) and self.history.waiting() == 0

    # -- ending it --------------------------------------------------------------------------------------------------

    def wait_until_empty(self, bound_s: float) -> Mapping[str, str]:
        """Until nothing but the dead stands in the broker, at most `bound_s` seconds; what stands there."""
        deadline = time.monotonic() + bound_s
        self.loop.run_until(self.is_idle, bound_s)
        config = next(iter(self.configs.values()))
        while True:
            left = config.left()
            if all(state == "dead" for state in left.values()) or time.monotonic() > deadline:
                return left
            self.loop.run_until(lambda: False, 0.3)

    def stop(self) -> list[str]:
        """End all that runs, as an operator would; what went wrong by itself in all of the run."""
        self._stopped_at = book.now()
        dropped_out = self._dropped_out()
        for daemon in self.daemons.values():
            daemon.stop()
        for dispatcher in self.dispatchers:
            dispatcher.stop()
        self.loop.run_until(lambda: False, 0.2)  # accusations
        mishaps = [mishap for service in self.services for mishap in service.mishaps]
        outlived = survivors(self.book_path, but=self.redis.pid if self.redis is not None else 0)
        return [*mishaps, *dropped_out, *(f"it outlived its daemon: {each}" for each in outlived)]

    def judge(self, left: Mapping[str, str]) -> Verdict:
        self.read_book()
        restarts = {label: at for daemon in self.daemons.values() for label, at in daemon.started_at.items()}
        lease_s = self.setting.lease_s
        renewals = self._renewals() if self.proxies else {}
        if self.proxies:
            faults = [*self.faults, *checker.silences(renewals, self.faults, lease_s)]
        else:
            faults = [*self.faults, *checker.absences(self.faults, lease_s)]
        if self._keep:
            faults_file = self.directory / "faults"
            faults_file.write_text("".join(f"{fault}\n" for fault in sorted(faults, key=lambda fault: fault.began)))
        return checker.judge(self.history, faults, left, restarts, renewals=renewals)

    def _dropped_out(self) -> list[str]:
        """Daemons that live and renew nothing any more, though nothing was done to them for so long; proxies that have died."""
        found = [f"the harness' own fault: the proxy of {name} has died" for name, proxy in self.proxies.items() if proxy.dead]
        for daemon in (daemon for daemon in self.daemons.values() if daemon.alive and daemon.name in self.proxies):
            troubled = [fault.ended for fault in self.faults if fault.daemon in ("", daemon.label)]
            since = max([daemon.started_at[daemon.label], *troubled, *self.proxies[daemon.name].renewed_at[-1:]])
            if self._stopped_at - since > SILENT_LEASES * self.setting.lease_s:
                found.append(f"{daemon.label} has renewed nothing since {since:.3f}, for {self._stopped_at - since:.1f} s")
        return found

    def _renewals(self) -> dict[str, list[float]]:
        """By daemon: when it started, when its renewals went to Redis (its proxy saw them), and when another took its place."""
        found: dict[str, list[float]] = {}
        for name, daemon in self.daemons.items():
            lives = list(daemon.started_at.items())
            ends = [*(at for _, at in lives[1:]), self._stopped_at]
            for (label, began), ended in zip(lives, ends, strict=True):
                found[label] = [began, *(at for at in self.proxies[name].renewed_at if began < at < ended)]
                found[label] += [ended] if ended < float("inf") else []
        return found


class _OwnRedis(Redis):
    """May end when its disk is full: with AOF always it does, since it could not keep its word."""

    def __init__(self, arena: Arena, directory: Path) -> None:
        self._arena = arena
        super().__init__(arena.loop, directory, arena.directory / "redis.log", arena.environment("redis"))

    def is_pardoned(self, label: str, status: int) -> bool:
        return self._arena.disk_is_full
