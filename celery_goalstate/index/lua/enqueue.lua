-- Schedules entities: the earliest deadline wins, or exactly the given one.
--
-- KEYS   see common.lua
-- Header policy · max_wait · id and lease of the evaluation that speaks
-- Row    id · deadline, or else · milliseconds from now · task id
-- Reply  {changed, deadline in force, wake-up}
-- Reads  everything but error, converged, finished. Writes deadline, since, own, token, task_id; clears failures,
--        error and looks of an entity with nothing pending, and the message of one whose deadline comes earlier
--        or goes far

local policy, max_wait, speaker, speaker_lease = unpack(HEADER)
local resync = policy == 'resync' or policy == 'revive'

-- Which of the deadline in force and the one asked for is to be in force.
local function choose(current, wanted, fields)
  if policy == 'replace' and max_wait then
    wanted = math.min(wanted, math.max(now, (fields.since or now) + max_wait))
  end
  wanted = math.max(wanted, fields.floor or 0)
  if policy == 'replace' then
    if current and current <= now and wanted <= now then
      return current -- overdue already: nothing moves it back in the queue
    end
    return wanted
  end
  return current and math.min(current, wanted) or wanted
end

-- While the entity is evaluated a deadline is only noted; `finish` acts on it.
local function note(entity, field, wanted)
  local fields = entity.fields
  local before = earliest(fields.deadline, fields.own)
  fields[field] = choose(fields[field], wanted, fields)
  if field == 'deadline' then
    fields.since = fields.since or now
  end
  save(entity, RUNNING)
  local after = earliest(fields.deadline, fields.own)
  return { after ~= before, digits(after), false }
end

-- The name of an entity whose sorted set was evicted would never be found again.
local function restore(entity)
  local status = entity.status
  local score = status == PARKED and entity.fields.deadline or status == SENT and now
    or status == RUNNING and now + LEASE
  if score and not redis.call('ZSCORE', status, entity.id) then
    save(entity, status, score)
  end
end

local function enqueue(entity, at, delay, task_id)
  local fields, status = entity.fields, entity.status
  local wanted = math.max(now, at or now + delay)
  restore(entity)
  local speaks_itself = entity.id == speaker

  if status == RUNNING then
    if resync and not (fields.deleted and not fields.deadline) then
      local deadline = earliest(fields.deadline, fields.own)
      return { false, deadline and digits(deadline) or false, false }
    end
    local own = speaks_itself and speaker_lease == fields.lease and not fields.deleted
    return note(entity, own and 'own' or 'deadline', wanted)
  end

  if status == PARKED or status == SENT then
    -- An evaluation that was fenced speaks: the look that is pending starts after it in any case.
    if resync or speaks_itself then
      return { false, digits(fields.deadline), false }
    end
    local deadline = choose(fields.deadline, wanted, fields)
    fields.since = fields.since or now
    if deadline == fields.deadline then
      save(entity, status)
      -- The same request again, since the reply to the first was lost: its wake-up is still to be published.
      if fields.token and fields.task_id == task_id then
        return { true, digits(deadline), wakeup(entity) }
      end
      return { false, digits(deadline), false }
    end
    if status == SENT and deadline > fields.deadline and deadline <= now + HORIZON and not paused() then
      -- Its message arrives early and is sent again then: a burst of calls sends one message, not one each.
      fields.deadline, fields.resends, fields.resent = deadline, nil, nil
      save(entity, SENT, deadline + PATIENCE)
      return { true, digits(deadline), fields.task_id == task_id and wakeup(entity) }
    end
    fields.retries = nil
    forget_message(fields)
    return { true, digits(deadline), place(entity, deadline, task_id) }
  end

  if status == FAILED and (policy == 'resync' or speaks_itself) then
    return { false, false, false }
  end
  fields.failures, fields.error, fields.looks, fields.task_id = nil, nil, nil, nil
  local deadline = choose(nil, wanted, fields)
  fields.since = now
  return { true, digits(deadline), place(entity, deadline, task_id) }
end

return each(enqueue)
