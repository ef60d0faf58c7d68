"""Redis for clients: the blocking protocol over redis-py's connections, with the very scripts that the daemon uses.

redis-py connects, authenticates, speaks TLS and parses. Its command layer, pool and retries are not used: they cost as much
as the round trip, and a retry could add a job again that has already run. Here a repeated request is one that the scripts know.

Thread-safe without a lock: a connection, and a sender's name, belong to one call at a time, taken from lists whose pop and append
are atomic. Fork-safe: a child that finds another process's lists starts new ones.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from ..brokers.base import Finding, Mark, NewJob, QueueStats, Row, last_of_dead, listed, place
from ..brokers.commands import redis as commands
from ..brokers.commands.redis_durability import QUESTIONS, durability
from ..brokers.commands.redis_lua import LANES
from ..brokers.commands.redis_scripts import CLIENT_SCRIPTS
from ..errors import BrokerRefused, BrokerUnavailable

REPLY_TIMEOUT_S: Final = 5.0
CONNECT_TIMEOUT_S: Final = 3.0
FIRST_BACKOFF_S: Final = 0.05
SENDER_MEMORY_S: Final = 120  # longer than any call repeats itself
LIST_AGAIN_S: Final = 60.0  # between two notes of a queue's name, which somebody may have flushed away

_DIGESTS: Final = {name: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in CLIENT_SCRIPTS.items()}
# redis-py cuts these codes off its messages and says them by the class.
_CODES: Final = {
    "AuthenticationError": "WRONGPASS", "AuthorizationError": "NOAUTH", "NoPermissionError": "NOPERM",
    "BusyLoadingError": "LOADING", "ReadOnlyError": "READONLY", "OutOfMemoryError": "OOM", "NoScriptError": "NOSCRIPT",
    "MasterDownError": "MASTERDOWN", "ClusterDownError": "CLUSTERDOWN", "TryAgainError": "TRYAGAIN",
    "MovedError": "MOVED", "AskError": "ASK",
}  # fmt: skip


class RedisClient:
    """A queue in Redis behind the blocking protocol (`brokers.base.Store`). It connects when it is first asked something.

    `patience_s` (seconds): how long a call goes on trying before it raises BrokerUnavailable.
    """

    def __init__(self, url: str, *, patience_s: float = 3.0) -> None:
        self._wire = _Wire(commands.parse_url(url), patience_s)
        self.address = self._wire.address
        self._listed: dict[str, float] = {}  # queue -> when its name was last noted

    # -- the protocol -----------------------------------------------------------------------------------------------

    def enqueue(self, jobs: Sequence[NewJob], max_depth: int = 0) -> list[bool]:
        """As Broker.enqueue. Jobs of several queues are added queue by queue, so one that fills meanwhile stops only the rest."""
        sender = self._wire.take_sender()
        adding = commands.Adding(jobs, max_depth, sender, SENDER_MEMORY_S)
        note = self._note({job.queue for job in jobs})
        for calls in adding.calls():
            adding.replies = self._wire.ask([*note, *calls])[len(note) :]
            note = []
        self._wire.give_sender(sender)
        return adding.fresh

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
            if row is not None and row.state == "dead" and row.certificates[-1:] == (certificate,):
                return True
            return any(self._wire.ask(calls))

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
        found = zip(wanted, values, strict=True)
        return {key.decode("utf-8", "replace"): value for key, value in found if value is not None}

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
        self, call: Callable[[str, Sequence[str]], commands.Call], ids: Sequence[str], queue: str | None
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

    def _note(self, queues: Iterable[str]) -> Sequence[commands.Command]:
        """The command that lets others find those of `queues` for which it is time, if there are any."""
        now = time.monotonic()
        due = [queue for queue in queues if now - self._listed.get(queue, -LIST_AGAIN_S) >= LIST_AGAIN_S]
        self._listed.update(dict.fromkeys(due, now))
        return [("SADD", commands.QUEUES_KEY, *due)] if due else []


class _Wire:
    """Connections that are free, and the asking over one of them."""

    def __init__(self, target: commands.Target, patience_s: float) -> None:
        self._target = target
        self.address = target.address
        self._patience_s = patience_s
        self._pid = os.getpid()
        self._free: list[Any] = []  # of redis-py's connections, whose methods carry no types
        self._senders: list[commands.Sender] = []

    def take_sender(self) -> commands.Sender:
        self._look_whose()
        return self._senders.pop() if self._senders else commands.Sender()

    def give_sender(self, sender: commands.Sender) -> None:
        self._senders.append(sender)

    def close(self) -> None:
        self._look_whose()
        while self._free:
            self._free.pop().disconnect()

    def ask(self, asked: Sequence[commands.Call | commands.Command], *, repeat: bool = True) -> list[Any]:
        """The replies. What was lost, or refused for now, is asked again for `patience_s`, or (`repeat=False`) not at all.

        Raises BrokerUnavailable when patience is at its end, BrokerRefused when it is useless.
        """
        asking = commands.Asking(asked, CLIENT_SCRIPTS, self.address, words=_words, on_mended=_warn)
        deadline = time.monotonic() + self._patience_s
        tries = 0
        while asking.left:
            try:
                trouble = asking.hear(self._exchange(asking.commands(_DIGESTS)))
            except BrokerUnavailable as error:
                trouble = str(error)
            if trouble:
                delay_s = random.random() * min(1.0, FIRST_BACKOFF_S * 2.0**tries)
                tries += 1
                if not repeat or time.monotonic() + delay_s > deadline:
                    raise BrokerUnavailable(f"{self.address}: {trouble}")
                time.sleep(delay_s)
        return asking.replies

    def each_node(self, asked: Sequence[commands.Command]) -> dict[tuple[str, int], list[Any]]:
        """What every server of ours replies to `asked`; errors stand there as exceptions."""
        return {(self._target.host, self._target.port): self._exchange(asked)}

    def _exchange(self, sent: Sequence[commands.Command]) -> list[Any]:
        """One round trip: a reply for each command, an error reply as an exception object. BrokerUnavailable: it was lost."""
        from redis.exceptions import RedisError, ResponseError

        self._look_whose()
        connection = self._take()
        replies: list[Any] = []
        failed = "cannot connect"
        try:
            connection.connect()  # which does nothing when it is
            failed = "the connection broke"
            connection.send_packed_command([commands.pack(sent)], check_health=False)
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
            raise BrokerUnavailable(
                verdict.text if verdict.later else f"{failed}: {_reason(error)}; start Redis there, or correct the URL"
            ) from None
        except BaseException:
            connection.disconnect()  # a reply may still be on its way
            raise
        self._free.append(connection)
        return replies

    def _take(self) -> Any:
        if self._free:
            return self._free.pop()
        import redis  # 0.3 s, so not before it is used

        untyped: Any = redis
        at = self._target
        common: dict[str, Any] = {
            "db": at.db, "username": at.username or None, "password": at.password or None, "protocol": 2,
            "socket_timeout": REPLY_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S,
        }  # fmt: skip
        if at.path:
            return untyped.UnixDomainSocketConnection(path=at.path, **common)
        common |= {"host": at.host, "port": at.port, "socket_keepalive": True}
        if at.tls is None:
            return untyped.Connection(**common)
        files = {f"ssl_{name}": value or None for name, value in at.tls._asdict().items()}
        return untyped.SSLConnection(**{**common, **files, "ssl_check_hostname": at.tls.checks_host})

    def _look_whose(self) -> None:
        """In a forked child, forget the parent's connections (dropping them closes our copies only) and names."""
        if self._pid != os.getpid():
            self._free, self._senders, self._pid = [], [], os.getpid()


def _words(error: Exception) -> str:
    """The server's own words."""
    code = _CODES.get(type(error).__name__)
    return f"{code} {error}" if code else str(error)


def _reason(error: Exception) -> str:
    """Why there is no connection, without redis-py's own words around it."""
    cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    return (isinstance(cause, OSError) and cause.strerror) or str(error).rstrip(".")


def _warn(text: str) -> None:
    """Tell the application, in its log (or on stderr, where it has configured none)."""
    import logging

    logging.getLogger("kqueue").warning("%s", text)
