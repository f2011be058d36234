"""Say where an entity should be; Celery workers bring it there, and try again until it is."""

from celery_goalstate.actions import Action, ActionList, Context, Requeue, Stop
from celery_goalstate.description import Description, Enqueued, Status
from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity, EntityRef
from celery_goalstate.registry import current_engine, shared_entity
from celery_goalstate.rules import ANY, Rules

__all__ = [
    "ANY",
    "Action",
    "ActionList",
    "Context",
    "Description",
    "Engine",
    "Enqueued",
    "Entity",
    "EntityRef",
    "Requeue",
    "Rules",
    "Status",
    "Stop",
    "current_engine",
    "shared_entity",
]
