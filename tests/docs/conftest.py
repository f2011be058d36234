"""A server for each test, and the shop of the pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.run_page import REDIS, STAGE
from tests.servers import Valkey


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def shop(valkey: Valkey, tmp_path: Path) -> Path:
    """The directory of the page's shop, whose index nobody has used yet."""
    for file in [*(STAGE / "common").glob("*.py"), STAGE / "operating" / "shop.py"]:
        url = valkey.url.removesuffix("/0")
        (tmp_path / file.name).write_text(REDIS.sub(url, file.read_text()))
    return tmp_path
