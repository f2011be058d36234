"""What `celery --app tests.upgrades.worker` finds."""

from __future__ import annotations

from tests.upgrades.app import from_environment

app = from_environment()
