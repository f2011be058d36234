"""Short runs of the harness, with every fault that there is; `make chaos` makes long ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.supervised import ROOT

Record = Callable[[str, object], None]


def chaos(directory: Path, *arguments: str, project: Path = ROOT) -> tuple[dict[str, Any], str]:
    """Run the harness in a process of its own: what it found, and what it printed."""
    file = directory / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments, "--json", str(file)],
        cwd=project,
        env={**os.environ, "TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout[-5000:] + done.stderr[-5000:]
    assert file.exists(), output
    return json.loads(file.read_text()), output


def breaks_nothing(directory: Path, record: Record, *arguments: str) -> None:
    result, output = chaos(directory, *arguments)
    broken = {rule: count for rule, count in result["violations"].items() if count}
    figures, faults = result["figures"], sum(result["faults"].values())
    record(
        "summary",
        f"chaos {' '.join(arguments)}: {faults} faults, {figures['entities']} entities, "
        f"{figures['evaluations']} evaluations: {broken or 'nothing broken'}",
    )
    assert not broken, output
    assert not result["notes"], output
    assert figures["evaluations"] > figures["entities"] > 100


@pytest.mark.timeout(180)
def test_half_a_minute_of_all_faults_breaks_nothing(tmp_path: Path, record_property: Record) -> None:
    breaks_nothing(tmp_path, record_property, "--seed", "20261", "--minutes", "0.5")


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--broker", "rabbitmq"),
        ("--broker", "quorum"),
        ("--broker", "redis-server"),
        ("--index", "cluster"),
        ("--index", "same"),
        ("--fsync", "everysec"),
        ("--faults", "the clock of"),
        ("--pool", "threads"),
        ("--pool", "solo", "--pace", "0.3"),
        ("--pool", "gevent"),
    ],
    ids=" ".join,
)
def test_nor_does_it_elsewhere(arguments: tuple[str, ...], tmp_path: Path, record_property: Record) -> None:
    breaks_nothing(tmp_path, record_property, "--seed", "1", "--minutes", "1", *arguments)


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--faults", "stalls", "--kinds", "careless,guarded,restless", "--pace", "1"),
        ("--faults", "whole kind"),
        ("--faults", "whole kind,connections", "--kinds", "restless,outsider,polling"),
        ("--faults", "clock of the index"),
        ("--faults", "cannot be published", "--latest", "8"),
        ("--faults", "shutdown", "--kinds", "delicate,steady,slow"),
        ("--faults", "is full"),
        ("--faults", "broker stands", "--calm", "4"),
        ("--faults", "broker stands", "--calm", "4", "--broker", "rabbitmq"),
        ("--faults", "node", "--index", "cluster"),
    ],
    ids=" ".join,
)
def test_nor_does_a_bad_day(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Of one sort of fault only, so that nothing else can be the cause."""
    result, output = chaos(tmp_path, "--seed", "2", "--minutes", "0.5", "--trouble", "0", *arguments)
    assert not any(result["violations"].values()), output
    assert result["figures"]["evaluations"] > 30, output


@pytest.mark.long
@pytest.mark.timeout(180)
def test_poison_is_quarantined_while_others_go_on(tmp_path: Path) -> None:
    arguments = ("--seed", "1", "--minutes", "0.4", "--trouble", "0", "--faults", "kills its worker")
    result, output = chaos(tmp_path, *arguments, "--kinds", "steady")
    assert not any(result["violations"].values()), output
    assert result["figures"]["quarantined"] > 5, output
    assert result["figures"]["evaluations"] > 200, output
