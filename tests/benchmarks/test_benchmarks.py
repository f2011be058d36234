"""The benchmarks run. What they measure is for `make bench` on a quiet machine to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench import Bench
from benchmarks.peers import PEERS, Peer
from benchmarks.plots import PEERS_MEASURED
from benchmarks.report import Target, write
from benchmarks.scenarios import SCENARIOS, peers
from tests.servers import Valkey

ROOT = Path(__file__).parents[2]


def bench(*options: str) -> str:
    command = [sys.executable, "-m", "benchmarks", *options]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "scenarios",
    [
        ("enqueue", "awake", "store", "counters", "evaluate"),
        pytest.param(SCENARIOS, marks=[pytest.mark.long, pytest.mark.timeout(300)]),
    ],
    ids=["some", "all"],
)
def test_it_measures_and_writes_a_page(scenarios: tuple[str, ...], tmp_path: Path) -> None:
    bench("--quick", "--output", str(tmp_path), "--only", *scenarios)

    page, results = tmp_path / "README.md", tmp_path / "results.json"
    written = page.read_text()
    assert json.loads(results.read_text())["scenarios"].keys() == set(scenarios)
    assert "| enqueue, far deadline | ≤ 1.50 × SET |" in written
    assert "mean nothing" in written
    for line in written.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.rpartition("(")[2].rstrip(")")).read_text().startswith("<?xml")

    page.unlink()
    bench("--report", str(results))
    assert page.read_text() == written


def test_missed_targets_come_first(tmp_path: Path) -> None:
    rows = {"SET": [70.0], "apply_async": [500.0], "enqueue, coalesced": [90.0]}
    rows |= {"enqueue, due now": [600.0], "enqueue, far": [100.0], "enqueue_many, far": [20.5]}
    scenario = {"date": "", "commit": "", "seconds": 0, "measured": rows, "remarks": []}
    table = write({"machine": {}, "quick": False, "scenarios": {"enqueue": scenario}}, tmp_path)

    summary, _, _, _, *lines = table.splitlines()
    assert summary == "2 missed, 2 reached."
    assert [line.split(" | ")[-1] for line in lines] == ["**missed** |"] * 2 + ["reached |"] * 2
    assert lines[0].startswith(
        "| enqueue a new entity, due now | ≤ 1.00 × apply_async | 1.20 × apply_async |"
    )


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    measured = {"ours": [1.0, 10.0, 2.0], "base": [10.0, 20.0, 10.0]}  # the machine was slower for a while
    target = Target("", "some", "ours", 0.25, against="base", how="ratio")
    assert target.measured({"scenarios": {"some": {"measured": measured}}}) == 0.2
    assert not target.missed(0.2)
    assert target.missed(0.26)


def test_peers_stand_beside_plain_celery(tmp_path: Path) -> None:
    rows = {"Celery: enqueue": [500.0, 1000.0], "Celery: jobs": [1000.0, 500.0], "Celery: bytes": [1000.0]}
    rows |= {"Huey: enqueue": [100.0, 500.0], "Huey: jobs": [3500.0, 2000.0], "Huey: bytes": [140.0]}
    rows |= {"celery-goalstate: enqueue": [125.0, 250.0], "celery-goalstate: duplicate": [100.0, 200.0]}
    scenario = {
        "date": "",
        "commit": "",
        "seconds": 0,
        "measured": rows,
        "remarks": ["Huey: huey 3", "SAQ: out"],
    }
    write({"machine": {}, "quick": False, "scenarios": {"peers": scenario}}, tmp_path)

    page = (tmp_path / "README.md").read_text()
    assert "| Celery | 750 (1.00) |  |  | 750 (1.00) | 1,000 (1.00) |" in page
    assert "| Huey | 300 (0.35) |  |  | 2,750 (3.75) | 140 (0.14) |" in page
    assert "| celery-goalstate | 188 (0.25) | 150 (0.20) |  |  |  |" in page
    assert "\n* Huey: huey 3\n* SAQ: out\n" in page
    assert "Huey" in (tmp_path / "peers.svg").read_text()


@pytest.mark.long
@pytest.mark.parametrize(
    "peer",
    [peer for peer in PEERS if not peer.requirements],  # the others need an environment of their own
    ids=lambda peer: peer.program,
)
def test_a_peer_is_measured(peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Valkey(tmp_path) as valkey:
        monkeypatch.setenv("BENCHMARK_SERVER", valkey.url)
        bench = Bench(valkey.client(), rounds=1, quick=True)
        peers.run(bench, [peer])
    able = {"enqueue", "jobs", "bytes"} if peer.name == "Celery" else set(PEERS_MEASURED)
    assert {name.removeprefix(f"{peer.name}: ") for name in bench.measured} == able
    assert all(value > 0 for [value] in bench.measured.values())


def test_a_peer_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Peer("broken", "no_such_program", "", "")
    with Valkey(tmp_path) as valkey:
        monkeypatch.setenv("BENCHMARK_SERVER", valkey.url)
        bench = Bench(valkey.client(), rounds=1, quick=True)
        bench.note("broken: enqueue", 1.0)
        peers.run(bench, [broken])
    assert not bench.measured
    assert bench.remarks[-1].startswith("broken is left out: ModuleNotFoundError: ")
