"""Which node of a Redis Cluster holds which key: slots, and what the nodes say of them. No I/O.

Rule 1. A Redis where no node ever said MOVED is one node, and that one holds everything. Nothing has to be configured.
Rule 2. A MOVED makes us look at the whole map (CLUSTER SLOTS); until that has come, the one slot is known by the MOVED itself.
Rule 3. A map is a hint. When it is wrong, a node says MOVED once more.
"""

from __future__ import annotations

from binascii import crc_hqx
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Final

from .redis_mend import Arg
from .redis_url import Address

SLOTS: Final = 16384
MAP: Final = ("CLUSTER", "SLOTS")


def tag_of(key: Arg) -> bytes:
    """What decides about the slot of `key`: what stands between its first braces, or all of it."""
    name = key if isinstance(key, bytes) else str(key).encode("utf-8", "surrogateescape")
    start = name.find(b"{")
    end = name.find(b"}", start + 1)
    return name[start + 1 : end] if start >= 0 and end > start + 1 else name


def slot_of(key: Arg) -> int:
    return crc_hqx(tag_of(key), 0) % SLOTS  # CRC16/XMODEM, as the cluster's specification has it


class Routes:
    """Where keys are. `hosts`: what the URL named, of which the first is asked first."""

    def __init__(self, hosts: Sequence[Address]) -> None:
        self.first = hosts[0]
        self.known = list(hosts)  # whom to ask for the map
        self.clustered = False
        self._starts: list[int] = []  # first slots of the ranges below, in order
        self._ranges: list[tuple[int, Address]] = []  # last slot, node
        self._moved: dict[int, Address] = {}  # slots that the map does not have right
        self._homes: dict[bytes, Address] = {}  # by hash tag: what was looked up in the three above

    def of(self, key: Arg) -> Address:
        """The node to ask about `key`."""
        if not self.clustered:
            return self.first
        tag = tag_of(key)
        home = self._homes.get(tag)
        if home is None:
            home = self._homes[tag] = self._look_up(slot_of(key))
        return home

    def _look_up(self, slot: int) -> Address:
        if slot in self._moved:
            return self._moved[slot]
        place = bisect_right(self._starts, slot) - 1
        if place >= 0 and slot <= self._ranges[place][0]:
            return self._ranges[place][1]
        return self.first  # which says who has it, or that nobody has

    def moved(self, slot: int, node: Address) -> None:
        """A node said that `node` has `slot`."""
        self.clustered = True
        self._moved[slot] = node
        self._homes = {}
        if node not in self.known:
            self.known.append(node)

    def learn(self, reply: Any, asked: Address) -> bool:
        """Take what `asked` answered to MAP; False when that is no map."""
        ranges, nodes = [], []
        try:
            for start, end, *holders in reply:
                addresses = [_address(host, port, asked) for host, port, *_ in holders]
                ranges.append((start, end, addresses[0]))
                nodes += addresses
            ranges.sort()
        except (TypeError, ValueError, IndexError, AttributeError):
            return False
        if not ranges:
            return False
        self._starts = [start for start, _, _ in ranges]
        self._ranges = [(end, node) for _, end, node in ranges]
        self._moved, self._homes = {}, {}
        self.known = list(dict.fromkeys(nodes))
        if self.first not in nodes:
            self.known.append(self.first)  # it may be a name of all of them
        self.clustered = True
        return True

    def masters(self) -> set[Address]:
        """Every node that holds slots, as far as we know."""
        return {node for _, node in self._ranges} | set(self._moved.values())


def read_redirect(message: str, asked: Address) -> tuple[int, Address]:
    """Slot and node of "MOVED 3999 host:port" or of an ASK. Without a host it is the one that was asked."""
    _, slot, where = message.split()[:3]
    host, _, port = where.rpartition(":")
    return int(slot), (host or asked[0], int(port))


def _address(host: bytes | None, port: int, asked: Address) -> Address:
    name = "" if host is None else host.decode()
    return (name if name not in ("", "?") else asked[0], int(port))
