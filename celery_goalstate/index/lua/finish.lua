-- Ends evaluations: idle, quarantined, or scheduled again.
--
-- KEYS   see common.lua
-- ARGV   for each entity: id · lease · verdict · delay until the next look or '' · failures · looks · error ·
--        converged '0', '1' or '' · task id · retries · task id for a look that is no retry ·
--        respect_backoff 0/1 · idle_ttl or '' · expired_only 0/1
-- Reply  for each entity: {'accepted' or 'fenced', deadline or false, wake-up or false}
-- Reads and writes everything

local WIDTH = 14

local function positive(text)
  local number = tonumber(text)
  return number > 0 and number or nil
end

local function finish(entity, report)
  local fields = entity.fields
  local lease, verdict = report[2], report[3]
  local respect_backoff, expired_only = report[12] == '1', report[14] == '1'
  local name = expired_only and lease .. ' lost' or lease

  if entity.status ~= RUNNING or fields.lease ~= lease then
    if not entity.status or fields.last ~= name then
      return { 'fenced', false, false }
    end
    -- The same report again, since the reply to the first was lost.
    return { 'accepted', fields.deadline or false, entity.status == SENT and wakeup(entity) }
  end
  if expired_only and score_of(entity) > now then
    return { 'fenced', false, false }
  end

  local outside, since, own, deleted = fields.deadline, fields.since, fields.own, fields.deleted
  local unstarted = verdict == 'unstarted' or (expired_only and fields.batch)
  local due = fields.due
  forget_pending(fields)
  fields.lease, fields.nonce, fields.due, fields.own, fields.deleted = nil, nil, nil, nil, nil
  fields.batch = nil
  fields.task_id, fields.last = report[9] ~= '' and report[9] or fields.task_id, name
  local deadline
  if deleted and not outside then
    remove(entity)
    return { 'accepted', false, false }
  end
  if deleted then
    -- Of the old life nothing is left but the name.
    fields.failures, fields.looks, fields.error, fields.converged, fields.finished = nil, nil, nil, nil, nil
    fields.alone = nil
    deadline = outside
  elseif unstarted then
    fields.alone = (fields.alone or expired_only) and '1' or nil
    deadline = earliest(due, outside)
  else
    fields.alone = expired_only and fields.alone or nil
    fields.failures, fields.looks = positive(report[5]), positive(report[6])
    fields.error = report[7] ~= '' and report[7] or nil
    fields.converged = report[8] ~= '' and report[8] or nil
    fields.finished = now
    local delay = tonumber(report[4])
    local asked = delay and now + delay
    if verdict == 'done' then
      deadline = earliest(asked, own, outside)
    elseif verdict == 'failed' then
      deadline = respect_backoff and asked or earliest(asked, outside)
      fields.floor = respect_backoff and asked or nil
      if deadline == asked and report[9] ~= '' then
        fields.retries = tonumber(report[10]) + 1
      end
    else
      deadline = outside
      if not outside then
        save(entity, FAILED, now)
        return { 'accepted', false, false }
      end
      fields.failures, fields.error = nil, nil
    end
  end
  if not deadline then
    local ttl = tonumber(report[13])
    save(entity, IDLE, ttl and now + ttl or '+inf')
    return { 'accepted', false, false }
  end
  fields.since = since
  if not fields.retries then
    fields.task_id = nil
  end
  return { 'accepted', deadline, place(entity, deadline, report[11]) }
end

local replies = {}
for n = 1, #KEYS - SHARD_KEYS do
  local report = {}
  for i = 1, WIDTH do
    report[i] = ARGV[LIMITS + (n - 1) * WIDTH + i]
  end
  replies[n] = finish(open(n, report[1]), report)
end
return replies
