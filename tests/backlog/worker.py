"""What `celery --app tests.backlog.worker` finds."""

from __future__ import annotations

from tests.backlog.app import from_environment

app = from_environment().app
