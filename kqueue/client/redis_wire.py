"""Connections of clients to Redis, and asking over them: one server, the master that Sentinels name, or the nodes of a cluster.

redis-py connects, authenticates and speaks TLS. What comes after that goes over its socket, packed and parsed by hiredis: its
layers cost as much as the round trip, and a retry of theirs could add a job again that has already run. Here a repeated request
is one that the scripts know.

Thread-safe without a lock: a connection, and a sender's name, belong to one call at a time, taken from lists whose pop and append
are atomic. Fork-safe: a child that finds another process's lists starts new ones.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  # the first look-up of a name would: who forks meanwhile would leave its lock held in the child
import hashlib
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from hiredis import HiredisError, ReplyError
from hiredis import Reader as ReplyReader

from ..brokers.commands.redis import Sender
from ..brokers.commands.redis_asking import RIGHTS, Asking, Call, Command, Part, commands, judge, last_word, pack, sync
from ..brokers.commands.redis_client_scripts import CLIENT_SCRIPTS
from ..brokers.commands.redis_cluster import MAP, Routes
from ..brokers.commands.redis_hello import MasterSearch, read_hello
from ..brokers.commands.redis_url import Address, Target
from ..errors import BrokerRefused, BrokerUnavailable, KQueueError

REPLY_TIMEOUT_S: Final = 5.0
CONNECT_TIMEOUT_S: Final = 3.0
FIRST_BACKOFF_S: Final = 0.05
MASTER_KEPT_S: Final = 1.0  # until the Sentinels are asked again: an old master takes writes for 10 s after a planned fail-over

_INFINITY: Final = float("inf")
_DIGESTS: Final = {name: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in CLIENT_SCRIPTS.items()}
_READ_BYTES: Final = 65536
_HANGS_UP: Final = ("NOAUTH", "WRONGPASS", "LOADING")  # nothing of it was done, nor will be of what follows on this connection
# While it connects, redis-py cuts these codes off its messages and says them by the class.
_CODES: Final = {
    "AuthenticationError": "WRONGPASS", "AuthorizationError": "NOAUTH", "NoPermissionError": "NOPERM",
    "BusyLoadingError": "LOADING", "ReadOnlyError": "READONLY", "OutOfMemoryError": "OOM", "NoScriptError": "NOSCRIPT",
    "MasterDownError": "MASTERDOWN", "ClusterDownError": "CLUSTERDOWN", "TryAgainError": "TRYAGAIN",
    "MovedError": "MOVED", "AskError": "ASK",
}  # fmt: skip

# Of several errors redis-py makes one class, and before AUTH a long request is one that breaks the protocol.
_NO_PASSWORD: Final = (
    "Authentication required", "HELLO must be called with the client already authenticated", "Protocol error: unauthenticated",
)  # fmt: skip


_forks = 0  # how often this process and those it comes from were forked


def _after_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_after_fork)


class _Lost(BrokerUnavailable):
    """A connection broke with a request under way, so nobody knows whether that was done."""


class Wire:
    """Asks the server or servers of `target` for up to `patience_s` seconds."""

    def __init__(self, target: Target, patience_s: float) -> None:
        self.address = target.address
        self.routes = Routes(target.known)
        self._target = target
        self._patience_s = patience_s
        self._forks = _forks
        self._free: dict[Address, list[_Line]] = {}
        self._senders: list[Sender] = []
        self._greeted = False  # somebody has said whether it is a cluster
        self._master: Address | None = None  # whom the Sentinels named last; None: nobody yet
        self._named_at = -_INFINITY  # when they were asked; so long ago that they are to be asked again
        self._turn = 0  # which Sentinel, or node, is asked first where they are

    def take_sender(self) -> Sender:
        self._look_whose()
        return self._senders.pop() if self._senders else Sender()

    def give_sender(self, sender: Sender) -> None:
        self._senders.append(sender)

    def close(self) -> None:
        self._look_whose()
        for node in list(self._free):
            self._drop(node)

    def ask(
        self, asked: Sequence[Call | Command], *, repeat: bool = True, doubt: Callable[[], str] = lambda: ""
    ) -> list[Any]:
        """The replies. What was lost, or refused for now, is asked again for `patience_s`, or (`repeat=False`) not at all.

        Raises BrokerUnavailable when patience is at its end, BrokerRefused when it is useless. `doubt` says what the first adds
        where it may have been done all the same.
        """
        node, plain = self.routes.first, not (self.routes.clustered or self._target.sync_replicas)
        deadline = time.monotonic() + self._patience_s
        begun: list[Any] | BrokerUnavailable | None = None  # what came of it at once; None: it is still to be asked
        if plain:
            try:
                begun = self._exchange(node, commands(asked, _DIGESTS))
            except BrokerUnavailable as error:
                begun = error
            else:
                if not any([isinstance(reply, Exception) for reply in begun]):
                    return begun  # as nearly always, and Asking would cost a tenth of the whole
        asking = Asking(
            asked, CLIENT_SCRIPTS, self.routes, self.address, words=_words, on_mended=_warn, sync=self._target.sync_replicas
        )
        tries, doubtful = 0, False
        while asking.left:
            trouble = ""
            for part in asking.parts() if begun is None else [Part(asking, node, asking.left)]:
                try:
                    said = self._ask(part, begun)
                    doubtful = doubtful or (bool(said) and bool(part.promised))
                except BrokerUnavailable as error:
                    said = str(error)
                    doubtful = doubtful or isinstance(error, _Lost)
                if said:
                    trouble = said
                    self._suspect(part.node)
            begun = None
            if asking.hopped():
                self._learn()
                trouble = trouble or asking.astray
            if trouble:
                delay_s = random.random() * min(1.0, FIRST_BACKOFF_S * 2.0**tries)
                tries += 1
                if not repeat or time.monotonic() + delay_s > deadline:
                    more = doubt() if doubtful else ""
                    raise BrokerUnavailable(f"{self.address}: {trouble}{f'; {more}' if more else ''}")
                time.sleep(delay_s)
        return asking.replies

    def each_node(self, commands: Sequence[Command]) -> dict[Address, list[Any]]:
        """What every server of ours that holds jobs replies to `commands`; errors stand there as exceptions."""
        self.ask([("PING", "")])  # which finds out whether it is a cluster, and who is there
        return {node: self._exchange(node, commands) for node in sorted(self.routes.masters()) or [self.routes.first]}

    # -- one node ---------------------------------------------------------------------------------------------------

    def _ask(self, part: Part, begun: list[Any] | BrokerUnavailable | None) -> str:
        if isinstance(begun, BrokerUnavailable):
            raise begun
        if begun is not None:
            return part.hear(begun)
        sent = part.commands(_DIGESTS)
        if not part.promised:
            return part.hear(self._exchange(part.node, sent))
        answers = self._exchange(part.node, [*sent, *sync(part.promised, self._target.sync_replicas)])
        return part.hear(answers[: len(sent)], last_word(answers[len(sent) :]))

    def _exchange(self, node: Address, sent: Sequence[Command]) -> list[Any]:
        """One round trip: a reply for each command, an error reply as an exception object. BrokerUnavailable: there is none."""
        self._look_whose()
        if self._target.service:
            self._follow(node)
        free = self._free.get(node)
        if free is None:
            free = self._free.setdefault(node, [])
        try:
            line = free.pop()
        except IndexError:
            line = self._connect(node)
        replies = self._talk(line, sent)
        free.append(line)
        return replies

    def _talk(self, line: _Line, sent: Sequence[Command]) -> list[Any]:
        try:
            return line.exchange(pack(sent), len(sent))
        except (HiredisError, OSError) as error:
            line.close()
            verdict = judge(_words(error))
            if verdict.code in RIGHTS:
                raise BrokerRefused(f"{self.address}: {verdict.text}") from None
            raise _Lost(verdict.text if verdict.later else f"the connection broke: {_reason(error)}") from None
        except BaseException:
            line.close()  # a reply may still be on its way
            raise

    def _connect(self, node: Address) -> _Line:
        """A new connection to `node`, or to the master where Sentinels know it."""
        at = self._target.node(node) if self._master is None else self._target.at(self._master)
        line = self._opened(at)
        if self._target.service or not self._greeted:
            self._look_who(node, line, at)
        return line

    def _opened(self, at: Target) -> _Line:
        from redis.exceptions import RedisError, ResponseError

        connection = _connection(at)
        try:
            connection.connect()
        except (RedisError, OSError) as error:
            connection.disconnect()
            verdict = judge(_words(error))
            if verdict.code in RIGHTS or (isinstance(error, ResponseError) and not verdict.later):
                raise BrokerRefused(f"{at.address}: {verdict.text}") from None
            step = "start Redis there, or correct the URL"
            where = "" if at.address == self.address else f" to {at.host}:{at.port}"
            text = verdict.text if verdict.later else f"cannot connect{where}: {_reason(error)}; {step}"
            raise BrokerUnavailable(text) from None
        return _Line(connection)

    def _look_who(self, node: Address, line: _Line, at: Target) -> None:
        """Whether it is a cluster, and with Sentinels, whether it is a master."""
        (reply,) = self._talk(line, [("HELLO", 2)])
        self._greeted = True
        try:
            hello = read_hello(reply, at, named=bool(self._target.service))
        except KQueueError:
            line.close()
            self._named_at = -_INFINITY
            raise
        if hello.clustered and not self.routes.clustered:
            (reply,) = self._talk(line, [MAP])
            self.routes.learn(reply, node)

    # -- which nodes ------------------------------------------------------------------------------------------------

    def _follow(self, node: Address) -> None:
        """Know the master; when it is another one, forget the connections to the old."""
        now = time.monotonic()
        if self._master is not None and now - self._named_at < MASTER_KEPT_S:
            return
        self._named_at = now
        try:
            master = self._find_master()
        except (BrokerUnavailable, BrokerRefused):
            if self._master is None:
                raise
            return  # it may be there all the same
        if master != self._master:
            self._drop(node)
            self._master = master

    def _find_master(self) -> Address:
        """Ask the Sentinel that knew the last time, then the others."""
        hosts = self._target.hosts
        search = MasterSearch(self._target.service, _words)
        for _ in hosts:
            address = hosts[self._turn % len(hosts)]
            self._turn += 1
            try:
                line = self._opened(self._target.sentinel(address))
                try:
                    (reply,) = self._talk(line, [search.question])
                finally:
                    line.close()
            except (BrokerUnavailable, BrokerRefused) as error:
                search.failed(error)
                continue
            master = search.heard(address, reply)
            if master is not None:
                self._turn -= 1
                return master
        if search.refused:
            raise BrokerRefused(f"{self.address}: {search.failure}")
        raise BrokerUnavailable(search.failure)

    def _suspect(self, node: Address) -> None:
        """Something is wrong at `node`: it may be no master any more, or gone. Who named it is not asked first again."""
        self._drop(node)
        self._named_at = -_INFINITY
        self._turn += 1
        if len(self.routes.known) > 1:
            self._learn()

    def _learn(self) -> None:
        """Ask for the map of the cluster, another node each time, until one has answered."""
        for _ in range(len(self.routes.known)):
            self._turn += 1
            known = self.routes.known
            node = known[self._turn % len(known)]
            try:
                (reply,) = self._exchange(node, [MAP])
            except (BrokerUnavailable, BrokerRefused):
                self._drop(node)
                continue
            if self.routes.learn(reply, node):
                return

    def _drop(self, node: Address) -> None:
        free = self._free.get(node, [])
        while free:
            try:
                free.pop().close()
            except IndexError:
                return  # another thread took it

    def _look_whose(self) -> None:
        """In a forked child, forget the parent's connections (dropping them closes our copies only) and names."""
        if self._forks != _forks:
            self._free, self._senders, self._forks = {}, [], _forks


class _Line:
    """A connection, of one call at a time."""

    __slots__ = ("_connection", "_reader", "_socket")

    def __init__(self, connection: Any) -> None:
        self._connection = connection  # redis-py's, whose methods carry no types
        self._socket = connection._sock  # it tells nobody, and there is no other way past its parser
        self._reader = ReplyReader()

    def exchange(self, data: bytes, count: int) -> list[Any]:
        """Send `data` and read `count` replies. Raises OSError, HiredisError: it is of no use any more."""
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise TimeoutError("Timeout writing to socket") from None
        replies = []
        for _ in range(count):
            reply = self._reader.gets()
            while reply is False:  # not all of it is here
                self._receive()
                reply = self._reader.gets()
            if isinstance(reply, ReplyError) and judge(_words(reply)).code in _HANGS_UP:
                raise reply
            replies.append(reply)
        return replies

    def close(self) -> None:
        self._connection.disconnect()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except TimeoutError:
            raise TimeoutError("Timeout reading from socket") from None
        if not data:
            raise ConnectionError("Connection closed by server")
        self._reader.feed(data)


def _connection(at: Target) -> Any:
    import redis  # 0.3 s, so not before it is used

    untyped: Any = redis
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


def _words(error: Exception) -> str:
    """The server's own words; those it has for a request of somebody without a password do not always begin with NOAUTH."""
    if str(error).removeprefix("ERR ").startswith(_NO_PASSWORD):
        return f"NOAUTH {error}"
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
