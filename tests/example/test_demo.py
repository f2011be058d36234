"""The demo: it shows what it promises, and leaves nothing behind, however it ends."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.example.conftest import Demo
from tests.servers import poll

pytestmark = pytest.mark.xdist_group("demo")


def children(demo: Demo) -> list[psutil.Process]:
    return psutil.Process(demo.process.pid).children(recursive=True)


def named(demo: Demo, word: str) -> psutil.Process:
    """The demo's own child with this word in its command line."""
    [found] = [
        child for child in psutil.Process(demo.process.pid).children() if word in " ".join(child.cmdline())
    ]
    return found


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def check_nothing_left(demo: Demo, processes: list[psutil.Process]) -> None:
    poll("every process of the demo to be gone", lambda: all(map(gone, processes)), timeout=15)
    poll("the temporary directory to be empty", lambda: not list(demo.tmp.iterdir()), timeout=30)


def test_once_drives_the_rack_to_its_goal_and_ends(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "--once")
    demo.wait_for_output("POST http")
    processes = children(demo)
    assert demo.status() == 0, demo.output
    assert "20 of 20 hosts of r04 are down as asked" in demo.output
    assert " drain failed: " in demo.output
    check_nothing_left(demo, processes)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_signal_half_way_leaves_nothing(tmp_path: Path, number: int, status: int) -> None:
    demo = Demo(tmp_path)
    demo.wait_for_output("POST http")
    processes = children(demo)
    assert len(processes) >= 9  # the guard, Valkey and its server, worker and its four, site, Flower
    demo.process.send_signal(number)
    assert demo.status() == status
    check_nothing_left(demo, processes)


def test_a_signal_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    poll("the first child", lambda: len(children(demo)) >= 2, interval=0.001)
    processes = children(demo)
    demo.process.terminate()
    assert demo.status() == 143
    check_nothing_left(demo, processes)


def test_ctrl_c_is_the_good_end_once_all_is_shown(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    demo.wait_for_output("Ctrl-C ends it all")
    processes = children(demo)
    demo.process.send_signal(signal.SIGINT)
    assert demo.status() == 0
    check_nothing_left(demo, processes)


def test_a_child_that_dies_ends_the_demo_with_its_last_words(tmp_path: Path) -> None:
    demo = Demo(tmp_path, "--once")
    demo.wait_for_output(" of 20 at goal")
    processes = children(demo)
    named(demo, " worker ").kill()
    assert demo.status() == 1
    assert "demo: worker ended with status -9" in demo.output
    check_nothing_left(demo, processes)
