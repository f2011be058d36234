"""`install()` on a Flower that is another one than it knows: no page, no harm, one line in the log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flower import options, urls
from flower.utils.blocking import BlockingOperationRunner
from flower.views import BaseHandler
from tornado.template import DictLoader

from celery_goalstate.contrib.flower import install
from celery_goalstate.contrib.flower.content import marked
from celery_goalstate.rules import ANY, Rules
from tests.flower.app import State
from tests.flower.conftest import Shop


@pytest.fixture(autouse=True)
def flower_as_it_was() -> Iterator[None]:
    handlers, settings = [*urls.handlers], dict(urls.settings)
    yield
    urls.handlers[:] = handlers
    urls.settings.clear()
    urls.settings.update(settings)


def paths() -> list[str]:
    return [handler[0] if isinstance(handler, tuple) else handler.regex.pattern for handler in urls.handlers]


def test_the_pages_come_before_the_handler_for_all_others() -> None:
    before = paths()
    install()
    install()
    added = ["/goalstate$", "/goalstate/([^/]+)$", "/goalstate/([^/]+)/(.+)$", "/goalstate-static/(.*)$"]
    assert paths() == [*before[:-1], *added, ".*"]


def without_unauthenticated_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseHandler, "unauthenticated_api")


def with_another_get_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseHandler, "get_argument", lambda self, name: name)


def without_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BlockingOperationRunner, "run")


def without_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "default_options", {"auth", "basic_auth", "url_prefix"})


def without_the_last_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    urls.handlers.pop()


def without_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    urls.handlers[:] = [
        each for each in urls.handlers if not (isinstance(each, tuple) and each[0] == "/metrics")
    ]


def without_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(urls, "handlers")


def with_a_template_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    urls.settings["template_loader"] = DictLoader({})


def with_other_templates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "base.html").write_text("{% block title %}{% end %}")
    urls.settings["template_path"] = str(tmp_path)


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        (without_unauthenticated_api, "BaseHandler.unauthenticated_api"),
        (with_another_get_argument, "BaseHandler.get_argument(escape=)"),
        (without_the_runner, "BlockingOperationRunner.run"),
        (without_read_only, "the option read_only"),
        (without_the_last_handler, "flower.urls.handlers, whose last one is for all other URLs"),
        (without_metrics, "the handler of /metrics"),
        (without_handlers, "no attribute 'handlers'"),
        (with_a_template_loader, "its own template loader"),
        (with_other_templates, "the block 'navbar' of base.html"),
    ],
)
def test_a_flower_that_lacks_something_stays_as_it_is(
    change: Any, lacks: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    change(monkeypatch, *([tmp_path] if change is with_other_templates else []))
    handlers, settings = [*getattr(urls, "handlers", [])], dict(urls.settings)
    install()
    [record] = caplog.records
    assert record.getMessage().startswith("no Goal states in Flower")
    assert lacks in record.getMessage()
    assert [*getattr(urls, "handlers", [])] == handlers
    assert urls.settings == settings


def test_another_navigation_gets_no_tab(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    for template in Path(urls.settings["template_path"]).glob("*.html"):
        (tmp_path / template.name).write_text(template.read_text())
    (tmp_path / "navbar.html").write_text("<nav></nav>")
    urls.settings["template_path"] = str(tmp_path)
    install()
    assert "/goalstate$" in paths()
    assert urls.settings["template_loader"].load("navbar.html").generate() == b"<nav></nav>"
    [record] = caplog.records
    assert record.getMessage().startswith("no tab for the Goal states")


def test_flower_starts_all_the_same(tmp_path: Path) -> None:
    config = (
        "from flower.views import BaseHandler\n\ndel BaseHandler.unauthenticated_api\n"
        "BaseHandler.set_default_headers = lambda self: None\n\n"
        "from celery_goalstate.contrib.flower import install\n\ninstall()\n"
    )
    with Shop(tmp_path) as shop, shop.flower(config=config) as flower:
        assert "no Goal states in Flower, for they need 2.2 or later: this one lacks" in flower.output()
        assert flower.get("/goalstate").status == 404
        workers = flower.get("/workers")
        assert (workers.status, "Goal states" in workers.text) == (200, False)


# The matrix --------------------------------------------------------------------------------------

LONG = "a state whose name is longer than what the index keeps of it"


@pytest.mark.parametrize(
    ("table", "state", "goal", "place"),
    [
        ({State.SHIPPED: {State.PAID: []}}, "PAID", "SHIPPED", ("PAID", "SHIPPED")),
        ({State.SHIPPED: {State.PAID: []}}, None, "SHIPPED", None),
        ({State.SHIPPED: {State.PAID: []}}, "LOST", "SHIPPED", None),
        ({State.SHIPPED: {ANY: []}}, "LOST", "SHIPPED", ("ANY", "SHIPPED")),
        ({State.SHIPPED: {ANY: []}}, None, "SHIPPED", None),
        ({"there": {LONG: []}}, f"{LONG[:19]}…", "there", (LONG, "there")),
        ({"there": {LONG: [], f"{LONG[:30]}x": []}}, f"{LONG[:19]}…", "there", None),
    ],
)
def test_the_marked_cell(table: Any, state: str | None, goal: str, place: tuple[str, str] | None) -> None:
    matrix = marked(Rules(table).matrix(), state, goal)
    found = [(cell.state, cell.goal) for row in matrix.rows for cell in row if cell.present]
    assert found == ([place] if place else [])
