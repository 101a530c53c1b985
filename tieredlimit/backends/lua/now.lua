--[[
now -- tell the time of the node that has a key.

KEYS[1]    any key; it is not touched

Returns {seconds, microseconds} since 1970, as TIME does, which a Cluster would answer anywhere.

Clock:  Redis TIME.
Writes: nothing.
]]

return redis.call('TIME')
