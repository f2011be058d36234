-- The evaluations under way, also of entities that were deleted since.
--
-- KEYS   see common.lua; histories
-- Row    id
-- Reply  {lease, failures} or false
-- Reads  lease, failures. Writes only what is no count in `running`

local function running(entity)
  strike_out(entity, RUNNING)
  if entity.status ~= RUNNING then
    return false
  elseif not score_of(entity) then
    save(entity, RUNNING, lease_end()) -- when it would have ended is not known any more
    return false
  end
  return { lease = entity.fields.lease, failures = entity.fields.failures or 0 }
end

return each(running)
