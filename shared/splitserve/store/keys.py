"""Every Redis key, its age, and the one Lua script that writes a request's state (commands of Redis 6.2 only).

| key (`ss:{cluster}:`) | type | what | lives |
|---|---|---|---|
| `req:{rid}` | hash | a request's state, owner and seq | 2x its deadline while live; 600 s once terminal |
| `router:{id}` | string | a router's incarnation, set every 1.5 s | 5 s |
"""

from __future__ import annotations

from dataclasses import dataclass

TERMINAL_TTL_S = 600.0
PRESENCE_TTL_S = 5.0
PRESENCE_EVERY_S = 1.5

# KEYS = req keys; ARGV[1] = for each {owner, seq, ttl in ms, {field, value, …}}, as one JSON list: redis-py packs each command
# and each argument by itself, which cost the router more than making them. Answers how many were refused; what is already
# there is not.
SAVE_LUA = """
local function save(key, row)
  local owner, seq = row[1], row[2]
  local have = redis.call('HMGET', key, 'owner', 'seq', 'final')
  if have[1] then
    if have[1] ~= owner then return 1 end
    if tonumber(have[2]) == seq then return 0 end
    if have[3] == '1' or tonumber(have[2]) > seq then return 1 end
  end
  redis.call('HSET', key, 'owner', owner, 'seq', string.format('%d', seq), unpack(row[4]))
  redis.call('PEXPIRE', key, string.format('%d', row[3]))
  return 0
end
local refused = 0
for at, row in ipairs(cjson.decode(ARGV[1])) do refused = refused + save(KEYS[at], row) end
return refused
"""


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of one cluster."""

    cluster: str = "default"

    def request(self, rid: str) -> str:
        return f"ss:{self.cluster}:req:{rid}"

    def router(self, router: str) -> str:
        return f"ss:{self.cluster}:router:{router}"
