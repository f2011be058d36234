"""Tests that reach no real index, whatever they enqueue: the pytest setting `goalstate_isolate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from celery_goalstate import index as indexes
from celery_goalstate.index import IndexSettings, open_index
from celery_goalstate.index.base import Index
from celery_goalstate.index.url import safe_url
from celery_goalstate.registry import all_engines
from celery_goalstate.testing.simulation import simulate


@contextmanager
def all_simulated() -> Iterator[None]:
    """Every engine that there is, each in a world of its own."""
    with ExitStack() as stack:
        for engine in list(all_engines):
            stack.enter_context(simulate(engine))
        yield


@contextmanager
def no_real_index() -> Iterator[None]:
    """While the block runs, an engine that is not simulated opens no index but one in memory."""

    def refuse(settings: IndexSettings) -> Index:
        if settings.index_url == "memory://":
            return open_index(settings)
        raise RuntimeError(
            f"an engine was about to open its index at {safe_url(settings.index_url)}, and with"
            " goalstate_isolate no test does. It is newer than the test: simulate it, with"
            " celery_goalstate.testing.simulate(engine)"
        )

    with mock.patch.object(indexes, "open_index", refuse):
        yield
