"""Where the master is: the Sentinels are asked, one after the other, until one knows; and one of them is listened to.

Rule 1. Each time another one is asked first. So one that is wrong (it was cut off, and names an old master) does not keep us
        there: the transport leaves again who is no master, and the next one is asked.
Rule 2. After a planned fail-over the old master takes writes for another ten seconds, and they are lost. So we do not wait for it
        to cut us off, but leave as soon as a Sentinel announces the new one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ..errors import BrokerRefused, BrokerUnavailable
from ..kernel.traps import sleep
from .base import Verb
from .commands.redis_hello import MasterSearch
from .commands.redis_url import Address, Target
from .redis_wire import Clock, connect, errand, login

WATCH_AGAIN_S: Final = 1.0
CONNECT_TIMEOUT_S: Final = 5.0


class Sentinels:
    """Those that `target` names."""

    def __init__(self, target: Target, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._next = 0  # whom to ask first
        self._watched = 0  # whom to listen to

    def locate(self, timeout_s: float) -> Verb[Address]:
        """The master's address, within `timeout_s` seconds.

        BrokerUnavailable: none of them can be reached; BrokerRefused: all that can do not know the service, or do not let us ask.
        """
        target = self._target
        hosts = [target.hosts[(self._next + n) % len(target.hosts)] for n in range(len(target.hosts))]
        self._next += 1
        deadline = self._clock() + timeout_s
        search = MasterSearch(target.service)
        for place, address in enumerate(hosts):
            share_s = max(0.0, deadline - self._clock()) / (len(hosts) - place)
            try:
                reply = yield from errand(target.sentinel(address), search.question, share_s, self._clock)
            except BrokerUnavailable as error:
                search.failed(error)
                continue
            master = search.heard(address, reply)
            if master is not None:
                return master
        raise (BrokerRefused if search.refused else BrokerUnavailable)(f"{target.address}: {search.failure}")

    def watch(self, look: Callable[[], Verb[None]]) -> Verb[None]:
        """Run `look` whenever a Sentinel announces a master, and whenever we may have missed that. Does not return."""
        while True:
            try:
                yield from self._listen(look)
            except (BrokerUnavailable, BrokerRefused):
                self._watched += 1
            yield sleep(WATCH_AGAIN_S)

    def _listen(self, look: Callable[[], Verb[None]]) -> Verb[None]:
        at = self._target.sentinel(self._target.hosts[self._watched % len(self._target.hosts)])
        wire = yield from connect(at, CONNECT_TIMEOUT_S, self._clock)
        try:
            wire.put([*login(at), ("SUBSCRIBE", "+switch-master")])
            while True:
                wire.flush()
                yield from wire.wait()
                for said in wire.read():
                    if isinstance(said, Exception):
                        raise BrokerUnavailable(str(said))
                    if self._concerns_us(said):
                        yield from look()
        finally:
            wire.close()

    def _concerns_us(self, said: Any) -> bool:
        """A confirmed subscription, or the announcement of a master of ours."""
        if not isinstance(said, list):
            return False  # OK, to our password
        return bool(said[0] == b"subscribe" or said[-1].split(b" ")[0] == self._target.service.encode())
