-- Everything the index knows of entities.
--
-- KEYS   see common.lua
-- ARGV   for each entity: id
-- Reply  for each entity: {status, score, field, value, field, value, ...} or false
-- Reads  everything, writes nothing

local NAMES = { [PARKED] = 'parked', [SENT] = 'sent', [RUNNING] = 'running', [IDLE] = 'idle', [FAILED] = 'failed' }

local replies = {}
for n = 1, #KEYS - SHARD_KEYS do
  local entity = open(n, ARGV[LIMITS + n])
  replies[n] = false
  if entity.status then
    -- There is no score if the sorted set was evicted.
    local score = redis.call('ZSCORE', entity.status, entity.id) or '0'
    local reply = { NAMES[entity.status], score }
    for name, value in pairs(entity.stored) do
      reply[#reply + 1] = name
      reply[#reply + 1] = value
    end
    replies[n] = reply
  end
end
return replies
