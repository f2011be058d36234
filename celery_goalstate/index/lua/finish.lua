-- Ends evaluations: idle, quarantined, or scheduled again.
--
-- KEYS   see common.lua
-- Row    id · lease · verdict · delay until the next look · failures · looks · error · converged '0' or '1' ·
--        task id · retries · task id for a look that is no retry · respect_backoff · idle_ttl · expired_only
-- Reply  {'accepted' or 'fenced', deadline, wake-up}
-- Reads and writes everything

local function positive(number)
  return number > 0 and number or nil
end

local function finish(
  entity, lease, verdict, delay, failures, looks, error, converged, task_id, retries, fresh_task_id,
  respect_backoff, idle_ttl, expired_only
)
  local fields = entity.fields
  local name = expired_only and lease .. ' lost' or lease

  if entity.status ~= RUNNING or fields.lease ~= lease then
    if not entity.status or fields.last ~= name then
      return { 'fenced', false, false }
    end
    -- The same report again, since the reply to the first was lost.
    local deadline = fields.deadline and digits(fields.deadline) or false
    return { 'accepted', deadline, entity.status == SENT and wakeup(entity) }
  end
  if expired_only and (score_of(entity) or 0) > now then
    return { 'fenced', false, false }
  end

  local outside, since, own, deleted = fields.deadline, fields.since, fields.own, fields.deleted
  local unstarted = verdict == 'unstarted' or (expired_only and fields.batch)
  local due = fields.due
  forget_pending(fields)
  fields.lease, fields.nonce, fields.due, fields.own, fields.deleted = nil, nil, nil, nil, nil
  fields.batch = nil
  fields.task_id, fields.last = task_id or fields.task_id, name
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
    fields.failures, fields.looks = positive(failures), positive(looks)
    fields.error = error or nil
    fields.converged = converged or nil
    fields.finished = now
    local asked = delay and now + delay
    if verdict == 'done' then
      deadline = earliest(asked, own, outside)
    elseif verdict == 'failed' then
      deadline = respect_backoff and asked or earliest(asked, outside)
      fields.floor = respect_backoff and asked or nil
      if deadline == asked and task_id then
        fields.retries = retries + 1
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
    save(entity, IDLE, idle_ttl and now + idle_ttl or '+inf')
    return { 'accepted', false, false }
  end
  fields.since = since
  if not fields.retries then
    fields.task_id = nil
  end
  return { 'accepted', digits(deadline), place(entity, deadline, fresh_task_id) }
end

return each(finish)
