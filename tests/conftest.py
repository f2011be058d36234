"""What all tests share: summaries of what a test has counted, shown at the end of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """A worker within this process sets the root logger's level, for good: later tests would see no logs."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests recorded with `record_property("summary", line)`, in whichever process they ran."""
    summaries = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "summary"
    ]
    if summaries:
        terminalreporter.section("counted")
        for summary in summaries:
            terminalreporter.line(summary)
