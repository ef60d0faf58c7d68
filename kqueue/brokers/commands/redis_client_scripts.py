"""The scripts that Redis runs for clients and for the operator's command, as redis_scripts has those of a daemon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .redis_lua import BASE, BELL, CERTIFY, DEAD, JOB, PLACE
from .redis_scripts import SCRIPTS

# ARGV: id, certificate  ->  1 when it was waiting, and is dead now
_CANCEL = """
local id, found = ARGV[1], 0
check_sets()
for _, set in ipairs({'ready:inline', 'ready:isolated', 'delayed'}) do found = found + redis.call('ZREM', prefix .. set, id) end
if found == 0 then return 0 end
redis.pcall('HDEL', past_key(id), 'epoch')
certify(id, ARGV[2])
redis.call('ZADD', prefix .. 'dead', moment(now), id)
return 1
"""

# ARGV: id, names of fields  ->  nil, or: state, what stands in job:<id>, those fields of past:<id>, certificates
_SHOW = """
local id, state = ARGV[1], false
for _, set in ipairs({'ready:inline', 'ready:isolated', 'delayed', 'dead', 'done'}) do
  if not state and redis.call('ZSCORE', prefix .. set, id) then state = string.match(set, '^%a+') end
end
if not state and redis.call('EXISTS', job_key(id)) == 0 then return false end
local job = redis.call('MGET', job_key(id))[1]
local past = redis.pcall('HMGET', past_key(id), unpack(ARGV, 2))
local certificates = redis.pcall('LRANGE', certs_key(id), 0, -1)
return {state or 'leased', job, past.err and {} or past, certificates.err and {} or certificates}
"""

# ARGV: name of this request, seconds to remember it, ids  ->  a digit for each (1: it was dead, and is ready now)
_RETRY = """
check_sets()
local ids, digits = dead_ones()
if not ids then return digits end
redis.call('ZREM', prefix .. 'dead', unpack(ids))
for _, id in ipairs(ids) do
  local lane, priority = look(id)
  change(id, 'available_at', moment(now))
  redis.call('HDEL', past_key(id), 'attempts', 'crashes', 'recoveries', 'deferrals', 'memory')
  place(id, lane, priority, now)
end
write_places()
remember(digits)
ring()
return digits
"""

# ARGV: name of this request, seconds to remember it, ids  ->  a digit for each (1: it was dead, and is gone now)
_FORGET = """
redis.call('ZCARD', prefix .. 'dead')
local ids, digits = dead_ones()
if not ids then return digits end
redis.call('ZREM', prefix .. 'dead', unpack(ids))
delete_jobs(ids)
remember(digits)
return digits
"""

CLIENT_SCRIPTS: Final[Mapping[str, str]] = {
    "enqueue": SCRIPTS["enqueue"],
    "stats": SCRIPTS["stats"],
    "cancel": BASE + JOB + PLACE + CERTIFY + _CANCEL,
    "show": BASE + _SHOW,
    "retry": BASE + BELL + JOB + PLACE + DEAD + _RETRY,
    "forget": BASE + DEAD + _FORGET,
}
