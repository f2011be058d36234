-- Sends parked entities whose deadline is near.
--
-- KEYS   see common.lua
-- ARGV   for each entity: id · task id
-- Reply  for each entity: wake-up, or false when it is not to be sent (any more)
-- Reads  deadline, retries, task_id. Writes token, task_id

local replies = {}
for n = 1, #KEYS - SHARD_KEYS do
  local at = LIMITS + (n - 1) * 2
  local entity = open(n, ARGV[at + 1])
  strike_out(entity, PARKED)
  replies[n] = false
  if entity.status == SENT and entity.fields.task_id == ARGV[at + 2] then
    replies[n] = wakeup(entity) -- said again, since the reply to the first was lost
  end
  if entity.status == PARKED and not paused and under_way() < WINDOW then
    if entity.fields.deadline <= now + HORIZON then
      replies[n] = send(entity, ARGV[at + 2])
    end
  end
end
return replies
