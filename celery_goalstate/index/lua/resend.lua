-- Sends those suspects again whose message is probably lost, under the same token: a queue that is merely slow
-- must not starve its own entities. Lost is what has not arrived when a message has that was sent so much later.
--
-- KEYS   see common.lua
-- Header probe: the one id that is sent in any case
-- Row    id · task_id
-- Reply  wakeup or false
-- Reads  deadline, token, task_id, resends. Writes resent, resends, task_id; clears
--        retries, which belong to the lost task id

local reached = newest_arrival()

-- The same request again, since the reply to the first was lost.
local function is_repeated(entity, request)
  return entity.fields.task_id == request.task_id
end

local function is_lost(entity)
  return (score_of(entity, SUSPECT) or 0) <= (entity.id == header.probe and now or reached)
end

-- It would be missed later than any can be: the clock was set back.
local function is_too_far(entity)
  return (tonumber(redis.call('ZSCORE', SUSPECT, entity.id)) or 0) > latest_suspicion()
end

local function resend(entity, request)
  local fields = entity.fields
  strike_out(entity, SENT)
  if entity.status ~= SENT or paused() then
    return false
  elseif is_repeated(entity, request) then
    return with_note(entity, wakeup(entity))
  elseif is_too_far(entity) then
    suspect_from(entity, now + limits.resend_after) -- not at once: all that were sent before the step would be
  end
  if not is_lost(entity) then
    return false
  end
  fields.resends = (fields.resends or 0) + 1
  fields.resent, fields.task_id, fields.retries = now, request.task_id, nil
  local intervals = math.min(2 ^ fields.resends, limits.resend_intervals)
  save(entity, SENT)
  suspect_from(entity, now + limits.resend_after * intervals)
  count('resends', 1)
  return with_note(entity, wakeup(entity))
end

return each(resend)
