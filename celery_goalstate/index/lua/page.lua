-- A page of the entities in one status, or of those that fail, or run for long, lowest score first.
--
-- KEYS   see common.lua (no records)
-- Header listing · limit: how many · after: {score, id} of the last one of the page before
-- Reply  list of [id, score as Redis writes it]

local LISTINGS = {
  parked = PARKED, sent = SENT, running = RUNNING, idle = IDLE, failed = FAILED, failing = FAILING, long = LONG,
}
local listing = LISTINGS[header.listing]

-- As sorted sets order ids of the same score: by their bytes. Lua's own `<` goes by the server's locale.
local function is_after(id, other)
  for i = 1, math.min(#id, #other) do
    local byte, its_byte = string.byte(id, i), string.byte(other, i)
    if byte ~= its_byte then
      return byte > its_byte
    end
  end
  return #id > #other
end

-- How many come before the page. Those of the same score may be very many, and `after` may not be among them any more.
local function passed(after)
  local low = redis.call('ZCOUNT', listing, '-inf', '(' .. after.score)
  local high = redis.call('ZCOUNT', listing, '-inf', after.score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if is_after(redis.call('ZRANGE', listing, middle, middle)[1], after.id) then
      high = middle
    else
      low = middle + 1
    end
  end
  return low
end

local function page()
  local first = header.after and passed(header.after) or 0
  local flat, found = redis.call('ZRANGE', listing, first, first + header.limit - 1, 'WITHSCORES'), {}
  for i = 1, #flat, 2 do
    found[#found + 1] = { flat[i], flat[i + 1] }
  end
  return found
end

return cjson.encode(page())
