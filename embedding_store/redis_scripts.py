"""What a Redis store does atomically, in Lua. The keys' parts are named as in `redis_keys.py`; all have one hash tag.

Every script may run twice with the same arguments: the answer to the first try may have been lost. Those that can be
refused return "" when done, else why not.
"""

from __future__ import annotations

_NOW = "local time = redis.call('TIME'); local now = time[1] * 1000 + math.floor(time[2] / 1000)\n"

# KEYS active releases since; ARGV model, expected and wanted history, the release that will be active
SET_HISTORY = (
    _NOW
    + """
local current = redis.call('HGET', KEYS[1], ARGV[1]) or '[]'
if current ~= ARGV[2] and current ~= ARGV[3] then return current end
if ARGV[4] ~= '' and redis.call('HEXISTS', KEYS[2], ARGV[4]) == 0 then return 'unknown' end
if current ~= ARGV[3] then
  local history = cjson.decode(current)
  if #history > 0 then redis.call('HSET', KEYS[3], history[#history], now) end
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
return ''
"""
)

# KEYS writing lease removed since releases; ARGV content, token, ms of lease, record, record in a fresh namespace,
# release, the token of a holder who is known to be dead, or ''. Returns record, or the other holder and the ms that are
# left to it, or nothing where the release is complete: a record of writing would give its pages to gc.
BEGIN = (
    _NOW
    + """
if redis.call('HEXISTS', KEYS[5], ARGV[6]) == 1 then return {} end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[2] and holder ~= ARGV[7] then return {holder, redis.call('PTTL', KEYS[2])} end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
local record = redis.call('HGET', KEYS[1], ARGV[1])
if not record then
  record = redis.call('HEXISTS', KEYS[3], ARGV[1]) == 1 and ARGV[5] or ARGV[4]
  redis.call('HSET', KEYS[1], ARGV[1], record)
end
redis.call('HSET', KEYS[4], ARGV[1], now)
return {record}
"""
)

# KEYS writing lease since; ARGV content, token, ms of lease, record
RENEW = (
    _NOW
    + """
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[2] then return holder end
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[4] then return 'removed' end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('HSET', KEYS[3], ARGV[1], now)
return ''
"""
)

# KEYS lease; ARGV token
END = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"

# KEYS writing lease since releases removed verified; ARGV content, token, release, record
COMMIT = (
    _NOW
    + """
local there = redis.call('HGET', KEYS[4], ARGV[3])
if there and there ~= ARGV[4] then return 'conflict' end
local removed = redis.call('HGET', KEYS[5], ARGV[3])
if removed and removed ~= ARGV[1] then return 'conflict' end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[2] then return there and '' or holder end
local record = redis.call('HGET', KEYS[1], ARGV[1])
if record ~= ARGV[4] then return there and '' or 'removed' end
if not there then
  redis.call('HSET', KEYS[4], ARGV[3], ARGV[4])
  redis.call('HSET', KEYS[3], ARGV[3], now)
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('DEL', KEYS[2], KEYS[6])
return ''
"""
)

# KEYS releases active pins removing removed since; ARGV release, namespace, content
TAKE_OUT_RELEASE = (
    _NOW
    + """
local record = redis.call('HGET', KEYS[1], ARGV[1])
if not record or cjson.decode(record).namespace ~= ARGV[2] then
  return redis.call('HEXISTS', KEYS[4], ARGV[2]) == 1 and '' or 'is not there any more'
end
for _, history in ipairs(redis.call('HVALS', KEYS[2])) do
  local releases = cjson.decode(history)
  if releases[#releases] == ARGV[1] then return 'has become active' end
end
local pins = redis.call('HGETALL', KEYS[3])
for i = 1, #pins, 2 do
  local pin = cjson.decode(pins[i + 1])
  for _, release in ipairs(pin['until'] > now and pin.releases or {}) do
    if release == ARGV[1] then return 'has been pinned by ' .. pins[i] end
  end
  if pin['until'] < now - 86400000 then redis.call('HDEL', KEYS[3], pins[i]) end
end
redis.call('HSET', KEYS[4], ARGV[2], record)
redis.call('HSET', KEYS[5], ARGV[1], ARGV[3], ARGV[3], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[6], ARGV[1])
return ''
"""
)

# KEYS writing lease removing removed since releases; ARGV content, namespace, release
TAKE_OUT_UNFINISHED = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 'is being published' end
local complete = redis.call('HGET', KEYS[6], ARGV[3])
if complete and cjson.decode(complete).namespace == ARGV[2] then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[5], ARGV[1])
  return 'is complete meanwhile'
end
local record = redis.call('HGET', KEYS[1], ARGV[1])
if not record or cjson.decode(record).namespace ~= ARGV[2] then
  return redis.call('HEXISTS', KEYS[3], ARGV[2]) == 1 and '' or 'is not there any more'
end
redis.call('HSET', KEYS[3], ARGV[2], record)
redis.call('HSET', KEYS[4], ARGV[1], ARGV[3])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[5], ARGV[1])
return ''
"""
