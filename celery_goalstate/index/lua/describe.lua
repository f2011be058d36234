-- Everything the index knows of entities.
--
-- KEYS   see common.lua; histories, whereabouts
-- Header history: all of it, not only the newest failure
-- Row    id
-- Reply  {status, score, fields, note, failing: since when, history: list of JSON, whereabouts: JSON} or false
-- Reads  everything. Writes nothing, but for a record that is no hash

local NAMES = { [PARKED] = 'parked', [SENT] = 'sent', [RUNNING] = 'running', [IDLE] = 'idle', [FAILED] = 'failed' }

-- There is no score if the sorted set was evicted. That of a running one is a count; the time is what a caller wants.
local function score(entity)
  local text = redis.call('ZSCORE', entity.status, entity.id)
  if entity.status == RUNNING then
    return digits(now + math.max(0, (number(text, NUMBER_DIGITS) or 0) - swept()))
  end
  return (number(text, NUMBER_DIGITS) or entity.status == IDLE and text == 'inf') and text or '0'
end

local function failing(entity)
  return entity.fields.error and entity.status ~= FAILED and score_of(entity, FAILING) or nil
end

local function history(entity)
  if entity.fields.history and redis.call('TYPE', entity.history_key).ok == 'list' then
    return redis.call('LRANGE', entity.history_key, 0, header.history and -1 or 0)
  end
end

-- nil if it is of an earlier run, was evicted or is no text.
local function whereabouts(entity)
  local found = entity.fields.long and redis.pcall('GET', entity.whereabouts_key)
  return type(found) == 'string' and found or nil
end

local function describe(entity)
  if not entity.status then
    return false
  end
  local fields, since = {}, failing(entity)
  for name, value in pairs(entity.fields) do
    fields[name] = NUMBERS[name] and digits(value) or value
  end
  return {
    status = NAMES[entity.status], score = score(entity), fields = fields, note = note_of(entity),
    failing = since and digits(since), history = history(entity), whereabouts = whereabouts(entity),
  }
end

return each(describe)
