"""The indexes under test: each with a clock that only the test moves, and a view of everything it stores.

The Redis index reads the time from a key next to its own, in place of the server's `TIME`; nothing else
about it differs from production.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import redis

from celery_goalstate.index.base import Failure, Index, Limits, Status
from celery_goalstate.index.memory import MemoryIndex
from celery_goalstate.index.redis import RedisIndex
from celery_goalstate.index.transitions import NEVER

KINDS = ("order", "host")
PREFIX = "gs"
NAMESPACE = "default"
START = 1_700_000_000_000  # a Tuesday; milliseconds
AUXILIARY = {"form", "token", "paused", "claimed", "sweeper", "all_deleted", "metrics", "testclock"}
#: Sorted sets besides those of statuses: as what their scores are among the fields of a row.
SCORES = {"suspect": "suspect_at", "failing": "failing", "long": "long_since"}


class Clock:
    """The time of an index under test, in milliseconds."""

    def __init__(self, now: int = START) -> None:
        self.now = now
        self.watchers: list[Callable[[int], None]] = []

    def __call__(self) -> int:
        return self.now

    def advance(self, ms: int) -> int:
        """Let time pass; the new time."""
        assert ms >= 0
        return self._set(self.now + ms)

    def step(self, ms: int) -> int:
        """Another machine's clock takes over, which is ahead, or behind; the new time."""
        return self._set(self.now + ms)

    def set_back(self, ms: int) -> int:
        """As `step`, behind."""
        return self.step(-ms)

    def _set(self, now: int) -> int:
        self.now = now
        for watch in self.watchers:
            watch(now)
        return now


@dataclass
class Row:
    """What is stored of one entity: its statuses (one, if all is well), and fields but for their defaults.

    `suspect_at`, which is no field but the score of one more sorted set, is among the fields.
    """

    places: list[tuple[Status, int | None]] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    shard: int = 0

    @property
    def status(self) -> Status:
        """The one place it is in."""
        ((status, _),) = self.places
        return status

    @property
    def score(self) -> int | None:
        """When its status wants attention; None: never."""
        ((_, score),) = self.places
        return score


Stored = dict[tuple[str, str], Row]


class Lane(Protocol):
    """One index under test."""

    name: str
    index: Index
    clock: Clock

    def stored(self) -> Stored:
        """Everything that is stored, by kind and id; fails on anything that is not an index's business."""

    def lose_the_count(self) -> None:
        """The one key that sweepers write is gone: evicted, say."""

    def wipe(self) -> None:
        """Leave nothing for the next one."""


class MemoryLane:
    """The reference."""

    name = "memory"

    def __init__(self, limits: Limits, clock: Clock, shards: int = 1) -> None:
        self.clock = clock
        self.index = MemoryIndex(limits, clock)

    def stored(self) -> Stored:
        rows: Stored = {}
        for kind, shard in self.index._kinds.items():
            for id, entity in shard.entities.items():
                values = {f.name: getattr(entity, f.name) for f in dataclasses.fields(entity)}
                score = values.pop("score")
                place = (values.pop("status"), None if score == NEVER else score)
                assert values.pop("id") == id
                fields = {name: _text(name, value) for name, value in values.items()}
                fields["noted"] = "1" if entity.note else ""
                fields["long_since"] = str(int(entity.lease) // 1000) if entity.long else ""
                fields["history"] = "\n".join(map(_failure_text, entity.history))
                where = entity.whereabouts
                fields["whereabouts"] = f"{where.seen} {where.where}" if where else ""
                rows[kind, id] = Row([place], {name: text for name, text in fields.items() if text})
        return rows

    def lose_the_count(self) -> None:
        for shard in self.index._kinds.values():
            running = shard.with_status(Status.RUNNING)
            first = int(running[0].score) if running else 0
            limits = self.index._limits
            shard.sweeper, shard.swept_until, shard.newest_survey = "", 0, 0
            shard.count = max(0, first - limits.lease - limits.margin)  # as a script makes up for it

    def wipe(self) -> None:
        self.index.close()


def _text(name: str, value: Any) -> str:
    """A field's value as the Redis index stores it; empty: it has its default."""
    if name == "converged":
        return "" if value is None else str(int(value))
    return str(int(value) if isinstance(value, bool) else value) if value else ""


def _failure_text(failure: Failure) -> str:
    return " | ".join(map(str, failure))


class FakeTimeRedisIndex(RedisIndex):
    """The Redis index on a clock that the test moves."""

    def clock_lua(self) -> str:
        return """
        local function clock()
          return tonumber(redis.call('GET', (string.gsub(KEYS[1], ':parked$', ':testclock'))))
        end
        """


class RedisLane:
    """The Redis index on one server or on a cluster."""

    def __init__(
        self,
        name: str,
        client: Any,
        limits: Limits,
        clock: Clock,
        shards: int = 1,
        *,
        index_client: Any = None,
    ) -> None:
        """`index_client` is what the index uses, if it is to be another than the one that reads."""
        self.name = name
        self.client = client
        self.clock = clock
        self.shards = shards
        self.index = FakeTimeRedisIndex(
            index_client or client, limits, namespace=NAMESPACE, key_prefix=PREFIX, shards=shards
        )
        self._set_clock(clock.now)
        clock.watchers.append(self._set_clock)

    def _set_clock(self, now: int) -> None:
        with self.client.pipeline(transaction=False) as pipeline:
            for kind in KINDS:
                for shard in range(self.shards):
                    pipeline.set(f"{PREFIX}:{{{NAMESPACE}:{kind}:{shard}}}:testclock", now)
            pipeline.execute()

    def stored(self) -> Stored:
        rows: Stored = {}
        histories: dict[tuple[str, str], Any] = {}
        whereabouts: dict[tuple[str, str], Any] = {}
        for key, kind_of_key, content in self._dump():
            if key == f"{PREFIX}:{{{NAMESPACE}}}:kinds":
                assert content <= set(KINDS)
                continue
            namespace, kind, shard, rest = _parse(key)
            assert namespace == NAMESPACE, f"stray key {key}"
            assert kind in KINDS, f"stray key {key}"
            assert 0 <= shard < self.shards, f"stray key {key}"
            if rest.startswith("e:"):
                assert kind_of_key == "hash", key
                id = rest[2:]
                assert self.index._shard(id) == shard, f"{key} is in the wrong shard"
                fields = {name: text for name, text in content.items() if text}
                rows.setdefault((kind, id), Row(shard=shard)).fields.update(fields)
            elif rest.startswith("n:"):
                assert kind_of_key == "string", key
                rows.setdefault((kind, rest[2:]), Row(shard=shard)).fields["note"] = content
            elif rest in SCORES:
                assert kind_of_key == "zset", key
                for id, score in content:
                    rows.setdefault((kind, id), Row(shard=shard)).fields[SCORES[rest]] = str(int(score))
            elif rest.startswith("h:"):
                assert kind_of_key == "list", key
                histories[kind, rest[2:]] = [json.loads(text) for text in content]
            elif rest.startswith("w:"):
                assert kind_of_key == "string", key
                whereabouts[kind, rest[2:]] = json.loads(content)
            elif rest in set(Status):
                assert kind_of_key == "zset", key
                for id, score in content:
                    place = (Status(rest), None if score == float("inf") else int(score))
                    rows.setdefault((kind, id), Row(shard=shard)).places.append(place)
            else:
                assert rest in AUXILIARY, f"stray key {key}"
        self._add_what_expires(rows, histories, whereabouts)
        return rows

    @staticmethod
    def _add_what_expires(
        rows: Stored, histories: dict[tuple[str, str], Any], whereabouts: dict[tuple[str, str], Any]
    ) -> None:
        """To the records that know of it: what an earlier life or run has left is nobody's."""
        for name, row in rows.items():
            if "history" in row.fields:
                row.fields["history"] = "\n".join(
                    _failure_text(
                        Failure(
                            int(each["at"]),
                            each.get("state", ""),
                            each.get("step", ""),
                            each.get("took"),
                            each["error"],
                            each.get("task_id", ""),
                        )
                    )
                    for each in histories[name]
                )
            where = whereabouts.get(name)
            if where and "long" in row.fields and where["lease"] == row.fields["lease"]:
                row.fields["whereabouts"] = f"{where['seen']} {where['where']}"

    def _dump(self) -> Iterator[tuple[str, str, Any]]:
        if isinstance(self.client, redis.RedisCluster):
            for key in self.client.scan_iter(count=1000):
                kind = self.client.type(key)
                if kind == "hash":
                    yield key, kind, self.client.hgetall(key)
                elif kind == "zset":
                    yield key, kind, self.client.zrange(key, 0, -1, withscores=True)
                elif kind == "set":
                    yield key, kind, self.client.smembers(key)
                elif kind == "list":
                    yield key, kind, self.client.lrange(key, 0, -1)
                else:
                    yield key, kind, self.client.get(key)
            return
        for key, kind, flat in self.client.eval(_DUMP, 0):
            if kind in {"set", "string", "list"}:
                yield key, kind, set(flat) if kind == "set" else flat
                continue
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
            yield key, kind, dict(pairs) if kind == "hash" else [(id, float(score)) for id, score in pairs]

    def lose_the_count(self) -> None:
        for key in list(self.client.scan_iter("*:sweeper")):
            self.client.delete(key)

    def wipe(self) -> None:
        if isinstance(self.client, redis.RedisCluster):
            self.client.flushall(target_nodes=redis.RedisCluster.PRIMARIES)
        else:
            self.client.flushall()


_DUMP = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind = redis.call('TYPE', key).ok
  local content = {}
  if kind == 'string' then content = redis.call('GET', key) end
  if kind == 'set' then content = redis.call('SMEMBERS', key) end
  if kind == 'list' then content = redis.call('LRANGE', key, 0, -1) end
  if kind == 'hash' then content = redis.call('HGETALL', key) end
  if kind == 'zset' then content = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end
  found[#found + 1] = {key, kind, content}
end
return found
"""


def _parse(key: str) -> tuple[str, str, int, str]:
    """`gs:{default:order:0}:e:42` -> default, order, 0, e:42."""
    head, _, rest = key.partition("}:")
    prefix, _, tag = head.partition(":{")
    assert prefix == PREFIX, f"stray key {key}"
    namespace, kind, shard = tag.split(":")
    return namespace, kind, int(shard), rest


# -- what must hold at any moment

_ALWAYS_ALLOWED = {
    *("task_id", "failures", "rounds", "error", "converged", "finished", "last", "born"),
    *("failing", "history", "state", "goal", "step"),
}
_NOTE = {"note", "noted"}
_PENDING = {"deadline", "asked", "since", "floor", "retries", "alone", *_NOTE}
_CLAIMED = {
    *("lease", "nonce", "due", "deadline", "asked", "since", "own", "own_asked", "deleted", "batch", "alone"),
    *("long", "long_since", "whereabouts"),
    *_NOTE,
}
_ALLOWED = {
    Status.PARKED: _ALWAYS_ALLOWED | _PENDING,
    Status.SENT: _ALWAYS_ALLOWED | _PENDING | {"token", "resends", "resent", "suspect_at"},
    Status.RUNNING: _ALWAYS_ALLOWED | _CLAIMED,
    Status.IDLE: _ALWAYS_ALLOWED,
    Status.FAILED: _ALWAYS_ALLOWED | {"alone"},
}
_NEEDED = {
    Status.PARKED: {"deadline"},
    Status.SENT: {"deadline", "token", "suspect_at"},
    Status.RUNNING: {"lease", "nonce", "due"},
    Status.IDLE: {"finished"},
    Status.FAILED: {"finished"},
}


def check(stored: Stored) -> None:
    """The invariants of `index.base`, on everything that is stored."""
    tokens: list[tuple[str, int, str]] = []
    for (kind, id), row in stored.items():
        where = f"{kind}/{id}: {row}"
        assert len(row.places) == 1, f"an entity has exactly one status; {where}"
        allowed, needed = _ALLOWED[row.status], _NEEDED[row.status]
        assert row.fields.keys() <= allowed, f"{row.fields.keys() - allowed} has no place here; {where}"
        assert row.fields.keys() >= needed, f"{needed - row.fields.keys()} is missing; {where}"
        for name in ("token", "lease"):
            if name in row.fields:
                assert row.fields[name].isdecimal(), f"the {name} is a number in digits; {where}"
                tokens.append((kind, row.shard, row.fields[name]))
        if row.status in {Status.PARKED, Status.SENT}:
            assert row.score == int(row.fields["deadline"]), f"in order of its deadline; {where}"
        is_failing = "error" in row.fields and row.status is not Status.FAILED
        assert ("failing" in row.fields) == is_failing, f"what has an error and is not quarantined; {where}"
        assert ("long" in row.fields) == ("long_since" in row.fields), f"listed if renewed; {where}"
        assert ("noted" in row.fields) == ("note" in row.fields), f"a note is kept if one is known; {where}"
        assert (row.score is None) <= (row.status is Status.IDLE), f"only idle ones wait for ever; {where}"
    assert len(set(tokens)) == len(tokens), f"a token names one wake-up or one run: {sorted(tokens)}"
