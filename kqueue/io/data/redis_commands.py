"""The commands of Redis that jobs use most, as methods. All others go by `command("NAME", …)`, and mean the same.

What is answered is what Redis answers, by RESP3: bytes (str with decode=True), int, float, None, lists, and dicts for maps.
Nothing here sends anything: `command` does, of whoever inherits this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .redis_wire import Arg, Command

# Those that wait at the server, and those that do with the word BLOCK.
_BLOCKING: Final = frozenset(
    {"BLPOP", "BRPOP", "BLMOVE", "BRPOPLPUSH", "BLMPOP", "BZPOPMIN", "BZPOPMAX", "BZMPOP", "WAIT", "WAITAOF"}
)
_MAYBE_BLOCKING: Final = frozenset({"XREAD", "XREADGROUP"})

_SESSION: Final = "it changes the connection, which others use, too: `with (yield redis.session()) as own:` has one of its own"
_PUBSUB: Final = "write `with (yield redis.subscribe(channel)) as inbox:`"
NOWHERE: Final = {  # not even by a session
    **dict.fromkeys(("SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"), _PUBSUB),
    **dict.fromkeys(("HELLO", "RESET", "MONITOR", "SYNC", "PSYNC"), "io.redis does not speak what follows it"),
    "QUIT": "connections are closed by the pool, and a session at the end of its `with`",
}  # fmt: skip
ELSEWHERE: Final = {
    **NOWHERE,
    **dict.fromkeys(("MULTI", "EXEC", "DISCARD"), "write `with redis.pipeline(atomic=True) as pipe:`"),
    **dict.fromkeys(("WATCH", "UNWATCH", "AUTH", "ASKING", "READONLY", "READWRITE"), _SESSION),
    **dict.fromkeys(("WAIT", "WAITAOF"), "it waits for what its own connection wrote: send both by `redis.session()`"),
    "SELECT": "put the database into the URL: redis://host/2",
}  # fmt: skip


def blocks(command: Command, name: str) -> bool:
    """Whether it may wait at the server."""
    if name in _MAYBE_BLOCKING:
        return any(isinstance(arg, (str, bytes)) and arg.upper() in ("BLOCK", b"BLOCK") for arg in command)
    return name in _BLOCKING


class Commands(ABC):
    """Names for commands."""

    @abstractmethod
    def command(self, *args: Arg) -> Any:
        """Any command."""

    # -- values -----------------------------------------------------------------------------------------------------

    def get(self, key: Arg) -> Any:
        return self.command("GET", key)

    def set(self, key: Arg, value: Arg, *, ex: float | None = None, nx: bool = False, xx: bool = False) -> Any:
        """`ex`: seconds until it is gone. `nx`: only if there is none; `xx`: only if there is one; None is answered otherwise."""
        life: tuple[Arg, ...] = () if ex is None else ("PX", max(1, round(ex * 1000)))
        return self.command("SET", key, value, *life, *(("NX",) if nx else ()), *(("XX",) if xx else ()))

    def mget(self, *keys: Arg) -> Any:
        return self.command("MGET", *keys)

    def mset(self, values: Mapping[Any, Arg]) -> Any:
        return self.command("MSET", *_flat(values))

    def delete(self, *keys: Arg) -> Any:
        return self.command("DEL", *keys)

    def exists(self, *keys: Arg) -> Any:
        return self.command("EXISTS", *keys)

    def expire(self, key: Arg, seconds: float) -> Any:
        return self.command("PEXPIRE", key, round(seconds * 1000))

    def ttl(self, key: Arg) -> Any:
        """Seconds; -1: it has no end, -2: there is no such key."""
        return self.command("TTL", key)

    def incr(self, key: Arg, by: int = 1) -> Any:
        return self.command("INCRBY", key, by)

    # -- hashes, lists, sets ------------------------------------------------------------------------------------------

    def hget(self, key: Arg, field: Arg) -> Any:
        return self.command("HGET", key, field)

    def hset(self, key: Arg, values: Mapping[Any, Arg]) -> Any:
        return self.command("HSET", key, *_flat(values))

    def hgetall(self, key: Arg) -> Any:
        """A dict."""
        return self.command("HGETALL", key)

    def hdel(self, key: Arg, *fields: Arg) -> Any:
        return self.command("HDEL", key, *fields)

    def hincrby(self, key: Arg, field: Arg, by: int = 1) -> Any:
        return self.command("HINCRBY", key, field, by)

    def lpush(self, key: Arg, *values: Arg) -> Any:
        return self.command("LPUSH", key, *values)

    def rpush(self, key: Arg, *values: Arg) -> Any:
        return self.command("RPUSH", key, *values)

    def lpop(self, key: Arg) -> Any:
        return self.command("LPOP", key)

    def rpop(self, key: Arg) -> Any:
        return self.command("RPOP", key)

    def lrange(self, key: Arg, first: int = 0, last: int = -1) -> Any:
        return self.command("LRANGE", key, first, last)

    def llen(self, key: Arg) -> Any:
        return self.command("LLEN", key)

    def sadd(self, key: Arg, *members: Arg) -> Any:
        return self.command("SADD", key, *members)

    def srem(self, key: Arg, *members: Arg) -> Any:
        return self.command("SREM", key, *members)

    def smembers(self, key: Arg) -> Any:
        """A list."""
        return self.command("SMEMBERS", key)

    def sismember(self, key: Arg, member: Arg) -> Any:
        return self.command("SISMEMBER", key, member)

    def zadd(self, key: Arg, scores: Mapping[Any, float]) -> Any:
        """`scores`: of each member."""
        return self.command("ZADD", key, *(part for member, score in scores.items() for part in (score, member)))

    def zrange(self, key: Arg, first: Arg = 0, last: Arg = -1, *, by_score: bool = False) -> Any:
        return self.command("ZRANGE", key, first, last, *(("BYSCORE",) if by_score else ()))

    def zrem(self, key: Arg, *members: Arg) -> Any:
        return self.command("ZREM", key, *members)

    # -- others -----------------------------------------------------------------------------------------------------

    def publish(self, channel: Arg, message: Arg) -> Any:
        """To how many it went."""
        return self.command("PUBLISH", channel, message)

    def eval(self, script: str, keys: tuple[Arg, ...] | list[Arg] = (), args: tuple[Arg, ...] | list[Arg] = ()) -> Any:
        """Run a Lua script."""
        return self.command("EVAL", script, len(keys), *keys, *args)


def _flat(values: Mapping[Any, Arg]) -> list[Arg]:
    return [part for pair in values.items() for part in pair]
