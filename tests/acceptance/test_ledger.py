"""The judge is judged: each broken guarantee turns it red, and what is allowed does not."""

from __future__ import annotations

import pytest

from tests.acceptance.conftest import Scene
from tests.acceptance.ledger import Ledger, Line, violations
from tests.servers import poll

LEASE = 2.0


def history(text: str) -> list[Line]:
    """One line per event: time, event, and fields, for a single entity; kills and freezes belong to none."""
    lines = []
    for line in filter(None, map(str.strip, text.splitlines())):
        at, event, *rest = line.split()
        fields = dict(field.split("=") for field in rest)
        pid = int(fields.pop("pid", 1))
        typed = {"token": int, "delay": float, "pids": lambda pids: [int(pid) for pid in pids.split(",")]}
        values = {name: typed.get(name, str)(value) for name, value in fields.items()}
        entity = "" if event in ("kill", "freeze") else "thing"
        lines.append(Line(event, entity, float(at), pid, values))
    return lines


ENQUEUED = """
    0.0 enqueue call=a delay=0
    0.1 enqueued call=a
"""
RUN = """
    1.0 look
    1.1 start token=1 action=x
    1.2 end token=1 action=x outcome=ok
"""

#: An evaluation stands still for longer than its lease, and ends its action while another one is under way.
FROZEN = (
    ENQUEUED
    + """
    1.0 look pid=7
    1.0 start token=1 action=x pid=7
    1.5 freeze pids=7
    3.6 enqueue call=b delay=0
    3.6 enqueued call=b
    3.7 look pid=8
    3.7 start token=2 action=x pid=8
    4.0 end token=1 action=x outcome=ok pid=7
    5.0 end token=2 action=x outcome=ok pid=8
"""
)

ALLOWED = {
    "once": ENQUEUED + RUN,
    "an enqueue that raised is owed nothing": "0 enqueue call=a delay=0",
    "an enqueue during a run is looked at after it": """
        0 enqueue call=a delay=0
        0 enqueued call=a
        1 look
        1 start token=1 action=x
        2 enqueue call=b delay=0
        2 enqueued call=b
        3 end token=1 action=x outcome=ok
        4 look""",
    "an enqueue between a claim and its first line": """
        0.0 enqueue call=a delay=0
        0.1 enqueued call=a
        0.9 enqueue call=b delay=0
        1.0 look
        1.1 enqueued call=b
        2.0 look""",
    "a failure is looked at again": ENQUEUED
    + """
        1 look
        1 start token=1 action=x
        1 end token=1 action=x outcome=raised
        2 look
        2 start token=2 action=x
        2 end token=2 action=x outcome=ok""",
    "a killed run is over": ENQUEUED
    + """
        1 look pid=7
        1 start token=1 action=x pid=7
        2 kill pids=6,7
        3 look pid=8
        3 start token=2 action=x pid=8
        4 end token=2 action=x outcome=ok pid=8""",
    "a kill is noted, and a run begins before it strikes": ENQUEUED
    + """
        0.9 kill pids=7
        1.0 look pid=7
        1.1 start token=1 action=x pid=7
        3.0 look pid=8
        3.1 start token=2 action=x pid=8
        4.0 end token=2 action=x outcome=ok pid=8""",
    "a run that ended well, but the index was not told": ENQUEUED
    + """
        1.0 look pid=7
        1.1 start token=1 action=x pid=7
        1.2 end token=1 action=x outcome=ok pid=7
        1.3 kill pids=7
        3.0 look pid=8
        3.1 start token=2 action=x pid=8
        3.2 end token=2 action=x outcome=ok pid=8
        3.3 kill pids=8
        5.0 look pid=9
        5.1 start token=3 action=x pid=9
        5.2 end token=3 action=x outcome=ok pid=9""",
    "a frozen run loses its lease but may finish its action": FROZEN,
    "and leads to one more look, for it may have undone what another did": FROZEN + "\n 5.1 look pid=8",
    "a delete ends what was owed": ENQUEUED + "0.2 delete call=d \n 0.3 deleted call=d",
    "an enqueue after a delete": "0 delete call=d \n 0.1 deleted call=d \n 0.5 enqueue call=a delay=0"
    "\n 0.6 enqueued call=a \n 9 look",
}

BROKEN = {
    "lost": ENQUEUED,
    "lost: killed and never looked at again": ENQUEUED
    + """
        1 look pid=7
        1 start token=1 action=x pid=7
        2 kill pids=7""",
    "lost: never ended": ENQUEUED + "1 look \n 1 start token=1 action=x",
    "lost: enqueued during the last run": ENQUEUED
    + RUN
    + "1.15 enqueue call=b delay=0 \n 1.16 enqueued call=b",
    "overlap": ENQUEUED
    + """
        1.0 look
        1.0 start token=1 action=x
        1.1 start token=2 action=x
        1.2 end token=1 action=x outcome=ok
        1.3 end token=2 action=x outcome=ok""",
    "overlap: between two actions of a run": ENQUEUED
    + """
        1.0 look
        1.0 start token=1 action=x
        1.1 end token=1 action=x outcome=ok
        1.2 start token=2 action=x
        1.3 end token=2 action=x outcome=ok
        1.4 start token=1 action=y
        1.5 end token=1 action=y outcome=ok""",
    "overlap: of a frozen run whose lease lives": ENQUEUED
    + """
        1.0 look pid=7
        1.0 start token=1 action=x pid=7
        1.5 freeze pids=7
        2.0 start token=2 action=x pid=8
        2.1 end token=2 action=x outcome=ok pid=8
        9.0 end token=1 action=x outcome=ok pid=7""",
    "fenced": ENQUEUED
    + """
        1 look
        1 start token=2 action=x
        1 end token=2 action=x outcome=ok
        2 start token=1 action=x
        2 end token=1 action=x outcome=ok""",
    "early": "0 enqueue call=a delay=5 \n 0.1 enqueued call=a \n 4.9 look",
    "unasked": ENQUEUED + "1 look \n 2 look \n 3 look",
    "unasked: the index was told long before the kill": ENQUEUED
    + """
        1.0 look pid=7
        1.1 start token=1 action=x pid=7
        1.2 end token=1 action=x outcome=ok pid=7
        2.0 look pid=7
        2.1 start token=2 action=x pid=7
        2.2 end token=2 action=x outcome=ok pid=7
        9.0 kill pids=7
        9.5 look pid=8""",
    "posthumous": ENQUEUED + "0.2 delete call=d \n 0.3 deleted call=d \n 9 look",
}


@pytest.mark.parametrize("text", ALLOWED.values(), ids=ALLOWED)
def test_what_is_allowed_is_no_violation(text: str) -> None:
    assert violations(history(text), lease=LEASE) == []


@pytest.mark.parametrize(("name", "text"), BROKEN.items(), ids=BROKEN)
def test_what_is_broken_is_a_violation_of_its_kind(name: str, text: str) -> None:
    found = violations(history(text), lease=LEASE)
    assert name.split(":", maxsplit=1)[0] in {violation.kind for violation in found}


def test_lines_survive_and_keep_their_order(tmp_path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    for number in range(3):
        ledger.write("look", f"thing-{number}")
    assert [line.entity for line in Ledger(tmp_path / "ledger").lines("thing-")] == [
        "thing-0",
        "thing-1",
        "thing-2",
    ]


def test_an_overlap_in_real_workers_turns_the_ledger_red(scene: Scene) -> None:
    scene.world.script(scene.id(), "hold:overlap", "reach")
    scene.things.enqueue(scene.id())
    (start,) = poll("the entity is evaluated", lambda: scene.lines("start"))
    # Straight past the engine: the same entity, in the other slot, while the first run holds its lease.
    scene.things.app.send_task("acceptance.rogue", (scene.id(), start.fields["token"] + 1))
    poll("the rogue has run", lambda: len(scene.lines("end")) == 1)
    scene.world.open("overlap")
    poll("the evaluation has reached its goal", lambda: len(scene.lines("end")) == 3)
    assert {violation.kind for violation in scene.violations()} == {"overlap", "fenced"}
