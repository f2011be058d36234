-- Forgets how the kind is kept, if nothing of it is kept in this shard: no entity, no pause.
--
-- KEYS   see common.lua (no records)
-- Reply  whether it is forgotten

-- So long the last token outlives the kind, for those of a next life to be greater though the clock be set back.
local MILLISECONDS_OF_TOKEN = 3600000

local function is_empty()
  return redis.call('EXISTS', PARKED, SENT, RUNNING, IDLE, FAILED, PAUSED, ALL_DELETED) == 0
end

local function forget_kind()
  if not is_empty() then
    return false
  end
  redis.call('DEL', FORM, CLAIMED, SWEEPER, METRICS)
  if shard.token then
    redis.call('SET', TOKEN, shard.token, 'PX', MILLISECONDS_OF_TOKEN)
  end
  return true
end

return cjson.encode(forget_kind())
