"""Writes the tables of docs/explanation/chaos.md: `python -m tests.chaos.table run1.json run2.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.chaos.checker import RULES
from tests.chaos.harness import Options

#: Which guarantees each rule stands for, as `docs/explanation/guarantees.md` numbers them.
GUARANTEES = {
    "lost": "3, 4, 8",
    "unsettled": "4",
    "doubled": "1",
    "overlap": "3",
    "zombie": "3",
    "early": "2, 5",
    "later": "2",
    "posthumous": "6",
    "back-off": "5",
    "far": "7",
    "untold": "8",
    "held up": "8",
    "delayed": "9",
}

SETTINGS = ("minutes", "seed", "pace", "calm", "workers", "producers")

Run = dict[str, Any]


def title(run: Run) -> str:
    """What tells one run from another: whatever is not the default, and the broker."""
    options, default = run["options"], Options()
    parts = [options["broker"]]
    parts += [options["pool"]] if options["pool"] != default.pool else []
    indexes = {"redis": [], "cluster": ["index on a cluster"], "same": ["index on the broker"]}
    parts += indexes[options["index"]]
    parts += [options["fsync"]] if options["fsync"] != default.fsync else []
    parts += [f"calm {options['calm']:g}"] if options["calm"] != default.calm else []
    return ", ".join(parts)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]], names: int) -> str:
    head = list(head)
    rule = ["---"] * names + ["--:"] * (len(head) - names)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, rule, *rows])


def _union(runs: list[Run], section: str) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run[section]))


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def tables(runs: list[Run]) -> str:
    """In Markdown: the runs, the guarantees, what was injected, what was seen."""
    titles = [title(run) for run in runs]

    def row(section: str, name: str, *heads: str) -> list[str]:
        return [*(heads or (name,)), *(_number(run[section].get(name, 0)) for run in runs)]

    totals: dict[str, Callable[[Run], int]] = {
        "faults": lambda run: sum(run["faults"].values()),
        "evaluations": lambda run: run["figures"]["evaluations"],
        "broken guarantees": lambda run: sum(run["violations"].values()),
    }
    of_runs = [row("options", name) for name in SETTINGS]
    of_runs += [[name, *(_number(total(run)) for run in runs)] for name, total in totals.items()]
    broken = [row("violations", rule, GUARANTEES[rule], f"{rule}: {text}") for rule, text in RULES.items()]
    return "\n\n".join(
        [
            _table(["run", *titles], of_runs, 1),
            _table(["guarantee", "what would break it", *titles], broken, 2),
            _table(
                ["injected", *titles], [row("faults", name) for name in sorted(_union(runs, "faults"))], 1
            ),
            _table(["seen", *titles], [row("figures", name) for name in _union(runs, "figures")], 1),
        ]
    )


if __name__ == "__main__":
    print(tables([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
