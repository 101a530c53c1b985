--[[
refund -- give tokens back to the buckets of one account, never beyond full.

KEYS[i]    the key of one subject's buckets; one hash tag
ARGV[i]    what is given back to KEYS[i], 12 bytes per bucket: name tag (4 bytes), microseconds
             (little-endian double)
ARGV[n+1]  now in microseconds, or "" for the server's TIME; n is the number of KEYS

Returns {before_1, after_1, before_2, ...}, in the order of ARGV
  before_j   microseconds until bucket j is full, as it stood
  after_j    the same, after the refund: 0 is full

A key holds what take.lua says. A bucket that is full is not there.

Clock:  Redis TIME. Callers' clocks are never sent outside tests.
Writes: after everything is read and checked, one SET with an expiry, or one DEL, per key that
        changes. Where a key holds what is no bucket, nothing.
]]

local call, unpack, pack, ceil = redis.call, struct.unpack, struct.pack, math.ceil

local explicit_now = ARGV[#KEYS + 1]
local now
if explicit_now == '' then
  local time = call('TIME')
  now = time[1] * 1000000 + time[2]
else
  now = tonumber(explicit_now)
end

local held = {}   -- by key: the instants by tag, in the order in which they stand
for i, key in ipairs(KEYS) do
  local records = call('GET', key) or ''
  if #records % 12 ~= 0 then
    return redis.error_reply('ERR no bucket stands in a key of ' .. string.match(key, '^(.*):'))
  end
  held[i] = {}
  for at = 1, #records, 12 do
    local tag, full_at = unpack('<c4d', records, at)
    held[i][#held[i] + 1] = {tag, math.max(full_at, now)}
  end
end

local reply = {}
for i, key in ipairs(KEYS) do
  local given, changed = ARGV[i], false
  for at = 1, #given, 12 do
    local tag, back = unpack('<c4d', given, at)
    local before, after = 0, 0
    for _, bucket in ipairs(held[i]) do
      if bucket[1] == tag then
        before = bucket[2] - now
        bucket[2] = math.max(bucket[2] - back, now)
        after = bucket[2] - now
        changed = changed or after < before
      end
    end
    reply[#reply + 1], reply[#reply + 2] = before, after
  end
  if changed then
    local records, latest = {}, now
    for _, bucket in ipairs(held[i]) do
      if bucket[2] > now then
        records[#records + 1] = pack('<c4d', bucket[1], bucket[2])
        latest = math.max(latest, bucket[2])
      end
    end
    if #records == 0 then
      call('DEL', key)
    elseif explicit_now ~= '' then
      local ttl_ms = math.max(ceil((latest - now) / 1000), 3600000)
      call('SET', key, table.concat(records), 'PX', string.format('%.0f', ttl_ms))
    else
      local expiry = string.format('%.0f', ceil(latest / 1000))
      call('SET', key, table.concat(records), 'PXAT', expiry)
    end
  end
end
return reply
