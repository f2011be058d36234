"""The pages as an operator sees and uses them, in headless Chromium."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By

from tests.flower.conftest import Flower, Shop
from tests.servers import frozen, poll

pytestmark = [pytest.mark.xdist_group("flower"), pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def flower(shop: Shop) -> Iterator[Flower]:
    with shop.flower(FLOWER_UNAUTHENTICATED_API="true") as flower:
        yield flower


@pytest.fixture(autouse=True)
def quiet(browser: Any) -> Iterator[None]:
    """No test leaves a word in the browser's console."""
    browser.get_log("browser")
    yield
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


@contextlib.contextmanager
def seen(browser: Any, *, width: int = 1280, dark: bool = False) -> Iterator[None]:
    """On a screen of this width, by day or by night."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def text(browser: Any, css: str = "main") -> str:
    return str(browser.find_element(By.CSS_SELECTOR, css).text)


def poll_text(browser: Any, wanted: str, css: str = "main") -> None:
    def says_so() -> bool:
        with contextlib.suppress(
            NoSuchElementException, StaleElementReferenceException
        ):  # it was refreshed just now
            return wanted in text(browser, css)
        return False

    poll(f"{css} says {wanted!r}", says_so, timeout=60, interval=0.1)


def click(browser: Any, xpath: str) -> None:
    """Click it, which may be replaced by its successor just then."""

    def clicked() -> bool:
        with contextlib.suppress(NoSuchElementException, StaleElementReferenceException):
            browser.find_element(By.XPATH, xpath).click()
            return True
        return False

    poll(f"{xpath} is clicked", clicked)


def test_from_the_tab_to_what_fails_and_to_its_task(browser: Any, shop: Shop, flower: Flower) -> None:
    browser.get(f"{flower.url}/workers")
    click(browser, "//nav//a[text()='Goal states']")
    poll("the page", lambda: browser.title == "Goal states · Flower")
    assert text(browser, "nav .active") == "Goal states"
    click(browser, "//a[text()='order/fail-1']")
    poll("its page", lambda: browser.title == "order/fail-1 · Flower")
    assert "ConnectionError: the carrier does not answer: <b>500</b>" in text(browser)
    assert text(browser, ".goalstate-present").split() == ["now:", "charge,", "ship"]


def test_tabs_and_search(browser: Any, flower: Flower) -> None:
    browser.get(f"{flower.url}/goalstate")
    click(browser, "//nav[@aria-label='Lists']/a[contains(., 'Running')]")
    poll_text(browser, "ship, on w1@shop", ".goalstate-list")
    browser.find_element(By.NAME, "entity").send_keys("order/hang-1\n")
    poll("its page", lambda: browser.title == "order/hang-1 · Flower")
    assert "call_carrier < app.py:" in text(browser)


def test_pause_and_resume(browser: Any, shop: Shop, flower: Flower) -> None:
    browser.get(f"{flower.url}/goalstate?list=failed")
    click(browser, "//button[@aria-label='Pause invoice']")
    poll_text(browser, "by flower")
    assert "The kind is paused" in text(browser)
    assert browser.current_url == f"{flower.url}/goalstate?list=failed", "what was done is told once"
    assert shop.engine.paused("invoice")
    click(browser, "//button[@aria-label='Resume invoice']")
    poll_text(browser, "The kind is resumed.")
    assert not shop.engine.paused("invoice")


def test_evaluate_now_and_delete(browser: Any, shop: Shop, flower: Flower) -> None:
    shop.engine.enqueue(shop.order("gone-2"))
    shop.until("gone-2", lambda found: found.quarantined)
    browser.get(f"{flower.url}/goalstate/order/gone-2")
    before = shop.engine.describe(shop.order("gone-2")).finished
    click(browser, "//button[text()='Evaluate now']")
    shop.until("gone-2", lambda found: found.quarantined and found.finished > before)

    click(browser, "//summary[text()='Delete…']")
    assert shop.engine.describe(shop.order("gone-2")) is not None, "it asks first"
    click(browser, "//button[text()='Delete order/gone-2']")
    poll_text(browser, "The entity is forgotten.")
    assert shop.engine.describe(shop.order("gone-2")) is None


def test_a_page_changes_by_itself_and_keeps_the_focus(browser: Any, shop: Shop, flower: Flower) -> None:
    browser.get(f"{flower.url}/goalstate?list=failing")
    browser.execute_script("window.samePage = true")
    browser.find_element(By.CSS_SELECTOR, "nav.goalstate-tabs a[href*=overdue]").send_keys("")
    shop.engine.enqueue(shop.order("fail-2"))
    poll_text(browser, "order/fail-2", ".goalstate-list")
    assert browser.execute_script("return window.samePage")
    assert "list=overdue" in browser.execute_script("return document.activeElement.href")
    shop.engine.delete(shop.order("fail-2"))


def test_an_open_question_is_not_taken_away(browser: Any, flower: Flower) -> None:
    browser.get(f"{flower.url}/goalstate/order/fail-1")
    click(browser, "//summary[text()='Delete…']")
    browser.execute_script("""
        const fetched = window.fetch;
        window.asked = 0;
        window.fetch = function () { window.asked += 1; return fetched.apply(this, arguments); };
    """)
    browser.execute_async_script("setTimeout(arguments[0], 5500)")  # one turn of the page's own clock
    assert browser.execute_script("return window.asked") == 0
    click(browser, "//summary[text()='Delete…']")
    poll("it goes on", lambda: browser.execute_script("return window.asked"), timeout=60)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(
    "path",
    [
        *("?list=failing", "?list=failed", "?list=running", "?list=overdue", "?list=next"),
        *("/order/fail-1", "/order/hang-1", "/order/gone-1", f"/order/{'long' * 100}"),
    ],
)
def test_it_fits(browser: Any, shop: Shop, flower: Flower, path: str, width: int, dark: bool) -> None:
    with seen(browser, width=width, dark=dark):
        shop.engine.enqueue(shop.order("long" * 100), 3600)
        browser.get(f"{flower.url}/goalstate{path}")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness = max(map(int, color.removeprefix("rgb(").removesuffix(")").split(",")))
        assert (brightness < 64) == dark
        card = browser.find_element(By.CSS_SELECTOR, ".goalstate-card, .detail-card")
        assert (max(map(int, background(browser, card))) < 64) == dark


def background(browser: Any, element: Any) -> list[str]:
    color = browser.execute_script("return getComputedStyle(arguments[0]).backgroundColor", element)
    return str(color).removeprefix("rgb(").removesuffix(")").split(",")


def test_behind_a_prefix_and_a_password(browser: Any, shop: Shop) -> None:
    with shop.flower(prefix="ops", login="ann:secret") as flower:
        login = base64.b64encode(b"ann:secret").decode()
        headers = {"headers": {"Authorization": f"Basic {login}"}}
        browser.execute_cdp_cmd("Network.enable", {})
        browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", headers)
        try:
            browser.get(f"{flower.url}/goalstate")
            click(browser, "//button[@aria-label='Pause invoice']")
            poll_text(browser, "by ann")
            click(browser, "//button[@aria-label='Resume invoice']")
            poll_text(browser, "The kind is resumed.")
            poll_text(browser, "Updated ", ".refresh-status")
        finally:
            browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {}})


def test_an_index_that_hangs_and_comes_back(browser: Any, shop: Shop, flower: Flower) -> None:
    browser.get(f"{flower.url}/goalstate")
    with frozen(shop.index.pid):
        poll_text(browser, "the index did not answer")
    poll_text(browser, "order/fail-1", ".goalstate-list")
    assert "the index did not answer" not in text(browser)
