-- Makes the caller the shard's sweeper, unless another one is, and replies with what there is to do.
--
-- KEYS   see common.lua (no records)
-- Header sweeper: its name · hold: for how long it holds the shard (milliseconds) · limit: how many ids of each sort
-- Reply  {due, suspect, lost, expired}: lists of ids; claimed: when the newest message that has arrived was sent, 0 if
--        that is not known; false when another sweeper holds the shard

local limit = header.limit

local function held_by_another()
  local till, holder = string.match(redis.call('GET', SWEEPER) or '', '^(%d+) (.*)$')
  return till and tonumber(till) > now and holder ~= header.sweeper
end

local function up_to(time, status, most)
  return redis.call('ZRANGEBYSCORE', status, '-inf', time, 'LIMIT', 0, most)
end

-- And those whose score is later than any time: nothing else would ever find them.
local function with_hidden(found, status)
  local beyond, most = '(' .. string.rep('9', NUMBER_DIGITS), math.max(0, limit - #found)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', status, beyond, '+inf', 'LIMIT', 0, most)) do
    found[#found + 1] = id
  end
  return found
end

local function due()
  local room = math.max(0, math.min(limit, limits.window - under_way()))
  return with_hidden(up_to(now + limits.eta_horizon, PARKED, room), PARKED)
end

local function suspect()
  local found = up_to(math.min(newest_arrival(), now), SENT, limit)
  if #found == 0 then
    found = up_to(now, SENT, 1) -- for a probe
  end
  return with_hidden(found, SENT)
end

local function lost()
  return with_hidden(up_to(now, RUNNING, limit), RUNNING)
end

local function expired()
  return up_to(now, IDLE, limit)
end

-- One that is later than now tells nothing: the clock was set back.
local function arrived()
  local newest = newest_arrival()
  return newest <= now and newest or 0
end

if held_by_another() then
  return 'false'
end
redis.call('SET', SWEEPER, digits(now + header.hold) .. ' ' .. header.sweeper)
local to_send = { due = {}, suspect = {} }
if not paused() then
  to_send = { due = due(), suspect = suspect() }
end
return cjson.encode({
  due = to_send.due,
  suspect = to_send.suspect,
  lost = lost(),
  expired = expired(),
  claimed = arrived(),
})
