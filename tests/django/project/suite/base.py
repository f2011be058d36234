"""What the suites share."""

from contextlib import contextmanager
from unittest import mock

from django.test import TestCase, TransactionTestCase
from shop.celery import engine

from celery_goalstate.exceptions import IndexUnavailable


class FreshIndex:
    def setUp(self):
        super().setUp()
        for kind in engine.kinds:
            engine.delete_kind(kind)


class Case(FreshIndex, TestCase):
    pass


class TransactionCase(FreshIndex, TransactionTestCase):
    pass


@contextmanager
def index_away():
    """The index is in memory, and cannot be away: it answers as one whose server is."""
    index = type(engine.parts.index)
    error = IndexUnavailable("the index redis://localhost does not answer")
    with mock.patch.object(index, "enqueue", side_effect=error):
        yield


def described(row_or_entity):
    return engine.describe(getattr(row_or_entity, "entity", row_or_entity))
