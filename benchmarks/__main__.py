"""`make bench`: what an enqueue, an evaluation, a million entities cost, as ratios to plain Celery's.

Whatever is compared is measured in rounds that take turns, on one embedded server that nobody else uses, in
one run. Figures move with the machine, ratios do so less.

    make bench                                  everything, some ten minutes; writes docs/benchmarks
    make bench ARGS=--peers                     other queues too, some ten minutes more
    make bench ARGS="--only enqueue evaluate"   some of it; the rest stays as it was measured before
    make bench ARGS="--report docs/benchmarks/results.json"    measure nothing, write the pages again
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.bench import Bench
from benchmarks.scenarios import SCENARIOS
from tests.servers import Valkey

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make bench ARGS=...", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[*SCENARIOS, "peers"], help="these only")
    parser.add_argument("--peers", action="store_true", help="peers too, installed into .venv-peers at first")
    parser.add_argument("--rounds", type=int, default=15, help="of what takes milliseconds; default: 15")
    parser.add_argument("--quick", action="store_true", help="a smoke run: its figures mean nothing")
    parser.add_argument("--output", type=Path, default=DOCS, help="a directory; default: docs/benchmarks")
    parser.add_argument(
        "--report", type=Path, metavar="RESULTS", help="measure nothing, write the pages again"
    )
    options = parser.parse_args()
    if options.report:
        report.write(json.loads(options.report.read_text()), options.report.parent)
        return

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # or workers and server would go on
    names = dict.fromkeys([*(options.only or SCENARIOS), *["peers"] * options.peers])
    options.output.mkdir(parents=True, exist_ok=True)
    results_file = options.output / "results.json"
    results = begin(results_file, again=options.only is not None, quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory, Valkey(Path(directory)) as valkey:
        os.environ["BENCHMARK_SERVER"] = valkey.url  # for the apps, here and in the workers
        os.environ["BENCHMARK_ETA_HORIZON"] = "2" if options.quick else "30"
        for name in names:
            print(name, flush=True)
            began = time.monotonic()
            bench = Bench(valkey.client(), rounds=2 if options.quick else options.rounds, quick=options.quick)
            import_module(f"benchmarks.scenarios.{name}").run(bench)
            results["scenarios"][name] = {
                "date": datetime.now(UTC).date().isoformat(),
                "commit": machine.commit(),
                "seconds": round(time.monotonic() - began),
                "measured": bench.measured,
                "remarks": bench.remarks,
            }
            results_file.write_text(json.dumps(results) + "\n")
    print(report.write(results, options.output))


def begin(results_file: Path, *, again: bool, quick: bool) -> dict[str, Any]:
    """Empty results, or those of before: what was measured on the same machine with the same versions."""
    results: dict[str, Any] = {"machine": machine.describe(), "quick": quick, "scenarios": {}}
    if not again or not results_file.exists():
        return results
    before: dict[str, Any] = json.loads(results_file.read_text())
    if {**before, "scenarios": {}} != results:
        raise SystemExit(
            f"{results_file} was measured elsewhere or with other versions: run all, or use --output"
        )
    return before


if __name__ == "__main__":
    main()
