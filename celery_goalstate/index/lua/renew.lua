-- Extends leases by their full length.
--
-- KEYS   see common.lua; histories, whereabouts
-- Row    id · lease · where: what the run is doing
-- Reply  whether the lease is still held
-- Reads  lease, deleted. Writes long, the whereabouts, and the count in `running`

local function holds_lease(entity, run)
  return entity.status == RUNNING and entity.fields.lease == run.lease
end

-- It expires by the server's time, which passes also while a clock is set back.
local SHORTEST_TTL = 60000

-- In a key of its own: a hash that has once held so long a value takes twice the memory for good.
local function keep_whereabouts(entity, run)
  if run.where then
    local found = cjson.encode({ lease = run.lease, seen = digits(now), where = run.where })
    redis.call('SET', entity.whereabouts_key, found, 'PX', math.max(SHORTEST_TTL, limits.lease + limits.margin))
  end
end

local function renew(entity, run)
  if not holds_lease(entity, run) then
    return false
  end
  if not entity.fields.deleted then
    entity.fields.long = '1'
    keep_whereabouts(entity, run)
  end
  save(entity, RUNNING, lease_end())
  return true
end

return each(renew)
