"""How an engine comes to its app, its settings and its entity classes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery._state import _set_current_app, get_current_app

from celery_goalstate import Engine, Entity, Rules, current_engine, registry, shared_entity
from celery_goalstate.exceptions import ImproperlyConfigured, UnknownKind
from celery_goalstate.index.memory import MemoryIndex
from celery_goalstate.registry import engine_of
from tests.integration.conftest import MakeApp, Truth, World, worker_of
from tests.servers import Valkey, poll

# Registering -------------------------------------------------------------------------------------


def test_register_bare_with_options_and_as_a_call(make_app: MakeApp) -> None:
    engine = Engine(make_app())

    @engine.register
    class Bare(Entity):
        rules = Rules({})

    @engine.register(queue="hosts", soft_time_limit=30, max_failures=3)
    class WithOptions(Entity):
        rules = Rules({})

    class AsACall(Entity):
        kind = "called"
        rules = Rules({})

    assert engine.register(AsACall) is AsACall
    assert engine.register(AsACall) is AsACall
    assert engine.kinds == ("bare", "with_options", "called")
    tasks = engine.app.tasks
    assert {f"goalstate.{kind}" for kind in engine.kinds} <= tasks.keys()
    assert tasks["goalstate.with_options"].soft_time_limit == 30
    assert engine.kind("with_options").options.max_failures == 3
    assert tasks["goalstate.bare"].ignore_result is True


def test_registered_again_with_other_options(world: World) -> None:
    with pytest.raises(
        ImproperlyConfigured, match=r"registered already, with the options \{\}, not \{'queue': 'x'\}"
    ):
        world.engine.register(queue="x")(world.entity)


def test_a_queue_of_the_kind_is_where_its_messages_go(world: World) -> None:
    slow = world.register("slow", queue="slow", priority=3)
    world.engine.enqueue(slow("1"))
    world.engine.enqueue(world.entity("1"))
    assert [message.task for message in world.messages()] == ["goalstate.order"]
    with world.app.connection_for_write() as connection, connection.channel() as channel:
        message = world.app.amqp.queues["slow"](channel).get(no_ack=True)
    assert message.headers["task"] == "goalstate.slow"
    assert message.properties["priority"] == 3


def test_task_routes_of_the_project_apply(make_world: Callable[..., World]) -> None:
    world = make_world(task_routes={"goalstate.order": {"queue": "routed"}})
    world.engine.enqueue(world.entity("1"))
    assert world.messages() == []
    with world.app.connection_for_write() as connection, connection.channel() as channel:
        assert world.app.amqp.queues["routed"](channel).get(no_ack=True)


# The app -----------------------------------------------------------------------------------------


def test_an_app_that_comes_later(make_app: MakeApp, truth: Truth) -> None:
    engine = Engine()
    order = engine.register(truth.entity())
    engine.register(truth.entity("host"), resync_every=60)
    app = make_app(task_always_eager=True)
    engine.init_app(app)
    assert {"goalstate.order", "goalstate.host", "goalstate.host.resync"} <= app.tasks.keys()
    engine.enqueue(order("1"))
    assert truth.looks("1") == 1
    with pytest.raises(ImproperlyConfigured, match=r"belongs to the app .* already"):
        engine.init_app(make_app())


def test_an_app_that_is_finalized_already(make_app: MakeApp, truth: Truth) -> None:
    app = make_app(task_always_eager=True)
    app.finalize()
    engine = Engine(app)
    order = engine.register(truth.entity())
    engine.enqueue(order("1"))
    assert truth.looks("1") == 1


def test_the_kinds_of_one_app_are_no_other_apps(make_app: MakeApp) -> None:
    """A Celery task is shared with every app of the process unless it says otherwise."""
    truths = [Truth(), Truth()]
    engines = [Engine(make_app(task_always_eager=True)) for _ in truths]
    orders = [engine.register(truth.entity()) for engine, truth in zip(engines, truths, strict=True)]
    stranger = make_app()
    assert "goalstate.order" not in stranger.tasks
    engines[1].enqueue(orders[1]("1"))
    assert [truth.looks("1") for truth in truths] == [0, 1]


def test_several_engines_of_one_app(make_app: MakeApp) -> None:
    app, truths = make_app(task_always_eager=True), [Truth(), Truth()]
    shop, blog = Engine(app), Engine(app, namespace="blog")
    in_shop, in_blog = shop.register(truths[0].entity()), blog.register(truths[1].entity())
    assert {"goalstate.order", "goalstate.blog.order"} <= app.tasks.keys()
    shop.enqueue(in_shop("1"))
    assert [truth.looks("1") for truth in truths] == [1, 0]
    blog.enqueue(in_blog("1"), 60)
    assert [truth.looks("1") for truth in truths] == [1, 0]
    assert not shop.is_scheduled(in_shop("1"))
    assert blog.is_scheduled(in_blog("1"))
    for namespace in (None, "default", "blog"):
        with pytest.raises(
            ImproperlyConfigured, match=r"has an engine of namespace '(default|blog)' already"
        ):
            Engine(app, namespace=namespace)


def test_several_engines_on_one_server(make_app: MakeApp, valkey: Valkey) -> None:
    app, truths = make_app(broker=valkey.url), [Truth(), Truth()]
    shop, blog = Engine(app), Engine(app, namespace="blog")
    in_shop, in_blog = shop.register(truths[0].entity()), blog.register(truths[1].entity())
    shop.enqueue(in_shop("1"))
    blog.enqueue(in_blog("2"))
    assert not blog.is_scheduled(blog.ref("order", "1"))
    with worker_of(app):
        poll(
            "each evaluates its own",
            lambda: (truths[0].log, truths[1].log) == ([("order", "1")], [("order", "2")]),
        )
        shop.enqueue(in_shop("3"), 0.1)
        blog.enqueue(in_blog("3"), 0.1)
        poll("each sweeps its own", lambda: truths[0].looks("3") == truths[1].looks("3") == 1)


def test_a_namespace_by_setting_is_the_indexs_alone(make_app: MakeApp, truth: Truth, valkey: Valkey) -> None:
    """Task names are those of the code; two deployments of it share a server by this setting."""
    app = make_app(broker=valkey.url, goalstate_namespace="staging", goalstate_key_prefix="x")
    engine = Engine(app)
    order = engine.register(truth.entity())
    engine.enqueue(order("1"))
    with valkey.client() as client:
        keys = set(client.keys("*gs*") + client.keys("x:*")) - {"x:{staging}:kinds"}
        assert keys
        assert all(key.startswith("x:{staging:order:0}:") for key in keys)
    with worker_of(app):
        poll("evaluated", lambda: truth.looks("1"))


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Celery], None]]:
    """Sets Celery's current app, as creating one does."""
    monkeypatch.setattr("celery._state.default_app", None)
    before = get_current_app()
    yield _set_current_app
    _set_current_app(before)


def test_the_current_engine(make_app: MakeApp, current: Callable[[Celery], None]) -> None:
    app = make_app()
    current(app)
    with pytest.raises(ImproperlyConfigured, match=r"has no engine; create one beside it"):
        current_engine()
    engine = Engine(app)
    assert current_engine() is engine is engine_of(app)
    other = Engine(app, namespace="other")
    assert current_engine() is engine
    assert current_engine("other") is other
    with pytest.raises(ImproperlyConfigured, match=r"no engine of namespace 'x'; known: default, other"):
        current_engine("x")


def test_the_current_engine_in_a_thread_of_a_web_server(
    make_app: MakeApp, current: Callable[[Celery], None]
) -> None:
    """Celery's current app is thread-local: all other threads see an app that nobody configured."""

    def ask() -> Any:
        found: list[Any] = []

        def target() -> None:
            try:
                found.append(current_engine())
            except ImproperlyConfigured as error:
                found.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
        return found[0]

    engine = Engine(make_app())
    current(engine.app)
    assert ask() is engine
    other = Engine(make_app())
    assert isinstance(ask(), ImproperlyConfigured), f"which of the two? {other}"


# Shared entities ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_other_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared entities belong to all engines of the process: these tests see only their own."""
    monkeypatch.setattr(registry, "shared", [])
    monkeypatch.setattr(registry, "all_engines", weakref.WeakSet())


def test_shared_entities_belong_to_every_engine_before_and_after(make_app: MakeApp) -> None:
    before = Engine(make_app())
    unattached = Engine()

    @shared_entity
    class Invoice(Entity):
        rules = Rules({})

    @shared_entity(queue="receipts", max_failures=2)
    class Receipt(Entity):
        rules = Rules({})

    after = Engine(make_app())
    unattached.init_app(make_app())
    for engine in (before, unattached, after):
        assert engine.kinds == ("invoice", "receipt")
        assert "goalstate.receipt" in engine.app.tasks
        assert engine.kind("receipt").options.max_failures == 2
        assert engine.enqueue(Invoice("1")).sent


def test_a_shared_entity_may_be_registered_by_the_project_too(make_app: MakeApp) -> None:
    @shared_entity
    class Invoice(Entity):
        rules = Rules({})

    engine = Engine(make_app())
    assert engine.register(Invoice) is Invoice


def test_a_shared_entity_of_a_kind_that_is_taken(make_app: MakeApp, truth: Truth) -> None:
    engine = Engine(make_app())
    engine.register(truth.entity("invoice"))

    with pytest.raises(ImproperlyConfigured, match=r"kind 'invoice' of .*Invoice is taken by"):

        @shared_entity
        class Invoice(Entity):
            rules = Rules({})


def test_entities_are_autodiscovered(tmp_path: Path) -> None:
    package = tmp_path / "billing"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "entities.py").write_text(
        "from celery_goalstate import Entity, shared_entity\n"
        "@shared_entity\nclass Invoice(Entity):\n"
        "    get_state = get_goal_state = lambda self: 'paid'\n"
        "    def get_action_list(self, state, goal_state): print('evaluated', self.id)\n"
    )
    run(
        """
        from celery import Celery
        from celery_goalstate import Engine
        app = Celery("shop")
        app.conf.task_always_eager = True
        engine = Engine(app)
        app.autodiscover_tasks(["billing"], related_name="entities")
        app.loader.import_default_modules()
        assert engine.kinds == ("invoice",), engine.kinds
        engine.enqueue(engine.ref("invoice", 7))
        """,
        tmp_path,
        "evaluated 7",
    )


def run(script: str, directory: Path, expected: str) -> None:
    """Run a script in a process of its own, started in this directory; it must print this."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        cwd=directory,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


# Settings ----------------------------------------------------------------------------------------


def test_settings_may_follow_the_engine(make_app: MakeApp, truth: Truth) -> None:
    app = make_app()
    engine = Engine(app)
    order = engine.register(truth.entity())
    app.conf.update(
        goalstate_failure_retry_delay=7,
        goalstate_eta_horizon=5,
        goalstate_index_url="memory://",
        goalstate_max_failures=4,
    )
    assert not engine.enqueue(order("1"), 6).sent
    assert engine.kind("order").options.failure_retry_delay == 7
    assert engine.settings.kind.max_failures == 4
    app.conf.goalstate_eta_horizon = 500
    assert not engine.enqueue(order("2"), 6).sent, "frozen when the engine was first used"


def test_an_option_of_a_kind_wins_over_the_setting(make_app: MakeApp, truth: Truth) -> None:
    engine = Engine(make_app(goalstate_max_failures=4, goalstate_converge=False))
    engine.register(max_failures=None)(truth.entity())
    assert engine.kind("order").options.max_failures is None
    assert engine.kind("order").options.converge is False


WRONG = [
    ("goalstate_lease", -1, r"goalstate_lease is -1; accepted: seconds"),
    ("goalstate_shards", 0, r"goalstate_shards is 0; accepted: an integer, 1 or more"),
    ("goalstate_leese", 1, r"unknown setting goalstate_leese. Did you mean goalstate_lease?"),
    ("goalstate_namespace", "A B", r"goalstate_namespace is 'A B'"),
    ("goalstate_index_url", "mysql://u:s3cret@h/0", r"goalstate_index_url is 'mysql://u:\*\*@h/0'"),
    ("goalstate_index_url", "amqp://", r"accepted are the schemes redis, rediss"),
]


@pytest.mark.parametrize(("name", "value", "text"), WRONG)
def test_a_wrong_setting_fails_the_first_use(
    make_app: MakeApp, truth: Truth, name: str, value: Any, text: str
) -> None:
    engine = Engine(make_app(**{name: value}))
    order = engine.register(truth.entity())
    for call in (lambda: engine.enqueue(order("1")), lambda: engine.describe(order("1")), engine.counts):
        with pytest.raises(ImproperlyConfigured, match=text) as caught:
            call()
        assert "s3cret" not in str(caught.value)


def test_no_place_for_the_index(make_app: MakeApp, truth: Truth) -> None:
    engine = Engine(make_app(broker="amqp://u:s3cret@h//"))
    order = engine.register(truth.entity())
    with pytest.raises(
        ImproperlyConfigured, match=r"there is no place for the index.*goalstate_index_url"
    ) as caught:
        engine.enqueue(order("1"))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "pool", "text"),
    [
        ("goalstate_lease=-1", "solo", "goalstate_lease is -1; accepted: seconds"),
        (
            "goalstate_index_url='memory://'",
            "prefork",
            "lives in one process, and the pool prefork has several",
        ),
    ],
)
def test_a_wrong_setting_fails_the_worker_at_start(
    tmp_path: Path, valkey: Valkey, setting: str, pool: str, text: str
) -> None:
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\nfrom celery_goalstate import Engine\n"
        f"app = Celery('shop', broker={valkey.url!r})\napp.conf.update({setting})\nengine = Engine(app)\n"
    )
    command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "--pool", pool, "--concurrency", "1"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert text in done.stderr + done.stdout
    assert "ready." not in done.stderr + done.stdout


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_another_number_of_shards_fails_the_worker_at_start(
    tmp_path: Path, make_app: MakeApp, truth: Truth, valkey: Valkey, pool: str
) -> None:
    """Beside the others it would find none of their entities, and evaluate some a second time."""
    engine = Engine(make_app(broker=valkey.url))
    engine.enqueue(engine.register(truth.entity())("1"))
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\nfrom celery_goalstate import Engine, Entity, Rules\n"
        f"app = Celery('shop', broker={valkey.url!r})\napp.conf.goalstate_shards = 4\nengine = Engine(app)\n"
        "@engine.register\nclass Order(Entity): rules = Rules({})\n"
    )
    command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "--pool", pool, "--concurrency", "1"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "'order' in 1 shards, and goalstate_shards is 4" in done.stderr + done.stdout
    assert "ready." not in done.stderr + done.stdout


def test_a_worker_with_an_index_of_its_own(make_app: MakeApp, truth: Truth) -> None:
    """Broker and index in memory, for a try at home: one process, solo or threads."""
    app = make_app(goalstate_sweep_interval=0.02)
    engine = Engine(app)
    order = engine.register(truth.entity(), failure_retry_delay=0.01)
    with worker_of(app, pool="threads", concurrency=2):
        engine.enqueue(order("1"))
        poll("evaluated", lambda: truth.looks("1"))
    assert isinstance(engine.parts.index, MemoryIndex)


# Django ------------------------------------------------------------------------------------------

DJANGO = """
import datetime
import django
from django.conf import settings

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    USE_TZ=True,
    CELERY_TASK_ALWAYS_EAGER=True,
    CELERY_GOALSTATE_MAX_FAILURES=4,
    CELERY_GOALSTATE_ETA_HORIZON=datetime.timedelta(seconds=7),
    CELERY_GOALSTATE_INDEX_URL="memory://",
)
django.setup()

from celery import Celery
from celery_goalstate import Engine, Entity
from celery_goalstate.contrib.django import enqueue_on_commit
from django.db import connection, transaction

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
engine = Engine(app)
looks = []

@engine.register
class Order(Entity):
    def get_state(self):
        return "new"
    get_goal_state = get_state
    def get_action_list(self, state, goal_state):
        assert not connection.in_atomic_block
        looks.append(self.id)

assert engine.settings.kind.max_failures == 4
assert engine.settings.eta_horizon == 7

enqueue_on_commit(Order("outside"))
assert looks == ["outside"]

with transaction.atomic():
    enqueue_on_commit(Order("committed"))
    with transaction.atomic():
        enqueue_on_commit(engine.ref("order", "nested"), engine=engine)
    assert looks == ["outside"]
assert looks == ["outside", "committed", "nested"]

class Abort(Exception):
    pass

try:
    with transaction.atomic():
        enqueue_on_commit(Order("rolled back"))
        raise Abort
except Abort:
    pass
with transaction.atomic():
    try:
        with transaction.atomic():
            enqueue_on_commit(Order("rolled back inside"))
            raise Abort
    except Abort:
        pass
assert engine.describe_many([Order("rolled back"), Order("rolled back inside")]) == [None, None]

with transaction.atomic():
    enqueue_on_commit(Order("later"), 60, using="default")
assert engine.is_scheduled(Order("later"))

def raises(*args, **options):
    with transaction.atomic():
        try:
            enqueue_on_commit(*args, **options)
        except (ValueError, TypeError, LookupError):
            return True

class Stranger(Entity):
    pass

assert raises(Order("x"), datetime.datetime(2030, 1, 1))
assert raises(Order("x"), -1)
assert raises(Stranger("x"))
assert raises("order/x")
assert raises(Order("x"), max_wait=5)
assert raises(Order("x"), no_such_option=5)
assert engine.describe(Order("x")) is None
assert len(looks) == 3
print("done")
"""


def test_django(tmp_path: Path) -> None:
    run(DJANGO, tmp_path, "done")


def test_two_kinds_of_one_task_name_are_refused(make_app: MakeApp) -> None:
    """Celery would only warn, and one kind be evaluated by the other's code."""
    app = make_app()
    dotted = type("Dotted", (Entity,), {"kind": "b.order", "rules": Rules({})})
    Engine(app).register(dotted)
    other = Engine(app, namespace="b")
    with pytest.raises(ImproperlyConfigured, match=r"'order'.*'b\.order'.*goalstate\.b\.order"):
        other.register(type("Order", (Entity,), {"kind": "order", "rules": Rules({})}))


def test_two_engines_on_the_same_entries_are_refused(make_app: MakeApp) -> None:
    app = make_app(goalstate_namespace="b")
    engine = Engine(app)
    Engine(app, namespace="b")
    with pytest.raises(ImproperlyConfigured, match="goalstate_namespace is 'b', which another engine"):
        _ = engine.settings


def test_pausing_everything_where_nothing_is_known_is_refused(make_app: MakeApp) -> None:
    """Or a web process without entities would believe that it stopped the world."""
    engine = Engine(make_app())
    for everything in (engine.pause, engine.resume, engine.stop, engine.start):
        with pytest.raises(UnknownKind, match="no entity class is registered in this process"):
            everything()
