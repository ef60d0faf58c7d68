"""Redis for clients: the blocking protocol, with the very scripts that the daemon uses. redis_wire has the connections."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final

from ..brokers.base import Finding, Mark, NewJob, QueueStats, Row, last_of_dead, listed, place
from ..brokers.commands import redis as commands
from ..brokers.commands.redis_asking import Call, Command
from ..brokers.commands.redis_durability import QUESTIONS, durability
from ..brokers.commands.redis_lua import LANES
from ..brokers.commands.redis_url import parse_url
from ..errors import BrokerUnavailable
from .redis_wire import Wire

SENDER_MEMORY_S: Final = 120  # longer than any call repeats itself
LIST_AGAIN_S: Final = 60.0  # between two notes of a queue's name, which somebody may have flushed away


class RedisClient:
    """A queue in Redis behind the blocking protocol (`brokers.base.Store`). It connects when it is first asked something.

    `patience_s` (seconds): how long a call goes on trying before it raises BrokerUnavailable.
    """

    def __init__(self, url: str, *, patience_s: float = 3.0) -> None:
        self._wire = Wire(parse_url(url), patience_s)
        self.address = self._wire.address
        self._listed: dict[str, float] = {}  # queue -> when its name was last noted

    # -- the protocol -----------------------------------------------------------------------------------------------

    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> list[bool]:
        """As Broker.enqueue. Jobs of several queues are added queue by queue, so one that fills meanwhile stops only the rest.

        BrokerUnavailable: nothing was added, unless it says so; dispatched again with the same id, a job is there once.
        """
        if len(jobs) == 1:
            return self._enqueue_one(jobs[0], max_depth)
        sender = self._wire.take_sender()
        adding = commands.Adding(jobs, max_depth, sender, SENDER_MEMORY_S)
        note = self._note({job.queue for job in jobs})
        for calls in adding.calls():
            adding.replies = self._wire.ask([*note, *calls], doubt=partial(_doubt, jobs))[len(note) :]
            note = []
        self._wire.give_sender(sender)
        return adding.fresh

    def _enqueue_one(self, job: NewJob, max_depth: int) -> list[bool]:
        """What `Adding` comes to then, at a third of its cost: it is the call that applications wait for."""
        sender = self._wire.take_sender()
        call = commands.enqueue(sender, SENDER_MEMORY_S, (job,), max_depth, 1 if max_depth else 0)
        *_, reply = self._wire.ask([*self._note((job.queue,)), call], doubt=partial(_doubt, (job,)))
        fresh = commands.read_enqueued(reply, job.queue, max_depth)
        self._wire.give_sender(sender)
        return fresh

    def show(self, id: str, queue: str | None = None) -> Row | None:
        return next(iter(self._rows([(name, id) for name in self._queues(queue)])), None)

    def list(self, state: str | None, queue: str | None, limit: int) -> list[Row]:
        queues = self._queues(queue)
        if state == "dead":
            places = self._newest_dead(queues, limit)
        else:
            places = [(name, id) for name in queues for id in self._ids(name, state, limit)]
        rows = [row._replace(certificates=last_of_dead(row)) for row in self._rows(places) if listed(row.state, state)]
        if state != "dead":
            rows.sort(key=lambda row: (place(row.available_at, row.priority), row.id))
        return rows[:limit]

    def stats(self) -> dict[str, QueueStats]:
        return self._stats(self._queues(None))

    def cancel(self, id: str, certificate: bytes, queue: str | None = None) -> bool:
        calls = [commands.cancel(name, id, certificate) for name in self._queues(queue)]
        try:
            return any(self._wire.ask(calls, repeat=False))
        except BrokerUnavailable:
            row = self.show(id, queue)  # the reply may have been lost after it was done
            ours = row is not None and row.state == "dead" and row.certificates[-1:] == (certificate,)
            return any(self._wire.ask(calls)) or ours  # asked again it changes nothing more, but waits for replicas

    def retry(self, ids: Sequence[str], queue: str | None = None) -> Sequence[bool]:
        return self._of_dead(commands.retry, ids, queue)

    def forget(self, ids: Sequence[str], queue: str | None = None) -> Sequence[bool]:
        return self._of_dead(commands.forget, ids, queue)

    def dead(self, queue: str, after: Mark | None, until: Mark, limit: int) -> Sequence[Mark]:
        marks: list[Mark] = []
        found = limit
        seen = 0
        while len(marks) < limit and found == limit:  # those that died in the moment of `after` come again before the others
            (flat,) = self._wire.ask([commands.dead(queue, after, until, seen, limit)])
            marks += commands.read_dead(flat, after, until)
            found = len(flat) // 2
            seen += found
        return marks[:limit]

    def last_dead(self, queue: str) -> Mark | None:
        (flat,) = self._wire.ask([commands.newest_dead(queue, 1)])
        return next(iter(commands.read_dead(flat)), None)

    def documents(self, prefix: str) -> dict[str, bytes]:
        (keys,) = self._wire.ask([("HKEYS", commands.DOCUMENTS_KEY)])
        wanted = [key for key in keys if key.startswith(prefix.encode())]
        if not wanted:
            return {}
        (values,) = self._wire.ask([("HMGET", commands.DOCUMENTS_KEY, *wanted)])
        return commands.read_documents(wanted, values)

    def publish(self, documents: Mapping[str, bytes]) -> None:
        self._wire.ask([commands.publish(documents)])

    def health(self) -> Sequence[Finding]:
        """What each server would lose, and when. BrokerUnavailable, BrokerRefused."""
        answers = self._wire.each_node(QUESTIONS)
        found = [(f"{node[0]}:{node[1]}: " if len(answers) > 1 else "", durability(replies)) for node, replies in answers.items()]
        return [finding._replace(text=where + finding.text) for where, findings in found for finding in findings]

    def version(self) -> str:
        answers = self._wire.each_node([("INFO", "server")])
        return ", ".join(sorted({commands.server_version(reply) for (reply,) in answers.values()}))

    def close(self) -> None:
        self._wire.close()

    # -- their parts ------------------------------------------------------------------------------------------------

    def _queues(self, queue: str | None) -> Sequence[str]:
        if queue is not None:
            return [queue]
        (names,) = self._wire.ask([("SMEMBERS", commands.QUEUES_KEY)])
        return sorted(name.decode("utf-8", "replace") for name in names)

    def _of_dead(
        self, call: Callable[[str, Sequence[str]], Call], ids: Sequence[str], queue: str | None
    ) -> Sequence[bool]:
        done = dict.fromkeys(ids, False)
        for name in self._queues(queue):
            left = [id for id, found in done.items() if not found]
            if left:
                (digits,) = self._wire.ask([call(name, left)])
                done |= zip(left, commands.read_digits(digits), strict=True)
        return [done[id] for id in ids]

    def _stats(self, queues: Sequence[str]) -> dict[str, QueueStats]:
        replies = self._wire.ask([commands.stats(queue) for queue in queues])
        return {queue: commands.read_stats(reply) for queue, reply in zip(queues, replies, strict=True)}

    def _rows(self, places: Sequence[tuple[str, str]]) -> Sequence[Row]:
        """The jobs that there are at these (queue, id)."""
        replies = self._wire.ask([commands.show(queue, id) for queue, id in places])
        return [commands.read_row(*at, *reply) for at, reply in zip(places, replies, strict=True) if reply is not None]

    def _ids(self, queue: str, state: str | None, limit: int) -> Sequence[str]:
        """The first `limit` of each set that holds jobs of `state` (None: of any but done), best place or oldest first."""
        prefix = commands.prefix(queue)
        sets = [("ready", f"ready:{lane}") for lane in LANES] + [(name, name) for name in ("delayed", "dead", "done")]
        found = self._wire.ask([("ZRANGE", prefix + key, 0, limit - 1) for name, key in sets if listed(name, state)])
        ids = [id for part in found for id in part]
        if state in (None, "leased"):
            (epochs,) = self._wire.ask([("ZRANGE", f"{prefix}epochs", 0, -1)])
            for epoch in epochs:
                ids += self._leased(f"{prefix}leased:".encode() + epoch, limit)
        return [id.decode("utf-8", "surrogateescape") for id in ids]

    def _newest_dead(self, queues: Sequence[str], limit: int) -> Sequence[tuple[str, str]]:
        """Queue and id of the last `limit` deaths, the last first."""
        replies = self._wire.ask([commands.newest_dead(queue, limit) for queue in queues])
        found = [(mark, queue) for queue, flat in zip(queues, replies, strict=True) for mark in commands.read_dead(flat)]
        return [(queue, mark.id) for mark, queue in sorted(found, reverse=True)[:limit]]

    def _leased(self, key: bytes, limit: int) -> Sequence[bytes]:
        ids: dict[bytes, None] = {}  # HSCAN may say one twice
        cursor = b""
        while cursor != b"0" and len(ids) < limit:
            ((cursor, pairs),) = self._wire.ask([("HSCAN", key, cursor or 0, "COUNT", limit)])
            ids |= dict.fromkeys(pairs[::2])
        return [*ids][:limit]

    def _note(self, queues: Iterable[str]) -> Sequence[Command]:
        """The command that lets others find those of `queues` for which it is time, if there are any."""
        now = time.monotonic()
        due = [queue for queue in queues if now - self._listed.get(queue, -LIST_AGAIN_S) >= LIST_AGAIN_S]
        if not due:
            return ()
        self._listed.update(dict.fromkeys(due, now))
        return [("SADD", commands.QUEUES_KEY, *due)]


def _doubt(jobs: Sequence[NewJob]) -> str:
    """What to say when nobody knows whether they were added."""
    if len(jobs) == 1:
        id = jobs[0].id
        return f'job {id} may be there all the same: dispatch it again with .options(id="{id}"), which adds it once'
    return f"some of the {len(jobs)} jobs ({jobs[0].id} …) may be there all the same: those dispatched again by id are added once"
