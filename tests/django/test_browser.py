"""The admin as a person sees it, in headless Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from tests.django.conftest import Shop
from tests.servers import free_port, poll

pytestmark = pytest.mark.timeout(300)

#: Narrow as a telephone, and wide.
SIZES = [(390, 844), (1280, 900)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running site with some orders, which evaluates by itself what it enqueues."""
    directory = tmp_path_factory.mktemp("site")
    shop = Shop(
        {"ENGINE": "django.db.backends.sqlite3", "NAME": str(directory / "shop.sqlite3")},
        directory,
        {"MORE_SETTINGS": json.dumps({"DEBUG": True})},
    )
    shop.manage("migrate", "-v0")
    shop.python("""
from django.contrib.auth.models import User
from orders.models import Order
User.objects.create_superuser("admin", password="secret")
Order.objects.bulk_create([Order(note=f"order {number}") for number in range(1, 6)])
""")
    port = free_port()
    server = shop.process(
        *("-m", "django", "runserver", "--noreload", f"127.0.0.1:{port}"), log="runserver.log"
    )
    with server:
        server.poll_until("the site runs", lambda: "Quit the server" in server.output(), timeout=120)
        yield f"http://127.0.0.1:{port}/admin/"


@pytest.fixture
def admin(site: str, browser: Any) -> Any:
    """The browser, logged in."""
    browser.get(site)
    if browser.find_elements(By.NAME, "username"):
        browser.find_element(By.NAME, "username").send_keys("admin")
        browser.find_element(By.NAME, "password").send_keys("secret")
        browser.find_element(By.CSS_SELECTOR, "[type=submit]").click()
        poll("logged in", lambda: "Site administration" in browser.page_source, timeout=60)
    browser.get_log("browser")
    yield browser
    browser.set_window_size(1280, 900)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    complaints = [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    assert complaints == []


def messages(browser: Any) -> str:
    return str(browser.execute_script("return document.querySelector('.messagelist')?.innerText ?? ''"))


def poll_message(browser: Any, wanted: str) -> None:
    poll(f"the message {wanted!r}", lambda: wanted in messages(browser), timeout=60)


def test_goals_are_set_in_the_list(admin: Any, site: str) -> None:
    admin.get(f"{site}orders/order/")
    for box in admin.find_elements(By.CSS_SELECTOR, ".action-select")[:2]:
        box.click()
    Select(admin.find_element(By.NAME, "action")).select_by_visible_text("Set goal to Cancelled")
    admin.find_element(By.CSS_SELECTOR, ".actions button").click()
    poll_message(admin, "2 rows: the goal is Cancelled.")
    assert admin.page_source.count("✓ Cancelled") == 2


def test_a_form_evaluates_and_saves(admin: Any, site: str) -> None:
    admin.get(f"{site}orders/order/2/change/")
    assert admin.find_element(By.CSS_SELECTOR, ".goalstate-present").text.startswith("now: pack")
    admin.find_element(By.XPATH, "//button[text()='Evaluate now']").click()
    poll_message(admin, "1 row will be evaluated now.")
    assert "nothing" in admin.find_element(By.CSS_SELECTOR, ".goalstate-present").text
    note = admin.find_element(By.NAME, "note")
    note.clear()
    note.send_keys("saved by the key Enter\n")
    poll_message(admin, "was changed successfully")
    assert "saved by the key Enter" in admin.page_source


def test_kinds_are_paused_and_resumed(admin: Any, site: str) -> None:
    admin.get(f"{site}goalstate/overview/")
    admin.find_element(By.CSS_SELECTOR, "[value=pause]").click()
    poll_message(admin, "Paused: order.")
    admin.find_element(By.CSS_SELECTOR, "[value=resume]").click()
    poll_message(admin, "Resumed: order.")


@pytest.mark.parametrize("page", ["orders/order/", "orders/order/1/change/", "goalstate/overview/"])
def test_pages_fit_a_telephone_and_the_dark(admin: Any, site: str, page: str) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        admin.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        for width, height in SIZES:
            admin.set_window_size(width, height)
            admin.get(site + page)
            # Chromium's window has a least width; the page is as wide as it is told to be.
            admin.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
            )
            wide = admin.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width, f"{page} at {width} px is {wide} px wide"
            admin.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        colours.add(admin.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
