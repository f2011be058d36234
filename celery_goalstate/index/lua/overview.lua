-- What there is to know of a shard at a glance.
--
-- KEYS   see common.lua (no records)
-- Reply  {counts: by status, overdue, oldest, failing, failing_for, longest: {id, for}, paused, unswept}: ages in
--        milliseconds, absent where there is none; `paused` as pause.lua wrote it; `unswept`: since the last survey, if
--        no sweeper holds the shard, -1 if there was none

local function up_to_now(set)
  return redis.call('ZCOUNT', set, '-inf', now)
end

-- How old the oldest member is.
local function oldest(set)
  local found = redis.call('ZRANGE', set, 0, 0, 'WITHSCORES')
  local since = number(found[2], NUMBER_DIGITS)
  return since and since <= now and now - since or nil, found[1]
end

local function later(one, other)
  return one and other and math.max(one, other) or one or other
end

local function longest()
  local age, id = oldest(LONG)
  return age and { id = id, ['for'] = age } or nil
end

local function unswept()
  local _, till, newest = swept()
  if till > now then
    return nil
  end
  return newest > 0 and math.max(0, now - newest) or -1
end

local function overview()
  local counts = {}
  for name, set in pairs({ parked = PARKED, sent = SENT, running = RUNNING, idle = IDLE, failed = FAILED }) do
    counts[name] = redis.call('ZCARD', set)
  end
  return {
    counts = counts,
    overdue = up_to_now(PARKED) + up_to_now(SENT),
    oldest = later(oldest(PARKED), (oldest(SENT))),
    failing = redis.call('ZCARD', FAILING),
    failing_for = (oldest(FAILING)),
    longest = longest(),
    paused = paused() or nil,
    unswept = unswept(),
  }
end

return cjson.encode(overview())
