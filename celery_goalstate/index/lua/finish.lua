-- Ends evaluations: idle, quarantined, or scheduled again.
--
-- KEYS   see common.lua; histories if a run failed
-- Row    `base.Report`; its actions are [name, milliseconds, whether it failed]
-- Reply  {result: 'accepted' or 'fenced', deadline, wakeup}
-- Reads and writes everything

-- A longer value would make the whole hash a hash table, of twice the size and for good.
local BYTES_OF_ERROR = 60
local BYTES_OF_PAST_ERROR = 120

local function accepted(deadline, message)
  return { result = 'accepted', deadline = deadline and digits(deadline), wakeup = message }
end

local function holds_lease(entity, report)
  return entity.status == RUNNING and entity.fields.lease == report.lease
end

-- Since the sweeper judged by its end; the count has passed that, and only rises.
local function was_renewed(entity, report)
  return report.lost_at and score_of(entity) ~= report.lost_at
end

-- How the last report that was accepted is remembered.
local function name_of(report)
  return report.lost_at and report.lease .. ' lost' or report.lease
end

-- The same report again, since the reply to the first was lost.
local function is_repeated(entity, report)
  return entity.status and entity.fields.last == name_of(report)
end

-- Given back, or lost with a batch, for which any of it may be to blame.
local function is_unstarted(entity, report)
  return report.verdict == 'unstarted' or (report.lost_at and entity.fields.batch)
end

local function outcome_of(report)
  if report.lost_at then
    return 'lost'
  elseif report.verdict == 'unstarted' then
    return 'returned'
  elseif report.verdict ~= 'done' then
    return report.verdict
  elseif report.converged then
    return 'converged'
  end
  return report.delay and 'requeued' or 'unconverged'
end

local function count_evaluation(report)
  local bound = report.lateness and bound_of(report.lateness) or UNKNOWN
  count('evaluations:' .. outcome_of(report) .. ':' .. bound, 1)
  count('lateness', report.lateness or 0)
  for _, action in ipairs(report.actions or {}) do
    local name, took, outcome = action[1], action[2], action[3] and 'failed' or 'ok'
    count('actions:' .. outcome .. ':' .. bound_of(took) .. ':', 1, name)
    count('took:' .. outcome .. ':', took, name)
  end
end

-- Takes the run's fields away, and returns those that decide what follows.
local function end_run(entity, report)
  local fields = entity.fields
  local run = {
    unstarted = is_unstarted(entity, report), deleted = fields.deleted, since = fields.since,
    due = fields.due, own = fields.own, outside = fields.deadline, asked = fields.asked,
  }
  forget_pending(entity)
  fields.lease, fields.nonce, fields.deleted, fields.batch, fields.long = nil, nil, nil, nil, nil
  fields.due, fields.own, fields.own_asked = nil, nil, nil
  fields.task_id = report.task_id or fields.task_id
  fields.last = name_of(report)
  return run
end

-- The first so many bytes, and no half character.
local function cut(text, bytes)
  if not text or #text <= bytes then
    return text
  end
  while bytes > 0 and string.byte(text, bytes + 1) >= 0x80 and string.byte(text, bytes + 1) < 0xC0 do
    bytes = bytes - 1
  end
  return string.sub(text, 1, bytes)
end

-- Only the newest failure keeps its whole error.
local function shorten_newest(entity)
  local newest = redis.call('LINDEX', entity.history_key, 0)
  local ok, failure = pcall(cjson.decode, newest or '')
  if ok and type(failure) == 'table' and type(failure.error) == 'string' and #failure.error > BYTES_OF_PAST_ERROR then
    failure.error = cut(failure.error, BYTES_OF_PAST_ERROR)
    redis.call('LSET', entity.history_key, 0, cjson.encode(failure))
  end
end

local function keep_failure(entity, report)
  local fields, key = entity.fields, entity.history_key
  if redis.call('TYPE', key).ok ~= 'list' or not fields.history then
    redis.call('DEL', key) -- of an earlier life
  end
  fields.history = '1'
  shorten_newest(entity)
  local failure = {
    at = digits(now), state = report.state, step = report.step, took = report.took, error = report.error,
    task_id = fields.task_id,
  }
  redis.call('LPUSH', key, cjson.encode(failure))
  redis.call('LTRIM', key, 0, math.max(1, limits.history) - 1)
  redis.call('PEXPIRE', key, limits.history_ttl)
end

local function keep_outcome(entity, report)
  local fields = entity.fields
  fields.alone = report.lost_at and fields.alone or nil
  if report.error then
    keep_failure(entity, report)
  end
  fields.failures, fields.rounds, fields.error = report.failures, report.rounds, cut(report.error, BYTES_OF_ERROR)
  if not report.lost_at then -- the sweeper has seen nothing
    fields.state, fields.goal = report.state, report.goal
  end
  fields.step = report.step
  fields.converged = report.converged ~= nil and (report.converged and '1' or '0') or nil
  fields.finished = now
end

local function rest(entity, report)
  keep_note(entity, nil)
  save(entity, IDLE, report.idle_ttl and now + report.idle_ttl or '+inf')
  return accepted()
end

local function schedule(entity, report, run, deadline)
  local fields = entity.fields
  fields.since = run.since
  if deadline == run.outside then
    fields.asked = run.asked
  else
    fields.asked = now
  end
  if not fields.retries then
    fields.task_id = nil
  end
  return accepted(deadline, with_note(entity, place(entity, deadline, report.fresh_task_id)))
end

-- Its late write may have undone what another evaluation did. The sweeper writes nothing.
local function asks_again(report)
  local lease = number(report.lease, TOKEN_DIGITS)
  return report.began and not report.lost_at and lease
    and lease <= (number(shard.token, TOKEN_DIGITS) or 0)
end

-- Neither the sweeper nor who gives a run back has an outcome to be dropped.
local function count_fenced(report)
  if not report.lost_at and report.verdict ~= 'unstarted' then
    count('fenced', 1)
  end
end

local function finish_fenced(entity, report)
  if not is_repeated(entity, report) then
    count_fenced(report)
    if not asks_again(report) then
      return { result = 'fenced' }
    end
    local reply = again(entity, now, report.fresh_task_id)
    return { result = 'fenced', deadline = reply.deadline, wakeup = with_note(entity, reply.wakeup) }
  end
  return accepted(entity.fields.deadline, entity.status == SENT and with_note(entity, wakeup(entity)) or nil)
end

-- Of the old life nothing is left but the name.
local function finish_deleted(entity, report, run)
  local fields = entity.fields
  if not run.outside then
    remove(entity)
    return accepted()
  end
  fields.failures, fields.rounds, fields.error, fields.converged, fields.finished = nil, nil, nil, nil, nil
  fields.state, fields.goal, fields.step = nil, nil, nil
  fields.alone = nil
  forget_history(entity)
  return schedule(entity, report, run, run.outside)
end

local function finish_unstarted(entity, report, run)
  local fields = entity.fields
  fields.alone = (fields.alone or report.lost_at) and '1' or nil
  return schedule(entity, report, run, run.due) -- what was noted meanwhile is not earlier
end

local function finish_done(entity, report, run)
  local deadline = earliest(report.delay and now + report.delay, run.own, run.outside)
  if not deadline then
    return rest(entity, report)
  end
  return schedule(entity, report, run, deadline)
end

-- What the evaluation enqueued of its own entity is dropped: only what is from outside comes before the back-off.
local function finish_failed(entity, report, run)
  local fields = entity.fields
  local retry = now + report.delay
  local deadline = report.respect_backoff and retry or earliest(retry, run.outside)
  fields.floor = report.respect_backoff and retry or nil
  if deadline == retry and report.task_id then
    fields.retries = (report.retries or 0) + 1
  end
  return schedule(entity, report, run, deadline)
end

local function finish_quarantined(entity, report, run)
  local fields = entity.fields
  if not run.outside then
    keep_note(entity, nil)
    save(entity, FAILED, now)
    return accepted()
  end
  fields.failures, fields.error = nil, nil
  return schedule(entity, report, run, run.outside)
end

local function finish(entity, report)
  if not holds_lease(entity, report) then
    return finish_fenced(entity, report)
  elseif was_renewed(entity, report) then
    return { result = 'fenced' }
  end
  count_evaluation(report)
  local run = end_run(entity, report)
  if run.deleted or report.verdict == 'gone' then
    return finish_deleted(entity, report, run)
  elseif run.unstarted then
    return finish_unstarted(entity, report, run)
  end
  keep_outcome(entity, report)
  if report.verdict == 'done' then
    return finish_done(entity, report, run)
  elseif report.verdict == 'failed' then
    return finish_failed(entity, report, run)
  end
  return finish_quarantined(entity, report, run)
end

return each(finish)
