"""Which kinds a process knows: registered, imported on need, declared; and who else may enqueue them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_goalstate import Engine, Entity, shared_entity
from celery_goalstate.exceptions import ImproperlyConfigured, UnknownKind
from tests.integration.conftest import NOW, MakeApp, Truth, World, engine_of_others, is_empty, worker_of
from tests.servers import Valkey

SHOP = {
    "shop/__init__.py": "",
    "shop/app.py": """
        from celery import Celery
        from celery_goalstate import Engine
        app = Celery("shop", broker="memory://", include=["shop.entities"])
        engine = Engine(app)
    """,
    "shop/entities.py": """
        from celery_goalstate import Entity
        from shop.app import engine
        print("imported")
        @engine.register(queue="parcels", resync_every=600)
        class Order(Entity):
            get_state = get_goal_state = lambda self: "new"
            def get_action_list(self, state, goal_state): return []
            @classmethod
            def iter_unconverged(cls): return ["7"]
    """,
}
DJANGO = {
    **SHOP,
    "shop/app.py": SHOP["shop/app.py"].replace(', include=["shop.entities"]', ""),
    "site_settings.py": """
        SECRET_KEY = "for tests"
        USE_TZ = True
        INSTALLED_APPS = ["shop"]
    """,
}


def run(directory: Path, files: dict[str, str], script: str, **env: str) -> list[str]:
    """What a process of its own prints that has these modules."""
    for name, source in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=directory,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# Imported on need --------------------------------------------------------------------------------


def test_the_first_operation_that_meets_an_unknown_kind_imports_the_modules_once(tmp_path: Path) -> None:
    printed = run(
        tmp_path,
        SHOP,
        """
        from shop.app import app, engine
        ref = engine.ref("order", 42)
        print("checked")
        engine.enqueue(ref); engine.enqueue(engine.ref("order", 43))
        with app.connection() as connection, connection.SimpleQueue("parcels") as parcels:
            print("in its queue:", parcels.qsize())
        """,
    )
    assert printed == ["checked", "imported", "in its queue: 2"]


@pytest.mark.parametrize(
    "operation",
    [
        'print(engine.counts()["order"]["scheduled"])',
        'print(len(engine.list("order")))',
        "engine.pause(); print(0 * engine.paused())",
        'print(engine.resync("order") - 1)',
        'print(0 * engine.delete(engine.ref("order", 1)))',
        'print(0 * engine.is_scheduled(engine.ref("order", 1)))',
    ],
)
def test_so_does_every_other_operation(tmp_path: Path, operation: str) -> None:
    assert run(tmp_path, SHOP, f"from shop.app import engine\n{operation}") == ["imported", "0"]


def test_threads_that_come_first_wait_for_the_import(tmp_path: Path) -> None:
    slow = SHOP["shop/entities.py"].replace('print("imported")', "gate.wait()")
    files = {
        **SHOP,
        "shop/gate.py": "import threading; gate = threading.Event()",
        "shop/entities.py": slow.replace("from shop.app", "from shop.gate import gate; from shop.app"),
    }
    printed = run(
        tmp_path,
        files,
        """
        from concurrent.futures import ThreadPoolExecutor
        from shop.app import engine
        from shop.gate import gate
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(engine.enqueue, engine.ref("order", n)) for n in range(8)]
            gate.set()
            print(sum(call.result().changed for call in calls))
        """,
    )
    assert printed == ["8"]


def test_a_module_may_ask_while_it_is_imported(tmp_path: Path) -> None:
    asking = SHOP["shop/entities.py"].replace('print("imported")', "print(engine.kinds)")
    files = {**SHOP, "shop/entities.py": asking}
    script = 'from shop.app import engine\nprint(engine.enqueue(engine.ref("order", 42)).changed)'
    assert run(tmp_path, files, script) == ["()", "True"]


def test_whoever_waits_for_an_import_that_waits_for_him_goes_on(tmp_path: Path) -> None:
    waiting = SHOP["shop/entities.py"].replace(
        'print("imported")', "from shop.helper import thread; thread.join()"
    )
    helper = """
        import threading
        from celery_goalstate import registry
        from shop.app import engine
        registry.IMPORT_TIMEOUT = 0.2
        thread = threading.Thread(target=lambda: print(engine.kinds))
        thread.start()
    """
    files = {**SHOP, "shop/entities.py": waiting, "shop/helper.py": helper}
    script = 'from shop.app import engine\nprint(engine.enqueue(engine.ref("order", 42)).changed)'
    assert run(tmp_path, files, script) == ["()", "True"]


def test_an_entity_whose_class_is_registered_elsewhere_imports_the_modules_too(tmp_path: Path) -> None:
    cls = SHOP["shop/entities.py"].replace('@engine.register(queue="parcels", resync_every=600)', "")
    files = {
        **SHOP,
        "shop/models.py": cls,
        "shop/entities.py": "from shop import app, models; app.engine.register(models.Order)",
    }
    script = (
        "from shop.app import engine; from shop.models import Order\nprint(engine.enqueue(Order(7)).changed)"
    )
    assert run(tmp_path, files, script) == ["imported", "True"]


def test_an_import_error_reaches_every_caller(tmp_path: Path) -> None:
    files = {**SHOP, "shop/entities.py": "import no_such_module"}
    printed = run(
        tmp_path,
        files,
        """
        from shop.app import engine
        for _ in range(2):
            try:
                engine.enqueue(engine.ref("order", 42))
            except ImportError as error:
                print(error)
        """,
    )
    assert printed == ["No module named 'no_such_module'"] * 2


def test_a_typo_is_told_with_the_nearest_name_and_nothing_is_written(world: World) -> None:
    for operation in (
        world.engine.enqueue,
        lambda ref: world.engine.enqueue_many([ref]),
        world.engine.describe,
        world.engine.delete,
        lambda ref: world.engine.resync(ref.kind),
        lambda ref: world.engine.pause(ref.kind),
        lambda ref: world.engine.counts(ref.kind),
    ):
        with pytest.raises(UnknownKind, match=r"'ordr' is registered .* Did you mean order\? Known: order\."):
            operation(world.engine.ref("ordr", "1"))
    assert is_empty(world.index, "order", "ordr")


def test_what_the_index_keeps_of_others_can_be_seen_and_deleted_but_not_enqueued(world: World) -> None:
    others = engine_of_others(world.engine, "removed")
    ref = others.ref("removed", "1")
    others.enqueue(ref, 60)
    assert world.engine.is_scheduled(ref)
    assert [each.id for each in world.engine.list("removed")] == ["1"]
    with pytest.raises(UnknownKind):
        world.engine.enqueue(ref)
    assert world.engine.delete(ref)


# Under Django ------------------------------------------------------------------------------------


def test_under_django_the_app_in_installed_apps_imports_the_entities(tmp_path: Path) -> None:
    pytest.importorskip("django")
    settings = DJANGO["site_settings.py"].replace('"shop"]', '"celery_goalstate.contrib.django", "shop"]')
    printed = run(
        tmp_path,
        {**DJANGO, "site_settings.py": settings},
        """
        import django
        django.setup()
        from shop.app import engine
        print(engine.enqueue(engine.ref("order", 42)).changed, engine.kinds)
        """,
        DJANGO_SETTINGS_MODULE="site_settings",
    )
    assert printed == ["imported", "True ('order', 'order.resync')"]


def test_under_django_nothing_is_imported_on_need_and_the_error_says_what_to_add(tmp_path: Path) -> None:
    pytest.importorskip("django")
    printed = run(
        tmp_path,
        DJANGO,
        """
        import django
        django.setup()
        from shop.app import engine
        try:
            engine.enqueue(engine.ref("order", 42))
        except LookupError as error:
            print(error)
        """,
        DJANGO_SETTINGS_MODULE="site_settings",
    )
    assert len(printed) == 1
    assert printed[0].endswith(
        "Known: none. Add 'celery_goalstate.contrib.django' to INSTALLED_APPS: it imports each app's entities"
    )


# Declared ----------------------------------------------------------------------------------------


def test_a_declared_kind_goes_where_it_was_declared_to_go(make_app: MakeApp) -> None:
    world = World(make_app(task_create_missing_queues=True), Truth())
    world.engine.declare("invoice", queue="billing", priority=3)
    assert world.engine.enqueue(world.engine.ref("invoice", 7)).sent
    with world.app.connection() as connection, connection.SimpleQueue("billing") as billing:
        message = billing.get(timeout=5)
        message.ack()
    assert message.headers["task"] == "goalstate.invoice"
    assert message.properties["priority"] == 3
    assert "invoice" in world.engine.kinds
    assert world.engine.counts()["invoice"]["scheduled"] == 1


def test_a_declared_kind_is_not_swept_here(world: World) -> None:
    """Who evaluates it knows its back-off, and sweeps it."""
    world.engine.declare("invoice")
    assert set(world.engine._swept()) == {"order"}


def test_a_class_takes_the_place_of_a_declaration(world: World, truth: Truth) -> None:
    world.engine.declare("invoice", queue="billing")
    assert world.engine.kind("invoice").entity_class is None
    invoice = world.register("invoice")
    assert world.engine.kind("invoice").entity_class is invoice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_failures": 3}, r"declare\('invoice'\) takes where messages go, not max_failures"),
        ({"queue": "other"}, r"'invoice' is declared already, with the options \{'queue': 'billing'\}"),
    ],
)
def test_a_declaration_that_cannot_be(world: World, options: dict[str, Any], message: str) -> None:
    world.engine.declare("invoice", queue="billing")
    world.engine.declare("invoice", queue="billing")
    with pytest.raises(ImproperlyConfigured, match=message):
        world.engine.declare("invoice", **options)


# The public task ---------------------------------------------------------------------------------


def call(world: World, *args: Any, name: str = "goalstate.enqueue", **kwargs: Any) -> Any:
    """What the public task returns to a worker that got these arguments, by way of JSON."""
    args, kwargs = json.loads(json.dumps([args, kwargs]))
    return world.app.tasks[name].apply(args, kwargs, throw=True).result


def test_others_enqueue_by_name(world: World) -> None:
    done = call(world, "order", "42")
    assert done == {"changed": True, "deadline": "2027-01-15T08:00:00+00:00", "sent": True}
    assert call(world, "order", "42")["changed"] is False
    assert call(world, kind="order", id=43, deadline=90) == {
        "changed": True,
        "deadline": "2027-01-15T08:01:30+00:00",
        "sent": False,
    }
    then = datetime.fromtimestamp(NOW, UTC) + timedelta(days=3)
    assert world.engine.describe(world.entity("43")) is not None
    call(world, "order", "44", then.isoformat())
    described = world.engine.describe(world.entity("44"))
    assert described is not None
    assert described.deadline is not None
    assert abs(described.deadline - then) < timedelta(milliseconds=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("ordr", "1"), UnknownKind, "Did you mean order"),
        (("order", ""), ValueError, "an entity's id is ''"),
        (("order", "1", "tomorrow"), ValueError, "deadline is 'tomorrow'; give seconds from now, or an ISO"),
        (("order", "1", "2030-01-01T00:00:00"), ValueError, "has no time zone"),
        (("order", "1", -1), ValueError, "deadline is -1"),
    ],
)
def test_bad_arguments_of_the_public_task(
    world: World, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(world, *arguments)
    assert is_empty(world.index, "order")


def test_each_namespace_has_a_public_task(world: World) -> None:
    second = Engine(world.app, namespace="second")
    second._opened = world.engine.parts
    second.register(world.truth.entity("parcel"))
    assert call(world, "parcel", "1", name="goalstate.second.enqueue")["changed"]


def test_a_worker_runs_the_public_task(make_app: MakeApp, valkey: Valkey, truth: Truth) -> None:
    app = make_app(valkey.url, result_backend="cache+memory://")
    engine = Engine(app)
    engine.register(truth.entity())
    with worker_of(app):
        result = app.send_task("goalstate.enqueue", ("order", "42", 3600))
        assert result.get(timeout=20)["changed"]
    assert engine.is_scheduled(engine.ref("order", "42"))


def test_a_kind_may_not_have_the_public_task_of_another_namespace(world: World, truth: Truth) -> None:
    world.register("shop.enqueue")
    with pytest.raises(ImproperlyConfigured, match=r"would both be the task goalstate\.shop\.enqueue"):
        Engine(world.app, namespace="shop")


@pytest.mark.parametrize("how", ["register", "declare", "shared"])
def test_no_kind_takes_the_name_of_the_public_task(
    world: World, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_goalstate.registry.shared", [])

    class Odd(Entity):
        kind = "enqueue"

        def get_action_list(self, state: Any, goal_state: Any) -> None: ...

    with pytest.raises(ImproperlyConfigured, match=r"goalstate\.enqueue is the public task"):
        {"register": world.engine.register, "shared": shared_entity}.get(
            how, lambda cls: world.engine.declare(cls.kind)
        )(Odd)


# All kinds at once -------------------------------------------------------------------------------


def test_whether_all_are_paused(world: World) -> None:
    world.register("host")
    world.engine.pause("host")
    assert world.engine.paused("host")
    assert not world.engine.paused()
    world.engine.pause("order")
    assert world.engine.paused()


# What a worker says ------------------------------------------------------------------------------


def test_a_worker_without_kinds_says_so(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, logging_as_it_was: None
) -> None:
    app = make_app()
    Engine(app)
    with worker_of(app):
        assert "this worker knows no kind, so it evaluates nothing" in caplog.text


@pytest.mark.parametrize("accepted", [["pickle"], ["application/x-yaml"], []], ids=str)
def test_an_app_that_accepts_no_json_is_refused(accepted: list[str]) -> None:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.accept_content = accepted
    engine = Engine(app)
    with pytest.raises(ImproperlyConfigured, match=r"accept_content is .*Add \"json\" to it"):
        _ = engine.settings
    app.conf.accept_content = ["pickle", "application/json"]
    assert engine.settings.namespace == "default"


def test_threads_share_one_resolution(world: World) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(world.engine.kind("order"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {kind.name for kind in found} == {"order"}
