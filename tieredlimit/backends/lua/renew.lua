--[[
renew -- hold the slots of a lease for its whole time again, if all of them are still held.

KEYS[i]     a sorted set of slots, as take.lua has them; one hash tag
ARGV[1]     now in microseconds, or "" for the server's TIME
ARGV[2]     the holder's id (16 bytes)
ARGV[2+i]   the lease of the slot under KEYS[i], in microseconds (little-endian double)

Returns {renewed}
  renewed   1, or 0 where a slot is not held any more: then nothing was written

Clock:  Redis TIME. Callers' clocks are never sent outside tests.
Writes: after everything is read and checked, one ZADD and one PEXPIRE per key.
]]

local call, unpack = redis.call, struct.unpack
local LONGEST_LEASE_MS = '86400000'

local now
if ARGV[1] == '' then
  local time = call('TIME')
  now = time[1] * 1000000 + time[2]
else
  now = tonumber(ARGV[1])
end

local id = ARGV[2]
for i, key in ipairs(KEYS) do
  local free_at = call('ZSCORE', key, id .. ARGV[2 + i])
  if not free_at or tonumber(free_at) <= now then
    return {0}
  end
end
for i, key in ipairs(KEYS) do
  local lease = unpack('<d', ARGV[2 + i])
  call('ZADD', key, 'XX', string.format('%.0f', now + lease), id .. ARGV[2 + i])
  call('PEXPIRE', key, LONGEST_LEASE_MS)
end
return {1}
