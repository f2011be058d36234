"""The plots of the page: ours in colour, what it is compared with in grey."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

OURS, PLAIN, FAR = "#1f6f8b", "#b3b3b3", "#e07a3f"

#: What is measured of each peer, and how the columns are headed.
PEERS_MEASURED = {
    "enqueue": "enqueue, µs",
    "duplicate": "duplicate, µs",
    "bulk": "many, µs each",
    "jobs": "jobs a second",
    "bytes": "bytes per job",
}

Measured = Mapping[str, list[float]]


def draw(results: dict[str, Any], directory: Path) -> dict[str, list[str]]:
    """The files that were written, by scenario."""
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "goalstate",  # the same results give the same file
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
    drawn: dict[str, list[str]] = {}
    with plt.rc_context(style):
        for scenario, plot in PLOTS.items():
            if scenario in results["scenarios"]:
                figure = plot(results["scenarios"][scenario]["measured"])
                figure.savefig(directory / f"{scenario}.svg", metadata={"Date": None})
                plt.close(figure)
                drawn[scenario] = [f"{scenario}.svg"]
    return drawn


def _bars(measured: Measured, title: str) -> Any:
    """A bar for each median, with the range of the rounds."""
    names = list(measured)[::-1]
    medians = [statistics.median(measured[name]) for name in names]
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.38 * len(names)))
    ours = ("enqueue", "evaluations")
    axes.barh(names, medians, color=[OURS if name.startswith(ours) else PLAIN for name in names])
    for row, (name, median) in enumerate(zip(names, medians, strict=True)):
        axes.plot([min(measured[name]), max(measured[name])], [row, row], color="black", linewidth=1)
        axes.annotate(f" {median:,.0f}", (max(measured[name]), row), va="center")
    axes.set_title(title, loc="left")
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0)
    return figure


def _enqueue(measured: Measured) -> Any:
    return _bars(measured, "Microseconds per entity (shorter is better)")


def _evaluate(measured: Measured) -> Any:
    return _bars(measured, "A second, one worker process (longer is better)")


def _million(measured: Measured) -> Any:
    figure, axes = plt.subplots(figsize=(8, 3))
    for name, counted, colour, label in (
        ("plain worker's memory, bytes", "delayed tasks", PLAIN, "delayed tasks, plain Celery"),
        ("worker's memory, bytes", "scheduled entities", OURS, "scheduled entities"),
    ):
        megabytes = [value / 1e6 for value in measured[name]]
        axes.plot(measured[counted], megabytes, marker="o", color=colour, label=label)
    axes.set_xscale("symlog", linthresh=1000)
    axes.set_ylim(bottom=0)
    axes.set_title("Memory of a worker, MB, by what waits", loc="left")
    axes.legend(frameon=False)
    return figure


def _lateness(measured: Measured) -> Any:
    figure, both = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axes, beside in zip(both, ("at rest", "beside 1,000 a second"), strict=True):
        for name, colour, label in (
            ("eta", PLAIN, "plain ETA"),
            ("near", OURS, "near deadline"),
            ("far", FAR, "far deadline"),
        ):
            quantiles = measured[f"{name}, {beside}: quantiles"]
            percents = [100 * (n + 1) / (len(quantiles) + 1) for n in range(len(quantiles))]
            axes.plot(percents, quantiles, color=colour, label=label)
        axes.set_yscale("log")
        axes.set_xlabel("percentile")
        axes.set_title(beside, loc="left")
    both[0].set_ylabel("lateness, ms")
    both[0].legend(frameon=False)
    return figure


def _peers(measured: Measured) -> Any:
    """A row for each, a column for each thing measured: read like the table."""
    names = list(dict.fromkeys(name.partition(": ")[0] for name in measured))[::-1]
    figure, columns = plt.subplots(1, len(PEERS_MEASURED), figsize=(12, 0.7 + 0.3 * len(names)), sharey=True)
    for axes, (what, title) in zip(columns, PEERS_MEASURED.items(), strict=True):
        medians = [statistics.median(measured.get(f"{name}: {what}", [0])) for name in names]
        axes.barh(
            names, medians, color=[OURS if name.startswith("celery-goalstate") else PLAIN for name in names]
        )
        for row, median in enumerate(medians):
            if median:  # some cannot do it
                axes.annotate(f" {median:,.0f}", (median, row), va="center")
        axes.set_title(title, loc="left")
        axes.margins(x=0.35)
        axes.tick_params(axis="y", length=0)
        axes.set_xticks([])
    return figure


PLOTS = {
    "enqueue": _enqueue,
    "evaluate": _evaluate,
    "million": _million,
    "lateness": _lateness,
    "peers": _peers,
}
