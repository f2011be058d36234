-- Sends parked entities whose deadline is near.
--
-- KEYS   see common.lua
-- Row    id · task_id
-- Reply  wakeup, or false when it is not to be sent (any more)
-- Reads  deadline, retries, task_id. Writes token, task_id

-- The same request again, since the reply to the first was lost.
local function is_repeated(entity, request)
  return entity.status == SENT and entity.fields.task_id == request.task_id
end

local function is_waiting(entity)
  return entity.status == PARKED and not paused()
end

local function promote(entity, request)
  strike_out(entity, PARKED)
  if is_repeated(entity, request) then
    return with_note(entity, wakeup(entity))
  elseif not is_waiting(entity) then
    return false
  elseif not is_near(entity.fields.deadline) then
    save(entity, PARKED, entity.fields.deadline) -- found by a score that is not its deadline
    return false
  end
  return under_way() < limits.window and with_note(entity, send(entity, request.task_id))
end

return each(promote)
