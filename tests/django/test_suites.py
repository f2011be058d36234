"""The project's own tests, run as a project runs them: `manage.py test`, one suite after the other."""

from __future__ import annotations

import json
import re

import pytest

from tests.django.conftest import PROJECT, Shop

SUITES = sorted(path.stem for path in (PROJECT / "suite").glob("[!_]*.py") if path.stem != "base")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("suite", SUITES)
def test_suite(shop: Shop, suite: str) -> None:
    output = shop.manage("test", "--noinput", f"suite.{suite}", OTHER_DATABASE=json.dumps(shop.another()))
    ran = re.search(r"^Ran (\d+) tests? in", output, re.MULTILINE)
    assert ran, output
    assert int(ran[1]), "no test was found"
