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

-- And those whose score is later than any time: nobody else would ever find them.
local function with_hidden(found, status)
  local beyond, most = '(' .. string.rep('9', NUMBER_DIGITS), math.max(0, limit - #found)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', status, beyond, '+inf', 'LIMIT', 0, most)) do
    found[#found + 1] = id
  end
  return found
end

local due, suspect = {}, {}
if not paused() then
  due = up_to(now + HORIZON, PARKED, math.max(0, math.min(limit, WINDOW - under_way())))
  local reached = newest_arrival()
  suspect = up_to(math.min(reached, now), SENT, limit)
  if #suspect == 0 then
    suspect = up_to(now, SENT, 1) -- for a probe
  end
  with_hidden(due, PARKED)
  with_hidden(suspect, SENT)
end
local lost = with_hidden(up_to(now, RUNNING, limit), RUNNING)
return cjson.encode({ due, suspect, lost, up_to(now, IDLE, limit) })
