"""Who answers there: what a server says of itself, and whom the Sentinels name as the master. No I/O; for daemon and client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from ...errors import BrokerRefused, BrokerUnavailable
from .redis_asking import RIGHTS, Command, judge
from .redis_url import Address, Target

OLDEST: Final = (6, 2)  # version of Redis that is enough
_LOGIN: Final = ", by sentinel_username= and sentinel_password="


class Hello(NamedTuple):
    """What a server says of itself; what it does not say is as of a plain master."""

    version: str = ""
    mode: str = "standalone"
    role: str = "master"

    @property
    def clustered(self) -> bool:
        """It is a node of a cluster."""
        return self.mode == "cluster"

    @property
    def is_old(self) -> bool:
        return tuple(int(part) for part in self.version.split(".")[:2] if part.isdigit()) < OLDEST


def read_hello(reply: Any, at: Target, *, named: bool) -> Hello:
    """The reply to HELLO of the server `at`; `named`: a Sentinel says that it is the master.

    BrokerRefused: it is a Sentinel itself. BrokerUnavailable: though named, it is no master.
    """
    pairs = dict(zip(reply[::2], reply[1::2], strict=False)) if isinstance(reply, list) else reply  # RESP2 has no maps
    said = pairs if isinstance(pairs, Mapping) else {}
    texts = {field: said[field.encode()].decode() for field in Hello._fields if field.encode() in said}
    hello = Hello(**texts)
    if hello.mode == "sentinel":
        form = f"redis+sentinel://{at.host}:{at.port}/SERVICE"
        raise BrokerRefused(f"{at.address}: it is a Sentinel, which holds no jobs; give the name of its service: {form}")
    if named and hello.role != "master":
        raise BrokerUnavailable(f"{at.address}: it is a {hello.role}, though a Sentinel named it; the Sentinels are asked again")
    return hello


class MasterSearch:
    """Sentinels are asked for the master, one after the other, until one knows it. The I/O is its owner's.

        search = MasterSearch(service)
        search.heard(address, reply)  # of a Sentinel, to search.question: the master, or None: ask the next one
        search.failed(error)          # or why there is no reply
        search.failure                # when nobody knew

    `words(error)` is what the server said.
    """

    def __init__(self, service: str, words: Callable[[Exception], str] = str) -> None:
        self.question: Command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        self.refused = True  # by all: none will know it later
        self._service = service
        self._words = words
        self._trouble: list[str] = []

    def heard(self, address: Address, reply: Any) -> Address | None:
        if isinstance(reply, Exception):
            verdict = judge(self._words(reply))
            why = verdict.text + (_LOGIN if verdict.code in RIGHTS else "")
        elif reply is None:
            why = "it watches no master of that name; SENTINEL MASTERS says which"
        else:
            host, port = reply
            return host.decode(), int(port)
        self._trouble.append(f"{address[0]}:{address[1]}: {why}")
        return None

    def failed(self, error: BrokerUnavailable | BrokerRefused) -> None:
        """It could not be reached, or did not let us in."""
        refused = isinstance(error, BrokerRefused)
        self.refused = self.refused and refused
        self._trouble.append(f"{error}{_LOGIN if refused else ''}")

    @property
    def failure(self) -> str:
        return f"no Sentinel names the master of {self._service!r}: {'; '.join(self._trouble)}"
