"""What a user of the engine writes: entities.

The idea is that of the goal state engines of cluster schedulers and of Kubernetes' controllers: an entity
has a state, a goal state, and actions that move the one toward the other.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias

from celery_goalstate.display import printable
from celery_goalstate.settings import NAME

if TYPE_CHECKING:
    from celery_goalstate.actions import ActionsLike

#: What an entity's id may be given as.
IdLike: TypeAlias = str | int | uuid.UUID

MAX_ID_BYTES = 512
_NOT_IN_AN_ID = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, lone surrogates


def checked_id(value: object) -> str:
    """An entity's id: of an int its digits, of a UUID its canonical text.

    Raises `TypeError` or `ValueError` for what cannot be one.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, uuid.UUID):
        return str(value)
    if not isinstance(value, str):
        raise TypeError(f"an entity's id is {value!r}; give a string, an int or a UUID")
    if _NOT_IN_AN_ID.search(value) or not 1 <= len(value.encode()) <= MAX_ID_BYTES:
        shown = repr(value if len(value) <= 80 else f"{value[:80]}…")
        raise ValueError(
            f"an entity's id is {shown}; give 1 to {MAX_ID_BYTES} bytes of UTF-8 without control characters"
        )
    return str.__str__(value)  # a plain str, also of a subclass


@dataclass(frozen=True, slots=True)
class EntityRef:
    """Which entity is meant: its kind and its id. `str()` is `order/42`, made printable.

    Raises `TypeError` or `ValueError` for a kind or an id that cannot be one.
    """

    kind: str
    id: str

    def __post_init__(self) -> None:
        NAME("kind", self.kind)
        object.__setattr__(self, "id", checked_id(self.id))

    def __str__(self) -> str:
        return f"{self.kind}/{printable(self.id)}"


#: An entity, or a reference to one whose class this process need not know.
EntityLike: TypeAlias = "Entity | EntityRef"


class ActionTable(Protocol):
    """What `Entity.rules` is: `Rules`, or anything else that chooses actions by state and goal state."""

    def actions(self, state: Any, goal_state: Any) -> ActionsLike:
        """The actions that lead from the state toward the goal state."""


class Entity:
    """Something with a state and a goal state: subclass it, and register the class with an engine.

    A subclass defines `get_state`, `get_goal_state`, and either `rules` or `get_action_list`. It is rebuilt
    by `from_id` for every evaluation and reads its state from wherever the truth is.

    Raises `TypeError` or `ValueError` for an id that is not 1 to 512 bytes of UTF-8 without control
    characters. An int becomes its decimal string, a `uuid.UUID` its canonical text.
    """

    #: Names the entities of this class; by default the class's name in snake_case.
    kind: ClassVar[str] = "entity"

    #: Goal state -> state -> actions. Makes `get_action_list` unnecessary.
    rules: ClassVar[ActionTable | None] = None

    def __init__(self, id: IdLike) -> None:
        self.id = checked_id(id)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            cls.kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
        NAME(f"{cls.__qualname__}.kind", cls.kind)

    @classmethod
    def from_id(cls, id: str) -> Self:
        """Rebuild the entity on a worker."""
        return cls(id)

    @classmethod
    def iter_unconverged(cls) -> Iterable[IdLike]:
        """The ids of the entities whose state is not their goal state, from the source of truth."""
        raise NotImplementedError(f"{cls.__name__} cannot be resynced: it does not define iter_unconverged()")

    def get_id(self) -> str:
        """What tells this entity from others of its kind."""
        return self.id

    @property
    def ref(self) -> EntityRef:
        """Kind and id."""
        return EntityRef(self.kind, self.get_id())

    def get_state(self) -> Any:
        """Where the entity is: any value that can be compared and printed, say an Enum's member."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_state()")

    def get_goal_state(self) -> Any:
        """Where the entity is meant to be."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_goal_state()")

    def get_action_list(self, state: Any, goal_state: Any) -> ActionsLike:
        """What leads from the state toward the goal state, in order; nothing: there is nothing to do."""
        if self.rules is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither `rules` nor get_action_list()")
        return self.rules.actions(state, goal_state)

    def is_converged(self, state: Any, goal_state: Any) -> bool:
        """Whether the goal is reached; by default, whether the two states are equal."""
        return bool(state == goal_state)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.ref}>"

    def __eq__(self, other: object) -> bool:
        return self.ref == other.ref if isinstance(other, Entity) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.ref)


def can_resync(cls: type[Entity]) -> bool:
    """Whether the class defines `iter_unconverged`."""
    undefined: Any = Entity.iter_unconverged
    return getattr(cls.iter_unconverged, "__func__", None) is not undefined.__func__
