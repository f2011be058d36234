-- Exchanges wake-up tokens for leases.
--
-- KEYS   see common.lua
-- ARGV   5 nonce of this claim · 6 Celery task id · 7 when the message was sent once more, or '' ·
--        8 are they a batch? 0/1
--        then for each entity: id · token
-- Reply  for each entity: {'claimed', lease, failures, looks, deadline, lateness} or {refusal, wake-up or false}
-- Reads  everything. Writes lease, nonce, due, task_id, batch; clears deadline, since, floor, token, retries, resends,
--        resent

local nonce, task_id, resent_at = ARGV[5], ARGV[6], tonumber(ARGV[7])
local reached = math.min(resent_at or 0, now)

local batch = ARGV[8] == '1'

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
  reached = math.max(reached, math.min(math.floor(tonumber(token) / 1000), now)) -- a token tells when it was sent
  if paused then
    park(entity)
    return { 'paused', false }
  end
  if fields.deadline > now then
    return { 'early', wakeup(entity, 50) }
  end
  return lease(entity, nonce, task_id, batch)
end

local replies = {}
for n = 1, #KEYS - SHARD_KEYS do
  local at = LIMITS + 4 + (n - 1) * 2
  replies[n] = claim(open(n, ARGV[at + 1]), ARGV[at + 2])
end
if reached > tonumber(redis.call('GET', CLAIMED) or 0) then
  redis.call('SET', CLAIMED, digits(reached))
end
return replies
