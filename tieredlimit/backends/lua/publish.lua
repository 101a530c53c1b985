--[[
publish -- make a revision the head, if the head still is the one that its publisher saw.

KEYS[1]    the head: "<number> <digest>"; absent = nothing was ever published
KEYS[2]    the revision's document
KEYS[3]    the numbers of the documents kept, a sorted set
ARGV[1]    the head that the publisher saw, "" = none; "*" = any with a lower number
ARGV[2]    the revision's number, from 1 to 2^53 - 1
ARGV[3]    the revision's digest
ARGV[4]    the revision's document, JSON

Returns the head as it stands now, "" = none: the revision's own means that it is published, by this
call or by an earlier one.

Clock:  none.
Writes: after the head is read and compared; a head that already is the revision gets a document that
        was lost back. A head never gets a lower number, nor the same number and another digest.
]]

local head, document, numbers = KEYS[1], KEYS[2], KEYS[3]
local seen, number, digest, content = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local ours = number .. ' ' .. digest

local held = redis.call('GET', head) or ''
local held_number = 0
if held ~= '' then
  held_number = tonumber(string.match(held, '^([1-9]%d*) %x+$') or '')
  if not held_number or held_number > 9007199254740991 then
    return redis.error_reply('ERR no revision stands in ' .. head)
  end
end

if held == ours then
  redis.call('ZADD', numbers, number, number)
  redis.call('SET', document, content, 'NX')
  return held
end
if tonumber(number) <= held_number or (seen ~= '*' and seen ~= held) then
  return held
end

-- First what may be refused: under a key of another type nothing is written.
redis.call('ZADD', numbers, number, number)
-- Not NX: what stands there was lost together with its head, and nobody follows it.
redis.call('SET', document, content)
redis.call('SET', head, ours)
return ours
