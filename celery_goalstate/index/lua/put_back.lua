-- Parks entities whose wake-ups could not be published, unless something else happened since.
--
-- KEYS   see common.lua
-- Row    id · token that could not be published
-- Reply  whether it was parked
-- Reads  token. Clears token, resends, resent; task_id unless the evaluation is a retry

local function put_back(entity, token)
  if entity.status == SENT and entity.fields.token == token then
    park(entity)
    return true
  end
  return false
end

return each(put_back)
