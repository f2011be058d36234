"""Recipes for bad days: a thousand are quarantined, the index is down, a stalled worker wakes up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery

from celery_goalstate import Engine, Status
from celery_goalstate.index import open_index
from celery_goalstate.index.base import Claim, Report, Verdict
from tests.docs.pages import blocks
from tests.servers import Valkey

PAGE = Path("docs/how-to/operating.md")
RINGS = "somebody should look\n"

#: More than fit on a page; and ids that a shell would take apart, expand, or take for an option.
IDS = {*map(str, range(1100)), "A 0", "A 1", "it's", '"', "$HOME", "*", "a/b", "-x", "--help", ";exit", "ü"}


@pytest.fixture
def engine(valkey: Valkey, shop: Path) -> Engine:
    """The operators' view of that index."""
    engine = Engine(Celery("shop", broker=valkey.url, set_as_current=False))
    engine.declare("order")
    return engine


def quarantine(engine: Engine, ids: set[str]) -> None:
    engine.enqueue_many(engine.ref("order", id) for id in ids)
    index = open_index(engine.settings)
    records = [record for record in index.describe("order", sorted(ids)) if record]
    claims = index.claim("order", [(each.id, each.token) for each in records], nonce="n", task_id="t")
    held = [claim for claim in claims if isinstance(claim, Claim)]
    reports = [Report(each.id, each.lease, Verdict.QUARANTINED, delay=None, failures=1) for each in held]
    index.finish("order", reports)
    index.close()
    assert engine.counts("order")["order"][Status.FAILED] == len(ids)


def run(command: list[str] | str, shop: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run what a reader would, in the directory of the shop."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=shop,
        env={**os.environ, "PATH": programs, "PYTHONDONTWRITEBYTECODE": "1", **more},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


def revive_all(shop: Path) -> subprocess.CompletedProcess[str]:
    recipe = "enqueue --failed order"
    assert f"`{recipe}`" in PAGE.read_text()
    return run(f"celery -A shop goalstate {recipe} --yes", shop)


def alarm(shop: Path, **environment: str) -> bool:
    """Whether the alarm rings."""
    [recipe] = [command for block in blocks(PAGE) for command, output in block.commands() if output == RINGS]
    return run(recipe, shop, **environment).stdout == RINGS


def test_all_that_are_quarantined_are_revived_and_no_others_are_invented(engine: Engine, shop: Path) -> None:
    quarantine(engine, IDS)
    done = revive_all(shop)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"order: {len(IDS)} enqueued\n"
    assert engine.counts("order")["order"][Status.SCHEDULED] == len(IDS)
    assert all(engine.describe_many(engine.ref("order", id) for id in IDS))
    assert engine.counts("order")["order"][Status.FAILED] == 0
    assert engine.orphans() == {}


def test_with_the_index_down_the_revival_says_so(valkey: Valkey, shop: Path) -> None:
    valkey.stop()
    done = revive_all(shop)
    assert done.returncode == 3
    assert "the index did not answer" in done.stderr


def sweep(engine: Engine) -> None:
    """As a worker does."""
    index = open_index(engine.settings)
    index.survey(["order"], sweeper="s", hold=60_000, limit=0)
    index.close()


def test_the_alarm_is_silent_when_all_is_well(engine: Engine, shop: Path) -> None:
    engine.enqueue(engine.ref("order", "42"))
    sweep(engine)
    assert not alarm(shop)


def test_the_alarm_rings_when_something_is_quarantined(engine: Engine, shop: Path) -> None:
    quarantine(engine, {"A 0"})
    sweep(engine)
    assert alarm(shop)


def test_the_alarm_rings_when_no_worker_is_there(engine: Engine, shop: Path) -> None:
    engine.enqueue(engine.ref("order", "42"))
    assert alarm(shop)


def test_the_alarm_rings_when_nobody_answers(valkey: Valkey, shop: Path) -> None:
    valkey.stop()
    assert alarm(shop)


def test_the_alarm_rings_when_the_app_cannot_be_loaded(shop: Path) -> None:
    (shop / "shop.py").write_text("raise RuntimeError('not deployed yet')")
    assert alarm(shop)


def test_the_alarm_rings_when_there_is_no_celery(shop: Path) -> None:
    assert alarm(shop, PATH="/usr/bin:/bin")


GUARDED = """
import warehouse
from types import SimpleNamespace
from guarded import ship

warehouse.place("42")
order = SimpleNamespace(id="42")
for token in (7, 8, 8, 7):
    try:
        ship(SimpleNamespace(fencing_token=token), order)
    except RuntimeError as error:
        print(token, error)
print(warehouse.status("42"))
"""


def test_a_guarded_write_of_an_older_evaluation_is_refused(shop: Path) -> None:
    [recipe] = [block for block in blocks(Path("README.md")) if block.file == "guarded.py"]
    (shop / "guarded.py").write_text(recipe.text)
    done = run([sys.executable, "-c", GUARDED], shop)
    assert done.stdout == "7 a newer evaluation has written to this order\nshipped\n", done.stderr
