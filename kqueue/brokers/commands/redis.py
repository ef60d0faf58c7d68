"""Redis: where it is (the URL), what is asked of it (calls of the scripts in redis_scripts), and what its answers mean. No I/O.

Shared by the daemon's transport, which must stay small, and by the client. So nothing here may import redis-py, ssl or urllib.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from hiredis import pack_command

from ...errors import BrokerRefused, QueueFull, UsageError, nearest
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
from .redis_lua import HAND_OVER_WITHIN_S, LANES, MAX_BATCH_BYTES, ROW_FIELDS
from .redis_mend import Arg, mend, suspects, told

QUEUES_KEY: Final = "kq:queues"  # a set: the names of all queues there ever were
DOCUMENTS_KEY: Final = "kq:documents"  # a hash: what daemons published
CALL_MEMORY_S: Final = 120  # that a client's call about dead letters is recognised when it is repeated
OLDEST: Final = (6, 2)  # version of Redis that is enough

# -- where it is ------------------------------------------------------------------------------------------------------

_TLS_OPTIONS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
_URL: Final = re.compile(
    r"(?P<scheme>[a-z+]+)://(?:(?P<user>[^@/]*)@)?(?P<host>\[[^]]*\]|[^/:?]*)(?::(?P<port>\d+))?(?P<path>/[^?]*)?(?:\?(?P<query>.*))?"
)


class Tls(NamedTuple):
    """The ssl_* options of a URL, named as redis-py names them. "" for a file: none, or the system's."""

    ca_certs: str = ""
    certfile: str = ""
    keyfile: str = ""
    cert_reqs: str = "required"  # or "optional", "none"
    check_hostname: str = "true"  # whether the certificate has to be the host's

    @property
    def checks_host(self) -> bool:
        return self.cert_reqs == "required" and self.check_hostname.lower() not in ("false", "no", "0")


class Target(NamedTuple):
    """A parsed URL. `path` is of a Unix socket, "" when it is TCP; `tls` None: no TLS."""

    host: str
    port: int
    path: str
    db: int
    username: str
    password: str
    tls: Tls | None

    @property
    def address(self) -> str:
        """The URL without secrets."""
        if self.path:
            return f"unix://{self.path}" + (f"?db={self.db}" if self.db else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' if self.tls is not None else ''}://{host}:{self.port}/{self.db}"


def parse_url(url: str) -> Target:
    """redis://[[user]:password@]host[:port][/db], rediss:// (TLS), unix:///path[?db=N]. UsageError, which names no secret."""
    match = _URL.fullmatch(url)
    scheme = url.partition(":")[0]
    if match is None or scheme not in ("redis", "rediss", "unix"):
        forms = "redis://host:6379/0, rediss://host:6379/0 or unix:///path/to/redis.sock?db=0"
        raise UsageError(f"cannot read the queue's URL ({scheme}://…); write it as {forms}, with user:password@ before the host")
    user, _, password = (match["user"] or "").partition(":")
    path = _decode(match["path"] or "")
    options = {}
    for pair in filter(None, (match["query"] or "").split("&")):
        name, _, value = pair.partition("=")
        if name not in (*_TLS_OPTIONS, "db"):
            raise UsageError(f"unknown option {name!r} in the queue's URL ({scheme}://…){nearest(name, ('db', *_TLS_OPTIONS))}")
        options[name] = _decode(value)
    local = scheme == "unix"
    db = options.pop("db", "") or ("" if local else path.strip("/")) or "0"
    if not db.isdigit():
        raise UsageError(f"{db!r} in the queue's URL ({scheme}://…) is no database number; write a number, 0 being the first")
    tls = Tls(**{name.removeprefix("ssl_"): value for name, value in options.items()})
    if tls.cert_reqs not in ("required", "optional", "none"):
        raise UsageError(f"ssl_cert_reqs={tls.cert_reqs} in the queue's URL is none of required, optional, none")
    host = _decode(match["host"]).strip("[]") or "localhost"
    return Target(
        host,
        int(match["port"] or 6379),
        path if local else "",
        int(db),
        _decode(user),
        _decode(password),
        tls if scheme == "rediss" else None,
    )


def _decode(text: str) -> str:
    return re.sub("(?:%[0-9A-Fa-f]{2})+", lambda hex: bytes.fromhex(hex[0].replace("%", "")).decode("utf-8", "replace"), text)


# -- asking, and what an error means ----------------------------------------------------------------------------------

RIGHTS: Final = ("NOAUTH", "WRONGPASS", "NOPERM")  # somebody may give them back
_LATER: Final = {"LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "READONLY", "OOM", "MISCONF", "NOREPLICAS"}
_NEXT_STEP: Final = {
    "NOAUTH": "put user and password into the queue's URL",
    "WRONGPASS": "check user and password in the queue's URL",
    "NOPERM": "allow the user what KQueue needs: ~kq:* &kq:* +@read +@write +@scripting +@connection +@pubsub +time",
    "WRONGTYPE": "a key of KQueue was overwritten by something else; look at the keys kq:* and rename or delete that one",
    "MOVED": "this is a Redis Cluster, and another node holds the queue; give that node's address",
    "ASK": "this is a Redis Cluster that is moving the queue's slot; try again when it is done",
    "NOPROTO": "KQueue needs Redis or Valkey 6.2 or later",
}
# Before Redis 7 an error inside of a script came as "ERR Error running script (…): @user_script:12: WRONGTYPE Operation …".
_IN_SCRIPT: Final = re.compile(r"ERR Error running script.*?: -?([A-Z]{3,}) ")


class Verdict(NamedTuple):
    """What an error reply means. `later`: the same request may succeed later; else it never will."""

    code: str
    later: bool
    text: str  # the server's words, and the next step


def judge(message: str) -> Verdict:
    """Read an error reply."""
    message = message.split("\n", 1)[0][:300]
    inside = _IN_SCRIPT.match(message)
    code = inside[1] if inside else message.partition(" ")[0]
    step = _NEXT_STEP.get(code)
    later = code in _LATER or message.startswith("ERR max number of clients")
    return Verdict(code, later, f"{message.rstrip('.')}; {step}" if step else message)


Command = Sequence[Arg]


class Call(NamedTuple):
    """One run of a script: EVALSHA, its digest, then `args`."""

    script: str
    args: list[Arg]


class Asking:
    """Requests on their way to their replies: what to send next, and what to make of what came. The I/O is its owner's.

    `address` is for messages; `words(error)` is what the server said.
    `wait_for_rights`: missing rights are trouble that may pass.
    `on_mended(text)` hears of keys of a wrong type that were moved out of the way (see redis_mend).
    `once`: what is refused, now or for good, is not asked again; its reply is None, and the reason is added to `refusals`.
    """

    def __init__(
        self, asked: Sequence[Call | Command], scripts: Mapping[str, str], address: str, *, wait_for_rights: bool = False,
        words: Callable[[Exception], str] = str, on_mended: Callable[[str], None] = lambda text: None, once: bool = False,
        refusals: list[str] | None = None,
    ) -> None:  # fmt: skip
        self.replies: list[Any] = [None] * len(asked)
        self.left = list(range(len(asked)))  # positions that have no reply yet
        self._asked = asked
        self._scripts = scripts
        self._address = address
        self._wait_for_rights = wait_for_rights
        self._words = words
        self._on_mended = on_mended
        self._once = once
        self._refusals = [] if refusals is None else refusals
        self._loading = False  # the server has forgotten our scripts
        self._wrong: dict[str, dict[str, str]] = {}  # what keys begin with -> names and types of those to be mended
        self._mended: set[str] = set()  # what the keys begin with that were

    def commands(self, digests: Mapping[str, Arg]) -> list[Command]:
        """What to send: everything that has no reply, and before it what is needed for there to be one."""
        sent: list[Command] = [("SCRIPT", "LOAD", text) for text in self._scripts.values()] if self._loading else []
        sent += [mend(prefix, names) for prefix, names in self._wrong.items()]
        for position in self.left:
            asked = self._asked[position]
            sent.append(("EVALSHA", digests[asked.script], *asked.args) if isinstance(asked, Call) else asked)
        return sent

    def hear(self, answers: Sequence[Any]) -> str:
        """Take the answers to `commands`. Why some have to be asked again later; "": none has. BrokerRefused: that is useless."""
        first = len(answers) - len(self.left)
        hopeless = self._hear_mended(answers[first - len(self._wrong) : first])
        again, trouble, unknown = [], "", False
        for position, answer in zip(self.left, answers[first:], strict=True):
            if not isinstance(answer, Exception):
                self.replies[position] = answer
                continue
            verdict = judge(self._words(answer))
            if verdict.code == "NOSCRIPT" and not self._loading:
                unknown = True
            elif verdict.code == "WRONGTYPE" and self._may_mend(self._asked[position], hopeless):
                pass
            elif self._once:
                self._refusals.append(verdict.text)
                continue
            elif verdict.later or (self._wait_for_rights and verdict.code in RIGHTS):
                trouble = verdict.text
            elif verdict.code == "WRONGTYPE" and self._wait_for_rights and hopeless:
                trouble = "; ".join((verdict.text, *hopeless.values()))
            else:
                raise BrokerRefused(f"{self._address}: {'; '.join((verdict.text, *hopeless.values()))}")
            again.append(position)
        self.left, self._loading = again, unknown
        return trouble

    def _hear_mended(self, answers: Sequence[Any]) -> dict[str, str]:
        """Take the answers to `mend`. Those that are errors, by what the keys begin with."""
        failed = {}
        for prefix, answer in zip(list(self._wrong), answers, strict=True):
            del self._wrong[prefix]
            if isinstance(answer, Exception):
                failed[prefix] = f"it could not be moved out of the way: {judge(self._words(answer)).text}"
                continue
            self._mended.add(prefix)
            for text in told(answer):
                self._on_mended(text)
        return failed

    def _may_mend(self, asked: Call | Command, hopeless: Mapping[str, str]) -> bool:
        """Have the keys looked at that this request uses; False when they were, and it is no use."""
        prefix, names = suspects(asked.script, asked.args) if isinstance(asked, Call) else suspects("", asked)
        if prefix in self._mended or prefix in hopeless:
            return False
        self._wrong.setdefault(prefix, {}).update(names)
        return True


# -- calls ------------------------------------------------------------------------------------------------------------


def pack(sent: Iterable[Command]) -> bytes:
    """Commands as they go over the wire."""
    return b"".join([pack_command(tuple(command)) for command in sent])  # type: ignore[arg-type]  # its stub means a 1-tuple


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


def publish(documents: Mapping[str, bytes]) -> Command:
    return ("HSET", DOCUMENTS_KEY, *(part for document in documents.items() for part in document))


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
        coming = Counter(job.queue for job in self._jobs) if self._max_depth else {}
        if len(coming) > 1:  # no script may look into two queues, so this much can be overtaken
            yield [stats(queue) for queue in coming]
            for (queue, count), reply in zip(coming.items(), self.replies, strict=True):
                found = read_stats(reply)
                if found.ready + found.delayed + count > self._max_depth:
                    raise self._full(queue, found.ready + found.delayed)
        for positions in batches(self._jobs):
            batch = [self._jobs[position] for position in positions]
            queue = batch[0].queue
            room = (self._max_depth, coming.pop(queue)) if queue in coming else (0, 0)  # the first speaks for all of its queue
            yield [enqueue(self._sender, self._memory_s, batch, *room)]
            (reply,) = self.replies
            if isinstance(reply, int):
                raise self._full(queue, reply)
            for position, digit in zip(positions, reply, strict=True):
                self.fresh[position] = digit == YES

    def _full(self, queue: str, depth: int) -> QueueFull:
        return QueueFull(f"queue {queue!r} holds {depth} jobs, allowed are {self._max_depth}")


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
    plain: list[Arg] = []
    others: list[Arg] = []
    order: list[int] = []
    later: list[int] = []
    queue = batch[0].queue
    for position, item in enumerate(batch):
        id = _bytes(item.token.id)
        if item.verb == "ack" and item.keep_s <= 0 and not item.follow_ups:
            order.append(position)
            plain += (id, item.token.number)
        else:
            later.append(position)
            others += (
                id, item.token.number, item.verb, *item.counters, item.delay_s, item.lane or "", item.certificate or b"",
                item.result or b"", item.keep_s, len(item.follow_ups),
            )  # fmt: skip
            for job in item.follow_ups:
                others += ("" if job.queue == queue else job.queue, *_job(job))
    head: list[Arg] = [1, prefix(queue), epoch, owner.epoch, request, len(order), owner.identity, lease_s]
    return Call("settle", [*head, *plain, *others]), order + later


def settle_parts(batch: Sequence[Settlement]) -> Iterator[list[tuple[str, list[int]]]]:
    """What of `batch` may be asked at once, as (epoch, positions): one queue and epoch each, and no queue twice.

    Each within MAX_BATCH jobs and MAX_BATCH_BYTES, follow-ups among them, unless one settlement alone is more.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for position, item in enumerate(batch):
        groups.setdefault((item.queue, item.token.epoch), []).append(position)
    queues: dict[str, list[tuple[str, list[int]]]] = {}
    for (queue, epoch), positions in groups.items():
        parts = queues.setdefault(queue, [])
        jobs, size = MAX_BATCH, 0
        for position in positions:
            item = batch[position]
            more = 1 + len(item.follow_ups)
            length = len(item.certificate or b"") + len(item.result or b"") + sum(len(job.envelope) for job in item.follow_ups)
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
    return Call("show", [1, prefix(queue), _bytes(id), *ROW_FIELDS])


def close(owner: Owner, queue: str) -> Call:
    return Call("close", [1, prefix(queue), owner.epoch])


# -- replies ----------------------------------------------------------------------------------------------------------

YES: Final = ord("1")  # a digit of the answers
_NONE: Final = Counters()


def read_leases(epoch: str, queue: str, lanes: Sequence[Sequence[Any]]) -> list[Lease]:
    """The leases in a reply of `reserve`; `lanes` in the order of LANES."""
    leases = []
    for lane, flat in zip(LANES, lanes, strict=True):
        rest = iter(flat)
        for id, number, fields in zip(rest, rest, rest, strict=True):
            envelope, a, c, r, d, m, at, *_ = fields or (None,) * 9
            counters = _NONE if not (a or c or r or d) else Counters(_count(a), _count(c), _count(r), _count(d), _count(m))
            token = Token(epoch, id.decode("utf-8", "surrogateescape"), int(number))
            leases.append(Lease(token, queue, lane, envelope, counters, _seconds(at)))
    return leases


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


def read_row(queue: str, id: str, state: bytes, fields: Sequence[bytes | None], certificates: Sequence[bytes]) -> Row:
    """A job as clients see it, whatever stands in its hash. `fields` in the order of ROW_FIELDS, or none of them at all."""
    envelope, lane, priority, at, *counts, result = fields or (None,) * len(ROW_FIELDS)
    return Row(
        id, queue, state.decode(), LANES[lane == b"isolated"], int(_seconds(priority)), _seconds(at),
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
