"""A base class for all tasks of a project, or `task_cls`: it undoes nothing that an evaluation ended with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Task, states

from celery_goalstate import Engine
from celery_goalstate.exceptions import PermanentError
from celery_goalstate.settings import REFUSED_TASK_OPTIONS
from celery_goalstate.worker.task import OWN_OPTIONS
from tests.integration.conftest import MakeApp, Truth, World, worker_of
from tests.servers import Valkey, poll

#: Attributes that a base class has for its own tasks, each other than what Celery has by default.
SET: dict[str, Any] = {
    "autoretry_for": (Exception,),
    "dont_autoretry_for": (KeyError,),
    "retry_kwargs": {"countdown": 1, "max_retries": 3},
    "retry_backoff": True,
    "retry_backoff_max": 5,
    "retry_jitter": False,
    "retry_on_worker_lost": True,
    "max_retries": 0,
    "default_retry_delay": 1,
    "expires": 1,
    "serializer": "pickle",
    "compression": "zlib",
    "typing": True,
}

WAYS = ["base", "task_cls", "annotations"]


def world_of(make_world: Callable[..., World], way: str, attributes: dict[str, Any]) -> World:
    """A world in which all tasks have these attributes in one way or another."""
    if way == "annotations":
        world = make_world(goalstate_jitter=False, task_annotations={"*": attributes})
        world.register("host")
        return world
    base = type("OfTheProject", (Task,), {"abstract": True, **attributes})
    world = make_world(goalstate_jitter=False)
    if way == "base":
        world.register("host", base=base)
    else:
        world.app.task_cls = base
        world.register("host")
    return world


def end(world: World, error: BaseException | None) -> tuple[str, list[tuple[int, float]]]:
    """The state of the task whose action raises this, and the messages that follow."""

    def act(ctx: Any, entity: Any) -> None:
        if error is not None:
            raise error
        world.truth.reach(ctx, entity)

    world.truth.set("1", act)
    world.engine.enqueue(world.engine.ref("host", "1"))
    [result] = world.run()
    return result.state, [(each.retries, round(each.delay)) for each in world.messages()]


def test_what_is_refused_as_an_option_is_settled_for_the_task() -> None:
    attributes = {name for name in REFUSED_TASK_OPTIONS if hasattr(Task, name)}
    given_besides = {"bind", "name"}
    assert attributes - given_besides <= OWN_OPTIONS.keys() <= REFUSED_TASK_OPTIONS.keys()
    assert OWN_OPTIONS.keys() == SET.keys()


@pytest.mark.parametrize("way", ["base", "task_cls"])
@pytest.mark.parametrize("name", SET)
def test_an_attribute_of_a_class_is_not_the_tasks(
    make_world: Callable[..., World], way: str, name: str
) -> None:
    world = world_of(make_world, way, {name: SET[name]})
    assert getattr(world.app.tasks["goalstate.host"], name) == OWN_OPTIONS[name]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermanentError("no such host"), (states.FAILURE, [])),
        (OSError("no route"), (states.RETRY, [(1, 10)])),
        (None, (states.SUCCESS, [])),
    ],
    ids=["quarantined", "failed", "done"],
)
def test_all_of_them_together_change_no_outcome(
    make_world: Callable[..., World], way: str, error: BaseException | None, expected: Any
) -> None:
    retries = {name: value for name, value in SET.items() if "retr" in name}
    assert end(world_of(make_world, way, retries), error) == expected


@pytest.mark.parametrize("way", ["base", "task_cls"])
def test_the_rest_of_the_class_is_the_projects(
    make_world: Callable[..., World], truth: Truth, way: str
) -> None:
    called: list[str] = []
    attributes = {
        "acks_late": True,
        "rate_limit": "10/s",
        "on_failure": lambda *args: called.append("on_failure"),
        "before_start": lambda *args: called.append("before_start"),
    }
    world = world_of(make_world, way, attributes)
    task = world.app.tasks["goalstate.host"]
    assert (task.acks_late, task.rate_limit) == (True, "10/s")
    end(world, PermanentError("no such host"))
    assert called == ["before_start", "on_failure"]


@pytest.mark.parametrize("way", ["base", "task_cls"])
def test_a_quarantine_is_one_failure_in_a_worker(
    make_app: MakeApp, truth: Truth, valkey: Valkey, way: str
) -> None:
    called: list[str] = []

    class Resilient(Task):
        abstract = True
        autoretry_for = (Exception,)
        retry_kwargs = {"countdown": 0, "max_retries": 3}  # noqa: RUF012 - as projects have it

        def on_failure(self, *args: Any) -> None:
            called.append("failure")

        def on_retry(self, *args: Any) -> None:
            called.append("retry")

        def on_success(self, *args: Any) -> None:
            called.append("success")

    app = make_app(broker=valkey.url)
    if way == "task_cls":
        app.task_cls = Resilient
    engine = Engine(app)
    entity = engine.register(**({"base": Resilient} if way == "base" else {}))(truth.entity())

    def refuse(ctx: Any, entity: Any) -> None:
        raise PermanentError("no such customer")

    truth.set("1", refuse)
    truth.set("2", truth.reach)
    with worker_of(app):
        engine.enqueue(entity("1"))
        poll("quarantined", lambda: called)
        engine.enqueue(entity("2"))  # comes after whatever was sent for the first
        poll("converged", lambda: len(called) > 1)
    assert called == ["failure", "success"]
    described = engine.describe(entity("1"))
    assert described is not None
    assert described.status == "failed"
