-- Forgets entities; one that is running is marked, and kept until its evaluation ends, so that a new enqueue
-- cannot overlap the old run.
--
-- KEYS   see common.lua
-- Row    id
-- Reply  whether it was known
-- Reads  deleted, deadline. Writes deleted; clears deadline, since, own

local function delete(entity)
  local fields = entity.fields
  if not entity.status then
    return false
  end
  if entity.status ~= RUNNING then
    remove(entity)
    return true
  end
  local known = not fields.deleted or fields.deadline ~= nil
  fields.deleted, fields.deadline, fields.since, fields.own = '1', nil, nil, nil
  save(entity, RUNNING)
  return known
end

return each(delete)
