"""The servers that hold our queues: one in the usual case, as many as it takes of a Redis Cluster. Asks until there is an answer.

    RedisBroker  --calls-->  RedisNodes.see_through  --by key (Routes)-->  RedisTransport of that node

Rule 1. There is one connection to begin with. A node that says that it is one of a cluster makes us ask for the map; further
        connections are made as keys need them, and those that are not needed are closed each time that the map has come.
Rule 2. All of them listen to our doorbells, which a cluster sends to every node; a ring counts only from the node that holds the
        queue, as long as we are connected to that. So each is heard once, and none is missed because some node is gone.
Rule 3. A node that is gone holds up only what is on it: the others are asked first. Meanwhile the map is asked for again, since
        its replica may have taken its place.
Rule 4. The map is fetched by a connection of its own, from another node each time: one that was cut off knows only an old map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..errors import BrokerRefused, BrokerUnavailable
from ..kernel.traps import sleep
from .base import Verb
from .commands.redis_asking import Asking, Part
from .commands.redis_cluster import MAP, Routes
from .commands.redis_mend import Arg
from .commands.redis_url import Address, Target
from .redis_transport import CONNECT_TIMEOUT_S, News, RedisTransport
from .redis_wire import errand

if TYPE_CHECKING:
    from ..kernel.loop import Kernel, Task

LEARN_AGAIN_S: Final = 0.5  # between two looks at the map of a cluster


class RedisNodes:
    """`on_bell(channel, message)`, `on_ready()` and `on_news` as of RedisTransport, from all of them."""

    def __init__(
        self, target: Target, scripts: Mapping[str, str], *, on_bell: Callable[[bytes, bytes], None],
        on_ready: Callable[[], None], on_news: News,
    ) -> None:  # fmt: skip
        self.routes = Routes(target.known)
        self._target = target
        self._scripts = scripts
        self._on_bell, self._on_ready, self._on_news = on_bell, on_ready, on_news
        self._transports: dict[Address, RedisTransport] = {}
        self._troubled: set[Address] = set()  # those whose last news was bad
        self._starting: tuple[str, Sequence[str], float] = ("", (), 0.0)  # what each is started with
        self._kernel: Kernel | None = None
        self._watcher: Task | None = None  # listens to a Sentinel
        self._learned_at: float | None = None  # clock seconds
        self._asked = 0  # how often the map was asked for
        self._stubborn = False
        self._stopped = False

    # -- for the broker ---------------------------------------------------------------------------------------------

    def start(self, kernel: Kernel, name: str, channels: Sequence[str], cap_s: float) -> None:
        """See RedisTransport.start."""
        self._kernel = kernel
        self._starting = (name, channels, cap_s)
        self._transport(self.routes.first)

    def stop(self) -> None:
        self._stopped = True
        if self._watcher is not None and self._kernel is not None:
            self._kernel.cancel(self._watcher, GeneratorExit())
        for transport in self._transports.values():
            transport.stop()

    def opened(self) -> None:
        """From now on a node that refuses us is reported and tried again."""
        self._stubborn = True

    @property
    def ready(self) -> bool:
        """Some node can be asked now."""
        return any(transport.state == "ready" for transport in self._transports.values())

    @property
    def bells_refused(self) -> bool:
        return any(transport.bells_refused for transport in self._transports.values())

    def ready_at(self, key: Arg) -> float | None:
        """Clock seconds: since when the node that holds `key` has been connected; None: it is not."""
        transport = self._transports.get(self.routes.of(key))
        return None if transport is None else transport.ready_at

    def warn(self, text: str) -> None:
        """Tell of something that people should look after, though work goes on."""
        self._on_news("warning", text, 0.0)

    def see_through(self, asking: Asking, *, hurried: bool = False, reachable: bool = False) -> Verb[list[Any]]:
        """The replies, whatever it takes: what was lost, or refused for now, is asked again.

        `hurried`: once, then BrokerUnavailable. `reachable`: what nodes are asked that do not answer may go without, as long as
        some node does. Raises BrokerRefused where asking again is useless, and BrokerUnavailable when it is closed.
        """
        tries = 0
        troubled: set[RedisTransport] = set()
        while asking.left:
            trouble = ""
            stuck: set[int] = set()
            for part in self._ready_first(asking.parts()):
                needed = not reachable or len(asking.left) == len(asking.replies)
                said = yield from self._exchange(part, asking.sync, patient=needed and not hurried)
                if said and hurried:
                    raise BrokerUnavailable(f"{asking.address}: {said}")
                if said:
                    stuck.update(part.positions)
                if said and needed:
                    trouble = said
                    troubled.add(self._transport(part.node))
            if reachable and len(asking.left) < len(asking.replies) and stuck.issuperset(asking.left):
                break
            if asking.hopped():
                yield from self._learn()
                trouble = trouble or asking.astray
            if trouble and hurried:
                raise BrokerUnavailable(f"{asking.address}: {trouble}")
            if trouble:
                yield from self._wait_out(trouble, tries, next(iter(troubled), self._transport(self.routes.first)))
                tries += 1
        for transport in troubled:
            transport.report_well()
        return asking.replies

    # -- asking one of them -----------------------------------------------------------------------------------------

    def _exchange(self, part: Part, replicas: int, patient: bool) -> Verb[str]:
        """Ask one node. What is wrong with its answers; "" also when they were lost: the transport reports it, and waits."""
        transport = self._transport(part.node)
        try:
            if not (yield from transport.ready(patient, self._patience_s())):
                yield from self._learn()
                return ""
            if transport.in_cluster and not self.routes.clustered and self._learned_at is None and (yield from self._learn()):
                return ""  # and now to whom it concerns
            answers = yield from transport.call(part.commands(transport.digests))
            held_by = None
            if part.promised:
                held_by = yield from transport.replicas.held_by(part.promised, replicas, transport.life)
        except BrokerUnavailable as error:
            if self._stopped or (transport.closed and self._transports.get(part.node) is transport):
                raise
            if self.routes.clustered:
                yield from self._learn()
            return "" if patient else str(error)
        return part.hear(answers, held_by)

    def _patience_s(self) -> float | None:
        """How long to wait for a node before the map is looked at again. None: there is no map, or nobody else to ask for it."""
        return LEARN_AGAIN_S if len(self.routes.known) > 1 else None

    def _ready_first(self, parts: list[Part]) -> list[Part]:
        return parts if len(parts) == 1 else sorted(parts, key=lambda part: self._transport(part.node).state != "ready")

    def _wait_out(self, trouble: str, tries: int, transport: RedisTransport) -> Verb[None]:
        delay_s = transport.backoff_s(tries)
        transport.report(trouble, delay_s)
        yield sleep(delay_s)
        yield from transport.look_again()
        if self.routes.clustered:
            yield from self._learn()

    # -- who they are -----------------------------------------------------------------------------------------------

    def _transport(self, node: Address) -> RedisTransport:
        """The connection to `node`, begun when there is none."""
        transport = self._transports.get(node)
        if transport is None:
            transport = self._transports[node] = self._begin(node)
        return transport

    def _begin(self, node: Address) -> RedisTransport:
        assert self._kernel is not None
        sentinels = None
        if self._target.service:
            from .redis_sentinel import Sentinels

            sentinels = Sentinels(self._target, self._kernel.clock.monotonic)
        transport = RedisTransport(
            self._target.node(node), self._scripts, on_push=partial(self._pushed, node), on_ready=self._on_ready,
            on_news=partial(self._heard, node), locate=sentinels.locate if sentinels is not None else None,
        )  # fmt: skip
        if not self._stopped:
            transport.start(self._kernel, *self._starting, stubborn=self._stubborn)
            if sentinels is not None:
                self._watcher = self._kernel.spawn(sentinels.watch(transport.look_again), name="redis sentinel")
        return transport

    def _learn(self) -> Verb[bool]:
        """Ask the next node for the map of the cluster, unless somebody has just done so; whether it answered."""
        assert self._kernel is not None
        now = self._kernel.clock.monotonic
        if self._learned_at is not None and now() - self._learned_at < LEARN_AGAIN_S:
            return False
        self._learned_at = now()
        known = self.routes.known
        node = known[self._asked % len(known)]
        self._asked += 1
        try:
            reply = yield from errand(self._target.node(node), MAP, CONNECT_TIMEOUT_S, now)
        except (BrokerUnavailable, BrokerRefused):
            return False  # the next one may answer
        if not self.routes.learn(reply, node):
            return False
        self._close_others()
        return True

    def _close_others(self) -> None:
        """Those that hold none of the queues that we serve, as the map says, unless somebody waits for their answer."""
        for node in set(self._transports) - {self.routes.of(channel) for channel in self._starting[1]}:
            if self._transports[node].idle or node not in self.routes.masters():
                self._transports.pop(node).stop()
                self._well(node)

    # -- what they say ----------------------------------------------------------------------------------------------

    def _pushed(self, node: Address, channel: bytes, message: bytes) -> None:
        home = self.routes.of(channel)
        transport = self._transports.get(home)
        if home == node or transport is None or transport.state != "ready":  # Rule 2
            self._on_bell(channel, message)

    def _heard(self, node: Address, kind: str, text: str, retry_in_s: float) -> None:
        """Pass news on. With several nodes, say which one is lost, and that all is well only when it is."""
        if kind == "warning":
            self._on_news(kind, text, retry_in_s)
        elif kind == "lost":
            self._troubled.add(node)
            where = f"{node[0]}:{node[1]}: " if self.routes.clustered else ""
            self._on_news(kind, where + text, retry_in_s)
        else:
            self._well(node)

    def _well(self, node: Address) -> None:
        """`node` gives no trouble any more, so perhaps none does."""
        if node in self._troubled:
            self._troubled.discard(node)
            if not self._troubled:
                self._on_news("back", "", 0.0)
