-- Makes the caller the shard's sweeper, if nobody else is, and tells what there is to do.
--
-- KEYS   see common.lua (no records)
-- Header the sweeper's name · for how long it holds the shard (milliseconds) · how many ids of each sort
-- Reply  {due, suspect, lost, expired}: lists of ids; false when another sweeper holds the shard

local sweeper, hold, limit = unpack(HEADER)

local held = redis.call('GET', SWEEPER)
if held then
  local till, holder = string.match(held, '^(%d+) (.*)$')
  if till and tonumber(till) > now and holder ~= sweeper then
    return 'false'
  end
end
redis.call('SET', SWEEPER, digits(now + hold) .. ' ' .. sweeper)

local function up_to(time, status, most)
  return redis.call('ZRANGEBYSCORE', status, '-inf', time, 'LIMIT', 0, most)
end

local due, suspect = {}, {}
if not paused() then
  due = up_to(now + HORIZON, PARKED, math.max(0, math.min(limit, WINDOW - under_way())))
  local reached = newest_arrival()
  suspect = up_to(math.min(reached, now), SENT, limit)
  if #suspect == 0 then
    suspect = up_to(now, SENT, 1) -- for a probe
  end
end
return cjson.encode({ due, suspect, up_to(now, RUNNING, limit), up_to(now, IDLE, limit) })
