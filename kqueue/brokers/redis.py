"""Redis and Valkey behind the ten verbs: what to ask (commands.redis), and what to make of the replies. redis_nodes knows whom.

Rule 1. Every request carries a number, and the scripts remember each sender's last one. So a verb repeats a request whose reply
        was lost, with the same number, and gets the answer that was lost. For that to hold, a sender has one request under way:
        one reservation a queue, one settlement in all, and as many enqueues as there are senders, each with its own name.
Rule 2. A reply that says "not now" (LOADING, READONLY, OOM, …) is reported, waited out with backoff, and asked again.
Rule 3. What a full Redis refuses and jobs can do without (names of queues, documents) waits for the next renewal, so a daemon
        starts on a full Redis, and works off what is there: that is what makes room.
Rule 4. A reservation whose task was cancelled before its reply came is asked for again by the next one, and by `close`: no job
        is left leased that nobody knows of. What comes back beyond what was wanted is released, at no cost to the job.
Rule 5. A reservation that found nothing offers that the next one may be made for us by whoever adds a job: its number is in the
        offer, and the job comes with the ring. So the next one takes what came, or asks, and is answered as in Rule 1.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from ..errors import BrokerUnavailable, KQueueError
from ..kernel.slots import Slots
from ..kernel.traps import Park, this_kernel
from .base import (
    LEASE_S,
    MAX_BATCH,
    NO_RETENTION,
    Capabilities,
    Lease,
    NewJob,
    Opened,
    Owner,
    QueueStats,
    Reserved,
    Retention,
    Settlement,
    Swept,
    Take,
    Verb,
    nobody,
)
from .commands import redis as commands
from .commands.redis_asking import Asking, Call, Command
from .commands.redis_lua import LANES, MEMORY_S
from .commands.redis_scripts import SCRIPTS
from .commands.redis_url import parse_url
from .redis_nodes import RedisNodes
from .redis_transport import News

if TYPE_CHECKING:
    from ..kernel.loop import Kernel, Task

POLL_S: Final = 1.0  # between looks, where the user may not hear doorbells


class RedisBroker:
    """A queue in Redis, for the daemon. Making one opens nothing.

    `on_event(kind, text, retry_in_s)` hears of trouble: "lost" (with the seconds until the next try), "back", "warning".
    """

    capabilities = Capabilities(durable=True)

    def __init__(self, url: str, *, on_event: News = lambda kind, text, retry_in_s: None) -> None:
        self._target = target = parse_url(url)
        self.address = target.address
        self._nodes = RedisNodes(target, SCRIPTS, on_bell=self._heard, on_ready=self._connected, on_news=on_event)
        self._kernel: Kernel | None = None
        self._owner = Owner("", "")
        self._queues: Sequence[str] = ()
        self._lease_s = LEASE_S
        self._opened = False  # from then on missing rights are no refusal, but reported and waited for
        self._closing = False  # from then on nothing is asked twice
        self._rang = False
        self._listening: deque[Task] = deque()
        self._look_at = 0.0  # clock seconds: when to look without a doorbell
        self._idle: set[str] = set()  # queues in which our idle flag should stand
        self._listed: set[str] = set()  # queues that kq:queues is known to hold
        self._requests: dict[str, int] = {}  # queue -> number of the reservation that comes next, or is under way
        self._unheard: set[str] = set()  # queues whose last reservation has had no reply
        self._offers: set[str] = set()  # queues whose next reservation somebody may make for us
        self._own_channels: dict[bytes, str] = {}  # and the queue of each
        self._handed: dict[str, tuple[int, Lease]] = {}  # by queue: its number, and what nobody has taken
        self._take: Take = nobody
        self._due_at: dict[str, float | None] = {}  # queue -> clock seconds; None: no job is delayed
        self._surplus: list[Lease] = []  # leases to be released
        self._number = int.from_bytes(os.urandom(6), "big")  # of the last settlement; an epoch may be opened twice
        self._turns: dict[str, Slots] = {}  # by verb and queue
        self._senders: list[commands.Sender] = []  # that are free
        self._retention = NO_RETENTION
        self._lapses: dict[str, bytes] = {}  # queue -> when our epoch was last found expired, as far as we have heard
        self._sweeps: list[Call] = []  # under way
        self._stuck: set[str] = set()  # queues that take no follow-ups; told once
        self._unpublished: dict[str, bytes] = {}  # documents that a full Redis has not taken; renewals try again
        self._full = False  # it refused something that can wait; told once

    # -- the ten verbs ----------------------------------------------------------------------------------------------

    def open(
        self, owner: Owner, queues: Sequence[str], lease_s: float, *, unsettled: Sequence[Settlement] = (), culprit: str = "",
        retention: Retention = NO_RETENTION, take: Take = nobody,
    ) -> Verb[Opened]:  # fmt: skip
        self._kernel = kernel = yield this_kernel()
        self._owner, self._queues, self._lease_s, self._retention = owner, list(queues), lease_s, retention
        self._take = take
        bells, own = ([channel(queue) for queue in queues] for channel in (commands.bell, self._own_channel))
        self._own_channels = {channel.encode(): queue for channel, queue in zip(own, queues, strict=True)}
        self._nodes.start(kernel, f"kqueued:{owner.epoch}", bells + own, lease_s / 3)
        try:
            yield from self._list_queues(queues)
            answers = (yield from self.settle(unsettled)) if unsettled else []
            calls = [commands.open_epoch(owner, lease_s, queue, culprit) for queue in queues]
            recovered = yield from self._repeat_while_more(calls)
        except KQueueError:
            self._nodes.stop()
            raise
        self._opened = True
        self._nodes.opened()
        return Opened(recovered, answers)

    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> Verb[list[bool]]:
        yield from self._list_queues({job.queue for job in jobs})
        sender = self._senders.pop() if self._senders else commands.Sender()
        adding = commands.Adding(jobs, max_depth, sender, MEMORY_S)
        for calls in adding.calls():
            adding.replies = yield from self._ask(calls)
        self._senders.append(sender)
        return adding.fresh

    def reserve(self, queue: str, wants: Mapping[str, int]) -> Verb[Reserved]:
        """At most MAX_BATCH at once. Fewer than asked for does not mean that there are no more; none does."""
        turn = yield from self._take_turn(f"reserve {queue}")
        try:
            yield from self._release_surplus()
            left = {lane: max(0, wants.get(lane, 0)) for lane in LANES}
            leases: list[Lease] = []
            found, repeated = self._came(queue), True
            while not leases:
                if not found:
                    repeated, found = yield from self._reserve(queue, _share(*left.values()))
                for lease in found:
                    wanted = left[lease.lane] > 0
                    left[lease.lane] -= wanted
                    (leases if wanted else self._surplus).append(lease)
                found = []
                if not repeated:
                    break
            if not leases:
                yield from self._release_surplus()
            return Reserved(leases, self._next_due_s(queue))
        finally:
            turn.give()

    def withdraw(self, queue: str) -> Verb[None]:
        if queue in self._offers or queue in self._unheard or queue in self._handed:
            yield from self.reserve(queue, {})

    def settle(self, batch: Sequence[Settlement]) -> Verb[list[str]]:
        answers = [""] * len(batch)
        turn = yield from self._take_turn("settle")
        try:
            for parts in commands.settle_parts(batch):
                calls, orders = [], []
                for epoch, positions in parts:
                    self._number += 1
                    part = [batch[position] for position in positions]
                    call, order = commands.settle(self._owner, self._lease_s, self._number, epoch, part)
                    calls.append(call)
                    orders.append([positions[place] for place in order])
                for order, reply in zip(orders, (yield from self._ask(calls)), strict=True):
                    for position, answer in zip(order, commands.read_settled(reply), strict=True):
                        answers[position] = answer
        finally:
            turn.give()
        yield from self._hand_over({item.queue for item in batch if any(job.queue != item.queue for job in item.follow_ups)})
        return answers

    def renew(self) -> Verb[bool]:
        yield from self._release_surplus()
        # Each time, since somebody may have deleted that list; but a Redis that takes nothing more must not cost us our epoch.
        asked: list[Call | Command] = [("SADD", commands.QUEUES_KEY, *self._queues)]
        documents = dict(self._unpublished)
        if documents:
            asked.append(commands.publish(documents))
        replies = yield from self._ask(asked, once=True)
        if documents and replies[1] is not None:
            self._published(documents)
        self._full = self._full and None in replies
        renewals = [commands.renew(self._owner, self._lease_s, queue) for queue in self._queues]
        replies = yield from self._ask(renewals, reachable=True)
        lapses = {}
        for queue, reply in zip(self._queues, replies, strict=True):
            if reply is None:
                continue  # its node is away; that our epoch has lapsed there is heard of when it is back
            flag, lapses[queue] = reply
            ours = flag is not None and flag.startswith(self._owner.epoch.encode())
            # Somebody took it away, and the ring was lost, or what came with it.
            if (flag is None and queue in self._idle) or (not ours and queue in self._offers):
                self._ring([queue])
        lapsed = {queue for queue, when in lapses.items() if when not in (b"", self._lapses.get(queue))}
        self._lapses |= lapses
        if lapsed & self._handed.keys():  # somebody may have recovered it: to be asked for, as what we run is to be held
            self._handed = {queue: handed for queue, handed in self._handed.items() if queue not in lapsed}
            self._ring([])
        return not lapsed

    def sweep(self) -> Verb[Swept]:
        """What is left after a third of a lease is left to the next one. Outboxes have their share, whatever else there is."""
        kernel = yield this_kernel()
        swept = Swept({}, {})
        until = self._until(kernel)
        left = outboxes = self._queues
        while (left or outboxes) and kernel.clock.monotonic() < until:
            if left:
                left = yield from self._sweep(kernel, left, swept)
            outboxes = yield from self._empty_all(outboxes)
        return swept

    def wait(self, timeout_s: float | None) -> Verb[bool]:
        kernel = yield this_kernel()
        polls = self._nodes.bells_refused
        if not self._rang:
            look_in_s = max(0.0, self._look_at - kernel.clock.monotonic()) if polls else None
            yield Park(self._listening, min((s for s in (timeout_s, look_in_s) if s is not None), default=None))
        if polls and kernel.clock.monotonic() >= self._look_at:
            self._look_at = kernel.clock.monotonic() + POLL_S
            self._rang = True
        rang, self._rang = self._rang, False
        return rang

    def stats(self) -> Verb[dict[str, QueueStats]]:
        """Other queues of this Redis are counted too where something stands, so that a mistyped one shows."""
        asked: list[Call | Command] = [("SMEMBERS", commands.QUEUES_KEY), *(commands.stats(queue) for queue in self._queues)]
        names, *replies = yield from self._ask(asked, reachable=True)
        found = zip(self._queues, replies, strict=True)
        counts = {queue: commands.read_stats(reply) for queue, reply in found if reply is not None}
        others = sorted({name.decode("utf-8", "replace") for name in names or ()} - set(self._queues))
        calls = [commands.stats(queue) for queue in others]
        # A user may lack the rights to the queues of others, and they may be on another node: that must not hide ours.
        for queue, reply in zip(others, (yield from self._ask(calls, once=True)), strict=True):
            if reply is not None and any(reply):
                counts[queue] = commands.read_stats(reply)
        return counts

    def publish(self, documents: Mapping[str, bytes]) -> Verb[None]:
        """Where Redis is full they are published when there is room, and `documents` has them meanwhile."""
        self._unpublished.update(documents)
        if (yield from self._unless_full(commands.publish(documents))):
            self._published(documents)

    def documents(self, prefix: str) -> Verb[dict[str, bytes]]:
        ours = {key: value for key, value in self._unpublished.items() if key.startswith(prefix)}
        (keys,) = yield from self._ask([("HKEYS", commands.DOCUMENTS_KEY)])
        wanted = [key for key in keys if key.startswith(prefix.encode())]
        if not wanted:
            return ours
        (values,) = yield from self._ask([("HMGET", commands.DOCUMENTS_KEY, *wanted)])
        return commands.read_documents(wanted, values) | ours

    def close(self, *, give_up: bool = True) -> Verb[None]:
        """Leases whose reply was lost or cancelled are given back first, as long as Redis answers."""
        try:
            if self._nodes.ready and self._opened:
                self._closing = True
                for queue in {*self._unheard, *self._offers, *self._handed}:
                    yield from self.reserve(queue, {})
                yield from self._release_surplus()
                if give_up:
                    yield from self._ask([commands.close(self._owner, queue) for queue in self._queues])
        except KQueueError:
            pass  # the epoch will expire
        finally:
            self._nodes.stop()
        yield  # lets the keeper end

    # -- their parts ------------------------------------------------------------------------------------------------

    def _own_channel(self, queue: str) -> str:
        return commands.own_channel(queue, self._owner.epoch)

    def _came(self, queue: str) -> list[Lease]:
        """What we were handed, and is still to be begun."""
        number, lease = self._handed.pop(queue, (0, None))
        if lease is None or not self._is_next(queue, number):
            return []
        self._answered(queue, number)
        return [lease]

    def _is_next(self, queue: str, number: int) -> bool:
        """Whether no reservation is to bring what was handed to us under this number, or has brought it already."""
        return queue not in self._unheard and number == self._requests.get(queue)

    def _answered(self, queue: str, number: int) -> None:
        self._requests[queue] = number + 1
        self._offers.discard(queue)

    def _next_due_s(self, queue: str) -> float | None:
        assert self._kernel is not None
        due_at = self._due_at.get(queue)
        return None if due_at is None else max(0.0, due_at - self._kernel.clock.monotonic())

    def _reserve(self, queue: str, wants: Sequence[int]) -> Verb[tuple[bool, list[Lease]]]:
        """One request: whether it was answered before, and the leases."""
        assert self._kernel is not None
        request = self._requests.setdefault(queue, self._number)
        self._unheard.add(queue)
        call = commands.reserve(self._owner, self._lease_s, request, queue, wants)
        ((how, answered, due, *lanes),) = yield from self._ask([call])
        self._unheard.discard(queue)
        self._answered(queue, answered)
        self._due_at[queue] = None if due is None else self._kernel.clock.monotonic() + float(due)
        if how in (b"short", b"offered"):
            self._idle.add(queue)
        if how == b"offered":
            self._offers.add(queue)
        return how == b"repeated", commands.read_leases(self._owner.epoch, queue, lanes)

    def _sweep(self, kernel: Kernel, queues: Sequence[str], swept: Swept) -> Verb[list[str]]:
        """One round. The queues in which there is more to do."""
        self._sweeps = []
        for queue in queues:
            # Until we have been connected for a whole lease, the others may not have come back yet.
            ready_at = self._nodes.ready_at(commands.prefix(queue))
            long_ready = ready_at is not None and kernel.clock.monotonic() - ready_at >= self._lease_s
            self._sweeps.append(commands.sweep(self._lease_s, queue, long_ready, self._retention))
        left = []
        for queue, reply in zip(queues, (yield from self._ask(self._sweeps, reachable=True)), strict=True):
            recovered, forgotten, more = reply or (0, 0, 0)
            for counts, count in ((swept.recovered, recovered), (swept.forgotten, forgotten)):
                if count:
                    counts[queue] = counts.get(queue, 0) + count
            if more:
                left.append(queue)
        return left

    def _hand_over(self, queues: Collection[str]) -> Verb[None]:
        """Bring follow-ups from the outboxes of `queues` to where they belong. Waits for nobody: sweeps see to what stays."""
        if not queues:
            return
        kernel = yield this_kernel()
        until = self._until(kernel)
        while queues and kernel.clock.monotonic() < until:
            queues = yield from self._empty_all(queues)

    def _empty_all(self, queues: Iterable[str]) -> Verb[list[str]]:
        """One round over the outboxes of `queues`: those with which it is worth going on."""
        left = []
        for queue in queues:
            with suppress(BrokerUnavailable):
                if (yield from self._empty(queue)):
                    left.append(queue)
        return left

    def _until(self, kernel: Kernel) -> float:
        """When what starts now, and may be put off, ends: by the kernel's clock."""
        return kernel.clock.monotonic() + max(1.0, self._lease_s / 3)

    def _empty(self, queue: str) -> Verb[bool]:
        """Hand over some of an outbox; whether it is worth going on. Each queue is asked by itself, since one may not answer."""
        (reply,) = yield from self._try([commands.outbox(queue)])
        if reply is None:
            return False
        read_at, found, more = commands.read_outbox(queue, reply)
        by_queue: dict[str, list[commands.FollowUp]] = {}
        for job in found:
            by_queue.setdefault(job.queue, []).append(job)
        taken: list[commands.FollowUp] = []
        for to, jobs in by_queue.items():
            if (yield from self._take_over(queue, to, commands.hand_over(to, read_at, jobs))):
                taken += jobs
        if taken:
            (gone,) = yield from self._try([commands.handed_over(queue, taken)])
            if gone is not None:
                yield from self._try(commands.unmark(taken))
        return more and bool(taken)

    def _take_over(self, queue: str, to: str, call: Call) -> Verb[bool]:
        """Whether `to` has taken what follows jobs of `queue`. That it does not is told once."""
        refusals: list[str] = []
        try:
            (reply,) = yield from self._try([call], refusals)
        except BrokerUnavailable as error:
            reply, refusals = None, [str(error)]
        if reply is not None:
            self._stuck.discard(to)
            if to not in self._listed:
                with suppress(BrokerUnavailable):  # of the list, which may be elsewhere
                    yield from self._try([("SADD", commands.QUEUES_KEY, to)])
                    self._listed.add(to)
        elif to not in self._stuck:
            self._stuck.add(to)
            self._nodes.warn(
                f"queue {to!r} does not take the jobs that follow those of {queue!r}, so they wait in the outbox of {queue!r}, "
                f"and every sweep tries again: {refusals[-1]}"
            )
        return bool(reply)

    def _release_surplus(self) -> Verb[None]:
        surplus, self._surplus = self._surplus, []
        try:
            if surplus:
                yield from self.settle([Settlement(lease.token, lease.queue, "release", lease.counters) for lease in surplus])
        except BaseException:
            self._surplus += surplus
            raise

    def _repeat_while_more(self, calls: Sequence[Call]) -> Verb[dict[str, int]]:
        """Make each queue's call until it has nothing more to do; how many jobs they recovered."""
        recovered: dict[str, int] = {}
        left = list(zip(self._queues, calls, strict=True))
        while left:
            replies = yield from self._ask([call for _, call in left])
            for (queue, _), (count, _) in zip(left, replies, strict=True):
                if count:
                    recovered[queue] = recovered.get(queue, 0) + count
            left = [part for part, (_, more) in zip(left, replies, strict=True) if more]
        return recovered

    def _list_queues(self, queues: Iterable[str]) -> Verb[None]:
        """Let clients find these queues."""
        new = set(queues) - self._listed
        if new and (yield from self._unless_full(("SADD", commands.QUEUES_KEY, *sorted(new)))):
            self._listed |= new

    def _unless_full(self, command: Command) -> Verb[bool]:
        """Ask for something that jobs can do without; False: Redis is full, which is told once."""
        refusals: list[str] = []
        yield from self._ask([command], unless_full=True, refusals=refusals)
        if refusals and not self._full:
            self._full = True
            self._nodes.warn(f"{refusals[-1]}; what this daemon tells clients (its queues, jobs and limits) is written then, too")
        return not refusals

    def _published(self, documents: Mapping[str, bytes]) -> None:
        self._unpublished = {key: value for key, value in self._unpublished.items() if documents.get(key) != value}

    # -- asking -----------------------------------------------------------------------------------------------------

    def _ask(
        self, asked: Sequence[Call | Command], *, once: bool = False, reachable: bool = False, hurried: bool = False,
        refusals: list[str] | None = None, unless_full: bool = False,
    ) -> Verb[list[Any]]:  # fmt: skip
        """The replies, whatever it takes: what was lost, or refused for now, is asked again. BrokerRefused: that is useless.

        `once`: what is refused is not asked again, and the reason is added to `refusals`. `unless_full`: only what is refused for
        want of memory. `reachable`: nodes of a cluster that do not answer are done without. All: the reply is None then.
        `hurried`: nothing is waited for; BrokerUnavailable.
        """
        asking = Asking(
            asked, SCRIPTS, self._nodes.routes, self.address, wait_for_rights=self._opened, on_mended=self._mended, once=once,
            refusals=refusals, unless_full=unless_full, sync=0 if once and not hurried else self._target.sync_replicas,
        )  # fmt: skip
        return (yield from self._nodes.see_through(asking, hurried=hurried or self._closing, reachable=reachable))

    def _try(self, asked: Sequence[Call | Command], refusals: list[str] | None = None) -> Verb[list[Any]]:
        """The replies; None for what is refused. BrokerUnavailable: there are none now, or replicas do not have it yet."""
        return (yield from self._ask(asked, once=True, hurried=True, refusals=refusals))

    def _mended(self, text: str) -> None:
        self._listed.clear()  # it may have been the list of queues
        self._nodes.warn(text)

    def _take_turn(self, name: str) -> Verb[Slots]:
        turn = self._turns.setdefault(name, Slots())
        yield from turn.take()
        return turn

    # -- hearing ----------------------------------------------------------------------------------------------------

    def _heard(self, channel: bytes, message: bytes) -> None:
        queue = self._own_channels.get(channel)
        if queue is None:
            self._ring({queue for queue in self._idle if commands.bell(queue).encode() == channel})
            return
        number, lease = commands.read_handed(self._owner.epoch, queue, message)
        if self._is_next(queue, number) and self._take(lease):
            self._answered(queue, number)
        else:
            self._handed[queue] = number, lease
        self._ring([])

    def _connected(self) -> None:
        self._listed.clear()  # it may be another server by now
        for call in self._sweeps:  # which are asked again
            commands.expire_nobody(call)
        if self._opened:
            self._ring(self._idle)  # what rang meanwhile, nobody heard

    def _ring(self, queues: Iterable[str]) -> None:
        self._idle = self._idle.difference(queues)
        self._rang = True
        if self._kernel is not None:
            self._kernel.unpark(self._listening)


def _share(inline: int, isolated: int) -> tuple[int, int]:
    """What to ask for at once of a want that may be more than MAX_BATCH, so that neither lane starves the other."""
    first = min(inline, max(MAX_BATCH // 2, MAX_BATCH - isolated))
    return first, min(isolated, MAX_BATCH - first)
