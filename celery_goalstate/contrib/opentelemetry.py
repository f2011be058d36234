"""OpenTelemetry: each evaluation is a trace of its own, and its spans say which entity it is about.

    from celery_goalstate.contrib.opentelemetry import install

    install(engine)

Also where opentelemetry-instrumentation-celery is installed: then the span of the task is that of the
evaluation. Without it, in a batch, and with `task_always_eager`, an evaluation gets a span of its own.

A trace that went on from an enqueue to its evaluation, to what that enqueues, and to its retries, would never
end. So each evaluation begins a trace, with a link to the one in which it was enqueued.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from opentelemetry import propagate, trace
from opentelemetry.context import Context as TraceContext
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode

from celery_goalstate.actions import Action, Context
from celery_goalstate.display import state_text
from celery_goalstate.engine import Engine
from celery_goalstate.entity import EntityRef
from celery_goalstate.evaluation import Evaluation, Outcome, error_text
from celery_goalstate.exceptions import EntityGone
from celery_goalstate.messages.notes import LINK
from celery_goalstate.signals import evaluation_finished

__all__ = ["install"]

tracer = trace.get_tracer("celery_goalstate")


class _Traced(NamedTuple):
    """An evaluation and its span."""

    engine: Engine
    ref: EntityRef
    span: Span
    is_own: bool  #: Is the span the evaluation's own? If not, it is the task's


_traced: ContextVar[_Traced | None] = ContextVar("celery_goalstate_traced", default=None)


def install(engine: Engine) -> None:
    """Trace the engine's evaluations; for the processes that enqueue as for those that evaluate.

    A span carries `goalstate.kind`, `goalstate.entity`, `goalstate.state`, `goalstate.goal` and
    `goalstate.outcome` (`converged`, `unconverged`, `done` where that is not looked at, `requeued`, `failed`,
    `quarantined`, `gone`); each action is a child span. To install it again changes nothing.
    """
    if not engine.hooks.own_traces:
        engine.hooks.own_traces = True
        engine.around_evaluation(_around_evaluation)
        engine.around_action(_around_action)
        evaluation_finished.connect(_end, weak=False)


@contextmanager
def _around_evaluation(evaluation: Evaluation) -> Iterator[None]:
    ref = evaluation.ref
    span, is_own = _span_of(evaluation)
    span.set_attributes({"goalstate.kind": ref.kind, "goalstate.entity": str(ref)})
    _traced.set(_Traced(evaluation.engine, ref, span, is_own))
    with trace.use_span(span, record_exception=False, set_status_on_exception=False):
        yield


@contextmanager
def _around_action(_: Context, action: Action) -> Iterator[None]:
    with tracer.start_as_current_span(
        action.name, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield
        except EntityGone:  # no failure
            raise
        except BaseException as error:
            _fail(span, error)
            raise


def _span_of(evaluation: Evaluation) -> tuple[Span, bool]:
    """The span that the evaluation is to have, and whether it was started for it."""
    current, enqueued_in = trace.get_current_span(), _enqueued_in(evaluation.task)
    task_s = current.get_span_context()
    alone = evaluation.engine.kind(evaluation.ref.kind).options.batch_size == 1
    if task_s.is_valid and alone and not evaluation.task.is_eager:
        if enqueued_in.is_valid:
            current.add_link(enqueued_in)
        return current, False
    links = [Link(context) for context in (task_s, enqueued_in) if context.is_valid]
    return tracer.start_span(
        f"evaluate {evaluation.ref.kind}", context=TraceContext(), kind=SpanKind.CONSUMER, links=links
    ), True


def _enqueued_in(task: Any) -> SpanContext:
    """The span in which a message's enqueue was, if the message names one."""
    headers = getattr(task, LINK, None)
    named = headers if isinstance(headers, dict) else {}
    texts = {name: value for name, value in named.items() if isinstance(value, str)}
    return trace.get_current_span(propagate.extract(texts, TraceContext())).get_span_context()


def _end(engine: Engine, kind: str, id: str, outcome: Outcome, **_: Any) -> None:
    """A receiver of `evaluation_finished`, in the context of the evaluation."""
    traced = _traced.get()
    if traced is None or traced.engine is not engine or traced.ref != EntityRef(kind, id):
        return  # a hook failed before there was a span
    span = traced.span
    if outcome.state is not None:
        span.set_attribute("goalstate.state", state_text(outcome.state))
        span.set_attribute("goalstate.goal", state_text(outcome.goal_state))
    span.set_attribute("goalstate.outcome", _name_of(outcome))
    if outcome.error is not None:
        _fail(span, outcome.error)
    if traced.is_own:
        span.end()


def _name_of(outcome: Outcome) -> str:
    if outcome.gone:
        return "gone"
    if outcome.error is not None:
        return "quarantined" if outcome.quarantined else "failed"
    if outcome.delay is not None:
        return "requeued"
    return {True: "converged", False: "unconverged", None: "done"}[outcome.converged]


def _fail(span: Span, error: BaseException) -> None:
    span.record_exception(error)
    span.set_status(Status(StatusCode.ERROR, error_text(error)))
