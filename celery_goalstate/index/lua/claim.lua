-- Exchanges wake-up tokens for leases.
--
-- KEYS   see common.lua
-- Header nonce of this claim · Celery's task_id · resent_at: when the message was sent once more · batch: with others
-- Row    id · token
-- Reply  {lease, failures, rounds, deadline, lateness} or {refused, wakeup}
-- Reads  everything. Writes lease, nonce, due, task_id, batch; clears deadline, since, floor, token, retries, resends,
--        resent

local reached = 0

local function refused(reason, again)
  count('refusals:' .. reason, 1)
  return { refused = reason, wakeup = again }
end

local function is_missing(entity)
  return not entity.status or entity.fields.deleted
end

-- The same claim again, since the reply to the first was lost.
local function is_repeated(entity)
  return entity.status == RUNNING and entity.fields.nonce == header.nonce
end

local function is_expected(entity, token)
  return entity.status == SENT and entity.fields.token == token
end

-- A token is the time at which it was sent; one in the future tells nothing. That it was sent again counts if the
-- index knows it, too, not by the message alone.
local function note_arrival(entity, token)
  local sent_again = math.min(header.resent_at or 0, entity.fields.resent or 0)
  for _, sent in ipairs({ math.floor(tonumber(token) / 1000), sent_again }) do
    if sent > reached and sent <= now then
      reached = sent
    end
  end
end

local function is_early(entity)
  return entity.fields.deadline > now
end

local function claim(entity, message)
  if is_missing(entity) then
    return refused('missing')
  elseif is_repeated(entity) then
    return claimed(entity)
  elseif not is_expected(entity, message.token) then
    return refused('stale')
  end
  note_arrival(entity, message.token)
  if paused() then
    park(entity)
    return refused('paused')
  elseif not is_near(entity.fields.deadline) then
    park(entity) -- sent by who had a longer horizon, or before the clock was set back: no worker waits so long
    return refused('early')
  elseif is_early(entity) then
    return refused('early', with_note(entity, wakeup(entity, limits.shortest_delay)))
  end
  return lease(entity, header.batch)
end

local replies = each(claim)
if reached > newest_arrival() then
  redis.call('SET', CLAIMED, digits(reached))
end
return replies
