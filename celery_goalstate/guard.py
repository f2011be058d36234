"""What a message must look like before Celery itself handles it.

Celery trusts the envelope of a task's message: a header of a wrong type, or a body that is no list, raises
in the worker's main loop and ends the worker; the message returns to the queue and ends the next one. So the
consumer looks at it first, and rejects what is malformed with one line in the log.

Celery trusts the time in a message, too, and on a quorum queue gets nothing else while it holds as many
messages as its prefetch count. A wrong clock that wrote it must not keep all others waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from celery.signals import task_rejected
from celery.utils.time import maybe_iso8601
from celery.worker.strategy import default

from celery_goalstate.settings import Settings

logger = logging.getLogger(__name__)

#: Characters that a task id may have.
LONGEST_ID = 255

#: What Celery would run, with the worker's rights, after the task. A wake-up has none of it.
FOLLOWING = ("callbacks", "errbacks", "chain", "chord")

#: What clocks may differ by, and a message be held for longer than it was published ahead.
SKEW = timedelta(seconds=5)

TEXTS = ("shadow", "group", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin")


def strategy(task: Any, app: Any, consumer: Any, **options: Any) -> Callable[..., Any]:
    """How the consumer handles messages (`Task.Strategy`): as Celery does, if they are well-formed."""
    handle = default(task, app, consumer, **options)
    horizon = timedelta(seconds=Settings.from_conf(app.conf).eta_horizon)

    def guarded(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **more: Any) -> Any:
        try:
            check(message)
        except Exception as error:  # noqa: BLE001 - decoders raise whatever they like
            said = f"{type(error).__name__}: {error}"
            logger.error("%s rejected a malformed message: %s", task.name, ascii(said[:300])[1:-1])  # noqa: TRY400 - one line
            reject(logger, consumer.connection_errors)
            task_rejected.send(sender=consumer, message=message, exc=error)
            return None
        _hasten(message, horizon)
        return handle(message, body, ack, reject, callbacks, **more)

    return guarded


def check(message: Any) -> None:
    """Raise for a message that Celery could not handle, in either version of its protocol."""
    headers, body = message.headers, message.payload
    if "task" in headers:
        match body:
            case [list(), dict(kwargs), dict(following)]:
                _check_envelope(headers)
                _check_task(kwargs, following)
                return
        raise ValueError(f"a body is [args, kwargs, embed], not {body!r:.100}")
    match body:
        case {"args": list(), "kwargs": dict(kwargs)}:
            _check_envelope(body)
            _check_task(kwargs, body)
            return
    raise ValueError(f"a body is {{'id': ..., 'args': ..., 'kwargs': ...}}, not {body!r:.100}")


def _hasten(message: Any, horizon: timedelta) -> None:
    """Hold a message for as long as anybody publishes one ahead, and no longer.

    One that comes too early is sent again then, with a time by this clock.
    """
    said = message.headers if "task" in message.headers else message.payload
    eta = maybe_iso8601(said.get("eta"))
    if eta is not None:
        now = datetime.now(UTC)
        if (eta if eta.tzinfo else eta.replace(tzinfo=UTC)) - now > horizon + SKEW:
            said["eta"] = (now + horizon).isoformat()


def _check_envelope(said: dict[str, Any]) -> None:
    id = said.get("id")
    _need("id", id, isinstance(id, str) and 0 < len(id) <= LONGEST_ID and id.isprintable())
    retries = said.get("retries")
    _need("retries", retries, retries is None or (type(retries) is int and 0 <= retries < 2**31))
    limits = said.get("timelimit")
    match limits:
        case None | [_, _]:
            for limit in limits or ():
                _need("timelimit", limits, limit is None or (isinstance(limit, int | float) and limit >= 0))
        case _:
            _need("timelimit", limits, False)
    for name in ("eta", "expires"):
        when = said.get(name)
        _need(name, when, when is None or (isinstance(when, str) and when != ""))
        maybe_iso8601(when)
    for name in TEXTS:
        text = said.get(name)
        _need(name, text, text is None or isinstance(text, str))
    stamped = said.get("stamped_headers")
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
