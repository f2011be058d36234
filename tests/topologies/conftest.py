"""An engine whose broker is nothing to worry about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from celery import Celery

from celery_goalstate import Engine, Entity, Rules


class Host(Entity):
    """Never at its goal."""

    rules = Rules({})
    unconverged: ClassVar[list[str]] = []

    @classmethod
    def iter_unconverged(cls) -> list[str]:
        return cls.unconverged

    def get_state(self) -> str:
        return "old"

    def get_goal_state(self) -> str:
        return "new"


EngineOn = Callable[..., tuple[Engine, type[Host]]]


@pytest.fixture
def engine_on() -> Iterator[EngineOn]:
    """Opens an engine over an index's URL."""
    apps = []

    def open_one(url: str, **conf: Any) -> tuple[Engine, type[Host]]:
        app = Celery("topologies", broker="memory://", set_as_current=False)
        app.conf.update(goalstate_index_url=url, **conf)
        apps.append(app)
        engine = Engine(app)
        return engine, engine.register(type("Host", (Host,), {"unconverged": []}))

    yield open_one
    for app in apps:
        app.close()
