"""Which rooms may know Celery and kombu: a module that is on neither list has not been thought about."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]

MAY_KNOW_CELERY = {"cli", "contrib", "engine", "messages", "registry", "signals", "testing", "worker"}


def test_each_room_either_may_know_celery_or_is_checked_not_to() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [checked] = [each for each in contracts if each["name"] == "Rooms that know neither Celery nor kombu"]
    others = {module.removeprefix("celery_goalstate.") for module in checked["source_modules"]}
    entries = (ROOT / "celery_goalstate").iterdir()
    rooms = {entry.stem for entry in entries if entry.suffix == ".py" or entry.is_dir()}
    assert others.isdisjoint(MAY_KNOW_CELERY)
    assert others | MAY_KNOW_CELERY == rooms - {"__init__", "__pycache__"}
