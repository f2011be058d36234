-- Lets the transition that follows run on a server whose memory is full (`maxmemory`). Redis refuses what could
-- grow, but only as a script's first write; so the first one is this, of nothing. On Redis 6, too, which does
-- not know the flag allow-oom.
redis.call('ZREM', IDLE, '')
