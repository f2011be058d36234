-- Removes entities that are still as described.
--
-- KEYS   see common.lua
-- Row    id · deadline · when the last look ended
-- Reply  whether nothing is left of it
-- Reads  deadline, finished

local function retire(entity, deadline, finished)
  if not entity.status then
    return true
  end
  local function text(number)
    return number and digits(number) or false
  end
  local fields = entity.fields
  local same = text(fields.deadline) == deadline and text(fields.finished) == finished
  if entity.status == RUNNING or not same then
    return false
  end
  remove(entity)
  return true
end

return each(retire)
