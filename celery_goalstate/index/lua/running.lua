-- Tells of evaluations under way, also of entities that were deleted since.
--
-- KEYS   see common.lua
-- Row    id
-- Reply  {lease, failures} or false
-- Reads  lease, failures. Writes only an expiry in `running` that is no time

local function running(entity)
  strike_out(entity, RUNNING)
  if entity.status == RUNNING and not score_of(entity) then
    save(entity, RUNNING, now + LEASE) -- nobody can tell when it would have ended
    return false
  end
  return entity.status == RUNNING and { entity.fields.lease, entity.fields.failures or 0 }
end

return each(running)
