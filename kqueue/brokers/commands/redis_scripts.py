"""The scripts that Redis runs for us: one a verb, each short, none of which scans. Redis and Valkey, 6.2 or later.

KEYS[1] is what the queue's keys begin with; in a cluster it sends the script to their slot. redis_lua has the keys and the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .redis_lua import BASE, BELL, CERTIFY, DEAD, DUE, EPOCHS, FOLLOW, JOB, PLACE, RECOVER

# ARGV: sender, request, seconds to remember it, greatest depth (0: any), jobs the whole call adds to it; then six a job:
#       id, lane, priority, "" or seconds from now, "" or seconds since 1970, envelope
# ->    a digit a job (1: new), or the depth that left no room, as an integer
_ENQUEUE = """
local memory = prefix .. 'client:' .. ARGV[1]
local request, answers = string.match(redis.call('GET', memory) or '', '^(%d+) (%d*)$')
if request == ARGV[2] then return answers end

local max_depth = tonumber(ARGV[4])
if max_depth > 0 then
  local depth = 0
  for _, set in ipairs({'ready:inline', 'ready:isolated', 'delayed'}) do depth = depth + redis.call('ZCARD', prefix .. set) end
  if depth + ARGV[5] > max_depth then return depth end
end

local keys, digits, moments, seen = {}, {}, {}, {}
for i = 6, #ARGV, 6 do keys[#keys + 1] = job_key(ARGV[i]) end
local all_new = redis.call('EXISTS', unpack(keys)) == 0
for i, key in ipairs(keys) do
  local at = 6 * i
  digits[i] = '0'
  if not seen[key] and (all_new or redis.call('EXISTS', key) == 0) then
    digits[i] = '1'
    moments[i] = tonumber(ARGV[at + 4]) or now + (tonumber(ARGV[at + 3]) or 0)
    place(ARGV[at], lane_of(ARGV[at + 1]), tonumber(ARGV[at + 2]), moments[i])
  end
  seen[key] = true
end
local any, values = write_places(), {}
for i, key in ipairs(keys) do
  if moments[i] then
    local at = 6 * i
    values[#values + 1] = key
    values[#values + 1] = job_value(lane_of(ARGV[at + 1]), ARGV[at + 2], moments[i], ARGV[at + 5])
  end
end
if any then redis.call('MSET', unpack(values)) end
answers = table.concat(digits)
redis.call('SET', memory, ARGV[2] .. ' ' .. answers, 'EX', ARGV[3])
if any then ring() end
return answers
"""

# ARGV: epoch, identity, lease in seconds, request, how many of each lane
# ->    "repeated", "short" or "enough"; seconds to the next delayed job, or nil; a list a lane, four a job: id, n, what stands in
#       job:<id>, nil or what it went through: attempts, crashes, recoveries, deferrals, memory, available_at
_RESERVE = """
local epoch, request = ARGV[1], ARGV[4]
local leased, memory = prefix .. 'leased:' .. epoch, prefix .. 'last:' .. epoch
local lanes, names = {{}, {}}, {'inline', 'isolated'}

-- as many at once as are read in vain when the first of them is as large as all may be
local function read(ids, first)
  local keys = {}
  for i = first, math.min(first + READ_AT_ONCE - 1, #ids) do keys[#keys + 1] = job_key(ids[i]) end
  return redis.call('MGET', unpack(keys))
end

local function past_of(id)
  local past = redis.pcall('HMGET', past_key(id), 'attempts', 'crashes', 'recoveries', 'deferrals', 'memory', 'available_at', 'n', 'epoch')
  return past.err and {} or past
end

local function add(lane, id, n, job, past)
  local at = #lane
  lane[at + 1] = id
  lane[at + 2] = n
  lane[at + 3] = job
  lane[at + 4] = past
end

local due = next_due()
local function answer(how) return {how, due and moment(due), lanes[1], lanes[2]} end

redis.call('HLEN', leased)
local living = alive(epoch)
if not living then redis.call('HLEN', prefix .. 'owners') end
local last = redis.call('GET', memory)
local readable, taken_before = pcall(cmsgpack.unpack, last or '')
last = readable and type(taken_before) == 'table' and taken_before or {}
if last[1] == request then
  for i, n in ipairs(redis.call('HMGET', leased, unpack(last, 2))) do
    local id = last[i + 1]
    if n then
      add(look(id) == 'isolated' and lanes[2] or lanes[1], id, string.match(n, '^%d*'), read({id}, 1)[1], past_of(id))
    end
  end
  return answer('repeated')
end

if due == 0 then
  move_due()
  due = next_due()
end
local how, size, ids = 'enough', 0, {}
for index, name in ipairs(names) do
  local want = tonumber(ARGV[4 + index])
  ids[index] = want > 0 and redis.call('ZRANGE', prefix .. 'ready:' .. name, 0, want - 1) or {}
  if #ids[index] < want then how = 'short' end
end
local held, recovered, taken = {}, {}, {request}
local counts = {0, 0}
for index = 1, 2 do
  local jobs
  for i, id in ipairs(ids[index]) do
    if size > MAX_BYTES then
      how = 'enough'
      break
    end
    local at = (i - 1) % READ_AT_ONCE
    if at == 0 then jobs = read(ids[index], i) end
    local job, n, past = jobs[at + 1], '1', false
    if job and string.byte(job) == UNTOUCHED then
      held[#held + 1] = id
      held[#held + 1] = '1'
    else
      past = past_of(id)
      n = string.format('%.0f', count(past[7]) + 1)
      if past[8] then recovered[#recovered + 1] = past_key(id) end
      held[#held + 1] = id
      held[#held + 1] = n .. '+'
    end
    size = size + #(job or '')
    add(lanes[index], id, n, job, past)
    taken[#taken + 1] = id
    counts[index] = i
  end
end

if #held > 0 then
  for index, name in ipairs(names) do
    if counts[index] > 0 then redis.call('ZREMRANGEBYRANK', prefix .. 'ready:' .. name, 0, counts[index] - 1) end
  end
  redis.call('HSET', leased, unpack(held))
  if not living then revive(epoch, ARGV[2], ARGV[3]) end
  for _, key in ipairs(recovered) do redis.call('HDEL', key, 'epoch') end
  redis.call('SET', memory, cmsgpack.pack(taken))
end
if how == 'short' then redis.pcall('SET', prefix .. 'idle', 1, 'NX') end
return answer(how)
"""

# ARGV: the tokens' epoch, sender, request, number of plain acks, identity, lease in seconds; two for each plain ack: id, n;
#       fourteen for each other settlement: id, n, verb, attempts, crashes, recoveries, deferrals, memory, delay, "" or lane,
#       "" or certificate, "" or result, keep_s, number of follow-ups; after it seven for each of those: "" or another queue,
#       id, lane, priority, "" or seconds from now, "" or seconds since 1970, envelope
# ->    a digit for each in that order (1: settled)
_SETTLE = """
local epoch, others = ARGV[1], 7 + 2 * ARGV[4]
local leased, memory = prefix .. 'leased:' .. epoch, prefix .. 'settled:' .. ARGV[2]
local request, answers = string.match(redis.call('GET', memory) or '', '^(%d+) (%d*)$')
if request == ARGV[3] then return answers end

local at, ids = {}, {}
for i = 7, others - 1, 2 do at[#at + 1] = i end
local next_one = others
while next_one <= #ARGV do
  at[#at + 1] = next_one
  next_one = next_one + 14 + 7 * ARGV[next_one + 13]
end
for i, position in ipairs(at) do ids[i] = ARGV[position] end
local settled, digits, ended, strays, back, seen, untouched = {}, {}, {}, {}, {}, {}, {}
for i, held in ipairs(redis.call('HMGET', leased, unpack(ids))) do
  local id, n = ids[i], ARGV[at[i] + 1]
  local holds = at[i] >= others and ARGV[at[i] + 2] == 'hold'
  local good = held == n
  untouched[id] = good
  if not good then good = held == n .. '+' end
  if not good then
    local job = redis.pcall('HMGET', past_key(id), 'epoch', 'n')
    good = job[1] == epoch and job[2] == n
    if good then
      strays[#strays + 1] = id
      if holds then back[id] = n end
    end
  end
  settled[i] = good and not seen[id]
  digits[i] = settled[i] and '1' or '0'
  if settled[i] and not holds then
    ended[#ended + 1] = id
    seen[id] = true
  end
end
answers = table.concat(digits)
if #ended + #strays == 0 then return answers end
if others <= #ARGV or #strays > 0 then
  check_sets()
  redis.call('HLEN', prefix .. 'outbox')
end
if next(back) then
  redis.call('ZCARD', prefix .. 'epochs')
  redis.call('HLEN', prefix .. 'owners')
end

if #ended > 0 then redis.call('HDEL', leased, unpack(ended)) end
if #strays > 0 then
  for _, set in ipairs({'ready:inline', 'ready:isolated', 'delayed'}) do redis.call('ZREM', prefix .. set, unpack(strays)) end
end
for id, n in pairs(back) do
  if not seen[id] then
    redis.call('HDEL', past_key(id), 'epoch')
    redis.call('HSET', leased, id, n .. '+')
  end
end
if next(back) and not alive(epoch) then revive(epoch, ARGV[5], ARGV[6]) end
local gone = {}
for i, id in ipairs(ids) do
  local verb = at[i] < others and 'plain' or ARGV[at[i] + 2]
  if not settled[i] or verb == 'hold' then
    -- nothing to do
  elseif verb == 'plain' or verb == 'ack' and ARGV[at[i] + 12] + 0 <= 0 then
    gone[#gone + 1] = id
  else
    local n, _, attempts, crashes, recoveries, deferrals, out_of_memory, delay, lane, certificate, result, seconds =
      unpack(ARGV, at[i] + 1, at[i] + 12)
    if certificate ~= '' then certify(id, certificate) end
    if verb == 'ack' then
      change(id, 'n', n, 'result', result)
      redis.call('ZADD', prefix .. 'done', moment(now + seconds), id)
    else
      local lane_before, priority, due = look(id)
      lane = lane ~= '' and lane_of(lane) or lane_before
      if delay + 0 > 0 then due = now + delay end
      change(id, 'n', n, 'lane', lane, 'available_at', moment(due),
        'attempts', attempts, 'crashes', crashes, 'recoveries', recoveries, 'deferrals', deferrals, 'memory', out_of_memory)
      if verb == 'release' then
        place(id, lane, priority, due)
      else
        redis.call('ZADD', prefix .. 'dead', moment(now), id)
      end
    end
  end
end
if #gone > 0 then delete_jobs(gone, untouched) end
for i = ARGV[4] + 1, #at do
  if settled[i] and ARGV[at[i] + 2] == 'ack' then follow(at[i] + 13) end
end
local any = write_places()
redis.call('SET', memory, ARGV[3] .. ' ' .. answers, 'EX', MEMORY)
if any then ring() end
return answers
"""

# ARGV: epoch, identity, lease in seconds, certificate of what was lost, "" or the culprit's id, certificate of the culprit
# ->    recovered jobs; 1 when there are more (call again)
_OPEN = """
local epoch, identity, recovered = ARGV[1], ARGV[2], 0
beat(ARGV[3])
register(epoch, identity, ARGV[3])
local owners = identity ~= '' and redis.call('HGETALL', prefix .. 'owners') or {}
for i = 1, #owners, 2 do redis.call('HLEN', prefix .. 'leased:' .. owners[i]) end
for i = 1, #owners, 2 do
  if owners[i + 1] == identity and owners[i] ~= epoch and recovered < MAX_BATCH then
    recovered = recovered + recover(owners[i], MAX_BATCH - recovered, ARGV[4], ARGV[5], ARGV[6])
  end
end
if recovered > 0 then ring() end
return {recovered, recovered == MAX_BATCH and 1 or 0}
"""

# ARGV: epoch, identity, lease in seconds  ->  whether the idle flag stands; "" or when the epoch was last found expired
_RENEW = """
local lapsed = redis.call('GET', prefix .. 'lapsed:' .. ARGV[1]) or ''
local living = alive(ARGV[1])
redis.call('HLEN', prefix .. 'owners')
beat(ARGV[3])
if living then register(ARGV[1], ARGV[2], ARGV[3]) else lapsed = revive(ARGV[1], ARGV[2], ARGV[3]) end
return {redis.call('EXISTS', prefix .. 'idle'), lapsed}
"""

# ARGV: lease in seconds, 1 when who has expired may be taken for dead, certificate of what was lost, greatest age of dead letters
#       (seconds) and their greatest number (0: any)
# ->    recovered jobs; dead letters dropped; 1 when there is more to do (call again)
_SWEEP = """
check_sets()
redis.call('STRLEN', prefix .. 'beat')
redis.call('HLEN', prefix .. 'owners')
for _, epoch in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'epochs', '-inf', now, 'LIMIT', 0, MAX_BATCH)) do
  redis.call('HLEN', prefix .. 'leased:' .. epoch)
end
local function drop(set, ids)
  if #ids == 0 then return 0 end
  redis.call('ZREM', prefix .. set, unpack(ids))
  delete_jobs(ids)
  return #ids
end

local moved = move_due()
local expired = drop('done', redis.call('ZRANGEBYSCORE', prefix .. 'done', '-inf', now, 'LIMIT', 0, MAX_BATCH))
local max_age, max_count, forgotten = tonumber(ARGV[4]), tonumber(ARGV[5]), 0
if max_age > 0 then
  local old = '(' .. moment(now - max_age)
  forgotten = drop('dead', redis.call('ZRANGEBYSCORE', prefix .. 'dead', '-inf', old, 'LIMIT', 0, MAX_BATCH))
end
if max_count > 0 then
  local surplus = math.min(redis.call('ZCARD', prefix .. 'dead') - max_count, MAX_BATCH - forgotten)
  if surplus > 0 then forgotten = forgotten + drop('dead', redis.call('ZRANGE', prefix .. 'dead', 0, surplus - 1)) end
end
local hush = beat(ARGV[1])
local recovered, bound = 0, (hush or ARGV[2] ~= '1') and 0 or now
for _, epoch in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'epochs', '-inf', bound, 'LIMIT', 0, MAX_BATCH)) do
  if recovered < MAX_BATCH then recovered = recovered + recover(epoch, MAX_BATCH - recovered, ARGV[3]) end
end
if moved + recovered > 0 then ring() end
return {recovered, forgotten, math.max(recovered, moved, expired, forgotten) == MAX_BATCH and 1 or 0}
"""

# ->    now; entries of the outbox, each as its name and what it holds: queue, id, lane, priority, due, envelope, or the bare
#       bytes when that is not what stands there; 1 when there are more
_OUTBOX = """
local box, entries, size = prefix .. 'outbox', {}, 0
local function read(value)
  local readable, job = pcall(cmsgpack.unpack, value)
  if not readable or type(job) ~= 'table' or #job ~= 6 then return value end
  for _, text in ipairs(job) do
    if type(text) ~= 'string' then return value end
  end
  return job
end
for _, name in ipairs(redis.call('HRANDFIELD', box, MAX_BATCH)) do
  if size <= MAX_BYTES then
    local value = redis.call('HGET', box, name)
    size = size + #value
    entries[#entries + 1] = {name, read(value)}
  end
end
return {moment(now), entries, redis.call('HLEN', box) > #entries and 1 or 0}
"""

# ARGV: when the outbox was read; then six for each follow-up: its name there, id, lane, priority, due, envelope
# ->    1, or 0 when that is so long ago that somebody else may have handed them over and the marks be gone
_HAND_OVER = """
if now - ARGV[1] > HAND_OVER_WITHIN then return 0 end
check_sets()
for i = 2, #ARGV, 6 do
  local name, id, lane, priority, due, envelope = unpack(ARGV, i, i + 5)
  local mark = prefix .. 'handed:' .. name
  if redis.call('EXPIRE', mark, MEMORY) == 0 then
    redis.call('SET', mark, 1, 'EX', MEMORY)
    add(id, lane, number(priority, 0), number(due, now), envelope)
  end
end
if write_places() then ring() end
return 1
"""

# ARGV: epoch  ->  nothing. Score 0 says that it was given up, which no hush protects.
_CLOSE = "redis.call('ZADD', KEYS[1] .. 'epochs', 'XX', 0, ARGV[1])"

# ->    ready, delayed, leased, dead
_STATS = """
local leased = 0
for _, epoch in ipairs(redis.call('ZRANGE', prefix .. 'epochs', 0, -1)) do
  leased = leased + redis.call('HLEN', prefix .. 'leased:' .. epoch)
end
local function count(set) return redis.call('ZCARD', prefix .. set) end
return {count('ready:inline') + count('ready:isolated'), count('delayed'), leased, count('dead')}
"""

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

SCRIPTS: Final[Mapping[str, str]] = {
    "enqueue": BASE + BELL + PLACE + _ENQUEUE,
    "reserve": BASE + JOB + PLACE + DUE + EPOCHS + _RESERVE,
    "settle": BASE + BELL + JOB + PLACE + CERTIFY + EPOCHS + FOLLOW + _SETTLE,
    "open": BASE + BELL + JOB + PLACE + CERTIFY + EPOCHS + RECOVER + _OPEN,
    "renew": BASE + EPOCHS + _RENEW,
    "sweep": BASE + BELL + JOB + PLACE + CERTIFY + DUE + EPOCHS + RECOVER + _SWEEP,
    "outbox": BASE + _OUTBOX,
    "hand_over": BASE + BELL + PLACE + _HAND_OVER,
    "stats": BASE + _STATS,
    "close": _CLOSE,
}
CLIENT_SCRIPTS: Final[Mapping[str, str]] = {
    "enqueue": SCRIPTS["enqueue"],
    "stats": SCRIPTS["stats"],
    "cancel": BASE + JOB + PLACE + CERTIFY + _CANCEL,
    "show": BASE + _SHOW,
    "retry": BASE + BELL + JOB + PLACE + DEAD + _RETRY,
    "forget": BASE + DEAD + _FORGET,
}
