--[[
take -- charge every bucket, or none of them.

KEYS[i]    the key of one subject's buckets; one hash tag; the same key may stand there twice
ARGV[1]    now in microseconds, or "" for the server's TIME
ARGV[1+i]  what KEYS[i] is charged, 28 bytes per bucket:
             name tag (4 bytes), increment, window and clamp (little-endian doubles, microseconds)

Returns {allowed, now, debt_1, ..., debt_n}
  allowed   1 if all was charged, 0 if nothing was
  now       the instant of the decision, in microseconds
  debt_j    microseconds until bucket j, in the order of ARGV, is full: after charging if allowed,
            as it stands otherwise

A key holds 12 bytes per bucket: name tag, full_at (little-endian double, exact up to 2^53 us, the
year 2255). A bucket that is full is not there.

Clock:  Redis TIME. Callers' clocks are never sent outside tests.
Writes: after everything is read and checked, one SET with an expiry per key that changes. A denial
        changes a key only to lower an instant beyond its clamp. An increment of 0 peeks.
]]

local explicit_now = ARGV[1]
local now
if explicit_now == '' then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
else
  now = tonumber(explicit_now)
end

local stored = {}    -- key -> tag -> full_at, as it stands
local charged = {}   -- key -> tag -> full_at, after charging
local changed = {}   -- key -> true where an increment is above 0
local lowered = {}   -- key -> true where a clamp lowered an instant
local buckets = {}   -- {key, tag}, in the order of the reply
local allowed = true

for i = 1, #KEYS do
  local key, charges = KEYS[i], ARGV[1 + i]
  local before, after = stored[key], charged[key]
  if not before then
    before, after = {}, {}
    stored[key], charged[key] = before, after
    local held = redis.call('GET', key)
    if held then
      for at = 1, #held, 12 do
        local tag, full_at = struct.unpack('<c4d', held, at)
        if full_at > now then
          before[tag], after[tag] = full_at, full_at
        end
      end
    end
  end
  for at = 1, #charges, 28 do
    local tag, increment, window, clamp = struct.unpack('<c4ddd', charges, at)
    -- What stands, never what an earlier charge of this call added: that is not yet in the bucket.
    if (before[tag] or now) > now + clamp then
      before[tag], after[tag] = now + clamp, now + clamp
      lowered[key] = true
    end
    local candidate = (after[tag] or now) + increment
    if candidate - now > window then
      allowed = false
    end
    after[tag] = candidate
    buckets[#buckets + 1] = {key, tag}
    if increment > 0 then
      changed[key] = true
    end
  end
end

local final = allowed and charged or stored
local writes = {}
for key in pairs(changed) do
  if allowed or lowered[key] then
    writes[#writes + 1] = key
  end
end

for _, key in ipairs(writes) do
  local records, latest = {}, now
  for tag, full_at in pairs(final[key]) do
    if full_at > now then
      records[#records + 1] = struct.pack('<c4d', tag, full_at)
      latest = math.max(latest, full_at)
    end
  end
  local records_string = table.concat(records)
  if explicit_now == '' then
    -- The instant itself: a time to live would count from when the script began, before `now`.
    redis.call('SET', key, records_string, 'PXAT', string.format('%.0f', math.ceil(latest / 1000)))
  else
    -- The server's own clock expires keys: with another one in charge they must not go early.
    local ttl_ms = math.max(math.ceil((latest - now) / 1000), 3600000)
    redis.call('SET', key, records_string, 'PX', string.format('%.0f', ttl_ms))
  end
end

local reply = {allowed and 1 or 0, now}
for j = 1, #buckets do
  local key, tag = buckets[j][1], buckets[j][2]
  reply[2 + j] = (final[key][tag] or now) - now
end
return reply
