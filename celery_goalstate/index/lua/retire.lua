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
  local stored = entity.stored
  local same = (stored.deadline or false) == deadline and (stored.finished or false) == finished
  if entity.status == RUNNING or not same then
    return false
  end
  remove(entity)
  return true
end

return each(retire)
