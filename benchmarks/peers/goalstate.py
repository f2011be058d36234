"""celery-goalstate, with a message for each evaluation."""

from __future__ import annotations

from celery import Celery

from benchmarks.peers.job import HOUR, SERVER, ran
from celery_goalstate import Engine, Enqueued, Entity

app = Celery("peer", broker=SERVER)
app.conf.update(task_ignore_result=True, worker_send_task_events=False)
engine = Engine(app)


@engine.register
class Job(Entity):
    def get_state(self) -> str:
        return "done"

    def get_goal_state(self) -> str:
        return "done"

    def get_action_list(self, state: str, goal_state: str) -> None:  # noqa: ARG002 - the signature is given
        ran()  # here: the states are read once more at the end


def enqueue(id: str, delay: float | None) -> Enqueued:
    return engine.enqueue(Job(id), delay)


def duplicate() -> bool:
    return not enqueue("known", HOUR).changed


def enqueue_many(ids: list[str], delay: float | None) -> None:
    engine.enqueue_many(map(Job, ids), delay)
