"""What an index counts, for monitoring: each shard has a number of named counters, which only grow.

    evaluations:<outcome>:<bound>       evaluations, by how late they began: a bucket, or `unknown`
    lateness                            milliseconds, of all those of which it is known
    actions:<outcome>:<bound>:<name>    executions of an action, by how long they took
    took:<outcome>:<name>               milliseconds
    named:<name>, named                 the actions that are counted by name, and how many they are
    enqueues:<result>, refusals:<reason>, resends, fenced

A bucket is named by its upper bound in milliseconds, the last one `more`. That of an evaluation has its
outcome, too, so one counter serves both the number of evaluations and the histogram of their lateness.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

#: Upper bounds of buckets, in milliseconds.
BOUNDS = (5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 300_000)
#: In place of a bound: longer than all of them, and not known.
MORE, UNKNOWN = "more", "unknown"

#: Actions that a shard counts by name: the first ones. Later ones are all called `OTHER`.
MOST_ACTIONS = 50
OTHER = "other"

#: How an execution of an action ended.
OK, FAILED = "ok", "failed"


class Outcome(enum.StrEnum):
    """How an evaluation ended, as it is counted."""

    CONVERGED = "converged"  #: the goal is reached
    REQUEUED = "requeued"  #: it is not, or that is not known, and it is evaluated again
    UNCONVERGED = "unconverged"  #: likewise, and nothing follows by itself
    FAILED = "failed"  #: to be tried again
    QUARANTINED = "quarantined"
    LOST = "lost"  #: its worker fell silent
    GONE = "gone"  #: the entity does not exist any more
    RETURNED = "returned"  #: given back by a worker that ends: it begins anew


class Result(enum.StrEnum):
    """What an enqueue came to, as it is counted."""

    NEW = "new"  #: nothing was pending
    EARLIER = (
        "earlier"  #: what was pending has another deadline now, an earlier one unless it was to be replaced
    )
    UNCHANGED = "unchanged"
    NOTED = "noted"  #: the entity is being evaluated: one more follows


class ActionTime(NamedTuple):
    """One execution of an action."""

    name: str
    took: int  #: milliseconds
    failed: bool


@dataclass(slots=True)
class Histogram:
    """How long something took: how often which time, and all in all. Times in milliseconds."""

    counts: Counter[str] = field(
        default_factory=Counter
    )  #: by name of the bucket, each without the shorter ones
    total: int = 0


@dataclass(frozen=True, slots=True)
class Metrics:
    """The counters of a kind. What has not happened so far may be missing, or 0."""

    evaluations: Counter[str] = field(default_factory=Counter)  #: by `Outcome`
    lateness: Histogram = field(default_factory=Histogram)
    #: By name and outcome, `OK` or `FAILED`.
    actions: defaultdict[tuple[str, str], Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    enqueues: Counter[str] = field(default_factory=Counter)  #: by `Result`
    refusals: Counter[str] = field(default_factory=Counter)  #: of claims, by reason
    resends: int = 0  #: messages that were sent once more
    fenced: int = 0  #: outcomes that were dropped, since the lease was lost


def bound_of(milliseconds: int) -> str:
    """The name of the bucket."""
    return next((str(bound) for bound in BOUNDS if milliseconds <= bound), MORE)


def metrics_of(counters: Mapping[str, int]) -> Metrics:
    """What the counters say. Those of other releases, which this one does not know, are left out."""
    metrics = Metrics(resends=counters.get("resends", 0), fenced=counters.get("fenced", 0))
    metrics.lateness.total = counters.get("lateness", 0)
    for counter, n in counters.items():
        match counter.split(":", 3):
            case ["evaluations", outcome, bound]:
                metrics.evaluations[outcome] += n
                if bound != UNKNOWN:
                    metrics.lateness.counts[bound] += n
            case ["actions", outcome, bound, name]:
                metrics.actions[name, outcome].counts[bound] += n
            case ["took", outcome, *name]:
                metrics.actions[":".join(name), outcome].total += n
            case ["enqueues", result]:
                metrics.enqueues[result] += n
            case ["refusals", reason]:
                metrics.refusals[reason] += n
    return metrics
