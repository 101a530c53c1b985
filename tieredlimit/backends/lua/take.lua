--[[
take -- charge every bucket of a decision, or none of them; for several decisions, one by one.

KEYS[1]    the shard's revision, if ARGV[2] is not empty; then only the next ones hold buckets
KEYS[i]    the key of one subject's buckets; one hash tag; the same key may stand there several times
ARGV[1]    now in microseconds, or "" for the server's TIME
ARGV[2]    "NUMBER DIGEST": the revision under which these decisions were prepared; "" compares none
ARGV[3]    two little-endian doubles: the decisions were prepared for instants from the first one on
           and before the second one; "" for all
ARGV[4]    two bytes per decision, little-endian: how many KEYS are its own, in their order; none
           for a decision that only asks for the revision
ARGV[4+i]  what the i-th bucket key is charged, 28 bytes per bucket:
             name tag (4 bytes), increment, window and clamp (little-endian doubles, microseconds)

Returns {now, then per decision: allowed, debt_1, ..., debt_n}
  now       the instant of the decisions, in microseconds
  allowed   1 if all was charged, 0 if nothing was; -i if nothing was because the decision's i-th
            key holds what is no bucket, and then the debts mean nothing
  debt_j    microseconds until the decision's bucket j, in the order of ARGV, is full: after charging
            if allowed, as it stands otherwise
Or {now, why, number} if they must be prepared anew, and then nothing was done at all:
  why       2 if the shard is on a newer revision, 3 if it is on another one of the same number, 4 if
            now is outside of ARGV[3]
  number    the shard's

A key holds 12 bytes per bucket: name tag, full_at (little-endian double, exact up to 2^53 us, the
year 2255). A bucket that is full is not there. The shard's revision is spelled as ARGV[2] is.

Clock:  Redis TIME, read once. Callers' clocks are never sent outside tests.
Writes: per decision, after everything of it is read and checked, one SET with an expiry per key that
        changes. A denial changes a key only to lower an instant beyond its clamp. An increment of 0
        peeks. What one decision wrote the next one reads. A shard on an older revision is raised.
]]

local call, pcall, unpack, pack, ceil = redis.call, redis.pcall, struct.unpack, struct.pack, math.ceil

local explicit_now, revision, prepared_for = ARGV[1], ARGV[2], ARGV[3]
local now
if explicit_now == '' then
  local time = call('TIME')
  now = time[1] * 1000000 + time[2]
else
  now = tonumber(explicit_now)
end

local first = 1   -- the first of KEYS that holds buckets
if revision ~= '' then
  first = 2
  local standing = call('GET', KEYS[1])
  if standing ~= revision then
    local ours = tonumber(string.match(revision, '^%d+'))
    local number = not standing and 0 or tonumber(string.match(standing, '^(%d+) %x+$'))
    if not number then
      return redis.error_reply('TIEREDLIMIT ' .. KEYS[1] .. ' holds what is no revision')
    elseif number > ours then
      return {now, 2, number}
    elseif number < ours then
      call('SET', KEYS[1], revision)
    elseif standing then
      return {now, 3, number}
    end
  end
end
if prepared_for ~= '' then
  local since, before = unpack('<dd', prepared_for)
  if now < since or now >= before then
    return {now, 4, 0}
  end
end

local reply = {now}
local given = 5 - first   -- ARGV[given + i] is what KEYS[i] is charged
local last = 1

local function put(key, records, latest)
  if explicit_now == '' then
    -- The instant itself: a time to live would count from when the script began, before `now`.
    call('SET', key, records, 'PXAT', string.format('%.0f', ceil(latest / 1000)))
  else
    -- The server's own clock expires keys: with another one in charge they must not go early.
    local ttl_ms = math.max(ceil((latest - now) / 1000), 3600000)
    call('SET', key, records, 'PX', string.format('%.0f', ttl_ms))
  end
end

local before, after, records = {}, {}, {}   -- by bucket; what stands beyond the count is old

-- Almost every decision: one key, which holds nothing or just the buckets that are charged. Returns
-- false, having written nothing, where it is not so; `decide` then does the same in general.
local function decide_one(key, charges)
  local held = pcall('GET', key)
  if held and (type(held) == 'table' or #held * 7 ~= #charges * 3) then
    return false
  end
  local allowed, spends, latest, count = true, false, now, 0
  for at = 1, #charges, 28 do
    local tag, increment, window, clamp = unpack('<c4ddd', charges, at)
    local full_at = now
    if held then
      local held_tag, held_at = unpack('<c4d', held, count * 12 + 1)
      if held_tag ~= tag or held_at > now + clamp then
        return false
      end
      if held_at > now then
        full_at = held_at
      end
    end
    local candidate = full_at + increment
    if candidate - now > window then
      allowed = false
    end
    if candidate > latest then
      latest = candidate
    end
    spends = spends or increment > 0
    count = count + 1
    before[count], after[count] = full_at - now, candidate - now
    records[count] = pack('<c4d', tag, candidate)
  end
  if allowed and spends then
    put(key, table.concat(records, '', 1, count), latest)
  end
  local debts = allowed and after or before
  reply[last + 1] = allowed and 1 or 0
  for bucket = 1, count do
    reply[last + 1 + bucket] = debts[bucket]
  end
  last = last + 1 + count
  return true
end

-- Returns the server's error, having written nothing, where it refuses to be read.
local function decide(first, keys)
  local stored = {}    -- key -> tag -> full_at, as it stands
  local charged = {}   -- key -> tag -> full_at, after charging
  local changed = {}   -- key -> true where an increment is above 0
  local lowered = {}   -- key -> true where a clamp lowered an instant
  local buckets = {}   -- {key, tag}, in the order of the reply
  local allowed, broken = true, nil   -- broken: which key is no bucket

  for i = first, first + keys - 1 do
    local key, charges = KEYS[i], ARGV[given + i]
    if not stored[key] then
      stored[key], charged[key] = {}, {}
      local held = pcall('GET', key)
      if held and type(held) == 'table' and not string.find(held.err, 'WRONGTYPE', 1, true) then
        return held   -- such as no permission for GET, which no decision of the call has
      elseif held and (type(held) == 'table' or #held % 12 ~= 0) then
        broken = broken or i - first + 1
      elseif held then
        for at = 1, #held, 12 do
          local tag, full_at = unpack('<c4d', held, at)
          if full_at > now then
            stored[key][tag], charged[key][tag] = full_at, full_at
          end
        end
      end
    end
    local stands, spent = stored[key], charged[key]
    for at = 1, #charges, 28 do
      local tag, increment, window, clamp = unpack('<c4ddd', charges, at)
      -- What stands, never what an earlier charge of this decision added: that is not in the
      -- bucket yet.
      if (stands[tag] or now) > now + clamp then
        stands[tag], spent[tag] = now + clamp, now + clamp
        lowered[key] = true
      end
      local candidate = (spent[tag] or now) + increment
      if candidate - now > window then
        allowed = false
      end
      spent[tag] = candidate
      buckets[#buckets + 1] = {key, tag}
      if increment > 0 then
        changed[key] = true
      end
    end
  end

  local final = allowed and charged or stored
  for key in pairs(changed) do
    if not broken and (allowed or lowered[key]) then
      local kept, latest = {}, now
      for tag, full_at in pairs(final[key]) do
        if full_at > now then
          kept[#kept + 1] = pack('<c4d', tag, full_at)
          latest = math.max(latest, full_at)
        end
      end
      put(key, table.concat(kept), latest)
    end
  end

  reply[last + 1] = broken and -broken or allowed and 1 or 0
  for j = 1, #buckets do
    local key, tag = buckets[j][1], buckets[j][2]
    reply[last + 1 + j] = (final[key][tag] or now) - now
  end
  last = last + 1 + #buckets
end

local layout = ARGV[4]
for at = 1, #layout, 2 do
  local keys = unpack('<H', layout, at)
  if keys ~= 1 or not decide_one(KEYS[first], ARGV[given + first]) then
    local refusal = decide(first, keys)
    if refusal then
      return refusal
    end
  end
  first = first + keys
end
return reply
