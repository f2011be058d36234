-- Forgets entities; one that is running is marked, and kept until its evaluation ends, so that a new enqueue
-- cannot overlap the old run.
--
-- KEYS   see common.lua; histories
-- Row    id
-- Reply  whether it was known
-- Reads  deleted, deadline. Writes deleted, born; clears deadline, asked, since, own, own_asked, error,
--        long, noted, history

return each(delete)
