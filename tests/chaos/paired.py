"""Plain tasks on a worker with an engine and on one without, hit by the same faults at the same points.

How many were lost, and how many ran more than once: `python -m tests.chaos.paired --lane kills --seeds 20`.

Each seed draws a list of faults. Two workers, at the same time, each with a broker of its own, go through it.
With each fault some tasks are sent, and it comes when one of them is at a certain point, not at a moment of
the clock: so what differs is what the engine does, and not what a fault happened to find. Tasks are
acknowledged late, and come again when their worker was lost. Nothing is ever enqueued for the engine.
"""

from __future__ import annotations

import argparse
import ast
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.chaos.side import LANES, POOLS, Fault, Side, schedule
from tests.supervised import ROOT

OUTPUT = ROOT / "tests/output"
ALLOWED = 1  # task more that is lost or doubled with the engine, in all seeds of a lane


# Judging -----------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Of the tasks of one worker."""

    sent: int
    lost: frozenset[int]  #: those that never ran
    doubled: frozenset[int]  #: those that ran more than once
    ends: int  #: of the worker by itself
    stuck: int  #: times that it had to be killed, since it ran nothing any more


class Pair(NamedTuple):
    """What one seed led to."""

    seed: int
    pool: str
    without: Outcome
    engine: Outcome


def outcome(sent: Iterable[int], runs: Iterable[int], *, ends: int = 0, stuck: int = 0) -> Outcome:
    """From the numbers of the tasks that were sent, and those of each run."""
    numbers, often = frozenset(sent), Counter(runs)
    assert numbers >= often.keys(), f"never sent: {sorted(often.keys() - numbers)}"
    doubled = frozenset(number for number, times in often.items() if times > 1)
    return Outcome(len(numbers), numbers - frozenset(often), doubled, ends, stuck)


def more(pairs: list[Pair]) -> int:
    """How many more tasks were lost or doubled with the engine than without it."""
    return sum(_harm(pair.engine) - _harm(pair.without) for pair in pairs)


def _harm(side: Outcome) -> int:
    return len(side.lost) + len(side.doubled)


def table(pairs: list[Pair]) -> str:
    """In Markdown: each seed, the sums, the tasks that fared differently, and the verdict."""
    fields = Outcome._fields
    rows: list[list[object]] = [
        ["seed", "pool", *(f"{field}, {side}" for field in fields for side in ("without", "with"))],
        ["--:", "---", *["--:"] * 2 * len(fields)],
    ]
    counts = [list(_counts(pair)) for pair in pairs]
    rows += [[pair.seed, pair.pool, *row] for pair, row in zip(pairs, counts, strict=True)]
    rows.append(["sum", "", *map(sum, zip(*counts, strict=True))])
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if differences := [text for pair in pairs for text in _differences(pair)]:
        lines += ["", *differences]
    verdict = "as is allowed" if more(pairs) <= ALLOWED else f"but at most {ALLOWED} is allowed"
    return "\n".join([*lines, "", f"With the engine {more(pairs):+} lost or doubled, {verdict}."])


def _counts(pair: Pair) -> Iterator[int]:
    for values in zip(pair.without, pair.engine, strict=True):
        for value in values:
            yield value if isinstance(value, int) else len(value)


def _differences(pair: Pair) -> Iterator[str]:
    for field in ("lost", "doubled"):
        without, engine = getattr(pair.without, field), getattr(pair.engine, field)
        for side, tasks in (("without", without - engine), ("with", engine - without)):
            if tasks:
                numbers = ", ".join(map(str, sorted(tasks)))
                yield f"* seed {pair.seed}, {field} only {side} the engine: {numbers}"


# Running -----------------------------------------------------------------------------------------


def run_pair(
    directory: Path,
    lane: str,
    pool: str,
    seed: int,
    *,
    faults: int,
    broker: str,
    settings: dict[str, Any],
    engines: tuple[bool, bool] = (False, True),
) -> Pair:
    """Both workers at the same time. `engines`: which of them has one."""
    drawn = schedule(lane, pool, seed, faults)
    fsync = random.Random(seed).choice(["always", "everysec"])
    options = {"pool": pool, "broker": broker, "fsync": fsync, "settings": settings}
    with ThreadPoolExecutor(2) as threads:
        sides = [
            threads.submit(_run, directory / f"{seed}-{number}", drawn, engine=engine, **options)
            for number, engine in enumerate(engines)
        ]
        return Pair(seed, pool, *(side.result() for side in sides))


def _run(directory: Path, faults: list[Fault], **options: Any) -> Outcome:
    with Side(directory, **options) as side:
        for fault in faults:
            side.suffer(fault)
        side.settle()
        return outcome(side.sent, side.notes.runs(), ends=len(side.worker.own_ends), stuck=side.stuck)


def main() -> int:
    arguments = _parse()
    settings = dict(map(_setting, arguments.set))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by TERM"))  # the servers must be ended too
    directory = Path(tempfile.mkdtemp(prefix="paired-"))
    OUTPUT.mkdir(exist_ok=True)
    good = True
    for lane in arguments.lane or LANES:
        (directory / lane).mkdir()
        pairs = []
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            began = time.monotonic()
            pair = run_pair(
                directory / lane,
                lane,
                arguments.pool or POOLS[seed % len(POOLS)],
                seed,
                faults=arguments.faults,
                broker=arguments.broker,
                settings=settings,
            )
            pairs.append(pair)
            seconds = time.monotonic() - began
            print(f"{lane}, seed {seed}, {seconds:.0f} s: {more([pair]):+}", file=sys.stderr, flush=True)
        good &= more(pairs) <= ALLOWED
        title = ", ".join([f"# {lane}: {arguments.broker}, {arguments.faults} faults a seed", *arguments.set])
        text = f"{title}\n\n{table(pairs)}\n"
        (OUTPUT / f"paired-{lane}.md").write_text(text)
        print(text, flush=True)
    if arguments.keep:
        print(f"logs: {directory}")
    else:
        shutil.rmtree(directory)
    return 0 if good else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.paired",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--lane",
        choices=LANES,
        action="append",
        help="may be given again; without it: all, one after another",
    )
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--pool", choices=POOLS, help="without it: one seed this, the next one that")
    parser.add_argument(
        "--broker", choices=["redis", "redis-server"], default="redis-server",
        help="an embedded Valkey, or the machine's Redis",
    )  # fmt: skip
    parser.add_argument("--faults", type=int, default=5, help="of each seed")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of both apps; may be repeated",
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    return parser.parse_args()


def _setting(text: str) -> tuple[str, Any]:
    """A name, and its value: a Python literal, or a string."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())
