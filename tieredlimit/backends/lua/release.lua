--[[
release -- free slots, of any number of leases.

KEYS[i]   a sorted set of slots, as take.lua has them; one hash tag
ARGV[i]   whose slot of KEYS[i]: the holder's id (16 bytes), the lease in microseconds (little-endian
          double), then now in microseconds, or nothing for the server's TIME

Returns {freed_1, ..., freed_n}
  freed_i   1 if that slot was held, 0 if it was free already; -1 if KEYS[i] holds something else: that
            is no reason to keep other leases

Clock:  Redis TIME. Callers' clocks are never sent outside tests.
Writes: after everything is read and checked, one ZREM per key.
]]

local call, pcall = redis.call, redis.pcall

local time = call('TIME')
local server_now = time[1] * 1000000 + time[2]

local freed = {}
for i, key in ipairs(KEYS) do
  local free_at = pcall('ZSCORE', key, string.sub(ARGV[i], 1, 24))
  if type(free_at) == 'table' then
    if not string.find(free_at.err, 'WRONGTYPE', 1, true) then
      return free_at
    end
    freed[i] = -1
  else
    local now = tonumber(string.sub(ARGV[i], 25)) or server_now
    freed[i] = free_at and tonumber(free_at) > now and 1 or 0
  end
end
for i, key in ipairs(KEYS) do
  if freed[i] >= 0 then
    call('ZREM', key, string.sub(ARGV[i], 1, 24))
  end
end
return freed
