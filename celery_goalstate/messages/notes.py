"""What an enqueue notes of its caller, for the messages that somebody else publishes later.

Many apps add headers to each message that they send: whose request it is, which tenant's schema to use. A
message that the sweeper, a retry or a resend publishes would get those of a worker. So an enqueue notes its
own, the index keeps them, and such a message carries them as they were.

The caller's trace is noted, too. It comes back as the header `goalstate_link`, never as the trace's own: an
entity is evaluated again and again, for years perhaps, and its trace would never end.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import Context, copy_context
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from celery import Celery, Task

from celery_goalstate.display import printable
from celery_goalstate.index.base import LONGEST_NOTE, random_id
from celery_goalstate.registry import Kind
from celery_goalstate.settings import ROUTING_OPTIONS

logger = logging.getLogger(__name__)

#: The header that names the trace of the enqueue: a dict of the trace's own headers.
LINK = "goalstate_link"

#: What names no trace.
NO_LINK: Mapping[str, Any] = {}

#: The header of what travels with a trace: much, and it tells nothing of which trace it is.
BAGGAGE = "baggage"

#: Headers that make a message part of a trace: W3C, Sentry, B3, Jaeger, Datadog, New Relic, Elastic.
OF_TRACES = frozenset(
    {
        *("traceparent", "tracestate", BAGGAGE, "sentry-trace"),
        *("b3", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled", "x-b3-flags"),
        *("uber-trace-id", "newrelic", "elastic-apm-traceparent"),
        *("x-datadog-trace-id", "x-datadog-parent-id", "x-datadog-sampling-priority", "x-datadog-tags"),
    }
)


class Note(NamedTuple):
    """What one enqueue noted."""

    headers: Mapping[str, Any]  #: the app's own
    link: Mapping[str, Any]  #: the headers that name its trace
    options: Mapping[str, Any] = {}  #: where else the app sends such a message: queue, priority, ...


def note_of(app: Celery, kind: Kind, id: str) -> str:
    """What a message that the caller published now would carry besides, as a text; empty: nothing.

    An app's class that overrides `send_task`, and a task's that overrides `apply_async`, are asked by calls
    that publish nothing. Whatever goes wrong with that is logged once, and nothing is noted.
    """
    added = _Recorded({}, {})
    overridden = adds_headers(app, kind)  # finalizes the app: an error of that is the caller's
    try:
        added = _added(app, kind, id) if overridden else added
    except Exception as error:  # noqa: BLE001 - code of others
        _warn_once(
            kind.name,
            "what the app adds to messages of kind %s is not noted by enqueue, so it is missing from messages"
            " that are published later: %s: %s", kind.name, type(error).__name__, error,
        )  # fmt: skip
    trace = trace_of_caller()
    if not added.headers and not trace:
        return ""
    of_trace = {name for name in added.headers if name.lower() in OF_TRACES}
    headers = _what_fits({name: value for name, value in added.headers.items() if name not in of_trace})
    link = {name: added.headers[name] for name in of_trace - {BAGGAGE}} | {**trace}
    if kind.options.batch_size > 1:
        link = {}  # or only entities of one trace would share a message
    options = added.options if headers else {}
    notes = (Note(headers, link, options), Note(headers, {}, options), Note(headers, {}))
    return next(text for text in map(_json, notes) if len(text) <= LONGEST_NOTE)


def read_note(text: str) -> Note:
    """A note as `note_of` has written it."""
    noted = json.loads(text) if text else {}
    return Note(noted.get("headers", {}), noted.get("link", {}), noted.get("options", {}))


def warn_of_other_headers(kind: Kind, id: str, noted: str, pending: str) -> None:
    """Warn, once for a kind, of two enqueues with different headers that lead to one evaluation."""
    headers, others = read_note(noted).headers, read_note(pending).headers
    different = sorted(name for name in headers if headers[name] != others.get(name))
    if different:
        _warn_once(
            f"other headers of {kind.name}",
            "%s/%s is scheduled already, with another %s than this enqueue has: both lead to one evaluation,"
            " with the headers of the one whose deadline is in force. An entity is known by its kind and id"
            " alone: make what differs (a tenant, say) a part of the id",
            kind.name, printable(id), ", ".join(different),
        )  # fmt: skip


def _json(note: Note) -> str:
    noted = {name: value for name, value in note._asdict().items() if value}
    return json.dumps(noted, separators=(",", ":")) if noted else ""


def _what_fits(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Short headers before long ones."""
    kept: dict[str, Any] = {}
    for name in sorted(headers, key=lambda name: len(repr(headers[name]))):
        try:
            text = _json(Note({**kept, name: headers[name]}, {}))
        except (TypeError, ValueError) as error:
            problem = f"is not JSON ({error})"
        else:
            if len(text) <= LONGEST_NOTE:
                kept[name] = headers[name]
                continue
            problem = f"is too long (all of them together may have {LONGEST_NOTE} bytes)"
        _warn_once(
            name,
            "the header %r %s: enqueue does not note it, so it is missing from messages that are published"
            " later", name, problem,
        )  # fmt: skip
    return kept


_warned_of: set[str] = set()


def _warn_once(subject: str, message: str, *values: object) -> None:
    if subject not in _warned_of:
        _warned_of.add(subject)
        logger.warning(message, *values)


#: The context variables in which tracers keep the trace under way: OpenTelemetry, Sentry, Datadog, Elastic.
OF_TRACERS = frozenset(
    {
        *("current_context", "current_scope", "isolation_scope", "datadog_contextvar"),
        *("elasticapm_transaction_var", "elasticapm_spans_var"),
    }
)


def outside_traces() -> Context:
    """The caller's context, without the trace that it is in."""
    context = Context()
    for variable, value in copy_context().items():
        if variable.name not in OF_TRACERS:
            context.run(variable.set, value)
    return context


# The caller's trace -------------------------------------------------------------------------------


def trace_of_caller() -> Mapping[str, Any]:
    """The headers that name the caller's trace, by the tracers that this process has loaded.

    What goes wrong with that is logged once, and nothing is named.
    """
    try:
        return _trace()
    except Exception as error:  # noqa: BLE001 - code of others
        _warn_once(
            "trace",
            "the trace of an enqueue is not noted, so messages that are published later have no link to it:"
            " %s: %s",
            type(error).__name__, error,
        )  # fmt: skip
        return NO_LINK


def _trace() -> dict[str, Any]:
    headers: dict[str, Any] = {}
    if propagate := sys.modules.get("opentelemetry.propagate"):
        propagate.inject(headers)
    if sentry := sys.modules.get("sentry_sdk"):
        scope = sentry.get_current_scope()
        if scope.span is not None or getattr(scope, "streamed_span", None) is not None:
            headers["sentry-trace"] = sentry.get_traceparent()
    headers.pop(BAGGAGE, None)
    return headers


# The app's own headers ----------------------------------------------------------------------------


def adds_headers(app: Celery, kind: Kind) -> bool:
    """Whether the class of the app, or of the kind's task, overrides how messages are sent."""
    task = _task(app, kind)
    by_task = task is not None and task.__class__.apply_async is not Task.apply_async
    return by_task or app.__class__.send_task is not Celery.send_task


def _task(app: Celery, kind: Kind) -> Any:
    return app.tasks.get(kind.task) if kind.entity_class is not None else None


class _Recorded(NamedTuple):
    headers: Mapping[str, Any]
    options: Mapping[str, Any]


def _added(app: Celery, kind: Kind, id: str) -> _Recorded:
    """What those classes add to a message of this entity."""
    like_app, task = _recording(app, _AppRecorder), _task(app, kind)
    args, task_id = ([[id, "0"]],), random_id()
    if task is not None and task.__class__.apply_async is not Task.apply_async:
        like_task = _recording(task, _TaskRecorder)
        like_task.app = like_app
        like_task.apply_async(args, {}, task_id=task_id)
    else:
        like_app.send_task(kind.task, args, {}, task_id=task_id)
    if like_app.recorded is None:
        raise TypeError("it does not call super()")
    recorded: _Recorded = like_app.recorded
    return recorded


class _Nowhere:
    """Stands where a message would leave, for a class that does not call `super()`."""

    def __getattr__(self, name: str) -> Any:
        raise TypeError("it does not call super()")


class _AppRecorder(Celery):
    """Where an app's class calls `super().send_task`, its headers are recorded, and nothing is published."""

    OVERLAY: ClassVar[Mapping[str, Any]] = {}
    amqp: Any = _Nowhere()
    recorded: _Recorded | None = None

    def send_task(self, *_: Any, **options: Any) -> Any:
        routing = {name: value for name, value in options.items() if name in ROUTING_OPTIONS}
        plain = {name: value for name, value in routing.items() if isinstance(value, str | int)}
        self.recorded = _Recorded(dict(options.get("headers") or {}), plain)
        return self.AsyncResult(options.get("task_id") or random_id())


class _TaskRecorder(Task):  # type: ignore[type-arg]  # Celery before 5.7 takes no types here
    """Where a task's class calls `super().apply_async`, it goes on to the recorder of its app."""

    #: Celery sets these on the class of each task.
    OVERLAY: ClassVar[Mapping[str, Any]] = {"app": None, "_app": _Nowhere(), "__bound__": True}

    # It only records what it is given, and names fewer parameters than a task: no mistake, as mypy thinks.
    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:  # type: ignore[override]
        return self.app.send_task(self.name, args, kwargs, **options)


def _recording(original: Any, recorder: Any) -> Any:
    """The like of `original`, with a recorder below its own class."""
    like: Any = object.__new__(_on_top_of(recorder, original.__class__))
    like.__dict__.update({name: value for name, value in vars(original).items() if name != "amqp"})
    return like


@lru_cache(maxsize=100)
def _on_top_of(recorder: Any, cls: type) -> Any:
    if issubclass(recorder, cls):
        return recorder
    return type(cls.__name__, (cls, recorder), dict(recorder.OVERLAY))
