--[[
beat -- note that a worker lives, and forget those that have fallen silent.

KEYS[1]    when each worker was heard, a sorted set: microseconds by id
KEYS[2]    the latest heartbeat of each, a hash: JSON by id
ARGV[1]    the worker's id
ARGV[2]    its heartbeat
ARGV[3]    microseconds of silence after which a worker is forgotten
ARGV[4]    the most workers kept

Returns 1, or 0 where there is no room for one more: then it is not noted.

Clock:  Redis TIME.
Writes: the worker's own entry in both keys; a hundred of the silent ones at most; an expiry on both
        keys, twice the silence from now.
]]

local heard, beats = KEYS[1], KEYS[2]
local id, beat, silence, most = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
-- Also from the future: that is what a clock that was set back leaves behind.
local past, future = string.format('(%.0f', now - silence), string.format('(%.0f', now + silence)
local silent = redis.call('ZRANGEBYSCORE', heard, '-inf', past, 'LIMIT', 0, 50)
for _, other in ipairs(redis.call('ZRANGEBYSCORE', heard, future, '+inf', 'LIMIT', 0, 50)) do
  silent[#silent + 1] = other
end
local known = redis.call('ZSCORE', heard, id)
local room = known or redis.call('ZCARD', heard) - #silent < most
-- Only to be refused before anything is written, if it is to be.
redis.call('HEXISTS', beats, id)

if #silent > 0 then
  redis.call('ZREM', heard, unpack(silent))
  redis.call('HDEL', beats, unpack(silent))
end
if room then
  redis.call('ZADD', heard, string.format('%.0f', now), id)
  redis.call('HSET', beats, id, beat)
end
local ttl_ms = string.format('%.0f', silence / 500)
redis.call('PEXPIRE', heard, ttl_ms)
redis.call('PEXPIRE', beats, ttl_ms)
return room and 1 or 0
