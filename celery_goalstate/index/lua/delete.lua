-- Forgets entities; one that is running is marked, and kept until its evaluation ends, so that a new enqueue
-- cannot overlap the old run.
--
-- KEYS   see common.lua
-- Row    id
-- Reply  whether it was known
-- Reads  deleted, deadline. Writes deleted; clears deadline, asked, since, own, own_asked, noted

local function delete_running(entity)
  local fields = entity.fields
  local known = not fields.deleted or fields.deadline ~= nil
  fields.deleted = '1'
  fields.deadline, fields.asked, fields.since, fields.own, fields.own_asked = nil, nil, nil, nil, nil
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
