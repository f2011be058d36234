-- Lets no evaluation of the kind start. Who was first stays known.
--
-- KEYS   see common.lua (no records)
-- Header by: who
-- Reply  whether it was not paused before

local function pause()
  if paused() then
    return false
  end
  redis.call('SET', PAUSED, cjson.encode({ since = digits(now), by = header.by }))
  return true
end

return cjson.encode(pause())
