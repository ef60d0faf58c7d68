"""Redis: what is asked of it (calls of the scripts in redis_scripts), and what it replies. No I/O.

Shared by the daemon's transport, which must stay small, and by the client. So nothing here may import redis-py, ssl or urllib.
Where a Redis is says redis_url, who answers there redis_hello, which node of a cluster redis_cluster, and what an error means
redis_asking.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ...errors import QueueFull
from ..base import (
    MAX_BATCH,
    SETTLED,
    STALE,
    Counters,
    Lease,
    Mark,
    NewJob,
    Owner,
    QueueStats,
    Retention,
    Row,
    Settlement,
    Token,
    lost,
)
from .redis_asking import Call, Command
from .redis_lua import HAND_OVER_WITHIN_S, LANES, MAX_BATCH_BYTES, PAST_FIELDS
from .redis_mend import Arg

QUEUES_KEY: Final = "kq:queues"  # a set: the names of all queues there ever were
DOCUMENTS_KEY: Final = "kq:documents"  # a hash: what daemons published
CALL_MEMORY_S: Final = 120  # that a client's call about dead letters is recognised when it is repeated

# -- calls ------------------------------------------------------------------------------------------------------------


class Sender:
    """A name under which one enqueue at a time is made, so that the script can tell a repeated one from the next."""

    __slots__ = ("name", "request")

    def __init__(self) -> None:
        self.name = os.urandom(9).hex()
        self.request = 0  # number of the last one


def prefix(queue: str) -> str:
    """What the keys of `queue` begin with."""
    return f"kq:{{{queue}}}:"


def bell(queue: str) -> str:
    """The channel that is rung."""
    return f"kq:{{{queue}}}:bell"


def own_channel(queue: str, epoch: str) -> str:
    """The channel by which `epoch` is handed jobs of `queue`. Read what comes by `read_handed`."""
    return f"kq:{{{queue}}}:to:{epoch}"


def publish(documents: Mapping[str, bytes]) -> Command:
    return ("HSET", DOCUMENTS_KEY, *(part for document in documents.items() for part in document))


def read_documents(keys: Sequence[bytes], values: Sequence[bytes | None]) -> dict[str, bytes]:
    """What HMGET said of `keys`. One that is gone meanwhile is left out."""
    found = zip(keys, values, strict=True)
    return {key.decode("utf-8", "replace"): value for key, value in found if value is not None}


class Adding:
    """One enqueue: what to ask for it, call by call, and what came of it. The I/O is its owner's.

        for calls in adding.calls():
            adding.replies = …  # to these calls, in their order
        adding.fresh            # for each job whether it is new

    `sender` is this one's alone meanwhile; `memory_s`: seconds for which a repeated call is recognised.
    """

    def __init__(self, jobs: Sequence[NewJob], max_depth: int, sender: Sender, memory_s: int) -> None:
        self.fresh = [False] * len(jobs)
        self.replies: Sequence[Any] = ()
        self._jobs = jobs
        self._max_depth = max_depth
        self._sender = sender
        self._memory_s = memory_s

    def calls(self) -> Iterator[list[Call]]:
        """The next calls; each list is made when the replies to the one before are there. Raises QueueFull."""
        coming = Counter([job.queue for job in self._jobs]) if self._max_depth else {}
        if len(coming) > 1:  # no script may look into two queues, so this much can be overtaken
            yield [stats(queue) for queue in coming]
            for (queue, count), reply in zip(coming.items(), self.replies, strict=True):
                found = read_stats(reply)
                if found.ready + found.delayed + count > self._max_depth:
                    raise _full(queue, found.ready + found.delayed, self._max_depth)
        for positions in batches(self._jobs):
            batch = [self._jobs[position] for position in positions]
            queue = batch[0].queue
            room = (self._max_depth, coming.pop(queue)) if queue in coming else (0, 0)  # the first speaks for all of its queue
            yield [enqueue(self._sender, self._memory_s, batch, *room)]
            (reply,) = self.replies
            for position, fresh in zip(positions, read_enqueued(reply, queue, self._max_depth), strict=True):
                self.fresh[position] = fresh


def batches(jobs: Sequence[NewJob]) -> Iterator[list[int]]:
    """Positions in `jobs` that may be enqueued together: one queue, MAX_BATCH jobs, MAX_BATCH_BYTES of envelopes."""
    queues: dict[str, list[int]] = {}
    for position, job in enumerate(jobs):
        queues.setdefault(job.queue, []).append(position)
    for positions in queues.values():
        batch: list[int] = []
        size = 0
        for position in positions:
            length = len(jobs[position].envelope)
            if batch and (len(batch) == MAX_BATCH or size + length > MAX_BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(position)
            size += length
        yield batch


def enqueue(sender: Sender, memory_s: int, batch: Sequence[NewJob], max_depth: int = 0, total: int = 0) -> Call:
    """The next enqueue of `sender`, of one of `batches`; repeats of it are recognised for `memory_s` seconds.

    With `max_depth` > 0, all `total` jobs that are to come have to fit under it, or none is added.
    """
    sender.request += 1
    args: list[Arg] = [1, prefix(batch[0].queue), sender.name, sender.request, memory_s, max_depth, total]
    for job in batch:
        args += _job(job)
    return Call("enqueue", args)


def _job(job: NewJob) -> tuple[Arg, ...]:
    delay = repr(job.delay_s) if job.delay_s > 0 else ""
    return job.id.encode(), job.lane, job.priority, delay, "" if job.at is None else repr(job.at), job.envelope


def reserve(owner: Owner, lease_s: float, request: int, queue: str, wants: Iterable[int]) -> Call:
    """Lease jobs; `wants` in the order of LANES."""
    return Call("reserve", [1, prefix(queue), owner.epoch, owner.identity, lease_s, request, *wants])


def settle(owner: Owner, lease_s: float, request: int, epoch: str, batch: Sequence[Settlement]) -> tuple[Call, list[int]]:
    """End leases of one epoch in one queue; and the positions in `batch` in the order in which the answers come."""
    plain: dict[bytes, int] = {}
    others: list[Arg] = []
    order: list[int] = []
    later: list[int] = []
    queue = batch[0].queue
    for position, item in enumerate(batch):
        id = _bytes(item.token.id)
        if item.verb == "ack" and item.keep_s <= 0 and not item.follow_ups and id not in plain:
            order.append(position)
            plain[id] = item.token.number
        else:
            later.append(position)
            others += (
                id, item.token.number, item.verb, *item.counters, item.delay_s, item.lane or "", item.certificate or b"",
                item.result or b"", item.keep_s, len(item.follow_ups),
            )  # fmt: skip
            for job in item.follow_ups:
                others += ("" if job.queue == queue else job.queue, *_job(job))
    head: list[Arg] = [1, prefix(queue), epoch, owner.epoch, request, len(order), owner.identity, lease_s]
    return Call("settle", [*head, *plain, *plain.values(), *others]), order + later


def settle_parts(batch: Sequence[Settlement]) -> Iterator[list[tuple[str, list[int]]]]:
    """What of `batch` may be asked at once, as (epoch, positions): one queue and epoch each, and no queue twice.

    Each within MAX_BATCH jobs and MAX_BATCH_BYTES, follow-ups among them, unless one settlement alone is more.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for position, (token, queue, *_) in enumerate(batch):
        groups.setdefault((queue, token.epoch), []).append(position)
    queues: dict[str, list[tuple[str, list[int]]]] = {}
    for (queue, epoch), positions in groups.items():
        parts = queues.setdefault(queue, [])
        jobs, size = MAX_BATCH, 0
        for position in positions:
            item = batch[position]
            more, length = 1, 0
            if item.certificate or item.result or item.follow_ups:
                more += len(item.follow_ups)
                length = len(item.certificate or b"") + len(item.result or b"")
                length += sum(len(job.envelope) for job in item.follow_ups)
            if jobs + more > MAX_BATCH or size + length > MAX_BATCH_BYTES:
                parts.append((epoch, []))
                jobs, size = 0, 0
            parts[-1][1].append(position)
            jobs, size = jobs + more, size + length
    while queues:
        yield [parts.pop(0) for parts in queues.values()]
        queues = {queue: parts for queue, parts in queues.items() if parts}


class FollowUp(NamedTuple):
    """A job in the outbox of a queue."""

    name: bytes  # there
    queue: str  # where it goes
    fields: Sequence[Arg]  # id, lane, priority, due, envelope


def outbox(queue: str) -> Call:
    """Read some of what is to be handed over to other queues; read it by `read_outbox`."""
    return Call("outbox", [1, prefix(queue)])


def hand_over(queue: str, read_at: bytes, jobs: Sequence[FollowUp]) -> Call:
    """Add follow-ups to their `queue`, at most once each. Replies 0 when that is too late: then nothing was done."""
    args: list[Arg] = [1, prefix(queue), read_at]
    for job in jobs:
        args += (job.name, *job.fields)
    return Call("hand_over", args)


def handed_over(queue: str, jobs: Sequence[FollowUp]) -> Command:
    """Take them out of the outbox of `queue`."""
    return ("HDEL", prefix(queue) + "outbox", *(job.name for job in jobs))


def unmark(jobs: Sequence[FollowUp]) -> list[Command]:
    """Let the marks go soon; only after `handed_over`."""
    return [("EXPIRE", prefix(job.queue).encode() + b"handed:" + job.name, 2 * HAND_OVER_WITHIN_S) for job in jobs]


def open_epoch(owner: Owner, lease_s: float, queue: str, culprit: str = "") -> Call:
    now = time.time()
    certificates = (lost(now), _bytes(culprit), lost(now, culprit=True))
    return Call("open", [1, prefix(queue), owner.epoch, owner.identity, lease_s, *certificates])


def renew(owner: Owner, lease_s: float, queue: str) -> Call:
    return Call("renew", [1, prefix(queue), owner.epoch, owner.identity, lease_s])


def sweep(lease_s: float, queue: str, may_expire: bool, retention: Retention) -> Call:
    """`may_expire`: an epoch whose time is over is taken for dead, not only one that was given up."""
    return Call("sweep", [1, prefix(queue), lease_s, int(may_expire), lost(time.time()), *retention])


def expire_nobody(call: Call) -> None:
    """Make a `sweep` that is to be asked again one that may not expire."""
    call.args[3] = 0


def stats(queue: str) -> Call:
    return Call("stats", [1, prefix(queue)])


def cancel(queue: str, id: str, certificate: bytes) -> Call:
    return Call("cancel", [1, prefix(queue), _bytes(id), certificate])


def retry(queue: str, ids: Sequence[str]) -> Call:
    """Make dead jobs ready, as if they had never run but for their certificates; at most MAX_BATCH. Read it by `read_digits`."""
    return _of_dead("retry", queue, ids)


def forget(queue: str, ids: Sequence[str]) -> Call:
    """Delete dead jobs; at most MAX_BATCH. Read it by `read_digits`."""
    return _of_dead("forget", queue, ids)


def _of_dead(script: str, queue: str, ids: Sequence[str]) -> Call:
    """A call that has a name of its own, so that a repeated one is answered as the first."""
    return Call(script, [1, prefix(queue), os.urandom(9).hex(), CALL_MEMORY_S, *map(_bytes, ids)])


def dead(queue: str, after: Mark | None, until: Mark, skip: int, limit: int) -> Command:
    """Dead jobs by the time of their death, `after` and `until` and all others of the same moments among them."""
    first = "-inf" if after is None else repr(after.died_at)
    return ("ZRANGEBYSCORE", f"{prefix(queue)}dead", first, repr(until.died_at), "WITHSCORES", "LIMIT", skip, limit)


def newest_dead(queue: str, limit: int) -> Command:
    """The last `limit` deaths, the last first. Read it by `read_dead`."""
    return ("ZREVRANGE", f"{prefix(queue)}dead", 0, limit - 1, "WITHSCORES")


def show(queue: str, id: str) -> Call:
    return Call("show", [1, prefix(queue), _bytes(id), *PAST_FIELDS])


def close(owner: Owner, queue: str) -> Call:
    return Call("close", [1, prefix(queue), owner.epoch])


# -- replies ----------------------------------------------------------------------------------------------------------

YES: Final = ord("1")  # a digit of the answers
_NONE: Final = Counters()
_FIRST: Final[tuple[int, Sequence[bytes | None]]] = (1, ())  # its number, and what it went through


def read_leases(epoch: str, queue: str, lanes: Sequence[Sequence[Any]]) -> list[Lease]:
    """The leases in a reply of `reserve`; `lanes` are three lists for each of LANES."""
    leases = []
    for lane, ids, jobs, others in zip(LANES, lanes[::3], lanes[1::3], lanes[2::3], strict=True):
        rest = iter(others)
        again = {at: (int(number), past) for at, number, past in zip(rest, rest, rest, strict=True)}
        for at, (id, job) in enumerate(zip(ids, jobs, strict=True), 1):
            _, _, available_at, envelope = _read_job(job)
            number, past = again.get(at, _FIRST)
            counters = _NONE
            if past:
                a, c, r, d, m, later, *_ = past
                available_at = later or available_at
                if a or c or r or d:
                    counters = Counters(_count(a), _count(c), _count(r), _count(d), _count(m))
            token = Token(epoch, id.decode("utf-8", "surrogateescape"), number)
            leases.append(Lease(token, queue, lane, envelope, counters, _seconds(available_at)))
    return leases


def read_handed(epoch: str, queue: str, message: bytes) -> tuple[int, Lease]:
    """The number of the reservation that a client has made for us, and what it brings."""
    head, _, rest = message.partition(b"\n")
    number, length = map(int, head.split(b" "))
    id, job = rest[:length], rest[length:]
    lane, _, available_at, envelope = _read_job(job)
    token = Token(epoch, id.decode("utf-8", "surrogateescape"), 1)
    return number, Lease(token, queue, lane.decode(), envelope, _NONE, _seconds(available_at))


def _read_job(job: bytes | None) -> tuple[bytes, bytes, bytes, bytes | None]:
    """Lane, priority, available_at and envelope in what stands in job:<id>. What KQueue did not write there is all envelope."""
    head, _, envelope = (job or b"").partition(b"\n")
    try:
        lane, priority, at = head.split(b" ")
    except ValueError:
        return b"", b"", b"", job
    return lane[1:], priority, at, envelope or None


def read_enqueued(reply: bytes | int, queue: str, max_depth: int) -> list[bool]:
    """For each job of an `enqueue` whether it is new. Raises QueueFull."""
    if isinstance(reply, int):
        raise _full(queue, reply, max_depth)
    return read_digits(reply)


def _full(queue: str, depth: int, max_depth: int) -> QueueFull:
    return QueueFull(f"queue {queue!r} holds {depth} jobs, allowed are {max_depth}")


def read_digits(digits: bytes) -> list[bool]:
    """For each job whether the call did what it says."""
    return [digit == YES for digit in digits]


def read_dead(flat: Sequence[bytes], after: Mark | None = None, until: Mark | None = None) -> list[Mark]:
    """The marks in a reply that are behind `after` and up to `until`, which of one moment Redis sorts by the bytes of the id."""
    pairs = zip(flat[::2], flat[1::2], strict=True)
    marks = [Mark(float(score), id.decode("utf-8", "surrogateescape")) for id, score in pairs]
    first, last = (None if mark is None else (mark.died_at, _bytes(mark.id)) for mark in (after, until))
    found = [(mark, (mark.died_at, _bytes(mark.id))) for mark in marks]
    return [mark for mark, at in found if (first is None or at > first) and (last is None or at <= last)]


def server_version(answer: Any) -> str:
    """Of the answer to INFO server, which may be an error: "Valkey 8.0.1"."""
    lines = answer.decode("utf-8", "replace").splitlines() if isinstance(answer, bytes) else []
    info = {name: value for name, _, value in (line.partition(":") for line in lines)}
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}" if "redis_version" in info else "a version it does not tell"


def read_settled(digits: bytes) -> list[str]:
    return [SETTLED if digit == YES else STALE for digit in digits]


def read_outbox(queue: str, reply: Sequence[Any]) -> tuple[bytes, list[FollowUp], bool]:
    """When it was read, what stood in the outbox of `queue`, and whether there is more.

    What is no job is handed over to the queue itself, where it is buried with the reason, as garbage is.
    """
    read_at, entries, more = reply
    found = []
    for name, value in entries:
        if isinstance(value, bytes):
            found.append(FollowUp(name, queue, (name, LANES[0], 0, read_at, value)))
        else:
            found.append(FollowUp(name, value[0].decode("utf-8", "surrogateescape"), value[1:]))
    return read_at, found, bool(more)


def read_stats(reply: Sequence[int]) -> QueueStats:
    return QueueStats(*reply)


def read_row(
    queue: str, id: str, state: bytes, job: bytes | None, past: Sequence[bytes | None], certificates: Sequence[bytes]
) -> Row:
    """A job as clients see it, whatever stands in its keys. `past` in the order of PAST_FIELDS, or none of them at all."""
    lane, priority, at, envelope = _read_job(job)
    lane_now, at_now, *counts, result = past or (None,) * len(PAST_FIELDS)
    return Row(
        id, queue, state.decode(), LANES[(lane_now or lane) == b"isolated"], int(_seconds(priority)), _seconds(at_now or at),
        Counters(*map(_count, counts)), envelope, result or None, tuple(certificates),
    )  # fmt: skip


def _bytes(id: str) -> bytes:
    return id.encode("utf-8", "surrogateescape")  # whatever bytes a stranger used as a member


def _count(text: bytes | None) -> int:
    return int(text) if text and text.isdigit() and len(text) < 16 else 0


def _seconds(text: bytes | None) -> float:
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if -1e15 < value < 1e15 else 0.0
