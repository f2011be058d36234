"""What `celery --app tests.chaos.worker` finds."""

from __future__ import annotations

from tests.chaos.app import from_environment

app = from_environment().app
