"""Names: what addresses a host has, asked for without blocking, and not twice at a time.

getaddrinfo() knows how this host resolves names (files, DNS, mDNS, a domain's search list) and blocks, so a helper process
calls it (names_helper.py): one for each loop, started with the first name that has to be looked up, and gone when it had
nothing to do for a minute. The daemon has no threads and the helper has as many as it is asked names at once, so a slow name
costs its own waiters only. Its places are bounded; when slow names hold them all, more helpers are started, a few.

Rule 1. Who asks for a name that is being looked up waits for the same answer.
Rule 2. An answer is kept for KEEP_S seconds, a failure for less. (getaddrinfo tells no TTL.)
Rule 3. When the helper dies, what it had not answered is asked once more of another one.
Rule 4. Who stops waiting leaves. A look-up that has begun goes on, and its answer is kept; one that has not is given up.
Rule 5. The helper has no fd of ours but its socket, none of our environment but what a resolver reads, and ends when we do.
Rule 6. When no helper has a place, another one is started if somebody has waited STUCK_S seconds for his turn, or nobody waits
        any more for what holds a place. When there are MAX_HELPERS, one is ended of which half the places or more are held for
        nobody; what somebody waits for is asked again.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import OrderedDict
from collections.abc import Generator, Iterable
from contextlib import suppress
from signal import SIGKILL
from typing import Any, Final, NamedTuple

from ..kernel.traps import READ, wait_io, wait_process
from .errors import NameNotFound, TimedOut
from .surroundings import Signal, beside, left, local, now, release

Address = tuple[int, Any]  # family, and what connect() takes
Host = tuple[int, str, int]  # family, address, scope (of IPv6)

KEEP_S: Final = 30.0
KEEP_NONE_S: Final = 5.0  # that there is no such name
KEEP_TROUBLE_S: Final = 1.0  # that nobody could be asked
MAX_KEPT: Final = 1024  # names
MAX_ASKED: Final = 256  # names that one helper looks up at once; others wait for their turn
MAX_HELPERS: Final = 4
STUCK_S: Final = 2.0  # that somebody waits for his turn
LONGEST: Final = 253  # characters of a name (RFC 1035)
HELPER: Final = [sys.executable, "-I", "-S", os.path.join(os.path.dirname(os.path.abspath(__file__)), "names_helper.py")]
_FOR_RESOLVERS: Final = ("HOSTALIASES", "LOCALDOMAIN", "RES_OPTIONS", "LANG", "LC_ALL")
_NO_SUCH_NAME: Final = (socket.EAI_NONAME, socket.EAI_NODATA)


class _Known(NamedTuple):
    until: float  # by the loop's clock
    hosts: list[Host]
    failure: str  # "": there is none


class _Asked:
    """A name that is being looked up."""

    __slots__ = ("asked", "name", "since", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.since = now()
        self.asked = 0  # how often a helper was
        self.waiting: list[Signal] = []  # each is set to what is known then


class _Helper:
    """A helper process, and our end of its socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.asked: dict[int, _Asked] = {}  # what it has not answered, by number
        self.is_closed = False
        try:
            self.socket.setblocking(False)
            null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
            environment = {name: os.environ[name] for name in _FOR_RESOLVERS if name in os.environ}
            self.pid = os.posix_spawn(
                HELPER[0], HELPER, {**environment, "MALLOC_ARENA_MAX": "1"}, setpgroup=0, setsigmask=(),
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0), *null],
            )  # fmt: skip
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()

    @property
    def has_room(self) -> bool:
        return len(self.asked) < MAX_ASKED

    @property
    def waited_for(self) -> int:
        """How many of its places somebody waits for."""
        return sum(1 for asked in self.asked.values() if asked.waiting)

    def ask(self, number: int, asked: _Asked) -> bool:
        """False: it does not take it."""
        try:
            self.socket.send(f"{number} {asked.name}".encode())
        except OSError:
            return False
        self.asked[number] = asked
        return True

    def close(self) -> None:
        """End it, and wait for that: it is killed, so that takes no time."""
        if self.is_closed:
            return
        self.is_closed = True
        release(self.socket.fileno())
        self.socket.close()
        with suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(self.pid, os.WNOHANG)[0] == 0:  # it is still ours, so the number is still its own
                os.kill(self.pid, SIGKILL)
                os.waitpid(self.pid, 0)


class Names:
    """The names of one loop."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}  # the oldest first
        self._asked: dict[str, _Asked] = {}
        self._turn: OrderedDict[_Asked, None] = OrderedDict()  # who is to be asked for when a helper has a place
        self._room: Signal | None = None  # by which `_watch` is told that there may be one; None: it does not run
        self._helpers: list[_Helper] = []
        self._number = 0

    def look_up(self, name: str, deadline: float | None) -> Generator[Any, Any, list[Host]]:
        """The addresses of `name`. NameNotFound when there are none, TimedOut at `deadline`."""
        known = self._known.get(name)
        if known is None or known.until <= now():
            known = yield from self._ask(name, deadline)
        if known.failure:
            raise NameNotFound(f"{name} cannot be resolved: {known.failure}")
        return known.hosts

    def close(self) -> None:
        """The loop ends."""
        helpers, self._helpers = self._helpers, []
        for helper in helpers:
            helper.close()

    def _ask(self, name: str, deadline: float | None) -> Generator[Any, Any, _Known]:
        signal = Signal()
        asked = self._asked.get(name)
        if asked is not None:
            asked.waiting.append(signal)
        else:
            asked = self._asked[name] = _Asked(name)
            asked.waiting.append(signal)
            self._turn[asked] = None
            self._go_on()
        try:
            yield from signal.within(left(deadline))
        finally:
            if not signal.is_set:
                self._leave(asked, signal)
        if not signal.is_set:
            raise TimedOut(f"{name} was not resolved in time; see whether the name servers of this host answer")
        known: _Known = signal.value
        return known

    def _leave(self, asked: _Asked, signal: Signal) -> None:
        asked.waiting.remove(signal)
        if asked.waiting:
            return
        if asked in self._turn:
            del self._turn[asked], self._asked[asked.name]
        elif self._room is not None:
            self._room.set()  # not `_go_on` here: the loop may be about to end

    def _go_on(self) -> None:
        """Ask for those whose turn it is."""
        while self._turn:
            if next(iter(self._turn)).asked > 1:
                self._give_up("the process that looks names up died twice over it")
                continue
            try:
                helper = self._helper_with_room()
            except OSError as error:
                self._give_up(f"the process that looks names up cannot be started: {error.strerror or error}")
                continue
            if helper is None:
                self._watch_on()
                return
            asked, _ = self._turn.popitem(last=False)
            self._number += 1
            if not helper.ask(self._number, asked):
                self._first([asked])  # it has just ended, as `_listen` is about to find out, or its socket is full for a moment
                self._watch_on()
                return
            asked.asked += 1

    def _give_up(self, why: str) -> None:
        """Whose turn it is learns that nobody can be asked."""
        asked, _ = self._turn.popitem(last=False)
        self._answer(asked, _Known(now() + KEEP_TROUBLE_S, [], why))

    def _helper_with_room(self) -> _Helper | None:
        """None: those whose turn it is have to wait. OSError when none can be started. See Rule 6."""
        for helper in self._helpers:
            if helper.has_room:
                return helper
        if not self._helpers:
            return self._start()
        emptiest = min(self._helpers, key=lambda helper: helper.waited_for)
        if emptiest.waited_for == MAX_ASKED and now() - next(iter(self._turn)).since < STUCK_S:
            return None
        if len(self._helpers) < MAX_HELPERS:
            return self._start()
        if emptiest.waited_for > MAX_ASKED // 2:
            return None
        for asked in emptiest.asked.values():
            asked.asked -= 1  # it is not what ends the helper
        self._retire(emptiest)
        emptiest.close()
        return self._start()

    def _watch_on(self) -> None:
        if self._room is None:
            self._room = Signal()
            beside(self._watch(self._room), "turns of names")

    def _watch(self, room: Signal) -> Generator[Any, Any, None]:
        """As long as somebody waits for his turn: see whether a place can be had in another way than by an answer."""
        while self._turn:
            waited_s = now() - next(iter(self._turn)).since
            yield from room.within(STUCK_S - waited_s if waited_s < STUCK_S else STUCK_S)
            room = self._room = Signal()
            self._go_on()
        self._room = None

    def _first(self, again: Iterable[_Asked]) -> None:
        """They are the first to be asked for, in their order."""
        for asked in reversed(list(again)):
            self._turn[asked] = None
            self._turn.move_to_end(asked, last=False)

    def _retire(self, helper: _Helper) -> None:
        """It answers no more. What nobody waits for is given up; the rest is to be asked again."""
        self._helpers.remove(helper)
        for asked in helper.asked.values():
            if not asked.waiting:
                del self._asked[asked.name]
        self._first(asked for asked in helper.asked.values() if asked.waiting)

    def _start(self) -> _Helper:
        helper = _Helper()
        self._helpers.append(helper)
        beside(self._listen(helper), "names")
        return helper

    def _listen(self, helper: _Helper) -> Generator[Any, Any, None]:
        while True:
            yield from wait_io(helper.socket.fileno(), READ)
            if helper.is_closed:
                return
            try:
                data = helper.socket.recv(65536)
            except BlockingIOError:
                continue
            except OSError:
                break
            if not data:
                break
            self._learn(helper, data.decode())
            self._go_on()
        self._retire(helper)
        yield from wait_process(helper.pid)
        helper.close()
        self._go_on()

    def _learn(self, helper: _Helper, answer: str) -> None:
        head, *lines = answer.split("\n")
        number, status, *why = head.split(" ", 2)
        asked = helper.asked.pop(int(number))
        if status == "ok" and lines:
            known = _Known(now() + KEEP_S, [_host(line) for line in lines], "")
        elif status == "ok":
            known = _Known(now() + KEEP_NONE_S, [], "it has no address")
        else:
            keep_s = KEEP_NONE_S if status.lstrip("-").isdigit() and int(status) in _NO_SUCH_NAME else KEEP_TROUBLE_S
            known = _Known(now() + keep_s, [], " ".join(why) or "nobody knows why")
        self._answer(asked, known)

    def _answer(self, asked: _Asked, known: _Known) -> None:
        del self._asked[asked.name]
        self._known.pop(asked.name, None)
        self._known[asked.name] = known
        while len(self._known) > MAX_KEPT:
            del self._known[next(iter(self._known))]
        waiting, asked.waiting = asked.waiting, []
        for signal in waiting:
            signal.set(known)


def _host(line: str) -> Host:
    family, address, *scope = line.split()
    return (socket.AF_INET, address, 0) if family == "4" else (socket.AF_INET6, address, int(scope[0]))


def addresses_of(host: str, port: int, deadline: float | None) -> Generator[Any, Any, list[Address]]:
    """What to connect to for `port` of `host`. Addresses and "localhost" need nobody to be asked."""
    found = _numeric(host)
    if found is None:
        if not 0 < len(host.encode("utf-8", "replace")) <= LONGEST or not host.isprintable() or " " in host:
            raise NameNotFound(f"{host!r:.80} is no name that a host could have")
        found = yield from local(Names).look_up(host, deadline)
    return [(family, (at, port)) if family == socket.AF_INET else (family, (at, port, 0, scope)) for family, at, scope in found]


def shown(host: str, port: int) -> str:
    """As messages have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _numeric(host: str) -> list[Host] | None:
    """None: it is a name."""
    if host.lower() in ("localhost", "localhost."):
        return [(socket.AF_INET, "127.0.0.1", 0), (socket.AF_INET6, "::1", 0)]
    address, _, zone = host.partition("%")
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError, ValueError):
            socket.inet_pton(family, address)
            return [(family, address, _scope(zone))]
    return None


def _scope(zone: str) -> int:
    """The number of a zone such as eth0, which fe80::1%eth0 is in; OSError when there is none."""
    return 0 if not zone else int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
