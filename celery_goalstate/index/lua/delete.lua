-- Forgets entities; one that is running is marked, and kept until its evaluation ends, so that a new enqueue
-- cannot overlap the old run.
--
-- KEYS   see common.lua
-- ARGV   for each entity: id
-- Reply  for each entity: 1, or 0 when it was not known
-- Reads  deleted, deadline. Writes deleted; clears deadline, since, own

local replies = {}
for n = 1, #KEYS - SHARD_KEYS do
  local entity = open(n, ARGV[LIMITS + n])
  local fields = entity.fields
  if not entity.status then
    replies[n] = 0
  elseif entity.status == RUNNING then
    replies[n] = (not fields.deleted or fields.deadline) and 1 or 0
    fields.deleted, fields.deadline, fields.since, fields.own = '1', nil, nil, nil
    save(entity, RUNNING)
  else
    remove(entity)
    replies[n] = 1
  end
end
return replies
