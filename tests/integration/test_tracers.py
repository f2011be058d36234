"""Tracers see a wake-up as a task like any other, and no trace goes on for ever. With the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Valkey

MODULES = {"opentelemetry": "opentelemetry.instrumentation.celery", "sentry": "sentry_sdk"}


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is its parent
        return False


@pytest.fixture(params=MODULES)
def traced(request: pytest.FixtureRequest, valkey: Valkey) -> Any:
    if not is_installed(MODULES[request.param]):
        assert not os.environ.get("GOALSTATE_REQUIRE_SERVICES"), f"{request.param} is not installed"
        pytest.skip(f"{request.param} is not installed")
    command = [sys.executable, "-m", "tests.integration.traced", request.param, valkey.url]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_an_evaluation_continues_the_trace_of_a_near_enqueue_and_only_that(traced: Any) -> None:
    requests, seen = traced["requests"], traced["seen"]
    first, *retries = seen["near"]
    assert first["trace"] == requests["near"]
    assert first["link"] is None

    assert len(retries) == 3
    later = [*retries, *seen["parked"]]
    traces = [each["trace"] for each in later]
    assert len({*traces, *requests.values()}) == len(traces) + len(requests), "each is a trace of its own"
    for each, enqueued_in in [
        *((retry, requests["near"]) for retry in retries),
        *((parked, requests["parked"]) for parked in seen["parked"]),
    ]:
        assert enqueued_in in json.dumps(each["link"]), "and names that of the enqueue"
        assert each["own"] is None or each["trace"] in each["own"]

    child, *its_retries = seen["child"]
    assert child["trace"] == requests["near"], "as a task that a task has called"
    assert all(requests["near"] in json.dumps(retry["link"]) for retry in its_retries)
    assert requests["near"] not in {retry["trace"] for retry in its_retries}
