-- Extends leases by their full length.
--
-- KEYS   see common.lua
-- ARGV   for each entity: id · lease
-- Reply  for each entity: 1, or 0 when the lease is not held any more
-- Reads  lease. Writes no field, only the expiry in `running`

local replies = {}
for n = 1, #KEYS - SHARD_KEYS do
  local at = LIMITS + (n - 1) * 2
  local entity = open(n, ARGV[at + 1])
  if entity.fields.lease == ARGV[at + 2] then
    save(entity, RUNNING, now + LEASE)
    replies[n] = 1
  else
    replies[n] = 0
  end
end
return replies
