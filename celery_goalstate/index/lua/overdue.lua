-- Which parked entities are due: what `take` may claim.
--
-- KEYS   see common.lua (no records)
-- Header limit: how many ids
-- Reply  list of ids, earliest deadline first; none while paused

if paused() then
  return '[]'
end
return cjson.encode(redis.call('ZRANGEBYSCORE', PARKED, '-inf', now, 'LIMIT', 0, header.limit))
