"""The pytest plugin, in projects of its own: each is a directory, and a run of pytest in it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

SHOP = """
    from celery import Celery
    from celery_goalstate import Engine, Entity

    app = Celery("shop", broker="redis://localhost:1/0")
    engine = Engine(app)
    state = {}

    @engine.register
    class Order(Entity):
        def get_state(self): return state.get(self.id, "placed")
        def get_goal_state(self): return "shipped"
        def get_action_list(self, state, goal_state): return ["ship"] if state == "placed" else []
        def ship(self, ctx): state[self.id] = "shipped"
"""

#: Celery's own fixtures, not those of pytest-celery, whose plugin is called so.
CONTRIB = ["-p", "no:celery", "-p", "celery.contrib.pytest"]

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the tests of a project, with this outcome; what is shown."""

    def run(tests: str, *options: str, ini: str = "", outcome: str = "1 passed", **files: str) -> str:
        (tmp_path / "pytest.ini").write_text(f"[pytest]\naddopts = -p no:cacheprovider\n{ini}\n")
        for name, text in {"shop": SHOP, "test_it": tests, **files}.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:django", *options],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        output = done.stdout + done.stderr
        assert done.stdout.splitlines()[-1].startswith(f"{outcome} in "), output
        return output

    return run


def test_the_fixture_simulates_the_only_engine(run: Run) -> None:
    run(
        """
        from shop import Order, engine, state

        def test_it_ships(goalstate):
            engine.enqueue(Order("42"))
            goalstate.run_until_idle()
            assert state == {"42": "shipped"}

        def test_another_sees_nothing_of_it(goalstate):
            goalstate.assert_not_scheduled(Order("42"))
            assert not goalstate.looks and goalstate.engine is engine
        """,
        outcome="2 passed",
    )


def test_a_project_with_several_engines_names_one(run: Run) -> None:
    run(
        """
        import pytest
        from celery import Celery
        from celery_goalstate import Engine
        from shop import Order, engine

        other = Engine(Celery("billing", broker="redis://localhost:1/0"))

        def test_it_ships(goalstate):
            goalstate.assert_converges(Order("42"))

        class TestOther:
            @pytest.fixture
            def goalstate_engine(self):
                return other

            def test_it(self, goalstate):
                assert goalstate.engine is other
        """,
        conftest="""
        import pytest

        @pytest.fixture
        def goalstate_engine():
            from shop import engine
            return engine
        """,
        outcome="2 passed",
    )


def test_without_an_engine_it_says_what_to_do(run: Run) -> None:
    run(
        """
        import pytest

        def test_it(request):
            with pytest.raises(LookupError, match="there is no engine yet: import the module"):
                request.getfixturevalue("goalstate")
        """
    )


def test_isolated_tests_reach_no_index(run: Run) -> None:
    """Nothing listens where the index would be: an enqueue that went there would fail."""
    run(
        """
        import unittest

        import pytest
        from celery import Celery
        from celery_goalstate import Engine
        from shop import Order, engine
        import billing

        def test_it_is_enqueued():
            assert engine.enqueue(Order("42"), 60).changed
            assert billing.engine.enqueue(billing.Invoice("1"), 60).changed

        def test_another_sees_nothing_of_it():
            assert engine.describe(Order("42")) is None
            assert billing.engine.describe(billing.Invoice("1")) is None

        def test_the_clock_is_there_for_whoever_wants_it(goalstate):
            goalstate.assert_converges(Order("43"))

        class TestCase(unittest.TestCase):
            def test_it(self):
                assert engine.enqueue(Order("42"), 60).changed

        def test_a_newer_engine_is_stopped():
            newer = Engine(Celery("newer", broker="redis://:secret@localhost:1/0"))
            newer.register(type("Thing", (Order,), {}))
            with pytest.raises(RuntimeError, match="about to open its index") as raised:
                newer.enqueue(newer.ref("thing", 1))
            assert "secret" not in str(raised.value)
        """,
        conftest="""
        import pytest

        @pytest.fixture
        def goalstate_engine():
            from shop import engine
            return engine
        """,
        billing=SHOP.replace("Order", "Invoice"),
        ini="goalstate_isolate = true",
        outcome="5 passed",
    )


def test_the_plugin_imports_nothing_for_those_who_do_not_use_it(run: Run) -> None:
    run(
        """
        import sys

        def test_it():
            rooms = {"celery_goalstate", "celery", "kombu", "redis"}
            ours = [name for name in sys.modules if name.split(".")[0] in rooms]
            assert sorted(ours) == ["celery_goalstate", "celery_goalstate.pytest_plugin"]
        """,
        "-p",
        "no:celery",
        "-p",
        "no:opentelemetry",
    )


@pytest.mark.parametrize("plugins", [CONTRIB, []], ids=["contrib", "pytest-celery"])
def test_beside_celerys_own_plugins(run: Run, plugins: list[str]) -> None:
    """pytest-celery loads itself."""
    run(
        """
        from celery_goalstate import Engine
        from celery_goalstate.testing import simulate
        from shop import Order

        def test_celery_app(celery_app):
            engine = Engine(celery_app)
            engine.register(Order)
            with simulate(engine) as simulation:
                simulation.assert_converges(Order("42"))
        """
        if plugins
        else """
        from shop import Order

        def test_it(goalstate, request):
            assert request.config.pluginmanager.has_plugin("celery")
            goalstate.assert_converges(Order("42"))
        """,
        *plugins,
    )


def test_a_worker_of_celerys_plugin_runs_after_kills(run: Run) -> None:
    """It does not wait for those that were killed in a simulation."""
    run(
        """
        import pytest
        from celery_goalstate import Engine, Entity
        from celery_goalstate.testing import check_crash_safe
        from shop import Order, engine, state

        def world():
            state.clear()
            return Order("42")

        def test_kills():
            assert check_crash_safe(world, engine=engine).schedules == 2

        @pytest.fixture
        def celery_config():
            return {"broker_url": "memory://", "result_backend": "cache+memory://"}

        def test_worker(celery_app, celery_worker):
            @celery_app.task
            def add(x, y): return x + y
            celery_worker.reload()
            assert add.delay(1, 2).get(timeout=30) == 3
        """,
        *CONTRIB,
        outcome="2 passed",
    )


def test_under_xdist(run: Run) -> None:
    run(
        """
        import pytest
        from celery_goalstate.testing import check_crash_safe
        from shop import Order, engine, state

        @pytest.mark.parametrize("n", range(8))
        def test_it(goalstate, n):
            state.clear()
            goalstate.assert_converges(Order(n))

        def test_kills():
            def world():
                state.clear()
                return Order("42")
            assert check_crash_safe(world).exhausted
        """,
        "-n",
        "2",
        outcome="9 passed",
    )


def test_a_report_is_all_that_pytest_shows(run: Run) -> None:
    """None of the kit's own frames; the report is what people read."""
    output = run(
        """
        from celery_goalstate.testing import check_crash_safe
        from shop import Order, engine, state

        class Twice(Order):
            kind = "twice"
            def ship(self, ctx):
                state["shipped"] = state.get("shipped", 0) + 1
                super().ship(ctx)

        engine.register(Twice)

        def world():
            state.clear()
            return Twice("42")

        def test_it():
            check_crash_safe(world, snapshot=lambda _: dict(state), faults=["lose_lease"])
        """,
        outcome="1 failed",
    )
    assert "NotCrashSafe: not crash-safe: 1 of 2 schedules end in another world" in output
    assert "exploration.py" not in output


def test_a_world_that_raises_is_shown_as_it_is(run: Run) -> None:
    output = run(
        """
        from celery_goalstate.testing import check_crash_safe

        def world():
            raise ZeroDivisionError("my own mistake")

        def test_it():
            check_crash_safe(world)
        """,
        outcome="1 failed",
    )
    assert "ZeroDivisionError: my own mistake" in output
