-- Makes the caller the shard's sweeper, unless another one is, and replies with what there is to do.
--
-- KEYS   see common.lua (no records)
-- Header sweeper: its name · hold: for how long it holds the shard (milliseconds) · limit: how many ids of each sort
--        watch: {count, passed, cursor} of `base.Watch`
-- Reply  {due, suspect, expired: lists of ids, lost: list of {id, count}, count, set_back, cursor, newest_arrival: 0 if
--        that is not known}; false when another sweeper holds the shard

local limit, watch = header.limit, header.watch or {}
local ANY_TIME = string.rep('9', NUMBER_DIGITS)
local SET_BACK = 1000 -- the clock was set back if a survey was made later than so long from now

local count, till, newest, holder = swept()

-- What lasts for longer than a hold can was written before the clock was set back.
local function held_by_another()
  local lasts = till - now
  return lasts > 0 and lasts <= 2 * header.hold and holder ~= header.sweeper
end

-- The count, with the time that has passed since this sweeper's last survey. If another sweeper has counted since, that
-- time may be in it already.
local function counted()
  if watch.count ~= count then
    return count
  end
  return count + math.min(watch.passed, limits.margin)
end

local function up_to(time, set, most)
  return redis.call('ZRANGEBYSCORE', set, '-inf', time, 'LIMIT', 0, most)
end

-- And those whose score is later than any can be: nothing else would ever find them.
local function with_hidden(found, set, latest)
  local most = math.max(0, limit - #found)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', set, '(' .. (latest or ANY_TIME), '+inf', 'LIMIT', 0, most)) do
    found[#found + 1] = id
  end
  return found
end

local function due()
  local room = math.max(0, math.min(limit, limits.window - under_way()))
  return with_hidden(up_to(now + limits.eta_horizon, PARKED, room), PARKED)
end

local function is_set_back()
  return newest > now + SET_BACK
end

-- Adds parked entities beyond the horizon, which may wait for a delay that was put off. Reply: where to go on.
local function put_off(found)
  if not watch.cursor or not is_set_back() then
    return nil
  end
  local start = watch.cursor == '' and '0' or watch.cursor
  local cursor, flat = unpack(redis.call('ZSCAN', PARKED, start, 'COUNT', limit))
  for i = 1, #flat, 2 do
    if (tonumber(flat[i + 1]) or 0) > now + limits.eta_horizon then
      found[#found + 1] = flat[i]
    end
  end
  return cursor ~= '0' and cursor or nil
end

local function suspect()
  local found = up_to(newest_arrival(), SUSPECT, limit)
  if #found == 0 then
    found = up_to(now, SUSPECT, 1) -- for a probe
  end
  return with_hidden(found, SUSPECT, latest_suspicion())
end

local function lost()
  local found = {}
  for _, id in ipairs(with_hidden(up_to(count, RUNNING, limit), RUNNING)) do
    found[#found + 1] = { id, number(redis.call('ZSCORE', RUNNING, id), NUMBER_DIGITS) or 0 }
  end
  return found
end

local function expired()
  return up_to(now, IDLE, limit)
end

if held_by_another() then
  return 'false'
end
count = counted()
newest = math.max(newest, now)
local times = { digits(count), digits(now + header.hold), digits(newest), header.sweeper }
redis.call('SET', SWEEPER, table.concat(times, ' '))
local reply = { due = {}, suspect = {}, lost = lost(), expired = expired(), count = count }
reply.newest_arrival = newest_arrival()
if not paused() then
  reply.due, reply.suspect, reply.set_back = due(), suspect(), is_set_back()
  reply.cursor = put_off(reply.due)
end
return cjson.encode(reply)
