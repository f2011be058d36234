"""The project's Celery app and the engine on it."""

import os

from celery import Celery

from celery_goalstate import Engine

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.settings")

app = Celery("example_project")
app.config_from_object("django.conf:settings", namespace="CELERY")

engine = Engine(app)
