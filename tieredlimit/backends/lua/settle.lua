--[[
settle -- correct the cost of an earlier take, once.

KEYS[1]    the reservation's record, as take.lua writes it
KEYS[2..]  the keys of the buckets that it charged; one hash tag
ARGV[1]    now in microseconds, or "" for the server's TIME
ARGV[2]    22 bytes per bucket, in the order in which they were charged: which of KEYS[2..] (2 bytes,
           little-endian, from 1), name tag (4 bytes), microseconds and clamp (little-endian doubles);
           microseconds below 0 are given back, those above are charged in addition

Returns {settled, debt_1, ..., debt_n}
  settled   1, or 0 where the record is gone: then nothing was written
  debt_i    microseconds until bucket i is full

What is given back never fills a bucket beyond full, and is never more than was charged. What is
charged in addition may leave a bucket below empty, up to its clamp.

Clock:  Redis TIME. Callers' clocks are never sent outside tests.
Writes: after everything is read and checked, one DEL of the record, and one SET with an expiry, or
        one DEL, per key that changes.
]]

local call, unpack, pack, ceil = redis.call, struct.unpack, struct.pack, math.ceil

local explicit_now, corrections = ARGV[1], ARGV[2]
local now
if explicit_now == '' then
  local time = call('TIME')
  now = time[1] * 1000000 + time[2]
else
  now = tonumber(explicit_now)
end

local charged = call('GET', KEYS[1])
if charged and #charged * 22 ~= #corrections * 12 then
  return redis.error_reply('TIEREDLIMIT ' .. KEYS[1] .. ' is of other buckets')
end

local held = {}   -- by key: the instants by tag, in the order in which they stand
for k = 2, #KEYS do
  local records = call('GET', KEYS[k]) or ''
  if #records % 12 ~= 0 then
    local cell = string.match(KEYS[k], '^(.*):')
    return redis.error_reply('TIEREDLIMIT no bucket stands in a key of ' .. cell)
  end
  held[k] = {}
  for at = 1, #records, 12 do
    local tag, full_at = unpack('<c4d', records, at)
    held[k][#held[k] + 1] = {tag, math.max(full_at, now)}
  end
end

local reply, changed = {charged and 1 or 0}, {}
for at = 1, #corrections, 22 do
  local k, tag, more, clamp = unpack('<I2c4dd', corrections, at)
  local bucket
  for _, one in ipairs(held[k + 1]) do
    if one[1] == tag then
      bucket = one
    end
  end
  if not bucket then
    bucket = {tag, now}
    table.insert(held[k + 1], bucket)
  end
  if charged then
    local _, increment = unpack('<c4d', charged, (at - 1) / 22 * 12 + 1)
    local before = bucket[2]
    if more > 0 then
      bucket[2] = math.max(before, math.min(before + more, now + clamp))
    else
      bucket[2] = math.max(before + math.max(more, -increment), now)
    end
    changed[k + 1] = changed[k + 1] or bucket[2] ~= before
  end
  reply[#reply + 1] = bucket[2] - now
end

if charged then
  call('DEL', KEYS[1])
end
for k in pairs(changed) do
  if changed[k] then
    local records, latest = {}, now
    for _, bucket in ipairs(held[k]) do
      if bucket[2] > now then
        records[#records + 1] = pack('<c4d', bucket[1], bucket[2])
        latest = math.max(latest, bucket[2])
      end
    end
    if #records == 0 then
      call('DEL', KEYS[k])
    elseif explicit_now == '' then
      call('SET', KEYS[k], table.concat(records), 'PXAT', string.format('%.0f', ceil(latest / 1000)))
    else
      local ttl_ms = math.max(ceil((latest - now) / 1000), 3600000)
      call('SET', KEYS[k], table.concat(records), 'PX', string.format('%.0f', ttl_ms))
    end
  end
end
return reply
