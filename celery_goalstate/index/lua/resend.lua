-- Sends those suspects again whose message is probably lost, under the same token: a queue that is merely slow
-- must not starve its own entities. Lost is what has not arrived when a message has that was sent so much later.
--
-- KEYS   see common.lua
-- Header the one id that is sent in any case
-- Row    id · task id
-- Reply  wake-up or false
-- Reads  deadline, token, task_id, resends. Writes resent, resends, task_id; clears
--        retries, which belong to the lost task id

local probe = HEADER[1]
local reached = math.min(now, newest_arrival())

local function resend(entity, task_id)
  local fields = entity.fields
  strike_out(entity, SENT)
  if entity.status ~= SENT or paused() then
    return false
  end
  if fields.task_id == task_id then
    return wakeup(entity) -- said again, since the reply to the first was lost
  end
  if (score_of(entity) or 0) > (entity.id == probe and now or reached) then
    return false
  end
  fields.resends = (fields.resends or 0) + 1
  fields.resent, fields.task_id, fields.retries = now, task_id, nil
  save(entity, SENT, now + PATIENCE * math.min(2 ^ fields.resends, 8))
  return wakeup(entity)
end

return each(resend)
