"""Celery's time limits are of a task, and the entities of a batch share one: the two do not go together."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from celery import Task

from celery_goalstate import Engine
from celery_goalstate.exceptions import ImproperlyConfigured
from tests.integration.conftest import MakeApp, Truth, worker_of
from tests.servers import Valkey

LIMITS = ["soft_time_limit", "time_limit"]
USE_INSTEAD = r"Bound each evaluation by ActionList\(\.\.\., timeout=\.\.\.\), or set batch_size=1"


class Limited(Task):
    abstract = True
    soft_time_limit = 5


@pytest.mark.parametrize("limit", LIMITS)
def test_refused_when_registered(make_app: MakeApp, truth: Truth, limit: str) -> None:
    engine = Engine(make_app())
    with pytest.raises(ImproperlyConfigured, match=f"{limit}=2 and batch_size=8 cannot go.*{USE_INSTEAD}"):
        engine.register(batch_size=8, **{limit: 2})(truth.entity())


def test_refused_when_a_base_class_has_the_limit(make_app: MakeApp, truth: Truth) -> None:
    engine = Engine(make_app())
    with pytest.raises(ImproperlyConfigured, match="soft_time_limit=5 and batch_size=8 cannot go together"):
        engine.register(batch_size=8, base=Limited)(truth.entity())


def test_refused_once_the_settings_are_known(make_app: MakeApp, truth: Truth) -> None:
    """The batches are those of all kinds; a kind without them may have the limit."""
    engine = Engine(make_app(goalstate_batch_size=8))
    order = engine.register(time_limit=2)(truth.entity())
    host = engine.register(time_limit=2, batch_size=1)(truth.entity("host"))
    with pytest.raises(ImproperlyConfigured, match="kind 'order': time_limit=2 and batch_size=8 cannot go"):
        engine.enqueue(order("1"))
    engine.enqueue(host("1"))


@pytest.mark.parametrize(
    "options", [{"time_limit": 2}, {"batch_size": 8, "time_limit": None}, {"batch_size": 8}]
)
def test_either_alone_is_accepted(make_app: MakeApp, truth: Truth, options: dict[str, Any]) -> None:
    engine = Engine(make_app())
    engine.enqueue(engine.register(**options)(truth.entity())("1"))


#: An app with a kind that has batches, and where its task gets a limit from.
APP = """
    from celery import Celery, Task
    from celery_goalstate import Engine, Entity, Rules

    class Limited(Task):
        abstract = True
        time_limit = 5

    app = Celery("shop", broker={broker!r}, {options})
    app.conf.update(task_time_limit=9)
    engine = Engine(app)

    @engine.register(batch_size=8)
    class Order(Entity):
        rules = Rules({{}})
"""


@pytest.mark.parametrize(
    "options",
    [
        "task_annotations={'goalstate.order': {'time_limit': 5}}",
        "task_annotations={'*': {'time_limit': 5}}",
        "task_cls=Limited",
    ],
)
def test_a_worker_refuses_the_limit_that_the_task_got(valkey: Valkey, tmp_path: Path, options: str) -> None:
    (tmp_path / "shop.py").write_text(textwrap.dedent(APP.format(broker=valkey.url, options=options)))
    command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "--pool", "solo"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert re.search(f"kind 'order': time_limit=5 and batch_size=8 cannot go.*{USE_INSTEAD}", done.stderr)


@pytest.mark.parametrize(
    ("conf", "command_line"), [({"task_time_limit": 300}, {}), ({}, {"soft_time_limit": 300})]
)
def test_a_worker_warns_of_its_own_limit(
    make_app: MakeApp,
    truth: Truth,
    caplog: pytest.LogCaptureFixture,
    conf: dict[str, Any],
    command_line: dict[str, Any],
) -> None:
    """It is for all tasks, most keep far below it, and no kind can be excepted."""
    app = make_app(**conf)
    engine = Engine(app)
    engine.register(batch_size=8)(truth.entity())
    engine.register(truth.entity("host"))
    with worker_of(app, **command_line):
        pass
    [record] = [record for record in caplog.records if "time limit" in record.message]
    assert record.levelname == "WARNING"
    assert record.message.startswith(
        "the worker's time limit (300 s) is of a task, and entities of order share one:"
    )
