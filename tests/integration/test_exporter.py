"""`celery goalstate exporter`, as a process: what Prometheus gets, also while the index hangs."""

from __future__ import annotations

import concurrent.futures
import re
import signal
import socket
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_goalstate import Engine, cli
from tests.servers import HOST, Process, Valkey, frozen

SHOP = """
from celery import Celery
from celery_goalstate import Engine, Entity, Rules

app = Celery("shop", broker={url!r})
app.conf.goalstate_index_timeout = 2.0
engine = Engine(app)


@engine.register
class Order(Entity):
    rules = Rules({{}})
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(tmp_path / "valkey") as server:
        yield server


def exporter(server: Valkey, directory: Path, *options: str) -> Process:
    (directory / "shop.py").write_text(textwrap.dedent(SHOP.format(url=server.url)))
    command = [sys.executable, "-m", "celery", "-A", "shop", "goalstate", "exporter", *options]
    return Process(command, log=directory / "exporter.log", cwd=directory)


def address_of(process: Process) -> str:
    """Where it says that it listens."""

    def found() -> bool:
        return re.search(r"http://\S+/metrics", process.output()) is not None

    process.poll_until("it listens", found, timeout=30)
    [url] = re.findall(r"(http://\S+)/metrics", process.output())
    return str(url)


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_serves_metrics_until_it_is_terminated(server: Valkey, tmp_path: Path) -> None:
    with exporter(server, tmp_path, "--port", "0", "--address", HOST) as process:
        url = address_of(process)
        status, text = get(f"{url}/metrics")
        assert status == 200
        assert "\ngoalstate_index_up 1.0\n" in text
        assert 'goalstate_sweeper_up{kind="order"} 0.0' in text
        assert get(f"{url}/healthz") == (200, "ok\n")
        assert get(f"{url}/")[0] == 404
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "Traceback" not in process.output()


def test_it_answers_while_the_index_hangs_or_is_gone(server: Valkey, tmp_path: Path) -> None:
    pool = concurrent.futures.ThreadPoolExecutor()
    with exporter(server, tmp_path, "--port", "0", "--address", HOST) as process, pool:
        url = address_of(process)
        with frozen(server.pid):
            scrapes = [pool.submit(get, f"{url}/metrics") for _ in range(3)]
            assert get(f"{url}/healthz") == (200, "ok\n")
            for scrape in scrapes:
                status, text = scrape.result()
                assert status == 200
                assert [line for line in text.splitlines() if line[0] != "#"] == ["goalstate_index_up 0.0"]
        server.stop()
        assert "\ngoalstate_index_up 0.0\n" in get(f"{url}/metrics")[1]
        server.start()
        assert "\ngoalstate_index_up 1.0\n" in get(f"{url}/metrics")[1]


def run(*arguments: str) -> str:
    app = Celery("shop", broker="redis://localhost", set_as_current=False)
    Engine(app)
    result = CliRunner().invoke(cli.goalstate, list(arguments), obj=CLIContext(app, True, None))
    assert isinstance(result.exception, SystemExit)
    return f"{result.exit_code} {result.output}"


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told = run("exporter", "--address", HOST, "--port", port)
    assert told.startswith("1 ")
    assert f"cannot listen on {HOST}, port {port}" in told


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    assert run("exporter", "--port", port).startswith("2 ")


def test_without_prometheus_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    told = run("exporter")
    assert told.startswith("2 ")
    assert "pip install 'celery-goalstate[prometheus]'" in told
