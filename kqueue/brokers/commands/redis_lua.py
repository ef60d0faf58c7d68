"""What our scripts in Redis share: the keys, the rules, and the Lua parts they are put together from. See redis_scripts.

Everything of a queue lives under one hash tag, `kq:{QUEUE}:`, so that a script touches one slot of a cluster:

    job:<id>        string  as it was enqueued: "-", lane, " ", priority, " ", available_at, a line feed, envelope. "+" instead of
                            "-": it has, or had, one of the next two keys
    past:<id>       hash    what has become of it: lane and available_at when they are others now, attempts, crashes, recoveries,
                            deferrals, memory, result, n (number of the last reservation that has ended), epoch (Rule 4);
                            absent: 0, or none
    certs:<id>      list    the last certificates, newest last
    ready:<lane>    zset    id -> place; ids of one place go by id
    delayed         zset    id -> available_at
    dead, done      zset    id -> time of death; expiry of the result
    leased:<epoch>  hash    id -> number of the reservation, and "+" when that stands in job:<id>
    epochs, owners  zset    epoch -> expiry (0: given up); hash: epoch -> identity
    outbox          hash    name -> a job that follows one of this queue and goes into another (Rule 6)
    handed:<name>   string  there for a while after that job was handed over to this queue
    idle            string  there when some daemon found less than it wanted: who adds something deletes it, and rings `bell`.
                            More than "1": epoch, number and lanes of who takes a job directly, by the channel `to:<epoch>`
    beat, hush      string  when an epoch was last renewed, or a sweep made; there while nobody may be taken for dead
    lapsed:<epoch>  string  when it was last found expired; its owner hears of it by its next renewal
    last:<epoch>, settled:<epoch>, client:<sender>   the last request of each sender, and what it was answered

What state a job is in follows from where its id stands; nothing else says so. One that stands nowhere is leased. So a reservation
writes nothing into the job's keys, and an acknowledgment only deletes. Nobody reads what is not there: a job that runs once and
ends is one key, set, read and deleted together with the others of its batch. Decision 0013 has the reasons, and what it costs.

Rule 1. A script checks first and writes last. What it reads by redis.call raises while nothing has changed yet, so a structure of
        a wrong type can be moved out of the way (to `corrupt:NAME:*`, see redis_mend) and the script be run again.
Rule 2. What stands in one job's keys never raises: it is read by pcall, and a key of a wrong type is replaced.
Rule 3. The first write is one that Redis allows when its memory is full (ZREM, HDEL, DEL): it then lets the script end, so a
        full Redis takes no new jobs but still works off those it has, with what follows them. Where that cannot be (enqueue),
        nothing has been written.
Rule 4. `leased:<epoch>` proves a lease. A job that was recovered keeps the epoch and number it had, so that this token still
        settles (expiry makes eligible, no more); whatever happens to it next removes the field `epoch`.
Rule 5. A request that comes again is answered as it was the first time, as long as its sender has made no other since. What a
        reservation took is remembered as long as its epoch: forgotten, it would be held by an owner who does not know of it.
Rule 6. A job that follows into another queue is put into the outbox by the acknowledgment, since no script may write into two
        slots of a cluster. Then it is handed over (added there, and a mark beside it, in one step), then taken out of the
        outbox. Whatever dies in between, somebody hands it over again; the mark tells that it was, even when it has run and is
        gone. Once it is out of the outbox, the mark is kept for those only who had read the outbox before: HAND_OVER_WITHIN_S.
"""

from __future__ import annotations

from typing import Final

from ..base import MAX_BATCH, MAX_CERTIFICATES, PRIORITY_STEP_S

LANES: Final = ("inline", "isolated")
MAX_BATCH_BYTES: Final = 8 << 20  # of envelopes in one command or reply
READ_AT_ONCE: Final = 20  # envelopes, of which none is known to be needed yet
MEMORY_S: Final = 86400  # that answers to daemons are kept (Rule 5), so how long an outage may last
HAND_OVER_WITHIN_S: Final = 300  # of reading the outbox; more than two nodes of a cluster may differ in time
PAST_FIELDS: Final = ("lane", "available_at", "attempts", "crashes", "recoveries", "deferrals", "memory", "result")

_CONSTANTS = f"""
local MAX_BATCH, MAX_BYTES, MAX_CERTIFICATES = {MAX_BATCH}, {MAX_BATCH_BYTES}, {MAX_CERTIFICATES}
local PRIORITY_STEP, MEMORY, HAND_OVER_WITHIN = {PRIORITY_STEP_S:.0f}, {MEMORY_S}, {HAND_OVER_WITHIN_S}
local READ_AT_ONCE, UNTOUCHED = {READ_AT_ONCE}, {ord('-')}
"""

START: Final = (
    _CONSTANTS
    + """
local prefix = KEYS[1]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
"""
)

FUNCTIONS: Final = """
local function number(text, default)
  local value = tonumber(text)
  if value and value > -1e15 and value < 1e15 then return value end
  return default
end

local function count(text) return math.floor(math.max(0, number(text, 0))) end
local function job_key(id) return prefix .. 'job:' .. id end
local function lane_of(text) return text == 'isolated' and 'isolated' or 'inline' end
local function moment(at) return string.format('%.6f', at) end

local function past_key(id) return prefix .. 'past:' .. id end
local function certs_key(id) return prefix .. 'certs:' .. id end

local function delete_jobs(ids, untouched)
  local keys = {}
  for _, id in ipairs(ids) do
    keys[#keys + 1] = job_key(id)
    if not (untouched and untouched[id]) then
      keys[#keys + 1] = past_key(id)
      keys[#keys + 1] = certs_key(id)
    end
  end
  redis.call('DEL', unpack(keys))
end
"""

BASE: Final = START + FUNCTIONS

BELL: Final = """
local function ring()
  if redis.call('DEL', prefix .. 'idle') == 1 then redis.pcall('PUBLISH', prefix .. 'bell', '') end
end
"""

# A job's own keys: what they say, and how they are changed. One that is "-" is not asked what it went through.
JOB: Final = """
local function look(id, ...)
  local head = redis.pcall('GETRANGE', job_key(id), 0, 63)
  local mark, lane, priority, at = string.match(type(head) == 'string' and head or '', '^([-+])(%a+) (%S+) (%S+)\\n')
  local past = mark ~= '-' and redis.pcall('HMGET', past_key(id), 'lane', 'available_at', ...) or {}
  return lane_of(past[1] or lane), number(priority, 0), number(past[2] or at, now), past
end

local function touch(id)
  local mark = redis.pcall('GETRANGE', job_key(id), 0, 0)
  if mark == '-' then redis.call('SETRANGE', job_key(id), 0, '+') end
  if mark == '' then redis.call('SET', job_key(id), '+inline 0 ' .. moment(now) .. '\\n') end
end

local function change(id, ...)
  touch(id)
  local key = past_key(id)
  if redis.call('TYPE', key).ok ~= 'hash' then redis.call('DEL', key) end
  redis.call('HDEL', key, 'epoch')
  redis.call('HSET', key, ...)
end
"""

# Jobs are placed one by one and written together. A set of a wrong type must be noticed before a job has left its old place.
PLACE: Final = """
local function check_sets()
  for _, set in ipairs({'ready:inline', 'ready:isolated', 'delayed', 'dead', 'done'}) do redis.call('ZCARD', prefix .. set) end
end

local placed = {}
local function place(id, lane, priority, at)
  local set, score = 'delayed', moment(at)
  if at <= now then set, score = 'ready:' .. lane, moment(at - priority * PRIORITY_STEP) end
  local scores = placed[set]
  if not scores then
    scores = {}
    placed[set] = scores
  end
  scores[#scores + 1] = score
  scores[#scores + 1] = id
end

local function write_places()
  local any = next(placed)
  for set, scores in pairs(placed) do
    for i = 1, #scores, 2 * MAX_BATCH do
      redis.call('ZADD', prefix .. set, unpack(scores, i, math.min(i + 2 * MAX_BATCH - 1, #scores)))
    end
  end
  placed = {}
  return any
end

local function job_value(lane, priority, at, envelope)
  return '-' .. lane .. ' ' .. priority .. ' ' .. moment(at) .. '\\n' .. envelope
end

local function add(id, lane, priority, at, envelope)
  if redis.call('EXISTS', job_key(id)) == 1 then return end
  lane = lane_of(lane)
  redis.call('SET', job_key(id), job_value(lane, priority, at, envelope))
  place(id, lane, priority, at)
end
"""

# Of a settlement: the follow-ups whose number stands at ARGV[at], as _SETTLE describes them.
FOLLOW: Final = """
local function follow(at)
  for i = at + 1, at + 7 * ARGV[at], 7 do
    local queue, id, lane, priority, delay, moment_at, envelope = unpack(ARGV, i, i + 6)
    local due = tonumber(moment_at) or now + (tonumber(delay) or 0)
    if queue == '' then
      add(id, lane, tonumber(priority), due, envelope)
    else
      local name = ARGV[2] .. '-' .. ARGV[3] .. '-' .. i
      redis.call('HSET', prefix .. 'outbox', name, cmsgpack.pack({queue, id, lane, priority, moment(due), envelope}))
    end
  end
end
"""

CERTIFY: Final = """
local function certify(id, certificate)
  touch(id)
  local key = certs_key(id)
  if type(redis.pcall('RPUSH', key, certificate)) == 'table' then
    redis.call('DEL', key)
    redis.call('RPUSH', key, certificate)
  end
  redis.call('LTRIM', key, -MAX_CERTIFICATES, -1)
end
"""

# For requests about dead letters: ARGV[1] names the request, ARGV[2] says for how many seconds it is remembered, ids follow.
DEAD: Final = """
local memory = prefix .. 'client:' .. ARGV[1]

local function dead_ones()
  local answered = redis.call('GET', memory)
  if answered then return false, answered end
  local ids, digits, seen = {}, {}, {}
  for i = 3, #ARGV do
    local id = ARGV[i]
    local dead = not seen[id] and redis.call('ZSCORE', prefix .. 'dead', id)
    seen[id] = true
    digits[#digits + 1] = dead and '1' or '0'
    if dead then ids[#ids + 1] = id end
  end
  return #ids > 0 and ids, table.concat(digits)
end

local function remember(digits) redis.call('SET', memory, digits, 'EX', ARGV[2]) end
"""

DUE: Final = """
local function next_due()
  local head = redis.call('ZRANGE', prefix .. 'delayed', 0, 0, 'WITHSCORES')
  return head[2] and math.min(math.max(0, head[2] - now), 1e9) or false
end

local function move_due()
  local due = redis.call('ZRANGEBYSCORE', prefix .. 'delayed', '-inf', now, 'WITHSCORES', 'LIMIT', 0, MAX_BATCH)
  if #due == 0 then return 0 end
  check_sets()
  local ids = {}
  for i = 1, #due, 2 do
    local lane, priority = look(due[i])
    place(due[i], lane, priority, number(due[i + 1], 0))
    ids[#ids + 1] = due[i]
  end
  redis.call('ZREM', prefix .. 'delayed', unpack(ids))
  write_places()
  return #ids
end
"""

# beat: nobody has renewed or swept for half a lease when Redis itself was away, or its clock was put forward. Then everybody gets
# the time to renew before anybody is taken for dead. When its clock was put back, expiries would be as far away as before.
# The DEL lets it be written where memory is full (Rule 3): one that stood still would hush every sweep.
#
# revive: whoever comes upon an epoch that had expired writes down when. So its owner hears of it however often a renewal is
# repeated, and whoever came first.
EPOCHS: Final = """
local function register(epoch, identity, lease)
  redis.call('ZREM', prefix .. 'epochs', epoch)
  redis.call('ZADD', prefix .. 'epochs', now + lease, epoch)
  redis.call('HSET', prefix .. 'owners', epoch, identity)
end

local function alive(epoch) return number(redis.call('ZSCORE', prefix .. 'epochs', epoch), 0) > now end

local function revive(epoch, identity, lease)
  local when = time[1] .. '.' .. time[2]
  register(epoch, identity, lease)
  redis.call('SET', prefix .. 'lapsed:' .. epoch, when)
  return when
end

local function beat(lease)
  local last = number(redis.call('GET', prefix .. 'beat'), now)
  local hush = redis.call('EXISTS', prefix .. 'hush') == 1
  redis.call('DEL', prefix .. 'nothing')
  if now - last > lease / 2 then
    redis.pcall('SET', prefix .. 'hush', 1, 'PX', math.ceil(lease * 1000))
    hush = true
  elseif last - now > lease / 2 then
    redis.pcall('PEXPIRE', prefix .. 'hush', math.ceil(lease * 1000))
    for _, epoch in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'epochs', '(' .. moment(now + lease), '+inf')) do
      redis.pcall('ZADD', prefix .. 'epochs', 'XX', moment(now + lease), epoch)
    end
  end
  redis.pcall('SET', prefix .. 'beat', moment(now))
  return hush
end
"""

# lost, crashed: certificates of the run that was lost, and of the one whose own code ran (that of `culprit`); see base.numbered.
RECOVER: Final = """
local function recover(epoch, limit, lost, culprit, crashed)
  local leased = prefix .. 'leased:' .. epoch
  local held, jobs = redis.call('HRANDFIELD', leased, limit, 'WITHVALUES'), {}
  if #held > 0 then check_sets() end
  for i = 1, #held, 2 do
    jobs[i] = {look(held[i], 'attempts', 'crashes', 'recoveries')}
  end
  for i = 1, #held, 2 do
    local id, n = held[i], string.match(held[i + 1], '^%d*')
    local lane, priority, at, past = unpack(jobs[i])
    local attempts, crashes, recoveries = count(past[3]), count(past[4]), count(past[5])
    redis.call('HDEL', leased, id)
    local certificate, counter, value = lost, 'recoveries', recoveries + 1
    if id == culprit then certificate, counter, value = crashed, 'crashes', crashes + 1 end
    change(id, counter, value, 'epoch', epoch, 'n', n)
    certify(id, (string.gsub(certificate, '"attempt":0', '"attempt":' .. attempts + crashes + recoveries + 1, 1)))
    place(id, lane, priority, at)
  end
  write_places()
  if redis.call('EXISTS', leased) == 0 then
    redis.call('ZREM', prefix .. 'epochs', epoch)
    redis.call('HDEL', prefix .. 'owners', epoch)
    redis.call('DEL', prefix .. 'last:' .. epoch, prefix .. 'lapsed:' .. epoch)
  end
  return #held / 2
end
"""
