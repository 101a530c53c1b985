--[[
take -- charge every bucket of a decision, or none of them; for several decisions, one by one.

KEYS[1]    the shard's revision, if ARGV[2] is not empty; then only the next ones hold buckets
KEYS[i]    the key of one subject's buckets, which may stand there several times; then those of slots;
           then the one of a reservation; one hash tag
ARGV[1]    now in microseconds, or "" for the server's TIME
ARGV[2]    "NUMBER DIGEST": the revision under which these decisions were prepared; "" compares none
ARGV[3]    two little-endian doubles: the decisions were prepared for instants from the first one on
           and before the second one; "" for all
ARGV[4]    two bytes per decision, little-endian: how many KEYS are its own, in their order; none
           for a decision that only asks for the revision
ARGV[4+i]  what is asked of the i-th of them; its length says which kind it is:
             28 bytes per bucket: name tag (4 bytes), then as little-endian doubles in microseconds
               the increment, the reach (how far from full it may be then) and the clamp
             32 bytes, a slot: its holder's id (16 bytes), how many there are, the lease in
               microseconds (little-endian doubles)
             16 bytes, the same without an id: only counts
             8 bytes, a reservation: microseconds for which it is kept (little-endian double)

Returns {now, then per decision: allowed, debt_1, ..., debt_n, held_1, ..., held_m}
  now       the instant of the decisions, in microseconds
  allowed   1 if all was charged, 0 if nothing was; -i if nothing was because the decision's i-th
            key holds something else, and then the other numbers mean nothing
  debt_j    microseconds until the decision's bucket j, in the order of ARGV, is full: after charging
            if allowed, as it stands otherwise
  held_k    how many slots others hold under the decision's slot key k
Or {now, why, number} if they must be prepared anew, and then nothing was done at all:
  why       2 if the shard is on a newer revision, 3 if it is on another one of the same number, 4 if
            now is outside of ARGV[3]
  number    the shard's

A key holds 12 bytes per bucket: name tag, full_at (little-endian double, exact up to 2^53 us, the
year 2255). A bucket that is full is not there. The shard's revision is spelled as ARGV[2] is. Slots
are a sorted set: holder's id and lease (little-endian double), by the instant at which it is free. A
reservation is a string: per bucket that was charged the name tag and the increment.

Clock:  Redis TIME, read once. Callers' clocks are never sent outside tests.
Writes: per decision, after everything of it is read and checked, one SET with an expiry per key that
        changes. A denial changes a key only to lower an instant beyond its clamp. An increment of 0
        peeks. What one decision wrote the next one reads. A shard on an older revision is raised.
        Of slots that are free again at most 16 per key are dropped, and only where all seem taken; what
        is held beyond its own lease and the one asked for is lowered to its own, 32 per key, even by a
        denial.
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

local LONGEST_LEASE_MS = '86400000'
local MOST_DROPPED, MOST_LOWERED = 16, 32

-- Returns how many slots are held, or nil and the server's error where it refuses to say; and then
-- how many there are that are free again. These count as held as long as there are enough.
local function slots_held(key, limit, lease)
  local all = pcall('ZCARD', key)
  if type(all) == 'table' then
    return nil, all
  elseif all < limit then
    return all, 0
  end
  local latest = call('ZRANGE', key, -1, -1, 'WITHSCORES')[2]
  if tonumber(latest) > now + lease then
    -- The clock was set back, or the lease was longer: each is held for its own, counted from now.
    local beyond = call('ZREVRANGEBYSCORE', key, '+inf', string.format('(%.0f', now + lease), 'WITHSCORES',
      'LIMIT', 0, MOST_LOWERED)
    for j = 1, #beyond, 2 do
      local until_at = now + unpack('<d', beyond[j], 17)
      if tonumber(beyond[j + 1]) > until_at then
        call('ZADD', key, string.format('%.0f', until_at), beyond[j])
      end
    end
  end
  local held = call('ZCOUNT', key, string.format('(%.0f', now), '+inf')
  return held, all - held
end

local until_of = {}   -- by lease: the instant at which it ends, and the lease, as they are stored

local function take_slot(key, asked, free)
  local id, _, lease = unpack('<c16dd', asked)
  local stored = until_of[lease]
  if not stored then
    stored = {string.format('%.0f', now + lease), pack('<d', lease)}
    until_of[lease] = stored
  end
  if free > 0 then
    call('ZREMRANGEBYRANK', key, 0, math.min(free, MOST_DROPPED) - 1)
  end
  call('ZADD', key, stored[1], id .. stored[2])
  call('PEXPIRE', key, LONGEST_LEASE_MS)
end

-- Notes what a decision has charged.
local function reserve(key, asked, first, keys)
  local charged = {}
  for i = first, first + keys - 1 do
    local charges = ARGV[given + i]
    if #charges % 28 == 0 then
      for at = 1, #charges, 28 do
        charged[#charged + 1] = string.sub(charges, at, at + 11)
      end
    end
  end
  local ttl_ms = ceil(unpack('<d', asked) / 1000)
  if explicit_now ~= '' then
    ttl_ms = math.max(ttl_ms, 3600000)
  end
  call('SET', key, table.concat(charged), 'PX', string.format('%.0f', ttl_ms))
end

local before, after, records = {}, {}, {}   -- by bucket; what stands beyond the count is old

-- Almost every decision: one key, which holds nothing or just the buckets that are charged. Returns
-- false, having written nothing, where it is not so; `decide` then does the same in general.
local function decide_one(key, charges)
  local held = pcall('GET', key)
  if #charges % 28 ~= 0 or held and (type(held) == 'table' or #held * 7 ~= #charges * 3) then
    return false
  end
  local allowed, spends, latest, count = true, false, now, 0
  for at = 1, #charges, 28 do
    local tag, increment, reach, clamp = unpack('<c4ddd', charges, at)
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
    if candidate - now > reach then
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

-- What decisions of a call share, such as a pool or an organisation's only quota: by key the tag, full_at
-- and whether it was charged. It is written once, at the end: a call that fails admits nobody.
local shared = {}

local function write_shared()
  for key, bucket in pairs(shared) do
    if bucket[3] then
      put(key, pack('<c4d', bucket[1], bucket[2]), bucket[2])
    end
  end
  shared = {}
end

-- Returns a bucket that stands alone under its key, or nil where something else stands there.
local function shared_bucket(key, tag)
  local bucket = shared[key]
  if not bucket then
    local held = pcall('GET', key)
    if not held then
      bucket = {tag, 0, false}
    elseif type(held) == 'table' or #held ~= 12 then
      return nil
    else
      local held_tag, held_at = unpack('<c4d', held)
      bucket = {held_tag, held_at, false}
    end
    shared[key] = bucket
  end
  return bucket[1] == tag and bucket or nil
end

-- Most others: several keys, the first of which hold nothing or just the buckets that are charged;
-- shared buckets; and slots. Returns false, having charged nothing, where it is not so.
local latest_of, last_of = {}, {}   -- by key: what to write it with, or false; its last number
local seen_by = {}   -- by key: the latest decision that has charged it
local function decide_few(first, keys)
  local allowed, count = true, 0
  for i = first, first + keys - 1 do
    local key, asked = KEYS[i], ARGV[given + i]
    local size = #asked
    if size == 28 and i > first then
      local tag, increment, reach, clamp = unpack('<c4ddd', asked)
      local bucket = shared_bucket(key, tag)
      if not bucket or seen_by[key] == first or bucket[2] > now + clamp then
        return false
      end
      seen_by[key] = first
      local full_at = bucket[2] > now and bucket[2] or now
      local candidate = full_at + increment
      if candidate - now > reach then
        allowed = false
      end
      count = count + 1
      before[count], after[count] = full_at - now, candidate - now
      latest_of[i], last_of[i] = increment > 0 and bucket, count
    elseif size % 28 == 0 then
      local held = pcall('GET', key)
      if seen_by[key] == first or shared[key] or held and (type(held) == 'table' or #held * 7 ~= size * 3) then
        return false
      end
      seen_by[key] = first
      local latest, spends, start = now, false, count
      for at = 1, size, 28 do
        local tag, increment, reach, clamp = unpack('<c4ddd', asked, at)
        local full_at = now
        if held then
          local held_tag, held_at = unpack('<c4d', held, (count - start) * 12 + 1)
          if held_tag ~= tag or held_at > now + clamp then
            return false
          end
          if held_at > now then
            full_at = held_at
          end
        end
        local candidate = full_at + increment
        if candidate - now > reach then
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
      latest_of[i], last_of[i] = spends and latest, count
    elseif size >= 16 then
      local limit, lease = unpack('<dd', asked, size - 15)
      local held, free = slots_held(key, limit, lease)
      if not held then
        return false
      elseif held >= limit then
        allowed = false
      end
      count = count + 1
      before[count], after[count], latest_of[i], last_of[i] = held, held, free, count
    end
  end
  if allowed then
    local start = 1
    for i = first, first + keys - 1 do
      local key, asked, latest = KEYS[i], ARGV[given + i], latest_of[i]
      local size = #asked
      if size == 28 and i > first then
        if latest then
          latest[2], latest[3] = now + after[last_of[i]], true
        end
      elseif size % 28 == 0 then
        if latest then
          put(key, table.concat(records, '', start, last_of[i]), latest)
        end
      elseif size == 32 then
        take_slot(key, asked, latest)
      elseif size == 8 then
        reserve(key, asked, first, keys)
      end
      start = size == 8 and start or last_of[i] + 1
    end
  end
  local debts = allowed and after or before
  reply[last + 1] = allowed and 1 or 0
  for j = 1, count do
    reply[last + 1 + j] = debts[j]
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
  local slots = {}     -- how many are held, and how many are free again, by the number of the key
  local allowed, broken = true, nil   -- broken: which key holds something else

  for i = first, first + keys - 1 do
    local key, charges = KEYS[i], ARGV[given + i]
    local size = #charges
    if size == 16 or size == 32 then
      local limit, lease = unpack('<dd', charges, size - 15)
      local held, free = slots_held(key, limit, lease)
      if not held and not string.find(free.err, 'WRONGTYPE', 1, true) then
        return free
      elseif not held then
        broken = broken or i - first + 1
      elseif held >= limit then
        allowed = false
      end
      slots[i] = {held or 0, free}
    elseif size ~= 8 and not stored[key] then
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
    for at = 1, size % 28 == 0 and size or 0, 28 do
      local tag, increment, reach, clamp = unpack('<c4ddd', charges, at)
      -- What stands, never what an earlier charge of this decision added: that is not in the
      -- bucket yet.
      if (stands[tag] or now) > now + clamp then
        stands[tag], spent[tag] = now + clamp, now + clamp
        lowered[key] = true
      end
      local candidate = (spent[tag] or now) + increment
      if candidate - now > reach then
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
  for i = first, first + keys - 1 do
    local asked = ARGV[given + i]
    if slots[i] then
      last = last + 1
      reply[last] = slots[i][1]
    end
    if allowed and not broken and #asked == 32 then
      take_slot(KEYS[i], asked, slots[i][2])
    elseif allowed and not broken and #asked == 8 then
      reserve(KEYS[i], asked, first, keys)
    end
  end
end

local layout = ARGV[4]
for at = 1, #layout, 2 do
  local keys = unpack('<H', layout, at)
  local quick
  if keys ~= 1 then
    quick = decide_few(first, keys)
  elseif not shared[KEYS[first]] then
    quick = decide_one(KEYS[first], ARGV[given + first])
  end
  if not quick then
    write_shared()
    local refusal = decide(first, keys)
    if refusal then
      return refusal
    end
  end
  first = first + keys
end
write_shared()
return reply
