"""The lanes on other releases (`make older`, `make newest`) try what they are to try."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.hosts.__main__ import MORE, OLDER, ROOT, SHORT


def test_the_oldest_releases_that_are_admitted_are_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [re.findall(r"^(\w+)(?:\[\w+\])?>=([\d.]+)", each)[0] for each in project["dependencies"]]
    pinned = dict(pin.split("==") for pin in next(iter(OLDER.values())))
    for name, oldest in bounds:
        assert pinned[name].removesuffix(".0") == oldest.removesuffix(".0")


@pytest.mark.parametrize("path", sorted({*SHORT, *MORE}))
def test_what_is_to_be_tried_is_there(path: str) -> None:
    file, _, name = path.partition("::")
    assert (ROOT / file).exists()
    assert not name or f"def {name}(" in (ROOT / file).read_text()
