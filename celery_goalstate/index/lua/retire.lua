-- Removes entities that are still as described.
--
-- KEYS   see common.lua; histories
-- Row    id · deadline · finished: when the last evaluation ended (both as digits)
-- Reply  whether nothing is left of it
-- Reads  deadline, finished

local function is_as_described(entity, record)
  local function text(number)
    return number and digits(number)
  end
  local fields = entity.fields
  return text(fields.deadline) == record.deadline and text(fields.finished) == record.finished
end

local function retire(entity, record)
  if not entity.status then
    return true
  elseif entity.status == RUNNING or not is_as_described(entity, record) then
    return false
  end
  remove(entity)
  return true
end

return each(retire)
