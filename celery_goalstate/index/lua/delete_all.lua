-- Deletes all entities of the shard at one moment, however many there are: whichever script meets one of them next
-- deletes it (`alive` in common.lua). The caller, who sees to it that each is met, calls once more when that is done.
--
-- KEYS   see common.lua (no records)
-- Header over: the token of the first call, in the last one
-- Reply  {token} of the first call; {count} of the last: how many entities there were to forget

local function begin()
  local token = next_token()
  redis.call('SET', ALL_DELETED, token .. ' 0')
  return { token = token }
end

-- Not over as long as a later call goes on, which is about the same entities.
local function over(token)
  if digits(deleted_before()) == token then
    redis.call('DEL', ALL_DELETED)
  end
  return { count = already_met }
end

return cjson.encode(header.over and over(header.over) or begin())
