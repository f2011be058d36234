-- Everything the index knows of entities.
--
-- KEYS   see common.lua
-- Row    id
-- Reply  {status, score, fields} or false
-- Reads  everything, writes nothing

local NAMES = { [PARKED] = 'parked', [SENT] = 'sent', [RUNNING] = 'running', [IDLE] = 'idle', [FAILED] = 'failed' }

local function describe(entity)
  local status, said = entity.status, {}
  for name, value in pairs(entity.fields) do
    said[name] = NUMBERS[name] and digits(value) or value
  end
  -- There is no score if the sorted set was evicted.
  return status and { NAMES[status], redis.call('ZSCORE', status, entity.id) or '0', said } or false
end

return each(describe)
