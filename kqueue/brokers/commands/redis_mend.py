"""What to do about a key of a queue that holds something of the wrong type: put it out of the way, and tell. No I/O.

Whoever can write to a Redis can overwrite a set of jobs by a string. Every script that needs the set then fails with WRONGTYPE,
before it has changed anything (Rule 1 in redis_lua). One such key must neither end a daemon nor hide the other queues.

Rule 1. Nothing is deleted: the key is renamed to `kq:{QUEUE}:corrupt:NAME:UNIQUE`, where people can look at it.
Rule 2. Look and rename are one script, so that of two who find the same wrong key none renames the right one that follows it.
Rule 3. Nothing is scanned. What stood in the destroyed structure alone is not found again, and the news says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..base import LEASE_S

Arg = bytes | str | int | float

STRUCTURES: Final[Mapping[str, str]] = {
    "ready:inline": "zset", "ready:isolated": "zset", "delayed": "zset", "dead": "zset", "done": "zset", "epochs": "zset",
    "owners": "hash", "outbox": "hash", "idle": "string", "beat": "string", "hush": "string",
}  # fmt: skip
"""The keys that every queue has, by name, and their types. `leased:*` and `last:*` follow from the epochs."""

GLOBAL: Final[Mapping[str, str]] = {"kq:queues": "set", "kq:documents": "hash"}

# By script: the keys it uses beyond those, as (what the name begins with, which of its arguments ends it, type).
_OWN: Final[Mapping[str, Sequence[tuple[str, int, str]]]] = {
    "enqueue": (("client:", 2, "string"),),
    "reserve": (("leased:", 2, "hash"), ("last:", 2, "string")),
    "settle": (("leased:", 2, "hash"), ("settled:", 3, "string")),
    "renew": (("lapsed:", 2, "string"),),
    "retry": (("client:", 2, "string"),),
    "forget": (("client:", 2, "string"),),
}

# KEYS: what the keys begin with. ARGV: what the new names begin with, what they end with, grace; then names and types, in pairs
# ->    for each one moved: its key, the type found, the type it should have, its new name
#
# The epochs are known by two structures. When the one that sweeps go by is lost, it is made anew from the other, so that what
# dead epochs hold is recovered all the same; those that live renew before their grace (in seconds) is over.
MEND: Final = """
local prefix, moved = KEYS[1], {}
local function look(name, kind)
  local found = redis.call('TYPE', prefix .. name).ok
  if found == 'none' or found == kind then return false end
  local to = ARGV[1] .. name .. ':' .. ARGV[2]
  redis.call('RENAME', prefix .. name, to)
  moved[#moved + 1] = {prefix .. name, found, kind, to}
  return true
end

local lost = false
for i = 4, #ARGV, 2 do
  local wrong = look(ARGV[i], ARGV[i + 1])
  lost = lost or wrong and ARGV[i] == 'epochs'
end
if ARGV[4] == '' then return moved end
if lost then
  local later = redis.call('TIME')[1] + ARGV[3]
  for _, epoch in ipairs(redis.call('HKEYS', prefix .. 'owners')) do redis.call('ZADD', prefix .. 'epochs', later, epoch) end
end
for _, epochs in ipairs({redis.call('ZRANGE', prefix .. 'epochs', 0, -1), redis.call('HKEYS', prefix .. 'owners')}) do
  for _, epoch in ipairs(epochs) do
    look('leased:' .. epoch, 'hash')
    look('last:' .. epoch, 'string')
  end
end
return moved
"""
GRACE_S: Final = 4 * LEASE_S


def suspects(script: str, args: Sequence[Arg]) -> tuple[str, dict[str, str]]:
    """What the keys begin with among which a wrong one must be, and those of them to look at: their types by name.

    `script` is the name of the one that failed, "" when `args` are a plain command.
    """
    key = args[1]
    text = key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else str(key)
    if text in GLOBAL:
        return text, {"": GLOBAL[text]}
    base, _, name = text.partition("}:")
    own = {f"{start}{args[position]!s}": kind for start, position, kind in _OWN.get(script, ())}
    if name.startswith("leased:"):
        own[name] = "hash"
    return base + "}:", {**STRUCTURES, **own}


def mend(prefix: str, names: Mapping[str, str]) -> Sequence[Arg]:
    """The command that moves what is wrong of `suspects` out of the way. By its text, since hardly anybody ever needs it."""
    # In a cluster the new name must be in the slot of the old one; and a user of KQueue may have the rights to `kq:*` only.
    where = f"{prefix}corrupt:" if prefix not in GLOBAL else f"kq:{{{prefix}}}:corrupt"
    pairs = [part.encode("utf-8", "surrogateescape") for pair in names.items() for part in pair]
    return ("EVAL", MEND, 1, prefix, where, os.urandom(4).hex(), int(GRACE_S), *pairs)


def told(moved: Sequence[Sequence[Any]]) -> list[str]:
    """A sentence for people about each key that `mend` moved."""
    return [_sentence(*(part.decode("utf-8", "replace") for part in each)) for each in moved]


def _sentence(key: str, found: str, kind: str, to: str) -> str:
    base, _, name = key.partition("}:")
    if key == "kq:queues":
        lost = "daemons and clients fill it again"
    elif key in GLOBAL:
        lost = "daemons publish it again when they start, so restart them"
    elif name == "outbox":
        lost = "follow-ups that waited in it for their queues are lost, so dispatch them again"
    elif kind == "string" or name in ("epochs", "owners"):
        lost = "daemons make it anew, and no job is lost"
    else:
        lost = f"jobs that stood only there are not found again without a scan ({base}}}:job:*), so dispatch them again"
    return (
        f"{key} held a {found} instead of a {kind}: something else than KQueue wrote there. It was moved to {to}, "
        f"and work goes on; {lost}. Find who wrote it, then delete {to}"
    )
