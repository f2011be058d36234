"""A fleet of hosts and its maintenance: a Django site on celery-goalstate."""

from .celery import app as celery_app

__all__ = ["celery_app"]
