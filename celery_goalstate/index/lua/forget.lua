-- Removes idle records that are past their time.
--
-- KEYS   see common.lua
-- ARGV   for each entity: id
-- Reply  for each entity: 1, or 0 when it was left alone
-- Reads  nothing but the status

local replies = {}
for n = 1, #KEYS - SHARD_KEYS do
  local entity = open(n, ARGV[LIMITS + n])
  strike_out(entity, IDLE)
  replies[n] = 0
  if entity.status == IDLE and score_of(entity) <= now then
    remove(entity)
    replies[n] = 1
  end
end
return replies
