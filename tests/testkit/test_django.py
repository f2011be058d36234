"""The kit in a Django project, with pytest-django and Django's own test cases, on SQLite and PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import PostgreSQL

pytestmark = pytest.mark.timeout(400)

PROJECT = Path(__file__).parent / "django_project"


def run(*options: str, **environment: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "DJANGO_"))}
    command = [sys.executable, "-m", "pytest", "-q", "checks.py", *options]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_on_sqlite() -> None:
    run()


def test_on_postgresql(tmp_path: Path) -> None:
    with PostgreSQL(tmp_path / "postgresql") as server:
        run(POSTGRES_PORT=str(server.port))


@pytest.mark.parametrize("isolate", ["true"])
def test_isolated_on_sqlite(isolate: str) -> None:
    run("-o", f"goalstate_isolate={isolate}", "-k", "commit or DjangosOwn")
