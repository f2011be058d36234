"""What people ask for: a goal is noted in the database, and on commit the engine is told to look."""

from django.db import transaction

from celery_goalstate.contrib.django import enqueue_on_commit

from .entities import HostEntity
from .models import Event, Goal


def set_goal(hosts, goal):
    """Give each of `hosts` (a query) this goal; return how many hosts there are.

    A host that has the goal already is looked at again too: it costs little and helps who presses twice.
    Raises IndexUnavailable after the commit if the engine could not be told; the resync makes up for it.
    """
    with transaction.atomic():
        found = list(hosts.select_for_update())
        changed = [host for host in found if host.goal != goal]
        fresh_drain = {"drain_looks": 0, "drain_failures": 0, "trouble": ""} if goal == Goal.DOWN else {}
        hosts.filter(pk__in=[host.pk for host in changed]).update(goal=goal, **fresh_drain)
        _note(changed, f"goal is now {goal}")
        _look_at(found)
    return len(found)


def set_pool(hosts, pool):
    """Give each of `hosts` (a query) this pool to move to; otherwise as `set_goal`."""
    with transaction.atomic():
        found = list(hosts.select_for_update())
        changed = [host for host in found if host.goal_pool != pool]
        hosts.filter(pk__in=[host.pk for host in changed]).update(goal_pool=pool)
        _note(changed, f"pool should be {pool}")
        _look_at(found)
    return len(found)


def _note(hosts, text):
    Event.objects.bulk_create(Event(host=host, kind=Event.Kind.GOAL, text=text) for host in hosts)


def _look_at(hosts):
    for host in hosts:
        enqueue_on_commit(HostEntity(host.name), robust=False)
