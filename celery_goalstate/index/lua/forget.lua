-- Removes idle records that are past their time.
--
-- KEYS   see common.lua
-- Row    id
-- Reply  whether it was removed
-- Reads  nothing but the status

local function forget(entity)
  strike_out(entity, IDLE)
  if entity.status ~= IDLE or tonumber(redis.call('ZSCORE', IDLE, entity.id)) > now then -- +inf: for ever
    return false
  end
  remove(entity)
  return true
end

return each(forget)
