-- Takes over entities as another index describes them.
--
-- KEYS   see common.lua
-- Row    id · 'parked', 'idle' or 'failed' · score · fields, as strings
-- Reply  whether it was not known here before
-- Reads  nothing but the status. Writes deadline, floor, task_id, failures, looks, error, converged, finished, alone

local STATUSES = { parked = PARKED, idle = IDLE, failed = FAILED }

local function adopt(entity, status, score, fields)
  if entity.status then
    return false
  end
  for name, value in pairs(fields) do
    entity.fields[name] = NUMBERS[name] and number(value, NUMBER_DIGITS) or value
  end
  save(entity, STATUSES[status], score)
  return true
end

return each(adopt)
