"""What a message must be like before Celery itself handles it.

Celery trusts the envelope of a task's message: a header of a wrong type, or a body that is no list, raises
in the worker's main loop and ends the worker; the message returns to the queue and ends the next one. So the
consumer checks it first, and rejects what is malformed with one line in the log.

Celery trusts the time in a message, too, and on a quorum queue gets nothing else while it holds as many
messages as its prefetch count. A wrong clock that wrote it must not keep all others waiting.
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime, timedelta
from typing import Any

from celery.signals import task_rejected
from celery.utils.time import maybe_iso8601
from celery.worker.strategy import default

from celery_goalstate.messages.wakeup import rejection

logger = logging.getLogger(__name__)

#: Characters that a task id may have.
LONGEST_ID = 255

#: What Celery would run after the task, with the worker's rights. A wake-up has none of it.
FOLLOWING = ("callbacks", "errbacks", "chain", "chord")

TEXTS = ("shadow", "group", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin")

#: Clocks may differ by so much. What one that differs by more has written is held for no longer than that.
SKEW = timedelta(seconds=5)


def strategy(
    task: Any, app: Any, consumer: Any, *, kind: str, eta_horizon: Callable[[], float], **options: Any
) -> Callable[..., Any]:
    """How the consumer handles messages (`Task.Strategy`): as Celery does, if they are well-formed.

    No process publishes further ahead than `eta_horizon` (seconds).
    """
    handle = default(task, app, consumer, **options)
    horizon = timedelta(seconds=eta_horizon())
    warned = False

    def guarded(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **more: Any) -> Any:
        nonlocal warned
        try:
            check(message)
        except Exception as error:  # noqa: BLE001 - decoders raise whatever they like
            problem = ascii(f"{type(error).__name__}: {error}"[:300])[1:-1]
            logger.error("%s", rejection(task.name, kind, problem))  # noqa: TRY400 - one line
            reject(logger, consumer.connection_errors)
            task_rejected.send(sender=consumer, message=message, exc=error)
            return None
        ahead = limit_hold(message, horizon)
        if ahead and not warned:
            warned = True
            logger.warning(
                "%s: a message is due in %d s by this worker's clock, and none is published more than %g s"
                " ahead: do all clocks agree? Whatever is early is sent again",
                task.name, ahead.total_seconds(), horizon.total_seconds(),
            )  # fmt: skip
        return handle(message, body, ack, reject, callbacks, **more)

    return guarded


def check(message: Any) -> None:
    """Raise for a message that Celery could not handle, in either version of its protocol."""
    _check_envelope(_envelope(message))
    if "task" in message.headers:
        match message.payload:
            case [list(), dict(kwargs), dict(following)]:
                _check_task(kwargs, following)
                return
        raise ValueError(f"a body is [args, kwargs, embed], not {message.payload!r:.100}")
    _check_task(message.payload["kwargs"], message.payload)


def limit_hold(message: Any, horizon: timedelta) -> timedelta | None:
    """Hold a message only shortly if none is published that far ahead; how far it is then, else None.

    Some clock is wrong. The claim finds out, by the index's clock, whether the message is early.
    """
    envelope = _envelope(message)
    eta, now = maybe_iso8601(envelope.get("eta")), datetime.now(UTC)
    if eta is None:
        return None
    ahead = (eta if eta.tzinfo else eta.replace(tzinfo=UTC)) - now
    if ahead <= horizon + SKEW:
        return None
    envelope["eta"] = (now + SKEW).isoformat()
    return ahead


def _envelope(message: Any) -> MutableMapping[str, Any]:
    """What Celery reads of a message besides its body: the headers. In version 1 the body has them, too."""
    if "task" in message.headers:
        headers: dict[str, Any] = message.headers
        return headers
    match message.payload:
        case {"args": list(), "kwargs": dict()}:
            return ChainMap(message.headers, message.payload)
    raise ValueError(f"a body is {{'id': ..., 'args': ..., 'kwargs': ...}}, not {message.payload!r:.100}")


def _check_envelope(envelope: MutableMapping[str, Any]) -> None:
    id = envelope.get("id")
    _need("id", id, isinstance(id, str) and 0 < len(id) <= LONGEST_ID and id.isprintable())
    retries = envelope.get("retries")
    _need("retries", retries, retries is None or (type(retries) is int and 0 <= retries < 2**31))
    limits = envelope.get("timelimit")
    match limits:
        case None | [_, _]:
            for limit in limits or ():
                _need("timelimit", limits, limit is None or (isinstance(limit, int | float) and limit >= 0))
        case _:
            _need("timelimit", limits, False)
    for name in ("eta", "expires"):
        when = envelope.get(name)
        _need(name, when, when is None or (isinstance(when, str) and when != ""))
        time = maybe_iso8601(when)
        _need(name, when, time is None or 1 < time.year < 9999)  # or no time zone could be put to it
    for name in TEXTS:
        text = envelope.get(name)
        _need(name, text, text is None or isinstance(text, str))
    stamped = envelope.get("stamped_headers")
    _need("stamped_headers", stamped, stamped is None or isinstance(stamped, list))
    for name in stamped or ():
        _need("stamped_headers", stamped, isinstance(name, str))


def _check_task(kwargs: dict[str, Any], following: dict[str, Any]) -> None:
    _need("argument self", kwargs.get("self"), "self" not in kwargs)
    for name in FOLLOWING:
        _need(name, following.get(name), not following.get(name))


def _need(name: str, value: Any, acceptable: bool) -> None:
    if not acceptable:
        raise ValueError(f"{name} cannot be {value!r:.100}")
