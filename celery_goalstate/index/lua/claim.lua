-- Exchanges wake-up tokens for leases.
--
-- KEYS   see common.lua
-- Header nonce of this claim · Celery task id · when the message was sent once more · are they a batch?
-- Row    id · token
-- Reply  {'claimed', lease, failures, looks, deadline, lateness} or {refusal, wake-up}
-- Reads  everything. Writes lease, nonce, due, task_id, batch; clears deadline, since, floor, token, retries, resends,
--        resent

local nonce, task_id, resent_at, batch = unpack(HEADER)
local reached = 0

local function claim(entity, token)
  local fields = entity.fields
  if not entity.status or fields.deleted then
    return { 'missing', false }
  end
  if entity.status == RUNNING and fields.nonce == nonce then
    return claimed(entity)
  end
  if entity.status ~= SENT or fields.token ~= token then
    return { 'stale', false }
  end
  -- A token tells when it was sent; of a later time only the index's own word counts, not the message's.
  local sent_again = math.min(resent_at or 0, fields.resent or 0)
  reached = math.max(reached, math.min(math.floor(tonumber(token) / 1000), now), sent_again)
  if paused() then
    park(entity)
    return { 'paused', false }
  end
  if fields.deadline > now + HORIZON then
    park(entity) -- sent by who had a longer horizon, or before the clock was set back: no worker waits so long
    return { 'early', false }
  end
  if fields.deadline > now then
    return { 'early', wakeup(entity, 50) }
  end
  return lease(entity, nonce, task_id, batch)
end

local replies = each(claim)
if reached > newest_arrival() then
  redis.call('SET', CLAIMED, digits(reached))
end
return replies
