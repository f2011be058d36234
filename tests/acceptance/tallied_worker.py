"""What `celery --app tests.acceptance.tallied_worker` finds."""

from __future__ import annotations

from tests.acceptance.tallied import from_environment

app = from_environment()
