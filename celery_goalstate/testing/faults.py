"""What can happen at a point of a simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias


@dataclass(frozen=True, slots=True)
class Kill:
    """See `kill`."""


@dataclass(frozen=True, slots=True)
class LoseLease:
    """See `lose_lease`."""


@dataclass(frozen=True, slots=True)
class Fail:
    """See `fail`."""

    error: BaseException | type[BaseException]


#: The worker is killed here: nothing that it has begun goes on, not even a `finally`.
kill: Final = Kill()

#: The worker stalls here until its lease is over and others have done its work; then it goes on.
lose_lease: Final = LoseLease()


def fail(error: BaseException | type[BaseException]) -> Fail:
    """The error is raised here."""
    return Fail(error)


#: Any function is what somebody else does meanwhile.
Fault: TypeAlias = Kill | LoseLease | Fail | Callable[[], Any]
