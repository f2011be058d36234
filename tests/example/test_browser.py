"""Site and Flower as a person sees them, in headless Chromium, on the running demo."""

from __future__ import annotations

from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import staleness_of
from selenium.webdriver.support.ui import Select

from tests.example.conftest import Running
from tests.servers import poll

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.timeout(180)]


def text(browser: Any, css: str = "body") -> str:
    return str(browser.find_element(By.CSS_SELECTOR, css).text)


def poll_text(browser: Any, wanted: str, css: str = "body", timeout: float = 20) -> None:
    poll(f"{css} to say {wanted!r}", lambda: wanted in text(browser, css), timeout=timeout, interval=0.1)


def test_the_fleet_page_shows_the_rack_at_its_goal(browser: Any, running: Running) -> None:
    browser.get(running.site)
    poll_text(browser, "live, ", "#live")
    assert browser.title == "Fleet"
    assert len(browser.find_elements(By.CSS_SELECTOR, "[data-host]")) == 200
    assert "20 of 20 at goal" in text(browser, "[data-rack=r04]")
    tile = text(browser, "[data-host=web-017]")
    assert tile.split() == ["web-017", "DOWN"]
    assert "powered off" in text(browser, "#events")


def test_a_button_sets_a_goal_and_the_page_follows_live(browser: Any, running: Running) -> None:
    browser.get(f"{running.site}?rack=r02")
    browser.execute_script("window.samePage = true")
    browser.find_element(By.CSS_SELECTOR, "button[value=DOWN]").click()
    poll_text(browser, "DRAINING", "[data-rack=r02]")
    poll_text(browser, "20 of 20 at goal", "[data-rack=r02]", timeout=60)
    states = [
        tile.get_attribute("data-state") for tile in browser.find_elements(By.CSS_SELECTOR, "[data-host]")
    ]
    assert states == ["DOWN"] * 20
    assert browser.execute_script("return window.samePage")
    assert not browser.find_element(By.CSS_SELECTOR, "button[value=DOWN]").is_enabled()

    browser.find_element(By.CSS_SELECTOR, "button[value=UP]").click()
    poll_text(browser, "UP 20", ".legend", timeout=60)


def test_choosing_a_rack_shows_it_alone(browser: Any, running: Running) -> None:
    browser.get(running.site)
    Select(browser.find_element(By.ID, "rack")).select_by_visible_text("r09")
    poll("the page of r09", lambda: browser.title == "Rack r09")
    assert len(browser.find_elements(By.CSS_SELECTOR, "[data-host]")) == 20


def test_a_host_page_shows_its_story_and_the_engines_record(browser: Any, running: Running) -> None:
    browser.get(f"{running.site}hosts/web-017/")
    page = text(browser)
    for words in ("What the engine knows", "idle", "Converged\nyes", "goal is now DOWN", "powered off"):
        assert words in page


def test_a_host_changes_pool(browser: Any, running: Running) -> None:
    browser.get(f"{running.site}hosts/gpu-001/")
    Select(browser.find_element(By.ID, "pool")).select_by_visible_text("batch")
    button = browser.find_element(By.XPATH, "//button[text()='Move']")
    button.click()
    # A refresh would cancel what the browser has not sent yet.
    poll("the answer to the form", lambda: staleness_of(button)(browser))

    def moved() -> bool:
        browser.refresh()
        return "moved from pool gpu to batch" in text(browser)

    poll("gpu-001 to move", moved, interval=0.3)


@pytest.mark.parametrize("path", ["", "hosts/web-017/"])
def test_the_pages_fit_a_phone(browser: Any, running: Running, path: str) -> None:
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.get(f"{running.site}{path}")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_browser_has_nothing_to_complain_of(browser: Any, running: Running) -> None:
    browser.get_log("browser")  # forget what other pages said
    browser.get(running.site)
    poll_text(browser, "live, ", "#live")
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


def search(browser: Any, running: Running, host: str) -> list[str]:
    """Each row of Flower's task list for all evaluations of a host."""
    browser.get(f"{running.flower}tasks")
    box = poll(
        "Flower's search box",
        lambda: browser.find_elements(By.CSS_SELECTOR, "input[type=search], .dataTables_filter input"),
    )[0]
    box.clear()  # the browser remembers the last search
    box.send_keys(f"kwargs:entity=host/{host}")

    # Flower filters at each letter: wait until every row is of that host, and none of another.
    def rows() -> list[str]:
        found = text(browser, "#tasks-table tbody").splitlines()
        return found if all(f"{{'entity': 'host/{host}'}}" in row for row in found) else []

    return poll(f"Flower to find {host}", rows, timeout=30, interval=0.2)


def test_flower_finds_every_evaluation_of_a_host(browser: Any, running: Running) -> None:
    rows = search(browser, running, "web-017")
    assert all(row.startswith("goalstate.host ") for row in rows)
    success = "SUCCESS 'host/web-017: "
    assert any(f"{success}UP → DRAINING: drain " in row and "; again in 1 s'" in row for row in rows)
    assert any(f"{success}DRAINED → DOWN: power_off " in row and "; converged'" in row for row in rows)


def test_flower_shows_that_a_drain_failed_and_was_retried(browser: Any, running: Running) -> None:
    # Its first look fails in every run. The retry has the same task id, so Flower has both in one row.
    search(browser, running, "batch-005")
    links = browser.find_elements(By.CSS_SELECTOR, "#tasks-table tbody a[href*='/task/']")
    pages = []
    for url in [link.get_attribute("href") for link in links]:
        browser.get(url)
        pages.append(text(browser))
    assert any("Traceback" in page and "DrainError: batch-005: " in page for page in pages)


def test_flower_shows_goal_states(browser: Any, running: Running) -> None:
    browser.get(running.flower)
    browser.find_element(By.XPATH, "//nav//a[text()='Goal states']").click()
    poll_text(browser, "host", ".goalstate-kinds")
    browser.find_element(By.NAME, "entity").send_keys("host/web-017\n")
    poll_text(browser, "DOWN → DOWN", ".goalstate-states")
    assert "power_off" in text(browser, ".goalstate-matrix")
