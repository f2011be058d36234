-- Claims entities that are due and parked, as a batch and without any message.
--
-- KEYS   see common.lua
-- ARGV   5 nonce of this claim · 6 Celery task id
--        then for each entity: id
-- Reply  for each entity: as of claim.lua, or false when it is not to be taken (any more)
-- Reads  everything. Writes what claim.lua writes

local nonce, task_id = ARGV[5], ARGV[6]

local function take(entity)
  local fields = entity.fields
  if entity.status == RUNNING and fields.nonce == nonce and not fields.deleted then
    return claimed(entity)
  end
  if entity.status ~= PARKED or paused or fields.alone or fields.deadline > now then
    return false
  end
  return lease(entity, nonce, task_id, true)
end

local replies = {}
for n = 1, #KEYS - SHARD_KEYS do
  replies[n] = take(open(n, ARGV[LIMITS + 2 + n]))
end
return replies
