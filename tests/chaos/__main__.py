"""Pull every plug, and prove that nothing is lost: `python -m tests.chaos --minutes 30 --seed 7`."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.chaos.checker import RULES, Findings
from tests.chaos.harness import Options, run

SHOWN = 20  # violations


def main() -> int:
    options, arguments = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by TERM"))  # the servers must be ended too
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", file=sys.stderr, flush=True)

    say(f"{options}, in {directory}")
    findings = run(options, directory, say=say)
    print(table(options, findings))
    if arguments.json:
        arguments.json.write_text(as_json(options, findings) + "\n")
    if findings.violations or findings.notes or arguments.keep:
        print(f"ledger and logs: {directory}")
    else:
        shutil.rmtree(directory)
    return 1 if findings.violations else 0


def _parse() -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    default = Options()
    parser.add_argument("--minutes", type=float, default=default.minutes, help="of faults")
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="of the schedule of faults and the load"
    )
    parser.add_argument(
        "--broker", choices=["redis", "redis-server", "rabbitmq", "quorum"], default=default.broker,
        help="an embedded Valkey, the machine's Redis, RabbitMQ with classic or with quorum queues",
    )  # fmt: skip
    parser.add_argument("--pool", choices=["prefork", "solo", "threads", "gevent"], default=default.pool)
    parser.add_argument(
        "--index", choices=["redis", "cluster", "same"], default=default.index,
        help="a server of its own, a cluster of three, or the broker's server, where it is lost now and then"
        " and rebuilt by resync",
    )  # fmt: skip
    parser.add_argument(
        "--fsync", choices=["always", "everysec"], default=default.fsync,
        help="everysec: what the index wrote in its last moments is lost with each of its ends",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=default.workers)
    parser.add_argument("--producers", type=int, default=default.producers)
    parser.add_argument("--pace", type=float, default=default.pace, help="seconds between a producer's calls")
    parser.add_argument("--kinds", default=default.kinds, help="of entities, separated by commas; empty: all")
    parser.add_argument(
        "--trouble", type=float, default=default.trouble, help="part of the messages that suffer"
    )
    parser.add_argument(
        "--faults", default=default.faults,
        help="only those whose name holds one of these words, which are separated by commas",
    )  # fmt: skip
    parser.add_argument(
        "--calm", type=float, default=default.calm,
        help="so many times as long between two faults, for a machine on which processes start slowly",
    )  # fmt: skip
    parser.add_argument(
        "--settle", type=float, default=default.settle, help="seconds until all must have ended"
    )
    parser.add_argument(
        "--latest", type=float, default=default.latest,
        help="seconds after its deadline in which each evaluation must begin, for faults that may not delay"
        " any; 0: whenever it can",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--keep", action="store_true", help="keep ledger and logs")
    arguments = parser.parse_args()
    fields = {name: getattr(arguments, name) for name in asdict(default)}
    return Options(**fields), arguments


def table(options: Options, findings: Findings) -> str:
    """For people."""
    rows = [("seed", options.seed), ("minutes of faults", options.minutes)]
    rows += [("broker, pool", f"{options.broker}, {options.pool}")]
    rows += [("index, synced", f"{options.index}, {options.fsync}")]
    sections = [
        ("run", dict(rows)),
        ("faults", dict(sorted(findings.faults.items()))),
        ("figures", findings.figures),
        ("broken guarantees", {f"{rule}: {RULES[rule]}": n for rule, n in findings.counts.items()}),
    ]
    width = max(len(name) for _, section in sections for name in section)
    lines = []
    for title, section in sections:
        lines += ["", title, *(f"  {name:<{width}}  {value}" for name, value in section.items())]
    lines += [f"note, {count} times: {note}" for note, count in findings.notes.items()]
    for violation in findings.violations[:SHOWN]:
        lines.append(f"{violation.rule}: {violation.entity} at {violation.at:.3f}: {violation.text}")
    return "\n".join(lines)


def as_json(options: Options, findings: Findings) -> str:
    """For machines."""
    return json.dumps(
        {
            "options": asdict(options),
            "faults": findings.faults,
            "figures": findings.figures,
            "violations": findings.counts,
            "notes": findings.notes,
        },
        indent=2,
    )


if __name__ == "__main__":
    sys.exit(main())
