"""The index on Redis (or Valkey): one Lua script per transition, so each is atomic and one round trip.

A kind is split into shards; a stable hash of the id picks one. All keys of a shard carry the same hash tag
and so lie in one slot of a cluster. `lua/common.lua` says which keys and fields there are.

Each shard has one more key, `form`: in which layout and how many shards its kind is kept. It lies with what
it is about, so that in a cluster no kind depends on another's node. `<prefix>:{<namespace>}:kinds` has the
names of all kinds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, NamedTuple

from redis import Redis, RedisCluster
from redis import exceptions as errors

from celery_goalstate.display import DOCS
from celery_goalstate.exceptions import AccessDenied, ImproperlyConfigured, IndexUnavailable
from celery_goalstate.index.base import (
    BYTES_OF_ERROR,
    Claim,
    DeletedAll,
    Failure,
    Finish,
    Finished,
    Limits,
    Listing,
    Longest,
    Overview,
    Partial,
    Pause,
    Policy,
    Position,
    Record,
    Refusal,
    Refused,
    Report,
    Request,
    Run,
    Running,
    Scheduled,
    Server,
    Status,
    Survey,
    Verdict,
    Wakeup,
    Watch,
    Whereabouts,
    check_notes,
    cut,
    records_after,
)
from celery_goalstate.index.cluster import REDIS_ERRORS, Cluster, NodeAway
from celery_goalstate.index.connection import Command, raise_first, server_of
from celery_goalstate.index.counters import BOUNDS, MORE, MOST_ACTIONS, OTHER, UNKNOWN, Metrics, metrics_of
from celery_goalstate.index.transitions import whole_error

#: Which keys, fields and statuses there are. One more with every change that older processes cannot bear.
LAYOUT = 2

ENTITIES_PER_CALL = 256  #: of a script: a few milliseconds of the server's time
ATTEMPTS = 2  #: a connection that broke is replaced once; the transitions are safe to repeat

#: What passes by itself. Anything else that Redis refuses is a mistake, and raised as it is.
UNAVAILABLE = (
    errors.ConnectionError,
    errors.TimeoutError,
    errors.ReadOnlyError,
    errors.OutOfMemoryError,
    errors.RedisClusterException,
    errors.ClusterError,
    errors.ClusterDownError,
    errors.MasterDownError,
    errors.TryAgainError,
    errors.AskError,
)
#: The same, where the client has no class for it: how the error begins.
UNAVAILABLE_CODES = ("BUSY ", "MISCONF ", "NOREPLICAS ")
#: The errors of a script that may not run one of its commands.
FORBIDDEN = ("ACL failure in script", "The user executing the script can't")
#: The error of a script that would write to a kind which is not kept (any more) as we agreed.
NOT_KEPT = "NOTKEPT "

#: What Redis says to those who give no password.
GIVEN_NONE = ("Authentication required", "already authenticated")

#: The keys of one shard, in the order in which the scripts know them; then come the records, and their notes.
SHARD_KEYS = (
    *("parked", "sent", "running", "idle", "failed", "suspect"),
    *("token", "paused", "claimed", "sweeper", "form", "all_deleted", "failing", "long", "metrics"),
)
#: What the keys of one entity begin with: record, note, history of failures, whereabouts of the run.
ENTITY_KEYS = ("e:", "n:", "h:", "w:")
#: How many of these a script takes, if not two, of which all have a use: keys cost time.
KEYS_OF_EACH = {
    **dict.fromkeys(("delete", "forget", "retire", "running", "adopt"), 3),
    **dict.fromkeys(("renew", "describe"), 4),
}

#: Whatever only goes on with, or ends, what the index knows already goes on when Redis has no memory left.
EVEN_WHEN_FULL = frozenset(
    (
        *("put_back", "claim", "take", "renew", "finish", "delete", "delete_all", "forget_kind"),
        *("survey", "promote", "resend", "running", "forget", "retire"),
    )
)

#: What a script gets to know of one entity, by name: its `id`, and what is neither absent nor the default.
Row = Mapping[str, Any]

NOTHING: Row = {}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_decode = json.JSONDecoder().raw_decode


class _Script(NamedTuple):
    source: str
    sha: str


class _Call(NamedTuple):
    """One run of a script, in one shard."""

    keys: list[bytes]
    payload: str


class RedisIndex:
    """An `Index` on Redis. `client` decodes responses and repeats nothing by itself."""

    def __init__(
        self,
        client: Redis | RedisCluster,
        limits: Limits,
        *,
        namespace: str = "default",
        key_prefix: str = "gs",
        shards: int = 1,
    ) -> None:
        self._client: Any = client
        self._cluster = Cluster(client) if isinstance(client, RedisCluster) else None
        self._servers = self._cluster or server_of(client)
        self._namespace = namespace
        self._key_prefix = key_prefix
        self._shards = shards
        self._limits = limits
        self._scripts: dict[str, _Script] = {}
        self._known_keys: dict[tuple[str, int], list[bytes]] = {}
        self._agreed: set[str] = set()  # kinds that are kept as we would keep them
        self._form = json.dumps({"layout": LAYOUT, "shards": shards})

    # -- kinds

    def note(self, kinds: Iterable[str]) -> None:
        if kinds := list(kinds):
            self._keep(kinds)
            self._commands([("SADD", self._kinds_key, *kinds)])

    def kinds(self) -> list[str]:
        [kinds] = self._commands([("SMEMBERS", self._kinds_key)])
        return sorted(kinds)

    def _keep(self, kinds: Sequence[str]) -> None:
        """Write down how these kinds are kept, wherever that is missing."""
        if missing := self._agree(kinds):
            self._commands([("SET", self._key(*shard, "form"), self._form, "NX") for shard in missing])
            self._agree(kinds)  # another process may have been faster

    def _agree(self, kinds: Sequence[str]) -> list[tuple[str, int]]:
        """The shards that do not know how their kind is kept. One that does is enough to go on.

        Raises `ImproperlyConfigured` if one is kept otherwise than here.
        """
        shards = [(kind, shard) for kind in kinds for shard in range(self._shards)]
        replies = self._replies([("GET", self._key(*shard, "form")) for shard in shards])
        for (kind, _), reply in zip(shards, replies, strict=True):
            if isinstance(reply, str):
                _check_form(kind, reply, self._shards)
                self._agreed.add(kind)
        partial = Partial()
        for shard, reply in zip(shards, replies, strict=True):
            if isinstance(reply, IndexUnavailable):
                if shard[0] not in self._agreed:
                    self._note_away(partial, *shard, reply)
            elif isinstance(reply, Exception):
                raise reply
        partial.raise_if_away(None)
        return [shard for shard, reply in zip(shards, replies, strict=True) if reply is None]

    def _begin(self, kind: str) -> None:
        """A kind that is new here, or was forgotten since."""
        self._keep([kind])
        with suppress(IndexUnavailable):  # its node may be away; sweepers note it again and again
            self._commands([("SADD", self._kinds_key, kind)])

    # -- scheduling

    def enqueue(
        self,
        kind: str,
        requests: Sequence[Request],
        *,
        policy: Policy = Policy.EARLIEST,
        max_wait: int | None = None,
        inside: Run | None = None,
    ) -> list[Scheduled]:
        check_notes(requests)
        if kind not in self._agreed:
            self._begin(kind)
        header = _given(policy=policy, max_wait=max_wait, inside=inside and inside._asdict())
        replies = self._transition_each("enqueue", kind, [_row(request) for request in requests], header)
        if any(isinstance(reply, Exception) for reply in replies):
            # Some shards may have done it. Their wake-ups are not published now: the sweeper is to, at once.
            sent = [
                _wakeup(request.id, reply)
                for request, reply in zip(requests, replies, strict=True)
                if not isinstance(reply, Exception)
            ]
            with suppress(IndexUnavailable):
                self.put_back(kind, [wakeup for wakeup in sent if wakeup])
            raise_first(replies)
        return [
            Scheduled(
                reply["changed"], _number(reply, "deadline"), _wakeup(request.id, reply), reply.get("noted")
            )
            for request, reply in zip(requests, replies, strict=True)
        ]

    def put_back(self, kind: str, wakeups: Sequence[Wakeup]) -> None:
        self._transition("put_back", kind, [{"id": wakeup.id, "token": wakeup.token} for wakeup in wakeups])

    # -- evaluating

    def claim(
        self,
        kind: str,
        wakeups: Sequence[tuple[str, str]],
        *,
        nonce: str,
        task_id: str,
        resent_at: int | None = None,
    ) -> list[Claim | Refusal]:
        header = _given(nonce=nonce, task_id=task_id, resent_at=resent_at, batch=len(wakeups) > 1)
        rows = [{"id": id, "token": token} for id, token in wakeups]
        replies = self._transition_each("claim", kind, rows, header)
        if not _is_answered(replies):
            raise_first(replies)
        return [_claimed(id, reply) for (id, _), reply in zip(wakeups, replies, strict=True)]

    def take(self, kind: str, limit: int, *, nonce: str, task_id: str) -> list[Claim]:
        if kind not in self._agreed:
            self._agree([kind])
        overdue = self._run_each("overdue", self._calls(kind, {"limit": limit}))
        if not _is_answered(overdue):
            raise_first(overdue)
        ids = [id for found in overdue if not isinstance(found, Exception) for id in found][:limit]
        header = {"nonce": nonce, "task_id": task_id}
        replies = self._transition_each("take", kind, _rows(ids), header)
        if ids and not _is_answered(replies):
            raise_first(replies)
        return [
            Claim(id, **reply)
            for id, reply in zip(ids, replies, strict=True)
            if reply and not isinstance(reply, Exception)
        ]

    def renew(
        self, kind: str, runs: Sequence[Run], *, where: Mapping[Run, str] = MappingProxyType({})
    ) -> list[bool]:
        rows = [_given(**run._asdict(), where=where.get(run)) for run in runs]
        return self._transition("renew", kind, rows)

    def finish(self, kind: str, reports: Sequence[Report]) -> list[Finished]:
        if not self._limits.metrics:
            reports = [report._replace(lateness=None, actions=()) for report in reports]
        replies = self._transition("finish", kind, [_row(report) for report in reports])
        return [
            Finished(Finish(reply["result"]), _number(reply, "deadline"), _wakeup(report.id, reply))
            for report, reply in zip(reports, replies, strict=True)
        ]

    # -- what operators do

    def delete(self, kind: str, ids: Sequence[str]) -> list[bool]:
        # One attempt: the second reply would deny what the first call has done.
        return self._transition("delete", kind, _rows(ids), attempts=1)

    def delete_all(self, kind: str) -> DeletedAll:
        if kind not in self._agreed:
            self._agree([kind])
        count, runs, away = 0, [], {}
        for shard, reply in enumerate(self._run_each("delete_all", self._calls(kind))):
            try:
                raise_first([reply])
                runs += self._meet_all(kind, shard)
                last = self._call(kind, shard, (), {"over": reply["token"]})
                # One attempt: the second reply would know of no count any more.
                [over] = replies = self._run_each("delete_all", [last], attempts=1)
                raise_first(replies)
                count += over["count"]
            except IndexUnavailable as error:
                away[shard] = error
        return DeletedAll(count, tuple(sorted(runs)), away)

    def _meet_all(self, kind: str, shard: int) -> list[Running]:
        """Open whatever a shard has, so that nothing stays of lives that are over; the evaluations among it.

        A scan finds all that is there from its beginning to its end, and what is over moves nowhere any more.
        """
        runs = []
        for status in Status:
            cursor = "0"
            while True:
                [(cursor, found)] = self._commands(
                    [("ZSCAN", self._key(kind, shard, status), cursor, "COUNT", ENTITIES_PER_CALL)]
                )
                runs += self.running(kind, [id for id, _ in _pairs(found)])
                if cursor == "0":
                    break
        return runs

    def forget_kind(self, kind: str) -> bool:
        if any(self.counts(kind).values()) or self.paused(kind):
            return False
        forgotten = self._run_each("forget_kind", self._calls(kind))
        raise_first(forgotten)
        self._agreed.discard(kind)
        if all(forgotten):
            self._commands([("SREM", self._kinds_key, kind)])
            forms = [("GET", self._key(kind, shard, "form")) for shard in range(self._shards)]
            if not any(self._commands(forms)):
                return True
        self._begin(kind)  # something was enqueued meanwhile, by who did not forget it
        return False

    def pause(self, kind: str, *, by: str) -> None:
        if kind not in self._agreed:
            self._agree([kind])
        raise_first(self._run_each("pause", self._calls(kind, {"by": by})))

    def resume(self, kind: str) -> None:
        self._commands([("DEL", key) for key in self._keys(kind, "paused")])

    def paused(self, kind: str) -> Pause | None:
        partial = Partial()
        commands = [[("GET", key)] for key in self._keys(kind, "paused")]
        found = [_pause(text) for [text] in self._of_shards(kind, commands, partial) if text is not None]
        if not found:
            partial.raise_if_away(None)
        return min(found, default=None)

    def overviews(self, kinds: Iterable[str]) -> Mapping[str, Overview]:
        shards = [(kind, shard) for kind in kinds for shard in range(self._shards)]
        replies = self._run_each("overview", [self._call(*shard, (), NOTHING) for shard in shards])
        partial, found = Partial(), dict[str, Overview]()
        for kind, reply in self._known(shards, replies, partial):
            overview = _overview(reply)
            found[kind] = found[kind] + overview if kind in found else overview
        partial.raise_if_away(found)
        return found

    def metrics(self, kinds: Iterable[str]) -> Mapping[str, Metrics]:
        shards = [(kind, shard) for kind in kinds for shard in range(self._shards)]
        replies = self._replies([("HGETALL", self._key(*shard, "metrics")) for shard in shards])
        partial, counters = Partial(), defaultdict[str, Counter[str]](Counter)
        for kind, reply in self._known(shards, replies, partial):
            counters[kind].update(_counters(reply))
        found = {kind: metrics_of(of_kind) for kind, of_kind in counters.items()}
        partial.raise_if_away(found)
        return found

    def _known(
        self, shards: Sequence[tuple[str, int]], replies: Sequence[Any], partial: Partial
    ) -> Iterator[tuple[str, Any]]:
        """The replies of those shards that are not away, and their kinds; of the others `partial` is told."""
        for (kind, shard), reply in zip(shards, replies, strict=True):
            try:
                raise_first([reply])
            except IndexUnavailable as error:
                self._note_away(partial, kind, shard, error)
            else:
                yield kind, reply

    def describe(self, kind: str, ids: Sequence[str], *, history: bool = False) -> list[Record | None]:
        replies = self._transition("describe", kind, _rows(ids), _given(history=history or None))
        return [_record(id, reply) for id, reply in zip(ids, replies, strict=True)]

    def records(
        self, kind: str, listing: Status | Listing, limit: int, after: Position | None = None
    ) -> list[Record]:
        partial = Partial()
        records = records_after(
            after,
            listing,
            limit,
            page=lambda size, after: self._page(kind, listing, size, after, partial),
            describe=lambda ids: self.describe(kind, ids),
        )
        partial.raise_if_away(records)
        return records

    def _page(
        self, kind: str, listing: Status | Listing, size: int, after: Position | None, partial: Partial
    ) -> list[Position]:
        """Ids and scores are all that is needed to merge the shards."""
        if kind not in self._agreed:
            self._agree([kind])
        last = after and {"score": f"{after.score:.0f}", "id": after.id}
        pages = self._run_each("page", self._calls(kind, _given(listing=listing, limit=size, after=last)))
        answers = self._answers(kind, [[page] for page in pages], partial)
        found = [Position(float(score), id) for [page] in answers for id, score in page]
        return sorted(found, key=lambda each: (each.score, each.id.encode()))[:size]

    def counts(self, kind: str) -> Mapping[Status, int]:
        keys = zip(*(self._keys(kind, status) for status in Status), strict=True)
        partial = Partial()
        commands = [[("ZCARD", key) for key in of_shard] for of_shard in keys]
        replies = self._of_shards(kind, commands, partial)
        counts = dict(zip(Status, map(sum, zip(*replies, strict=True)), strict=True))
        partial.raise_if_away(counts)
        return counts

    def _of_shards(
        self, kind: str, commands: Sequence[Sequence[Command]], partial: Partial
    ) -> list[list[Any]]:
        """What the shards reply to their commands, but for those that are away, of which `partial` is told.

        Raises `IndexUnavailable` if none answers.
        """
        replies = iter(self._replies([command for of_shard in commands for command in of_shard]))
        return self._answers(kind, [[next(replies) for _ in of_shard] for of_shard in commands], partial)

    def _answers(self, kind: str, replies: Sequence[list[Any]], partial: Partial) -> list[list[Any]]:
        """The replies of those shards that are not away; the others `partial` is told of."""
        answers = []
        for shard, its_replies in enumerate(replies):
            try:
                raise_first(its_replies)
            except IndexUnavailable as error:
                self._note_away(partial, kind, shard, error)
            else:
                answers.append(its_replies)
        if not answers:
            partial.raise_if_away(None)
        return answers

    def _note_away(self, partial: Partial, kind: str, shard: int, error: IndexUnavailable) -> None:
        """A shard is away. Raises the error if that is no part of the index, but all of it."""
        if self._cluster is None:
            raise error
        partial.away[f"{kind} (shard {shard})"] = error

    # -- what the sweeper does

    def holds(self, kinds: Iterable[str], *, sweeper: str) -> Mapping[tuple[str, int], str]:
        shards = [(kind, shard) for kind in kinds for shard in range(self._shards)]
        keys = [self._key(*shard, "sweeper") for shard in shards]
        if not keys:
            return {}
        if self._cluster:  # whose nodes take no command about several slots
            replies = self._replies([("GET", key) for key in keys])
            if all(isinstance(reply, Exception) for reply in replies):
                raise_first(replies)
        else:
            [replies] = self._commands([("MGET", *keys)])
        return {
            shard: "" if reply is None or reply.endswith(f" {sweeper}") else reply
            for shard, reply in zip(shards, replies, strict=True)
            if not isinstance(reply, Exception)
        }

    def survey(
        self,
        kinds: Iterable[str],
        *,
        sweeper: str,
        hold: int,
        limit: int,
        watched: Mapping[tuple[str, int], Watch] = MappingProxyType({}),
        leave_out: Container[tuple[str, int]] = (),
    ) -> list[Survey]:
        shards = [(kind, shard) for kind in kinds for shard in range(self._shards)]
        asked = [shard for shard in shards if shard not in leave_out]
        surveys: list[Survey] = []
        header = {"sweeper": sweeper, "hold": hold, "limit": limit}
        calls = [
            self._call(*shard, (), {**header, **_given(watch=_watch(watched.get(shard)))}) for shard in asked
        ]
        replies = self._run_each("survey", calls)
        for shard, reply in zip(asked, replies, strict=True):
            if isinstance(reply, Exception):
                surveys.append(Survey(*shard, error=reply))
            elif reply:
                surveys.append(_survey(*shard, reply))
        if len(asked) == len(shards) and all(isinstance(reply, Exception) for reply in replies):
            raise_first(replies)
        return surveys

    def promote(self, kind: str, requests: Mapping[str, str]) -> list[Wakeup]:
        replies = self._transition("promote", kind, _with_task_ids(requests))
        return _wakeups(requests, replies)

    def resend(self, kind: str, requests: Mapping[str, str], *, probe: str | None) -> list[Wakeup]:
        replies = self._transition("resend", kind, _with_task_ids(requests), _given(probe=probe))
        return _wakeups(requests, replies)

    def running(self, kind: str, ids: Sequence[str]) -> list[Running]:
        replies = self._transition("running", kind, _rows(ids))
        return [Running(id, **reply) for id, reply in zip(ids, replies, strict=True) if reply]

    def forget(self, kind: str, ids: Sequence[str]) -> int:
        return sum(self._transition("forget", kind, _rows(ids)))

    # -- moving

    def as_kept(self, kind: str) -> RedisIndex | None:
        commands = [[("GET", self._key(kind, shard, "form"))] for shard in range(self._shards)]
        partial = Partial()
        forms = [form for [form] in self._of_shards(kind, commands, partial)]
        form = next((form for form in forms if form is not None), None)
        if form is None:  # a shard that is away says nothing
            partial.raise_if_away(None)
            return None
        other = copy.copy(self)
        other._shards = _known_shards(kind, form)
        other._form = json.dumps({"layout": LAYOUT, "shards": other._shards})
        other._known_keys, other._agreed, other._scripts = {}, set(), {}
        return other

    def adopt(self, kind: str, records: Sequence[Record]) -> None:
        if kind not in self._agreed:
            self._begin(kind)
        self._transition("adopt", kind, [_as_adopted(record) for record in records])

    def retire(self, kind: str, records: Sequence[Record]) -> list[bool]:
        rows = [
            _given(id=each.id, deadline=_digits(each.deadline), finished=_digits(each.finished))
            for each in records
        ]
        return self._transition("retire", kind, rows)

    def servers(self) -> list[Server]:
        client = self._client
        nodes: list[Any] = client.get_primaries() if self._cluster else [None]
        try:
            return [self._server(node) for node in nodes]
        except REDIS_ERRORS as error:
            raise in_our_words(error) from error

    def _server(self, node: Any) -> Server:
        target = {} if node is None else {"target_nodes": node}
        seconds, microseconds = self._client.time(**target)
        try:
            said = self._client.info("persistence", **target)
        except errors.NoPermissionError:
            said = {}
        saves = bool(said.get("aof_enabled") or said.get("rdb_saves")) if said else None
        name = "its server" if node is None else node.name
        return Server(name, seconds * 1000 + microseconds // 1000, saves)

    def evicts(self) -> str:
        # INFO, since CONFIG is what managed servers forbid. No key of the index has a time to live, so the
        # policies `volatile-...` drop none.
        target = {"target_nodes": "primaries"} if isinstance(self._client, RedisCluster) else {}
        try:
            found = self._client.info("memory", **target)
        except REDIS_ERRORS:
            return ""  # not allowed to know, or away, which other calls find out
        for node in found.values() if target else [found]:
            policy = str(node.get("maxmemory_policy", ""))
            if policy.startswith("allkeys"):
                return policy
        return ""

    def close(self) -> None:
        self._client.close()

    # -- keys and scripts

    def _key(self, kind: str, shard: int, name: str) -> str:
        return f"{self._key_prefix}:{{{self._namespace}:{kind}:{shard}}}:{name}"

    def _keys(self, kind: str, name: str) -> list[str]:
        """One key in each shard, once it is known that there are no others."""
        if kind not in self._agreed:
            self._agree([kind])
        return [self._key(kind, shard, name) for shard in range(self._shards)]

    @property
    def _kinds_key(self) -> str:
        return f"{self._key_prefix}:{{{self._namespace}}}:kinds"

    def _shard(self, id: str) -> int:
        return zlib.crc32(id.encode()) % self._shards

    def clock_lua(self) -> str:
        """The Lua function `clock`; the tests put theirs in its place."""
        return _lua("clock")

    def _script(self, name: str) -> _Script:
        if name not in self._scripts:
            full = [_lua("full")] if name in EVEN_WHEN_FULL else []
            constants = f"{_limits_lua(self._limits)}\n{_COUNTERS_LUA}\nlocal form = [[{self._form}]]"
            source = "\n".join([self.clock_lua(), constants, _lua("common"), *full, _lua(name)])
            sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
            self._scripts[name] = _Script(source, sha)
        return self._scripts[name]

    def _call(self, kind: str, shard: int, rows: Sequence[Row], header: Row, keys_of_each: int = 2) -> _Call:
        known = self._shard_keys(kind, shard)
        keys = known[len(ENTITY_KEYS) :]
        ids = [row["id"].encode() for row in rows]
        for beginning in known[:keys_of_each]:
            keys += [beginning + id for id in ids]
        return _Call(keys, _encode({"header": header, "rows": rows}))

    def _calls(self, kind: str, header: Row = NOTHING) -> list[_Call]:
        """One call in each shard, about no entity."""
        return [self._call(kind, shard, (), header) for shard in range(self._shards)]

    def _shard_keys(self, kind: str, shard: int) -> list[bytes]:
        """What the keys of entities begin with, and the keys of the shard itself."""
        known = self._known_keys.get((kind, shard))
        if known is None:
            names = [self._key(kind, shard, name).encode() for name in (*ENTITY_KEYS, *SHARD_KEYS)]
            known = self._known_keys[kind, shard] = names
        return known

    def _transition(
        self, name: str, kind: str, rows: Sequence[Row], header: Row = NOTHING, *, attempts: int = ATTEMPTS
    ) -> list[Any]:
        """What a script replies to each row, in that order. Raises the first error."""
        replies = self._transition_each(name, kind, rows, header, attempts)
        raise_first(replies)
        return replies

    def _transition_each(
        self, name: str, kind: str, rows: Sequence[Row], header: Row = NOTHING, attempts: int = ATTEMPTS
    ) -> list[Any]:
        """Run a script over many entities, in batches of one shard each. Errors are among the replies."""
        if kind not in self._agreed:
            self._agree([kind])
        if len(rows) == 1:  # by far the most frequent: nothing to be split and put together again
            call = self._call(kind, self._shard(rows[0]["id"]), rows, header, _keys_of_each(name, rows))
            [replies] = self._run_kept(name, kind, [call], attempts)
            return [replies] if isinstance(replies, Exception) else replies
        by_shard: defaultdict[int, list[int]] = defaultdict(list)
        for position, row in enumerate(rows):
            by_shard[self._shard(row["id"])].append(position)
        batches = [
            (shard, positions[start : start + ENTITIES_PER_CALL])
            for shard, positions in by_shard.items()
            for start in range(0, len(positions), ENTITIES_PER_CALL)
        ]
        keys = _keys_of_each(name, rows)
        calls = [
            self._call(kind, shard, [rows[position] for position in positions], header, keys)
            for shard, positions in batches
        ]
        ordered: list[Any] = [None] * len(rows)
        for (_, positions), replies in zip(batches, self._run_kept(name, kind, calls, attempts), strict=True):
            failed = isinstance(replies, Exception)
            for n, position in enumerate(positions):
                ordered[position] = replies if failed else replies[n]
        return ordered

    def _run_kept(self, name: str, kind: str, calls: Sequence[_Call], attempts: int) -> list[Any]:
        """As `_run_each`. If the kind was forgotten since we agreed on it, agree anew and try once more."""
        replies = self._run_each(name, calls, attempts)
        if again := [n for n, reply in enumerate(replies) if _is_not_kept(reply)]:
            self._agreed.discard(kind)
            try:
                self._begin(kind)
                repeated = self._run_each(name, [calls[n] for n in again], attempts)
            except (IndexUnavailable, ImproperlyConfigured) as error:
                repeated = [error] * len(again)
            for n, reply in zip(again, repeated, strict=True):
                replies[n] = reply
        return replies

    def _run_each(self, name: str, calls: Sequence[_Call], attempts: int = ATTEMPTS) -> list[Any]:
        """What a script replies to each call. Errors are among the replies."""
        script = self._script(name)
        commands: list[Command] = [
            ("EVALSHA", script.sha, len(call.keys), *call.keys, call.payload) for call in calls
        ]
        replies = self._replies(commands, attempts)
        for n, reply in enumerate(replies):
            if isinstance(reply, errors.NoScriptError):
                _, _, *rest = commands[n]
                [replies[n]] = self._replies([("EVAL", script.source, *rest)], attempts)
        return [reply if isinstance(reply, Exception) else _decode(reply)[0] for reply in replies]

    def _commands(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip per node. Raises the first error."""
        replies = self._replies(commands)
        raise_first(replies)
        return replies

    def _replies(self, commands: Sequence[Command], attempts: int = ATTEMPTS) -> list[Any]:
        """Send commands in one round trip per node. Errors are among the replies, in our own words."""
        until = time.monotonic() + self._servers.timeout
        replies = self._servers.exchange(commands) if commands else []
        for _ in range(1, attempts):
            again = [
                n
                for n, reply in enumerate(replies)
                if isinstance(reply, Exception) and _may_pass_at_once(reply)
            ]
            if not again or time.monotonic() >= until:
                break
            for n, reply in zip(again, self._servers.exchange([commands[n] for n in again]), strict=True):
                replies[n] = reply
        return [in_our_words(reply) if isinstance(reply, Exception) else reply for reply in replies]


def _is_not_kept(reply: Any) -> bool:
    return isinstance(reply, errors.ResponseError) and str(reply).startswith(NOT_KEPT)


def is_absence(error: BaseException) -> bool:
    """Whether a server of Redis' is away, or takes nothing for now, whoever asks."""
    return isinstance(error, UNAVAILABLE) or (
        isinstance(error, errors.RedisError) and str(error).startswith(UNAVAILABLE_CODES)
    )


def _may_pass_at_once(error: Exception) -> bool:
    """A time-out does not: it has taken long enough."""
    return is_absence(error) and not isinstance(error, errors.TimeoutError)


def in_our_words(error: Exception) -> Exception:
    """The error to raise for one of Redis' own. `NoScriptError` and mistakes stay as they are."""
    ours: Exception
    if isinstance(error, errors.NoPermissionError) or str(error).startswith(FORBIDDEN):
        ours = ImproperlyConfigured(
            f"the index's Redis user lacks a right: {_words(error)};"
            f" ACL LOG names it, and {DOCS}how-to/deployment.html lists all that are needed"
        )
    elif refusal := _refusal(error):
        ours = AccessDenied(refusal)
    elif is_absence(error):
        away_for = error.seconds if isinstance(error, NodeAway) else 0.0
        ours = IndexUnavailable(_why(error), away_for=away_for)
    else:
        return error
    ours.__cause__ = error
    return ours


@cache
def _lua(name: str) -> str:
    return resources.files(__package__).joinpath("lua", f"{name}.lua").read_text()


def _limits_lua(limits: Limits) -> str:
    """The limits as a Lua table: constants of a script, that no call has to pass."""
    constants = {**asdict(limits), "margin": limits.margin}
    return (
        f"local limits = {{ {', '.join(f'{name} = {_encode(value)}' for name, value in constants.items())} }}"
    )


#: Likewise those of `counters.py`.
_COUNTERS_LUA = (
    f"local BOUNDS, MOST_ACTIONS = {{ {', '.join(map(str, BOUNDS))} }}, {MOST_ACTIONS}\n"
    f"local MORE, UNKNOWN, OTHER = '{MORE}', '{UNKNOWN}', '{OTHER}'"
)


def _words(error: Exception) -> str:
    """Redis' own words, which name hosts and ports, never a password.

    But neither where in a script it was, nor the inside of redis-py's clients of sentinels.
    """
    return str(error).partition(" script: ")[0].partition(" : <redis.")[0]


def _refusal(error: Exception) -> str:
    """What is to be done where the server lets this process not in; empty: it does."""
    words = _words(error)
    if "DENIED Redis is running in protected mode" in words:
        return (
            "the index's Redis is in protected mode, and refuses whoever comes from another machine: give it"
            " a password (requirepass, or a user of its ACL), and write that into the index's URL"
        )
    if any(isinstance(each, errors.AuthenticationError) for each in (error, error.__cause__)):
        if any(text in words for text in GIVEN_NONE):
            words = "it asks for them, and none is given"
        return (
            f"the index refused the user or the password: {words.rstrip('.')}; the index's URL has them, or"
            " goalstate_index_credentials"
        )
    return ""


def _why(error: Exception) -> str:
    words = _words(error)
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return f"the index's certificate is refused (?ssl_ca_certs= names the authority to trust): {words}"
    if isinstance(error, errors.OutOfMemoryError):
        return (
            "the index is full, and takes nothing new until its Redis has memory again (raise its maxmemory):"
            f" {words}"
        )
    if words.startswith("MISCONF "):
        return (
            "the index takes nothing new until its Redis can save its data again (is its disk full? its log"
            f" says why): {words}"
        )
    if isinstance(error, errors.BusyLoadingError):
        return f"the index's Redis has just started, and answers when it has loaded its data: {words}"
    return f"the index did not answer: {type(error).__name__}: {words}"


def _watch(watch: Watch | None) -> Row | None:
    return None if watch is None else _given(**asdict(watch))


def _survey(kind: str, shard: int, reply: Mapping[str, Any]) -> Survey:
    return Survey(
        kind,
        shard,
        due=tuple(reply["due"]),
        suspect=tuple(reply["suspect"]),
        lost=tuple([(id, int(end)) for id, end in reply["lost"]]),
        expired=tuple(reply["expired"]),
        count=int(reply["count"]),
        newest_arrival=int(reply["newest_arrival"]),
        set_back=reply.get("set_back", False),
        cursor=reply.get("cursor"),
    )


def _known_shards(kind: str, form: str) -> int:
    """In how many shards a kind is kept. Raises `ImproperlyConfigured` for what this release cannot read."""
    try:
        kept = json.loads(form)
        if kept["layout"] == LAYOUT:
            return int(kept["shards"])
        layout = kept["layout"]
    except (ValueError, LookupError, TypeError):
        layout = f"{form[:60]!r}"
    raise ImproperlyConfigured(
        f"the index keeps kind {kind!r} in layout {layout}, and this release of celery-goalstate"
        f" knows layout {LAYOUT}: run the release that the other processes run"
    )


def _check_form(kind: str, form: str, shards: int) -> None:
    kept = _known_shards(kind, form)
    if kept != shards:
        raise ImproperlyConfigured(
            f"the index keeps kind {kind!r} in {kept} shards, and goalstate_shards is {shards}: its"
            f" entities would not be found. Set goalstate_shards to {kept}, or move the kind:"
            f" {DOCS}how-to/upgrading.html"
        )


def _given(**values: Any) -> Row:
    """What is not None."""
    return {name: value for name, value in values.items() if value is not None}


def _row(row: Request | Report) -> Row:
    """Its fields by name, but for those that have their default."""
    fields = zip(row._fields, row, _DEFAULTS[type(row)], strict=True)
    return {name: value for name, value, default in fields if value is not None and value != default}


_DEFAULTS = {row: tuple(row._field_defaults.get(name) for name in row._fields) for row in (Request, Report)}


def _keys_of_each(name: str, rows: Sequence[Row]) -> int:
    if name == "finish":
        return 3 if any("error" in row or row["verdict"] is Verdict.GONE for row in rows) else 2
    return KEYS_OF_EACH.get(name, 2)


def _rows(ids: Iterable[str]) -> list[Row]:
    return [{"id": id} for id in ids]


def _with_task_ids(requests: Mapping[str, str]) -> list[Row]:
    return [{"id": id, "task_id": task_id} for id, task_id in requests.items()]


def _digits(value: int | None) -> str | None:
    return None if value is None else str(value)


def _number(reply: Mapping[str, Any], name: str) -> int | None:
    return int(reply[name]) if name in reply else None


def _wakeup(id: str, reply: Mapping[str, Any]) -> Wakeup | None:
    """The wake-up that a reply has, if it has one."""
    return Wakeup(id, **reply["wakeup"]) if "wakeup" in reply else None


def _wakeups(ids: Iterable[str], replies: Iterable[Any]) -> list[Wakeup]:
    return [Wakeup(id, **reply) for id, reply in zip(ids, replies, strict=True) if reply]


def _is_answered(replies: Sequence[Any]) -> bool:
    """Whether a shard at least has answered, and the others were only away."""
    errors = [reply for reply in replies if isinstance(reply, Exception)]
    return len(errors) < len(replies) and all(isinstance(error, IndexUnavailable) for error in errors)


def _claimed(id: str, reply: Mapping[str, Any] | IndexUnavailable) -> Claim | Refusal:
    if isinstance(reply, IndexUnavailable):
        return Refusal(id, Refused.AWAY)
    if "refused" in reply:
        return Refusal(id, Refused(reply["refused"]), _wakeup(id, reply))
    return Claim(id, **reply)


def _pairs(reply: list[Any]) -> Iterable[tuple[str, str]]:
    """Members and scores: nested under RESP3, flat under RESP2."""
    if reply and isinstance(reply[0], str):
        return zip(reply[::2], reply[1::2], strict=True)
    return [(id, score) for id, score in reply]


def _pause(text: str) -> Pause:
    """Also of a key that is damaged: a kind is paused if there is one."""
    try:
        pause = json.loads(text)
        return Pause(int(pause["since"]), str(pause["by"]))
    except (ValueError, LookupError, TypeError):
        return Pause(0, "somebody")


def _overview(reply: Mapping[str, Any]) -> Overview:
    longest, paused = reply.get("longest"), reply.get("paused")
    return Overview(
        {status: reply["counts"][status] for status in Status},
        overdue=reply["overdue"],
        oldest=reply.get("oldest"),
        failing=reply["failing"],
        failing_for=reply.get("failing_for"),
        longest=longest and Longest(longest["id"], longest["for"]),
        paused=paused and _pause(paused),
        unswept=reply.get("unswept"),
    )


def _counters(reply: Any) -> dict[str, int]:
    """A mapping under RESP3, flat under RESP2. What is damaged counts nothing."""
    fields = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))
    return {name: int(text) for name, text in fields.items() if text.isdecimal()}


def _failure(text: str) -> Failure:
    """One entry of a history. What is damaged shows nothing, and is in nobody's way."""
    try:
        entry = json.loads(text)
        return Failure(
            int(entry["at"]),
            entry.get("state", ""),
            entry.get("step", ""),
            entry.get("took"),
            entry.get("error", ""),
            entry.get("task_id", ""),
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        return Failure(0, "", "", None, "damaged in the index", "")


def _whereabouts(reply: Mapping[str, Any], fields: Mapping[str, str]) -> Whereabouts | None:
    """What the run of this record does; None: that is not known, or is about another run."""
    try:
        found = json.loads(reply["whereabouts"])
        of_this_run = found["lease"] == fields["lease"]
        return Whereabouts(int(found["seen"]), str(found["where"])) if of_this_run else None
    except (ValueError, LookupError, TypeError):
        return None


def _record(id: str, reply: Mapping[str, Any]) -> Record | None:
    if not reply:
        return None
    status, score, fields = Status(reply["status"]), float(reply["score"]), reply["fields"]

    if "deleted" in fields:
        deadline = _number(fields, "deadline")
        return None if deadline is None else Record(id, Status.PARKED, deadline=deadline)
    pending = [int(fields[name]) for name in ("deadline", "own") if name in fields]
    running = status is Status.RUNNING
    history = tuple([_failure(text) for text in reply.get("history", ())])
    return Record(
        id,
        status,
        deadline=min(pending, default=None),
        token=fields.get("token", ""),
        task_id=fields.get("task_id", ""),
        lease=fields.get("lease", ""),
        nonce=fields.get("nonce", ""),
        lease_expires=int(score) if running else None,
        failures=_number(fields, "failures") or 0,
        rounds=_number(fields, "rounds") or 0,
        error=whole_error(fields.get("error", ""), history),
        failing=_number(reply, "failing"),
        history=history,
        state=fields.get("state", ""),
        goal=fields.get("goal", ""),
        step=fields.get("step", ""),
        whereabouts=_whereabouts(reply, fields) if running else None,
        converged=fields["converged"] == "1" if "converged" in fields else None,
        finished=_number(fields, "finished"),
        started=int(fields["lease"]) // 1000 if running else None,
        since=int(score) if status is Status.FAILED else None,
        expires=int(score) if status is Status.IDLE and score != math.inf else None,
        floor=_number(fields, "floor"),
        alone="alone" in fields,
        note=reply.get("note", ""),
        score=score,
    )


def _as_adopted(record: Record) -> Row:
    """What `_record` reads, as it is to be stored: the other way round."""
    pending = record.deadline is not None
    fields = _given(
        deadline=_digits(record.deadline),
        floor=_digits(record.floor),
        task_id=None if pending else record.task_id or None,
        failures=_digits(record.failures or None),
        rounds=_digits(record.rounds or None),
        error=cut(record.error, BYTES_OF_ERROR) or None,
        state=record.state or None,
        goal=record.goal or None,
        step=record.step or None,
        converged=None if record.converged is None else str(int(record.converged)),
        finished=_digits(record.finished),
        alone="1" if record.alone else None,
    )
    status = Status.PARKED if pending else record.status
    score = record.deadline if pending else record.since if status is Status.FAILED else record.expires
    return _given(
        id=record.id,
        status=status,
        score="+inf" if score is None else score,
        fields=fields,
        note=record.note or None,
        failing=record.failing,
        history=[_encode(_given(**failure._asdict())) for failure in record.history] or None,
    )
