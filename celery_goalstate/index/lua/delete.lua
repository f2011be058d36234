-- Forgets entities; one that is running is marked, and kept until its evaluation ends, so that a new enqueue
-- cannot overlap the old run.
--
-- KEYS   see common.lua
-- Row    id
-- Reply  whether it was known
-- Reads  deleted, deadline. Writes deleted; clears deadline, since, own, noted

local function delete_running(entity)
  local fields = entity.fields
  local known = not fields.deleted or fields.deadline ~= nil
  fields.deleted, fields.deadline, fields.since, fields.own = '1', nil, nil, nil
  keep_note(entity, nil)
  save(entity, RUNNING)
  return known
end

local function delete(entity)
  if not entity.status then
    return false
  elseif entity.status == RUNNING then
    return delete_running(entity)
  end
  remove(entity)
  return true
end

return each(delete)
