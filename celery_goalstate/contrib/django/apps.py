"""Django's app: it imports the entities of all other apps, in every process of the project."""

from __future__ import annotations

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules


class GoalStateConfig(AppConfig):
    """`"celery_goalstate.contrib.django"` in `INSTALLED_APPS`."""

    name = "celery_goalstate.contrib.django"
    label = "celery_goalstate"
    verbose_name = "Goal states"

    def ready(self) -> None:
        """Import each app's module `entities`, if it has one: so web processes know the kinds, too."""
        autodiscover_modules("entities")
