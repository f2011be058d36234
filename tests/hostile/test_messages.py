"""Whatever lies in the queue: the worker goes on, and the index is as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.hostile import fuzz
from tests.servers import Process, Valkey, poll

#: Messages that are generated for each pool.
SAMPLE = 200

GOOD = json.dumps([[[["1", "1"]]], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])

BODIES: list[bytes] = [
    b"5", b"null", b'"x"', b"{}", b'{"args": 5, "kwargs": 6}', b'{"args": [1]}', b"[1]", b"[1,2,3]",
    b'[[],{},"x"]', b"[[],[],{}]", b'[[],{"self": 1},{}]', b"", b"{", b"\xff\xfe[", b"[" * 100_000,
    b"[" * 50_000 + b"]" * 50_000,
    b'[[NaN],{"a":Infinity},{}]', b"[[" + b"9" * 5000 + b"],{},{}]", b'[[[["a\\nb","1"]]],{},{}]',
    b'[[[["1","1"]]],{},{"callbacks":[["x"]]}]', b'[[[["1","1"]]],{},{"errbacks":[["x"]]}]',
    b'[[[["1","1"]]],{},{"chain":[["x"]]}]', b'[[[["1","1"]]],{},{"chord":["x"]}]',
    b'[[[["1","1"],["1","1"]]],{},{}]', b'[[[["1","1"]]],{"resent_at":"x"},{}]',
]  # fmt: skip

TYPES: list[tuple[bytes, str | None, str | None]] = [
    (b"\x80\x04K\x01.", "application/x-python-serialize", "binary"),
    (b"[1]", "application/x-yaml", "utf-8"),
    (b"[[],{},{}]", None, None),
    (b"[[],{},{}]", "text/foo", "foo"),
    (b"[[],{},{}]", "application/data", "binary"),
    (GOOD.encode(), "application/json", "no-such"),
]

HEADERS: list[dict[str, Any]] = [
    {"id": 5}, {"id": [1]}, {"id": None}, {"id": "a\nFAKE LOG"}, {"id": "x" * 300},
    {"retries": "x"}, {"retries": [1]},
    {"retries": -1}, {"retries": True}, {"timelimit": "x"}, {"timelimit": ["x", "y"]}, {"timelimit": 5},
    {"timelimit": [-1, -1]}, {"eta": "x"}, {"eta": ""}, {"expires": ""}, {"eta": 5}, {"eta": [1]},
    {"eta": "9999-12-31T23:59:59.999999-23:59"},
    {"eta": "0001-01-01T00:00:00+23:59"}, {"eta": "0001-01-01T00:00:00"}, {"eta": "9999-12-31T23:59:59"},
    {"expires": "0001-01-01T00:00:00"}, {"expires": "9999-12-31T23:59:59"}, {"expires": "x"},
    {"expires": 5}, {"expires": [1]},
    {"expires": "2020-01-01"}, {"group": [1]}, {"argsrepr": [1], "kwargsrepr": {"a": 1}}, {"shadow": [1]},
    {"ignore_result": "x"}, {"stamped_headers": 5, "stamps": 6}, {"stamped_headers": ["x"], "stamps": [6]},
    {"self": 1, "called_directly": True, "hostname": [1], "delivery_info": 5, "children": 4, "task_id": 3},
]  # fmt: skip


def well_formed(**other: Any) -> dict[str, Any]:
    headers = {"task": "goalstate.order", "id": str(uuid.uuid4()), "retries": 0, "timelimit": [None, None]}
    return {"lang": "py", **headers, **other}


def hostile() -> Iterator[dict[str, Any]]:
    """Messages as they lie in a queue of Redis."""
    for body in BODIES:
        yield fuzz.message(body, well_formed())
    for body, content_type, encoding in TYPES:
        yield fuzz.message(body, well_formed(), content_type, encoding)
    for headers in HEADERS:
        yield fuzz.message(GOOD.encode(), well_formed(**headers))
    old = {"task": "goalstate.order", "id": "a", "args": [], "kwargs": {}}
    for other in ({}, {"id": [1], "args": 5}, {"id": None}, {"retries": "x"}):
        yield fuzz.message(json.dumps({**old, **other}).encode(), {})
    for headers in HEADERS:
        yield fuzz.message(json.dumps(old).encode(), headers)


@pytest.mark.parametrize(("pool", "zone"), [("solo", "America/New_York"), ("prefork", "Asia/Tokyo")])
def test_a_worker_survives_every_hostile_message(tmp_path: Path, pool: str, zone: str) -> None:
    with Valkey(tmp_path / "broker") as broker, Valkey(tmp_path / "index") as index:
        env = {"HOSTILE_BROKER": broker.url, "HOSTILE_INDEX": index.url, "HOSTILE_ZONE": zone}
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "tests.hostile.app",
            "worker",
            f"--pool={pool}",
            "--loglevel=INFO",
            "-c1",
        ]
        worker = Process(command, log=tmp_path / "worker.log", env=env, cwd=Path.cwd())
        queue, entries = redis.Redis.from_url(broker.url), redis.Redis.from_url(index.url)

        def known() -> dict[bytes, bytes | None]:
            return {key: entries.dump(key) for key in entries.scan_iter() if b":e:" in key}

        worker.start()
        try:
            poll("the worker is ready", lambda: "ready." in worker.output(), timeout=60)
            messages = list(hostile())
            for message in messages:
                queue.lpush("celery", json.dumps(message))
                poll(
                    f"the worker took {str(message)[:400]}",
                    lambda: not worker.alive or not (queue.llen("celery") or queue.hlen("unacked")),
                    timeout=60,
                )
                assert worker.alive, f"{str(message)[:400]} ended the worker:\n{worker.output()[-3000:]}"
            messages += (sampled := fuzz.sample(SAMPLE, fuzz.messages()))
            queue.lpush("celery", *map(json.dumps, sampled))
            drained = "the worker took what was generated"
            worker.poll_until(
                drained, lambda: not (queue.llen("celery") or queue.hlen("unacked")), timeout=60
            )
            assert known() == {}, "nothing hostile is written"
            enqueue = [*command[:5], "goalstate", "enqueue", "order", "good"]
            subprocess.run(enqueue, env={**os.environ, **env}, check=True, capture_output=True)
            poll("the honest entity is evaluated", lambda: "honest good" in worker.output(), timeout=60)
            said = worker.output()
            assert "\nFAKE LOG" not in said
            assert said.count("rejected a malformed message") > len(messages) / 2
            assert "to enqueue an entity, send goalstate.enqueue(kind, id, deadline=None)" in said
        finally:
            worker.end()
            queue.close(), entries.close()
