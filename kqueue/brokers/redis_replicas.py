"""Waiting for replicas: how many of them have what one connection wrote (`queue.sync_replicas`).

Rule 1. WAIT holds up everything behind it on its connection, so there is one at a time, for all that was written before it: those
        who ask while one is under way share the next one.
Rule 2. An answer counts only for what the same connection wrote: after a fail-over another server answers, which may not have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BrokerUnavailable
from ..kernel.slots import Slots
from .base import Verb
from .commands.redis_asking import last_word, sync
from .commands.redis_mend import Arg

if TYPE_CHECKING:
    from .redis_transport import RedisTransport


class Replicas:
    """Those of the server that `transport` is connected to."""

    def __init__(self, transport: RedisTransport) -> None:
        self._transport = transport
        self._turn = Slots()
        self._written = 0  # counts those who asked
        self._synced = 0  # of them, those whom the last WAIT was for
        self._held_by: Any = None  # what it was answered

    def held_by(self, key: Arg, count: int, life: int) -> Verb[Any]:
        """How many replicas have what connection number `life` wrote until now, or an error reply; waits a second for `count`.

        `key`: of something that was written. BrokerUnavailable: that connection was lost.
        """
        self._written += 1
        mine = self._written
        yield from self._turn.take()
        try:
            if self._synced < mine:
                until = self._written
                self._check(life)
                self._held_by = last_word((yield from self._transport.call(sync(key, count))))
                self._synced = until
            self._check(life)
            return self._held_by
        finally:
            self._turn.give()

    def _check(self, life: int) -> None:
        if not life or life != self._transport.life:
            raise BrokerUnavailable(f"{self._transport.at.address}: the connection was lost before its replicas answered")
