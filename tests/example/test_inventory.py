"""The command that loads an inventory."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from example_project.celery import engine
from example_project.fleet.entities import HostEntity
from example_project.fleet.models import Host

pytestmark = pytest.mark.usefixtures("fleet")

HEADER = "name,rack,unit,pool,model,serial,os,cores,memory_gib,disk_gib"
WEB_1 = "web-001,r01,2,web,PowerEdge R650,B1234,Debian 12,32,128,960"


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    return tmp_path / "hosts.csv"


def load(path: Path) -> str:
    output = io.StringIO()
    call_command("load_inventory", path, stdout=output)
    return output.getvalue()


def test_the_shipped_inventory_has_two_hundred_hosts_up_and_at_goal() -> None:
    assert Host.objects.count() == 200
    assert Host.objects.at_goal().filter(state="UP").count() == 200


def test_loading_again_brings_facts_up_to_date_and_leaves_the_rest(inventory: Path) -> None:
    Host.objects.filter(pk="web-001").update(state="DRAINING", goal="DOWN", workloads=1)
    inventory.write_text(f"{HEADER}\n{WEB_1.replace('Debian 12', 'Debian 13')}\n")
    assert load(inventory) == "1 hosts in hosts.csv: 0 new, 1 known, 0 to change pool\n"
    host = Host.objects.get(pk="web-001")
    assert (host.os, host.state, host.goal, host.workloads) == ("Debian 13", "DRAINING", "DOWN", 1)


def test_another_pool_becomes_the_hosts_goal_and_the_engine_is_told(inventory: Path) -> None:
    inventory.write_text(f"{HEADER}\n{WEB_1.replace(',web,', ',api,')}\n")
    assert load(inventory) == "1 hosts in hosts.csv: 0 new, 1 known, 1 to change pool\n"
    host = Host.objects.get(pk="web-001")
    assert (host.pool, host.goal_pool) == ("web", "api")
    assert engine.is_scheduled(HostEntity("web-001"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "the header lacks name, rack"),
        ("name,rack,unit\nweb-001,r01,2\n", "the header lacks pool, model"),
        (f"{HEADER}\n", "lists no hosts"),
        (f"{HEADER}\n{WEB_1}\n{WEB_1}\n", "line 3: web-001 is listed twice"),
        (f"{HEADER}\n{WEB_1},surplus\n", "line 2: wrong number of fields"),
        (f"{HEADER}\nweb-001,r01\n", "line 2: wrong number of fields"),
        (
            f"{HEADER}\n{WEB_1.replace('web-001', '')}\n",
            "line 2: name must have 1 to 63 characters, not 0",
        ),
        (f"{HEADER}\n{WEB_1.replace('web-001', 'a/b')}\n", "name must consist of letters, digits"),
        (f"{HEADER}\n{WEB_1.replace(',32,', ',many,')}\n", "cores must be a whole number .* not 'many'"),
        (f"{HEADER}\n{WEB_1.replace(',32,', ',-1,')}\n", "cores must be a whole number .* not '-1'"),
        (
            f"{HEADER}\n{WEB_1.replace(',r01,', ',' + 'r' * 16 + ',')}\n",
            "rack must have 1 to 15 characters",
        ),
        (f'{HEADER}\n"{WEB_1}\n', "line 2: unexpected end of data"),
    ],
)
def test_a_bad_inventory_is_refused_as_a_whole(inventory: Path, text: str, error: str) -> None:
    inventory.write_text(text)
    before = Host.objects.count()
    with pytest.raises(CommandError, match=error) as raised:
        load(inventory)
    assert str(inventory) in str(raised.value)
    assert Host.objects.count() == before


def test_a_file_that_is_no_text_is_refused(inventory: Path) -> None:
    inventory.write_bytes(b"name,rack\xff\n")
    with pytest.raises(CommandError, match="is not UTF-8"):
        load(inventory)


def test_a_file_that_is_not_there_is_refused(inventory: Path) -> None:
    with pytest.raises(CommandError, match="cannot read"):
        load(inventory)


def test_a_byte_order_mark_is_fine(inventory: Path) -> None:
    inventory.write_text(f"{HEADER}\n{WEB_1}\n", encoding="utf-8-sig")
    assert load(inventory).startswith("1 hosts")
