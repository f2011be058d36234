-- Schedules entities: the earliest deadline wins, or exactly the given one.
--
-- KEYS   see common.lua
-- Header policy · max_wait · inside: {id, lease} of the evaluation that enqueues
-- Row    id · at, or else delay (milliseconds from now) · task_id · note
-- Reply  {changed, deadline in force, wakeup, noted: the note of what was pending, if the request has another}; an error
--        if the kind is not kept (any more) as the caller believes
-- Reads  everything but error, converged, finished. Writes deadline, asked, since, own, own_asked, token, task_id,
--        noted; clears failures, error and rounds of an entity with nothing pending, and the message of one whose
--        deadline comes earlier or goes far

local policy, max_wait, inside = header.policy, header.max_wait, header.inside
local resync = policy == 'resync' or policy == 'revive'

local function asked_by_itself(entity)
  return inside and inside.id == entity.id
end

-- Whether the evaluation that enqueues its own entity is the one in force.
local function asked_by_its_run(entity)
  return asked_by_itself(entity) and inside.lease == entity.fields.lease and not entity.fields.deleted
end

-- A resync has nothing to add to an evaluation under way.
local function is_resynced(entity)
  return resync and entity.status == RUNNING and not entity.fields.deleted
end

-- When a delay was asked for; nil: it is a point in time.
local function asked(request)
  return not request.at and now or nil
end

-- The same request again, since the first reply was lost: its wake-up is still to be published.
local function is_repeated(entity, request)
  return entity.fields.token and entity.fields.task_id == request.task_id
end

-- Which of the deadline in force and the one asked for is to be in force.
local function choose(current, wanted, entity)
  local fields = entity.fields
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

-- The name of an entity whose sorted set was evicted would never be found again.
local function restore(entity)
  local status = entity.status
  local score = (status == PARKED or status == SENT) and entity.fields.deadline or status == RUNNING and lease_end()
  if score and not redis.call('ZSCORE', status, entity.id) then
    save(entity, status, score)
  end
  if status == SENT and not redis.call('ZSCORE', SUSPECT, entity.id) then
    suspect_from(entity, now)
  end
end

-- A deadline is only noted; `finish` acts on it.
local function enqueue_running(entity, request, wanted)
  local fields = entity.fields
  local before = earliest(fields.deadline, fields.own)
  if is_resynced(entity) or resync and before then
    return scheduled(false, before)
  end
  local deadline = choose(fields.deadline, wanted, entity)
  if deadline ~= fields.deadline then
    fields.deadline, fields.asked = deadline, asked(request)
  end
  fields.since = fields.since or now
  local after = earliest(fields.deadline, fields.own)
  if after ~= before then
    keep_note(entity, request.note)
  end
  save(entity, RUNNING)
  return scheduled(after ~= before, after)
end

-- Its message arrives early and is sent again then: a burst of calls sends one message.
local function message_may_stay(entity, deadline)
  return entity.status == SENT and deadline > entity.fields.deadline and is_near(deadline) and not paused()
end

local function enqueue_pending(entity, request, wanted)
  local fields, status = entity.fields, entity.status
  if resync then
    return scheduled(false, fields.deadline)
  end
  local deadline = choose(fields.deadline, wanted, entity)
  fields.since = fields.since or now
  if deadline == fields.deadline then
    save(entity, status)
    if is_repeated(entity, request) then
      return scheduled(true, deadline, wakeup(entity))
    end
    return scheduled(false, deadline)
  end
  keep_note(entity, request.note)
  fields.asked = asked(request)
  if message_may_stay(entity, deadline) then
    local repeated = is_repeated(entity, request)
    fields.deadline, fields.resends, fields.resent = deadline, nil, nil
    save(entity, SENT, deadline)
    suspect_from(entity, deadline + limits.resend_after)
    return scheduled(true, deadline, repeated and wakeup(entity) or nil)
  end
  fields.retries = nil
  forget_message(entity)
  return scheduled(true, deadline, place(entity, deadline, request.task_id))
end

local function enqueue_idle(entity, request, wanted)
  local fields = entity.fields
  fields.failures, fields.error, fields.rounds, fields.task_id = nil, nil, nil, nil
  local deadline = choose(nil, wanted, entity)
  fields.since, fields.asked = now, asked(request)
  keep_note(entity, request.note)
  return scheduled(true, deadline, place(entity, deadline, request.task_id))
end

local function enqueue_failed(entity, request, wanted)
  if policy == 'resync' then
    return scheduled(false)
  end
  return enqueue_idle(entity, request, wanted)
end

local function enqueue_itself(entity, request, wanted)
  if asked_by_its_run(entity) then
    return note_own(entity, choose(entity.fields.own, wanted, entity), request.note)
  end
  return again(entity, wanted, request.task_id, request.note)
end

local function enqueue_by_status(entity, request)
  local status = entity.status
  local wanted = math.max(now, request.at or now + (request.delay or 0))
  restore(entity)
  if asked_by_itself(entity) and not is_resynced(entity) then
    return enqueue_itself(entity, request, wanted)
  elseif status == RUNNING then
    return enqueue_running(entity, request, wanted)
  elseif status == PARKED or status == SENT then
    return enqueue_pending(entity, request, wanted)
  elseif status == FAILED then
    return enqueue_failed(entity, request, wanted)
  end
  return enqueue_idle(entity, request, wanted) -- or not known at all
end

-- What it came to, as it is counted. A message that is published once more changes no deadline.
local function result_of(status, deadline, entity, reply)
  if not reply.changed then
    return 'unchanged'
  elseif status == RUNNING then
    return 'noted'
  elseif status == PARKED or status == SENT then
    return entity.fields.deadline == deadline and 'unchanged' or 'earlier'
  end
  return 'new'
end

local function enqueue(entity, request)
  local status, deadline = entity.status, entity.fields.deadline
  local pending = deadline or entity.fields.own
  local noted = pending and request.note and (note_of(entity) or '')
  local reply = enqueue_by_status(entity, request)
  count('enqueues:' .. result_of(status, deadline, entity, reply), 1)
  reply.noted = noted and noted ~= request.note and noted or nil
  return reply
end

return is_kept() and each(enqueue) or not_kept()
