"""The pytest plugin `goalstate`. Each run of pytest loads it, so it imports nothing until it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from celery_goalstate.engine import Engine
    from celery_goalstate.testing import Simulation


def pytest_addoption(parser: pytest.Parser) -> None:
    """The setting `goalstate_isolate`."""
    parser.addini("goalstate_isolate", "simulate every engine in every test", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Isolate all tests, if the project wants that."""
    if config.getini("goalstate_isolate"):
        config.pluginmanager.register(_Isolation(), "goalstate-isolation")


@pytest.fixture
def goalstate_engine() -> Engine | None:
    """The engine that `goalstate` simulates: override it in a project that has several."""
    return None


@pytest.fixture
def goalstate(request: pytest.FixtureRequest, goalstate_engine: Engine | None) -> Iterator[Simulation]:
    """The engine in a world of its own: a fresh index, its own clock, no messages. See `testing.simulate`."""
    from celery_goalstate.testing import simulate

    simulation, failed = simulate(goalstate_engine), request.session.testsfailed
    with simulation.in_place():
        yield simulation
    if request.session.testsfailed == failed:  # else that is enough to read
        simulation.check_reached()


class _Isolation:
    """Every test is in a world of its own, and no engine opens a real index."""

    @pytest.fixture(scope="session", autouse=True)
    def _no_goalstate_index(self) -> Iterator[None]:
        from celery_goalstate.testing.isolation import no_real_index

        with no_real_index():
            yield

    @pytest.fixture(autouse=True)
    def _goalstate_isolated(self, _no_goalstate_index: None) -> Iterator[None]:
        from celery_goalstate.testing.isolation import all_simulated

        with all_simulated():
            yield
