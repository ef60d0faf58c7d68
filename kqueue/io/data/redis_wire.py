"""One connection of a job to Redis: a stream that speaks RESP3. Who lends it, and for what, is not known here.

Replies come in the order of the commands. So when somebody stops waiting for one, or it does not come, the connection is closed
there and then: nobody must ever get the reply to what another one asked.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from hiredis import ProtocolError, PushNotification, Reader, ReplyError, pack_command

from ...brokers.commands.redis_hello import MasterSearch
from ...errors import BrokerRefused, BrokerUnavailable, UsageError
from ..dialing import connect
from ..errors import ConnectFailed, ConnectionLost, IOFailed, TimedOut, TLSFailed
from ..surroundings import left, now
from .errors import RedisError, RedisRedirected, RedisTryAgain

if TYPE_CHECKING:
    import ssl

    from ...brokers.commands.redis_url import Target, Tls
    from ..streams import Stream

Arg = str | bytes | int | float | bytearray | memoryview
Command = Sequence[Arg]

CHUNK: Final = 262144  # bytes of commands that are sent before their replies are read
_NOTHING: Final = object()
_PASSES: Final = (
    "LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "OOM", "MISCONF", "NOREPLICAS", "UNBLOCKED",
)  # fmt: skip
_ADVICE: Final = {
    "NOAUTH": "put user and password into the URL",
    "WRONGPASS": "check user and password in the URL",
    "NOPERM": "allow the user this command and key (ACL SETUSER)",
    "READONLY": "it is a replica: give its master's address, or redis+sentinel://…",
    "WRONGTYPE": "TYPE says what the key holds",
    "NOPROTO": "io.redis needs Redis or Valkey 6 or later",
}
_REDIRECT: Final = re.compile(r"(?:MOVED|ASK) \d+ (\S+)")


def check(command: Command) -> None:
    """UsageError when it is empty, or there is something in it that Redis has no form for."""
    if not command:
        raise UsageError('command() takes a command and its arguments: command("SET", "key", "value")')
    for place, arg in enumerate(command):
        if isinstance(arg, bool) or not isinstance(arg, (str, bytes, int, float, bytearray, memoryview)):
            raise UsageError(
                f"argument {place} of {name_of(command)} is {type(arg).__name__}: Redis takes str, bytes, int and float; "
                "say how it is to be written, such as json.dumps(…)"
            )


def packed(command: Command) -> bytes:
    """As it goes over the wire. UsageError as of `check`."""
    check(command)
    plain = tuple(bytes(arg) if isinstance(arg, (bytearray, memoryview)) else arg for arg in command)
    try:
        return pack_command(plain)  # type: ignore[no-any-return,arg-type]  # its stub means a 1-tuple
    except UnicodeEncodeError as error:
        raise UsageError(f"an argument of {name_of(command)} cannot be written in UTF-8: {error.reason}") from None


def name_of(command: Command) -> str:
    """The command without its arguments, which may be secret."""
    name = command[0] if command else ""
    return name.decode("utf-8", "replace").upper() if isinstance(name, bytes) else str(name).upper()[:40]


def read_error(address: str, name: str, message: str) -> RedisError:
    """What an error reply means."""
    message = message.split("\n", 1)[0][:500]
    code = message.partition(" ")[0]
    moved = _REDIRECT.match(message)
    if moved:
        return RedisRedirected(
            f"{address}: {name}: the key is on {moved[1]}, another node of a Redis Cluster ({message}); io.redis does not follow "
            "there: keep what belongs together on one node by a {hash tag}, and give that node's address",
            code,
        )
    passes = code in _PASSES or message.startswith("ERR max number of clients")
    advice = f"; {_ADVICE[code]}" if code in _ADVICE else ""
    return (RedisTryAgain if passes else RedisError)(f"{address}: {name}: {message}{advice}", code)


class Wire:
    """`exchange` commands for replies. Closed when that is interrupted."""

    def __init__(self, stream: Stream, address: str, decode: bool) -> None:
        self.stream = stream
        self.address = address
        encoding, errors = ("utf-8", "surrogateescape") if decode else (None, None)
        self._reader: Any = Reader(notEnoughData=_NOTHING, encoding=encoding, errors=errors)

    def is_alive(self) -> bool:
        return self.stream.is_alive() and not self.stream.buffered  # nothing was asked, so nothing can come that we want

    def close(self) -> None:
        self.stream.close()

    abandon = close

    def exchange(self, commands: Iterable[Command], deadline: float | None) -> Generator[Any, Any, list[Any]]:
        """The replies, errors among them as RedisError. Sent in pieces, so that the server never holds the replies to all."""
        names: list[str] = []
        waiting = bytearray()
        replies: list[Any] = []
        pieces = [(name_of(command), packed(command)) for command in commands]  # all, before any is sent
        try:
            for name, data in pieces:
                names.append(name)
                waiting += data
                if len(waiting) >= CHUNK:
                    yield from self._send(waiting, names, replies, deadline)
            yield from self._send(waiting, names, replies, deadline)
        except BaseException:
            self.close()
            raise
        return replies

    def _send(
        self, data: bytearray, names: list[str], replies: list[Any], deadline: float | None
    ) -> Generator[Any, Any, None]:
        began = now()
        try:
            yield from self.stream.write(bytes(data), timeout=left(deadline))
            data.clear()
            while len(replies) < len(names):
                for reply in (yield from self.receive(deadline)):
                    if isinstance(reply, PushNotification):
                        continue  # what a module or somebody's CLIENT TRACKING says
                    if len(replies) == len(names):
                        raise ConnectionLost(f"{self.address} sent more than it was asked for, so nobody knows what answers what")
                    if isinstance(reply, ReplyError):
                        reply = read_error(self.address, names[len(replies)], str(reply))
                    replies.append(reply)
        except TimedOut:
            if deadline is None or left(deadline):
                raise  # not our time, but that of a scope around us
            raise TimedOut(f"{self.address} did not answer {names[len(replies)]} in {now() - began:.3g} s") from None

    def receive(self, deadline: float | None) -> Generator[Any, Any, list[Any]]:
        """Whatever comes next, at least one reply or push. What is interrupted here loses nothing."""
        found: list[Any] = []
        try:
            while True:
                while (reply := self._reader.gets()) is not _NOTHING:
                    found.append(reply)
                if found:
                    return found
                data = yield from self.stream.read(timeout=left(deadline))
                if not data:
                    raise ConnectionLost(f"{self.address} closed the connection")
                self._reader.feed(data)
        except (ProtocolError, TypeError) as error:  # TypeError: a map whose keys are lists
            self.close()
            raise ConnectionLost(f"what answers at {self.address} does not speak Redis ({error})") from None


def open_wire(
    target: Target, context: ssl.SSLContext | None, decode: bool, deadline: float | None
) -> Generator[Any, Any, Wire]:
    """A connection that has said HELLO. ConnectFailed, TLSFailed, TimedOut, or RedisError when it does not let us in."""
    if target.service:
        return (yield from _open_master(target, context, decode, deadline))
    return (yield from _open(target, context, decode, deadline, named=False))


def _open(
    target: Target, context: ssl.SSLContext | None, decode: bool, deadline: float | None, *, named: bool
) -> Generator[Any, Any, Wire]:
    wire = yield from _dial(target, context, decode, deadline)
    auth: list[Arg] = ["AUTH", target.username or "default", target.password] if target.password or target.username else []
    commands: list[Command] = [("HELLO", 3, *auth, "SETNAME", "kqueue.io"), *([("SELECT", target.db)] if target.db else [])]
    replies = yield from wire.exchange(commands, deadline)
    try:
        for reply in replies:
            if isinstance(reply, RedisError):
                if "unknown command" in str(reply).lower():
                    raise RedisError(f"{wire.address}: it does not know HELLO; io.redis needs Redis or Valkey 6 or later", "ERR")
                raise reply
        hello = {_text(key): _text(value) for key, value in replies[0].items()}
        if hello.get("mode") == "sentinel":
            raise RedisError(f"{wire.address} is a Sentinel, which holds no data; write redis+sentinel://host:26379/SERVICE")
        if named and hello.get("role") != "master":
            raise ConnectFailed(f"{wire.address} is a {hello.get('role')}, though a Sentinel names it as the master")
    except BaseException:
        wire.close()
        raise
    return wire


def _open_master(
    target: Target, context: ssl.SSLContext | None, decode: bool, deadline: float | None
) -> Generator[Any, Any, Wire]:
    """To the master that the first Sentinel names which knows one."""
    search = MasterSearch(target.service)
    for place, address in enumerate(target.hosts):
        remaining = left(deadline)
        share = None if remaining is None else now() + remaining / (len(target.hosts) - place)
        at = target.sentinel(address)
        try:
            wire = yield from _dial(at, context, False, share)
            try:
                auth: list[Command] = []
                if at.password or at.username:
                    auth = [("AUTH", at.username, at.password) if at.username else ("AUTH", at.password)]
                replies = yield from wire.exchange([*auth, search.question], share)
            finally:
                wire.close()
        except IOFailed as error:
            search.failed(BrokerUnavailable(str(error)))
            continue
        failed = next((reply for reply in replies if isinstance(reply, RedisError)), None)
        master = search.heard(address, failed or replies[-1])
        if master is not None:
            return (yield from _open(target.at(master), context, decode, deadline, named=True))
    raise ConnectFailed(f"{target.address}: {search.failure}")


def _dial(
    target: Target, context: ssl.SSLContext | None, decode: bool, deadline: float | None
) -> Generator[Any, Any, Wire]:
    if target.path:
        stream = yield from connect(unix=target.path, timeout=left(deadline))
    else:
        stream = yield from connect(target.host, target.port, tls=context or False, timeout=left(deadline))
    return Wire(stream, target.address, decode)


@lru_cache(maxsize=64)
def tls_of(tls: Tls | None) -> ssl.SSLContext | None:
    """What the URL's ssl_* options say; None: no TLS. Kept: reading CAs takes 20 ms."""
    if tls is None:
        return None
    from ...brokers.dial import tls_context  # and with it ssl, which is 4 MB

    try:
        return tls_context(*tls[:4], tls.checks_host)
    except BrokerRefused as error:
        raise TLSFailed(str(error)) from None


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
