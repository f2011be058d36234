"""Nobody sees a password of a URL: not in errors, logs, `repr`, nor in what commands and workers say."""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import subprocess
import sys
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from celery.worker.control import Panel
from click.testing import CliRunner
from kombu.utils.uuid import uuid

from celery_goalstate import Engine, Entity, Rules, cli
from celery_goalstate.exceptions import GoalStateError
from celery_goalstate.settings import Settings
from tests.servers import HOST, Process, Valkey, free_port, poll

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
    f"redis://:12?canary=1&{PLAIN}@{NOWHERE}/0",
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


#: What "canary" is in Base64, wherever in it: the characters that its neighbours have no part in.
IN_BASE64 = [
    base64.b64encode(before + b"canary..").decode()[first:last]
    for before, first, last in ((b"", 0, 8), (b".", 2, 9), (b"..", 3, 10))
]


def is_told(text: str) -> bool:
    return "canary" in text.lower() or any(form in text for form in IN_BASE64)


@pytest.mark.parametrize("before", ["", ":", "u:", "us:"])
def test_the_search_finds_it_in_base64(before: str) -> None:
    assert is_told(base64.b64encode(f"{before}{PASSWORD}".encode()).decode())


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
        rules = Rules({})

    with heard(caplog) as said:
        for call in (
            lambda: engine,
            lambda: engine.settings,
            lambda: engine.parts,
            lambda: engine.parts.index,
            lambda: engine.parts.publisher,
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


# What Celery shows of its configuration ------------------------------------------------------------

INDEX = f"sentinel://user:{QUOTED}@{NOWHERE};sentinel://{NOWHERE}?master_name=m&sentinel_password={PLAIN}"
BROKER = f"amqp://user:{QUOTED}@{NOWHERE}//"
URLS = {
    "broker_url": BROKER,
    "broker_read_url": BROKER,
    "broker_write_url": BROKER,
    "goalstate_index_url": INDEX,
}


class Shop:
    """Settings as in a Django project's module: those of others among them."""

    DEBUG = False
    CELERY_BROKER_URL = CELERY_BROKER_READ_URL = CELERY_BROKER_WRITE_URL = BROKER
    CELERY_GOALSTATE_INDEX_URL = INDEX


def set_attributes(app: Celery) -> None:
    for name, url in URLS.items():
        setattr(app.conf, name, url)


WAYS: dict[str, Callable[[Celery], Any]] = {
    "attributes": set_attributes,
    "update": lambda app: app.conf.update(URLS),
    "object": lambda app: app.config_from_object(URLS),
    "object, at once": lambda app: app.config_from_object(URLS, force=True),
    "prefix": lambda app: app.config_from_object(Shop, namespace="CELERY"),
}


@pytest.mark.parametrize("configured", [False, True], ids=["pending", "configured"])
@pytest.mark.parametrize("first", ["engine", "settings"])
@pytest.mark.parametrize("way", WAYS)
def test_not_by_what_celery_shows_of_its_configuration(way: str, first: str, configured: bool) -> None:
    app = Celery("shop", set_as_current=False)
    if configured:
        assert app.conf.timezone is None
    if first == "engine":
        engine, _ = Engine(app), WAYS[way](app)
    else:
        _, engine = WAYS[way](app), Engine(app)
    assert engine.settings.index_url == INDEX, "the engine itself goes on to know it"
    assert Engine(app, namespace="other").settings.index_url == INDEX
    copy = pickle.loads(pickle.dumps(app))
    assert Settings.from_conf(copy.conf).index_url == INDEX

    state = SimpleNamespace(app=app)
    said = [
        app.conf.humanize(),
        app.conf.humanize(with_defaults=True),
        app.bugreport(),
        repr(app.conf.table()),
        json.dumps([Panel.data[name](state) for name in ("conf", "report")]),
        json.dumps(Panel.data["conf"](state, with_defaults=True)),
        copy.conf.humanize(),
    ]
    for text in said:
        assert "goalstate_index_url" in text.lower(), "it is shown"
        assert not is_told(text), text


# Real workers --------------------------------------------------------------------------------------

CELERY = [sys.executable, "-m", "celery", "-A", "tests.hostile.app"]
WORKER = [*CELERY, "worker", "--pool=solo", "--loglevel=DEBUG", "-E"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    """One that asks for the password."""
    with Valkey(tmp_path / "valkey") as server:
        with server.client() as client:
            client.config_set("requirepass", PASSWORD)
        yield server


@pytest.fixture
def env(server: Valkey) -> dict[str, str]:
    """Broker and index are there."""
    url = f"redis://:{QUOTED}@{HOST}:{server.port}/0"
    return {"HOSTILE_BROKER": url, "HOSTILE_INDEX": url}


def run(env: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    """A command of Celery's command line: its status, and all that it says."""
    done = subprocess.run(
        [*CELERY, *arguments], env={**os.environ, **env}, check=False, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_not_by_a_worker_and_commands_that_use_it(tmp_path: Path, env: dict[str, str]) -> None:
    """Celery's own banner included."""
    wrong = {**env, "HOSTILE_INDEX": env["HOSTILE_INDEX"].replace(QUOTED, f"{QUOTED}wrong")}
    with (
        Process(WORKER, log=tmp_path / "right.log", env=env, cwd=Path.cwd()) as worker,
        # From a queue of its own, or it might be the one that gets the wake-up.
        Process(
            [*WORKER, "--queues=other"], log=tmp_path / "wrong.log", env=wrong, cwd=Path.cwd()
        ) as locked_out,
    ):
        assert run(env, "goalstate", "enqueue", "order", "1")[0] == 0
        done, shown = run(env, "goalstate", "show", "order", "1", "--json")
        assert done == 0
        refused, why = run(wrong, "goalstate", "list")
        assert refused
        worker.poll_until("it evaluates", lambda: "honest 1" in worker.output(), timeout=60)
        assert locked_out.wait(60) == 1
        assert "this worker ends, since it cannot use the index: " in locked_out.output()
        told = [worker.output(), locked_out.output(), shown, why]
    assert "the index is on redis://:**@" in told[0]
    for text in told:
        assert not is_told(text), [line for line in text.splitlines() if is_told(line)]


def test_not_by_those_who_ask_a_worker(tmp_path: Path, server: Valkey, env: dict[str, str]) -> None:
    """Celery's inspect commands and all of Flower's pages, in its debug mode."""
    port, name = free_port(), "one@hostile"

    def page(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:  # it does not listen yet
            return 0, ""

    worker = Process([*WORKER, f"--hostname={name}"], log=tmp_path / "worker.log", env=env, cwd=Path.cwd())
    flower = Process(
        [*CELERY, "flower", f"--address={HOST}", f"--port={port}", "--debug=true", "--logging=debug"],
        log=tmp_path / "flower.log",
        env={**env, "FLOWER_UNAUTHENTICATED_API": "true"},
        cwd=Path.cwd(),
    )
    with worker, flower:
        flower.poll_until(
            "Flower has heard the worker's configuration",
            lambda: "goalstate_index_url" in page("/api/workers?refresh=1")[1],
            timeout=60,
        )
        assert run(env, "goalstate", "enqueue", "order", "1")[0] == 0
        poll("Flower has heard of the evaluation", lambda: "SUCCESS" in page("/api/tasks")[1], timeout=60)
        [task_id] = json.loads(page("/api/tasks")[1])
        pages = {
            path: page(path)
            for path in f"""
                / /workers /workers?json=1 /worker/{name} /broker /tasks /task/{task_id}
                /tasks/datatable?draw=1&start=0&length=9&order[0][column]=0
                /api/workers /api/tasks /api/task/types /api/task/info/{task_id} /api/queues/length
                /metrics /healthcheck
            """.split()
        }
        assert {path: status for path, (status, _) in pages.items() if status != 200} == {}
        said = {path: text for path, (_, text) in pages.items()}
        for command in (*("inspect conf", "inspect conf 1", "inspect report", "inspect stats", "report"),):
            failed, said[command] = run(env, *command.split())
            assert not failed, said[command]
        for shown in ("/api/workers", f"/worker/{name}", "inspect conf", "inspect report", "report"):
            assert "goalstate_index_url" in said[shown], "the configuration is shown"
        server.kill()
        for path, status in {"/no/such/page": 404, "/broker": 200, "/api/queues/length": 500}.items():
            answer, said[f"{path}, without the server"] = page(path)
            assert answer == status
        said |= {"the worker's log": worker.output(), "Flower's log": flower.output()}
    assert {name: text for name, text in said.items() if is_told(text)} == {}
