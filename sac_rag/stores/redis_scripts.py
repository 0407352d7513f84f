"""What RedisStore changes on the server, each script in one step to all others.

The first argument of each is the store's prefix. `redis.py` says what the names stand for.
"""

from __future__ import annotations

# Reasons outlast an entry by this long.
_REASON_S = 30 * 24 * 3600

_DEFINE = f"""
local prefix = ARGV[1]
local function name(kind, rest) return prefix .. kind .. ':' .. rest end
local function tombstone(key) return name('t', redis.sha1hex(key)) end
local function index(key, field, value, command)
  if string.sub(field, 1, 2) == 'd:' then
    redis.call(command, name('k', string.sub(field, 3)), key)
  elseif field == 'text_id' then
    redis.call(command, name('x', value), key)
  end
end
local function drop(key, reason)
  local fields = redis.call('HGETALL', name('m', key))
  for i = 1, #fields, 2 do index(key, fields[i], fields[i + 1], 'SREM') end
  redis.call('DEL', name('m', key))
  if reason ~= '' then redis.call('SET', tombstone(key), reason, 'EX', {_REASON_S}) end
  return redis.call('UNLINK', name('e', key))
end
"""

# key, bytes or "", whether they replace an entry with as many KV entries, time to live in ms or 0,
# tokens, KV entries, codec, text id or "", fingerprint or "", documents. Returns 0 if nothing is
# there and there are no bytes.
ADD = (
    _DEFINE
    + """
local key, data, replaces, ttl = ARGV[2], ARGV[3], ARGV[4] == '1', tonumber(ARGV[5])
local e, m = name('e', key), name('m', key)
local is_there = redis.call('EXISTS', e) == 1 and redis.call('HGET', m, 'codec') == ARGV[8]
  and tonumber(redis.call('HGET', m, 'entries') or 0) >= tonumber(ARGV[7])
if replaces or not is_there then
  if data == '' then return 0 end
  local expires = ''
  if ttl > 0 then
    local time = redis.call('TIME')
    expires = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) + ttl)
    redis.call('SET', e, data, 'PX', ttl)
  else
    redis.call('SET', e, data)
  end
  redis.call('HSET', m, 'tokens', ARGV[6], 'entries', ARGV[7], 'codec', ARGV[8],
    'expires', expires)
  redis.call('DEL', tombstone(key))
  if ARGV[10] ~= '' then redis.call('HSET', m, 'fingerprint', ARGV[10]) end
end
if ARGV[9] ~= '' then
  redis.call('HSETNX', m, 'text_id', ARGV[9])
  redis.call('SADD', name('x', redis.call('HGET', m, 'text_id')), key)
end
if ARGV[10] ~= '' then redis.call('HSETNX', m, 'fingerprint', ARGV[10]) end
for i = 11, #ARGV do
  redis.call('HSET', m, 'd:' .. ARGV[i], '')
  redis.call('SADD', name('k', ARGV[i]), key)
end
return 1
"""
)

# key, reason or "", SHA-1 of the first bytes or "", how many bytes these are. Returns 0 if there is
# no such entry.
DROP = (
    _DEFINE
    + """
local e = name('e', ARGV[2])
if ARGV[4] ~= ''
  and redis.sha1hex(redis.call('GETRANGE', e, 0, ARGV[5] - 1)) ~= ARGV[4] then return 0 end
return drop(ARGV[2], ARGV[3])
"""
)

# document, keys that stay; so do the same texts under other fingerprints. Returns the number of
# entries deleted.
DISOWN = (
    _DEFINE
    + """
local document, keep, deleted = ARGV[2], {}, 0
for i = 3, #ARGV do
  keep[ARGV[i]] = true
  local text = redis.call('HGET', name('m', ARGV[i]), 'text_id')
  if text then
    for _, key in ipairs(redis.call('SMEMBERS', name('x', text))) do keep[key] = true end
  end
end
for _, key in ipairs(redis.call('SMEMBERS', name('k', document))) do
  if not keep[key] then
    redis.call('HDEL', name('m', key), 'd:' .. document)
    redis.call('SREM', name('k', document), key)
    local has_others = false
    for _, field in ipairs(redis.call('HKEYS', name('m', key))) do
      has_others = has_others or string.sub(field, 1, 2) == 'd:'
    end
    if not has_others then deleted = deleted + drop(key, 'forgotten') end
  end
end
return deleted
"""
)

# key. Makes the sets of a record again that the server has evicted; deletes an entry without one.
REINDEX = (
    _DEFINE
    + """
local fields = redis.call('HGETALL', name('m', ARGV[2]))
for i = 1, #fields, 2 do index(ARGV[2], fields[i], fields[i + 1], 'SADD') end
if #fields == 0 then redis.call('UNLINK', name('e', ARGV[2])) end
return #fields
"""
)

# key, text id or "", fingerprint or "". Returns the reason, whether this was the first to notice
# it, and the other fingerprints that the text is stored under.
WHY = (
    _DEFINE
    + """
local key, others = ARGV[2], {}
if redis.call('EXISTS', name('e', key)) == 1 then return {false, 0, others} end
local expires = redis.call('HGET', name('m', key), 'expires')
if expires then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local reason = 'evicted'
  if expires ~= '' and now >= tonumber(expires) then reason = 'expired' end
  drop(key, reason)
  return {reason, 1, others}
end
local reason = redis.call('GET', tombstone(key))
if not reason and ARGV[3] ~= '' then
  for _, other in ipairs(redis.call('SMEMBERS', name('x', ARGV[3]))) do
    local fingerprint = redis.call('HGET', name('m', other), 'fingerprint')
    if fingerprint and fingerprint ~= ARGV[4]
      and redis.call('EXISTS', name('e', other)) == 1 then
      others[#others + 1] = fingerprint
    end
  end
end
return {reason, 0, others}
"""
)
