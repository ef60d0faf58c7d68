"""The scripts that Redis runs for a daemon: one a verb, each short, none of which scans. Redis and Valkey, 6.2 or later.

KEYS[1] is what the queue's keys begin with; in a cluster it sends the script to their slot. redis_lua has the keys and
the rules, redis_client_scripts what people and applications ask besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .redis_lua import BASE, BELL, CERTIFY, DUE, EPOCHS, FOLLOW, FUNCTIONS, JOB, PLACE, RECOVER, START

# ARGV: sender, request, seconds to remember it, greatest depth (0: any), jobs the whole call adds to it; then six a job:
#       id, lane, priority, "" or seconds from now, "" or seconds since 1970, envelope
# ->    a digit a job (1: new), or the depth that left no room, as an integer
_ENQUEUE_ONE = """
local memory = prefix .. 'client:' .. ARGV[1]
local request, answers = string.match(redis.call('GET', memory) or '', '^(%d+) (%d*)$')
if request == ARGV[2] then return answers end
if request and tonumber(request) > tonumber(ARGV[2]) then return '' end -- it was long under way, and nobody waits for an answer

local max_depth = tonumber(ARGV[4])
if max_depth > 0 then
  local depth = 0
  for _, set in ipairs({'ready:inline', 'ready:isolated', 'delayed'}) do depth = depth + redis.call('ZCARD', prefix .. set) end
  if depth + ARGV[5] > max_depth then return depth end
end

-- One job that is due, as nearly always: here no function is defined, see _SELDOM.
if #ARGV == 11 and ARGV[9] == '' and ARGV[10] == '' then
  local id, lane = ARGV[6], ARGV[7] == 'isolated' and 'isolated' or 'inline'
  local key, ready = prefix .. 'job:' .. id, prefix .. 'ready:' .. lane
  local idle = redis.call('GET', prefix .. 'idle')
  if redis.call('EXISTS', key) == 1 then
    redis.call('SET', memory, ARGV[2] .. ' 0', 'EX', ARGV[3])
    return '0'
  end
  local priority, due = ARGV[8], string.format('%.6f', now)
  local job = '-' .. lane .. ' ' .. priority .. ' ' .. due .. '\\n' .. ARGV[11]

  -- Lease it to the daemon that has offered to take it, if there is one (decision 0023).
  local epoch, number, lanes = string.match(idle or '', '^(%S+) (%d+) (.+)$')
  if epoch then
    local leased, last = prefix .. 'leased:' .. epoch, prefix .. 'last:' .. epoch
    local expiry = tonumber(redis.call('ZSCORE', prefix .. 'epochs', epoch) or 0)
    local answered = tonumber(string.match(redis.call('GET', last) or '', '^%d+') or 0)
    redis.call('HLEN', leased)
    if string.find(lanes, lane, 1, true) and expiry > now and expiry < 1e15 and answered + 1 < tonumber(number)
        and redis.call('ZCARD', ready) == 0 then
      redis.call('SET', key, job)
      local heard = redis.pcall('PUBLISH', prefix .. 'to:' .. epoch, number .. ' ' .. #id .. '\\n' .. id .. job)
      if type(heard) == 'number' and heard > 0 then
        redis.call('HSET', leased, id, 1)
        redis.call('SET', last, number .. ' ' .. cmsgpack.pack({id}))
        redis.call('SET', prefix .. 'idle', 1)
        redis.call('SET', memory, ARGV[2] .. ' 1', 'EX', ARGV[3])
        return '1'
      end
      redis.call('DEL', key)
    end
  end

  redis.call('ZADD', ready, priority == '0' and due or string.format('%.6f', now - priority * PRIORITY_STEP), id)
  redis.call('SET', key, job)
  redis.call('SET', memory, ARGV[2] .. ' 1', 'EX', ARGV[3])
  if idle and redis.call('DEL', prefix .. 'idle') == 1 then redis.pcall('PUBLISH', prefix .. 'bell', '') end
  return '1'
end
"""

# Several, or one that is due later.
_ENQUEUE = """
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

# To reserve and to acknowledge, no function is defined that is not needed: each is garbage, and what a script spends most of its
# time on is to collect the garbage of Lua.
_SELDOM = (
    "local function seldom()"
    + FUNCTIONS
    + JOB
    + PLACE
    + DUE
    + EPOCHS
    + """
return look, move_due, revive
end
"""
)

# ARGV: epoch, identity, lease in seconds, request, how many of each lane
# ->    "repeated", "offered" (nothing was there, and who adds a job may hand it to us), "short" or "enough"; the number of the
#       request that is answered; seconds to the next delayed job, or nil; then three lists a lane: ids; what stands in
#       job:<id> of each; and, three for each job that is not reserved for the first time: its position, n, and what it went
#       through: attempts, crashes, recoveries, deferrals, memory, available_at
_RESERVE = """
local epoch, request, names = ARGV[1], ARGV[4], {'inline', 'isolated'}
local leased, memory, job_prefix = prefix .. 'leased:' .. epoch, prefix .. 'last:' .. epoch, prefix .. 'job:'
local ids, jobs, others = {{}, {}}, {{}, {}}, {{}, {}}

-- nil, or how old what is next is
local function next_age()
  local head = redis.call('ZRANGE', prefix .. 'delayed', 0, 0, 'WITHSCORES')
  return head[2] and now - head[2]
end

local age = next_age()
local function answer(how, number)
  local due = age and string.format('%.6f', math.min(math.max(0, -age), 1e9)) or false
  return {how, number, due, ids[1], jobs[1], others[1], ids[2], jobs[2], others[2]}
end

local function past_of(id)
  local past = redis.pcall('HMGET', prefix .. 'past:' .. id,
    'attempts', 'crashes', 'recoveries', 'deferrals', 'memory', 'available_at', 'n', 'epoch')
  return past.err and {} or past
end

local function add_other(index, at, n, past)
  local list = others[index]
  list[#list + 1], list[#list + 2], list[#list + 3] = at, n, past
end

redis.call('HLEN', leased)
local flag = redis.call('GET', prefix .. 'idle')
local expiry = tonumber(redis.call('ZSCORE', prefix .. 'epochs', epoch))
local living = expiry and expiry > now and expiry < 1e15
if not living then redis.call('HLEN', prefix .. 'owners') end
local last = redis.call('GET', memory)
local answered = last and string.match(last, '^%d+ ')
if answered and tonumber(answered) >= tonumber(request) then -- greater: of what it was handed since
  local look = seldom()
  local readable, taken = pcall(cmsgpack.unpack, string.sub(last, #answered + 1))
  taken = readable and type(taken) == 'table' and taken or {}
  for i, n in ipairs(#taken > 0 and redis.call('HMGET', leased, unpack(taken)) or {}) do
    if n then
      local id = taken[i]
      local index = look(id) == 'isolated' and 2 or 1
      local at = #ids[index] + 1
      ids[index][at], jobs[index][at] = id, redis.call('MGET', job_prefix .. id)[1]
      add_other(index, at, string.match(n, '^%d*'), past_of(id))
    end
  end
  return answer('repeated', tonumber(answered))
end

if age and age >= 0 then
  local _, move_due = seldom()
  move_due()
  age = next_age()
end
local short, cut, size, held, recovered = false, false, 0, {}, {}
for index, name in ipairs(names) do
  local want = tonumber(ARGV[4 + index])
  local list = want > 0 and redis.call('ZRANGE', prefix .. 'ready:' .. name, 0, want - 1) or {}
  short = short or #list < want
  local last_one = 0
  while last_one < #list and size <= MAX_BYTES do
    local before, keys = last_one, {}
    for i = 1, math.min(READ_AT_ONCE, #list - before) do keys[i] = job_prefix .. list[before + i] end
    local found = redis.call('MGET', unpack(keys))
    if before == 0 then jobs[index] = found end
    for i, job in ipairs(found) do
      if size > MAX_BYTES then break end
      local at = before + i
      jobs[index][at] = job
      size = size + #(job or '')
      last_one = at
      held[#held + 1] = list[at]
      if job and string.byte(job) == UNTOUCHED then
        held[#held + 1] = '1'
      else
        local past = past_of(list[at])
        local n = tonumber(past[7] or 0)
        n = string.format('%.0f', n and n > 0 and n < 1e15 and math.floor(n) + 1 or 1)
        held[#held + 1] = n .. '+'
        if past[8] then recovered[#recovered + 1] = prefix .. 'past:' .. list[at] end
        add_other(index, at, n, past)
      end
    end
  end
  for i = #list, last_one + 1, -1 do
    list[i], jobs[index][i], cut = nil, nil, true
  end
  ids[index] = list
end

if #held > 0 then
  for index, name in ipairs(names) do
    if #ids[index] > 0 then redis.call('ZREMRANGEBYRANK', prefix .. 'ready:' .. name, 0, #ids[index] - 1) end
  end
  redis.call('HSET', leased, unpack(held))
  if not living then
    local _, _, revive = seldom()
    revive(epoch, ARGV[2], ARGV[3])
  end
  for _, key in ipairs(recovered) do redis.call('HDEL', key, 'epoch') end
  local taken = ids[1]
  if #ids[2] > 0 then
    taken = {}
    for i = 1, #held, 2 do taken[#taken + 1] = held[i] end
  end
  redis.call('SET', memory, request .. ' ' .. cmsgpack.pack(taken))
end
short = short and not cut
local how = short and 'short' or 'enough'
local ours = flag and string.sub(flag, 1, #epoch + 1) == epoch .. ' '
if short and #held == 0 and (ours or not flag or flag == '1') then
  local lanes = (ARGV[5] + 0 > 0 and 'inline' or '') .. (ARGV[6] + 0 > 0 and 'isolated' or '')
  redis.pcall('SET', prefix .. 'idle', string.format('%s %.0f %s', epoch, request + 1, lanes))
  how = 'offered'
elseif ours or short and not flag then
  redis.pcall('SET', prefix .. 'idle', 1)
end
return answer(how, tonumber(request))
"""

# ARGV: the tokens' epoch, sender, request, number of plain acks, identity, lease in seconds; the ids of the plain acks, none
#       twice; their ns; fourteen for each other settlement: id, n, verb, attempts, crashes, recoveries, deferrals, memory, delay,
#       "" or lane, "" or certificate, "" or result, keep_s, number of follow-ups; after it seven for each of those: "" or another
#       queue, id, lane, priority, "" or seconds from now, "" or seconds since 1970, envelope
# ->    a digit for each in that order (1: settled)
_SETTLE_PLAIN = """
local epoch, plain = ARGV[1], tonumber(ARGV[4])
local others = 7 + 2 * plain
local leased, memory = prefix .. 'leased:' .. epoch, prefix .. 'settled:' .. ARGV[2]
local last = redis.call('GET', memory)
if last and string.sub(last, 1, #ARGV[3] + 1) == ARGV[3] .. ' ' then return string.sub(last, #ARGV[3] + 2) end

local all = others > #ARGV and redis.call('HMGET', leased, unpack(ARGV, 7, 6 + plain))
for i = 1, all and plain or 0 do
  if all[i] ~= ARGV[6 + plain + i] then
    all = false
    break
  end
end
if all then
  redis.call('HDEL', leased, unpack(ARGV, 7, 6 + plain))
  local keys, job_prefix = {}, prefix .. 'job:'
  for i = 1, plain do keys[i] = job_prefix .. ARGV[6 + i] end
  redis.call('DEL', unpack(keys))
  local answers = string.rep('1', plain)
  redis.call('SET', memory, ARGV[3] .. ' ' .. answers, 'EX', MEMORY)
  return answers
end
"""

_SETTLE = """
local at, ids, ns = {}, {}, {}
for i = 1, plain do
  at[i], ids[i], ns[i] = 0, ARGV[6 + i], ARGV[6 + plain + i]
end
local next_one = others
while next_one <= #ARGV do
  at[#at + 1], ids[#ids + 1], ns[#ns + 1] = next_one, ARGV[next_one], ARGV[next_one + 1]
  next_one = next_one + 14 + 7 * ARGV[next_one + 13]
end
local settled, digits, ended, strays, back, seen, untouched = {}, {}, {}, {}, {}, {}, {}
for i, held in ipairs(redis.call('HMGET', leased, unpack(ids))) do
  local id, n = ids[i], ns[i]
  local holds = at[i] > 0 and ARGV[at[i] + 2] == 'hold'
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
local answers = table.concat(digits)
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

# ARGV: epoch, identity, lease in seconds  ->  the idle flag, or nil; "" or when the epoch was last found expired
_RENEW = """
local lapsed = redis.call('GET', prefix .. 'lapsed:' .. ARGV[1]) or ''
local living = alive(ARGV[1])
redis.call('HLEN', prefix .. 'owners')
beat(ARGV[3])
if living then register(ARGV[1], ARGV[2], ARGV[3]) else lapsed = revive(ARGV[1], ARGV[2], ARGV[3]) end
return {redis.call('GET', prefix .. 'idle'), lapsed}
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

SCRIPTS: Final[Mapping[str, str]] = {
    "enqueue": START + _ENQUEUE_ONE + FUNCTIONS + BELL + PLACE + _ENQUEUE,
    "reserve": START + _SELDOM + _RESERVE,
    "settle": START + _SETTLE_PLAIN + FUNCTIONS + BELL + JOB + PLACE + CERTIFY + EPOCHS + FOLLOW + _SETTLE,
    "open": BASE + BELL + JOB + PLACE + CERTIFY + EPOCHS + RECOVER + _OPEN,
    "renew": BASE + EPOCHS + _RENEW,
    "sweep": BASE + BELL + JOB + PLACE + CERTIFY + DUE + EPOCHS + RECOVER + _SWEEP,
    "outbox": BASE + _OUTBOX,
    "hand_over": BASE + BELL + PLACE + _HAND_OVER,
    "stats": BASE + _STATS,
    "close": _CLOSE,
}
