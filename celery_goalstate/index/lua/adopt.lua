-- Takes over entities as another index describes them.
--
-- KEYS   see common.lua; histories
-- Row    id · status: 'parked', 'idle' or 'failed' · score · fields, as strings · note · failing: since when · history:
--        list of JSON
-- Reply  whether it was not known here before; an error if the kind is not kept (any more) as the caller believes
-- Reads  nothing but the status. Writes deadline, floor, task_id, failures, rounds, error, converged, finished, alone,
--        noted, state, goal, step, history

local STATUSES = { parked = PARKED, idle = IDLE, failed = FAILED }

local function is_known(entity)
  return entity.status ~= nil
end

local function adopt_history(entity, record)
  redis.call('DEL', entity.history_key)
  if record.history then
    redis.call('RPUSH', entity.history_key, unpack(record.history))
    redis.call('PEXPIRE', entity.history_key, limits.history_ttl)
    entity.fields.history = '1'
  end
end

local function adopt(entity, record)
  if is_known(entity) then
    return false
  end
  for name, value in pairs(record.fields) do
    entity.fields[name] = NUMBERS[name] and number(value, NUMBER_DIGITS) or value
  end
  keep_note(entity, record.note)
  adopt_history(entity, record)
  save(entity, STATUSES[record.status], record.score)
  if record.failing then
    redis.call('ZADD', FAILING, 'XX', record.failing, entity.id)
  end
  return true
end

return is_kept() and each(adopt) or not_kept()
