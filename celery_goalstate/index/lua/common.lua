-- What the transitions share. Each script is run as clock.lua, the constants of `redis.py` (the table `limits`, which is
-- `base.Limits`, those of `counters.py`, the text `form`), this file, its own.
--
-- KEYS  1-15  the shard's own keys, as named below
--       16-   the records, one for each row; then as many notes; where they are of use, as many histories, and whereabouts
-- ARGV  1     JSON: {header, rows}. The header is the transition's own; a row is about one entity and has its `id`.
--             What is absent, or has its default, is left out: nil. One argument costs the client less than many.
-- Reply       JSON, for each row the transition's reply
--
-- A record is a hash; a field that has its default is absent. Its status is the one sorted set that holds its id:
-- running with a lease, sent with a token, parked with a deadline and neither, else failed or idle. What is sent is
-- in one more, suspect, by when its message is missed; what has an error and is not quarantined in failing, by since
-- when; what has run for so long that its lease was renewed in long, by when it began.

local PARKED, SENT, RUNNING, IDLE, FAILED = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local SUSPECT, TOKEN, PAUSED, CLAIMED, SWEEPER = KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local FORM, ALL_DELETED, FAILING, LONG, METRICS = KEYS[11], KEYS[12], KEYS[13], KEYS[14], KEYS[15]
local SHARD_KEYS = 15

local input = cjson.decode(ARGV[1])
local header, rows = input.header, input.rows

local NUMBERS = {
  deadline = true, asked = true, since = true, own = true, own_asked = true, floor = true, due = true,
  resent = true, resends = true, retries = true, failures = true, rounds = true, finished = true,
}
local TOKENS = { token = true, lease = true, born = true }
local NUMBER_DIGITS, TOKEN_DIGITS = 14, 17 -- what is longer is no time, and no number that Lua could count with

local now = clock()

-- What the shard's own keys held when the script began, all at once: a call costs more than what it reads.
local shard = {}
shard.token, shard.paused, shard.claimed, shard.sweeper, shard.form, shard.all_deleted =
  unpack(redis.call('MGET', TOKEN, PAUSED, CLAIMED, SWEEPER, FORM, ALL_DELETED))

local function paused()
  return shard.paused
end

-- Numbers become digits: Lua's tostring would turn the 16 digits of a token into 1.7e+15, and JSON has 14 of them.
local function digits(number)
  return string.format('%.0f', number)
end

-- What was written as digits; nil if it is anything else. One damaged value must not be in everybody's way.
local function number(text, most_digits)
  return text and #text <= most_digits and string.match(text, '^%d+$') and tonumber(text) or nil
end

-- Tokens only grow. Those of a batch are taken from the counter at once, so that none is given twice should the script
-- break off; `each` puts back what is left.
local last_token, last_reserved = 0, 0
local function next_token()
  if last_token == last_reserved then
    last_token = math.max(number(shard.token, TOKEN_DIGITS) or 0, now * 1000 - 1)
    last_reserved = last_token + math.max(1, #rows)
    shard.token = digits(last_reserved)
    redis.call('SET', TOKEN, shard.token)
  end
  last_token = last_token + 1
  return digits(last_token)
end

-- Whether the kind is kept as the caller believes. It has asked only once, and an emptied kind is forgotten; it may even
-- have come back in another number of shards, where the caller's entities would not be found.
local function is_kept()
  local text = shard.form
  if not text or text == form then
    return text == form
  end
  local ok, kept = pcall(cjson.decode, text)
  local wanted = cjson.decode(form)
  return ok and type(kept) == 'table' and kept.layout == wanted.layout and kept.shards == wanted.shards
end

local function not_kept()
  return redis.error_reply('NOTKEPT the kind is not kept as the caller believes')
end

-- When the newest message that has arrived at a worker was sent. Not known if that lies in the future: the clock was
-- set back.
local function newest_arrival()
  local reached = number(shard.claimed, NUMBER_DIGITS) or 0
  return reached <= now and reached or 0
end

-- What the last survey wrote: the count, until when its sweeper holds the shard, the newest time of any survey, and the
-- sweeper's name. Without it, the lease that ends first lasts for its full length once more.
local function swept()
  local texts = { string.match(shard.sweeper or '', '^(%d+) (%d+) (%d+) (.*)$') }
  local count, till = number(texts[1], NUMBER_DIGITS), number(texts[2], NUMBER_DIGITS)
  local newest = number(texts[3], NUMBER_DIGITS)
  if not count or not till or not newest then
    local first = number(redis.call('ZRANGE', RUNNING, 0, 0, 'WITHSCORES')[2], NUMBER_DIGITS) or 0
    return math.max(0, first - limits.lease - limits.margin), 0, 0, ''
  end
  return count, till, newest, texts[4]
end

-- The count at which a lease ends that is given now.
local given_until
local function lease_end()
  if not given_until then
    given_until = swept() + limits.lease + limits.margin
  end
  return given_until
end

-- A record that is no hash cannot be read, and its entity must not be lost for that: what was pending is evaluated,
-- after the lease that a worker may have.
local function rebuild(key, id)
  redis.call('DEL', key)
  local scores, found = {}, nil
  for _, status in ipairs({ PARKED, SENT, RUNNING, IDLE, FAILED }) do
    scores[status] = redis.call('ZSCORE', status, id)
    found = found or scores[status] and status
  end
  redis.call('ZREM', LONG, id)
  if not found then
    redis.call('ZREM', FAILING, id)
    return
  end
  redis.call('HSET', key, 'error', 'damaged in the index: the whole record')
  if found ~= FAILED then
    redis.call('ZADD', FAILING, 'NX', digits(now), id)
  end
  if found ~= IDLE and found ~= FAILED then
    local deadline = found == RUNNING and now + limits.lease or number(scores[PARKED], NUMBER_DIGITS) or now
    redis.call('HSET', key, 'deadline', digits(deadline), 'noted', '1') -- if there was a note, it is there
    redis.call('ZREM', found, id)
    redis.call('ZREM', SUSPECT, id)
    redis.call('ZADD', PARKED, digits(deadline), id)
  end
end

local function read(key, id)
  local flat = redis.pcall('HGETALL', key)
  if flat.err then
    if string.find(flat.err, 'WRONGTYPE', 1, true) then
      rebuild(key, id)
    end
    flat = redis.call('HGETALL', key)
  end
  return flat
end

-- Keeps an entity in a sorted set as long as something is so.
local function keep_in(set, entity, was_so, is_so, score)
  if is_so and not was_so then
    redis.call('ZADD', set, score, entity.id)
  elseif was_so and not is_so then
    redis.call('ZREM', set, entity.id)
  end
end

-- When a run began: its lease is the time in microseconds.
local function began(lease)
  return digits(math.floor(tonumber(lease) / 1000))
end

local changed, gone = {}, {} -- for `save`: tables that grow anew for every entity are a tenth of what a batch costs

-- Writes the fields that changed, and moves the entity to the sorted set of its new status. Without a score the
-- entity stays where it is.
local function save(entity, status, score)
  local fields, stored = entity.fields, entity.stored
  local c, g = 0, 0
  for name, value in pairs(fields) do
    local text = NUMBERS[name] and digits(value) or value
    if text ~= stored[name] then
      changed[c + 1], changed[c + 2] = name, text
      c = c + 2
    end
  end
  for name in pairs(stored) do
    if fields[name] == nil then
      g = g + 1
      gone[g] = name
    end
  end
  if c > 0 then
    redis.call('HSET', entity.key, unpack(changed, 1, c))
  end
  if g > 0 then
    redis.call('HDEL', entity.key, unpack(gone, 1, g))
  end
  if entity.status and entity.status ~= status then
    redis.call('ZREM', entity.status, entity.id)
    if entity.status == SENT then
      redis.call('ZREM', SUSPECT, entity.id)
    end
  end
  if score then
    redis.call('ZADD', status, score, entity.id)
  end
  if fields.error or stored.error then
    local was_failing = stored.error and entity.status ~= FAILED
    keep_in(FAILING, entity, was_failing, fields.error and status ~= FAILED, digits(now))
  end
  if fields.long or stored.long then
    keep_in(LONG, entity, stored.long, fields.long, fields.lease and began(fields.lease))
  end
  entity.status = status
end

-- A delay is a delay: if the clock was set back behind when it was asked for, it begins anew. What was due is due.
local function since_now(fields, name, asked)
  if not fields[asked] or fields[asked] <= now then
    return false
  end
  fields[name] = fields[name] and now + math.max(0, fields[name] - fields[asked])
  fields[asked] = now
  return true
end

local function not_later(fields, name)
  local later = fields[name] and fields[name] > now
  if later then
    fields[name] = now
  end
  return later
end

-- Saved at once: set afresh by whoever looks next, a retry would never come.
local function set_afresh(entity)
  local fields = entity.fields
  local pending = since_now(fields, 'deadline', 'asked')
  local own = since_now(fields, 'own', 'own_asked')
  local floor = since_now(fields, 'floor', 'finished')
  local since, due = not_later(fields, 'since'), not_later(fields, 'due')
  if pending or own or floor or since or due then
    local scored = entity.status == PARKED or entity.status == SENT
    save(entity, entity.status, scored and fields.deadline or nil)
    entity.stored = {}
    for name, value in pairs(fields) do
      entity.stored[name] = NUMBERS[name] and digits(value) or value
    end
  end
end

-- The entity of the n-th row: its id, its fields (numbers as numbers), its status or nil. A number that is none counts
-- as 0, so that what was due is due; until the next evaluation ends, the error names the field.
local function open(n, id)
  local key, note_key = KEYS[SHARD_KEYS + n], KEYS[SHARD_KEYS + #rows + n]
  local entity = { id = id, key = key, note_key = note_key, stored = {}, fields = {} }
  entity.history_key, entity.whereabouts_key = KEYS[SHARD_KEYS + 2 * #rows + n], KEYS[SHARD_KEYS + 3 * #rows + n]
  local flat = read(entity.key, id)
  local fields, damaged = entity.fields, nil
  for i = 1, #flat, 2 do
    local name, value = flat[i], flat[i + 1]
    entity.stored[name] = value
    if NUMBERS[name] then
      fields[name] = number(value, NUMBER_DIGITS)
    elseif not TOKENS[name] or number(value, TOKEN_DIGITS) then
      fields[name] = value
    end
    if fields[name] == nil then
      fields[name] = NUMBERS[name] and 0 or '0'
      damaged = (damaged and damaged .. ', ' or '') .. name
    end
  end
  if damaged then
    if fields.deadline == 0 then
      fields.deadline = number(redis.call('ZSCORE', PARKED, id), NUMBER_DIGITS) or 0 -- it is there, too
    end
    fields.error = 'damaged in the index: ' .. damaged
  end
  if fields.lease then
    entity.status = RUNNING
  elseif fields.token then
    entity.status = SENT
  elseif fields.deadline then
    entity.status = PARKED
  elseif #flat > 0 then
    entity.status = redis.call('ZSCORE', FAILED, id) and FAILED or IDLE
  end
  if entity.status then
    set_afresh(entity)
  end
  return entity
end

-- What the last enqueue that changed the deadline noted is kept while anything is pending or runs, in a key of its own:
-- who has no use for it does not read it.
local function keep_note(entity, note)
  if note then
    redis.call('SET', entity.note_key, note)
  elseif entity.fields.noted then
    redis.call('DEL', entity.note_key)
  end
  entity.fields.noted = note and '1' or nil
end

-- nil if there is none, or if it was evicted or is no text.
local function note_of(entity)
  local note = entity.fields.noted and redis.pcall('GET', entity.note_key)
  return type(note) == 'string' and note or nil
end

local function with_note(entity, message)
  if message then
    message.note = note_of(entity)
  end
  return message
end

-- A history that is left behind expires, and nobody reads one that the record does not know of.
local function forget_history(entity)
  if entity.fields.history and entity.history_key then
    redis.call('DEL', entity.history_key)
  end
  entity.fields.history = nil
end

local function remove(entity)
  keep_note(entity, nil)
  forget_history(entity)
  keep_in(FAILING, entity, entity.stored.error and entity.status ~= FAILED)
  keep_in(LONG, entity, entity.stored.long)
  redis.call('DEL', entity.key)
  redis.call('ZREM', entity.status, entity.id)
  if entity.status == SENT then
    redis.call('ZREM', SUSPECT, entity.id)
  end
end

-- The name of an entity whose record is gone, evicted by a Redis that may evict, would be in every sweep's way.
local function strike_out(entity, status)
  if not entity.status then
    for _, set in ipairs({ status, FAILING, LONG, status == SENT and SUSPECT or nil }) do
      redis.call('ZREM', set, entity.id)
    end
  end
end

-- What a sorted set has for an entity; nil if that is no time and no count.
local function score_of(entity, set)
  return number(redis.call('ZSCORE', set or entity.status, entity.id), NUMBER_DIGITS)
end

-- When the message of an entity that is sent is missed.
local function suspect_from(entity, time)
  redis.call('ZADD', SUSPECT, time, entity.id)
end

-- No message that was sent by now is missed later than that.
local function latest_suspicion()
  return now + limits.eta_horizon + limits.resend_after * limits.resend_intervals
end

-- The token of the last `delete_all`, while it goes on: every life that began before it is over. 0: none goes on.
local all_deleted, already_met
local function deleted_before()
  if not all_deleted then
    local token, met = string.match(shard.all_deleted or '', '^(%d+) (%d+)$')
    all_deleted, already_met = tonumber(token) or 0, tonumber(met) or 0
  end
  return all_deleted
end

-- A life begins, which no `delete_all` that goes on already is about.
local function begin_life(entity)
  entity.fields.born = deleted_before() > 0 and digits(deleted_before()) or nil
end

local function delete_running(entity)
  local fields = entity.fields
  local known = not fields.deleted or fields.deadline ~= nil
  fields.deleted = '1'
  fields.deadline, fields.asked, fields.since, fields.own, fields.own_asked = nil, nil, nil, nil, nil
  fields.error, fields.long = nil, nil
  begin_life(entity)
  keep_note(entity, nil)
  forget_history(entity)
  save(entity, RUNNING)
  return known
end

-- Reply: whether it was known.
local function delete(entity)
  if not entity.status then
    return false
  elseif entity.status == RUNNING then
    return delete_running(entity)
  end
  remove(entity)
  return true
end

-- The entity of the n-th row, but nothing of a life that `delete_all` has ended: that is deleted where it is met.
local met = 0
local function alive(entity, n)
  if entity.status and (tonumber(entity.fields.born) or 0) < deleted_before() then
    met = met + (delete(entity) and 1 or 0)
    entity = open(n, entity.id)
  end
  if not entity.status then
    begin_life(entity)
  end
  return entity
end

-- What is counted in this call, in order, and of which action it is: written when the call ends.
local counters, counts, actions = {}, {}, {}

-- One that is damaged begins anew, with all others, as after a restart of the server.
local function add(counter, n)
  local total = redis.pcall('HINCRBY', METRICS, counter, n)
  if type(total) == 'number' then
    return total
  end
  redis.call('DEL', METRICS)
  return redis.call('HINCRBY', METRICS, counter, n)
end

-- Whether an action is counted by its name: the first ones are, or one that is named anew each time would fill the index.
local function is_named(action)
  if redis.call('HGET', METRICS, 'named:' .. action) then
    return true
  elseif (tonumber(redis.call('HGET', METRICS, 'named')) or 0) >= MOST_ACTIONS then
    return false
  end
  add('named:' .. action, 1)
  add('named', 1)
  return true
end

-- See counters.py. The name of a counter of an action ends with that of the action.
local function count(counter, n, action)
  if not limits.metrics or n == 0 then
    return
  end
  counter = action and counter .. action or counter
  if not counts[counter] then
    counters[#counters + 1], counts[counter], actions[counter] = counter, 0, action
  end
  counts[counter] = counts[counter] + n
end

local function write_counts()
  for _, counter in ipairs(counters) do
    local n, action = counts[counter], actions[counter]
    local is_new = add(counter, n) == n
    if is_new and action and not is_named(action) then
      redis.call('HDEL', METRICS, counter)
      add(string.sub(counter, 1, -#action - 1) .. OTHER, n)
    end
  end
end

-- The name of a histogram's bucket.
local function bound_of(milliseconds)
  for _, bound in ipairs(BOUNDS) do
    if milliseconds <= bound then
      return bound
    end
  end
  return MORE
end

local function each(transition)
  local replies = {}
  for n, row in ipairs(rows) do
    replies[n] = transition(alive(open(n, row.id), n), row)
  end
  if last_token < last_reserved then
    redis.call('SET', TOKEN, digits(last_token))
  end
  if met > 0 then
    redis.call('SET', ALL_DELETED, digits(all_deleted) .. ' ' .. digits(already_met + met))
  end
  write_counts()
  return cjson.encode(replies)
end

local function under_way()
  return redis.call('ZCARD', SENT)
end

local function is_near(deadline)
  return deadline <= now + limits.eta_horizon
end

local function earliest(...)
  local found
  for i = 1, select('#', ...) do
    local deadline = select(i, ...)
    if deadline and (not found or deadline < found) then
      found = deadline
    end
  end
  return found
end

-- There is no wake-up under way any more, or none that counts; a retry keeps its task id.
local function forget_message(entity)
  local fields = entity.fields
  fields.token, fields.resends, fields.resent = nil, nil, nil
  if not fields.retries then
    fields.task_id = nil
  end
end

local function forget_pending(entity)
  local fields = entity.fields
  fields.retries = nil
  forget_message(entity)
  fields.deadline, fields.asked, fields.since, fields.floor = nil, nil, nil, nil
end

-- Reply: the message to publish.
local function wakeup(entity, shortest)
  local fields = entity.fields
  return {
    token = fields.token,
    delay = math.max(shortest or 0, fields.deadline - now),
    task_id = fields.task_id or '',
    retries = fields.retries,
    resent_at = fields.resent,
    alone = fields.alone and true,
  }
end

local function send(entity, task_id)
  local fields = entity.fields
  fields.token = next_token()
  if not fields.retries then
    fields.task_id = task_id
  end
  save(entity, SENT, fields.deadline)
  suspect_from(entity, math.max(fields.deadline, now) + limits.resend_after)
  return wakeup(entity)
end

local function park(entity)
  forget_message(entity)
  save(entity, PARKED, entity.fields.deadline)
end

-- Half of the window is kept for the sweeper's promotions, so that those who enqueue now never starve those who have
-- waited for long.
local function has_room(entity)
  local others = under_way() - (entity.status == SENT and 1 or 0)
  return others < math.floor((limits.window + 1) / 2)
end

-- Puts a pending evaluation where it belongs: sent, with a new token, or parked.
local function place(entity, deadline, task_id)
  entity.fields.deadline = deadline
  if is_near(deadline) and not paused() and has_room(entity) then
    return send(entity, task_id)
  end
  save(entity, PARKED, deadline)
end

-- Reply: what `enqueue` replies.
local function scheduled(changed, deadline, message)
  return { changed = changed, deadline = deadline and digits(deadline), wakeup = message }
end

-- The entity's own evaluation is asked for by itself: only noted; `finish` acts on it.
local function note_own(entity, deadline, note)
  local fields = entity.fields
  local before = earliest(fields.deadline, fields.own)
  if fields.own ~= deadline then
    fields.own, fields.own_asked = deadline, now
  end
  local after = earliest(fields.deadline, fields.own)
  if after ~= before then
    keep_note(entity, note)
  end
  save(entity, RUNNING)
  return scheduled(after ~= before, after)
end

-- The word of an evaluation that is not the one in force (any more): one more evaluation follows, unless one that
-- starts after this word is pending already.
local function again(entity, deadline, task_id, note)
  local fields, status = entity.fields, entity.status
  if status == RUNNING and not fields.deleted then
    return note_own(entity, earliest(fields.own, deadline), note)
  elseif status == IDLE then
    fields.rounds, fields.task_id, fields.asked = nil, nil, now
    keep_note(entity, note)
    return scheduled(true, deadline, place(entity, deadline, task_id))
  elseif status == SENT and fields.task_id == task_id then
    return scheduled(true, fields.deadline, wakeup(entity)) -- the first reply was lost
  elseif status == PARKED or status == SENT then
    return scheduled(false, fields.deadline)
  end
  return scheduled(false)
end

-- Reply: the lease that a claim holds. If the claim is repeated it lasts from then.
local function claimed(entity)
  local fields = entity.fields
  save(entity, RUNNING, lease_end())
  return {
    lease = fields.lease,
    failures = fields.failures or 0,
    rounds = fields.rounds or 0,
    deadline = fields.due,
    lateness = math.max(0, now - fields.due),
  }
end

local function lease(entity, batch)
  local fields = entity.fields
  local due = fields.deadline
  forget_pending(entity)
  fields.lease, fields.nonce, fields.due, fields.task_id = next_token(), header.nonce, due, header.task_id
  fields.batch = batch and not fields.alone and '1' or nil
  return claimed(entity)
end
