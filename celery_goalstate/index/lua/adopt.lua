-- Takes over entities as another index describes them.
--
-- KEYS   see common.lua
-- Row    id · status: 'parked', 'idle' or 'failed' · score · fields, as strings · note
-- Reply  whether it was not known here before; an error if the kind is not kept (any more) as the caller believes
-- Reads  nothing but the status. Writes deadline, floor, task_id, failures, rounds, error, converged, finished, alone,
--        noted

local STATUSES = { parked = PARKED, idle = IDLE, failed = FAILED }

local function is_known(entity)
  return entity.status ~= nil
end

local function adopt(entity, record)
  if is_known(entity) then
    return false
  end
  for name, value in pairs(record.fields) do
    entity.fields[name] = NUMBERS[name] and number(value, NUMBER_DIGITS) or value
  end
  keep_note(entity, record.note)
  save(entity, STATUSES[record.status], record.score)
  return true
end

return is_kept() and each(adopt) or not_kept()
