"""`manage.py check`: what provokes each message, and what silences it.

Each case is code in a module of entities beside that of the project, which is sound.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.django.conftest import Shop

PRELUDE = """
from celery_goalstate import ANY, Rules
from celery_goalstate.contrib.django import ModelEntity
from django.contrib import admin
from orders.models import Order, Status
from shop.celery import engine

class Base(ModelEntity):
    model, state_field, goal_field = Order, "status", "wanted"
    def ship(self, ctx):
        pass
"""

WHOLE = "Rules({goal: {state: [] for state in Status} for goal in Status})"

#: Id: what provokes it, and what does not, though it is close to that.
CASES = {
    "E003": (
        f"""
class Tested(Base):
    kind = "tested"
    rules = {WHOLE}
engine.register(resync_every=60)(Tested)
Tested.rules = Rules({{goal: {{ANY: ["shpi"]}} for goal in Status}})
""",
        f"""
class Tested(Base):
    kind = "tested"
    rules = {WHOLE}
engine.register(resync_every=60)(Tested)
Tested.rules = Rules({{goal: {{ANY: ["ship"]}} for goal in Status}})
""",
    ),
    "E004": (
        f"""
@engine.register(resync_every=60)
class Tested(Base):
    kind = "tested"
    state_field = "state"
    rules = {WHOLE}
""",
        f"""
@engine.register(resync_every=60)
class Tested(Base):
    kind = "tested"
    state_field = "status"
    rules = {WHOLE}
""",
    ),
    "W002": (
        """
@engine.register(resync_every=60)
class Tested(Base):
    kind = "tested"
    rules = Rules({Status.SHIPPED: {state: [] for state in Status}})
""",
        """
@engine.register(resync_every=60)
class Tested(Base):
    kind = "tested"
    goals = [Status.SHIPPED]
    rules = Rules({Status.SHIPPED: {state: [] for state in Status}})
""",
    ),
    "W003": (
        """
@engine.register(resync_every=60)
class Tested(Base):
    kind = "tested"
    rules = Rules({goal: {state: [] for state in [*Status, "lost"]} for goal in Status})
""",
        f"""
@engine.register(resync_every=60)
class Tested(Base):
    kind = "tested"
    rules = {WHOLE}
""",
    ),
    "W004": (
        f"""
@engine.register
class Tested(Base):
    kind = "tested"
    rules = {WHOLE}
""",
        f"""
@engine.register(resync_every=60)
class Tested(Base):
    kind = "tested"
    rules = {WHOLE}
""",
    ),
    "W005": (
        """
from orders.models import Parcel
@admin.register(Parcel)
class ParcelAdmin(admin.ModelAdmin):
    pass
""",
        """
from orders.models import Parcel
@admin.register(Parcel)
class ParcelAdmin(admin.ModelAdmin):
    readonly_fields = ["state"]
""",
    ),
}

NAMED = {
    "E003": r"the rules of more\.entities\.Tested name 'shpi': Tested has no method 'shpi'",
    "E004": r"state_field is 'state', which is no column of orders\.Order\.\s+HINT: .* id, status",
    "W002": r"no cell for paid → paid, paid → packed, .* and 7 more: nothing is done there",
    "W003": r"The rules name the state lost, which no row can have",
    "W004": r"The kind 'tested' has no resync_every",
    "W005": r"The form of ParcelAdmin writes 'state'",
}


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """No check asks the database."""
    return Shop({"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}, tmp_path)


def check(shop: Shop, *, fails: bool = False, code: str = "", **settings: object) -> str:
    """The output of `manage.py check`, with more entities and settings."""
    apps = [
        *("django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes"),
        *("django.contrib.sessions", "django.contrib.messages", "celery_goalstate.contrib.django"),
        *("orders", "more"),
    ]
    more = shop.directory / "more"
    more.mkdir(exist_ok=True)
    (more / "__init__.py").touch()
    (more / "entities.py").write_text(PRELUDE + code)
    settings = {"INSTALLED_APPS": apps, **settings}
    return shop.manage(
        *("check", "--fail-level=WARNING"),
        status=1 if fails else 0,
        MORE_SETTINGS=json.dumps(settings),
    )


def ids(output: str) -> set[str]:
    return set(re.findall(r"goalstate\.([EW]\d+)", output))


def test_a_sound_project(shop: Shop) -> None:
    assert "no issues" in check(shop)


@pytest.mark.parametrize("id", CASES)
def test_what_is_wrong_with_a_kind(shop: Shop, id: str) -> None:
    wrong, right = CASES[id]
    output = check(shop, fails=True, code=wrong)
    assert ids(output) == {id}
    assert re.search(NAMED[id], output, re.DOTALL), output
    assert "no issues" in check(shop, code=right)


def test_an_entity_without_a_model(shop: Shop) -> None:
    code = """
@engine.register(resync_every=60)
class Stray(ModelEntity):
    rules = Rules({})
"""
    output = check(shop, fails=True, code=code)
    assert ids(output) == {"E004"}
    assert "Stray has no `model`" in output


def test_no_engine(shop: Shop) -> None:
    shop.env |= {"DJANGO_SETTINGS_MODULE": "bare"}
    (shop.directory / "bare.py").write_text(
        "SECRET_KEY = 'x'\nINSTALLED_APPS = ['celery_goalstate.contrib.django']\n"
    )
    output = shop.manage("check", status=1)
    assert ids(output) == {"E001"}
    assert "from .celery import app as celery_app" in output
    shop.env["DJANGO_SETTINGS_MODULE"] = "shop.settings"
    assert "no issues" in check(shop)


def test_settings_are_named_as_in_djangos(shop: Shop) -> None:
    output = check(shop, fails=True, CELERY_GOALSTATE_MAX_RETRY_DELY=60)
    assert ids(output) == {"E002"}
    assert (
        "unknown setting CELERY_GOALSTATE_MAX_RETRY_DELY. Did you mean CELERY_GOALSTATE_MAX_RETRY_DELAY?"
        in output
    )
    assert not re.search(r"\bgoalstate_", output)
    assert "no issues" in check(shop, CELERY_GOALSTATE_MAX_RETRY_DELAY=60)


def test_options_that_cannot_work_together(shop: Shop) -> None:
    code = f"""
@engine.register(resync_every=60, soft_time_limit=5)
class Tested(Base):
    kind = "tested"
    rules = {WHOLE}
"""
    output = check(shop, fails=True, code=code, CELERY_GOALSTATE_BATCH_SIZE=5)
    assert ids(output) == {"E002"}
    assert "kind 'tested': soft_time_limit=5 and batch_size=5 cannot go together" in output
    assert "no issues" in check(shop, code=code)


def test_an_index_in_memory_that_no_worker_shares(shop: Shop) -> None:
    output = check(shop, fails=True, CELERY_TASK_ALWAYS_EAGER=False)
    assert ids(output) == {"W001"}
    assert "no issues" in check(
        shop, CELERY_TASK_ALWAYS_EAGER=False, CELERY_BROKER_URL="redis://nobody.example:1/0"
    ), "and it is not asked"


def test_migrations_need_nothing_of_ours(shop: Shop) -> None:
    assert "No changes detected" in shop.manage("makemigrations", "--check", "--dry-run")
    migration = (Path(__file__).parent / "project" / "orders" / "migrations" / "0001_initial.py").read_text()
    assert "goalstate" not in migration
