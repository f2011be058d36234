"""What the site's pages show and what its buttons do."""

from __future__ import annotations

import pytest
from django.db import connection, transaction
from django.test import Client
from django.test.utils import CaptureQueriesContext

from example_project.celery import engine
from example_project.fleet import maintenance
from example_project.fleet.entities import HostEntity
from example_project.fleet.models import Event, Host

pytestmark = pytest.mark.usefixtures("fleet")

POSTS = ["/hosts/web-017/goal", "/hosts/web-017/pool", "/racks/r04/goal"]


def scheduled() -> set[str]:
    return {
        name for name in Host.objects.values_list("name", flat=True) if engine.is_scheduled(HostEntity(name))
    }


def test_the_fleet_page_lists_every_host(client: Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.content.decode().count("data-host=") == 200


def test_the_fleet_page_of_one_rack_lists_its_hosts_only(client: Client) -> None:
    page = client.get("/?rack=r04").content.decode()
    assert page.count("data-host=") == 20
    assert 'data-host="web-017"' in page


@pytest.mark.parametrize("url", ["/?rack=r99", "/fleet.json?rack=r99", "/hosts/web-999/"])
def test_an_unknown_rack_or_host_is_not_found(client: Client, url: str) -> None:
    assert client.get(url).status_code == 404


def test_the_live_data_says_what_the_page_shows(client: Client) -> None:
    Host.objects.filter(pk="web-017").update(state="DRAINING", goal="DOWN", workloads=2, trouble="no answer")
    data = client.get("/fleet.json?rack=r04").json()
    assert data["racks"] == {"r04": {"at_goal": 19, "total": 20, "goals": ["DOWN", "UP"]}}
    assert data["counts"] == {"UP": 19, "DRAINING": 1, "DRAINED": 0, "DOWN": 0}
    host = data["hosts"]["web-017"]
    assert (host["state"], host["goal"], host["load"], host["trouble"]) == (
        "DRAINING",
        "DOWN",
        50,
        "no answer",
    )
    assert host["label"] == (
        "web-017: DRAINING, pool web, 2 of 4 workloads, on its way to DOWN, last look failed: no answer"
    )


def test_a_host_page_shows_the_host_and_what_the_engine_knows(client: Client) -> None:
    assert "no evaluation of this host was asked for yet" in client.get("/hosts/web-017/").content.decode()
    client.post("/hosts/web-017/goal", {"goal": "DOWN"})
    page = client.get("/hosts/web-017/").content.decode()
    assert "<dd>scheduled</dd>" in page
    assert "goal is now DOWN" in page


def test_the_goal_of_one_host(client: Client) -> None:
    assert client.post("/hosts/web-017/goal", {"goal": "DOWN"}).status_code == 302
    assert list(Host.objects.filter(goal="DOWN").values_list("name", flat=True)) == ["web-017"]
    assert scheduled() == {"web-017"}


def test_the_goal_of_a_whole_rack(client: Client) -> None:
    assert client.post("/racks/r04/goal", {"goal": "DOWN"}).status_code == 302
    assert set(Host.objects.filter(goal="DOWN").values_list("rack", flat=True)) == {"r04"}
    assert scheduled() == set(Host.objects.filter(rack="r04").values_list("name", flat=True))


def test_a_goal_asked_for_twice_is_noted_once(client: Client) -> None:
    for _ in range(2):
        client.post("/hosts/web-017/goal", {"goal": "DOWN"})
    assert Event.objects.filter(host="web-017").count() == 1


def test_a_new_maintenance_counts_its_looks_afresh(client: Client) -> None:
    Host.objects.filter(pk="web-017").update(drain_looks=5, drain_failures=2, trouble="no answer")
    client.post("/hosts/web-017/goal", {"goal": "DOWN"})
    host = Host.objects.get(pk="web-017")
    assert (host.drain_looks, host.drain_failures, host.trouble) == (0, 0, "")


def test_the_pool_of_a_host(client: Client) -> None:
    assert client.post("/hosts/web-017/pool", {"pool": "api"}).status_code == 302
    host = Host.objects.get(pk="web-017")
    assert (host.pool, host.goal_pool) == ("web", "api")
    assert list(HostEntity.iter_unconverged()) == ["web-017"]
    assert scheduled() == {"web-017"}


@pytest.mark.parametrize("url", POSTS)
def test_a_change_needs_a_post(client: Client, url: str) -> None:
    assert client.get(url).status_code == 405


@pytest.mark.parametrize("url", POSTS)
def test_a_change_needs_the_token_of_a_form(url: str) -> None:
    client = Client(enforce_csrf_checks=True)
    assert client.post(url, {"goal": "DOWN", "pool": "api"}).status_code == 403
    assert not scheduled()


@pytest.mark.parametrize("url", ["/hosts/web-999/goal", "/hosts/web-999/pool", "/racks/r99/goal"])
def test_a_change_of_nothing_is_not_found(client: Client, url: str) -> None:
    assert client.post(url, {"goal": "DOWN", "pool": "api"}).status_code == 404


@pytest.mark.parametrize("form", [{}, {"goal": ""}, {"goal": "down"}, {"goal": "DRAINED"}])
def test_a_goal_that_is_none_is_refused(client: Client, form: dict[str, str]) -> None:
    response = client.post("/racks/r04/goal", form)
    assert response.status_code == 400
    assert response.content == b"goal must be UP or DOWN\n"
    assert not Host.objects.filter(goal="DOWN").exists()


@pytest.mark.parametrize("form", [{}, {"pool": ""}, {"pool": "nowhere"}])
def test_a_pool_that_the_fleet_has_not_is_refused(client: Client, form: dict[str, str]) -> None:
    assert client.post("/hosts/web-017/pool", form).status_code == 400
    assert not scheduled()


def test_the_engine_is_told_after_the_commit(client: Client) -> None:
    with transaction.atomic():
        client.post("/racks/r04/goal", {"goal": "DOWN"})
        assert not scheduled()
    assert len(scheduled()) == 20


def test_the_engine_is_not_told_of_what_is_rolled_back(client: Client) -> None:
    with transaction.atomic():
        client.post("/racks/r04/goal", {"goal": "DOWN"})
        transaction.set_rollback(True)
    assert not scheduled()
    assert not Host.objects.filter(goal="DOWN").exists()


def test_setting_a_goal_takes_few_queries_however_many_hosts() -> None:
    with CaptureQueriesContext(
        connection,
    ) as queries:
        maintenance.set_goal(Host.objects.filter(rack="r04"), "DOWN")
    assert len(queries) <= 6
