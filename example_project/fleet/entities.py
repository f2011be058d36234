"""A host as the engine sees it. Imported by `celery_goalstate.contrib.django`, in every process."""

from celery_goalstate import ANY, Entity, Rules
from celery_goalstate.exceptions import PermanentError
from example_project.celery import engine

from .actions import change_pool, drain, power_off, power_on
from .models import Goal, Host, State


# The resync is the safety net: should the index lose its data, or be away when a goal changes,
# the database still knows every host that is not where it should be.
@engine.register(resync_every=60)
class HostEntity(Entity):
    kind = "host"
    rules = Rules(
        {
            Goal.DOWN: {
                State.UP: [drain],
                State.DRAINING: [drain],
                State.DRAINED: [power_off],
                State.DOWN: [change_pool],
            },
            Goal.UP: {
                State.UP: [change_pool],
                ANY: [change_pool, power_on],
            },
        }
    )

    def get_state(self):
        return State(self._read("state"))

    def get_goal_state(self):
        return Goal(self._read("goal"))

    def is_converged(self, state, goal_state):
        # The pool is a part of the goal: a host that is off by now may still have to change it.
        return state == goal_state and Host.objects.at_goal().filter(pk=self.get_id()).exists()

    @classmethod
    def iter_unconverged(cls):
        return Host.objects.unconverged().values_list("name", flat=True).iterator()

    def _read(self, field):
        value = Host.objects.filter(pk=self.get_id()).values_list(field, flat=True).first()
        if value is None:
            raise PermanentError(f"the inventory has no host {self.get_id()}")
        return value
