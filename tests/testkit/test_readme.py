"""README's shop, and its way to guard a write, under kills at any two points and under stalled workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import blocks
from tests.docs.run_page import STAGE

CHECKS = '''
import sqlite3

import guarded, warehouse

from celery_goalstate.testing import check_concurrent, check_crash_safe
from shop import Order, engine

EFFECTS = ["warehouse.pack", "warehouse.ship"]

def world():
    warehouse.place("42")
    return Order("42")

def seen(order):
    return warehouse.status("42"), warehouse.wanted("42")

def test_killed_at_any_two_points():
    assert check_crash_safe(world, snapshot=seen, effects=EFFECTS, depth=2).exhausted

def test_stalled_anywhere():
    assert check_crash_safe(world, snapshot=seen, effects=EFFECTS, faults=["lose_lease"]).exhausted

def test_cancelled_meanwhile():
    def cancel(order):
        warehouse.cancel(order.id)
        engine.enqueue(order)
    # By its rules, what is shipped already stays so.
    check_concurrent(world, cancel, snapshot=seen, effects=EFFECTS, any_end=True)

@engine.register
class Guarded(Order):
    kind = "guarded"
    def get_action_list(self, state, goal): return [guarded.ship] if state != goal else []

def written():
    with sqlite3.connect("warehouse.sqlite3") as db:
        return db.execute("select written from counted").fetchone()[0]

def test_a_guarded_write_of_a_stalled_worker_is_refused():
    """Its write is counted by the database, however late it comes."""
    def guarded_world():
        warehouse.place("42")
        with sqlite3.connect("warehouse.sqlite3") as db:
            db.executescript("""
                drop table if exists counted; create table counted (written int);
                insert into counted values (0); drop trigger if exists count_them;
                create trigger count_them after update of fence on orders
                begin update counted set written = written + 1; end;
            """)
        return Guarded("42")

    checked = check_crash_safe(
        guarded_world, snapshot=lambda _: written(), faults=["lose_lease"], effects=["guarded.connected"]
    )
    assert checked.exhausted
'''


pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for props in (STAGE / "common").glob("*.py"):
        (tmp_path / props.name).write_text(props.read_text())
    for block in blocks(Path("README.md")):
        if block.file:
            (tmp_path / block.file).write_text(block.text)
    # A point within the action, before it writes: where a worker stalls that writes late.
    guarded = (tmp_path / "guarded.py").read_text()
    assert "    with sqlite3.connect" in guarded
    (tmp_path / "guarded.py").write_text(
        guarded.replace("    with sqlite3.connect", "    connected()\n    with sqlite3.connect")
        + "\n\ndef connected():\n    pass\n"
    )
    (tmp_path / "test_shop.py").write_text(CHECKS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider -p no:django\n")
    return tmp_path


def test_the_shop_of_the_readme(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"],
        cwd=project,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
