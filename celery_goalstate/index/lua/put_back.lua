-- Parks entities whose wake-ups could not be published, unless something else happened since.
--
-- KEYS   see common.lua
-- Row    id · token that could not be published
-- Reply  whether it was parked
-- Reads  token. Clears token, resends, resent; task_id unless the evaluation is a retry

local function is_expected(entity, token)
  return entity.status == SENT and entity.fields.token == token
end

local function put_back(entity, message)
  if not is_expected(entity, message.token) then
    return false
  end
  park(entity)
  return true
end

return each(put_back)
