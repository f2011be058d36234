"""What an enqueue does, whoever calls it.

hooks `before_enqueue` ─► Index.enqueue ─► publish the wake-ups that it replies with
│                 │
a far deadline: there is none     the broker is away: put back, the sweeper sends them later
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from celery_goalstate.backoff import delay_seconds
from celery_goalstate.deadlines import milliseconds, spread_by
from celery_goalstate.hooks import Hooks
from celery_goalstate.index.base import Policy, Request, Scheduled
from celery_goalstate.messages.notes import note_of, trace_of_caller, warn_of_other_headers
from celery_goalstate.registry import Kind
from celery_goalstate.worker.caller import calling_run
from celery_goalstate.worker.parts import Parts

if TYPE_CHECKING:
    from celery import Celery

K = TypeVar("K", bound=Hashable)

#: Entities that one round trip of a call for many carries.
BATCH = 1000


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Enqueues entities by the parts of one engine."""

    app: Celery
    parts: Parts
    hooks: Hooks

    def enqueue(
        self,
        kind: Kind,
        requests: Sequence[Request],
        policy: Policy,
        max_wait: int | None = None,
        *,
        publish: bool = True,
    ) -> tuple[Sequence[Scheduled], bool]:
        """What the index replies, and whether no message failed (nor was left to the sweeper by `publish`).

        `max_wait` is in milliseconds. Raises `IndexUnavailable`, and whatever a hook raises.
        """
        for hook in self.hooks.before_enqueue:
            hook(kind.name, [request.id for request in requests])
        if note := note_of(self.app, kind, requests[0].id):
            requests = [request._replace(note=note) for request in requests]
        index = self.parts.index
        inside = calling_run(index, kind.name)
        scheduled = index.enqueue(kind.name, requests, policy=policy, max_wait=max_wait, inside=inside)
        for request, reply in zip(requests, scheduled, strict=True):
            if reply.noted is not None:
                warn_of_other_headers(kind, request.id, request.note, reply.noted)
        wakeups = [each.wakeup for each in scheduled if each.wakeup is not None]
        if publish:
            link = trace_of_caller() if self.hooks.own_traces else {}
            return scheduled, self.parts.publisher.dispatch(kind, wakeups, enqueued=True, link=link)
        index.put_back(kind.name, wakeups)
        return scheduled, not wakeups

    def enqueue_all(
        self,
        entities: Iterable[tuple[Kind, str]],
        request: Request,
        policy: Policy,
        *,
        spread: float | timedelta | None,
        max_wait: int | None = None,
    ) -> int:
        """Enqueue (kind, id) pairs as `request` says, in few round trips; how many schedules that changed.

        `spread` (seconds or a timedelta) adds to each deadline a random part of it.
        """
        width = 0.0 if spread is None else delay_seconds(spread, "spread")
        changed, published = 0, True
        for batch in batches(entities):
            for kind, ids in ids_by_kind(batch).items():
                requests = [
                    spread_by(request, id, milliseconds(self.parts.random() * width) if width else 0)
                    for id in ids
                ]
                # Once the broker was waited for in vain, the sweeper publishes the rest.
                scheduled, published = self.enqueue(kind, requests, policy, max_wait, publish=published)
                changed += sum(each.changed for each in scheduled)
        return changed


def batches(entities: Iterable[tuple[K, str]]) -> Iterator[list[tuple[K, str]]]:
    """The entities, in lists of at most `BATCH`."""
    iterator = iter(entities)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def ids_by_kind(entities: Iterable[tuple[K, str]]) -> dict[K, list[str]]:
    """The ids of each kind, each once."""
    by_kind: defaultdict[K, list[str]] = defaultdict(list)
    for kind, id in dict.fromkeys(entities):
        by_kind[kind].append(id)
    return by_kind
