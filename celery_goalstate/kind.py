"""One registered kind: its entity class, its options, and the name of its Celery task."""

from __future__ import annotations

import os
from dataclasses import dataclass

from celery_goalstate.entity import Entity
from celery_goalstate.settings import KindOptions

DEFAULT_NAMESPACE = "default"


def task_name(kind: str, namespace: str) -> str:
    """The Celery task that evaluates a kind. It never changes: old workers know only old names."""
    return f"goalstate.{kind}" if namespace == DEFAULT_NAMESPACE else f"goalstate.{namespace}.{kind}"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a worker has to know to evaluate entities of one kind."""

    name: str
    entity_class: type[Entity]
    options: KindOptions
    standing: str = ""  #: id of an entity that is always scheduled: the sweeper enqueues it when it is not


def random_id() -> str:
    """A random UUID, as task ids are: each look needs one, and `uuid.uuid4` takes three times as long."""
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def milliseconds(seconds: float) -> int:
    """For the index, which counts in milliseconds. Rounded up: never before the time asked for."""
    return -int(-seconds * 1000 // 1)
