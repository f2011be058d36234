-- Claims entities that are due and parked, as a batch and without any message.
--
-- KEYS   see common.lua
-- Header nonce of this claim · Celery task id
-- Row    id
-- Reply  as of claim.lua, or false when it is not to be taken (any more)
-- Reads  everything. Writes what claim.lua writes

local nonce, task_id = unpack(HEADER)

local function take(entity)
  local fields = entity.fields
  if entity.status == RUNNING and fields.nonce == nonce and not fields.deleted then
    return claimed(entity)
  end
  if entity.status ~= PARKED or paused() or fields.alone then
    return false
  end
  if fields.deadline > now then
    save(entity, PARKED, fields.deadline) -- found by a score that is not its deadline
    return false
  end
  return lease(entity, nonce, task_id, true)
end

return each(take)
