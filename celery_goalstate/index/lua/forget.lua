-- Removes idle records that are past their time.
--
-- KEYS   see common.lua; histories
-- Row    id
-- Reply  whether it was removed
-- Reads  nothing but the status

local function is_past_its_time(entity)
  return tonumber(redis.call('ZSCORE', IDLE, entity.id)) <= now -- +inf: for ever
end

local function forget(entity)
  strike_out(entity, IDLE)
  if entity.status ~= IDLE or not is_past_its_time(entity) then
    return false
  end
  remove(entity)
  return true
end

return each(forget)
