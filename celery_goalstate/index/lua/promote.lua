-- Sends parked entities whose deadline is near.
--
-- KEYS   see common.lua
-- Row    id · task id
-- Reply  wake-up, or false when it is not to be sent (any more)
-- Reads  deadline, retries, task_id. Writes token, task_id

local function promote(entity, task_id)
  strike_out(entity, PARKED)
  if entity.status == SENT and entity.fields.task_id == task_id then
    return wakeup(entity) -- said again, since the reply to the first was lost
  end
  if entity.status ~= PARKED or paused() then
    return false
  end
  if entity.fields.deadline > now + HORIZON then
    save(entity, PARKED, entity.fields.deadline) -- found by a score that is not its deadline
    return false
  end
  return under_way() < WINDOW and send(entity, task_id)
end

return each(promote)
