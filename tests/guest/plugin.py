"""A plugin for the host's tests: notes each outcome at once, whatever becomes of the process."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.guest import hook

TIMEOUT = float(os.environ["GUEST_TIMEOUT"])  # seconds for each test, whatever its own marks allow


def note(**what: Any) -> None:
    with open(os.environ["GUEST_NOTES"], "a") as notes:  # noqa: PTH123 - as short as a hook must be
        notes.write(json.dumps(what) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(TIMEOUT), append=False)


def pytest_collection_finish(session: pytest.Session) -> None:
    note(collected=[item.nodeid for item in session.items])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        note(test=report.nodeid, outcome=outcome(report), why=why(report), seconds=report.duration)


def pytest_sessionfinish() -> None:
    note(given=hook.given)


def outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    if report.failed and "Timeout (>" in report.longreprtext:
        return "timeout"
    return "error" if report.failed and report.when != "call" else report.outcome


def why(report: pytest.TestReport) -> str:
    """The first line of what it says, where it did not pass."""
    if isinstance(report.longrepr, tuple):  # of a skipped one: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return next(iter(crash.message.splitlines()), "") if crash else ""
