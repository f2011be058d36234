"""What `celery --app tests.acceptance.worker` finds."""

from __future__ import annotations

from tests.acceptance.app import from_environment

app = from_environment()
