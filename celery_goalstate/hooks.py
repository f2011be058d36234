"""What an app adds around enqueues, evaluations and actions: `Engine` has a method for each of these.

A hook around an evaluation or an action returns a context manager (`@contextlib.contextmanager` makes one):
a span, a tenant's database schema, a transaction. It is entered per entity, in a batch too, and per action.
What it raises, when it is entered or left, is a failure of the evaluation. It sees the error that ends what
it surrounds and may raise another one in its place, but not none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from celery_goalstate.actions import Action, Context
    from celery_goalstate.evaluation import Evaluation

#: Gets the kind and the ids before the index is asked; what it raises reaches whoever enqueues.
BeforeEnqueue: TypeAlias = Callable[[str, Sequence[str]], object]

AroundEvaluation: TypeAlias = "Callable[[Evaluation], AbstractContextManager[object]]"
AroundAction: TypeAlias = "Callable[[Context, Action], AbstractContextManager[object]]"

#: Gets the evaluation, the state and the goal state whenever they were read: a seam for tests.
StatesRead: TypeAlias = "Callable[[Evaluation, Any, Any], object]"


@dataclass(slots=True)
class Hooks:
    """The hooks of one engine, each list in the order of the calls: the first one is the outermost."""

    before_enqueue: list[BeforeEnqueue] = field(default_factory=list)
    around_evaluation: list[AroundEvaluation] = field(default_factory=list)
    around_action: list[AroundAction] = field(default_factory=list)
    states_read: list[StatesRead] = field(default_factory=list)
    #: Does each evaluation begin a trace of its own, with a link to that of its enqueue? If not, one that is
    #: due soon goes on with that trace, as a task does.
    own_traces: bool = False
