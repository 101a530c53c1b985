--[[
raise -- tell a shard which revision is the head; it never goes back.

KEYS[1]    the shard's revision: "<number> <digest>"; absent = nothing was ever published
ARGV[1]    the head's number, from 1 to 2^53 - 1
ARGV[2]    the head's digest

Returns the shard's revision as it stands now: the head, or one with a higher number.

Clock:  none.
Writes: one SET, where the shard holds a lower number, or the same one with another digest.
]]

local shard = KEYS[1]
local number, digest = ARGV[1], ARGV[2]
local ours = number .. ' ' .. digest

local held = redis.call('GET', shard)
if held then
  local held_number = tonumber(string.match(held, '^([1-9]%d*) %x+$') or '')
  if not held_number or held_number > 9007199254740991 then
    return redis.error_reply('ERR no revision stands in ' .. shard)
  end
  if held_number > tonumber(number) or held == ours then
    return held
  end
end

redis.call('SET', shard, ours)
return ours
