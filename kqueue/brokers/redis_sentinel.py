"""Where the master is: the Sentinels are asked, one after the other, until one knows.

Each time another one is asked first. So one that is wrong (it was cut off, and names an old master) does not keep us there:
the transport leaves again who is no master, and the next one is asked.
"""

from __future__ import annotations

from ..errors import BrokerRefused, BrokerUnavailable
from .base import Verb
from .commands.redis_asking import master_of, read_master
from .commands.redis_url import Address, Target
from .redis_wire import Clock, errand


class Sentinels:
    """Those that `target` names."""

    def __init__(self, target: Target, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._next = 0

    def locate(self, timeout_s: float) -> Verb[Address]:
        """The master's address, within `timeout_s` seconds.

        BrokerUnavailable: none of them can be reached; BrokerRefused: all that can do not know the service, or do not let us ask.
        """
        target = self._target
        hosts = [target.hosts[(self._next + n) % len(target.hosts)] for n in range(len(target.hosts))]
        self._next += 1
        deadline = self._clock() + timeout_s
        trouble, refused = [], True
        for place, address in enumerate(hosts):
            share_s = max(0.0, deadline - self._clock()) / (len(hosts) - place)
            try:
                reply = yield from errand(target.sentinel(address), master_of(target.service), share_s, self._clock)
            except BrokerUnavailable as error:
                trouble.append(str(error))
                refused = False
                continue
            found = read_master(reply)
            if isinstance(found, tuple):
                return found
            trouble.append(f"{address[0]}:{address[1]}: {found}")
        words = f"no Sentinel names the master of {target.service!r}: {'; '.join(trouble)}"
        raise (BrokerRefused if refused else BrokerUnavailable)(f"{target.address}: {words}")
