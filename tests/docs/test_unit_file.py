"""The systemd unit of the page on deployment: it starts a worker of the shop, by itself, and not as root."""

from __future__ import annotations

import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.docs.pages import blocks
from tests.servers import Process

HOME = "/srv/shop"


@pytest.fixture(scope="module")
def unit() -> ConfigParser:
    [block] = [block for block in blocks(Path("docs/how-to/deployment.md")) if block.language == "ini"]
    parser = ConfigParser(interpolation=None)
    parser.read_string(block.text)
    return parser


def test_its_command_starts_a_worker_of_the_shop(unit: ConfigParser, shop: Path, tmp_path: Path) -> None:
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "celery").symlink_to(Path(sys.executable).with_name("celery"))

    def here(path: str) -> str:
        return path.replace(HOME, str(shop))

    command = shlex.split(here(unit["Service"]["ExecStart"]))
    where = Path(here(unit["Service"].get("WorkingDirectory", "/")))  # systemd's default
    with Process(command, log=tmp_path / "worker.log", cwd=where) as worker:
        worker.poll_until("the worker is ready", lambda: " ready." in worker.output(), timeout=40)
        assert "goalstate.order" in worker.output()


def test_it_is_started_with_the_machine_and_again_and_again(unit: ConfigParser) -> None:
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert unit["Service"]["Restart"] == "always"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"


def test_it_does_not_run_as_root(unit: ConfigParser) -> None:
    assert unit["Service"]["User"] not in {"", "root", "0"}
