"""Django: rows of models as entities, goals that are set on commit, checks, commands, and the admin.

Settings are Celery's own: with `app.config_from_object("django.conf:settings", namespace="CELERY")` each
`goalstate_x` is `CELERY_GOALSTATE_X` in Django's settings. What needs models is in `.models`, for they cannot
be imported while Django loads its apps.
"""

from celery_goalstate.contrib.django.entity import ModelEntity, StateChanged
from celery_goalstate.contrib.django.guard import EnqueuedInTransaction
from celery_goalstate.contrib.django.scheduling import (
    aenqueue,
    aenqueue_on_commit,
    aset_goal,
    enqueue_many_on_commit,
    enqueue_on_commit,
    not_enqueued,
    set_goal,
)

__all__ = [
    "EnqueuedInTransaction",
    "ModelEntity",
    "StateChanged",
    "aenqueue",
    "aenqueue_on_commit",
    "aset_goal",
    "enqueue_many_on_commit",
    "enqueue_on_commit",
    "not_enqueued",
    "set_goal",
]
