-- Claims entities that are due and parked, as a batch and without any message.
--
-- KEYS   see common.lua
-- Header nonce of this claim · Celery's task_id
-- Row    id
-- Reply  as of claim.lua, or false when it is not to be taken (any more)
-- Reads  everything. Writes what claim.lua writes

-- The same claim again, since the reply to the first was lost.
local function is_repeated(entity)
  return entity.status == RUNNING and entity.fields.nonce == header.nonce and not entity.fields.deleted
end

-- What an enqueue noted is for a message to carry.
local function may_be_taken(entity)
  return entity.status == PARKED and not paused() and not entity.fields.alone and not entity.fields.noted
end

local function take(entity)
  if is_repeated(entity) then
    return claimed(entity)
  elseif not may_be_taken(entity) then
    return false
  elseif entity.fields.deadline > now then
    save(entity, PARKED, entity.fields.deadline) -- found by a score that is not its deadline
    return false
  end
  return lease(entity, true)
end

return each(take)
