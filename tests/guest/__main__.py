"""Is an engine a good guest? Celery's and kombu's own tests, without an engine on their apps and with one.

    make guest                                  everything, on Redis and RabbitMQ; 40 minutes or more
    make guest ARGS=--quick                     a part that says much, in less time
    make guest ARGS="--only celery-redis --files t/integration/test_tasks.py --rounds 3"
    make guest ARGS="--set keep_client=False"   with any setting of the engine

The tests come from the sdists of what is installed here, into .venv-guest. What does not end alike in every
run is repeated, among its neighbours and alone, and Fisher's exact test judges the difference. With 40
repetitions it tells a test that fails in 40 % of its runs from one that fails in 10 % in 76 of 100 cases,
with 20 in 36, with 60 in 94. A test that differs seldom among its neighbours may be alike in the few first
runs, and is then not repeated: name it with --files to run it alone. The pages are tests/output/guest-*.md.
Exits with 1 if an engine changes a test.
"""

from __future__ import annotations

import argparse
import ast
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections.abc import Callable, Container
from contextlib import ExitStack
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.guest.compare import judge, page, summary
from tests.guest.lanes import ROOT, Lane, Runs, Suite, divided

HOME = ROOT / ".venv-guest"
PYTHON = HOME / "bin" / "python"
OUTPUT = ROOT / "tests" / "output"

#: Installed there as they are here. Then what the tests need, but not pytest-rerunfailures: a test that
#: passes only when it is tried again has failed.
AS_HERE = ("celery", "kombu", "redis", "amqp", "billiard", "vine", "pytest", "pytest-timeout")
NEEDED = ("cryptography", "django", "pydantic", "pymemcache", "sqlalchemy", "tblib")

T = "t/integration/test_"
SHORT = "not retry and not revoke and not expired and not eta"
CELERY = ("t/integration",), (f"{T}tasks.py", "-k", SHORT)
REDIS = (f"{T}redis.py", f"{T}redis_brpop_qos.py"), (f"{T}redis_brpop_qos.py",)
AMQP = (f"{T}py_amqp.py",), (f"{T}py_amqp.py",)
SUITES = {
    str(suite): suite
    for suite in (
        Suite("celery", "redis", *CELERY),
        Suite("kombu", "redis", *REDIS),
        Suite("celery", "rabbitmq", *CELERY),
        Suite("kombu", "rabbitmq", *AMQP),
    )
}

SLOW = 5  #: seconds; a test that takes longer is run once, and again only if it differs

#: What cannot run here, and why.
LEFT_OUT = {"celery": {f"{T}backend.py": "needs a client of Azure's, and an account"}, "kombu": {}}


def main() -> int:
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by TERM"))  # the servers must be ended too
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", file=sys.stderr, flush=True)

    install(say)
    different = 0
    for broker, of_broker in groupby(map(SUITES.__getitem__, options.only), key=lambda suite: suite.broker):
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guest-")))
            lanes = [Lane(directory / str(n), broker, PYTHON) for n in range(options.lanes)]
            for lane in lanes:
                stack.enter_context(lane)
            for suite in of_broker:
                runs = Runs(suite, sources(suite.package), lanes, options.settings, say)
                different += compare(suite, runs, options)
    return 1 if different else 0


def compare(suite: Suite, runs: Runs, options: argparse.Namespace) -> int:
    """Writes the suite's page; how many of its tests an engine makes a difference to."""
    selected = options.files or (suite.quick if options.quick else suite.files)
    left_out, first, among, alone = LEFT_OUT[suite.package], {}, {}, {}
    parts = list(divided(runs.collect(selected, left_out)))
    runs.count(first, parts, 1)
    if runs.given[False] or not runs.given[True]:
        raise SystemExit(
            f"{suite}: the hook gave {runs.given[True]} engines to one side, {runs.given[False]} to the other"
        )

    def part_of(part: list[str], *, and_also: Container[str] = ()) -> list[str]:
        return [test for test in part if first[test].seconds < SLOW or test in and_also]

    runs.count(first, map(part_of, parts), options.rounds - 1)
    suspects = {test for test, tally in first.items() if not tally.steady}
    # Some differ only among the tests around them, and some, as races do, mostly when they are alone.
    doubtful = [part_of(part, and_also=suspects) for part in parts if suspects.intersection(part)]
    runs.count(among, doubtful, options.repeat)
    runs.count(alone, [[test] for test in first if test in suspects], options.repeat)
    verdicts = judge(first, among, alone)
    remarks = [
        ", ".join(f"{name} {version(name)}" for name in AS_HERE[:3]),
        f"settings of the engine: {options.settings or 'the defaults'}",
        f"runs of a test: {options.rounds} without an engine, as many with one; but 1 if it takes {SLOW} s",
        f"more runs of what was not alike in all of them, among its neighbours and alone: {options.repeat}",
    ]
    OUTPUT.mkdir(exist_ok=True)
    written = OUTPUT / f"guest-{suite}.md"
    written.write_text(page(f"An engine beside the tests of {suite}", remarks, verdicts, left_out))
    print(f"{suite}: {summary(verdicts)}; see {written.relative_to(ROOT)}", flush=True)
    for verdict in verdicts:
        if verdict.real:
            print(f"  {verdict}", flush=True)
    return sum(verdict.real for verdict in verdicts)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.guest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="SUITE", choices=SUITES, default=list(SUITES))
    parser.add_argument("--files", nargs="+", metavar="TEST", help="only these files or tests of each suite")
    parser.add_argument("--quick", action="store_true", help="only a part of each suite")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of every test that is not slow (%(default)s)"
    )
    parser.add_argument(
        "--repeat", type=int, default=40, help="more of the parts where something was not alike (%(default)s)"
    )
    parser.add_argument("--lanes", type=int, default=8, help="runs at once, which mostly sleep (%(default)s)")
    parser.add_argument(
        "--set", nargs="+", type=setting, default=[], dest="settings", metavar="NAME=VALUE",
        help="settings of the engine, without their goalstate_: keep_client=False",
    )  # fmt: skip
    options = parser.parse_args()
    options.only = [name for name in SUITES if name in options.only]  # one broker after the other
    options.settings = dict(options.settings)
    return options


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return f"goalstate_{name}", ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE with a Python literal") from None


def install(say: Callable[[str], None]) -> None:
    """The environment of the tests and their sources, unless they are there."""
    wanted = [*(f"{name}=={version(name)}" for name in AS_HERE), *NEEDED]
    stamp = HOME / "requirements.txt"
    pip = [str(PYTHON), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if stamp.exists() and stamp.read_text().split() == wanted:
        return
    say(f"setting up {HOME.relative_to(ROOT)}")
    venv.create(HOME, clear=True, with_pip=True)
    subprocess.run([*pip, "install", *wanted], check=True)
    for package in {suite.package for suite in SUITES.values()}:
        download = ["download", "--no-deps", "--no-binary", ":all:", "--dest", str(HOME / "sdists")]
        subprocess.run([*pip, *download, f"{package}=={version(package)}"], check=True)
        home = sources(package)
        with tarfile.open(home.parent / f"{home.name}.tar.gz") as sdist:
            # Without the package itself: what is tested is what is installed.
            parts = tuple(f"{home.name}/{part}" for part in ("t/", "pyproject.toml", "setup.cfg"))
            members = [member for member in sdist if member.name.startswith(parts)]
            sdist.extractall(home.parent, members, filter="data")
    stamp.write_text("\n".join(wanted) + "\n")


def sources(package: str) -> Path:
    return HOME / "sdists" / f"{package}-{version(package)}"


if __name__ == "__main__":
    sys.exit(main())
