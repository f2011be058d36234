-- Everything the index knows of entities.
--
-- KEYS   see common.lua
-- Row    id
-- Reply  {status, score, fields, note} or false
-- Reads  everything. Writes nothing, but for a record that is no hash

local NAMES = { [PARKED] = 'parked', [SENT] = 'sent', [RUNNING] = 'running', [IDLE] = 'idle', [FAILED] = 'failed' }

-- There is no score if the sorted set was evicted. That of a running one is a count; the time is what a caller wants.
local function score(entity)
  local text = redis.call('ZSCORE', entity.status, entity.id)
  if entity.status == RUNNING then
    return digits(now + math.max(0, (number(text, NUMBER_DIGITS) or 0) - swept()))
  end
  return (number(text, NUMBER_DIGITS) or entity.status == IDLE and text == 'inf') and text or '0'
end

local function describe(entity)
  if not entity.status then
    return false
  end
  local fields = {}
  for name, value in pairs(entity.fields) do
    fields[name] = NUMBERS[name] and digits(value) or value
  end
  return { status = NAMES[entity.status], score = score(entity), fields = fields, note = note_of(entity) }
end

return each(describe)
