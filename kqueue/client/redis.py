"""Redis for clients: the blocking protocol over redis-py's connections, with the very scripts that the daemon uses.

redis-py connects, authenticates, speaks TLS and parses; its command layer, pool and retries are not used. They cost more than the
round trip, and their retries would add a job again that has already run: here a request is repeated only as the scripts recognise it.

Thread-safe without a lock: a connection, and a sender's name, belong to one call at a time, taken from lists whose pop and append are
atomic. Fork-safe: a child that finds another process's lists starts new ones.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from hiredis import pack_command

from ..brokers.base import NewJob, QueueStats, Row, place
from ..brokers.commands import redis as commands
from ..brokers.commands.redis_lua import CLIENT_SCRIPTS, LANES, ROW_FIELDS
from ..errors import BrokerRefused, BrokerUnavailable, QueueFull

if TYPE_CHECKING:
    from redis.connection import AbstractConnection

Command = Sequence[commands.Arg]

REPLY_TIMEOUT_S: Final = 5.0
CONNECT_TIMEOUT_S: Final = 3.0
FIRST_BACKOFF_S: Final = 0.05
SENDER_MEMORY_S: Final = 120  # longer than any call repeats itself
LIST_AGAIN_S: Final = 60.0  # between two notes of a queue's name, which somebody may have flushed away

_DIGESTS: Final = {name: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in CLIENT_SCRIPTS.items()}
# redis-py cuts these codes off its messages and says them by the class.
_CODES: Final = {
    "AuthenticationError": "WRONGPASS", "NoPermissionError": "NOPERM", "AuthorizationError": "NOAUTH", "BusyLoadingError": "LOADING",
    "ReadOnlyError": "READONLY", "OutOfMemoryError": "OOM", "NoScriptError": "NOSCRIPT", "MasterDownError": "MASTERDOWN",
    "ClusterDownError": "CLUSTERDOWN", "TryAgainError": "TRYAGAIN", "MovedError": "MOVED", "AskError": "ASK",
}  # fmt: skip


class RedisClient:
    """A queue in Redis behind the blocking protocol (`brokers.base.Store`). Connects when it is first asked something.

    `patience_s` (seconds): how long a call goes on trying before it raises BrokerUnavailable.
    """

    def __init__(self, url: str, *, patience_s: float = 5.0) -> None:
        self._target = commands.parse_url(url)
        self.address = self._target.address
        self.patience_s = patience_s
        self._pid = os.getpid()
        self._free: list[AbstractConnection] = []
        self._senders: list[commands.Sender] = []
        self._listed: dict[str, float] = {}  # queue -> when its name was last noted

    # -- the protocol -----------------------------------------------------------------------------------------------

    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> list[bool]:
        """As Broker.enqueue. Jobs of several queues are added queue by queue, so one that fills meanwhile stops only the rest."""
        depths = {job.queue: sum(other.queue == job.queue for other in jobs) for job in jobs} if max_depth else {}
        if len(depths) > 1:
            for queue, stats in self._stats(list(depths)).items():
                if stats.ready + stats.delayed + depths[queue] > max_depth:
                    raise QueueFull(commands.full(queue, stats.ready + stats.delayed, max_depth))
        self._look_whose()
        fresh = [False] * len(jobs)
        sender = self._senders.pop() if self._senders else commands.Sender()
        for positions in commands.batches(jobs):
            batch = [jobs[position] for position in positions]
            queue = batch[0].queue
            room = (max_depth, depths.pop(queue)) if queue in depths else (0, 0)
            call = commands.enqueue(sender, SENDER_MEMORY_S, batch, *room)
            reply = self._ask([*self._note(queue), call])[-1]
            if isinstance(reply, int):
                raise QueueFull(commands.full(queue, reply, max_depth))
            for position, digit in zip(positions, reply, strict=True):
                fresh[position] = digit == commands.YES
        self._senders.append(sender)
        return fresh

    def show(self, id: str, queue: str | None = None) -> Row | None:
        queues = self._queues(queue)
        for name, reply in zip(queues, self._ask([commands.show(name, id) for name in queues]), strict=True):
            if reply is not None:
                state, fields, certificates = reply
                return commands.read_row(name, id, state.decode(), fields, certificates)
        return None

    def list(self, state: str | None, queue: str | None, limit: int) -> list[Row]:
        rows: list[Row] = []
        for name in self._queues(queue):
            found = self._standing(name, state, limit) if state != "leased" else []
            found += self._leased(name, limit) if state in (None, "leased") else []
            prefix = commands.prefix(name)
            replies = self._ask([("HMGET", f"{prefix}job:".encode() + id, *ROW_FIELDS) for _, id in found], errors=True)
            for (standing, id), fields in zip(found, replies, strict=True):
                readable = fields if isinstance(fields, list) else []
                rows.append(commands.read_row(name, id.decode("utf-8", "surrogateescape"), standing, readable))
        rows.sort(key=lambda row: (place(row.available_at, row.priority), row.id))
        return rows[:limit]

    def stats(self) -> dict[str, QueueStats]:
        return self._stats(self._queues(None))

    def cancel(self, id: str, certificate: bytes, queue: str | None = None) -> bool:
        calls = [commands.cancel(name, id, certificate) for name in self._queues(queue)]
        try:
            return any(self._ask(calls, repeat=False))
        except BrokerUnavailable:
            row = self.show(id, queue)  # the reply may have been lost after it was done
            if row is not None and row.state == "dead" and row.certificates[-1:] == (certificate,):
                return True
            return any(self._ask(calls))

    def document(self, key: str) -> bytes | None:
        (document,) = self._ask([("GET", commands.document_key(key))])
        return document if isinstance(document, bytes) else None

    def close(self) -> None:
        while self._free:
            self._free.pop().disconnect()

    # -- their parts ------------------------------------------------------------------------------------------------

    def _queues(self, queue: str | None) -> Sequence[str]:
        if queue is not None:
            return [queue]
        (names,) = self._ask([("SMEMBERS", commands.QUEUES_KEY)])
        return sorted(name.decode("utf-8", "surrogateescape") for name in names)

    def _stats(self, queues: Sequence[str]) -> dict[str, QueueStats]:
        replies = self._ask([commands.stats(queue) for queue in queues])
        return {queue: commands.read_stats(reply) for queue, reply in zip(queues, replies, strict=True)}

    def _standing(self, queue: str, state: str | None, limit: int) -> Sequence[tuple[str, bytes]]:
        """(state, id) of the first `limit` jobs of each set that holds jobs of this state (None: of any but leased)."""
        sets = [("ready", f"ready:{lane}") for lane in LANES] + [(name, name) for name in ("delayed", "dead", "done")]
        sets = [(name, key) for name, key in sets if state in (None, name)]
        prefix = commands.prefix(queue)
        replies = self._ask([("ZRANGE", prefix + key, 0, limit - 1) for _, key in sets])
        return [(name, id) for (name, _), ids in zip(sets, replies, strict=True) for id in ids]

    def _leased(self, queue: str, limit: int) -> Sequence[tuple[str, bytes]]:
        prefix = commands.prefix(queue)
        (epochs,) = self._ask([("ZRANGE", f"{prefix}epochs", 0, -1)])
        ids: dict[bytes, None] = {}
        for epoch in epochs:
            cursor = b"0"
            while len(ids) < limit:
                ((cursor, pairs),) = self._ask([("HSCAN", f"{prefix}leased:".encode() + epoch, cursor, "COUNT", limit)])
                ids |= dict.fromkeys(pairs[::2])
                if cursor == b"0":
                    break
        return [("leased", id) for id in [*ids][:limit]]

    def _note(self, queue: str) -> Sequence[Command]:
        """The command that lets others find `queue`, when it is time for it."""
        now = time.monotonic()
        if now - self._listed.get(queue, -LIST_AGAIN_S) < LIST_AGAIN_S:
            return []
        self._listed[queue] = now
        return [("SADD", commands.QUEUES_KEY, queue)]

    # -- asking -----------------------------------------------------------------------------------------------------

    def _ask(self, asked: Sequence[commands.Call | Command], *, repeat: bool = True, errors: bool = False) -> Sequence[Any]:
        """The replies. What was lost, or refused for now, is asked again for `patience_s`, or (`repeat=False`) not at all.

        `errors=True`: an error reply is handed back as one. Else it raises: BrokerUnavailable, or BrokerRefused when it is useless.
        """
        replies: list[Any] = [None] * len(asked)
        left = list(range(len(asked)))
        loading: list[Command] = []
        deadline = time.monotonic() + self.patience_s
        tries = 0
        while left:
            try:
                sent = [*loading, *(_command(asked[position]) for position in left)]
                answers = self._exchange(sent)[len(loading) :]
                left, loading, trouble = self._sort(left, answers, replies, bool(loading), errors)
            except BrokerUnavailable as error:
                trouble = str(error)
            if trouble:
                delay_s = random.random() * min(1.0, FIRST_BACKOFF_S * 2.0**tries)
                tries += 1
                if not repeat or time.monotonic() + delay_s > deadline:
                    raise BrokerUnavailable(f"{self.address}: {trouble}")
                time.sleep(delay_s)
        return replies

    def _sort(
        self, left: Sequence[int], answers: Sequence[Any], replies: list[Any], loaded: bool, errors: bool
    ) -> tuple[Sequence[int], Sequence[Command], str]:
        """Put `answers` where they belong: which are to be asked again, after which commands, and what the trouble is."""
        again: list[int] = []
        trouble, unknown = "", False
        for position, answer in zip(left, answers, strict=True):
            if not isinstance(answer, Exception):
                replies[position] = answer
                continue
            verdict = commands.judge(_words(answer))
            if verdict.code == commands.NO_SCRIPT and not loaded:
                unknown = True
            elif verdict.later:
                trouble = verdict.text
            elif errors:
                replies[position] = answer
                continue
            else:
                raise BrokerRefused(f"{self.address}: {verdict.text}")
            again.append(position)
        return again, [("SCRIPT", "LOAD", text) for text in CLIENT_SCRIPTS.values()] if unknown else [], trouble

    # -- connections ------------------------------------------------------------------------------------------------

    def _exchange(self, sent: Sequence[Command]) -> Sequence[Any]:
        """One round trip: a reply for each command, an error reply as an exception object. BrokerUnavailable: it was lost."""
        from redis.exceptions import RedisError, ResponseError

        self._look_whose()
        connection = self._free.pop() if self._free else self._connection()
        replies = []
        try:
            connection.send_packed_command([b"".join(pack_command(tuple(command)) for command in sent)], check_health=False)
            for _ in sent:
                try:
                    replies.append(connection.read_response(disable_decoding=True))
                except ResponseError as error:
                    replies.append(error)
        except (RedisError, OSError) as error:
            connection.disconnect()
            verdict = commands.judge(_words(error))
            if verdict.code in commands.RIGHTS or isinstance(error, ResponseError):
                raise BrokerRefused(f"{self.address}: {verdict.text}") from None
            raise BrokerUnavailable(verdict.text if verdict.later else f"{error}; is Redis running there?") from None
        except BaseException:
            connection.disconnect()  # a reply may still be on its way
            raise
        self._free.append(connection)
        return replies

    def _connection(self) -> AbstractConnection:
        from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection  # 0.3 s, so not before it is used

        at = self._target
        common: dict[str, Any] = {
            "db": at.db, "username": at.username or None, "password": at.password or None, "protocol": 2,
            "socket_timeout": REPLY_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S,
        }  # fmt: skip
        if at.path:
            return UnixDomainSocketConnection(path=at.path, **common)
        common |= {"host": at.host, "port": at.port, "socket_keepalive": True}
        if at.tls is None:
            return Connection(**common)
        options: dict[str, Any] = dict(at.tls)
        options["ssl_check_hostname"] = commands.checks_host(at.tls)
        return SSLConnection(**options, **common)

    def _look_whose(self) -> None:
        """In a forked child, forget the parent's connections (dropping them closes our copies only) and names."""
        if self._pid != os.getpid():
            self._free, self._senders, self._pid = [], [], os.getpid()


def _command(asked: commands.Call | Command) -> Command:
    return ("EVALSHA", _DIGESTS[asked.script], *asked.args) if isinstance(asked, commands.Call) else asked


def _words(error: Exception) -> str:
    """The server's own words."""
    code = _CODES.get(type(error).__name__)
    return f"{code} {error}" if code else str(error)
