"""What the engine does to a host: one function for each action.

Each is idempotent and short: it takes the host's row, moves it one step, and commits before it says how it
went, so that a worker killed at any point leaves a host that the next look can go on with. A worker that was
stalled meanwhile, and wakes up when another has gone on with the host, writes nothing: see `locked`.
"""

import random
from contextlib import contextmanager

from django.db import transaction

from celery_goalstate import Requeue

from .models import Event, Host, State

EVICTIONS_PER_LOOK = 3
LOOK_AGAIN_AFTER = 1.0
FAILURE_RATE = 0.2


class DrainError(Exception):
    """A workload refused to leave its host."""


class StaleWrite(Exception):
    """A newer evaluation has written to this host."""


@contextmanager
def locked(ctx, entity):
    """The host's row, for one short transaction that saves it, unless a newer evaluation has written it."""
    with transaction.atomic():
        host = Host.objects.select_for_update().get(pk=entity.get_id())
        if ctx.fencing_token < host.fence:
            raise StaleWrite(f"a newer evaluation has written to {host.name}")
        host.fence = ctx.fencing_token
        yield host
        host.save()


def drain(ctx, entity):
    """Move a few workloads to other hosts, and look again while some are left."""
    with locked(ctx, entity) as host:
        host.state = State.DRAINING
        host.drain_looks += 1
        host.trouble = refusal(host, host.drain_looks)
        if host.trouble:
            host.drain_failures += 1
            host.events.create(kind=Event.Kind.FAILURE, text=f"drain failed: {host.trouble}")
        else:
            evicted = min(EVICTIONS_PER_LOOK, host.workloads)
            host.workloads -= evicted
            if host.workloads:
                host.events.create(kind=Event.Kind.LOOK, text=f"moved {evicted}, {host.workloads} to go")
            else:
                host.state = State.DRAINED
                host.events.create(kind=Event.Kind.DONE, text=f"drained in {_looks(host)}")
    # Only now, outside of the transaction: an exception inside would undo what was noted.
    if host.trouble:
        raise DrainError(f"{host.name}: {host.trouble}")
    if host.workloads:
        return Requeue(LOOK_AGAIN_AFTER)
    return None


def power_off(ctx, entity):
    with locked(ctx, entity) as host:
        host.state = State.DOWN
        host.events.create(kind=Event.Kind.DONE, text="powered off")


def power_on(ctx, entity):
    """Put a host back into service: switched on if it was off, and given work again."""
    with locked(ctx, entity) as host:
        text = "powered on" if host.state == State.DOWN else "back in service"
        host.state = State.UP
        host.workloads = host.slots
        host.trouble = ""
        host.events.create(kind=Event.Kind.DONE, text=text)


def change_pool(ctx, entity):
    with locked(ctx, entity) as host:
        if host.pool != host.goal_pool:
            host.events.create(kind=Event.Kind.DONE, text=f"moved from pool {host.pool} to {host.goal_pool}")
            host.pool = host.goal_pool


def refusal(host, look):
    """Why this look fails, or nothing. Decided by name and look, so that every run tells the same story."""
    chance = random.Random(f"{host.name}/{look}")
    if chance.random() >= FAILURE_RATE:
        return ""
    return chance.choice(
        [
            f"pool {host.pool} may not lose another replica now",
            "no answer from the host's agent within 2 s",
            f"no free slot for {host.pool}-{chance.randrange(16**5):05x}",
        ]
    )


def _looks(host):
    return "one look" if host.drain_looks == 1 else f"{host.drain_looks} looks"
