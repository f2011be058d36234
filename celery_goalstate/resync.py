"""Resync as an entity of its own: one at a time, retried, and as visible as any other."""

from __future__ import annotations

from celery_goalstate.actions import Action, Context, Requeue
from celery_goalstate.entity import Entity

#: The one entity of the kind that resyncs another kind.
RESYNC_ID = "all"


def resync_kind(kind: str) -> str:
    """The kind whose one entity resyncs this kind."""
    return f"{kind}.resync"


def resync_class(cls: type[Entity]) -> type[Resync]:
    """The entity class that resyncs this one."""
    return type(f"Resync{cls.__name__}", (Resync,), {"kind": resync_kind(cls.kind), "of": cls.kind})


class Resync(Entity):
    """A kind that is to be resynced every now and then."""

    kind = "resync"
    of: str

    def get_state(self) -> str:
        """Always due."""
        return "due"

    def get_goal_state(self) -> str:
        """Never equal to the state: what follows is up to the action."""
        return "resynced"

    def get_action_list(self, state: str, goal_state: str) -> Action:  # noqa: ARG002 - there is only one
        """The one action that there is."""
        return Action("resync", _resync)


def _resync(ctx: Context, entity: Resync) -> Requeue | None:
    every = ctx.engine.kind(entity.of).options.resync_every
    ctx.log.info("%d entities of kind %s enqueued", ctx.engine.resync(entity.of, spread=every), entity.of)
    return None if every is None else Requeue(every)
