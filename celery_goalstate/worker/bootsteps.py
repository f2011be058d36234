"""What the engine adds to a Celery worker's main process: the sweeper, on its timer, and what is done last.

A callback must neither block for long nor let an error escape: either would hold up the consumer.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from celery import Celery, bootsteps
from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE
from celery.utils.quorum_queues import detect_quorum_queues
from kombu.utils.uuid import uuid

from celery_goalstate.exceptions import AccessDenied, ImproperlyConfigured, IndexUnavailable
from celery_goalstate.index.url import safe_url
from celery_goalstate.messages.producers import keep_client
from celery_goalstate.registry import Kind
from celery_goalstate.settings import TIME_LIMITS, Settings, refuse_limit_of_batch
from celery_goalstate.worker.parts import Parts
from celery_goalstate.worker.shutdown import give_back, is_ending, name_worker
from celery_goalstate.worker.sweeper import Sweeper

logger = logging.getLogger(__name__)


#: After a sweep that failed comes a pause of so many times what it took.
LOOP_SHARE = 4
#: Seconds that a sweep has to end when the worker stops. What is cut off between the index and the broker is
#: sent again, but only after `goalstate_resend_after`.
SWEEP_ENDS = 3.0


class KeepClientStep(bootsteps.StartStopStep):
    """Lets the consumer's channel on Redis keep one client, unless `goalstate_keep_client` is False."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    settings: Callable[[], Settings]

    def start(self, parent: Any) -> None:
        """Whenever the consumer has connected."""
        if type(self).settings().keep_client:
            keep_client(parent.task_consumer.channel)


class ResumeStep(bootsteps.StartStopStep):
    """Lets the sweepers of all engines of a worker go on."""

    name = "celery_goalstate.Resume"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Whenever the consumer has connected."""
        for step in parent.controller.steps:
            if isinstance(step, SweeperStep):
                step.resume()


class GiveBackStep(bootsteps.StartStopStep):
    """Gives back what a cold shutdown has cut off, when all else of the worker has stopped."""

    settings: Callable[[], Settings]
    kinds: Callable[[], Mapping[str, Kind]]
    parts: Callable[[], Parts]

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        name_worker()  # before its pool has processes

    def include(self, parent: Any) -> bool:
        """The first step to start is the last one to stop: after the pool, whatever that stands behind."""
        included: bool = super().include(parent)
        parent.steps.remove(self)
        parent.steps.insert(0, self)
        return included

    def stop(self, parent: Any) -> None:  # noqa: ARG002 - bootsteps' signature
        """Also a warm shutdown may have turned into a cold one."""
        if not is_ending():
            return
        try:
            step = type(self)
            give_back(step.parts(), step.kinds().values(), wait=step.settings().lease)
        except IndexUnavailable as error:
            logger.warning(
                "evaluations that were cut off could not be given back: each counts a failure when its lease"
                " has run out, and begins anew: %s",
                error,
            )

    def terminate(self, parent: Any) -> None:
        """A cold shutdown's `stop`."""
        self.stop(parent)


class SweeperStep(bootsteps.StartStopStep):
    """Sweeps while the worker runs, whatever its pool."""

    requires = ("celery.worker.components:Timer", "celery.worker.components:Pool")
    settings: Callable[[], Settings]
    kinds: Callable[[], Mapping[str, Kind]]
    open_sweeper: Callable[[str], Sweeper]

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._sweeper: Sweeper | None = None
        self._problem = ""  # why the last sweep failed: logged once, not every second
        self._checked = False  # was the server checked?
        self._running = False
        self._timer: Any = None
        self._next: Any = None
        self._turn = 0  # of the newest tick: no other one is followed by the next
        self._sweeping = False

    def start(self, parent: Any) -> None:
        """Check settings and index, then sweep every `sweep_interval` seconds."""
        settings = type(self).settings()
        if settings.index_url == "memory://":
            _refuse_processes(parent)
        batched = [kind for kind in type(self).kinds().values() if kind.options.batch_size > 1]
        _refuse_limits(parent.app, batched)
        self._name = f"{parent.hostname}:{os.getpid()}:{uuid()[:8]}"
        self._interval = settings.sweep_every
        # An index other than the producers' is the classic mistake: they enqueue, and here nothing is known.
        logger.info(
            "the index is on %s, namespace %s, key prefix %s, shards %d",
            safe_url(settings.index_url),
            settings.namespace,
            settings.key_prefix,
            settings.shards,
        )
        for warning in (*broker_warnings(parent.app, settings.eta_horizon), *limit_warnings(parent, batched)):
            logger.warning("%s", warning)
        try:
            self._open().prepare()
        except (AccessDenied, ImproperlyConfigured) as error:  # which does not pass while one waits
            logger.critical("this worker ends, since it cannot use the index: %s", error)
            raise WorkerShutdown(EX_FAILURE) from error
        except IndexUnavailable as error:
            self._wait(error)
        self._timer = parent.timer
        self._running = True
        self._sweep_in(0.0)

    def resume(self) -> None:
        """Sweep at once, and go on: before Celery 5.7 the timer is cleared when a connection is lost."""
        if self._running and not self._sweeping:  # under gevent, to cancel a sweep would kill it midway
            self._next.cancel()
            self._sweep_in(0.0)

    def stop(self, parent: Any) -> None:  # noqa: ARG002 - bootsteps' signature
        """Sweep no more; another worker takes over. A sweep in another thread or greenlet may end."""
        self._running = False
        until = time.monotonic() + SWEEP_ENDS
        while self._sweeping and time.monotonic() < until:
            time.sleep(0.02)
        if self._next is not None:
            self._next.cancel()

    def terminate(self, parent: Any) -> None:
        """A cold shutdown's `stop`."""
        self.stop(parent)

    def _sweep_in(self, seconds: float) -> None:
        self._turn += 1
        self._next = self._timer.call_after(seconds, self._tick, (self._turn,))

    def _tick(self, turn: int) -> None:
        began, more = time.monotonic(), False
        self._sweeping = True
        try:
            more = self._sweep()
        except IndexUnavailable as error:
            self._wait(error)
        except Exception as error:
            if self._is_news(repr(error)):
                logger.exception("a sweep failed; it is tried again and again")
        finally:
            self._sweeping = False
            # An index that lets its callers wait may have its share of the worker's loop, and no more.
            pause = LOOP_SHARE * (time.monotonic() - began) if self._problem else 0.0
            if self._running and turn == self._turn:
                interval = 0.0 if more else self._interval
                self._sweep_in(max(interval, pause))

    def _sweep(self) -> bool:
        more = self._open().sweep()
        if not self._checked:
            self._checked = True
            self._open().check_server()
        if self._problem:
            logger.info("the sweeper works again")
            self._problem = ""
        return more

    def _open(self) -> Sweeper:
        if self._sweeper is None:
            self._sweeper = type(self).open_sweeper(self._name)
        return self._sweeper

    def _wait(self, error: IndexUnavailable) -> None:
        if self._is_news("away"):  # whatever the words: while it fails over, they change
            logger.warning("the sweeper waits for the index: %s", error)

    def _is_news(self, problem: str) -> bool:
        before, self._problem = self._problem, problem
        return before != problem


def _refuse_processes(worker: Any) -> None:
    from celery.concurrency.prefork import TaskPool

    if issubclass(worker.pool_cls, TaskPool):
        raise ImproperlyConfigured(
            "the index memory:// lives in one process, and the pool prefork has several:"
            " set goalstate_index_url, or use --pool=solo or --pool=threads"
        )


def _refuse_limits(app: Celery, batched: Iterable[Kind]) -> None:
    """A limit that the task of a kind got from an annotation, or from the class of all tasks."""
    for kind in batched:
        for name in TIME_LIMITS:
            limit = getattr(app.tasks[kind.task], name)
            if limit != app.conf.get(f"task_{name}"):
                try:
                    refuse_limit_of_batch(name, limit, kind.options.batch_size)
                except ImproperlyConfigured as error:
                    raise ImproperlyConfigured(f"kind {kind.name!r}: {error}") from None


def limit_warnings(worker: Any, batched: Iterable[Kind]) -> Iterator[str]:
    """What is wrong with a time limit of the worker, which is for all its tasks."""
    limits = [limit for limit in (worker.soft_time_limit, worker.time_limit) if limit]
    if limits and (names := ", ".join(kind.name for kind in batched)):
        yield (
            f"the worker's time limit ({min(limits):g} s) is of a task, and entities of {names} share one: it"
            " may interrupt one of them for what others took. Bound each evaluation by"
            " ActionList(..., timeout=...), and keep that well below the limit; or set batch_size=1"
        )


def broker_warnings(app: Celery, eta_horizon: float) -> Iterator[str]:
    """What is wrong with the broker's settings, if messages are published `eta_horizon` seconds ahead."""
    if not eta_horizon:
        return
    with app.connection_for_read() as connection:  # not connected yet
        transport, options = connection.transport, connection.transport_options or {}
    driver, channel = transport.driver_type, getattr(transport, "Channel", None)  # the broker's own default
    timeout = options.get("visibility_timeout", getattr(channel, "visibility_timeout", None))
    if isinstance(timeout, int | float) and timeout <= eta_horizon:
        yield (
            f"the broker's visibility_timeout is {timeout:g} s, and workers hold messages that are not due"
            f" for up to {eta_horizon:g} s: the broker delivers these again and again. Set"
            " goalstate_eta_horizon to less"
        )
    direct = [
        queue.name for queue in app.amqp.queues.consume_from.values() if queue.exchange.type == "direct"
    ]
    if direct and detect_quorum_queues(app, driver)[0]:
        yield (
            f"with quorum queues RabbitMQ itself holds back messages that are not due, but not on a direct"
            f" exchange, as that of {', '.join(direct)}: there they fill the workers, and what is due waits."
            " Set task_default_exchange_type (or task_create_missing_queue_exchange_type, or the exchange of"
            " the queue in task_queues) to topic, or goalstate_eta_horizon to 0"
        )


def install(
    app: Celery,
    name: str,
    *,
    settings: Callable[[], Settings],
    kinds: Callable[[], Mapping[str, Kind]],
    parts: Callable[[], Parts],
    open_sweeper: Callable[[str], Sweeper],
) -> None:
    """Add what one engine needs to every worker of the app."""
    sweeper = type(
        f"GoalStateSweeper({name})",
        (SweeperStep,),
        {
            "name": f"celery_goalstate.Sweeper.{name}",
            "settings": staticmethod(settings),
            "kinds": staticmethod(kinds),
            "open_sweeper": staticmethod(open_sweeper),
        },
    )
    keep_client = type(
        f"GoalStateKeepClient({name})",
        (KeepClientStep,),
        {"name": f"celery_goalstate.KeepClient.{name}", "settings": staticmethod(settings)},
    )
    give_back = type(
        f"GoalStateGiveBack({name})",
        (GiveBackStep,),
        {
            "name": f"celery_goalstate.GiveBack.{name}",
            "settings": staticmethod(settings),
            "kinds": staticmethod(kinds),
            "parts": staticmethod(parts),
        },
    )
    app.steps["worker"] |= {sweeper, give_back}
    app.steps["consumer"] |= {keep_client, ResumeStep}
