"""What has happened, by Celery's own kind of signals. `hooks` are for what is to have a say in it.

    from celery_goalstate import signals

    @signals.entity_quarantined.connect(sender="order")
    def page_somebody(engine, kind, id, error, **kwargs): ...

Each is about one entity, also of a batch and with `task_always_eager`, and is sent in the process where it
happens. Its sender is the kind. A receiver that raises is logged and changes nothing; one that takes long
holds up the worker. What a receiver enqueues of the same entity counts as enqueued by the evaluation that
the signal is about.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

#: An evaluation begins: before its hooks, and before the entity is loaded.
evaluation_started = Signal(name="evaluation_started", providing_args=["engine", "kind", "id"])

#: An evaluation has ended, and is to be reported to the index. `outcome` is an `evaluation.Outcome`,
#: `lateness` is how many seconds after its deadline it began, `seconds` how long it took. Not sent of one
#: that the end of its worker cuts off: it begins anew elsewhere.
evaluation_finished = Signal(
    name="evaluation_finished", providing_args=["engine", "kind", "id", "outcome", "lateness", "seconds"]
)

#: A wake-up leads to no evaluation. `reason` is why: the entity is `missing` (deleted, say), the wake-up is
#: `stale` (another one counts), the kind is `paused`, it is too `early`, or the index is `away`.
wakeup_refused = Signal(name="wakeup_refused", providing_args=["engine", "kind", "id", "reason"])

#: An entity is quarantined: nothing happens until it is enqueued. `error` is the text of its last error.
entity_quarantined = Signal(name="entity_quarantined", providing_args=["engine", "kind", "id", "error"])

#: An evaluation has lost its lease. Sent by the sweeper, in the main process of a worker, when it ends an
#: evaluation whose worker fell silent; and by that worker, if it lives, when its outcome is dropped.
lease_lost = Signal(name="lease_lost", providing_args=["engine", "kind", "id"])
