"""Redis for jobs: `redis`.

    cache = io.redis("redis://cache.example.org/0")

    value = yield cache.get("key")
    yield cache.command("SET", "key", "value", "EX", 60)
    with cache.pipeline() as pipe:
        pipe.incr("visits")
        pipe.expire("visits", 3600)
        visits, _ = yield pipe.run()
    with (yield cache.subscribe("news")) as inbox:
        message = yield inbox.next(timeout=30)

Each command borrows a connection from the pool of its URL, and gives it back when its reply has been read. A command that was
interrupted (its job was cancelled, its time was up) leaves a reply behind that nobody must get, so its connection is closed.
Whether the server still did it, nobody knows. Nothing is ever sent twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hiredis import ReplyError

from ...brokers.commands.redis_url import Target, parse_url
from ...errors import UsageError
from ..closing import Closing
from ..errors import TimedOut
from ..operation import Operation, operation
from ..surroundings import deadline_in, left
from .errors import RedisError
from .pool import IDLE_S, Pool, pool_of
from .redis_commands import ELSEWHERE, NOWHERE, Commands, blocks
from .redis_wire import Arg, Command, Wire, check, name_of, open_wire, packed, read_error, tls_of

if TYPE_CHECKING:
    from types import TracebackType

TIMEOUT_S: Final = 10.0  # for a command that does not wait at the server, waiting for a connection included
_CLIENT_CHANGES: Final = ("REPLY", "TRACKING", "CACHING", "SETNAME", "SETINFO", "NO-EVICT", "NO-TOUCH")


class _Options(NamedTuple):
    """What tells pools from each other."""

    target: Target
    decode: bool
    max_connections: int
    idle_s: float


def redis(
    url: str, *, decode: bool = False, timeout: float | None = TIMEOUT_S, max_connections: int = 10, idle: float = IDLE_S
) -> Redis:
    """The Redis at `url`. Connects to nobody yet, and may be called anywhere, as often as one likes.

    `decode`: answer str instead of bytes. `timeout`: seconds for each command, unless it has its own; None: the job's own.
    `max_connections`: how many commands go on at once. `idle`: seconds until an unused connection is closed.
    """
    if max_connections < 1:
        raise UsageError(f"redis(): max_connections is at least 1, not {max_connections!r}")
    return Redis(_Options(_target(url), decode, max_connections, idle), timeout)


@lru_cache(maxsize=64)
def _target(url: str) -> Target:
    try:
        target = parse_url(url)
    except UsageError as error:
        raise UsageError(str(error).replace("the queue's URL", "the URL of io.redis()")) from None
    if target.sync_replicas:
        raise UsageError("sync_replicas= in the URL of io.redis() is of the queue's; send WAIT by redis.session() instead")
    return target


class Redis(Commands):
    """What `redis` gives. Timeouts are in seconds."""

    def __init__(self, options: _Options, timeout_s: float | None) -> None:
        self.address = options.target.address
        self._options = options
        self._timeout_s = timeout_s

    def __repr__(self) -> str:
        return f"<Redis {self.address}>"

    def command(self, *args: Arg, timeout: float | None = None) -> Operation[Any]:
        """Any command. RedisError when the server says no; ConnectFailed, ConnectionLost, TimedOut, TLSFailed.

        One that waits at the server (BLPOP, XREAD BLOCK) has a connection of its own, and no time-out but its own.
        """
        if not args:
            check(args)  # which says so; at once, where it was written
        return Operation(self._command(args, timeout))

    def _command(self, command: Command, timeout: float | None) -> Generator[Any, Any, Any]:
        name = _checked(command)
        if blocks(command, name):
            (reply,) = yield from self._ask([command], deadline_in(timeout), self._waiters())
        else:
            (reply,) = yield from self._ask([command], self._deadline(timeout), self._pool())
        if isinstance(reply, RedisError):
            raise reply
        return reply

    def pipeline(self, *, atomic: bool = False) -> Pipeline:
        """Commands that are sent at once. `atomic`: all of them or none, and nothing in between (MULTI, EXEC)."""
        return Pipeline(self, atomic)

    @operation
    def subscribe(
        self, *channels: Arg, patterns: Sequence[Arg] = (), timeout: float | None = None
    ) -> Generator[Any, Any, Inbox]:
        """An Inbox for what is published from now on to `channels`, and to those that fit `patterns` ("news.*")."""
        if not channels and not patterns:
            raise UsageError('subscribe() takes channels: redis.subscribe("news"), or patterns=["news.*"]')
        deadline = self._deadline(timeout)
        wire = yield from self._connect(deadline)
        inbox = Inbox(wire)
        yield from inbox.begin(channels, patterns, deadline)
        return inbox

    @operation
    def session(self, *, timeout: float | None = None) -> Generator[Any, Any, Session]:
        """A connection of one's own, for what changes it: WATCH and MULTI, SELECT, CLIENT. Closed at the end, never lent."""
        return Session((yield from self._connect(self._deadline(timeout))), self._timeout_s)

    # -- what it stands on --------------------------------------------------------------------------------------------

    def _deadline(self, timeout: float | None) -> float | None:
        return deadline_in(self._timeout_s if timeout is None else timeout)

    def _ask(
        self, commands: Sequence[Command], deadline: float | None, pool: Pool[Wire]
    ) -> Generator[Any, Any, list[Any]]:
        lease = yield from pool.take(deadline)
        try:
            replies = yield from lease.connection.exchange(commands, deadline)
        except BaseException:
            lease.close() if lease.connection.stream.closed else lease.give()
            raise
        lease.give()
        return replies

    def _pool(self) -> Pool[Wire]:
        options = self._options
        return pool_of(options, lambda: Pool(self._open, self.address, options.max_connections, options.idle_s))

    def _waiters(self) -> Pool[Wire]:
        """Connections of those who wait at the server, who must not keep others from theirs."""
        return pool_of((self._options, "waiters"), lambda: Pool(self._open, self.address, inf, self._options.idle_s))

    def _open(self, deadline: float | None) -> Generator[Any, Any, Wire]:
        """One for a pool, which outlives the job."""
        wire = yield from self._connect(deadline)
        wire.stream.disown()
        return wire

    def _connect(self, deadline: float | None) -> Generator[Any, Any, Wire]:
        """One that is closed when the job ends."""
        target = self._options.target
        return (yield from open_wire(target, tls_of(target.tls), self._options.decode, deadline))


def _checked(command: Command) -> str:
    """The name of a command that may go over a lent connection."""
    name = name_of(command)
    if name in ELSEWHERE:
        raise UsageError(f"{name} cannot be sent by command(): {ELSEWHERE[name]}")
    if name == "CLIENT" and name_of(command[1:]) in _CLIENT_CHANGES:
        raise UsageError("CLIENT … changes the connection: `with (yield redis.session()) as own:` has one of its own")
    return name


class Pipeline(Commands):
    """Commands on their way. Its methods collect, `run` sends.

        with redis.pipeline() as pipe:
            pipe.set("a", 1)
            pipe.incr("a")
            results = yield pipe.run()
    """

    def __init__(self, redis: Redis, atomic: bool) -> None:
        self._redis = redis
        self._atomic = atomic
        self._commands: list[tuple[Arg, ...]] = []

    def __len__(self) -> int:
        return len(self._commands)

    def command(self, *args: Arg) -> None:
        check(args)
        name = _checked(args)
        if blocks(args, name):
            raise UsageError(f"{name} waits at the server, and so would all behind it: send it by redis.command(…)")
        self._commands.append(args)

    @operation
    def run(self, *, errors: bool = False, timeout: float | None = None) -> Generator[Any, Any, list[Any]]:
        """Send what was collected, and answer the results. The first RedisError is raised when all has been read.

        `errors`: answer it in its place instead. Of an atomic one nothing was done when its commands cannot be (EXECABORT).
        """
        commands, self._commands = self._commands, []
        if not commands:
            return []
        sent: list[Command] = [("MULTI",), *commands, ("EXEC",)] if self._atomic else list(commands)
        redis = self._redis
        replies = yield from redis._ask(sent, redis._deadline(timeout), redis._pool())
        if self._atomic:
            refused = next((reply for reply in replies[:-1] if isinstance(reply, RedisError)), None)
            done = replies[-1]
            if refused is not None or isinstance(done, RedisError):
                raise refused or done
            replies = [_as_error(redis.address, command, reply) for command, reply in zip(commands, done, strict=True)]
        first = next((reply for reply in replies if isinstance(reply, RedisError)), None)
        if first is not None and not errors:
            raise first
        return replies

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._commands:
            raise UsageError(f"{len(self._commands)} commands of a pipeline were never sent: write `yield pipe.run()`")

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


def _as_error(address: str, command: Command, reply: Any) -> Any:
    """`reply` of within an EXEC."""
    return read_error(address, name_of(command), str(reply)) if isinstance(reply, ReplyError) else reply


class _Own(Closing):
    """A connection of one's own, closed like a stream."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    @property
    def closed(self) -> bool:
        return self._wire.stream.closed

    def close(self) -> None:
        self._wire.close()


class Session(_Own, Commands):
    """Commands over one connection, in order, those among them that change it."""

    def __init__(self, wire: Wire, timeout_s: float | None) -> None:
        super().__init__(wire)
        self._timeout_s = timeout_s

    def command(self, *args: Arg, timeout: float | None = None) -> Operation[Any]:
        """Any command but to subscribe."""
        return Operation(self._command(args, timeout))

    def _command(self, command: Command, timeout: float | None) -> Generator[Any, Any, Any]:
        name = name_of(command)
        if name in NOWHERE:
            raise UsageError(f"{name} cannot be sent by a session: {NOWHERE[name]}")
        limit = self._timeout_s if timeout is None and not blocks(command, name) else timeout
        (reply,) = yield from self._wire.exchange([command], deadline_in(limit))
        if isinstance(reply, RedisError):
            raise reply
        return reply


class Message(NamedTuple):
    """What was published. `pattern`: which fitted; None: none did, the channel itself was subscribed to."""

    channel: Any
    data: Any
    pattern: Any = None


class Inbox(_Own):
    """What is published to some channels. Closed like a stream.

    What comes while nobody waits is kept by the system's socket buffer, then by the server, which cuts off who reads too slowly
    (client-output-buffer-limit pubsub): that is a ConnectionLost, as is every other way to miss something.
    """

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        self._came: deque[Message] = deque()
        self._changes = 0  # subscriptions that were asked for or ended, and not confirmed

    @operation
    def next(self, *, timeout: float | None = None) -> Generator[Any, Any, Message]:
        """The next message. TimedOut when none comes in `timeout` seconds, and nothing is lost by that."""
        deadline = deadline_in(timeout)
        while not self._came:
            try:
                yield from self._read(deadline)
            except TimedOut:
                if deadline is None or left(deadline):
                    raise
                raise TimedOut(f"{self._wire.address}: no message came in {timeout:g} s") from None
        return self._came.popleft()

    @operation
    def add(self, *channels: Arg, patterns: Sequence[Arg] = (), timeout: float | None = TIMEOUT_S) -> Generator[Any, Any, None]:
        """Subscribe to these as well."""
        yield from self.begin(channels, patterns, deadline_in(timeout))

    @operation
    def remove(
        self, *channels: Arg, patterns: Sequence[Arg] = (), timeout: float | None = TIMEOUT_S
    ) -> Generator[Any, Any, None]:
        """Subscribe to these no more."""
        yield from self._change("UNSUBSCRIBE", channels, patterns, deadline_in(timeout))

    def begin(self, channels: Sequence[Arg], patterns: Sequence[Arg], deadline: float | None) -> Generator[Any, Any, None]:
        yield from self._change("SUBSCRIBE", channels, patterns, deadline)

    def _change(
        self, word: str, channels: Sequence[Arg], patterns: Sequence[Arg], deadline: float | None
    ) -> Generator[Any, Any, None]:
        """Returns when all are confirmed, so that nothing which is published after that is missed."""
        data = b"".join(packed((prefix + word, *names)) for prefix, names in (("", channels), ("P", patterns)) if names)
        self._changes += len(channels) + len(patterns)
        try:
            yield from self._wire.stream.write(data, timeout=left(deadline))
            while self._changes > 0:
                yield from self._read(deadline)
        except BaseException:
            self.close()  # nobody knows what it is subscribed to
            raise

    def _read(self, deadline: float | None) -> Generator[Any, Any, None]:
        for said in (yield from self._wire.receive(deadline)):
            if isinstance(said, ReplyError):
                self.close()
                raise read_error(self._wire.address, "SUBSCRIBE", str(said))
            if not isinstance(said, list) or not said:
                continue
            kind = said[0].decode() if isinstance(said[0], bytes) else said[0]
            if kind == "message":
                self._came.append(Message(said[1], said[2]))
            elif kind == "pmessage":
                self._came.append(Message(said[2], said[3], said[1]))
            elif str(kind).endswith("subscribe"):
                self._changes -= 1
