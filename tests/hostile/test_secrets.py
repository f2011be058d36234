"""Nobody sees a password of a URL: not in errors, logs, `repr`, nor in what commands and workers say."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner
from kombu.utils.uuid import uuid

from celery_goalstate import Engine, Entity, cli
from celery_goalstate.exceptions import GoalStateError
from tests.servers import HOST, Process, Valkey, free_port

#: The password as it is, with all that a URL wants quoted; one part of it is enough to be found.
PASSWORD = "canary/7@:?#é"
QUOTED, PLAIN = quote(PASSWORD, safe=""), "canary7"

NOWHERE = f"{HOST}:{free_port()}"
USELESS = [
    f"redis://:{PLAIN}@{NOWHERE}/0",
    f"redis://user:{PLAIN}@{NOWHERE}/0",
    f"redis://user:{QUOTED}@{NOWHERE}/0",
    f"rediss://user:{QUOTED}@{NOWHERE}/0?ssl_cert_reqs=none",
    f"redis://{NOWHERE}/0?password={PLAIN}",
    f"redis://{NOWHERE}/0?username=user&password={QUOTED}&socket_timeout=1",
    f"redis+cluster://user:{QUOTED}@{NOWHERE}",
    f"rediss+cluster://:{PLAIN}@{NOWHERE}",
    f"sentinel://:{QUOTED}@{NOWHERE}/0;sentinel://:{QUOTED}@{NOWHERE}/0?master_name=m&sentinel_password={PLAIN}",
    f"unix://user:{PLAIN}@/no/such/socket?db=1",
]
REFUSED = [
    f"redis://:{PASSWORD}@{NOWHERE}/0",  # as it is, in need of quotes
    f"redis://:{PLAIN}@{HOST}:port/0",
    f"redis://:{PLAIN}@[{NOWHERE}/0",
    f"sentinel://:{PLAIN}@{NOWHERE}/0",
    f"redis://:{PLAIN}@{NOWHERE}/0;redis://:{PLAIN}@{NOWHERE}/1",
    f"redis://:{PLAIN}@{NOWHERE}/0;sentinel://:{PLAIN}@{NOWHERE}/1",
    f"http://user:{PLAIN}@{NOWHERE}",
    f"user:{PLAIN}@{NOWHERE}",
    f"redis://{NOWHERE}/0?password={PLAIN}&socket_timeout=soon",
]


def is_told(text: str) -> bool:
    return "canary" in text.lower()


@contextmanager
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """All that is said: what the test adds, and the log of every logger from DEBUG on."""
    said: list[str] = []
    with caplog.at_level(logging.DEBUG):
        yield said
    said += [f"{record.getMessage()} {record.exc_text or ''}" for record in caplog.records]
    said += [caplog.text]


def speak(said: list[str], call: Callable[[], Any]) -> None:
    """Keep what the call returns or raises, as people would see it."""
    try:
        said += [repr(call())]
    except Exception as error:  # noqa: BLE001 - whatever it is
        said += [str(error), repr(error), *traceback.format_exception(error)]


@pytest.mark.parametrize("setting", ["goalstate_index_url", "broker_url", "result_backend"])
@pytest.mark.parametrize("url", [*USELESS, *REFUSED], ids=range(len([*USELESS, *REFUSED])))
def test_not_in_errors_nor_in_logs(caplog: pytest.LogCaptureFixture, url: str, setting: str) -> None:
    app = Celery(uuid(), set_as_current=False)
    app.conf.update({"broker_url": f"amqp://user:{PLAIN}@{NOWHERE}//", setting: url})
    app.conf.broker_transport_options = {"max_retries": 0, "socket_connect_timeout": 1}
    engine = Engine(app)

    @engine.register
    class Order(Entity):
        pass

    with heard(caplog) as said:
        for call in (
            lambda: engine,
            lambda: engine.settings,
            lambda: engine._parts,
            lambda: engine._parts.index,
            lambda: engine._parts.publisher,
            lambda: engine.enqueue(Order("1")),
            lambda: engine.describe(Order("1")),
            lambda: engine._open_sweeper("sweeper").sweep(),
        ):
            speak(said, call)
        for command in (["list"], ["show", "order", "1"], ["enqueue", "order", "1", "--json"]):
            context = CLIContext(app=app, no_color=True, workdir=None)
            result = CliRunner().invoke(cli.goalstate, command, obj=context)
            assert result.exit_code
            said += [result.output]
    assert any(GoalStateError.__module__ in line for line in said), "it did go wrong"
    assert [line for line in said if is_told(line)] == []
    app.close()


def test_not_by_a_worker_and_commands_that_use_it(tmp_path: Path) -> None:
    """On a server that asks for the password; broker, index and Celery's own banner included."""
    with Valkey(tmp_path / "valkey") as server:
        with server.client() as client:
            client.config_set("requirepass", PASSWORD)
        right = f"redis://:{QUOTED}@{HOST}:{server.port}/0"
        env = {"HOSTILE_BROKER": right, "HOSTILE_INDEX": right}
        wrong = {**env, "HOSTILE_INDEX": f"redis://:{QUOTED}wrong@{HOST}:{server.port}/0"}
        celery = [sys.executable, "-m", "celery", "-A", "tests.hostile.app"]

        def goalstate(env: dict[str, str], *arguments: str) -> tuple[int, str]:
            done = subprocess.run(
                [*celery, "goalstate", *arguments],
                env={**os.environ, **env},
                check=False,
                capture_output=True,
                text=True,
            )
            return done.returncode, done.stdout + done.stderr

        command = [*celery, "worker", "--pool=solo", "--loglevel=DEBUG", "-E"]
        with (
            Process(command, log=tmp_path / "right.log", env=env, cwd=Path.cwd()) as worker,
            # From a queue of its own, or it might be the one that gets the wake-up.
            Process(
                [*command, "--queues=other"], log=tmp_path / "wrong.log", env=wrong, cwd=Path.cwd()
            ) as locked_out,
        ):
            assert goalstate(env, "enqueue", "order", "1")[0] == 0
            done, shown = goalstate(env, "show", "order", "1", "--json")
            assert done == 0
            refused, why = goalstate(wrong, "list")
            assert refused
            for each, words in ((worker, "honest 1"), (locked_out, "waits for the index")):
                each.poll_until(words, lambda each=each, words=words: words in each.output(), timeout=60)
            told = [worker.output(), locked_out.output(), shown, why]
    assert "the index is on redis://:**@" in told[0]
    for text in told:
        assert not is_told(text), [line for line in text.splitlines() if is_told(line)]
