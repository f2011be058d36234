"""The sweeper's step in a worker: a sweep under way is not cut off between the index and the broker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_goalstate.settings import Settings
from celery_goalstate.worker.bootsteps import SweeperStep
from tests.servers import poll


class Entry:
    """What a timer gives for a call. Under gevent, `cancel` kills the greenlet that makes it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Timer:
    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def call_after(self, seconds: float, call: Callable[..., None], args: tuple[Any, ...]) -> Entry:
        self.entries.append(Entry(lambda: call(*args)))
        return self.entries[-1]


class Sweeper:
    """Whose sweep lasts until the test lets it end."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.swept = 0

    def prepare(self) -> None:
        pass

    def check_server(self) -> None:
        pass

    def sweep(self) -> bool:
        assert self.gate.wait(30)
        self.swept += 1
        return False


class Worker:
    hostname = "w@host"
    app: Any = None

    def __init__(self) -> None:
        self.timer = Timer()
        self.steps: list[Any] = []
        self.soft_time_limit = self.time_limit = None


class Running:
    """A step whose first sweep is under way, in a thread."""

    def __init__(self) -> None:
        self.sweeper, self.worker = Sweeper(), Worker()
        step = type(
            "Step",
            (SweeperStep,),
            {
                "settings": staticmethod(lambda: Settings(index_url="redis://127.0.0.1:1/0", eta_horizon=0)),
                "kinds": staticmethod(dict),
                "open_sweeper": staticmethod(lambda name: self.sweeper),
            },
        )
        self.step = step(self.worker)
        self.step.start(self.worker)
        [self.entry] = self.worker.timer.entries
        self.thread = threading.Thread(target=self.entry.call)
        self.thread.start()
        poll("the sweep is under way", lambda: self.step._sweeping)

    def end(self) -> None:
        self.sweeper.gate.set()
        self.thread.join(30)


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.end()


def test_a_sweep_goes_on_when_the_consumer_has_connected(running: Running) -> None:
    running.step.resume()
    assert not running.entry.is_cancelled
    assert running.worker.timer.entries == [running.entry], "and it is followed by the next, by itself"
    running.end()
    _, following = running.worker.timer.entries
    assert not following.is_cancelled


def test_between_two_sweeps_the_next_comes_at_once(running: Running) -> None:
    running.end()
    following = running.worker.timer.entries[-1]
    running.step.resume()
    assert following.is_cancelled
    running.worker.timer.entries[-1].call()
    assert running.sweeper.swept == 2


def test_a_worker_that_ends_lets_the_sweep_end(running: Running) -> None:
    stopping = threading.Thread(target=running.step.stop, args=(running.worker,))
    stopping.start()
    poll("it is told to stop", lambda: not running.step._running)
    assert not running.entry.is_cancelled
    running.end()
    stopping.join(30)
    assert running.worker.timer.entries == [running.entry], "none follows"
