-- Tells of evaluations under way, also of entities that were deleted since.
--
-- KEYS   see common.lua
-- Row    id
-- Reply  {lease, failures} or false
-- Reads  lease, failures. Writes nothing

local function running(entity)
  strike_out(entity, RUNNING)
  return entity.status == RUNNING and { entity.fields.lease, entity.fields.failures or 0 }
end

return each(running)
