"""Say where an entity should be; Celery workers bring it there, and try again until it is."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_goalstate.actions import Action, ActionList, Context, Requeue, Stop
    from celery_goalstate.description import Description, Enqueued, Status
    from celery_goalstate.engine import Engine
    from celery_goalstate.entity import Entity, EntityRef
    from celery_goalstate.registry import current_engine, shared_entity
    from celery_goalstate.rules import ANY, Rules
else:
    _MODULES = {
        "actions": ["Action", "ActionList", "Context", "Requeue", "Stop"],
        "description": ["Description", "Enqueued", "Status"],
        "engine": ["Engine"],
        "entity": ["Entity", "EntityRef"],
        "registry": ["current_engine", "shared_entity"],
        "rules": ["ANY", "Rules"],
    }

    def __getattr__(name: str) -> Any:
        """Import what is asked for: each run of pytest imports this package, for its plugin."""
        from importlib import import_module

        for module, names in _MODULES.items():
            if name in names:
                found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
