"""The app whose worker gets hostile messages."""

from __future__ import annotations

import os

from celery import Celery

from celery_goalstate import Action, ActionList, Context, Engine, Entity

app = Celery("hostile", broker=os.environ["HOSTILE_BROKER"], set_as_current=False)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
    timezone=os.environ.get("HOSTILE_ZONE", "UTC"),
    goalstate_index_url=os.environ["HOSTILE_INDEX"],
    goalstate_sweep_interval=0.2,
)
engine = Engine(app)


def say(ctx: Context, entity: Entity) -> None:
    """Tell the log that an honest entity was evaluated."""
    ctx.log.warning("honest %s", entity.id)


@engine.register
class Order(Entity):
    """An honest entity."""

    kind = "order"

    def get_state(self) -> int:
        """Read the state."""
        return 1

    def get_goal_state(self) -> int:
        """Read the goal."""
        return 1

    def get_action_list(self, state: int, goal_state: int) -> ActionList:
        """Tell that it was here."""
        return ActionList([Action("say", say)])
