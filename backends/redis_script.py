"""The Lua that makes each primitive one step in Redis.

Keys of a queue, all in one hash slot; ``P`` is ``{kq:<queue id>}:``, or ``{kq:<queue id>}.dead:`` for
the dead-letter queue beside it, so that dead-lettering is one call too:

=========  ======  ====================================  ==========================================
key        type    holds                                 written by
=========  ======  ====================================  ==========================================
P q        string  the queue's arguments, as JSON        declare, move
P m        hash    id -> packed envelope                 put, move; deleted at the end
P r:<n>    list    ids ready at priority n               put, take (what is due), settle
P b:<n>    zset    ids put back, by the token they had:  settle (release), take (leases that ran out);
                   taken before ``r:<n>``                this is what keeps them in order
P d        zset    ids delayed, by the moment in ms      put, settle (retry)
P l        zset    ids leased, by the lease's end in ms  take, renew
P t        hash    id -> token of its lease              take
P s        hash    id -> attempts:crashes:deliveries,    settle (retry), take (leases that ran out)
                   where one of them is not 0
P p        hash    id -> priority, where it is not 4     put, move
P x        hash    id -> moment in ms at which it        put
                   expires, for plain Kombu programs
P n        string  the last token                        take
P c        zset    consumers, by the end of their lease  renew
P w        list    one token at most, to wake a worker   whoever makes something ready
P k        zset    ids completed, by the moment in ms    settle (ack), where the queue has a replay
                   until which they are remembered       window; expires with the last of them
P a        hash    since -> moment in ms at which it     take; deleted by renew
                   was found that no consumer is heard
=========  ======  ====================================  ==========================================

Three rules. Time is the server's. A script that must work on a full server writes first something
that Redis never refuses for memory (ZREM, LPOP): after such a write it lets the others pass, so that
a queue can be emptied when nothing more can be stored. And what may be refused, because a stranger's value
stands under a key, is refused before anything is written, or leaves nothing that counts: what is written before
an error stays written.
"""

from __future__ import annotations

from typing import Final

_HEAD: Final = """
local P = KEYS[1]
local unpack = unpack or table.unpack
local call = redis.call
"""

#: What scripts share, by the name that they call; each may call those before it.
_FUNCTIONS: Final[dict[str, str]] = {
    "now": """
local function now()
  local t = call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
""",
    "number": """
local function number(n)  -- Lua prints large numbers with an exponent
  return string.format('%.0f', n)
end
""",
    "level": """
local function level(prefix, id)  -- what a stranger may have written is read as if it were not there
  return string.match(call('HGET', prefix .. 'p', id) or '', '^%d$') or '4'
end
""",
    "state": """
local function state(id)
  local a, c, d = string.match(call('HGET', P .. 's', id) or '', '^(%d+):(%d+):(%d+)$')
  return a or '0', c or '0', d or '0'
end
""",
    "wake": """
local function wake(prefix)
  if call('LLEN', prefix .. 'w') == 0 then call('RPUSH', prefix .. 'w', '1') end
end
""",
    "forget": """
local function forget(prefix, ids)  -- everything that is known of messages but their bodies
  if call('EXISTS', prefix .. 's', prefix .. 'p', prefix .. 'x') == 0 then return end
  for _, key in ipairs({'s', 'p', 'x'}) do
    if call('EXISTS', prefix .. key) == 1 then call('HDEL', prefix .. key, unpack(ids)) end
  end
end
""",
    "unsound": """
local SIZES = {r = 'LLEN', w = 'LLEN', b = 'ZCARD', d = 'ZCARD', l = 'ZCARD'}
local function unsound(prefix, keys)  -- an error, if what stands under one of the keys is no value of ours
  for _, key in ipairs(keys) do
    local size = redis.pcall(SIZES[string.sub(key, 1, 1)] or 'HLEN', prefix .. key)
    if type(size) == 'table' then return redis.error_reply(size.err .. ' (' .. prefix .. key .. ')') end
  end
end
""",
    "unheard": """
local function unheard(at, lease)  -- when the latest consumer's lease ends, if none has been heard of for long; or nil
  local last = tonumber(call('ZRANGE', P .. 'c', -1, -1, 'WITHSCORES')[2] or '')
  return last and last < at + lease / 2 and last or nil
end
""",
    "silent": """
local function silent(at, lease)  -- whether consumers have not been heard of for long, and may yet be
  local last = unheard(at, lease)
  if not last then return false end
  local noted = redis.pcall('HGET', P .. 'a', 'since')
  local since = type(noted) == 'string' and tonumber(noted)
  if not since or since > at then
    -- From when it is found, not from when they were heard: the server may have stood still, or its clock been set.
    since = at
    if type(redis.pcall('HSET', P .. 'a', 'since', number(at))) ~= 'number' then return last >= at - lease end
  end
  return at < since + 1.5 * lease  -- not for ever: all may have died
end
""",
    "add": """
local function add(prefix, id, raw, priority, delay, ttl, at)
  if priority ~= '4' then call('HSET', prefix .. 'p', id, priority) end
  if ttl > 0 then call('HSET', prefix .. 'x', id, number(at + ttl)) end
  if delay > 0 then
    call('ZADD', prefix .. 'd', number(at + delay), id)
  else
    call('RPUSH', prefix .. 'r:' .. priority, id)
  end
  -- The body comes last: if its place were refused, it would be there all the same, and whoever publishes it once
  -- more were told that it is stored.
  call('HSETNX', prefix .. 'm', id, raw)
  if delay <= 0 or call('ZRANGE', prefix .. 'd', 0, 0)[1] == id then wake(prefix) end
end
""",
    "unwait": """
local function unwait(prefix, id)  -- take a waiting message off its list; true if it was waiting
  if call('ZREM', prefix .. 'd', id) == 1 then return true end
  local n = level(prefix, id)
  if call('ZREM', prefix .. 'b:' .. n, id) == 1 then return true end
  return call('LREM', prefix .. 'r:' .. n, 1, id) == 1
end
""",
    "each_page": """
local function each_page(limit, skip, see)  -- of the ids of waiting messages, in the order of delivery
  local function page(size, range)
    if limit > 0 and skip < size then
      local ids = range(skip, math.min(size, skip + limit) - 1)
      limit = limit - #ids
      skip = 0
      see(ids)
    else
      skip = math.max(0, skip - size)
    end
  end
  for n = 9, 0, -1 do
    local b, r = P .. 'b:' .. n, P .. 'r:' .. n
    page(call('ZCARD', b), function(i, j) return call('ZRANGE', b, i, j) end)
    page(call('LLEN', r), function(i, j) return call('LRANGE', r, i, j) end)
  end
  page(call('ZCARD', P .. 'd'), function(i, j) return call('ZRANGE', P .. 'd', i, j) end)
end
""",
}

#: ARGV: arguments as JSON. Returns the arguments it was made with before, or nil.
DECLARE: Final = """
local found = call('GET', P .. 'q')  -- before any write: a full server refuses those
if found then return found end
call('SETNX', P .. 'q', ARGV[1])  -- so that nobody needs the right to overwrite a key
return nil
"""

#: ARGV: max_length or -1, then id, raw, priority, delay, ttl of each. Returns how many, or -1.
PUT: Final = """
if call('EXISTS', P .. 'q') == 0 then return -1 end
local room = tonumber(ARGV[1])
local limited = room >= 0
if limited then room = room - (call('HLEN', P .. 'm') - call('ZCARD', P .. 'l')) end
local at = now()
local accepted = 0
for i = 2, #ARGV, 5 do
  local id = ARGV[i]
  if limited and room <= 0 then
    if call('HEXISTS', P .. 'm', id) == 0 then return accepted end
  elseif call('HEXISTS', P .. 'm', id) == 0 then
    add(P, id, ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4]), at)
    room = room - 1
  end
  accepted = accepted + 1
end
return accepted
"""

#: ARGV: id, raw of each: messages of no special kind, for a queue without a length. Otherwise as PUT.
PUT_PLAIN: Final = """
if call('EXISTS', P .. 'q') == 0 then return -1 end
local m, r, new, n, is_sound = P .. 'm', P .. 'r:4', {}, 0, false
for i = 1, #ARGV, 2 do
  local id = ARGV[i]
  if not is_sound then
    -- As in `add`: whether the list takes an id is known before there is a body.
    if call('HEXISTS', m, id) == 0 then
      call('RPUSH', r, id)
      call('HSETNX', m, id, ARGV[i + 1])
      is_sound = true
    end
  elseif call('HSETNX', m, id, ARGV[i + 1]) == 1 then
    n = n + 1
    new[n] = id
  end
end
if n > 0 then call('RPUSH', r, unpack(new)) end
if is_sound then wake(P) end
return #ARGV / 2
"""

#: Returns whether there is such a queue, as 0 or 1; -1 where it cannot be told whether its list would take an id; -2 of
#: a server before 7.0: there a script in a transaction is refused if the server was full for the last one outside it,
#: whoever's that was, and the other commands are run all the same.
MAY_PUT: Final = """
if not redis.REDIS_VERSION_NUM then return -2 end
return unsound(P, {'r:4'}) and -1 or call('EXISTS', P .. 'q')
"""

#: ARGV: id of a message whose body the next command of the same transaction stores, if there is none of that id.
PUT_LONG: Final = """
if call('HEXISTS', P .. 'm', ARGV[1]) == 0 then
  call('RPUSH', P .. 'r:4', ARGV[1])
  wake(P)
end
"""

#: ARGV: limit, lease in ms, bytes after which to take no more, '1' where bodies are large. Returns one string: a
#: msgpack array of byte strings, which are more_in, the first token, then id, raw, state, and marks of each message:
#: 'x' where it has expired, 'l' where its body is left out, to be asked for: large ones take Lua long to hand over.
TAKE: Final = """
local limit = tonumber(ARGV[1])
local at = now()
local m, t, l, r = P .. 'm', P .. 't', P .. 'l', P .. 'r:4'

local function size_of(command, key)  -- less than any, where no value of ours stands there
  local n = redis.pcall(command, key)
  return type(n) == 'number' and n or -1
end

-- Nearly always there are only messages of normal priority, waiting or leased, and as many bodies. To look for all
-- else takes twice as long, which a message that a worker waits for would feel.
local plain, soonest = false, nil
if call('EXISTS', P .. 's', P .. 'p', P .. 'x', P .. 'd', P .. 'b:4') == 0 then
  local held = 0
  if call('EXISTS', l, t, P .. 'w') > 0 then
    held = size_of('ZCARD', l)
    if size_of('HLEN', t) ~= held or size_of('LLEN', P .. 'w') < 0 then held = -1 end
    if held > 0 then soonest = tonumber(call('ZRANGE', l, 0, 0, 'WITHSCORES')[2]) end
  end
  local waiting = size_of('LLEN', r)
  plain = held >= 0 and waiting >= 0 and size_of('HLEN', m) == waiting + held and not (soonest and soonest <= at)
end

local lines = {}  -- of other priorities than the normal one
if not plain then
  local wrong = unsound(P, {'m', 't', 's', 'p', 'x', 'l', 'w', 'r:4', 'b:4', 'd'})
  if wrong then return wrong end
  for n = 9, 0, -1 do
    if n ~= 4 then
      lines[#lines + 1] = 'r:' .. n
      lines[#lines + 1] = 'b:' .. n
    end
  end
  wrong = unsound(P, lines)
  if wrong then return wrong end
  for i, key in ipairs(lines) do lines[i] = P .. key end
end
local given = call('GET', P .. 'n') or '0'
if not string.match(given, '^%d+$') then
  return redis.error_reply('ERR ' .. P .. 'n should hold a number, larger than any in ' .. P .. 't')
end

local is_away = false  -- whoever holds what has run out could not renew it, and does so soon; see RENEW
if not plain then
  local over = call('ZRANGEBYSCORE', l, '-inf', number(at), 'LIMIT', 0, 200)
  if #over > 0 then is_away = silent(at, tonumber(ARGV[2])) end
  for _, id in ipairs(is_away and {} or over) do
    call('ZREM', l, id)
    local token = call('HGET', t, id) or '0'
    call('HDEL', t, id)
    local a, c, d = state(id)
    call('HSET', P .. 's', id, a .. ':' .. c .. ':' .. number(tonumber(d) + 1))
    call('ZADD', P .. 'b:' .. level(P, id), token, id)
  end
  for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'd', '-inf', number(at), 'LIMIT', 0, 1000)) do
    call('ZREM', P .. 'd', id)
    call('RPUSH', P .. 'r:' .. level(P, id), id)
  end
end

-- In small steps, and no further than to the bytes that one answer may have.
local ids, raws, left, size, most = {}, {}, {}, 0, tonumber(ARGV[3])

local function fitting(got)  -- how many of them there is room for, the one with which it is over included
  local total = size
  for i, id in ipairs(got) do
    total = total + math.max(call('HSTRLEN', m, id), #id)
    if total >= most then return i end
  end
  return #got
end

local function keep(got)
  if ARGV[4] == '1' then
    for _, id in ipairs(got) do
      local n = call('HSTRLEN', m, id)
      ids[#ids + 1] = id
      left[#ids] = n > 0
      raws[#ids] = n > 0 and '' or call('HGET', m, id)
      size = size + math.max(n, #id)
    end
    return
  end
  local bodies = call('HMGET', m, unpack(got))
  for i, id in ipairs(got) do
    ids[#ids + 1] = id
    raws[#ids] = bodies[i]
    size = size + #(bodies[i] or id)
  end
end

for _, n in ipairs((plain or call('EXISTS', unpack(lines)) == 0) and {4} or {9, 8, 7, 6, 5, 4, 3, 2, 1, 0}) do
  while #ids < limit and size < most do
    local step = math.min(limit - #ids, ARGV[4] == '1' and 1 or 50)
    local got, last = plain and {} or call('ZRANGE', P .. 'b:' .. n, 0, step - 1), false
    local is_back = #got > 0
    if not is_back then
      got = call('LRANGE', P .. 'r:' .. n, 0, step - 1)
      last = #got < step
    end
    local fit = fitting(got)
    last = last and fit == #got
    for i = #got, fit + 1, -1 do got[i] = nil end
    if is_back then
      call('ZREM', P .. 'b:' .. n, unpack(got))
    elseif fit > 0 then
      call('LPOP', P .. 'r:' .. n, fit)
    end
    if fit > 0 then keep(got) end
    if last then break end
  end
end

local char, floor = string.char, math.floor

local function head(s)  -- what msgpack has before bytes; not joined with them, for they may be many
  local n = #s
  if n < 65536 then return char(197, floor(n / 256), n % 256) end
  return char(198, floor(n / 16777216) % 256, floor(n / 65536) % 256, floor(n / 256) % 256, n % 256)
end

local out = {}
local token = 0
if #ids > 0 then
  -- Not before the time in microseconds: what is lost with a deleted queue, or a server, is not counted anew.
  local clock = call('TIME')
  token = math.max(tonumber(given) + 1, tonumber(clock[1]) * 1000000 + tonumber(clock[2]))
  call('INCRBY', P .. 'n', number(token + #ids - 1 - tonumber(given)))
  local states, ends = {}, {}
  if not plain then
    states, ends = call('HMGET', P .. 's', unpack(ids)), call('HMGET', P .. 'x', unpack(ids))
  end
  local leases, tokens = {}, {}
  local lease_end = number(at + tonumber(ARGV[2]))
  for i, id in ipairs(ids) do
    local raw = raws[i]
    if not raw then
      -- Not one of ours: a stranger pushed bytes onto the list. They are the message.
      raw = id
      id = 'foreign-' .. number(token + i - 1)
      call('HSET', m, id, raw)
    end
    leases[2 * i - 1], leases[2 * i] = lease_end, id
    tokens[2 * i - 1], tokens[2 * i] = id, number(token + i - 1)
    local tail = left[i] and '\\196\\0\\196\\1l' or '\\196\\0\\196\\0'  -- no state; what marks there are
    if states[i] or ends[i] then
      local state = states[i] or ''
      local marks = ((ends[i] and tonumber(ends[i]) <= at) and 'x' or '') .. (left[i] and 'l' or '')
      tail = head(state) .. state .. head(marks) .. marks
    end
    local n = 5 * i - 5
    out[n + 1], out[n + 2], out[n + 3], out[n + 4], out[n + 5] = head(id), id, head(raw), raw, tail
  end
  call('ZADD', l, unpack(leases))
  call('HSET', t, unpack(tokens))
  if limit > 0 and (#ids >= limit or size >= most) then
    -- Whoever has all it wanted may have no room for what becomes due, either.
    if call('EXISTS', r, P .. 'b:4', P .. 'd', unpack(lines)) > 0 then wake(P) end
  end
end

if plain then
  if #ids > 0 then soonest = math.min(soonest or math.huge, at + tonumber(ARGV[2])) end
else
  soonest = nil
  for _, key in ipairs({P .. 'd', l}) do
    local first = tonumber(call('ZRANGE', key, 0, 0, 'WITHSCORES')[2] or '')
    if first and key == l and is_away then first = math.max(first, at + 1000) end
    if first then soonest = math.min(soonest or math.huge, first) end
  end
end
local more = soonest and number(math.max(1, soonest - at)) or ''
local count = #ids * 4 + 2
return string.char(221, 0, math.floor(count / 65536) % 256, math.floor(count / 256) % 256, count % 256)
  .. head(more) .. more .. head(number(token)) .. number(token) .. table.concat(out)
"""

#: ARGV: n, then n ids, then n tokens: acknowledge them. Returns the ids that are not held so. Where the
#: queue remembers them, then n times: ms for which, or 0, and the id that it is known by.
ACK: Final = """
local n = tonumber(ARGV[1])
local ids = {}
for i = 1, n do ids[i] = ARGV[i + 1] end
local tokens = call('HMGET', P .. 't', unpack(ids))
local mine, lost = {}, {}
for i, id in ipairs(ids) do
  if tokens[i] == ARGV[n + i + 1] then mine[#mine + 1] = id else lost[#lost + 1] = id end
end
if #mine > 0 then
  call('ZREM', P .. 'l', unpack(mine))
  call('HDEL', P .. 't', unpack(mine))
  call('HDEL', P .. 'm', unpack(mine))
  forget(P, mine)
end
if #mine > 0 and #ARGV > 2 * n + 1 then
  local at, longest, kept = now(), 0, {}
  for i = 1, n do
    local keep = tonumber(ARGV[2 * n + 2 * i])
    if keep > 0 and tokens[i] == ARGV[n + i + 1] then
      kept[#kept + 1] = number(at + keep)
      kept[#kept + 1] = ARGV[2 * n + 2 * i + 1]
      longest = math.max(longest, keep)
    end
  end
  if #kept > 0 then
    -- More goes than comes, as long as there is something that is over; but never much in one call.
    local over = call('ZRANGEBYSCORE', P .. 'k', '-inf', number(at), 'LIMIT', 0, #kept)
    if #over > 0 then call('ZREMRANGEBYRANK', P .. 'k', 0, #over - 1) end
    call('ZADD', P .. 'k', unpack(kept))
    if call('PTTL', P .. 'k') < longest then call('PEXPIRE', P .. 'k', number(longest)) end
  end
end
return lost
"""

#: ARGV: ids. Returns the numbers, from 1, of those whose completion is remembered.
COMPLETED: Final = """
local found = {}
if call('EXISTS', P .. 'k') == 0 then return found end
local at = now()
for i, id in ipairs(ARGV) do
  local until_ = call('ZSCORE', P .. 'k', id)
  if until_ and tonumber(until_) > at then found[#found + 1] = i end
end
return found
"""

#: ARGV: id, token, action, delay, attempts, crashes, deliveries of each: retry or release them. Returns the
#: ids that are not held so.
RETURN: Final = """
local at = now()
local wrong = unsound(P, {'l', 't', 's', 'p', 'd', 'w'})
if wrong then return wrong end
local lost, places = {}, {}
for i = 1, #ARGV, 7 do
  local kind = ARGV[i + 2] == 'release' and 'b:' or 'r:'
  places[#places + 1] = kind .. level(P, ARGV[i])
end
wrong = unsound(P, places)
if wrong then return wrong end
for i = 1, #ARGV, 7 do
  local id, token = ARGV[i], ARGV[i + 1]
  if call('HGET', P .. 't', id) ~= token then
    lost[#lost + 1] = id
  else
    call('ZREM', P .. 'l', id)
    call('HDEL', P .. 't', id)
    local a, c, d = ARGV[i + 4], ARGV[i + 5], ARGV[i + 6]
    if ARGV[i + 2] == 'release' then a, c = state(id) end
    if a == '0' and c == '0' and d == '0' then
      if call('EXISTS', P .. 's') == 1 then call('HDEL', P .. 's', id) end
    else
      call('HSET', P .. 's', id, a .. ':' .. c .. ':' .. d)
    end
    local delay = tonumber(ARGV[i + 3])
    if ARGV[i + 2] == 'release' then
      call('ZADD', P .. 'b:' .. level(P, id), token, id)
      wake(P)
    elseif delay > 0 then
      call('ZADD', P .. 'd', number(at + delay), id)
      if call('ZRANGE', P .. 'd', 0, 0)[1] == id then wake(P) end
    else
      call('RPUSH', P .. 'r:' .. level(P, id), id)
      wake(P)
    end
  end
end
return lost
"""

#: KEYS: source, target. ARGV: id, token or '', the new id, raw, priority, delay.
#: Returns 1 if it was there, and the new id was not; or if a lease's move has been made, and its answer got lost.
MOVE: Final = """
local T = KEYS[2]
local id, token = ARGV[1], ARGV[2]
local new = ARGV[3]
local wrong = unsound(P, {'m', 't', 's', 'p', 'x', 'l'}) or unsound(T, {'m', 'p', 'd', 'w', 'r:' .. ARGV[5]})
if wrong then return wrong end
if call('HEXISTS', T .. 'm', new) == 1 then
  local is_done = token ~= '' and call('HEXISTS', P .. 'm', id) == 0 and call('HGET', T .. 'm', new) == ARGV[4]
  return is_done and 1 or 0
end
if token ~= '' then
  if call('HGET', P .. 't', id) ~= token then return 0 end
  call('ZREM', P .. 'l', id)
  call('HDEL', P .. 't', id)
elseif call('HEXISTS', P .. 't', id) == 1 or not unwait(P, id) then
  return 0
end
call('SETNX', T .. 'q', '{}')
add(T, new, ARGV[4], ARGV[5], tonumber(ARGV[6]), 0, now())
call('HDEL', P .. 'm', id)
forget(P, {id})
return 1
"""

#: ARGV: lease in ms, consumer, then id, token of each. Returns the ids that are not held so.
#: Consumers renew each third of a lease. Where none of them has done so for half of one, it was the server that could
#: not be reached, or had stopped: the first that comes back gives the others another third, or it would take from them
#: what they still run. One that is new may be here because those who held the leases have died; it does so only where
#: the leases of all consumers have run out, and not long ago.
RENEW: Final = """
local at, lease = now(), tonumber(ARGV[1])
local until_ = number(at + lease)
local last = unheard(at, lease)
local was_away = last and (call('ZSCORE', P .. 'c', ARGV[2]) or (last < at and last >= at - lease))
call('ZREM', P .. 'c', ARGV[2])
call('UNLINK', P .. 'a')
if was_away then
  local grace = number(at + math.floor(lease / 3))
  local ids = call('ZRANGEBYSCORE', P .. 'l', '-inf', '(' .. grace)
  for i = 1, #ids, 1000 do
    local ends = {}
    for j = i, math.min(i + 999, #ids) do
      ends[#ends + 1] = grace
      ends[#ends + 1] = ids[j]
    end
    call('ZADD', P .. 'l', unpack(ends))
  end
end
call('ZADD', P .. 'c', until_, ARGV[2])
call('ZREMRANGEBYSCORE', P .. 'c', '-inf', number(at))
local lost = {}
for i = 3, #ARGV, 2 do
  if call('HGET', P .. 't', ARGV[i]) == ARGV[i + 1] then
    call('ZADD', P .. 'l', until_, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""

#: Has one of those who wait look.
NUDGE: Final = """
wake(P)
"""

#: Returns ready, delayed, leased, consumers, then the packed envelopes at the heads.
COUNTS: Final = """
local at = number(now())
local ready, heads = 0, {}
for n = 0, 9 do
  ready = ready + call('LLEN', P .. 'r:' .. n) + call('ZCARD', P .. 'b:' .. n)
  local first = call('ZRANGE', P .. 'b:' .. n, 0, 0)[1] or call('LINDEX', P .. 'r:' .. n, 0)
  if first then
    local raw = call('HGET', P .. 'm', first)
    if raw then heads[#heads + 1] = raw end
  end
end
local due = call('ZCOUNT', P .. 'd', '-inf', at)
local ended = call('ZCOUNT', P .. 'l', '-inf', at)
local out = {
  ready + due + ended,
  call('ZCARD', P .. 'd') - due,
  call('ZCARD', P .. 'l') - ended,
  call('ZCOUNT', P .. 'c', '(' .. at, '+inf'),
}
for _, raw in ipairs(heads) do out[#out + 1] = raw end
return out
"""

#: ARGV: limit, offset, bytes after which there are to be no more. Returns id, raw of each waiting message in the order
#: of delivery.
BROWSE: Final = """
local limit, skip, left = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local out = {}
each_page(limit, skip, function(ids)
  for _, id in ipairs(ids) do
    if left <= 0 then return end
    local raw = call('HGET', P .. 'm', id) or id
    out[#out + 1] = id
    out[#out + 1] = raw
    left = left - #raw
  end
end)
return out
"""

#: ARGV: limit, offset, a mark. Returns how many waiting messages were passed over, and the ids among them that have the
#: mark; nothing where there are no more.
AGAIN: Final = """
local out, passed = {0}, 0
each_page(tonumber(ARGV[1]), tonumber(ARGV[2]), function(ids)
  passed = passed + #ids
  for _, id in ipairs(ids) do
    if string.find(id, ARGV[3], 1, true) then out[#out + 1] = id end
  end
end)
out[1] = passed
return passed > 0 and out or {}
"""

#: ARGV: bytes after which there are to be no more, then ids. Returns how many of these were looked for, then id, raw of
#: each that waits.
LOOK: Final = """
local out, left = {0}, tonumber(ARGV[1])
for i = 2, #ARGV do
  if left <= 0 then break end
  local id = ARGV[i]
  local raw = call('HEXISTS', P .. 't', id) == 0 and call('HGET', P .. 'm', id)
  if raw then
    out[#out + 1] = id
    out[#out + 1] = raw
    left = left - #raw
  end
  out[1] = i - 1
end
return out
"""

#: ARGV: '1' for only if it is empty, '1' for only if nobody consumes it. Returns whether it was dropped, as 0 or 1.
DELETE: Final = """
if ARGV[1] == '1' and call('HLEN', P .. 'm') > 0 then return 0 end
if ARGV[2] == '1' and call('ZCOUNT', P .. 'c', '(' .. number(now()), '+inf') > 0 then return 0 end
for _, key in ipairs({'q', 'm', 'd', 'l', 't', 's', 'p', 'x', 'n', 'c', 'w', 'k', 'a'}) do call('UNLINK', P .. key) end
for n = 0, 9 do call('UNLINK', P .. 'r:' .. n, P .. 'b:' .. n) end
return 1
"""

#: ARGV: ids. Returns how many of them were waiting.
REMOVE: Final = """
local removed = 0
for _, id in ipairs(ARGV) do
  if call('HEXISTS', P .. 't', id) == 0 and unwait(P, id) then
    call('HDEL', P .. 'm', id)
    forget(P, {id})
    removed = removed + 1
  end
end
return removed
"""

#: Drops everything that waits. Returns how many that were.
CLEAR: Final = """
local held = call('ZRANGE', P .. 'l', 0, -1)
local removed = call('HLEN', P .. 'm') - #held
local kept = {}
for _, key in ipairs({'m', 's', 'p', 'x'}) do
  for _, id in ipairs(held) do
    local value = call('HGET', P .. key, id)
    if value then kept[#kept + 1] = {key, id, value} end
  end
end
for _, key in ipairs({'m', 's', 'p', 'x', 'd', 'w'}) do call('UNLINK', P .. key) end
for n = 0, 9 do call('UNLINK', P .. 'r:' .. n, P .. 'b:' .. n) end
for _, field in ipairs(kept) do call('HSET', P .. field[1], field[2], field[3]) end
return removed
"""

#: KEYS: the topology. ARGV: document, version. Returns 1 if it was of that version.
TOPOLOGY: Final = """
if (call('HGET', P, 'version') or '0') ~= ARGV[2] then return 0 end
call('HSET', P, 'document', ARGV[1], 'version', number(tonumber(ARGV[2]) + 1))
return 1
"""


def source(script: str) -> str:
    """Return a script with what it calls of the functions that they share."""
    for name, function in reversed(_FUNCTIONS.items()):
        if f"{name}(" in script:
            script = function + script
    return _HEAD + script
