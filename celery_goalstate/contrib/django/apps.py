"""Django's app: it imports the entities of all other apps, in every process of the project."""

from __future__ import annotations

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules

from celery_goalstate.contrib.django.guard import TransactionGuard
from celery_goalstate.registry import all_engines


class GoalStateConfig(AppConfig):
    """`"celery_goalstate.contrib.django"` in `INSTALLED_APPS`."""

    name = "celery_goalstate.contrib.django"
    label = "goalstate"
    verbose_name = "Goal states"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Import each app's module `entities`, if it has one, so that web processes know the kinds, too.

        The index is left alone: a server that loads the app may fork afterwards.
        """
        autodiscover_modules("entities")
        from celery_goalstate.contrib.django import checks  # noqa: F401 - they register themselves

        for engine in list(all_engines):
            guard = TransactionGuard(engine)
            if guard not in engine.hooks.before_enqueue:
                engine.before_enqueue(guard)
