-- Exchanges wake-up tokens for leases.
--
-- KEYS   see common.lua
-- ARGV   5 nonce of this claim · 6 Celery task id · 7 when the message was sent once more, or ''
--        then for each entity: id · token
-- Reply  for each entity: {'claimed', lease, failures, looks, deadline, lateness} or {refusal, wake-up or false}
-- Reads  everything. Writes lease, nonce, due, task_id; clears deadline, since, floor, token, retries, resends,
--        resent

local nonce, task_id, resent_at = ARGV[5], ARGV[6], tonumber(ARGV[7])
local reached = math.min(resent_at or 0, now)

local function claimed(fields)
  local lateness = math.max(0, now - fields.due)
  return { 'claimed', fields.lease, fields.failures or 0, fields.looks or 0, fields.due, lateness }
end

local function claim(entity, token)
  local fields = entity.fields
  if not entity.status or fields.deleted then
    return { 'missing', false }
  end
  if entity.status == RUNNING and fields.nonce == nonce then
    -- The same claim again, since the reply to the first was lost: the lease lasts from now.
    save(entity, RUNNING, now + LEASE)
    return claimed(fields)
  end
  if entity.status ~= SENT or fields.token ~= token then
    return { 'stale', false }
  end
  reached = math.max(reached, math.min(fields.deadline, now))
  if paused then
    park(entity)
    return { 'paused', false }
  end
  if fields.deadline > now then
    return { 'early', wakeup(entity, 50) }
  end
  local due = fields.deadline
  forget_pending(fields)
  fields.lease, fields.nonce, fields.due, fields.task_id = next_token(), nonce, due, task_id
  save(entity, RUNNING, now + LEASE)
  return claimed(fields)
end

local replies = {}
for n = 1, #KEYS - SHARD_KEYS do
  local at = LIMITS + 3 + (n - 1) * 2
  replies[n] = claim(open(n, ARGV[at + 1]), ARGV[at + 2])
end
if reached > tonumber(redis.call('GET', CLAIMED) or 0) then
  redis.call('SET', CLAIMED, digits(reached))
end
return replies
