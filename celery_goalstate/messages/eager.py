"""`task_always_eager`: the publisher that sends no message, but evaluates at once."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from celery import Celery
from celery.exceptions import Retry

from celery_goalstate.display import printable
from celery_goalstate.index.base import Index, Wakeup
from celery_goalstate.messages.notes import NO_LINK
from celery_goalstate.registry import Kind

logger = logging.getLogger(__name__)

#: How often one entity is evaluated within one outermost `enqueue`.
EAGER_EVALUATIONS = 10


class EagerPublisher:
    """Evaluates what is due before `dispatch` returns, one after the other and never nested.

    What an evaluation enqueues waits until it has ended. What is not due stays in the index.
    """

    def __init__(self, app: Celery, index: Index) -> None:
        self._app = app
        self._index = index
        self._queue = _Queue()

    def dispatch(
        self,
        kind: Kind,
        wakeups: Sequence[Wakeup],
        *,
        enqueued: bool = False,  # noqa: ARG002 - the signature of Publisher
        link: Mapping[str, Any] = NO_LINK,  # noqa: ARG002 - likewise
    ) -> bool:
        """Evaluate what is due. Raises what an evaluation does, if `task_eager_propagates`."""
        queue = self._queue
        queue.waiting.extend((kind, wakeup) for wakeup in wakeups)
        if queue.draining:
            return True
        evaluations: Counter[tuple[str, str]] = Counter()
        queue.draining = True
        try:
            while queue.waiting:
                kind, wakeup = queue.waiting.popleft()
                evaluations[kind.name, wakeup.id] += 1
                if wakeup.delay > 0:
                    self._index.put_back(kind.name, [wakeup])
                elif evaluations[kind.name, wakeup.id] > EAGER_EVALUATIONS:
                    self._index.put_back(kind.name, [wakeup])
                    logger.warning(
                        "%s/%s asks for an evaluation at once again and again: after %d in a row it waits"
                        " for the next enqueue",
                        kind.name, printable(wakeup.id), EAGER_EVALUATIONS,
                    )  # fmt: skip
                else:
                    self._evaluate(kind, wakeup)
        finally:
            queue.draining = False
            while queue.waiting:
                kind, wakeup = queue.waiting.popleft()
                self._index.put_back(kind.name, [wakeup])
        return True

    def publish_at_once(self, kind: Kind, wakeups: Sequence[Wakeup]) -> None:
        """There is nothing to wait for."""
        self.dispatch(kind, wakeups)

    def _evaluate(self, kind: Kind, wakeup: Wakeup) -> None:
        task = self._app.tasks.get(kind.task)
        if task is None:
            logger.error(
                "no entity class of kind %s is registered in this process: %s waits in the index,"
                " as if a worker of another code base were to evaluate it",
                kind.name, printable(wakeup.id),
            )  # fmt: skip
            self._index.put_back(kind.name, [wakeup])
            return
        try:
            task.apply(args=([[wakeup.id, wakeup.token]],), task_id=wakeup.task_id, retries=wakeup.retries)
        except Retry as retry:  # task_eager_propagates: show what went wrong, not how it goes on
            raise (retry.exc if isinstance(retry.exc, Exception) else retry) from None


class _Queue(threading.local):
    def __init__(self) -> None:
        self.waiting: deque[tuple[Kind, Wakeup]] = deque()
        self.draining = False
