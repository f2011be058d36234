"""The pages as HTTP has them: what they say, who may change something, and what no id or error can do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from urllib.parse import quote

import pytest
from prometheus_client.parser import text_string_to_metric_families

from celery_goalstate.contrib.flower import content
from tests.flower.app import make_engine
from tests.flower.conftest import CONFIG, Flower, Shop
from tests.servers import Cluster, frozen, poll

pytestmark = [pytest.mark.xdist_group("flower"), pytest.mark.timeout(180)]

ODD_IDS = ["a/b", "ü", "<b>x</b>", "%2F", "a b", "a+b", "a//b", "?x=1#y", "'\"&amp;", "\u202egnp.exe"]


@pytest.fixture(scope="module")
def flower(shop: Shop) -> Iterator[Flower]:
    """Open to whoever reaches it."""
    with shop.flower(FLOWER_UNAUTHENTICATED_API="true") as flower:
        yield flower


def page_of(kind: str, id: str) -> str:
    return f"/goalstate/{kind}/{quote(id, safe='')}"


# What they say -----------------------------------------------------------------------------------


def test_every_page_of_flower_has_the_tab(flower: Flower) -> None:
    for path in ("/", "/workers", "/tasks", "/broker", "/goalstate", "/no/such/page"):
        assert ">Goal states</a>" in flower.get(path).text, path
    assert 'href="/goalstate"\naria-current="page">Goal states' in flower.get("/goalstate").text
    assert 'href="/goalstate"\naria-current="page"' not in flower.get("/tasks").text


@pytest.mark.parametrize(
    ("tab", "id", "words"),
    [
        ("failing", "fail-1", ["PAID → SHIPPED", "charge", "ConnectionError: the carrier does not answer"]),
        ("failed", "gone-1", ["PAID → SHIPPED", "charge", "PermanentError: there is no such address"]),
        ("running", "hang-1", ["ship, on w1@shop, pid "]),
    ],
)
def test_a_list(flower: Flower, tab: str, id: str, words: list[str]) -> None:
    text = flower.get(f"/goalstate?list={tab}").text
    assert f'href="/goalstate/order/{id}">order/{id}</a>' in text
    for each in words:
        assert each in text
    assert "order/done-1" not in text


def test_without_a_name_it_lists_what_needs_a_person(flower: Flower) -> None:
    assert 'href="/goalstate/order/fail-1"' in flower.get("/goalstate").text
    assert 'href="/goalstate/order/fail-1"' not in flower.get("/goalstate?kind=invoice").text


def test_overdue_and_next(shop: Shop, flower: Flower) -> None:
    shop.engine.pause("invoice", by="<i>ann</i>")
    for n in range(60):
        shop.engine.enqueue(shop.engine.ref("invoice", f"late-{n}"))
        shop.engine.enqueue(shop.engine.ref("invoice", f"far-{n}"), 3600 + n)
    try:
        late, far = (flower.get(f"/goalstate?list={tab}&kind=invoice").text for tab in ("overdue", "next"))
        assert late.count(">invoice/late-") == far.count(">invoice/far-") == content.ROWS
        assert ">invoice/far-" not in late
        assert ">invoice/late-" not in far
        assert "These are 50 of 60." in far
        assert "by &lt;i&gt;ann&lt;/i&gt;" in far
    finally:
        shop.engine.delete_kind("invoice")
        shop.engine.resume("invoice")


def test_search_leads_to_the_page(flower: Flower) -> None:
    for id in ODD_IDS:
        answer = flower.get(f"/goalstate?entity={quote(f'order/{id}')}")
        assert (answer.status, answer.location) == (302, page_of("order", id))
    for nonsense in ("42", "Order/42", "/42", "order/"):
        answer = flower.get(f"/goalstate?entity={quote(nonsense)}")
        assert answer.status == 404
        assert "Give an entity as KIND/ID" in answer.text


def test_a_page_says_what_show_says(flower: Flower) -> None:
    text = flower.get("/goalstate/order/fail-1").text
    for words in (
        ">scheduled</span>",
        "PAID → SHIPPED",
        "That is the retry after ",
        ", in charge",
        "<h2>Last failures</h2>",
        "ConnectionError: the carrier does not answer: &lt;b&gt;500&lt;/b&gt;",
        'goalstate-present" aria-current="true"><strong>now: </strong>charge, ship</td>',
    ):
        assert words in text, words
    assert "<b>500" not in text


def test_a_page_says_what_a_long_evaluation_does(flower: Flower) -> None:
    text = flower.get("/goalstate/order/hang-1").text
    assert ", on w1@shop, pid " in text
    assert "<dt>Doing</dt><dd>ship, " in text
    assert "call_carrier &lt; app.py:" in text


def test_a_page_of_one_in_quarantine_says_how_to_go_on(flower: Flower) -> None:
    assert "<code>goalstate enqueue order/gone-1</code>" in flower.get("/goalstate/order/gone-1").text


def test_a_task_is_a_link_only_if_flower_knows_it(shop: Shop, flower: Flower) -> None:
    task_id = shop.engine.describe(shop.order("done-1")).task_id  # before there was a Flower
    assert f"{task_id} <span" in flower.get("/goalstate/order/done-1").text
    shop.engine.enqueue(shop.order("done-2"))
    shop.until("done-2", lambda found: found.finished)
    task_id = shop.engine.describe(shop.order("done-2")).task_id
    poll(
        "Flower has heard of the task",
        lambda: f'href="/task/{task_id}"' in flower.get("/goalstate/order/done-2").text,
        timeout=30,
    )
    assert flower.get(f"/task/{task_id}").status == 200


@pytest.mark.parametrize("path", ["/goalstate/order/never", "/goalstate/nothing/1", "/goalstate/Order/1"])
def test_what_is_not_known(flower: Flower, path: str) -> None:
    assert flower.get(path).status == 404


@pytest.mark.parametrize("id", ODD_IDS)
def test_odd_ids(shop: Shop, flower: Flower, id: str) -> None:
    path = page_of("order", id)
    assert flower.post(path, do="enqueue").location == f"{path}?done=enqueued"
    shop.until(id, lambda found: found.finished)
    page, board = flower.get(path), flower.get("/goalstate?list=next&kind=order")
    assert page.status == board.status == 200
    shown = escape(str(shop.order(id)), quote=False)
    assert f"<h1>{shown}" in page.text.replace("&#x27;", "'").replace("&#39;", "'").replace("&quot;", '"')
    for text in (page.text, board.text):
        assert "<b>x" not in text
        assert "\u202e" not in text
    assert flower.post(path, do="delete").status == 303
    assert shop.engine.describe(shop.order(id)) is None


# Who may change something ------------------------------------------------------------------------


def test_pause_and_resume(shop: Shop, flower: Flower) -> None:
    answer = flower.post("/goalstate/invoice?list=next&kind=invoice", do="pause")
    assert (answer.status, answer.location) == (303, "/goalstate?list=next&kind=invoice&done=paused")
    assert shop.engine.overview()["invoice"].paused.by == "flower"
    page = flower.get(answer.location).text
    assert "paused now by flower" in page or " ago by flower" in page
    assert 'value="resume"' in page
    assert flower.post("/goalstate/invoice", do="resume").location == "/goalstate?done=resumed"
    assert not shop.engine.paused("invoice")


def test_what_is_under_way_already_is_unchanged(shop: Shop, flower: Flower) -> None:
    shop.engine.pause("order")
    try:
        places = [flower.post("/goalstate/order/done-3", do="enqueue").location for _ in range(2)]
        assert [place.partition("?")[2] for place in places] == ["done=enqueued", "done=unchanged"]
    finally:
        shop.engine.delete(shop.order("done-3"))
        shop.engine.resume("order")


@pytest.mark.parametrize(
    ("path", "do", "status"),
    [
        ("/goalstate/invoice", "explode", 400),
        ("/goalstate/invoice", "enqueue", 400),
        ("/goalstate/order/1", "pause", 400),
        ("/goalstate/order/1", "", 400),
        ("/goalstate/nothing", "pause", 404),
        ("/goalstate/nothing/1", "enqueue", 404),
        ("/goalstate/Invoice", "pause", 404),
    ],
)
def test_bad_requests(flower: Flower, path: str, do: str, status: int) -> None:
    assert flower.post(path, do=do).status == status


FOREIGN: list[dict[str, str]] = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://["},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
]


def refuses_foreigners(shop: Shop, flower: Flower) -> None:
    for headers in FOREIGN:
        for path, do in (("/goalstate/invoice", "pause"), ("/goalstate/order/x", "enqueue")):
            assert flower.post(path, do=do, headers=headers).status == 403, headers
    for token in ("nonsense", "2|aaaa|bbbb|123"):
        assert flower.post("/goalstate/invoice", do="pause", token=token).status == 403
    flower.cookie = ""
    assert flower.post("/goalstate/invoice", do="pause", token="-").status == 403
    assert not shop.engine.paused("invoice")
    assert shop.engine.describe(shop.order("x")) is None


def accepts_its_own(shop: Shop, flower: Flower, by: str) -> None:
    own = f"http://127.0.0.1:{flower.port}"
    for headers in ({}, {"Sec-Fetch-Site": "same-origin"}, {"Origin": own}):
        assert flower.post("/goalstate/invoice", do="pause", headers=headers).status == 303
        assert shop.engine.overview()["invoice"].paused.by == by
        assert flower.post("/goalstate/invoice", do="resume", headers=headers).status == 303


def test_an_open_flower_refuses_other_sites(shop: Shop, flower: Flower) -> None:
    refuses_foreigners(shop, flower)
    accepts_its_own(shop, flower, by="flower")


def test_other_sites_may_neither_read_nor_frame_the_pages(flower: Flower) -> None:
    assert flower.get("/workers").headers["Access-Control-Allow-Origin"] == "*"
    for path in ("/goalstate", "/goalstate/order/fail-1", "/goalstate/order/never"):
        headers = flower.get(path).headers
        assert not [name for name in headers if name.startswith("Access-Control-")]
        assert headers["Content-Security-Policy"] == "frame-ancestors 'self'"


def test_without_authentication_nothing_changes(shop: Shop) -> None:
    with shop.flower() as flower:
        refuses_foreigners(shop, flower)
        assert flower.post("/goalstate/invoice", do="pause").status == 401
        assert flower.post("/goalstate/order/x", do="enqueue").status == 401
        page = flower.get("/goalstate")
        assert (page.status, "<button class" in page.text.partition("data-goalstate-live")[2]) == (200, False)
        assert "No buttons here: changes need a Flower that knows who asks" in page.text
    assert shop.engine.describe(shop.order("x")) is None


def test_read_only(shop: Shop) -> None:
    with shop.flower("--read-only", FLOWER_UNAUTHENTICATED_API="true") as flower:
        refuses_foreigners(shop, flower)
        answer = flower.post("/goalstate/invoice", do="pause")
        assert (answer.status, "Flower is read-only" in answer.text) == (403, True)
        for path in ("/goalstate", "/goalstate/order/fail-1"):
            page = flower.get(path)
            assert page.status == 200
            assert "<button" not in page.text.partition("data-goalstate-live")[2].partition("</main>")[0]
    with shop.flower("--read-only") as flower:
        assert flower.post("/goalstate/invoice", do="pause").status == 403
    assert not shop.engine.paused("invoice")


def test_basic_auth_and_a_prefix(shop: Shop) -> None:
    with shop.flower(prefix="goalstate/ops", login="ann:secret") as flower:
        refuses_foreigners(shop, flower)
        accepts_its_own(shop, flower, by="ann")
        page = flower.get("/goalstate").text
        assert 'href="/goalstate/ops/goalstate/order/fail-1"' in page
        assert 'action="/goalstate/ops/goalstate/invoice"' in page
        for path in ("goalstate.css", "goalstate.js"):
            assert f'"/goalstate/ops/goalstate-static/{path}?v=' in page
            assert flower.get(f"/goalstate-static/{path}").status == 200
        resumed = flower.post("/goalstate/invoice", do="resume")
        assert resumed.location == "/goalstate/ops/goalstate?done=resumed"
        token = flower.token()
        for login in (None, "ann:guess"):
            flower.login = login
            assert flower.get("/goalstate").status == 401
            assert flower.get("/goalstate/order/fail-1").status == 401
            assert flower.post("/goalstate/invoice", do="pause", token=token).status == 401
            assert flower.post("/goalstate/order/x", do="enqueue", token=token).status == 401
    assert not shop.engine.paused("invoice")
    assert shop.engine.describe(shop.order("x")) is None


def test_a_login_page(shop: Shop) -> None:
    auth = ("--auth=.*@shop.example", "--auth-provider=flower.views.auth.GoogleAuth2LoginHandler")
    with shop.flower(*auth) as flower:
        answer = flower.get("/goalstate")
        assert (answer.status, answer.location) == (302, "/login?next=%2Fgoalstate")
        assert flower.get("/no/such/page").status == 404
        token = flower.token()
        assert token, "which even the page of an error brings"
        assert flower.post("/goalstate/invoice", do="pause", token=token).status == 403
        assert flower.post("/goalstate/order/x", do="enqueue", token=token).status == 403
    assert not shop.engine.paused("invoice")
    assert shop.engine.describe(shop.order("x")) is None


# An index that does not answer -------------------------------------------------------------------


def test_metrics_are_flowers_and_ours(flower: Flower) -> None:
    answer = flower.get("/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert "flower_worker_online" in families
    failing = {
        tuple(each.labels.values()): each.value for each in families["goalstate_entities_failing"].samples
    }
    assert failing["order",] == 1
    assert families["goalstate_index_up"].samples[0].value == 1


def test_metrics_while_the_index_hangs(tmp_path: Path) -> None:
    with Shop(tmp_path) as shop, shop.flower() as flower:
        assert "goalstate_index_up 1.0" in flower.get("/metrics").text
        with frozen(shop.index.pid), ThreadPoolExecutor() as pool:
            scrape, answered = pool.submit(flower.get, "/metrics"), 0
            while not scrape.done():
                assert flower.get("/healthcheck").text == "OK"
                answered += 1
            assert answered > 2, "the index was asked on the event loop"
            assert scrape.result().status == 200
            assert "goalstate_index_up 0.0" in scrape.result().text
            assert "goalstate_entities" not in scrape.result().text
        assert "python_info" in flower.get("/metrics").text


def test_while_the_index_hangs_flower_answers(tmp_path: Path) -> None:
    with Shop(tmp_path) as shop, shop.flower(FLOWER_UNAUTHENTICATED_API="true") as flower:
        assert flower.get("/goalstate").status == 200
        token = flower.token()
        with frozen(shop.index.pid), ThreadPoolExecutor() as pool:
            paths = [f"/goalstate?n={n}" for n in range(3)]
            waiting = [pool.submit(flower.get, path) for path in [*paths, "/goalstate/order/1"]]
            answered = 0
            while not any(page.done() for page in waiting):
                assert flower.get("/healthcheck").text == "OK"
                answered += 1
            # Were the index asked on the event loop, a page would hold up all others until it is done.
            assert answered > 2
            for page in waiting:
                assert "the index did not answer" in page.result().text
            refused = flower.post("/goalstate/order/1", do="enqueue", token=token)
            assert (refused.status, "The index did not answer" in refused.text) == (503, True)
        shop.index.kill()
        page = flower.get("/goalstate")
        assert page.status == 200
        assert f"(redis://127.0.0.1:{shop.index.port}/0)" in page.text


def test_of_a_cluster_what_is_known_is_shown(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        engine = make_engine("memory://", cluster.url, tmp_path / "hanging")
        engine.app.conf.goalstate_shards = 16
        engine.enqueue_many([engine.ref("order", str(n)) for n in range(40)], 3600)
        whole = content.board(engine.app, None, "next", None)
        assert (len(whole.rows), whole.is_whole) == (40, True)
        cluster.nodes[0].kill()
        part = content.board(engine.app, None, "next", None)
    assert 0 < len(part.rows) < 40
    assert "not known is what is in " in part.troubles[0]
    assert not part.is_whole


def test_without_workers_it_says_so(tmp_path: Path) -> None:
    with Shop(tmp_path) as shop, shop.flower() as flower:
        assert "no worker is there so far, nothing happens (order, invoice)" in flower.get("/goalstate").text


def test_an_app_without_an_engine(tmp_path: Path) -> None:
    config = f"{CONFIG}\nfrom tests.flower import shop\n\nshop.app.__dict__.pop('goalstate_engines')\n"
    with Shop(tmp_path) as shop, shop.flower(config=config) as flower:
        page = flower.get("/goalstate")
        assert (page.status, "has no engine; create one beside it" in page.text) == (200, True)
        metrics = flower.get("/metrics")
        assert (metrics.status, "python_info" in metrics.text, "goalstate" in metrics.text) == (
            200,
            True,
            False,
        )


def test_an_index_in_memory(tmp_path: Path) -> None:
    with Shop(tmp_path) as shop:
        shop.env["SHOP_INDEX"] = "memory://"
        with shop.flower() as flower:
            for path in ("/goalstate", "/goalstate/order/1"):
                assert "the index is memory://, which lives within one process" in flower.get(path).text
