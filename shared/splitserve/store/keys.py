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

# KEYS[1] = req key; ARGV = owner, seq, ttl in ms, and field, value, … as one JSON list: redis-py packs each argument by
# itself, which cost the router more than making them. Answers 1 written or already there, 0 refused.
SAVE_LUA = """
local have = redis.call('HMGET', KEYS[1], 'owner', 'seq', 'final')
if have[1] then
  if have[1] ~= ARGV[1] then return 0 end
  if tonumber(have[2]) == tonumber(ARGV[2]) then return 1 end
  if have[3] == '1' or tonumber(have[2]) > tonumber(ARGV[2]) then return 0 end
end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'seq', ARGV[2], unpack(cjson.decode(ARGV[4])))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of one cluster."""

    cluster: str = "default"

    def request(self, rid: str) -> str:
        return f"ss:{self.cluster}:req:{rid}"

    def router(self, router: str) -> str:
        return f"ss:{self.cluster}:router:{router}"
