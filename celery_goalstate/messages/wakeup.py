"""What a message holds, what people see of it, and how it is read.

A wake-up says which entity to evaluate, and carries the token that the index expects. It is disposable: the
index is the truth, and a wake-up that is lost, late or doubled changes nothing but the time.

    task     goalstate.<kind>
    args     [[id, token], ...]      one pair, unless the kind's batch_size allows for more
    kwargs   {"resent_at": ms}       on a message that is sent once more, else nothing; others are ignored, so
                                     that later releases may add to them
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from celery_goalstate.entity import checked_id
from celery_goalstate.index.base import Wakeup
from celery_goalstate.registry import PUBLIC_TASK

#: Characters of the arguments that are shown.
SHOWN = 800


class Contents(NamedTuple):
    """What one message holds, and how Flower shows it."""

    args: tuple[list[list[str]]]
    kwargs: dict[str, int]
    argsrepr: str
    kwargsrepr: str


def contents_of(kind: str, wakeups: Sequence[Wakeup]) -> Contents:
    """The message of these wake-ups: one, or several that are due and have no past of their own."""
    resent_at = wakeups[0].resent_at
    args = ([[wakeup.id, wakeup.token] for wakeup in wakeups],)
    kwargs = {} if resent_at is None else {"resent_at": resent_at}
    return Contents(args, kwargs, repr(args)[:SHOWN], _shown(kind, wakeups))


def grouped(wakeups: Sequence[Wakeup], batch_size: int) -> Iterator[list[Wakeup]]:
    """Wake-ups by message. Those that are due may share one, unless they have a past of their own.

    What a message carries besides is that of one note.
    """
    sharing: defaultdict[str, list[Wakeup]] = defaultdict(list)
    for wakeup in wakeups:
        if batch_size == 1 or wakeup.delay or wakeup.retries or wakeup.resent_at or wakeup.alone:
            yield [wakeup]
        else:
            sharing[wakeup.note].append(wakeup)
    for together in sharing.values():
        for start in range(0, len(together), batch_size):
            yield together[start : start + batch_size]


def _shown(kind: str, wakeups: Sequence[Wakeup]) -> str:
    """What Flower shows and searches: a literal of a dict, which it reads up to some length only."""
    one = len(wakeups) == 1
    names = ", ".join(f"{kind}/{wakeup.id}" for wakeup in wakeups)
    if len(repr(names)) > SHOWN:
        while (length := len(repr(names))) > SHOWN:  # what is escaped takes more room
            names = names[: len(names) * SHOWN // length]
        names += "…" if one else f"… {len(wakeups)} in all"
    return repr({"entity" if one else "entities": names})


_TOKEN = re.compile(r"[0-9]{1,20}")


def read_message(args: Any, kwargs: Any) -> tuple[list[tuple[str, str]], int | None]:
    """The (id, token) pairs of a message, and when it was sent again. Raises `ValueError` for any other."""
    match args, kwargs.get("resent_at"):
        case [[_, *_] as pairs], (None | int()) as resent_at if 0 <= (resent_at or 0) < 2**53:
            wakeups = [_read_pair(pair) for pair in pairs]
            if len(dict(wakeups)) < len(wakeups):
                raise ValueError(f"a wake-up names each entity once, not as {args!r:.100}")
            return wakeups, resent_at
    raise ValueError(f"a wake-up is ([[id, token], ...],) {{}}, not {args!r:.100} {kwargs!r:.100}")


def rejection(task: str, kind: str, problem: object) -> str:
    """What to log of a message that is no wake-up, for whoever has sent it: beat's users, say."""
    public_task = task.removesuffix(kind) + PUBLIC_TASK
    return (
        f"{task} rejected a malformed message: {problem}. Only the engine sends this task;"
        f" to enqueue an entity, send {public_task}(kind, id, deadline=None)"
    )


def _read_pair(pair: Any) -> tuple[str, str]:
    match pair:
        case [str(id), str(token)] if _TOKEN.fullmatch(token):
            return checked_id(id), token
    raise ValueError(f"a wake-up's pairs are [id, token], not {pair!r:.100}")
