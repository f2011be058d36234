-- The index's own clock: milliseconds since the epoch. Producers' and workers' clocks may differ from it.
local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
