-- Extends leases by their full length.
--
-- KEYS   see common.lua
-- Row    id · lease
-- Reply  whether the lease is still held
-- Reads  lease. Writes no field, only the count in `running`

local function holds_lease(entity, run)
  return entity.status == RUNNING and entity.fields.lease == run.lease
end

local function renew(entity, run)
  if not holds_lease(entity, run) then
    return false
  end
  save(entity, RUNNING, lease_end())
  return true
end

return each(renew)
