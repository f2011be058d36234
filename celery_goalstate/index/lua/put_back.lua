-- Parks entities whose wake-ups could not be published, unless something else happened since.
--
-- KEYS   see common.lua
-- ARGV   for each entity: id · token that could not be published
-- Reply  for each entity: 1, or 0 when it was left alone
-- Reads  token. Clears token, resends, resent; task_id unless the evaluation is a retry

local replies = {}
for n = 1, #KEYS - SHARD_KEYS do
  local at = LIMITS + (n - 1) * 2
  local entity = open(n, ARGV[at + 1])
  replies[n] = 0
  if entity.status == SENT and entity.fields.token == ARGV[at + 2] then
    park(entity)
    replies[n] = 1
  end
end
return replies
