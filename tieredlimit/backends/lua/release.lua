--[[
release -- free slots, of any number of leases.

KEYS[i]   a sorted set of slots, as take.lua has them; one hash tag
ARGV[i]   whose slot of KEYS[i]: the holder's id (16 bytes) and the lease in microseconds
          (little-endian double)

Returns {freed_1, ..., freed_n}
  freed_i   1, or 0 where that slot was free already

Writes: one ZREM per key.
]]

local freed = {}
for i, key in ipairs(KEYS) do
  freed[i] = redis.call('ZREM', key, ARGV[i])
end
return freed
